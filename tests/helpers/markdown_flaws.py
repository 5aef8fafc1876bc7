"""Checks of a page that run nothing: its links, the files that it names, its commands and their options."""

import ast
import importlib.util
import itertools
import re
from collections.abc import Collection
from pathlib import Path

from perce import UserError
from perce.__main__ import COMMANDS as NAMES
from perce.config.commands import COMMANDS
from perce.config.options import convert
from perce.config.schema import objective_of
from tests.helpers import ROOT
from tests.helpers.markdown import PROGRAMS, Block, anchors_of, canonical, links_of, read, spans_of, words_of


def broken_links(page: str, prose: str) -> list[str]:
    flaws = []
    for link in links_of(prose):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            if not re.fullmatch(r"https?://([\w.-]+\.[a-z]+|localhost)(:\d+)?(/\S*)?|mailto:\S+@\S+", link):
                flaws.append(f"{link}: not an address")
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists():
            flaws.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors_of(target):
            flaws.append(f"{link}: no such heading")
    return flaws


def missing_files(prose: str) -> list[str]:
    """Paths of this repository in backticks that do not exist. A path may have stars."""
    paths = [span.partition("::")[0] for span in spans_of(prose)]
    ours = re.compile(r"(?:perce|perce_kernels|tests|benchmarks|docs|examples|recipes|\.ci)/[\w./*-]+")
    return [path for path in paths if ours.fullmatch(path) and not any(ROOT.glob(path.rstrip("/")))]


def training_arguments() -> set[str]:
    from transformers import TrainingArguments

    return set(TrainingArguments.__dataclass_fields__)


_COMMAND = re.compile(
    r"^\s*(?:\$ )?(?:\w+=\S+ +)*"
    r"(?:(?:make|perce|pip|pytest|torchrun)(?= *$| +[^\s\d=])|python3? -m ).*",
    re.MULTILINE,
)


def hidden_command(block: Block) -> str | None:
    """A line that reads as a command, in a block that is not run: perce, a version and more is output of doctor."""
    if block.commands or block.language == "python":
        return None
    indented = block.language == "indented" and re.search(r"^\S+ .*\s--\w.*", block.text, re.MULTILINE)
    found = indented or _COMMAND.search(block.text)
    return found[0].strip() if found else None


def flaw_of_perce(argv: list[str], whole: bool) -> str | None:
    """whole: check the values of options as well as their names."""
    name, *given = argv or ["--help"]
    given = [word for word in given if word not in ("--help", "-h")]
    if name in ("--help", "--version") or name.isupper():  # in capitals: a placeholder
        return None
    if name not in NAMES:
        return f"perce has no command {name}"
    command = {x.name: x for x in COMMANDS}.get(name)
    if command is None:
        return f"perce {name} takes no options, got {given[0]}" if given else None
    try:
        raw = command.parse(given).raw
        if whole:
            command.build(raw)
    except UserError as error:
        return str(error)
    unknown = set(raw) - set(command.fields) - training_arguments()
    return f"perce {name} has no option {', '.join(unknown)}" if unknown else None


def options_of_source(path: Path) -> set[str]:
    """The names that a module gives to add_argument; if it makes no parser, those of the modules it imports from."""
    tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [x for x in tree if isinstance(x, ast.Call) and getattr(x.func, "attr", "") == "add_argument"]
    if calls:
        return {x.value for call in calls for x in call.args if isinstance(x, ast.Constant)}
    modules = {x.module.replace(".", "/") for x in tree if isinstance(x, ast.ImportFrom) and x.module}
    ours = [ROOT / f"{x}.py" for x in modules if x.startswith("benchmarks/")]
    return set().union(*(options_of_source(x) for x in ours if x.is_file()))


def flaw_of_module(name: str, argv: list[str]) -> str | None:
    """For a module of this repository that parses its own options."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return f"there is no module {name}"
    options = [word.partition("=")[0] for word in argv if word.startswith("-")]
    known = options_of_source(Path(found.origin)) | {"--help"}
    return next((f"{name} has no option {option}" for option in options if option not in known), None)


def flaw_of_paths(program: str, argv: list[str]) -> str | None:
    """Of the paths given to python or pytest: the script, any argument of pytest, and names that end in .py or /."""
    if program == "pytest":
        words = [x for before, x in itertools.pairwise(["", *argv]) if not re.fullmatch("-[ckmnopW]", before)]
        paths = [x.partition("::")[0] for x in words if not x.startswith("-")]
    else:
        paths = [x for x in argv if re.search(r"\.py$|/$", x)]
        paths += [x for x in argv[:1] if not x.startswith("-")]
    return next((f"there is no {x}" for x in paths if not (ROOT / x).exists()), None)


def flaw_of_make(argv: list[str]) -> str | None:
    text = read("Makefile")
    for word in argv:
        name, equals, _ = word.partition("=")
        line = rf"^{re.escape(name)} \?=" if equals else rf"^{re.escape(word)}:"
        if word != "-n" and not re.search(line, text, re.MULTILINE):
            return f"Makefile has no {word}"
    return None


def flaw_of(command: str, whole: bool = True) -> str | None:
    """Why a command cannot work: a program, module, file, target, option or value that does not exist."""
    program, *argv = words_of(canonical(command))
    argv = [word for word in argv if word != "…"]
    if program == "torchrun":
        module, *argv = argv[argv.index("-m") + 1 :]
        return flaw_of_perce(argv if module == "perce" else [module.removeprefix("perce."), *argv], whole)
    if program == "perce":
        return flaw_of_perce(argv, whole)
    if program in ("python", "python3") and argv[:1] == ["-m"]:
        if argv[1] not in ("pip", "pytest"):
            return flaw_of_module(argv[1], argv[2:])
        program, *argv = argv[1:]
    if program in ("python", "python3", "pytest"):
        return flaw_of_paths(program, argv)
    if program == "make":
        return flaw_of_make(argv)
    if program == "pip" and argv[0] == "install":
        wanted = re.findall(r"(?:^|[ /])(?:\.|perce)\[([\w,]+)\]", " ".join(argv))
        extras = {name for names in wanted for name in names.split(",")}
        absent = [name for name in extras if not re.search(rf"^{name} = \[", read("pyproject.toml"), re.MULTILINE)]
        return f"pyproject.toml has no extra {absent[0]}" if absent else None
    if program == ".ci/run":
        return None if (ROOT / program).is_file() else f"there is no {program}"
    return None if program in PROGRAMS else f"{program}: unknown program"


def flaw_of_option(span: str, others: Collection[str] = ()) -> str | None:
    """Of `--name value --name value`. A value in capitals is a placeholder; of several values the first is checked.

    others: options of other programs."""
    for words in re.split(r"(?:^| )--(?=\w)", span)[1:]:
        name, value = (*re.split(r"[ =]", words.strip("'\""), maxsplit=1), "")[:2]
        field = name.replace("-", "_")
        commands = [command for command in COMMANDS if field in command.fields]
        if not commands and name not in {"help", "config", "print_config", *others} | training_arguments():
            return f"no command has the option --{name}"
        flaws = [flaw_of_value(field, command.types[field], value) for command in commands]
        if value and not value.isupper() and flaws and all(flaws):
            return flaws[0]
    return None


def flaw_of_value(name: str, hint: object, value: str) -> str | None:
    """In `a|b` each alternative is a value."""
    try:
        for one in value.split("|"):
            _ = objective_of(one) if name == "objective" else convert(name, hint, one)
    except UserError as error:
        return str(error)
    return None
