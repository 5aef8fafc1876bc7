"""Checks of a page that run nothing: its links, the files that it names, its commands and their options."""

import importlib.util
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from perce import UserError
from perce.config.commands import COMMANDS
from perce.config.options import convert
from perce.config.schema import objective_of
from tests.helpers import ROOT
from tests.helpers.markdown import PROGRAMS, anchors_of, canonical, links_of, read, spans_of, words_of


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


def command_of(name: str) -> Any:
    return next((x for x in COMMANDS if re.split(r"[ .]", x.prog)[-1] == name), None)


def flaw_of_options(name: str, argv: list[str], whole: bool) -> str | None:
    """whole: check the values as well as the names."""
    command = command_of(name)
    if command is None:
        found = name.isupper() or importlib.util.find_spec(f"perce.{name}")  # in capitals: a placeholder
        return None if found else f"perce has no command {name}"
    try:
        raw = command.parse([word for word in argv if word != "--help"]).raw
        if whole:
            command.build(raw)
    except UserError as error:
        return str(error)
    unknown = set(raw) - set(command.fields) - training_arguments()
    return f"perce {name} has no option {', '.join(unknown)}" if unknown else None


def flaw_of_module(name: str, argv: list[str]) -> str | None:
    """For a module that parses its own options: each option has to occur in its source, or in its package's."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return f"there is no module {name}"
    path = Path(found.origin)
    source = "".join(x.read_text(encoding="utf-8") for x in {path, *path.parent.glob("*.py")})
    options = [word.partition("=")[0] for word in argv if word.startswith("--")]
    return next((f"{name} has no option {option}" for option in options if option not in source), None)


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
        name = argv.pop(0) if module == "perce" else module.removeprefix("perce.")
        return flaw_of_options(name, argv, whole)
    if program == "perce":
        return flaw_of_options(argv[0], argv[1:], whole) if argv and not argv[0].startswith("-") else None
    if program in ("python", "python3") and argv[0] == "-m":
        return flaw_of_module(argv[1], argv[2:])
    if program in ("python", "python3", "pytest"):
        return next((f"there is no {x}" for x in argv if re.search(r"\.py$|/$", x) and not (ROOT / x).exists()), None)
    if program == "make":
        return flaw_of_make(argv)
    if program == "pip" and argv[0] == "install":
        wanted = re.findall(r"\[([\w,]+)\]", " ".join(argv))
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
