"""A row of each format, and how the tests of rows read them."""

import json
import re
from pathlib import Path

import pytest

from perce import UserError, load_examples
from perce.data.rows import Example
from tests.helpers import ROOT

GOOD = {"persona": ["I bake.", "I have a dog."], "query": "Any plans?", "response": "Walking my dog."}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Plans?"},
    {"role": "assistant", "content": "A walk."},
]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]  # as ShareGPT has it
CONVAI2 = {"personality": ["i bake ."], "dialogue": [{"partner": "hi", "self": "hello"}, {"partner": "a", "self": "b"}]}
SPC = {
    "user 1 personas": ["I bake.", "I run."],
    "user 2 personas": ["I am a boy."],
    "conversation": [
        {"speaker": "User 1", "text": "Hi!"},
        {"speaker": "User 2", "text": "Hello!"},
        {"speaker": "User 2", "text": "Who are you?"},
        {"speaker": "User 1", "text": "A baker."},
    ],
}
LAMP = {"id": 7, "input": "Paraphrase: x", "output": "gold", "profile": [{"id": "a", "text": "old"}, {"text": "new "}]}
ABSTRACT = {
    "name": "A. Uthor",
    "input": "Generate an abstract",
    "output": "We prove it.",
    "profile": [{"id": "1", "title": "T1", "abstract": "A1", "year": 2001}, {"title": "T2", "abstract": "A2"}],
}

FILES = {"personamem": "questions_32k.jsonl", "personamem_v2": "benchmark.jsonl", "prism": "conversations.jsonl"}
"""Formats whose files are read together with others, and their names in docs/DATA.md."""
ROWS = [
    "perce", "perce", "prompt_completion", "preference", "sharegpt", "alpaca", "longlamp", "lamp", "lamp_qa", "amazon",
    "amazon", "convai2", "personachat", "personachat", "spc", "msc", "prefeval", "aloe", "text",
]  # fmt: skip
PAGE = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")


def documented(format: str) -> list[dict]:
    """The rows of a format that docs/DATA.md shows."""
    name = FILES.get(format, "")
    lines = PAGE.partition(f"```json{f' {name}' if name else ''}\n")[2].partition("```")[0].splitlines()
    return [json.loads(line) for line, of in zip(lines, [format] if name else ROWS, strict=True) if of == format]


def documented_files(folder: Path, format: str, *rows: dict) -> Path:
    """Writes a file of these rows, by default those that the page shows, and the files that it needs next to it."""
    for name, text in re.findall(r"```json (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return jsonl(folder / FILES.get(format, "rows.jsonl"), *(rows or documented(format)))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path, *rows: object, **options) -> list[Example]:
    return load_examples(jsonl(path / "data.jsonl", *rows), "train", **options).all


def error(path: Path, *rows: object, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(path, *rows, **options)
    message, *lines = caught.value.args  # one paragraph, but for a row of no format
    assert len(lines) == (3 if "expected the fields of a known format," in message else 0)
    return str(caught.value)
