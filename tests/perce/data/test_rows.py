"""Errors about bad rows, streaming, limits, and real data sets."""

import os
from collections import Counter
from pathlib import Path

import pytest

from perce import UserError, load_examples
from perce.data.rows import Examples, available_splits
from perce.reading.fields import Turn
from perce.reading.formats import FORMATS, Format
from perce.reading.parsers import Reply
from tests.helpers.raw_rows import CONVAI2, GOOD, LAMP, SPC, TALK, documented, error, jsonl, load

BAD = [
    ('{"persona": ', "expected one JSON object per line"),
    ("[1, 2]", "expected a JSON object, got list [1, 2]"),
    ({**GOOD, "response": " \n"}, "field 'response': expected a non-empty string, got str ' \\n'"),
    (
        {**GOOD, "response": None},
        "field 'response' or 'messages': expected it in a row of format perce, got only persona, query",
    ),
    ({**GOOD, "response": 7}, "field 'response': expected a non-empty string, got int 7"),
    ({**GOOD, "response": "a\ud83d"}, "field 'response': expected UTF-8 text"),
    ({"query": "q", "response": "r", "persoan": "p"}, "--columns persona=persoan\n"),
    ({**GOOD, "persona": ""}, "field 'persona': expected a non-empty string, got str ''"),
    (
        {**GOOD, "persona": 42},
        "field 'persona': expected a text, [] for no persona, or a list of texts, got",
    ),
    ({**GOOD, "persona": {"job": "baker"}}, "[] for no persona, or a list of texts, got dict"),
    ({**GOOD, "persona": [["a"]]}, "field 'persona[0]': expected a text, or an object with one of the fields reviewT"),
    ({**GOOD, "persona": ["", " "]}, "field 'persona': expected at least one entry with text"),
    ({**GOOD, "persona": ["a", 3]}, "field 'persona[1]': expected a text, or an object with one of the fields"),
    ({**GOOD, "persona": [{"name": "a"}]}, "field 'persona[0]': expected a text, or an object with one of the fields"),
    ({**GOOD, "messages": TALK}, "either 'query' or 'messages', got both"),
    ({"persona": "p", "messages": TALK, "response": "r"}, "field 'messages': expected 'messages' that end with a user"),
    ({"persona": "p", "messages": TALK[:3]}, "got a last user turn without a 'response'"),
    ({"persona": "p", "messages": TALK[1:2]}, "at least one reply that answers a turn"),
    ({"persona": "p", "messages": "hi"}, "field 'messages': expected a non-empty list"),
    ({"persona": "p", "messages": ["hi"]}, "field 'messages[0]': expected an object"),
    ({"persona": "p", "messages": [TALK[0], *TALK]}, "field 'messages[1].role': expected alternating"),
    ({"persona": "p", "messages": [*TALK, {"role": "system", "content": "x"}]}, "messages[4].role': expected a system"),
    ({"persona": "p", "messages": [{"role": "system", "content": "x"}]}, "expected a turn after the system message"),
    ({"persona": "p", "messages": [{"role": "tool", "content": "x"}]}, "messages[0]': expected a conversation without"),
    ({"persona": "p", "messages": [{**TALK[0], "tool_calls": [{}]}]}, "conversation without tool calls"),
    ({"persona": "p", "messages": [{"role": "judge", "content": "x"}]}, "field 'messages[0].role'"),
    ({"persona": "p", "messages": [{"role": "user", "content": [1]}]}, "field 'messages[0].content'"),
    ({**GOOD, "user_id": "a\ud83d"}, "field 'user_id': expected UTF-8 text"),
    ({**GOOD, "user_id": [1]}, "field 'user_id': expected a string or an integer"),
    ({**GOOD, "personal_spans": [[0, 16]]}, "0 <= start < end <= 15, got list [0, 16]"),
    ({**GOOD, "personal_spans": [[-1, 3]]}, "field 'personal_spans'"),
    ({**GOOD, "personal_spans": [[3, 3]]}, "field 'personal_spans'"),
    ({**GOOD, "personal_spans": [[0, 1.5]]}, "field 'personal_spans'"),
    ({**GOOD, "personal_spans": "my dog"}, "field 'personal_spans'"),
    ({"persona": "p", "messages": TALK, "personal_spans": []}, "only with a field 'response'"),
    (
        {**CONVAI2, "dialogue": [{"partner": "hi"}]},
        "field 'dialogue[0].self': expected a non-empty string, got NoneType",
    ),
    ({**CONVAI2, "dialogue": ["hi"]}, "field 'dialogue[0]': expected an object"),
    ({**CONVAI2, "personality": ""}, "field 'personality'"),
    ({**SPC, "conversation": [{"speaker": "Bob", "text": "x"}]}, "field 'conversation[0].speaker'"),
    ({**SPC, "conversation": SPC["conversation"][:1]}, "only an opening line"),
    ({**SPC, "conversation": "Hi!\nUser 1: x"}, "lines that start with 'User 1:'"),
    ({**SPC, "conversation": "User 1:\nUser 2: x"}, "field 'conversation': expected a non-empty string"),
    ({**SPC, "user 2 personas": "\n"}, "field 'user 2 personas'"),
    ({**LAMP, "profile": {"text": ["a", "b"], "id": ["1"]}}, "field 'profile': expected columns of equal length"),
    ({**LAMP, "profile": [{"text": "  "}]}, "field 'profile': expected at least one entry with text"),
    ({**LAMP, "input": ""}, "field 'input'"),
    ({"persona": "p", "prompt": TALK, "completion": "x"}, "field 'prompt': expected a user turn at the end"),
    ({"persona": "p", "prompt": "x", "completion": TALK[:1]}, "field 'completion'"),
    ({"txt": "?"}, "expected the fields of a known format, got the fields txt.\nThe nearest format is perce"),
    ({}, "expected the fields of a known format, got no field."),
]


