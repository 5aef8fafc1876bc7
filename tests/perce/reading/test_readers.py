"""perce.reading.readers: every file has one meaning, or an error with the place of the mistake."""

import gzip
import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perce import UserError, load_examples
from perce.data.rows import available_splits
from perce.reading import readers
from tests.helpers.csv_files import HEADER, csv_file, replies
from tests.helpers.raw_rows import GOOD, TALK, jsonl

# --- encodings and other kinds of file -------------------------------------------------------------------------------


def test_utf16_is_named(tmp_path):
    for name, text in (
        ("d.csv", f"{HEADER}\np,q,r\n"),
        ("d.jsonl", json.dumps(GOOD)),
        ("d.json", f"[{json.dumps(GOOD)}]"),
    ):
        for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
            (tmp_path / name).write_text(text, encoding=encoding)
            with pytest.raises(UserError, match=rf"{name}: expected UTF-8 text, got UTF-16.*iconv -f UTF-16"):
                load_examples(tmp_path / name, "train")


def test_windows_1252_is_named(tmp_path):
    good = json.dumps({**GOOD, "response": "caf\u00e9"}, ensure_ascii=False)
    for name, text, place in (
        ("d.csv", f"{HEADER}\np,q,caf\u00e9\n", ":2: field 'response'"), ("d.jsonl", good, ":1"),
        ("d.json", f"[{good}]", " row 1: field 'response'"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(text.encode("cp1252"))
        with pytest.raises(
            UserError, match=rf"{name}{place}: expected UTF-8 text, got the byte 0xe9.*WINDOWS-1252.*'é'"
        ):
            load_examples(tmp_path / name, "train")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.xlsx", b"PK\x03\x04", "a spreadsheet.*CSV UTF-8"),
        ("rows.csv", b"PK\x03\x04", "a spreadsheet or zip archive"),
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0), "compressed.*gunzip"),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), "compressed.*gunzip"),
        ("rows.tsv", b"a\tb\n", r"tabs.*\.csv"),
        ("rows.jsonl", b"PAR1", r"Parquet.*\.parquet"),
        ("rows.csv", b'{"persona": "p"}\n', r"JSON.*\.jsonl"),
        ("rows.jsonl", json.dumps([GOOD]).encode(), r"rows\.jsonl:1: .*JSON array.*\.json"),
        ("rows.jsonl", json.dumps([GOOD], indent=1).encode(), r"rows\.jsonl:1: .*JSON array.*\.json"),
        ("rows.json", json.dumps(GOOD, indent=1).encode(), r"rows\.json:1: .*several lines"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_examples(tmp_path / name, "train")


# --- damage, and what no program wrote -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1" * 5000, "a number of at most 4,300 digits"),
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ('{"a": ' * 900 + "1" + "}" * 900, None),  # deep, but still readable, in a field that is not used
    ],
)
def test_json_that_python_cannot_hold(tmp_path, value, words):
    row = json.dumps(GOOD)[:-1] + f', "extra": {value}}}'
    path = jsonl(tmp_path / "d.jsonl", GOOD, row, GOOD)
    rows = load_examples(path, "train", skip_bad_rows=True)
    (tmp_path / "d.json").write_text(f"[{json.dumps(GOOD)}, {row}]")
    if words is None:
        assert rows.skipped == 0 and len(load_examples(tmp_path / "d.json", "train").all) == 2
        return
    assert rows.skipped == 1 and len(rows.all) == 2
    for name, place in (("d.jsonl", ":2"), ("d.json", " row 2")):
        with pytest.raises(UserError, match=rf"{name}{place}: expected .*{words}"):
            load_examples(tmp_path / name, "train")


def test_what_is_nested_deeply_in_a_field_that_is_used(tmp_path):
    row = json.dumps({**GOOD, "persona": None}).replace("null", '{"a": ' * 900 + "1" + "}" * 900)
    rows = load_examples(jsonl(tmp_path / "d.jsonl", GOOD, row), "train", skip_bad_rows=True)
    assert rows.skipped == 1 and "field 'persona'" in rows.reasons[0] and len(rows.reasons[0]) < 400


