"""Errors about rows quote names and values of any length, and remain one short paragraph."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from perce import UserError
from perce.data.rows import load_examples

LONG = "9" * 5000
MANY = {f"{'x' * 30}{i}": 1 for i in range(500)}
OURS = {"persona": ["a"], "query": "b", "response": "c"}
FILES = {
    "a stray quote in a column": ("csv", f'persona,query,{LONG},response\na,b,"c"d,e\n'),
    "a column that is there twice": ("csv", f"persona,query,response,{LONG},{LONG}\na,b,c,d,e\n"),
    "a space in the header": ("csv", f"persona,query,response, {LONG}\na,b,c,d\n"),
    "a field that is there twice": ("jsonl", json.dumps(OURS)[:-1] + f', "{LONG}": 1, "{LONG}": 2}}\n'),
    "several formats": ("jsonl", json.dumps(OURS | MANY | {"personality": [], "dialogue": [], LONG: 1})),
    "an entry of no kind": ("jsonl", json.dumps(OURS | {"persona": [MANY | {LONG: 1}]})),
    "columns of several lengths": ("jsonl", json.dumps(OURS | {"persona": {LONG: [1], "b": [1, 2]}})),
    "other fields than the first row": (
        "jsonl", json.dumps(OURS) + "\n" + json.dumps({"persona": ["a"], "query": "b", LONG: 1} | MANY)
    ),
    "a conversation under a long name": (
        "jsonl", json.dumps({LONG: [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_message_is_a_paragraph_whatever_it_quotes(tmp_path, what):
    kind, content = FILES[what]
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_examples(path, "train")
    assert len(str(error.value)) - len(str(path)) < 900, str(error.value)


def test_so_is_one_of_a_tables_column(tmp_path):
    path = tmp_path / "rows.parquet"
    columns = [pa.array([["a"]]), pa.array(["b"]), pa.array(["c"]), pa.array([1]), pa.array([2])]
    table = pa.Table.from_arrays(columns, ["persona", "query", "response", LONG, LONG])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match="is there twice") as error:
        load_examples(path, "train")
    assert len(str(error.value)) - len(str(path)) < 900, str(error.value)


def test_so_is_one_of_a_field_that_no_row_has(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OURS | MANY | {LONG: 1}))
    with pytest.raises(UserError, match="--columns user_id=UserID") as error:
        assert load_examples(path, "train", columns={"user_id": "UserID"}).all
    assert len(str(error.value)) - len(str(path)) < 900, str(error.value)


def test_so_is_one_of_a_field_that_is_needed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OURS | MANY | {LONG: 1}))
    with pytest.raises(UserError, match="--columns persona=Profile") as error:
        load_examples(path, "train", columns={"persona": "Profile"})
    assert len(str(error.value)) - len(str(path)) < 900, str(error.value)


@pytest.mark.parametrize("golds", [[LONG, LONG], ["another"]])
def test_so_is_one_of_an_id(tmp_path, golds):
    questions, outputs = tmp_path / "train_questions.json", tmp_path / "train_outputs.json"
    questions.write_text(json.dumps([{"id": LONG, "input": "a", "profile": [{"text": "b"}]}]))
    outputs.write_text(json.dumps({"golds": [{"id": gold, "output": "c"} for gold in golds]}))
    with pytest.raises(UserError, match="id") as error:
        assert load_examples(tmp_path, "train").all
    assert len(str(error.value)) - 2 * len(str(questions)) < 900, str(error.value)