@pytest.mark.parametrize(("row", "expected"), BAD, ids=[expected[:40] for _, expected in BAD])
def test_a_bad_row_is_named_or_skipped(tmp_path, row, expected):
    """A bad row alone is an error, with the format detected from it; between two good rows it can be skipped."""
    text = error(tmp_path, "", row)
    assert str(tmp_path / "data.jsonl:2: ") in text and expected in text
    assert "--skip_bad_rows" in text or "docs/DATA.md" in text
    rows = load_examples(jsonl(tmp_path / "data.jsonl", GOOD, row, GOOD), "train", skip_bad_rows=True)
    assert (len(rows.all), rows.skipped, len(rows.reasons)) == (2, 1, 1)
    assert rows.reasons[0].startswith(str(tmp_path / "data.jsonl:2: "))


def test_only_an_empty_list_says_that_there_is_no_persona(tmp_path):
    nobody = {**GOOD, "persona": []}
    assert [example.persona for example in load(tmp_path, nobody, GOOD)] == [(), ("I bake.", "I have a dog.")]
    (tmp_path / "data.csv").write_text("persona,query,response\nI bake.,Hi,Yo\n[],Hi,Yo\n")
    assert [example.persona for example in load_examples(tmp_path / "data.csv", "train")] == [("I bake.",), ()]
    (tmp_path / "data.csv").write_text('persona,query,response\nI bake.,Hi,Yo\n"",Hi,Yo\n')
    with pytest.raises(UserError, match="field 'persona': expected"):
        load_examples(tmp_path / "data.csv", "train")
    for lost in ({**GOOD, "persona": None}, {name: GOOD[name] for name in ("query", "response")}):
        text = error(tmp_path, GOOD, lost)
        assert "field 'persona': expected it in a row of format perce, [] if there is none, got only query" in text
    assert {x.user_id for x in load(tmp_path, {"personality": [], "history": ["Hi"], "candidates": ["Yo"]})} == {None}


@pytest.mark.parametrize("lost", ["persona", "response"])
def test_an_empty_field_is_named_in_the_first_row_too(tmp_path, lost):
    """The names of its fields tell the format; but a row that lacks something does not decide it for the others."""
    text = error(tmp_path, {**GOOD, lost: None}, GOOD)
    assert f"data.jsonl:1: field '{lost}'" in text and "it in a row of format perce" in text and "--columns" not in text
    cells = {"persona": "I bake.", "query": "Hi", "response": "Yo", lost: ""}
    (tmp_path / "data.csv").write_text(f"{','.join(cells)}\n{','.join(cells.values())}\n")
    with pytest.raises(UserError, match=rf"data\.csv:2: field '{lost}'"):
        load_examples(tmp_path / "data.csv", "train")
    other = {"persona": "I bake.", "prompt": "Hi", "completion": "Yo"}
    path = jsonl(tmp_path / "data.jsonl", {**GOOD, lost: None}, other)
    rows = load_examples(path, "train", skip_bad_rows=True)
    assert (rows.format, rows.skipped, len(rows.all)) == ("prompt_completion", 1, 1)


@pytest.mark.parametrize("empty", [("query", "response"), ("persona", "query", "response")])
def test_a_row_with_empty_fields_and_a_text_is_no_document(tmp_path, empty):
    """Or all rows would be learnt as documents, without their personas and replies."""
    rows = {"text": "A page.", **GOOD, **dict.fromkeys(empty)}, {"text": "A page.", **GOOD}
    assert f"data.jsonl:1: field '{empty[0]}'" in error(tmp_path, *rows)
    path = jsonl(tmp_path / "data.jsonl", *rows)
    assert load_examples(path, "train", skip_bad_rows=True).format == "perce"
    assert load_examples(path, "train", format="text").format == "text"


def test_empty_fields_of_several_formats_are_told(tmp_path):
    row = {"persona": "p", **dict.fromkeys(("query", "response", "prompt", "completion"))}
    assert "choose it with --format: perce" in error(tmp_path, row)


def test_once_the_format_is_known_the_missing_field_is_named(tmp_path):
    text = error(tmp_path, GOOD, {"persona": "p", "query": "q", "respnse": "r"})
    assert "data.jsonl:2: field 'response' or 'messages'" in text and "did you mean 'response' by 'respnse'" in text


def unpack(row):
    yield Reply(("p",), (Turn("user", "q"),), row["reply"]["text"])


