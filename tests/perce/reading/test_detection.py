"""Rows of no format, and the lines of their error that help to convert them."""

import re
import shlex

import pytest

from perce import DataConfig, UserError, load_examples
from tests.helpers import ROOT
from tests.helpers.raw_rows import GOOD, error, jsonl, load

SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ALL = "persona, query or messages, response or messages"


@pytest.mark.parametrize(
    ("row", "nearest", "missing", "columns"),
    [
        ({"from": "a", "to": "c", "subject": "s", "body": "b"}, "perce", ALL,
         "persona=FIELD,query=subject,response=body"),
        ({"instruction": "Do", "input": "it", "output": "Done"}, "alpaca", "persona or profile", "persona=FIELD"),
        ({"persona": "p", "dialogue": []}, "sharegpt", "conversations", "conversations=dialogue"),
        ({"UserProfile": "p", "Question": "q", "Answer": "a"}, "perce", ALL,
         "persona=UserProfile,query=Question,response=Answer"),
        ({"bio": "p", "query": "q", "response": "r"}, "perce", "persona", "persona=bio"),
        ({"id": 1, "input": "i", "profile": [{"text": "t"}]}, "lamp", "output", "output=FIELD"),
        ({"personality": ["p"], "dialog": []}, "convai2", "dialogue", "dialogue=dialog"),
        ({"persona": "p", "prompt": "q", "complete": "c"}, "prompt_completion", "completion", "completion=complete"),
        ({"user_id": "u"}, "perce", ALL, "persona=FIELD,query=FIELD,response=FIELD"),
    ],
)  # fmt: skip
def test_a_row_of_no_format_gets_four_lines(tmp_path, row, nearest, missing, columns):
    first, second, third, fourth = error(tmp_path, row).splitlines()
    assert f"data.jsonl:1: expected the fields of a known format, got the fields {', '.join(row)}." in first
    assert second == f"The nearest format is {nearest}; missing: {missing}."
    assert third.startswith(f"Rename fields: --columns {columns}") and ("(FIELD:" in third) == ("FIELD" in columns)
    assert fourth.startswith("docs/DATA.md shows an example row of every format")
    assert max(map(len, (second, third, fourth))) <= 150


@pytest.mark.parametrize(("name", "lines", "asked"), [
    ("rows.csv", "ana,I keep bees,Hi?,Bees\nbob,I keep cats,Hi?,Cats\n", True),
    ("rows.csv", "user_id,who,ask,say\nana,I keep bees,Hi?,Bees\n", False),
    ("rows.csv", "bio,ask,say\nI keep bees,Hi?,Bees\n", False),
    ("rows.jsonl", '{"ana": "I keep bees"}\n', False),
])  # fmt: skip
def test_a_csv_without_a_header_is_asked_for_one(tmp_path, name, lines, asked):
    (tmp_path / name).write_text(lines)
    with pytest.raises(UserError) as caught:
        load_examples(tmp_path / name, "train")
    line = str(caught.value).splitlines()[2]
    header = (
        "If the first line is a row, the header is missing: add persona,query,response. Else rename fields: --columns"
    )
    assert line.startswith(header if asked else "Rename fields: --columns persona=")


def test_the_line_to_copy_works(tmp_path):
    row = {"bio": "I keep bees.", "Question": "Coming?", "Answer": "No."}
    columns = dict(pair.split("=") for pair in error(tmp_path, row).splitlines()[2].split()[-1].split(","))
    assert load(tmp_path, row, columns=columns)[0].persona == ("I keep bees.",)


def test_sharegpt_without_a_persona(tmp_path):
    text = error(tmp_path, {"id": "1", "conversations": SHAREGPT})
    assert "\nThe nearest format is sharegpt; missing: persona.\n" in text
    assert "persona.\nRename fields: --columns persona=FIELD (FIELD: the name" in text
    (only,) = load(tmp_path, {"bio": "p", "conversations": SHAREGPT}, columns={"persona": "bio"})
    assert only.persona == ("p",)


