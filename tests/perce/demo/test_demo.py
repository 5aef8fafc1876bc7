"""The built-in examples: their form, their marks, and that none is twice."""

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from perce.demo import DATA_DIR

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def splits():
    def read(split):
        return [json.loads(line) for line in (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]

    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def rows(splits):
    return [row for split in SPLITS for row in splits[split]]


def heard(row):
    """All that was said before the response."""
    return row.get("query") or " ".join(turn["content"] for turn in row["messages"])


def words(text):
    return re.findall(r"[\w']+", text.lower())


def test_it_is_large_enough_and_split_by_person(splits, rows):
    people = {split: {row["user_id"] for row in splits[split]} for split in SPLITS}
    assert {split: (len(people[split]), len(splits[split])) for split in SPLITS} == {
        "train": (34, 204), "validation": (7, 42), "test": (7, 42)
    }  # fmt: skip
    assert len(set.union(*people.values())) == sum(map(len, people.values())) == 48
    for split in SPLITS:  # a person's exchanges stand together
        starts = [row["user_id"] for row in splits[split]][::6]
        assert [row["user_id"] for row in splits[split]] == [user for user in starts for _ in range(6)]
        assert len(set(starts)) == len(starts)
    facts = {row["user_id"]: tuple(row["persona"]) for row in rows}
    assert all(tuple(row["persona"]) == facts[row["user_id"]] for row in rows)
    assert len({fact for persona in facts.values() for fact in persona}) == sum(map(len, facts.values()))


def test_the_rows_have_the_documented_form(rows):
    for row in rows:
        prompt = "messages" if "messages" in row else "query"
        assert list(row) == ["user_id", "persona", prompt, "response", "personal_spans"]
        assert 3 <= len(row["persona"]) <= 6 and all(3 <= len(fact.split()) <= 14 for fact in row["persona"])
        assert 12 <= len(row["response"].split()) <= 60
        texts = [*row["persona"], heard(row), row["response"]]
        assert all(text == " ".join(text.split()) and not re.search(r"[\[\]—–’“”]", text) for text in texts), row
        if prompt == "messages":
            roles = [turn["role"] for turn in row["messages"]]
            assert roles == (["user", "assistant"] * 3)[: len(roles)] and len(roles) in (3, 5)
    assert 0.15 <= sum("messages" in row for row in rows) / len(rows) <= 0.25


def test_marks_are_whole_words_of_the_response_that_nobody_said_before(rows):
    for row in rows:
        response, spans = row["response"], row["personal_spans"]
        assert all(end <= start for (_, end), (start, _) in pairwise(spans)), row
        for start, end in spans:
            assert 0 <= start < end <= len(response)
            marked = response[start:end]
            assert re.fullmatch(r"\w(.*[\w'])?", marked) and len(marked.split()) <= 7, marked
            assert not (response[:start][-1:].isalnum() or response[end:][:1].isalnum()), marked
            assert not re.search(rf"\b{re.escape(marked.lower())}\b", heard(row).lower()), (marked, heard(row))


def test_marks_are_neither_rare_nor_everywhere(splits):
    for split in SPLITS:
        rows = splits[split]
        marks = [[row["response"][start:end] for start, end in row["personal_spans"]] for row in rows]
        share = sum(len(" ".join(m).split()) for m in marks) / sum(len(row["response"].split()) for row in rows)
        assert 0.15 <= share <= 0.30, (split, share)
        assert 0.08 <= sum(not m for m in marks) / len(rows) <= 0.25  # the persona hardly matters
        assert 0.25 <= sum(len(m) <= 1 for m in marks) / len(rows) <= 0.45  # hardly or lightly
        assert sum(len(m) >= 3 for m in marks) / len(rows) >= 0.55


def test_no_two_exchanges_are_alike(rows):
    assert len({row["response"] for row in rows}) == len({heard(row) for row in rows}) == len(rows)
    openings = Counter(tuple(words(row["response"])[:3]) for row in rows)
    assert openings.most_common(1)[0][1] == 1, openings.most_common(3)
    runs = Counter(run for row in rows for run in {tuple(words(row["response"])[i : i + 6]) for i in range(60)})
    assert not [run for run, count in runs.items() if count > 1 and len(run) == 6]


def test_the_readme_counts_what_is_there(splits, rows):
    text = (DATA_DIR.parent / "README.md").read_text(encoding="utf-8")
    for name, part in [*((f"`data/{split}.jsonl`", splits[split]) for split in SPLITS), ("all", rows)]:
        marks = [row["response"][start:end] for row in part for start, end in row["personal_spans"]]
        size, marked = sum(len(row["response"].split()) for row in part), sum(len(mark.split()) for mark in marks)
        cells = [name, len({row["user_id"] for row in part}), len(part), sum("messages" in row for row in part)]
        cells += [f"{len(marks):,}", f"{size:,}", f"{100 * marked / size:.1f} %"]
        assert "| " + " | ".join(map(str, cells)) + " |" in text
    assert f"{sum(not row['personal_spans'] for row in rows)} responses have no mark" in text
    assert f"{sum(len(row['personal_spans']) == 1 for row in rows)} have one" in text
    assert '"Eirik"' in text and rows[4]["response"][73:78] == "Eirik"