def test_a_json_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 7)  # characters per piece: most rows span several pieces
    texts = ["a", "ä\u2028]", '"quoted" {[,', "x" * 100, "12"]
    for separators in ((",", ":"), (" ,\n", " : ")):
        path = tmp_path / "d.json"
        rows = [{**GOOD, "response": text} for text in texts]
        path.write_text(
            "\ufeff \n" + json.dumps(rows, ensure_ascii=False, separators=separators) + "\n", encoding="utf-8"
        )
        assert [(e.source, e.response) for e in load_examples(path, "train")] == [
            (f"d.json row {number}", text) for number, text in enumerate(texts, 1)
        ]
    for text, place in (
        ("[]", "it has no rows"), ("[", r"d\.json:1: not JSON"), ("[12, 345]", r"row 1: .*got int 12"),
        ("[GOOD,]", r"d\.json:1: not JSON"), ("[GOOD,\nGOOD GOOD]", r"d\.json:2: not JSON"),
        ("[GOOD", r"d\.json:1: not JSON"), ("[GOOD] x", r"d\.json:1: not JSON"),
    ):  # fmt: skip
        path.write_text(text.replace("GOOD", json.dumps(GOOD)))
        with pytest.raises(UserError, match=place):
            load_examples(path, "train")
    monkeypatch.setattr(readers, "ROW_LIMIT", 1000)  # the error is found, however much text follows
    path.write_text(f"[{json.dumps(GOOD)},\n{{'persona': 1}},\n{json.dumps([GOOD] * 100)[1:]}")
    with pytest.raises(UserError, match=r"d\.json:2: not JSON: Expecting property name"):
        load_examples(path, "train")
    path.write_text(f"[{json.dumps(GOOD)},\n{json.dumps(GOOD)} ?]")
    with pytest.raises(UserError, match=r"d\.json:2: not JSON"):
        load_examples(path, "train", skip_bad_rows=True)


def test_a_json_file_of_splits_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("perce.reading.readers.PIECE", 64)
    rows = [{**GOOD, "response": f"Number {i}."} for i in range(40)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"train": rows[:30], "valid": rows[30:], "test": []}, indent=1))
    train, valid = (load_examples(path, split).all for split in ("train", "validation"))
    assert [e.response for e in [*train, *valid]] == [row["response"] for row in rows]
    assert train[1].source == "d.json train row 2" and valid[0].source == "d.json valid row 1"
    assert available_splits(path) == ["train", "validation"]
    rows[31] = {**GOOD, "response": 7}
    path.write_text(json.dumps({"train": rows[:30], "valid": rows[30:]}))
    with pytest.raises(UserError, match=r"d\.json valid row 2: field 'response'"):
        load_examples(path, "validation")
    for broken, words in (
        ('{"train": [{}] "valid": []}', "expected ',' or '}'"), ('{"train": [{}], "valid": 3}', "expected '\\['"),
        ('{"train": [{} {}]}', "expected ',' or '\\]'"), ('{"train": [{}, {"a": 1', "not JSON"),
        ('{"train": [{}], valid: []}', "not JSON"), ('{"train": [{}],}', "not JSON"),
        ('{"train": [{}], {"a": 1}: []}', "name"),
        ('{"train": [{}], [1]: []}', "name"), ('{"train": [{}], "train": []}', "twice"),
        ('{"train": [{}]} more', "more text after"), ('{"train": [{}], "valid": [{}], "dev": [{}]}', "valid, dev"),
        ('{"train": [{}], "valid" []}', "expected ':'"),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(UserError, match=words):
            available_splits(path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_a_row_has_a_bound(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "ROW_LIMIT", 1000)
    big, row = {**GOOD, "response": "x" * 2000}, json.dumps(GOOD)
    if name == "d.jsonl":
        jsonl(tmp_path / name, row + " " * (1000 - len(row)), big, GOOD)  # the first row has the largest size
    elif name == "d.json":
        (tmp_path / name).write_text(json.dumps([GOOD, big, GOOD]))
    else:
        csv_file(tmp_path / name, "p,q,r", f"p,q,{'x' * 2000}", "p,q,r")
    with pytest.raises(UserError, match=rf"{name}(:2|:3| row 2): expected a row of at most .*, got a longer one"):
        load_examples(tmp_path / name, "train")
    if name != "d.json":  # in an array the beginning of the next row cannot be found
        rows = load_examples(tmp_path / name, "train", skip_bad_rows=True)
        assert len(rows.all) == 2 and rows.skipped == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_a_line_of_a_gigabyte_takes_no_gigabytes(tmp_path, name):
    """Before rows had a limit, it took 8.7 GiB and ended in an abort."""
    with (tmp_path / name).open("wb") as file:
        file.write(
            b'[{"persona": "p", "query": "q", "response": "' if name != "d.csv" else b"persona,query,response\np,q,"
        )
        for _ in range(1024):
            file.write(b"x" * 2**20)
    program = f"""
import resource
from perce import UserError, load_examples
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_examples({str(tmp_path / name)!r}, "train")
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024, "MiB")
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "expected a row of at most 64 MiB" in printed
    assert int(printed.split()[-2]) < 600


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table({"persona": ["p"] * 3, "query": ["q"] * 3, "response": ["r"] * 3} | columns), path)
    return path


def bad_text() -> pa.Array:
    """Three texts of which the second is not UTF-8; Arrow does not check that."""
    return pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    )


def test_parquet_values_that_python_cannot_hold(tmp_path):
    """Such a value makes its row a bad row only if its field is used."""
    year_10000 = int((datetime(9999, 12, 31) - datetime(1970, 1, 1) + timedelta(days=1)).total_seconds() * 1e6)
    times = pa.array([0, year_10000, 0], pa.timestamp("us"))
    whole = load_examples(parquet(tmp_path / "d.parquet", seen=times, note=bad_text()), "train").all
    assert [(e.source, e.response) for e in whole] == [(f"d.parquet row {i}", "r") for i in (1, 2, 3)]
    path = parquet(tmp_path / "d.parquet", response=bad_text())
    with pytest.raises(UserError, match=r"d\.parquet row 2: field 'response': expected a value that can be read, got"):
        load_examples(path, "train")
    rows = load_examples(path, "train", skip_bad_rows=True)
    assert [e.response for e in rows] == ["a", "b"] and rows.skipped == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_values_of_several_types_that_datasets_stores_as_json(tmp_path, streaming):
    """datasets stores a field as JSON, with quotes and escapes, if rows have it as a text and as a list."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no such columns")
    text, anything = datasets.Value("string"), datasets.Json()
    rows = [{**GOOD, "response": 'Two\n"lines".'}, {**GOOD, "persona": "I bake."}]
    columns = {"persona": anything, "query": text, "response": anything}
    odd = {"role": "assistant", "content": [{"type": "text", "text": "Yo"}]}
    talks = [{"persona": ["p"], "messages": TALK[:2]}, {"persona": ["p"], "messages": [TALK[0], odd]}]
    nested = {"persona": datasets.List(text), "messages": datasets.List({"role": text, "content": anything})}
    for name, given, features in (("rows", rows, columns), ("talks", talks, nested)):
        table = datasets.Dataset.from_list(given, features=datasets.Features(features))
        table.save_to_disk(tmp_path / name)
        table.to_parquet(tmp_path / f"{name}.parquet")
    for place in ("rows", "rows.parquet"):
        first, second = load_examples(tmp_path / place, "train", streaming=streaming)
        assert (first.response, first.persona) == ('Two\n"lines".', ("I bake.", "I have a dog."))
        assert (second.response, second.persona) == (GOOD["response"], ("I bake.",))
    for place in ("talks", "talks.parquet"):
        talk = load_examples(tmp_path / place, "train", streaming=streaming, skip_bad_rows=True)
        assert [example.response for example in talk] == ["Hello!"]
        assert "row 2: field 'messages[1].content': expected a non-empty string, got list" in talk.reasons[0]


def test_a_parquet_column_whose_name_is_not_utf8(tmp_path):
    parquet(tmp_path / "d.parquet", odd_name=["x"] * 3)
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes().replace(b"odd_name", b"odd\xffname"))
    with pytest.raises(UserError, match=r"d\.parquet: damaged, or not a Parquet file"):
        load_examples(tmp_path / "d.parquet", "train")


