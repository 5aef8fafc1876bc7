"""The console command `perce`: one subcommand for each `python -m perce.NAME`."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from perce.doctor import version
from perce.errors import UserError
from perce.process import guarded
from perce.visible import say, shortened

COMMANDS = {
    "train": "fine-tune a model with the PerCE loss",
    "score": "show which tokens of a reply are personal",
    "evaluate": "measure whether a model uses the persona, and compare two models",
    "compare": "compare two methods by results of evaluate, over several training seeds",
    "plan": "predict the memory and time of a training step from a model's config.json",
    "preview": "show what training would make of a dataset",
    "doctor": "show what is installed on this machine, what perce would use, and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first argument names; returns its exit code."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in COMMANDS:
        code: int = importlib.import_module(f"perce.{name}").main(rest)
        return code
    return guarded(lambda: _answer(name, rest))


def _answer(name: str, rest: Sequence[str]) -> None:
    """What `perce` prints when no subcommand runs; UserError for one that does not exist."""
    if rest and name.startswith("-"):
        raise UserError(f"{name}: expected nothing behind it, got {shortened(rest[0])!r}.")
    if name in ("--version", "-V", "version"):
        say(f"perce {version()}")
    elif name in ("--help", "-h", "help"):
        commands = (f"  {command:<10}{summary}" for command, summary in COMMANDS.items())
        say(
            "usage: perce COMMAND [options]", "", *commands, "",
            "`perce COMMAND --help` lists a command's options, `perce --version` prints the version.",
            "Each command also runs as `python -m perce.COMMAND`.",
        )  # fmt: skip
    else:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{shortened(name)!r}: expected a command, one of {', '.join(COMMANDS)}.{hint}")


if __name__ == "__main__":
    sys.exit(main())
