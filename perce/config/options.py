"""Command lines and YAML files from dataclasses: the options of a command are fields, and --help is made of their help.

    sections   frozen dataclasses whose fields carry `option(default, help)`; a command has a dataclass of sections
    flags      --name value, --name=value, --with-dashes, a bare --flag for booleans
    --config   a flat YAML file of the same names; flags win over it

Neither torch nor transformers is imported here, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from perce.config.elsewhere import ADVICE, NOTES, known_as
from perce.config.parser import LastOne, LineByLine, Parser, tell_of_two
from perce.config.yaml_file import by_new_names, dump_yaml, read_yaml
from perce.errors import UserError
from perce.files.paths import check_outputs, check_path
from perce.process import check_alone, guarded, silence_libraries
from perce.visible import say, shortened


class Files(Protocol):
    """The paths that a command reads and those that it writes, each by the option that names it."""

    @property
    def inputs(self) -> dict[str, str | None]: ...
    @property
    def outputs(self) -> dict[str, str | None]: ...


Chosen = TypeVar("Chosen", bound=Files)
"""The dataclass of a command's options."""


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A dataclass field that is an option of a command."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


def require(condition: bool, name: str, expected: str, got: Any) -> None:
    """UserError unless the condition on an option's value holds."""
    if not condition:
        raise UserError(f"{name}: expected {expected}, got {shortened(repr(got), 200)}.")


PATHS = ("DATA", "DIR", "FILE", "DIR|HUB_ID")  # values that --help shows for options that are paths
LARGEST = 3.4028234663852886e38  # the largest number in fp32


def require_finite(name: str, value: Any, given: Any = None) -> None:
    """UserError for a number that no tensor could hold: nan, inf, a float beyond fp32, an integer beyond 64 bits.

    given: the value as the user wrote it, for the message.
    """
    given = value if given is None else given
    if isinstance(value, float):
        require(math.isfinite(value) and abs(value) <= LARGEST, name, "a finite number that fp32 can hold", given)
    elif isinstance(value, int):
        require(abs(value) < 2**63, name, "a whole number below 2 ** 63", given)


def as_called(name: str) -> str:
    """What to type for the command of this name: `perce NAME` if this process was started so, else its module."""
    return f"perce {name}" if Path(sys.argv[0]).stem == "perce" else f"python -m perce.{name}"


@dataclass(frozen=True)
class Parsed:
    """A parsed command line with its YAML file: raw values by option, and the flags of the command itself."""

    raw: dict[str, Any]
    config_file: str | None
    print_config: bool
    passed_over: list[str]
    """Options of the file that belong to another command and are not used."""
    completed: str
    """A sentence that says where options that were not given come from."""