def test_damaged_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({n: [f"{n} {i}" for i in range(5000)] for n in ("persona", "query", "response")}), path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:9000] + bytes(4000) + whole[13000:], b"", b"PAR1", b"PAR1PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"d\.parquet: damaged, or not a Parquet file"):
            load_examples(path, "train")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    Path(tmp_path / "d.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"d\.jsonl: cannot be read \(Input/output error\)"):
        load_examples(tmp_path / "d.jsonl", "train")
    jsonl(tmp_path / "e.jsonl", GOOD)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for name in ("e.jsonl", "e.json", "e.csv"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(Permission denied\)"):
            load_examples(tmp_path / name, "train")


def test_a_column_that_is_there_twice(tmp_path):
    with pytest.raises(UserError, match=r"d\.csv:1: .*'response'.*columns 3 and 4"):
        load_examples(csv_file(tmp_path / "d.csv", "p,q,r,s", header=f"{HEADER},response"), "train")
    twice = pa.table([["p"], ["q"], ["r"], ["s"]], names=[*HEADER.split(","), "response"])
    pq.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet: .*'response'.*columns 3 and 4"):
        load_examples(tmp_path / "d.parquet", "train")
    double = json.dumps(GOOD)[:-1] + ', "response": "another"}'
    with pytest.raises(UserError, match=r"d\.jsonl:2: field 'response': expected it once per object, got it twice"):
        load_examples(jsonl(tmp_path / "d.jsonl", GOOD, double), "train")
    assert load_examples(tmp_path / "d.jsonl", "train", skip_bad_rows=True).skipped == 1
    (tmp_path / "d.json").write_text(f"[{json.dumps(GOOD)}, {double}]")
    with pytest.raises(UserError, match=r"d\.json row 2: field 'response': expected it once per object"):
        load_examples(tmp_path / "d.json", "train")
    unnamed = csv_file(tmp_path / "u.csv", "0,p,q,r,,", header=f",{HEADER},,")  # an index, and empty columns at the end
    assert replies(unnamed) == [("2", "r")]
