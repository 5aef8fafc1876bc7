"""Rows that are completed from other files or from other rows."""

import json
from pathlib import Path

import pytest

from perce import UserError, load_examples
from tests.helpers.raw_rows import FILES, documented, documented_files, jsonl


@pytest.mark.parametrize(
    ("format", "missing", "field"),
    [
        ("personamem", "shared_contexts_32k.jsonl", "shared_context_id"),
        ("personamem_v2", "data/chat_history_32k/p100.json", "chat_history_32k_link"),
        ("prism", "survey.jsonl", "user_id"),
    ],
)
def test_a_second_file_that_is_missing(tmp_path, format, missing, field):
    path = documented_files(tmp_path, format)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError) as caught:
        load_examples(path, "train")
    expected = (
        f"{path}:1: field '{field}': expected the file {missing} in the data's directory, got none in {tmp_path}. "
        "Download"
    )
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("format", FILES)
def test_rows_of_the_library_have_no_second_file(tmp_path, format):
    from datasets import Dataset

    Dataset.from_list(documented(format)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        UserError, match=r"rows of the datasets library, which have no file next to them. Download that file too"
    ):
        load_examples(tmp_path / "saved", "train")


def test_the_linked_file_is_looked_for_above(tmp_path):
    """PersonaMem v2's rows are in benchmark/text/, and name files relative to the data set's directory."""
    documented_files(tmp_path, "personamem_v2")
    (tmp_path / "benchmark" / "text").mkdir(parents=True)
    path = (tmp_path / "benchmark.jsonl").rename(tmp_path / "benchmark" / "text" / "benchmark.jsonl")
    assert load_examples(path, "train").all[0].persona[-1] == "You talk to a beekeeper."
    (tmp_path / "data/chat_history_32k/p100.json").write_text("[]")
    with pytest.raises(UserError, match="field 'chat_history_32k_link': expected a non-empty list"):
        load_examples(path, "train")


def test_the_long_history_by_name(tmp_path):
    row = documented("personamem_v2")[0]
    path = documented_files(tmp_path, "personamem_v2", {**row, "chat_history_128k_link": "data/long.json"})
    (tmp_path / "data" / "long.json").write_text(json.dumps([{"role": "user", "content": "Long ago."}]))
    columns = {"chat_history_32k_link": "chat_history_128k_link"}
    assert load_examples(path, "train", columns=columns).all[0].persona == ("User: Long ago.",)
    assert len(load_examples(path, "train").all[0].persona) == 2


def test_system_messages_that_come_again_are_one_passage(tmp_path):
    said = [{"role": "system", "content": "P"}, *({"role": "user", "content": text} for text in "aba")]
    path = documented_files(tmp_path, "personamem_v2")
    (tmp_path / "data/chat_history_32k/p100.json").write_text(json.dumps([*said, {"role": "system", "content": "P"}]))
    assert load_examples(path, "train").all[0].persona == ("User: a", "User: b", "User: a", "P")


def test_questions_in_a_file_of_another_name(tmp_path):
    documented_files(tmp_path, "personamem").rename(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"expected the file shared_contexts\.jsonl in the data's directory"):
        load_examples(tmp_path, "train")
    (tmp_path / "shared_contexts_32k.jsonl").rename(tmp_path / "shared_contexts.jsonl")
    assert len(load_examples(tmp_path, "train").all) == 1


def test_a_second_file_with_a_bad_line(tmp_path):
    path = documented_files(tmp_path, "personamem")
    (tmp_path / "shared_contexts_32k.jsonl").write_text('{"c1": []}\n[1]\n')
    with pytest.raises(UserError, match=r"shared_contexts_32k\.jsonl:2: expected an object, got list"):
        load_examples(path, "train")


def test_reviews_are_renamed_before_they_are_joined(tmp_path):
    rows = [{("stars" if name == "rating" else name): value for name, value in row.items()} for row in
            documented("amazon")]  # fmt: skip
    rows = load_examples(
        jsonl(tmp_path / "d.jsonl", *rows, [1]), "train", columns={"rating": "stars"}, skip_bad_rows=True
    )
    assert [len(example.persona) for example in rows] == [1, 1] and rows.skipped == 1


def test_what_cannot_be_used_of_a_review_is_in_no_history(tmp_path):
    first, second = documented("amazon")
    bad = [{**first, "text": ["a", "b"]}, {**first, "rating": [1], "text": "x"}, {**first, "text": ""},
           {**first, "title": None, "text": "y"}]  # fmt: skip
    rows = load_examples(jsonl(tmp_path / "d.jsonl", first, second, *bad), "train", skip_bad_rows=True)
    assert rows.skipped == 4 and [len(example.persona) for example in rows] == [1, 1]


def test_many_reviews_of_a_user_share_their_texts(tmp_path):
    """The rows of the user share one copy of each text in memory."""
    row = documented("amazon")[0]
    path = jsonl(tmp_path / "d.jsonl", *({**row, "text": f"Number {i}.", "timestamp": i} for i in range(60)))
    first, second, *_ = load_examples(path, "train").all
    assert len(first.persona) == 59 and first.persona[0] is second.persona[0]


@pytest.mark.parametrize(
    ("format", "name", "line", "place"),
    [
        ("personamem", "shared_contexts_32k.jsonl", {"c26f": []}, "'c26f'"),
        ("prism", "survey.jsonl", {"user_id": "user0"}, "'user0'"),
    ],
)
def test_an_id_that_is_there_twice(tmp_path, format, name, line, place):
    path = documented_files(tmp_path, format)
    with (tmp_path / name).open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"{name}:2: the id {place} is there twice"):
        load_examples(path, "train")


def test_a_second_file_that_cannot_be_opened(tmp_path, monkeypatch):
    path = documented_files(tmp_path, "prism")
    opened = Path.open

    def refused(self, *arguments, **options):
        if self.name == "survey.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"survey\.jsonl: cannot be read \(Permission denied\)"):
        load_examples(path, "train")


def test_the_history_of_reviews_has_the_latest_first(tmp_path):
    first, second = documented("amazon")
    third = {**first, "title": "Old hat", "text": "It is old.", "timestamp": 5}
    examples = load_examples(jsonl(tmp_path / "d.jsonl", first, second, third), "train").all
    assert [entry.splitlines()[1] for entry in examples[0].persona] == ["Title: Thin gloves", "Title: Old hat"]