@dataclass(frozen=True)
class Command(Generic[Chosen]):
    """A command: its name, and the dataclass that its options become.

    options: a dataclass whose fields are sections; the name of each is a group in --help. extra: the word in --help and
    in errors for other options, which are passed on by name in the field `extra` ("": every option must be a field).
    passes_over: says whether a name in a file is an option of the other command whose files are read here too.
    renames: names of that command → names here. completes: from the given values, values for options that are not
    given (those of other commands are left out), and a sentence on where they come from. commands: all commands.
    uses_models: whether it needs transformers and datasets, which are then silenced.
    """

    name: str
    description: str
    options: type[Chosen]
    extra: str = ""
    passes_over: Callable[[str], bool] | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    completes: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], str]] | None = None
    commands: Callable[[], Sequence["Command[Any]"]] = lambda: ()
    uses_models: bool = True

    @property
    def prog(self) -> str:
        return as_called(self.name)

    @property
    def sections(self) -> dict[str, type]:
        hints = typing.get_type_hints(self.options)
        return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}

    @property
    def fields(self) -> dict[str, "dataclasses.Field[Any]"]:
        return {item.name: item for cls in self.sections.values() for item in dataclasses.fields(cls)}

    @property
    def types(self) -> dict[str, Any]:
        return {name: hint for cls in self.sections.values() for name, hint in typing.get_type_hints(cls).items()}

    def parse(self, argv: Sequence[str]) -> Parsed:
        """The values of the flags and of the --config file; flags win. UserError for unknown options."""
        namespace, rest = self._parser().parse_known_args([_underscored(argument) for argument in argv])
        if "--" in argv:
            raise UserError("--: expected an option and its value, got dashes alone. `--help` lists the options.")
        flags = {name: value for name, value in vars(namespace).items() if value is not None}
        config_file, print_config = flags.pop("config", None), flags.pop("print_config", False)
        flags |= self._extra_flags(rest)
        if config_file is not None:
            check_path("--config", config_file, is_file=True)
        file = read_yaml(config_file) if config_file else {}
        hints = self.types
        if self.passes_over:
            file = by_new_names(file, lambda name: self.renames.get(name, name), str(config_file))
            # For an option that the other command may leave open (null) and this one may not, the default here holds.
            file = {k: v for k, v in file.items() if v is not None or k not in hints or _is_optional(hints[k])}
        unused = [name for name in file if name not in self.fields and self.passes_over and self.passes_over(name)]
        raw = {name: value for name, value in file.items() if name not in unused} | flags
        for name, value in raw.items():
            if name not in self.fields and (not self.extra or self._here(name)):
                raise self.unknown(name, where="--" if name in flags else f"{config_file}: ")
            kind = self.fields[name].metadata["metavar"] if name in self.fields else None
            if kind in PATHS:  # what is done before `build` reads paths as texts
                raw[name] = path = value if isinstance(value, str) else convert(name, hints[name], value)
                if path is not None and not path.lstrip().startswith("{"):
                    check_path(f"--{name}", path, is_file=kind == "FILE")
        others, completed = self.completes(raw) if self.completes else ({}, "")
        others = {name: value for name, value in others.items() if name in self.fields}
        return Parsed(others | raw, config_file, print_config, unused, completed)

    def build(self, raw: Mapping[str, Any]) -> Chosen:
        """The options from raw values, converted and checked."""
        fields, hints = self.fields, self.types
        # A text that a number does not give back may be a name, such as 1.10 or 1e5.
        names = {k for k, v in raw.items() if isinstance(v, str) and _written(number(v)) != v.lower()}
        extra = {k: v if k in names else _numbers(v) for k, v in raw.items() if k not in fields}
        if extra and not self.extra:
            raise self.unknown(next(iter(extra)))
        values = {name: convert(name, hints[name], value) for name, value in raw.items() if name in fields}
        sections = {
            section: cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
            for section, cls in self.sections.items()
        }
        return self.options(**sections, **({"extra": extra} if self.extra else {}))

    def main(self, run: Callable[[Chosen], None]) -> Callable[..., int]:
        """main(argv): run the command, or print its options; see guarded for its exit code."""

        def parse_and_run(argv: Sequence[str] | None) -> None:
            parsed = self.parse(sys.argv[1:] if argv is None else argv)
            options = self.build(parsed.raw)
            if parsed.passed_over:
                say(f"{parsed.config_file}: options not used here: {', '.join(parsed.passed_over)}", error=True)
            if parsed.completed:
                say(parsed.completed, error=True)
            if parsed.print_config:
                say(*dump_yaml(flat(options)).splitlines())
            else:
                check_outputs(options.outputs, options.inputs | {"--config": parsed.config_file})
                check_alone(self.prog)
                if self.uses_models:
                    silence_libraries()
                run(options)

        return lambda argv=None: guarded(lambda: parse_and_run(argv))

    def unknown(self, name: str, known: Sequence[str] = (), where: str = "") -> UserError:
        """The error for an option that this command does not have, with the option or command that may be meant.

        known: names besides the fields. where: the text before the name."""
        if meant := self._meant(name, "--" if where in ("", "--") else ""):
            return UserError(f"{where}{name}: unknown option.{meant}")
        near = difflib.get_close_matches(name, dict.fromkeys([*self.fields, *known]), n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        others = f" the options; any {self.extra} works too" if self.extra else " the options"
        return UserError(f"{where}{name}: unknown option.{hint} `--help` lists{others}.")

    def _here(self, name: str) -> str | None:
        """The option of this command that other programs call by this name."""
        of_all = {option for command in self.commands() for option in command.fields}
        meant = known_as(name)
        return next((x for x in meant if x in self.fields or (self.extra and x not in of_all)), None)

    def _meant(self, name: str, dashes: str) -> str:
        """A sentence: which option, of this command or of another, a name stands for; "" if none is known."""
        if right := self._here(name):
            note = f": {NOTES[right]}." if right in NOTES else "."
            return f" It is {dashes}{right} here{note}"
        if name in ADVICE:
            return f" {ADVICE[name]}"
        for other in self.commands():
            if name in other.fields or (other.extra and not self.extra and self.passes_over and self.passes_over(name)):
                return f" It is an option of {other.prog}."
        rights = ((other, other._here(name)) for other in self.commands())
        return next((f" It is {dashes}{right} of {other.prog}." for other, right in rights if right), "")

    def _extra_flags(self, rest: Sequence[str]) -> dict[str, Any]:
        """The values of `--name value`, `--name=value` and bare `--name` flags that the parser does not know."""
        extra: dict[str, Any] = {}
        arguments = list(rest)
        while arguments:
            flag = arguments.pop(0)
            if not flag.startswith("--"):
                raise self._without_dashes(flag)
            name, equals, value = flag[2:].partition("=")
            if not equals:
                value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "true"
            tell_of_two(name, extra.get(name), value)
            extra[name] = value
        return extra

    def _without_dashes(self, argument: str) -> UserError:
        """The error for an argument without --: `-name` and `name=value`, meant as options, or a lone value."""
        written, equals, _ = argument.partition("=")  # the value may be a secret
        name = written.lstrip("-–—")
        if written == name and not equals:
            return UserError(f"{argument}: expected an option that starts with --. `--help` lists the options.")
        name = name.replace("-", "_")
        near = difflib.get_close_matches(name, self.fields, n=2)
        hint = f": --{name}." if name in self.fields else f".{self._meant(name, '--')}"
        if hint == "." and near:
            hint = f". Did you mean {' or '.join(near)}?"
        return UserError(f"{written}: an option begins with two dashes{hint} `--help` lists the options.")

    def _parser(self) -> argparse.ArgumentParser:
        parser = Parser(self.prog, None, self.description, formatter_class=LineByLine, allow_abbrev=False)
        if self.extra:
            parser.epilog = f"Any other {self.extra} can be given by its own name, such as --weight_decay 0.1."
        parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags win", action=LastOne)
        parser.add_argument(
            "--print_config", action="store_true", default=None, help="print the resolved options and stop"
        )
        hints = self.types
        for section, cls in self.sections.items():
            group = parser.add_argument_group(section, (cls.__doc__ or "").splitlines()[0])
            for item in dataclasses.fields(cls):
                hint = hints[item.name]
                default = "" if item.default is None or item.default is False else f" [{_written(item.default)}]"
                first, *rest = item.metadata["help"].splitlines()
                help = "\n".join([first + default, *rest]).replace("%", "%%")
                kind = {"nargs": "?", "const": "true"} if hint is bool else {}
                metavar = item.metadata.get("metavar") or _metavar(hint)
                group.add_argument(f"--{item.name}", help=help, metavar=metavar, action=LastOne, **kind)  # type: ignore[arg-type]
        return parser


def flat(options: Any) -> dict[str, Any]:
    """The values of all sections by option, as in a YAML file."""
    sections = [section for section in vars(options).values() if dataclasses.is_dataclass(section)]
    return {name: value for section in sections for name, value in vars(section).items()}


def _written(value: Any) -> str:
    """The value as it is written on a command line and in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(hint: Any) -> str:
    plain = _plain_type(hint)
    if typing.get_origin(plain) is Literal:
        return "|".join(typing.get_args(plain))
    return {bool: "true|false", int: "N", float: "X"}.get(plain, "VALUE")


def _underscored(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if not re.fullmatch(r"--[\w-]+", flag):
        return argument
    if value == "--":  # to argparse it is no value: an empty list, or true
        raise UserError(f"{flag}: expected a value, got '--'. `--help` lists the options.")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def number(value: Any) -> Any:
    """The number or boolean that a string spells; other values unchanged."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for cast in (int, float):
        try:
            return cast(value)
        except ValueError:
            continue
    return value


def _numbers(value: Any) -> Any:
    """Like `number`, also of what a mapping or a list in it holds, where YAML takes 1e-6 for a text too."""
    if isinstance(value, Mapping):
        return {name: _numbers(part) for name, part in value.items()}
    return [_numbers(part) for part in value] if isinstance(value, list) else number(value)


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _plain_type(hint: Any) -> type:
    if _is_optional(hint):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    return hint


def convert(name: str, hint: Any, value: Any) -> Any:
    """A flag's string or a YAML scalar → the field's type."""
    plain, optional = _plain_type(hint), _is_optional(hint)
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        require(optional, name, f"a value of type {getattr(plain, '__name__', plain)}", value)
        return None
    if typing.get_origin(plain) is Literal:
        require(value in typing.get_args(plain), name, "one of " + ", ".join(typing.get_args(plain)), value)
        return value
    if plain is str:
        require(not isinstance(value, list), name, "one text", value)
        if not str(value).strip():
            raise UserError(f"{name}: expected a value, got {value!r}. Is a variable of the shell empty?")
        return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value)
    converted = number(value)
    if isinstance(converted, int) and abs(converted) > LARGEST:  # perhaps more than a float can hold
        converted = math.inf
    fits = {
        bool: isinstance(converted, bool),
        int: isinstance(converted, int | float) and not isinstance(converted, bool) and float(converted).is_integer(),
        float: isinstance(converted, int | float) and not isinstance(converted, bool),
    }[plain]
    require(fits, name, {bool: "true or false", int: "a whole number", float: "a number"}[plain], value)
    require_finite(name, plain(converted), value)
    return plain(converted)
