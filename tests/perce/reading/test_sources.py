"""The places where rows come from."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perce import UserError, load_examples
from perce.data.rows import available_splits
from perce.reading import sources
from tests.helpers.raw_rows import ABSTRACT, GOOD, LAMP, error, jsonl, load


def test_files_without_a_row(tmp_path):
    assert "it has no rows" in error(tmp_path)


def test_bom_crlf_blank_lines_and_line_separators(tmp_path):
    line = json.dumps({**GOOD, "response": "a\u2028b"}, ensure_ascii=False).encode()
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \r\n" + line)
    examples = load_examples(tmp_path / "d.jsonl", "train").all
    assert [(e.source, e.response) for e in examples] == [("d.jsonl:1", "a\u2028b"), ("d.jsonl:4", "a\u2028b")]


def test_bytes_that_are_not_utf8(tmp_path):
    good = json.dumps(GOOD).encode()
    (tmp_path / "d.jsonl").write_bytes(good + b"\n" + good.replace(b"dog", b"d\xf6g") + b"\n")
    with pytest.raises(UserError, match=r"d\.jsonl:2: expected UTF-8 text, got the byte 0xf6 at column"):
        load_examples(tmp_path / "d.jsonl", "train")
    assert load_examples(tmp_path / "d.jsonl", "train", skip_bad_rows=True).skipped == 1
    (tmp_path / "d.json").write_bytes(b"[\n" + good.replace(b"dog", b"d\xf6g") + b"]")
    with pytest.raises(UserError, match=r"d\.json row 1: field 'persona\[1\]': expected UTF-8 text, got the byte 0xf6"):
        load_examples(tmp_path / "d.json", "train")
    (tmp_path / "d.csv").write_bytes(b"persona,query,response\np,q,r\np,q,d\xf6g\n")
    with pytest.raises(UserError, match=r"d\.csv:3: field 'response': expected UTF-8 text"):
        load_examples(tmp_path / "d.csv", "train")


def test_json_files(tmp_path):
    path = tmp_path / "d.json"
    path.write_text("\ufeff\n" + json.dumps([GOOD, {**GOOD, "query": ""}], indent=1), encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.json row 2: field 'query'"):
        load_examples(path, "train")
    assert load_examples(path, "train", skip_bad_rows=True).all[0].source == "d.json row 1"
    assert load_examples(jsonl(path, GOOD, GOOD), "train").all[1].source == "d.json:2"  # JSON Lines in a .json file
    path.write_text(f"[\n{json.dumps(GOOD)},\n]")
    with pytest.raises(UserError, match=r"d\.json:(2|3): not JSON"):
        load_examples(path, "train")


def test_csv_files(tmp_path):
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["", "persona", "query", "response", "user_id"])  # the index of pandas has no name
        writer.writerow([0, json.dumps(["a", "b"]), "[not JSON]", "x" * 200_000, ""])
        file.write("\n")
        writer.writerow([1, "[a] list?", "two\nlines", "r", "u"])
        writer.writerow([2, "p", "q"])
    with pytest.raises(UserError, match=r"d\.csv:6: expected 5 cells, as in the header, got 3"):
        load_examples(tmp_path / "d.csv", "train")
    first, second = load_examples(tmp_path / "d.csv", "train", skip_bad_rows=True).all
    assert (first.persona, first.turns[0].content, first.user_id) == (("a", "b"), "[not JSON]", None)
    assert (second.persona, second.user_id, second.source) == (("[a] list?",), "u", "d.csv:4")
    with (tmp_path / "renamed.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["facts", "query", "response"], ['["a", "b"]', "[1, 2]", "[3]"]])
    (example,) = load_examples(tmp_path / "renamed.csv", "train", columns={"persona": "facts"}).all
    assert example.persona == ("a", "b") and (example.turns[0].content, example.response) == ("[1, 2]", "[3]")


def test_parquet_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**ABSTRACT, "x": None}, ABSTRACT]), tmp_path / "d.parquet")
    examples = load_examples(tmp_path / "d.parquet", "train").all
    assert examples[1].persona == load(tmp_path, ABSTRACT)[0].persona and examples[1].source == "d.parquet row 2"
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(UserError, match=r"d\.parquet: damaged, or not a Parquet file"):
        load_examples(tmp_path / "d.parquet", "train")


def test_struct_of_lists(tmp_path):
    profile = {"title": ["T1", "T2"], "abstract": ["A1", "A2"]}
    assert load(tmp_path, {**ABSTRACT, "profile": profile})[0].persona == load(tmp_path, ABSTRACT)[0].persona


def test_one_file_is_the_train_split(tmp_path):
    path = jsonl(tmp_path / "anything.jsonl", GOOD)
    assert available_splits(str(path)) == ["train"]
    assert load_examples(path, "validation").all == [] == load_examples(path, "test").all
    with pytest.raises(UserError, match=r"notes\.txt: cannot be read: a text has.*\.jsonl, \.json, \.parquet, \.csv"):
        load_examples(jsonl(tmp_path / "notes.txt", GOOD), "train")
    with pytest.raises(UserError, match=r"notes\.rows: cannot tell.*\.jsonl, \.json, \.parquet, \.csv"):
        load_examples(jsonl(tmp_path / "notes.rows", GOOD), "train")
    with pytest.raises(UserError, match="split: expected one of train, validation, test, got 'dev'"):
        load_examples(path, "dev")


@pytest.mark.parametrize("stem", ["validation", "valid", "val", "dev"])
def test_directory(tmp_path, stem):
    jsonl(tmp_path / f"{stem}.jsonl", GOOD, GOOD)
    jsonl(tmp_path / "train.json", GOOD)
    jsonl(tmp_path / "notes.jsonl", "not data")
    assert available_splits(tmp_path) == ["train", "validation"]
    assert load_examples(tmp_path, "validation").all[1].source == f"{stem}.jsonl:2"
    with pytest.raises(
        UserError, match=r"has no test split; it has train, validation; not read: notes\.jsonl \(the names"
    ):
        load_examples(tmp_path, "test")
    assert load_examples(tmp_path, "validation").unread == ("notes.jsonl",)
    jsonl(tmp_path / "train.csv", GOOD)
    with pytest.raises(UserError, match=r"train\.json, train\.csv are all files of the train split"):
        load_examples(tmp_path, "train")


def test_what_is_of_no_split_is_known(tmp_path):
    for name in ("train", "eval", "train_part2", "survey", "shared_contexts_32k", ".hidden", "metadata"):
        jsonl(tmp_path / f"{name}.jsonl", GOOD)
    for name in ("dataset_info", "dataset_infos"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "more.csv").write_text("a\n")
    (tmp_path / "notes.txt").write_text("a\n")
    assert load_examples(tmp_path, "train").unread == ("eval.jsonl", "more.csv", "train_part2.jsonl")
    assert load_examples(tmp_path / "train.jsonl", "train").unread == ()
    (tmp_path / "splits.json").write_text(json.dumps({"train": [GOOD], "foo": [GOOD], "valid": [GOOD]}))
    assert load_examples(tmp_path / "splits.json", "validation").unread == ("foo",)


def test_splits_are_named_if_none_has_a_name_that_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict({"train_sft": table, "test_sft": table}).save_to_disk(tmp_path / "saved")
    (tmp_path / "splits.json").write_text(json.dumps({"train": [], "train_sft": [GOOD], "test_sft": [GOOD]}))
    for data in ("saved", "splits.json"):
        with pytest.raises(UserError, match=rf"{data}: expected a split named train; .*, got train_sft, test_sft\."):
            available_splits(tmp_path / data)


def test_files_of_rows_that_cannot_be_read_are_named_too(tmp_path):
    jsonl(tmp_path / "validation.jsonl", GOOD)
    unread = ("more.csv.gz", "test.TSV", "train.jsonl.gz", "train_1.parquet.zst", "valid.xlsx")
    for name in (*unread, "README.txt", "images.zip", "train.md5", "train.jsonl.md5", ".train.jsonl.gz"):
        (tmp_path / name).write_text("x")
    assert load_examples(tmp_path, "validation").unread == unread
    with pytest.raises(UserError, match=r"not read: more.*; kinds of files: \.jsonl, \.json, \.parquet, \.csv;"):
        load_examples(tmp_path, "train")


def test_lamp_questions_and_outputs(tmp_path):
    question = {name: LAMP[name] for name in ("id", "input", "profile")}
    for name in ("train_questions", "dev_questions", "test_questions"):
        (tmp_path / f"{name}.json").write_text(json.dumps([question, {**question, "id": "8"}]))
    golds = [{"id": "8", "output": "eight"}, {"id": "7", "output": "gold"}]
    (tmp_path / "train_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": golds}))
    (tmp_path / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": golds[:1]}))
    assert available_splits(tmp_path) == ["train", "validation"]  # LaMP publishes no test outputs
    examples = load_examples(tmp_path, "train").all
    assert [e.response for e in examples] == ["gold", "eight"] and examples[0].persona == ("new ", "old")
    assert load_examples(tmp_path, "train").unread == ()
    for name in ("more_questions", "more_outputs"):
        (tmp_path / f"{name}.json").write_text("[]")
    assert load_examples(tmp_path, "train").unread == ("more_outputs.json", "more_questions.json")
    with pytest.raises(
        UserError, match=r"dev_questions\.json row 1: field 'output': .*dev_outputs\.json.*none for id '7'"
    ):
        load_examples(tmp_path, "validation")
    (tmp_path / "dev_outputs.json").write_text("{}")
    with pytest.raises(UserError, match=r"dev_outputs\.json: expected LaMP's"):
        load_examples(tmp_path, "validation")


def test_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([ABSTRACT, {**ABSTRACT, "name": "B"}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "val": table.select([1]), "more": table}).save_to_disk(tmp_path / "two")
    expected = load(tmp_path, ABSTRACT)[0].persona
    for streaming in (False, True):
        rows = load_examples(tmp_path / "one", "train", streaming=streaming)
        assert [(e.persona, e.source) for e in rows] == [(expected, "one row 1"), (expected, "one row 2")]
        assert [e.user_id for e in load_examples(tmp_path / "two", "validation", streaming=streaming)] == ["B"]
    assert available_splits(tmp_path / "one") == ["train"] and available_splits(tmp_path / "two") == [
        "train",
        "validation",
    ]
    assert load_examples(tmp_path / "one", "test").all == []
    assert load_examples(tmp_path / "two", "train").unread == ("more",)
    datasets.DatasetDict({"train": table, "val": table, "dev": table}).save_to_disk(tmp_path / "three")
    with pytest.raises(UserError, match="three: val, dev are all names of the validation split; keep one of them"):
        load_examples(tmp_path / "three", "train")
    (tmp_path / "two/dataset_dict.json").write_text('{"splits": ["train", "gone"]}')
    with pytest.raises(UserError, match="written by save_to_disk but cannot be read"):
        load_examples(tmp_path / "two", "train")


def test_shards_whose_columns_differ(tmp_path):
    """datasets itself says only that generating failed; the error must name the file and the mistake in it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    columns = {name: ["x"] for name in ("persona", "query", "response")}
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00002.parquet")
    del columns["response"]
    pq.write_table(pa.table({**columns, "answer": ["r"]}), tmp_path / "train-00001-of-00002.parquet")
    for streaming in (False, True):
        with pytest.raises(UserError) as caught:
            list(load_examples(tmp_path, "train", streaming=streaming))
        assert "train-00001-of-00002.parquet" in str(caught.value) and "answer" in str(caught.value)
        assert "column names don't match" in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_of_shards_has_one_name_wherever_it_is_read_from(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (tmp_path / "shards").mkdir()
    jsonl(tmp_path / "shards" / "train-00000-of-00001.jsonl", GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "shards", "./shards", "~/shards"):
        assert load_examples(path, "train").all[0].source == "shards[train] row 1"


def test_values_that_python_cannot_hold_in_a_saved_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    late = pa.array([0, 2**62], pa.timestamp("us"))
    table = pa.table({**{name: ["x", "y"] for name in ("persona", "query", "response")}, "seen": late})
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        assert len(list(load_examples(tmp_path / "saved", "train", streaming=streaming))) == 2


def test_a_saved_directory_that_is_damaged(tmp_path):
    """datasets maps the file into memory unchecked: a wrong offset crashed the process."""
    datasets = pytest.importorskip("datasets")
    columns = {name: ["abc", "def"] for name in ("persona", "query", "response")}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    whole = file.read_bytes()
    offsets = (0).to_bytes(4, "little") + (3).to_bytes(4, "little") + (6).to_bytes(4, "little")
    for damaged in (whole.replace(offsets, offsets[:4] + b"\xff\xff\xff\x7f" + offsets[8:]), whole[:500], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{tmp_path / 'saved'}.* cannot be read"):
            load_examples(tmp_path / "saved", "train")
    file.write_bytes(whole.replace(b"abc", b"a\xffc"))  # only the row of the text that is not UTF-8 is bad
    assert load_examples(tmp_path / "saved", "train", skip_bad_rows=True).skipped == 1
    both = whole.replace(b"abc", b"a\xffc", 1)  # a wrong offset after a text that is not UTF-8 is found too
    at = both.rfind(offsets)
    file.write_bytes(both[:at] + offsets[:4] + b"\xff\xff\xff\x7f" + offsets[8:] + both[at + 12 :])
    for skip in (False, True):
        with pytest.raises(UserError, match=f"{tmp_path / 'saved'}.* cannot be read"):
            load_examples(tmp_path / "saved", "train", skip_bad_rows=skip)
    file.write_bytes(whole)
    (tmp_path / "saved" / "state.json").write_text("[]")
    with pytest.raises(UserError, match="written by save_to_disk but cannot be read"):
        load_examples(tmp_path / "saved", "train")


def test_an_id_that_has_two_outputs(tmp_path):
    question = {name: LAMP[name] for name in ("id", "input", "profile")}
    (tmp_path / "train_questions.json").write_text(json.dumps([question]))
    golds = [{"id": "7", "output": "one"}, {"id": "7", "output": "another"}]
    (tmp_path / "train_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": golds}))
    with pytest.raises(UserError, match=r"train_outputs\.json: the id '7' is there twice"):
        load_examples(tmp_path, "train")


