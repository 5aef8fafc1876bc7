"""The pages of the documentation, and what they show: blocks of code, commands, links, headings, names in backticks."""

import ast
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "perce/demo/README.md")
)
HISTORY = {"docs/LOG.md", "CHANGELOG.md"}
"""Pages of what once was: their links are checked, but not the commands and files that they name."""
SHELL = {"bash", "sh", "shell", "console"}
PROGRAMS = set(
    ".ci/run accelerate cd curl docker export git hf llama-server make mkdir ollama perce pip pytest python python3 "
    "swift torchrun transformers uv vllm".split()
)
"""What the first line of an indented block begins with if the block is commands."""
_ASSIGNMENTS = re.compile(r"^(?:\w+=\S+\s+)*")


@dataclass(frozen=True)
class Block:
    """Code on a page. language: of a fence, such as "python"; "indented" where there is none."""

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """One a command, without comments; none where the block is something else."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        lines = [line for line in (re.sub(r"(^|\s+)#(\s.*)?$", "", line) for line in lines) if line.strip()]
        if self.language == "indented" and lines and program_of(lines[0]) in PROGRAMS:
            for line in lines:
                assert program_of(line) in PROGRAMS, f"{self.page}:{self.line}: expected a program, got {line!r}"
            return lines
        return lines if self.language in SHELL else []


def program_of(command: str) -> str:
    return _ASSIGNMENTS.sub("", command.strip()).partition(" ")[0]


def canonical(command: str) -> str:
    """`python -m perce.train …` and `python -m perce train …` as `perce train …`, and blanks as one."""
    return re.sub(r"^((?:\w+=\S+ )*)python3? -m perce(?:[. ]|$)", r"\1perce ", " ".join(command.split()))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """Fenced and indented blocks, in order."""
    return _divided(page, read(page) if text is None else text)[0]


def prose_of(page: str, text: str | None = None) -> str:
    """The page without its blocks and comments, line by line where it was."""
    return _divided(page, read(page) if text is None else text)[1]


def _divided(page: str, text: str) -> tuple[list[Block], str]:
    blocks, prose = [], []
    lines = re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL).splitlines()
    at, after_blank = 0, True
    while at < len(lines):
        line, start = lines[at], at
        if fence := re.match(r"\s*(```+|~~~+)\s*(\S*)", line):
            at += 1
            while at < len(lines) and not re.fullmatch(rf"\s*{fence[1]}\s*", lines[at]):
                at += 1
            language, body = fence[2], lines[start + 1 : at]
            at += 1
        elif after_blank and line.startswith("    ") and line.strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            language, body = "indented", lines[start:at]
        else:
            prose.append(line)
            at, after_blank = at + 1, not line.strip()
            continue
        blocks.append(Block(page, start + 1, language, textwrap.dedent("\n".join(body)).strip("\n") + "\n"))
        prose += [""] * (at - start)
        after_blank = True
    return blocks, "\n".join(prose)


def spans_of(prose: str) -> list[str]:
    """What stands in backticks."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def header_blocks(path: str) -> list[Block]:
    """Commands in what a recipe or an example begins with: comments that are indented, or a docstring's backticks."""
    text = read(path)
    if path.endswith(".py"):
        spans = spans_of(ast.get_docstring(ast.parse(text)) or "")
        return [Block(path, 1, "sh", f"{span}\n") for span in spans if program_of(span) in PROGRAMS]
    header = re.match(r"(?:#.*\n)*", text)[0]
    comments = [line.removeprefix("#") for line in header.splitlines()]
    return [Block(path, n, "indented", f"{line.strip()}\n") for n, line in enumerate(comments, 1) if line[:3] == "   "]


def links_of(prose: str) -> list[str]:
    """Targets of links, images and HTML's href, src and srcset."""
    text = re.sub(r"(`+).+?\1", "`code`", prose, flags=re.DOTALL)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    for value in re.findall(r"""\b(?:href|src|srcset)\s*=\s*["']([^"']*)["']""", text):
        found += [part.split()[0] for part in value.split(",") if part.strip()]
    return found


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the headings of a page, and the ids that it gives itself."""
    prose, found = prose_of(str(page), page.read_text(encoding="utf-8")), set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", prose, re.MULTILINE):
        said = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = base = re.sub(r"[^\w\- ]", "", said.lower()).replace(" ", "-")
        again = 0
        while name in found:
            name = f"{base}-{(again := again + 1)}"
        found.add(name)
    return found | set(re.findall(r"""<\w+[^>]*\s(?:id|name)=["']([^"']+)["']""", prose))


def words_of(command: str) -> list[str]:
    """Without assignments before it."""
    return shlex.split(_ASSIGNMENTS.sub("", command.strip()), comments=True)