def test_the_line_to_copy_works_in_a_shell(tmp_path):
    row = {"my persona": "p", "user question $HOME": "q", "the 'answer'": "a"}
    line = error(tmp_path, {**row, "Question": "q"}).splitlines()[2].removeprefix("Rename fields: ")
    (option, columns) = shlex.split(line)
    assert option == "--columns" and columns == "persona=my persona,query=Question,response=the 'answer'"
    text = error(tmp_path, {"persona, short": "p", "query": "q", "response": "r"})
    assert "--columns persona=FIELD" in text  # a comma separates the fields to rename
    with pytest.raises(UserError, match="name=column"):
        DataConfig(columns="persona=persona, short")


def test_long_and_many_names_do_not_fill_the_screen(tmp_path):
    assert len(error(tmp_path, {f"{i}{'x' * 5000}": 1 for i in range(100)})) < 1500


# --- --columns --------------------------------------------------------------------------------------------------------


def test_a_misspelt_field_that_may_be_missing(tmp_path):
    """Ignoring it would put a user into both splits, because no row would name its user."""
    rows = [{**GOOD, "userID": f"u{i}"} for i in range(3)]
    for theirs in ("UserID", "user_id"):
        text = error(tmp_path, *rows, columns={"user_id": theirs})
        assert f"--columns user_id={theirs}: none of 3 rows of {tmp_path / 'data.jsonl'} has a field '{theirs}'" in text
        assert "did you mean --columns user_id=userID." in text
    assert load(tmp_path, GOOD, rows[0], columns={"user_id": "userID"})[1].user_id == "u0"  # one row suffices
    nobody = load(tmp_path, GOOD, rows[0], columns={"user_id": "userID"}, limit=1)  # a later row may have it
    assert nobody[0].user_id is None
    path = tmp_path / "d.csv"
    path.write_text("persona,query,response,UserID\n" + "p,q,r,\n" * 3)  # the field exists, and is empty
    assert len(load_examples(path, "train", columns={"user_id": "UserID"}).all) == 3


def test_a_misspelt_field_in_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("perce.data.rows.SURE", 3)
    path = jsonl(tmp_path / "data.jsonl", *[{**GOOD, "userID": f"u{i}"} for i in range(5)])
    stream = iter(load_examples(path, "train", columns={"user_id": "UserID"}, streaming=True))
    assert [next(stream).source for _ in range(3)] == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:3"]
    with pytest.raises(UserError, match="none of 3 rows"):
        next(stream)
    jsonl(path, GOOD, GOOD, {}, *[{**GOOD, "userID": f"u{i}"} for i in range(5)])
    stream = load_examples(path, "train", columns={"user_id": "UserID"}, streaming=True, skip_bad_rows=True)
    with pytest.raises(UserError, match="none of 3 rows"):
        list(stream)


def test_columns_the_wrong_way_round(tmp_path):
    row = {"bio": "p", "query": "q", "response": "r"}
    text = error(tmp_path, row, columns={"bio": "persona"})
    assert "with OURS one of" in text and "got 'bio'; did you mean persona=bio" in text
    assert "did you mean persona=bio" in error(tmp_path, row, columns={"persoan": "bio"})


# --- other shapes -----------------------------------------------------------------------------------------------------


def test_the_page_turns_other_shapes_into_rows(tmp_path, monkeypatch):
    """docs/DATA.md, as the error for a row of no format says."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
    mails, table = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    jsonl(
        tmp_path / "mails.jsonl", *[{"from": "ana", "to": "b", "subject": f"s{i}", "body": f"body {i}"} for i in "ab"]
    )
    exec(mails, {})
    first, _ = load_examples("rows.jsonl", "train").all
    assert (first.persona, first.response, first.user_id) == (("Title: sb\nText: body b",), "body a", "ana")
    (tmp_path / "export.csv").write_bytes("persona;query;response\nIch backe.;Hallo?;Grü\u00dfe, du\n".encode("cp1252"))
    exec(table, {})
    assert load_examples("rows.csv", "train").all[0].response == "Grüße, du"