PARSERS = [
    (unpack, "string indices must be integers"),
    (lambda row: None, ".* not NoneType"),  # a yield was forgotten
    (lambda row: [Reply("p", (Turn("user", "q"),), "r")], "persona: expected a tuple of texts, got str 'p'"),
]


@pytest.mark.parametrize(("parser", "said"), PARSERS)
def test_a_parser_that_fails_is_named_with_the_row(tmp_path, monkeypatch, parser, said):
    """It is no row that can be skipped, and the cause has the line of the parser."""
    monkeypatch.setitem(FORMATS, "forum", Format("a forum", ("post", "reply"), parser))
    path = jsonl(tmp_path / "posts.jsonl", {"post": "Who?", "reply": "Me."})
    with pytest.raises(RuntimeError, match=rf"posts\.jsonl:1: .* format forum \(TypeError: {said}") as caught:
        load_examples(path, "train", skip_bad_rows=True)
    assert type(caught.value.__cause__) is TypeError


def test_skipped_rows_are_counted_and_the_first_reasons_kept(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", *["{"] * 7, GOOD)
    rows = load_examples(path, "train", skip_bad_rows=True)
    assert (rows.skipped, len(rows.reasons), rows.all[0].source) == (7, 5, "data.jsonl:8")
    with pytest.raises(UserError, match="all 2 rows skipped; the first: "):
        load(tmp_path, "{", "{", skip_bad_rows=True)


def test_streaming_reads_only_what_is_asked_for(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", GOOD, GOOD, "{")
    rows = load_examples(path, "train", streaming=True)
    assert isinstance(rows, Examples) and rows.format == "auto"
    stream = iter(rows)
    assert [next(stream).source, next(stream).source, rows.format] == ["data.jsonl:1", "data.jsonl:2", "perce"]
    with pytest.raises(UserError, match=r"data\.jsonl:3"):
        next(stream)
    rows = load_examples(path, "train", streaming=True, skip_bad_rows=True)
    assert [len(list(rows)), rows.skipped] == [2, 1] == [len(list(rows)), rows.skipped]  # each pass counts from zero


def test_limit(tmp_path):
    assert [e.response for e in load(tmp_path, CONVAI2, "{", limit=2)] == ["hello", "b"]
    assert len(load(tmp_path, CONVAI2, CONVAI2, limit=3)) == 3
    with pytest.raises(UserError, match="limit: expected at least 1"):
        load(tmp_path, CONVAI2, limit=0)


# Examples per split, by the data sets' README tables: rows (one response per row), and turns for Persona-Chat. For SPC
# utterances minus one per dialogue (24,478 - 882; 3,200 - 120; 20,473 - 749), minus a speaker's merged repeats (34, 0,
# 24).
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
        assert (rows.format, len(rows.all), rows.skipped) == (format, count, 0)
        for e in rows.all:
            assert e.persona and e.turns[-1].role == "user" and e.response.strip()
            assert all(a.role != b.role for a, b in zip(e.turns, e.turns[1:], strict=False))
            if format in ("longlamp", "lamp"):
                assert not any(passage.endswith(e.response) for passage in e.persona)
        if split == "train" and name in USERS:
            assert len(Counter(e.user_id for e in rows.all)) == USERS[name]


def test_an_empty_user_id_is_none(tmp_path):
    named, empty = load(tmp_path, {**GOOD, "user_id": 0}, {**GOOD, "user_id": ""})
    assert (named.user_id, empty.user_id) == ("0", None)
    assert load(tmp_path, {**GOOD, "user_id": "  "})[0].user_id is None
    assert load(tmp_path, {**LAMP, "user_id": " "})[0].user_id == "7"
    assert load(tmp_path, {**LAMP, "user_id": ""})[0].user_id == "7"
    reviews = [{**row, "user_id": ""} for row in documented("amazon")]
    assert "missing: user_id" in error(tmp_path, *reviews), "reviews of nobody are no history"


def test_spaces_around_a_user_make_no_other_user(tmp_path):
    """One of two would be trained on, and the other be held out."""
    rows = [{**GOOD, "user_id": user} for user in ("ana", " ana", "ana\u00a0\n", "an a")]
    assert [example.user_id for example in load(tmp_path, *rows)] == ["ana", "ana", "ana", "an a"]
    assert load(tmp_path, {**LAMP, "id": " 7 "})[0].user_id == "7"


@pytest.mark.parametrize(("rows", "why"), [
    ([{**GOOD, "weight": 0}] * 2, "all replies of its 2 rows have weight 0."),
    ([{**GOOD, "response": ""}, {**GOOD, "weight": 0}],
     "1 of 2 rows skipped, and all other replies have weight 0; the first: {path}:1: field 'response': expected a non"),
    ([{**GOOD, "response": ""}], "all 1 rows skipped; the first: {path}:1: field 'response': expected a non-empty"),
])  # fmt: skip
def test_why_no_example_is_left(tmp_path, rows, why):
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError) as caught:
        load_examples(path, "train", skip_bad_rows=True)
    assert f"No example could be read from {path}: {why.format(path=path)}" in str(caught.value)
