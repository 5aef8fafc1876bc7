"""perce.data.formats: what a row of each format means."""

import csv
import json

import pytest

from perce import UserError, load_examples
from perce.data.formats import FORMATS, Turn
from perce.data.rows import Example
from tests.helpers import ROOT
from tests.helpers.raw_rows import ABSTRACT, CONVAI2, GOOD, LAMP, SPC, TALK, error, jsonl, load


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
    assert load_examples(tmp_path / "lamp_convai2.jsonl", "train", format=rows.format).all == rows.all


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
    assert [e.user_id for e in load(tmp_path, ABSTRACT, LAMP, columns=columns)] == ["A. Uthor", None]
    swapped = {**GOOD, "query": GOOD["response"], "response": GOOD["query"]}
    assert load(tmp_path, swapped, columns={"query": "response", "response": "query"})[0].response == GOOD["response"]
    text = error(tmp_path, GOOD, columns={"persona": "persna"})
    assert "data.jsonl:1: field 'persna'" in text and "did you mean --columns persona=persona." in text
    assert "Correct --columns" in text
    with pytest.raises(UserError, match=r"our name one of .*persona.*got 'person'; did you mean persona=profile\."):
        load(tmp_path, GOOD, columns={"person": "profile"})


def test_the_documented_rows_are_read_as_the_documented_formats(tmp_path):
    page = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in page.partition("```json\n")[2].partition("```")[0].splitlines()]
    formats = ["perce", "perce", "prompt_completion", "longlamp", "lamp", "convai2", "spc", "text"]
    for row, format in zip(rows, formats, strict=True):
        read = load_examples(jsonl(tmp_path / "rows.jsonl", row), "train")
        assert read.format == format and len(read.all) == 1 and f"`{format}`" in page
    assert set(formats) == set(FORMATS)
