"""perce.rows: every format and place that rows come from, what is said of a bad row, and six real data sets."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from perce.errors import UserError
from perce.rows import FORMATS, Example, Rows, Turn, available_splits, load_examples

GOOD = {"persona": ["I bake.", "I have a dog."], "query": "Any plans?", "response": "Walking my dog."}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Plans?"},
    {"role": "assistant", "content": "A walk."},
]
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


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path, *rows: object, **options) -> list[Example]:
    return load_examples(jsonl(path / "data.jsonl", *rows), "train", **options).examples


def error(path: Path, *rows: object, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(path, *rows, **options)
    assert "\n" not in str(caught.value)  # commands print it as one paragraph
    return str(caught.value)


# --- formats --------------------------------------------------------------------------------------------------------


def test_perce_query(tmp_path):
    spans = {**GOOD, "user_id": 3, "personal_spans": [[8, 14]], "extra": "ignored"}
    first, second = load(tmp_path, {**GOOD, "persona": "I bake."}, spans)
    assert first == Example(("I bake.",), (Turn("user", "Any plans?"),), "Walking my dog.", None, None, "data.jsonl:1")
    assert (second.persona, second.user_id, second.source) == (("I bake.", "I have a dog."), "3", "data.jsonl:2")
    assert [second.response[a:b] for a, b in second.personal_spans] == ["my dog"]


def test_perce_messages(tmp_path):
    given, *replies = load(
        tmp_path, {"persona": "P", "messages": TALK[:3], "response": "R"}, {"persona": "P", "messages": TALK}
    )
    assert [turn.role for turn in given.turns] == ["user", "assistant", "user"]
    assert [(len(e.turns), e.response, e.source) for e in replies] == [
        (1, "Hello!", "data.jsonl:2"),
        (3, "A walk.", "data.jsonl:2"),
    ]


def test_perce_messages_may_open_with_the_assistant(tmp_path):
    (only,) = load(tmp_path, {"persona": "P", "messages": TALK[1:]})  # its opening line answers nothing: no example
    assert [turn.role for turn in only.turns] == ["assistant", "user"] and only.response == "A walk."


def test_longlamp_passages_newest_first(tmp_path):
    (abstract,) = load(tmp_path, ABSTRACT)
    assert abstract.persona == ("Title: T2\nAbstract: A2", "Title: T1\nAbstract: A1")
    assert (abstract.user_id, abstract.turns) == ("A. Uthor", (Turn("user", "Generate an abstract"),))
    entry = {"overall": 5.0, "summary": "S", "description": "D", "reviewText": "R"}
    (review,) = load(tmp_path, {"reviewerId": "r", "input": "i", "output": "o", "profile": [entry]})
    assert review.persona == ("Rating: 5.0\nProduct: D\nSummary: S\nReview: R",) and review.user_id == "r"
    entry = {"author": "w", "summary": "S", "content": "C", "id": 1}
    (topic,) = load(tmp_path, {"author": "w", "input": "i", "output": "o", "profile": [entry]})
    assert topic.persona == ("Summary: S\nContent: C",) and topic.user_id == "w"


@pytest.mark.parametrize(
    ("entry", "passage"),
    [
        ({"text": "T", "id": 1, "date": "2001"}, "T"),
        ({"text": "T", "title": "H"}, "Title: H\nText: T"),
        ({"text": "T", "title": "H", "category": "sport"}, "Category: sport\nTitle: H\nText: T"),
        ({"text": "T", "score": "4"}, "Rating: 4\nReview: T"),
        ({"description": "D", "tag": "comedy"}, "Tag: comedy\nDescription: D"),
        ({"title": "H", "abstract": "A"}, "Title: H\nAbstract: A"),
        ({"title": None, "abstract": "A"}, "A"),
    ],
)
def test_lamp_passages(tmp_path, entry, passage):
    (example,) = load(
        tmp_path, {**LAMP, "profile": [entry, {**entry, next(iter(entry)): "", "text": "", "abstract": ""}]}
    )
    assert example.persona[-1] == passage and example.user_id == "7"


def test_the_target_is_never_in_its_own_profile(tmp_path):
    leak = [{"text": "old"}, {"text": "- We  PROVE it\n"}, {"abstract": "We prove it.", "title": "T"}]
    (example,) = load(tmp_path, {**ABSTRACT, "profile": leak})
    assert example.persona == ("old",)
    assert "other than the row's own output" in error(tmp_path, {**ABSTRACT, "profile": leak[1:]})


def test_convai2(tmp_path):
    first, second = load(tmp_path, {**CONVAI2, "user_id": "family07"})
    assert first == Example(("i bake .",), (Turn("user", "hi"),), "hello", "family07", None, "data.jsonl:1")
    assert (
        second.turns == (Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "a")) and second.response == "b"
    )


def test_synthetic_persona_chat_is_seen_from_each_speaker(tmp_path):
    boy, baker = load(tmp_path, SPC)
    assert boy.persona == ("I am a boy.",) and baker.persona == ("I bake.", "I run.")
    assert boy.turns == (Turn("user", "Hi!"),) and boy.response == "Hello! Who are you?"  # one speaker's turns merged
    assert baker.turns == (Turn("assistant", "Hi!"), Turn("user", "Hello! Who are you?"))
    assert baker.response == "A baker."


@pytest.mark.parametrize("column", ["conversation", "Best Generated Conversation"])
def test_synthetic_persona_chat_as_published(tmp_path, column):
    said = "User 1: Hi!\r\nUser 2: Hello!\nWho are you?\nuser 1:A baker."
    row = {"user 1 personas": "I bake.\nI run.", "user 2 personas": "I am a boy.\n", column: said}
    strip = [(e.persona, e.turns, e.response) for e in load(tmp_path, row)]
    assert strip == [(e.persona, e.turns, e.response) for e in load(tmp_path, SPC)]
    with (tmp_path / "spc.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(row), list(row.values()), list(row.values())])
    rows = load_examples(tmp_path / "spc.csv", "train")
    assert [(e.persona, e.turns, e.response) for e in rows] == strip * 2 and rows.format == "spc"
    # Lines are the file's: the header is 1; the first record holds 1 + 1 + 3 + 0 line breaks in its cells.
    assert [e.source for e in rows][::2] == ["spc.csv:2", "spc.csv:8"]


def test_prompt_completion(tmp_path):
    plain = {"persona": "P", "prompt": "Hi", "completion": " Hello!"}
    chat = {"persona": "P", "prompt": TALK[:3], "completion": TALK[3:]}
    first, second = load(tmp_path, plain, chat)
    assert (first.turns, first.response) == ((Turn("user", "Hi"),), "Hello!")
    assert (len(second.turns), second.response) == (3, "A walk.")


@pytest.mark.parametrize(
    "row", [GOOD, ABSTRACT, LAMP, CONVAI2, SPC, {"persona": "P", "prompt": "Q", "completion": "R"}]
)
def test_the_format_comes_from_the_fields(tmp_path, row):
    expected = dict(zip(map(id, [GOOD, ABSTRACT, LAMP, CONVAI2, SPC]), FORMATS, strict=False))
    rows = load_examples(jsonl(tmp_path / "lamp_convai2.jsonl", row), "train")
    assert rows.format == expected.get(id(row), "prompt_completion")
    assert load_examples(tmp_path / "lamp_convai2.jsonl", "train", format=rows.format).examples == rows.examples


def test_format_overrides(tmp_path):
    both = {**GOOD, "prompt": "Q", "completion": "R"}
    text = error(tmp_path, both)
    assert "data.jsonl:1" in text and "--format" in text and "perce" in text and "prompt_completion" in text
    assert load(tmp_path, both, format="perce")[0].response == "Walking my dog."
    assert load(tmp_path, both, format="prompt_completion")[0].response == "R"
    with pytest.raises(UserError, match=r"format: expected one of auto, perce.*got 'lapm'; did you mean 'lamp'"):
        load(tmp_path, both, format="lapm")


def test_columns(tmp_path):
    columns = {"persona": "profile", "query": "input", "response": "output", "user_id": "name"}
    (example,) = load(tmp_path, ABSTRACT, columns=columns)
    assert example.persona[0] == "Title: T1\nAbstract: A1"  # one's own persona keeps its order: best first
    assert (example.response, example.user_id) == ("We prove it.", "A. Uthor")
    assert load(tmp_path, LAMP, columns=columns)[0].user_id is None  # user_id is optional, mapped or not
    swapped = {**GOOD, "query": GOOD["response"], "response": GOOD["query"]}
    assert load(tmp_path, swapped, columns={"query": "response", "response": "query"})[0].response == GOOD["response"]
    text = error(tmp_path, GOOD, columns={"persona": "persna"})
    assert "data.jsonl:1: field 'persna'" in text and "--columns persona=persna" in text and "'persona'" in text
    with pytest.raises(UserError, match="our name one of persona, query"):
        load(tmp_path, GOOD, columns={"person": "profile"})


# --- bad rows -------------------------------------------------------------------------------------------------------

BAD = [
    ('{"persona": ', "expected one JSON object a line"),
    ("[1, 2]", "expected a JSON object, got list [1, 2]"),
    ({**GOOD, "response": " \n"}, "field 'response': expected a non-empty string, got str ' \\n'"),
    ({**GOOD, "response": None}, "(perce lacks response|messages)"),
    ({**GOOD, "response": 7}, "field 'response': expected a non-empty string, got int 7"),
    ({**GOOD, "response": "a\ud83d"}, "field 'response': expected UTF-8 text"),
    ({"query": "q", "response": "r", "persoan": "p"}, "did you mean 'persona' by 'persoan'"),
    ({**GOOD, "persona": []}, "field 'persona': expected a non-empty list"),
    ({**GOOD, "persona": ["", " "]}, "field 'persona': expected at least one entry with text"),
    ({**GOOD, "persona": ["a", 3]}, "field 'persona[1]': expected a string or an object, got int 3"),
    ({**GOOD, "persona": [{"name": "a"}]}, "field 'persona[0]': expected an entry with one of reviewText, content"),
    ({**GOOD, "messages": TALK}, "either 'query' or 'messages', got both"),
    ({"persona": "p", "messages": TALK, "response": "r"}, "field 'messages': expected 'messages' that end with a user"),
    ({"persona": "p", "messages": TALK[:3]}, "got a last user turn without a response"),
    ({"persona": "p", "messages": TALK[1:2]}, "at least one response that answers a turn"),
    ({"persona": "p", "messages": "hi"}, "field 'messages': expected a non-empty list"),
    ({"persona": "p", "messages": ["hi"]}, "field 'messages[0]': expected an object"),
    ({"persona": "p", "messages": [TALK[0], *TALK]}, "field 'messages[1].role': expected alternating"),
    ({"persona": "p", "messages": [{"role": "system", "content": "x"}, *TALK]}, "in 'persona'), got str 'system'"),
    ({"persona": "p", "messages": [{"role": "tool", "content": "x"}]}, "field 'messages[0].role'"),
    ({"persona": "p", "messages": [{"role": "user", "content": [1]}]}, "field 'messages[0].content'"),
    ({**GOOD, "user_id": [1]}, "field 'user_id': expected a string or an integer"),
    ({**GOOD, "personal_spans": [[0, 16]]}, "0 <= start < end <= 15, got list [0, 16]"),
    ({**GOOD, "personal_spans": [[-1, 3]]}, "field 'personal_spans'"),
    ({**GOOD, "personal_spans": [[3, 3]]}, "field 'personal_spans'"),
    ({**GOOD, "personal_spans": [[0, 1.5]]}, "field 'personal_spans'"),
    ({**GOOD, "personal_spans": "my dog"}, "field 'personal_spans'"),
    ({"persona": "p", "messages": TALK, "personal_spans": []}, "only beside a 'response'"),
    (
        {**CONVAI2, "dialogue": [{"partner": "hi"}]},
        "field 'dialogue[0].self': expected a non-empty string, got NoneType",
    ),
    ({**CONVAI2, "dialogue": ["hi"]}, "field 'dialogue[0]': expected an object"),
    ({**CONVAI2, "personality": ""}, "field 'personality'"),
    ({**SPC, "conversation": [{"speaker": "Bob", "text": "x"}]}, "field 'conversation[0].speaker'"),
    ({**SPC, "conversation": SPC["conversation"][:1]}, "an opening line only"),
    ({**SPC, "conversation": "Hi!\nUser 1: x"}, "lines that start with 'User 1:'"),
    ({**SPC, "conversation": "User 1:\nUser 2: x"}, "field 'conversation': expected a non-empty string"),
    ({**SPC, "user 2 personas": "\n"}, "field 'user 2 personas'"),
    ({**LAMP, "profile": {"text": ["a", "b"], "id": ["1"]}}, "field 'profile': expected columns of one length"),
    ({**LAMP, "profile": [{"text": "  "}]}, "field 'profile': expected at least one entry with text"),
    ({**LAMP, "input": ""}, "field 'input'"),
    ({"persona": "p", "prompt": TALK, "completion": "x"}, "field 'prompt': expected a user turn at the end"),
    ({"persona": "p", "prompt": "x", "completion": TALK[:1]}, "field 'completion'"),
    ({"txt": "nothing we know"}, "expected the fields of a format: perce (persona, query|messages"),
    ({}, "got fields (none)"),
]


@pytest.mark.parametrize(("row", "expected"), BAD, ids=[expected[:40] for _, expected in BAD])
def test_a_bad_row_is_named_or_skipped(tmp_path, row, expected):
    """Alone it decides the format itself; the same row is skipped between two good ones of any format."""
    text = error(tmp_path, "", row)
    assert str(tmp_path / "data.jsonl:2: ") in text and expected in text and "--skip_bad_rows" in text
    rows = load_examples(jsonl(tmp_path / "data.jsonl", GOOD, row, GOOD), "train", skip_bad_rows=True)
    assert (len(rows.examples), rows.skipped, len(rows.reasons)) == (2, 1, 1)
    assert rows.reasons[0].startswith(str(tmp_path / "data.jsonl:2: "))


def test_once_the_format_is_known_the_missing_field_is_named(tmp_path):
    text = error(tmp_path, GOOD, {"persona": "p", "query": "q", "respnse": "r"})
    assert "data.jsonl:2: field 'response' or 'messages'" in text and "did you mean 'response' by 'respnse'" in text


def test_skipped_rows_are_counted_and_the_first_reasons_kept(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", *["{"] * 7, GOOD)
    rows = load_examples(path, "train", skip_bad_rows=True)
    assert (rows.skipped, len(rows.reasons), rows.examples[0].source) == (7, 5, "data.jsonl:8")
    with pytest.raises(UserError, match="all 2 rows were skipped"):
        load(tmp_path, "{", "{", skip_bad_rows=True)


def test_files_without_a_row(tmp_path):
    assert "it has no rows" in error(tmp_path)


# --- files ----------------------------------------------------------------------------------------------------------


def test_bom_crlf_blank_lines_and_line_separators(tmp_path):
    line = json.dumps({**GOOD, "response": "a\u2028b"}, ensure_ascii=False).encode()
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \r\n" + line)
    examples = load_examples(tmp_path / "d.jsonl", "train").examples
    assert [(e.source, e.response) for e in examples] == [("d.jsonl:1", "a\u2028b"), ("d.jsonl:4", "a\u2028b")]


def test_bytes_that_are_not_utf8(tmp_path):
    good = json.dumps(GOOD).encode()
    (tmp_path / "d.jsonl").write_bytes(good + b"\n" + good.replace(b"dog", b"d\xf6g") + b"\n")
    with pytest.raises(UserError, match=r"d\.jsonl:2: expected UTF-8 text, got the byte 0xf6 at column"):
        load_examples(tmp_path / "d.jsonl", "train")
    assert load_examples(tmp_path / "d.jsonl", "train", skip_bad_rows=True).skipped == 1
    (tmp_path / "d.json").write_bytes(b"[\n" + good.replace(b"dog", b"d\xf6g") + b"]")
    with pytest.raises(UserError, match=r"d\.json:2: expected UTF-8 text, got the byte 0xf6.*Save"):
        load_examples(tmp_path / "d.json", "train")
    (tmp_path / "d.csv").write_bytes(b"persona,query,response\np,q,r\np,q,d\xf6g\n")
    with pytest.raises(UserError, match=r"d\.csv:3: field 'response': expected UTF-8 text"):
        load_examples(tmp_path / "d.csv", "train")


def test_json_files(tmp_path):
    path = tmp_path / "d.json"
    path.write_text("\ufeff\n" + json.dumps([GOOD, {**GOOD, "query": ""}], indent=1), encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.json row 2: field 'query'"):
        load_examples(path, "train")
    assert load_examples(path, "train", skip_bad_rows=True).examples[0].source == "d.json row 1"
    assert load_examples(jsonl(path, GOOD, GOOD), "train").examples[1].source == "d.json:2"  # lines by another name
    path.write_text("[\n{},\n]")
    with pytest.raises(UserError, match=r"d\.json:(2|3): not JSON"):
        load_examples(path, "train")


def test_csv_files(tmp_path):
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["", "persona", "query", "response", "user_id"])  # pandas leaves its index without a name
        writer.writerow([0, json.dumps(["a", "b"]), "[not JSON]", "x" * 200_000, ""])
        file.write("\n")
        writer.writerow([1, "[a] list?", "two\nlines", "r", "u"])
        writer.writerow([2, "p", "q"])
    with pytest.raises(UserError, match=r"d\.csv:6: expected 5 cells, as in the header, got 3"):
        load_examples(tmp_path / "d.csv", "train")
    first, second = load_examples(tmp_path / "d.csv", "train", skip_bad_rows=True).examples
    assert (first.persona, first.turns[0].content, first.user_id) == (("a", "b"), "[not JSON]", None)
    assert (second.persona, second.user_id, second.source) == (("[a] list?",), "u", "d.csv:4")


def test_parquet_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**ABSTRACT, "x": None}, ABSTRACT]), tmp_path / "d.parquet")
    examples = load_examples(tmp_path / "d.parquet", "train").examples
    assert examples[1].persona == load(tmp_path, ABSTRACT)[0].persona and examples[1].source == "d.parquet row 2"
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(UserError, match=r"d\.parquet: not a Parquet file"):
        load_examples(tmp_path / "d.parquet", "train")


def test_struct_of_lists(tmp_path):
    profile = {"title": ["T1", "T2"], "abstract": ["A1", "A2"]}
    assert load(tmp_path, {**ABSTRACT, "profile": profile})[0].persona == load(tmp_path, ABSTRACT)[0].persona


# --- splits, directories, the datasets library ----------------------------------------------------------------------


def test_one_file_is_the_train_split(tmp_path):
    path = jsonl(tmp_path / "anything.jsonl", GOOD)
    assert available_splits(str(path)) == ["train"]
    assert load_examples(path, "validation").examples == [] == load_examples(path, "test").examples
    with pytest.raises(UserError, match=r"notes\.txt: cannot tell.*\.jsonl, \.json, \.parquet, \.csv"):
        load_examples(jsonl(tmp_path / "notes.txt", GOOD), "train")
    with pytest.raises(UserError, match="split: expected one of train, validation, test, got 'dev'"):
        load_examples(path, "dev")


@pytest.mark.parametrize("stem", ["validation", "valid", "val", "dev"])
def test_directory(tmp_path, stem):
    jsonl(tmp_path / f"{stem}.jsonl", GOOD, GOOD)
    jsonl(tmp_path / "train.json", GOOD)
    jsonl(tmp_path / "notes.jsonl", "not data")
    assert available_splits(tmp_path) == ["train", "validation"]
    assert load_examples(tmp_path, "validation").examples[1].source == f"{stem}.jsonl:2"
    with pytest.raises(UserError, match="has no test split; it has train, validation"):
        load_examples(tmp_path, "test")
    jsonl(tmp_path / "train.csv", GOOD)
    with pytest.raises(UserError, match=r"train\.json, train\.csv are all the train split"):
        load_examples(tmp_path, "train")


def test_lamp_questions_and_outputs(tmp_path):
    question = {name: LAMP[name] for name in ("id", "input", "profile")}
    for name in ("train_questions", "dev_questions", "test_questions"):
        (tmp_path / f"{name}.json").write_text(json.dumps([question, {**question, "id": "8"}]))
    golds = [{"id": "8", "output": "eight"}, {"id": "7", "output": "gold"}]
    (tmp_path / "train_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": golds}))
    (tmp_path / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": golds[:1]}))
    assert available_splits(tmp_path) == ["train", "validation"]  # LaMP publishes no test outputs
    examples = load_examples(tmp_path, "train").examples
    assert [e.response for e in examples] == ["gold", "eight"] and examples[0].persona == ("new ", "old")
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
    datasets.DatasetDict({"train": table, "val": table.select([1])}).save_to_disk(tmp_path / "two")
    expected = load(tmp_path, ABSTRACT)[0].persona
    for streaming in (False, True):
        rows = load_examples(tmp_path / "one", "train", streaming=streaming)
        assert [(e.persona, e.source) for e in rows] == [(expected, "one row 1"), (expected, "one row 2")]
        assert [e.user_id for e in load_examples(tmp_path / "two", "validation", streaming=streaming)] == ["B"]
    assert available_splits(tmp_path / "one") == ["train"] and available_splits(tmp_path / "two") == [
        "train",
        "validation",
    ]
    assert load_examples(tmp_path / "one", "test").examples == []
    (tmp_path / "two/dataset_dict.json").write_text('{"splits": ["train", "gone"]}')
    with pytest.raises(UserError, match="written by save_to_disk but cannot be read"):
        load_examples(tmp_path / "two", "train")


def test_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return [GOOD]

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["test", "val", "other"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert available_splits("owner/name:part") == ["validation", "test"] and not asked
    (example,) = load_examples("owner/name:part", "validation", streaming=True)
    assert asked == [("owner/name", "part", "val", True)] and example.source == "owner/name:part[val] row 1"
    with pytest.raises(UserError, match="owner/name has no train split; it has validation, test"):
        load_examples("owner/name", "train")


def test_data_that_cannot_be_found(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

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
    ):  # paths, so nobody asks the Hub
        with pytest.raises(UserError, match=r"No such file or directory: .*Check the path after --data"):
            load_examples(path, "train")


# --- laziness and speed ---------------------------------------------------------------------------------------------


def test_streaming_reads_only_what_is_asked_for(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", GOOD, GOOD, "{")
    rows = load_examples(path, "train", streaming=True)
    assert isinstance(rows, Rows) and rows.format == "auto"
    stream = iter(rows)
    assert [next(stream).source, next(stream).source, rows.format] == ["data.jsonl:1", "data.jsonl:2", "perce"]
    with pytest.raises(UserError, match=r"data\.jsonl:3"):
        next(stream)
    rows = load_examples(path, "train", streaming=True, skip_bad_rows=True)
    assert [len(list(rows)), rows.skipped] == [2, 1] == [len(list(rows)), rows.skipped]  # each pass starts anew


def test_limit(tmp_path):
    assert [e.response for e in load(tmp_path, CONVAI2, "{", limit=2)] == ["hello", "b"]
    assert len(load(tmp_path, CONVAI2, CONVAI2, limit=3)) == 3
    with pytest.raises(UserError, match="limit: expected at least 1"):
        load(tmp_path, CONVAI2, limit=0)


def test_importing_is_light():
    code = "import sys, perce.rows; print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    cwd = Path(__file__).parents[1]
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd).stdout.strip() == "set()"
    )


def test_the_documented_rows_are_read_as_the_documented_formats(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "DATA.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in page.partition("```json\n")[2].partition("```")[0].splitlines()]
    formats = ["perce", "perce", "prompt_completion", "longlamp", "lamp", "convai2", "spc", "text"]
    for row, format in zip(rows, formats, strict=True):
        read = load_examples(jsonl(tmp_path / "rows.jsonl", row), "train")
        assert read.format == format and len(read.examples) == 1 and f"`{format}`" in page
    assert set(formats) == set(FORMATS)


# --- real data sets -------------------------------------------------------------------------------------------------

# Examples a split, by their README tables: rows (one response a row), turns for Persona-Chat; for SPC utterances less
# one a dialogue (24,478 - 882; 3,200 - 120; 20,473 - 749) less the repeats of a speaker that are merged (34, 0, 24).
EXPECTED = {
    "amazon-user-reviews": ("longlamp", 469, 38, 71),
    "author-abstracts": ("longlamp", 960, 90, 75),
    "lamp7-tweets": ("lamp", 1148, 120, 115),
    "personachat-convai2": ("convai2", 5841, 628, 750),
    "reddit-user-posts": ("longlamp", 118, 17, 36),
    "synthetic-persona-chat": ("spc", 24478 - 882 - 34, 3200 - 120, 20473 - 749 - 24),
}
USERS = {"amazon-user-reviews": 160, "author-abstracts": 960, "lamp7-tweets": 1148, "personachat-convai2": 72}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_data_sets(name):
    root = Path(os.environ.get("PERCE_TEST_DATA", ""))
    if not (root / name / "train.jsonl").is_file():
        pytest.skip(f"needs the directory {name} in $PERCE_TEST_DATA: it is not part of the repository")
    format, *counts = EXPECTED[name]
    assert available_splits(root / name) == ["train", "validation", "test"]
    for split, count in zip(("train", "validation", "test"), counts, strict=True):
        rows = load_examples(root / name, split)
        assert (rows.format, len(rows.examples), rows.skipped) == (format, count, 0)
        for e in rows.examples:
            assert e.persona and e.turns[-1].role == "user" and e.response.strip()
            assert all(a.role != b.role for a, b in zip(e.turns, e.turns[1:], strict=False))
            if format in ("longlamp", "lamp"):
                assert not any(passage.endswith(e.response) for passage in e.persona)
        if split == "train" and name in USERS:
            assert len(Counter(e.user_id for e in rows.examples)) == USERS[name]