def test_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(sources, "hub_failure", lambda: None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["test", "val", "other"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert available_splits("owner/name:part") == ["validation", "test"] and not asked
    (example,) = load_examples("owner/name:part", "validation", streaming=True)
    assert asked == [("owner/name", "part", "val", True)] and example.source == "owner/name:part[val] row 1"
    with pytest.raises(UserError, match="owner/name has no train split; it has validation, test"):
        load_examples("owner/name", "train")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "dev", "valid"])
    rows = load_examples("owner/name", "validation")
    assert next(iter(rows)).source == "owner/name[valid] row 1" and rows.unread == ("dev",)


def test_paths_that_the_system_refuses(tmp_path):
    for path, reason in (
        (tmp_path / ("x" * 300), "File name too long"), (tmp_path / "a\0b.jsonl", "embedded null"),
        (f"{'d/' * 3000}x.jsonl", "File name too long"), ("", "expected a path"),
        ("~nobody-of-this-name/x.jsonl", "no user of this name"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"--data.*{reason}") as caught:
            load_examples(path, "train")
        assert len(str(caught.value)) < 300


def test_a_path_that_is_nearly_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "my_rows.jsonl", GOOD)
    with pytest.raises(UserError, match=r"No such file or directory: rows\.JSONL "):
        load_examples("rows.JSONL", "train")
    for path, near in (("data/my_row.jsonl", "data/my_rows.jsonl"), ("dtaa/my_rows.jsonl", "data/my_rows.jsonl")):
        with pytest.raises(UserError, match=rf"No such file or directory: {path} .*Did you mean {near}\?"):
            load_examples(path, "train")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """The Hub's library retries for half a minute. What is in the cache is still read."""
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    asked = []

    def names(*_):
        asked.append(constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE)
        if len(asked) == 1:
            raise ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")
        return ["train"]

    monkeypatch.setattr(sources, "hub_failure", lambda: "no network")
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    with pytest.raises(UserError, match=r"owner/name is not a file or directory here, and the Hub cannot be reached"):
        load_examples("owner/name", "train")
    assert available_splits("owner/name") == ["train"] and asked == [True, True]
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_data_that_cannot_be_found(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "hub_failure", lambda: None)

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach it\nTraceback: long")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(UserError, match=r"owner/name is not a file or directory here, and .*: Couldn't reach it. Give"):
        load_examples("owner/name", "train")
    with pytest.raises(UserError, match="holds no train, validation or test file"):
        load_examples(tmp_path, "train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in (
        "./nowhere",
        "rows.jsonl",
        "data/train",
        str(tmp_path / "x"),
        "a/b/c",
    ):  # these are paths, so the Hub is not asked
        with pytest.raises(UserError, match=r"No such file or directory: .*Check the path after --data"):
            load_examples(path, "train")
