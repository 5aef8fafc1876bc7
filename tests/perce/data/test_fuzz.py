"""Mutated files of every kind and format give examples, skipped rows with their place, or one paragraph, no traceback.

The slow test reads 20,000 of them; the quick one reads a few, so that the slow one's helpers stay tested.
"""

import csv
import io
import json
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perce import UserError, load_examples
from perce.data.rows import Document, Example
from tests.helpers.raw_rows import ABSTRACT, CONVAI2, GOOD, LAMP, SPC, TALK

ROWS = [
    {**GOOD, "user_id": "ana", "personal_spans": [[0, 7]]},
    {"persona": ["I bake."], "messages": TALK, "user_id": 3},
    {"persona": "p", "prompt": TALK[:1], "completion": TALK[1:2]},
    CONVAI2,
    SPC,
    LAMP,
    ABSTRACT,
    {"text": "A document.", "user_id": "b"},
    {**GOOD, "response": 'Two\nlines, "quoted" – é 🐝', "when": 1.5, "seen": None},
]


def as_csv(rows: list[dict], written) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(rows[0])
    writer.writerows([v if isinstance(v, str) else written(v) for v in row.values()] for row in rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


SEEDS = {
    "jsonl": [b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in [row] * 3) for row in ROWS],
    "json": [json.dumps([row] * 3, ensure_ascii=False, indent=n % 2 or None).encode() for n, row in enumerate(ROWS)],
    "csv": [as_csv([row] * 3, written) for row in ROWS for written in (json.dumps, repr)],
    "parquet": [as_parquet([row] * 3) for row in ROWS],
}
# Texts that have broken readers.
PIECES = [
    b'"', b"'", b",", b"\n", b"\r", b"\\", b'\\"', b"[", b"]", b"{", b"}", b":", b";", b"\t", b" ", b"\0", b"...",
    b"\xff", b"\xe9", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", "\u202e\u2028\x85".encode(), b"\x1b[31m", b"[/b]",
    b"\\ud800", b"NaN", b"1e999", b"-0", b"null", b"true", b"9" * 5000, b"[" * 3000, b'{"a":' * 1500, b"['a' 'b']",
    b"array([1])", b'"persona"', b"persona", b"user_id", b"PAR1", b"PK\x03\x04", b"\x1f\x8b", b"x" * 100_000,
]  # fmt: skip


@st.composite
def mutated(draw, kind: str) -> bytes:
    """A file of this kind with one to six mistakes."""
    content = bytearray(draw(st.sampled_from(SEEDS[kind])))
    for _ in range(draw(st.integers(1, 6))):
        size = len(content)
        start = draw(st.integers(0, size))
        end = min(start + draw(st.integers(0, 40)), size)
        match draw(st.sampled_from(["insert", "replace", "remove", "repeat", "cut", "flip", "noise"])):
            case "insert":
                content[start:start] = draw(st.sampled_from(PIECES))
            case "replace":
                content[start:end] = draw(st.sampled_from(PIECES))
            case "remove":
                del content[start:end]
            case "repeat":
                content[start:start] = content[start:end] * draw(st.integers(1, 30))
            case "cut":
                del content[start:]
            case "flip" if start < size:
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "noise":
                content[start:end] = draw(st.binary(max_size=40))
    return bytes(content)


def check(path: Path, content: bytes, skip_bad_rows: bool) -> None:
    path.write_bytes(content)
    try:
        rows = load_examples(path, "train", skip_bad_rows=skip_bad_rows)
    except UserError as error:
        assert path.name in str(error) and len(error.args) in (1, 4) and len(str(error)) < 2500
        return
    assert rows.all and (rows.skipped == 0 or skip_bad_rows)
    assert all(str(path) in reason for reason in rows.reasons)
    for example in rows.all:
        texts = (example.text,) if isinstance(example, Document) else (
            *example.persona, *(turn.content for turn in example.turns), example.response
        )  # fmt: skip
        assert example.user_id is None or example.user_id.encode().decode() == example.user_id
        assert isinstance(example, Example | Document) and example.source.startswith(path.name)
        assert texts and all(isinstance(text, str) and text.strip() and text.encode() for text in texts)


def fuzz(tmp_path: Path, kind: str, files: int) -> None:
    @settings(
        max_examples=files, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @given(mutated(kind), st.booleans())
    def reads(content: bytes, skip_bad_rows: bool) -> None:
        check(tmp_path / f"rows.{kind}", content, skip_bad_rows)

    reads()


@pytest.mark.parametrize("kind", SEEDS)
def test_some_mutated_files(tmp_path, kind):
    for content in SEEDS[kind]:
        check(tmp_path / f"rows.{kind}", content, False)
    fuzz(tmp_path, kind, 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_files(tmp_path, kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(tmp_path, kind, 5000)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 500  # MiB
