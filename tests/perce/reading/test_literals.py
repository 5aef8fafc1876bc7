"""Lists that are stored as text."""

import json

import pandas as pd
import pytest
from datasets import Dataset, disable_progress_bars

from perce import load_examples
from perce.reading import literals
from tests.helpers.raw_rows import TALK, error, load

FACTS = ['I enjoy tea, "green".', "I'm a baker.", "two\nlines [sic] {x}, 'y' 'z'"]
ROWS = [{"persona": FACTS, "query": "q", "response": "r"}, {"persona": FACTS[:1], "query": "q", "response": "['r']"}]
TALKS = [{"persona": FACTS, "messages": TALK}, {"persona": FACTS[1:], "messages": TALK[:2]}]


@pytest.mark.parametrize("rows", [ROWS, TALKS])
def test_what_pandas_and_datasets_write_is_read_again(tmp_path, rows):
    """pandas prints lists as Python does, datasets as numpy does."""
    disable_progress_bars()
    expected = [(e.persona, e.turns, e.response) for e in load(tmp_path, *rows)]
    pd.DataFrame(rows).to_csv(tmp_path / "pandas.csv")
    Dataset.from_list(rows).to_csv(tmp_path / "datasets.csv")
    Dataset.from_list(rows).to_pandas().to_csv(tmp_path / "both.csv", index=False)
    for name in ("pandas.csv", "datasets.csv", "both.csv"):
        assert [(e.persona, e.turns, e.response) for e in load_examples(tmp_path / name, "train")] == expected, name


TEXTS = [
    "[laughs] Hi", "[laughs]", "[a, b]", "['tis so", "I like ['a']", "['a'", "['tis the season] is my song [sic]",
    "['a'] and ['b']", "{'name': 'Ana'}", '{"name": "Ana"}', "(I bake.)", "('tis so)", "['a\nb']", "array of bees",
    "('Bee' to friends)", "('I bake.')", '["Bee" to my friends, and "Ana" at work]', "['a' 'b' and more to come]",
    "['tis so] [sic]", "['Hi', I'd say] (said he)",
]  # fmt: skip


@pytest.mark.parametrize("facts", TEXTS)
def test_a_text_stays_a_text(tmp_path, facts):
    assert load(tmp_path, {**ROWS[0], "persona": facts})[0].persona == (facts,)


@pytest.mark.parametrize(
    "facts",
    [
        "['a' 'b' ... 'c']",
        "['a', ...]",
        "['a', nan]",
        "[nan, 'a']",
        "[['a'], print()]",
        "['a' + 'b']",
        "[{['a']: 'b'}]",
        "[{'a', {'b'}}]",
        "[array(['a'])]",
        "array(['a'], dtype=object)",
        "[np.str_('I bake'), np.str_('I run')]",
        "['I like tea', I ski]",
        "['He said 'hi'.', 'b']",
        "['tea', 'ski' 'chess', 5 cats]",
        "['a', 'b'; 'c']",
        "['I don't like tea', 'I ski']",
        "['I ski', 'I don't like tea']",
        "['a','b'.]",
        "['tea', 'music' (jazz)]",
    ],
)
def test_what_was_a_list_and_is_none_any_more(tmp_path, facts):
    text = error(tmp_path, {**ROWS[0], "persona": facts})
    assert "data.jsonl:1: field 'persona': expected a complete list as JSON, Python or numpy" in text
    assert "Parquet" in text


@pytest.mark.parametrize("entry", ["{1: 'a'}", "{None: 'a', ('b',): 1}", "{'a'}", "b'a'", "2.5", "1j", "('a',)"])
def test_entries_that_json_has_not(tmp_path, entry):
    for rows in (
        {"persona": f"['I bake.', {entry}]"},
        {"query": None, "response": None, "messages": f"['a', {entry}]"},
    ):
        given = {name: value for name, value in (ROWS[0] | rows).items() if value is not None}
        assert "expected" in (text := error(tmp_path, given)) and "data.jsonl:1: field" in text


@pytest.mark.parametrize(
    "facts", ["('I bake.', 'I run.')", "{'I bake.'} ", "[None, 'I bake.']", "[u'I bake.' r'I run.']", " ['I bake.'] "]
)
def test_other_lists_of_python_are_read(tmp_path, facts):
    row = {**ROWS[0], "persona": facts}
    if "None" in facts:
        assert "field 'persona[0]'" in error(tmp_path, row)
    else:
        assert load(tmp_path, row)[0].persona in (("I bake.", "I run."), ("I bake.",))


@pytest.mark.parametrize("entry", ["Well ... bees", "... and bees", "..."])
def test_dots_in_a_text_are_no_part_that_is_missing(tmp_path, entry):
    for written in (f"['{entry}', 'I run.']", f"['{entry}'\n 'I run.']"):
        assert load(tmp_path, {**ROWS[0], "persona": written})[0].persona == (entry, "I run.")


def test_a_set_is_read_in_the_order_in_which_it_is_written(tmp_path):
    """A set of texts in Python has another order in every process."""
    facts = [f"fact {i}" for i in range(30)]
    assert load(tmp_path, {**ROWS[0], "persona": f"{{{repr(facts)[1:-1]}}}"})[0].persona == tuple(facts)


def test_a_list_that_takes_too_much_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(literals, "LONGEST", 100)
    facts = [f"fact {i}" for i in range(50)]
    assert "more than" in error(tmp_path, {**ROWS[0], "persona": repr(facts)})
    assert load(tmp_path, {**ROWS[0], "persona": json.dumps(facts)})[0].persona == tuple(facts)


def test_messages_that_came_as_a_text(tmp_path):
    for written in (json.dumps, repr):
        row = {"persona": "p", "prompt": written(TALK[:1]), "completion": "c"}
        assert "field 'prompt': expected a text, or a list of messages, got messages written" in error(tmp_path, row)
        row = {"persona": "p", "prompt": "q", "completion": written(TALK[1:2])}
        assert "field 'completion': expected a text, or a list of messages" in error(tmp_path, row)
