"""Rows that are written twice for a trainer that tokenises them itself, and joined again."""

from dataclasses import replace

import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher

from perce import UserError
from perce.config.prompt import PromptStyle
from perce.data.marked import IGNORED, NO_PERSONA, PERSONA
from perce.data.twice import Twice
from tests.helpers.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REPLY = "No, the bees need me tonight, and tomorrow as well."
ROW = {"persona": ["I keep bees.", "Blue."], "prompt": "Tonight?\n", "completion": REPLY}
ROWS = Dataset.from_list([ROW | {"note": str(i)} for i in range(3)])


def twice(max_length=None, **style):
    return Twice("train", TOKENIZER, PromptStyle(**style), True, "text", max_length)


def tokenised(rows):
    """Tokenises rows as a trainer would: the completion is learnt."""

    def one(row):
        prompt, reply = (TOKENIZER(row[name])["input_ids"] for name in ("prompt", "completion"))
        return {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + reply}

    return rows.map(one)


def test_a_row_becomes_two_and_one_again():
    told = ROWS.map(twice(footer="\n").tell, batched=True, with_indices=True, remove_columns=ROWS.column_names)
    assert len(told) == 6 and told[3]["prompt"] == "Tonight?\n" and told[3]["note"] == "1"
    assert told[2]["prompt"] == "About the user:\n- I keep bees.\n- Blue.\n\nTonight?\n"
    joined = twice().prepared(ROWS, ROWS.column_names, tokenised)
    assert joined.column_names == ["input_ids", "labels"] and len(joined) == 3
    formatted = twice().prepared(ROWS.with_format("numpy"), ROWS.column_names, tokenised)
    assert formatted[:] == joined[:], "a Dataset of another format is read like any"
    (row, *_) = joined
    kept = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != PERSONA]
    assert TOKENIZER.decode(kept) == "Tonight?\n" + REPLY


def test_the_footer_is_one_that_keeps_the_tokens():
    """If a trainer's tokens merge a line break with the next word, the footer after which they do not is chosen."""

    def swallowing(rows):
        def one(row):
            text = row["prompt"].replace("\n\nT", "\x00") + row["completion"]
            ids = [ord(character) % 400 for character in text]
            return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - 3) + ids[-3:]}

        return rows.map(one)

    (row, *_) = twice().prepared(ROWS, ROWS.column_names, swallowing)
    assert "\n\n T" in "".join(map(chr, row["input_ids"]))
    with pytest.raises(UserError, match="train row 1: the text around the persona has other tokens or labels with the"):
        twice(footer="\n").prepared(ROWS, ROWS.column_names, swallowing)


def test_a_template_that_leaves_the_persona_out_is_named():
    def without(rows):
        return tokenised(rows.map(lambda row: {"prompt": row["prompt"][-9:]}))

    with pytest.raises(UserError, match="train row 1: the chat template leaves out the message that tells the persona"):
        twice().prepared(ROWS, ROWS.column_names, without)


def test_labels_that_depend_on_the_persona_are_refused():
    def more(rows):
        return tokenised(rows).map(lambda row: {"labels": [*row["labels"][:-1], 7 + len(row["labels"]) % 2]})

    with pytest.raises(UserError, match="train row 1: the text around the persona"):
        twice().prepared(ROWS, ROWS.column_names, more)


def test_entries_are_left_out_wherever_the_block_stands_and_however_a_text_begins():
    """Some tokenizers add a space, but not after a line break. The text after the persona may begin as the persona."""
    llama2 = tiny_tokenizer(prepends_space=True)

    def in_a_template(rows):
        def one(row):
            prompt, reply = llama2("[INST]\n" + row["prompt"])["input_ids"], llama2(row["completion"])["input_ids"]
            return {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + reply}

        return rows.map(one)

    for prompt, tokenizer, prepare in (
        ("About the weather, tonight?\n", TOKENIZER, tokenised),
        ("Tonight?\n", llama2, in_a_template),
    ):
        rows = ROWS.map(lambda row, prompt=prompt: row | {"prompt": prompt})
        whole = len(replace(twice(), tokenizer=tokenizer).prepared(rows, rows.column_names, prepare)[0]["input_ids"])
        shorter = replace(twice(whole - 1), tokenizer=tokenizer).prepared(rows, rows.column_names, prepare)[0]
        text = tokenizer.decode(shorter["input_ids"])
        assert "bees" in text and "Blue" not in text and text.endswith(REPLY)


def test_rows_whose_persona_or_reply_is_cut_off_are_left_out_and_told_of(capsys):
    long = [ROW | {"persona": ["I keep bees. " * 30]}, ROW]
    before = ROWS.column_names[:-1]
    kept = twice(60).prepared(Dataset.from_list(long), before, tokenised)
    told = capsys.readouterr().out
    assert len(kept) == 1 and "train: 1 rows left out, 0 persona entries, and the end of 0 rows, to fit" in told

    def late(rows):
        """Tokenises rows so that the persona comes after text that is learnt too."""

        def one(row):
            ids = TOKENIZER("To begin with, the weather. " * 9)["input_ids"]
            more = TOKENIZER(row["prompt"] + row["completion"])["input_ids"]
            return {"input_ids": ids + more, "labels": ids + more}

        return rows.map(one)

    with pytest.raises(UserError, match="no row has a token to learn within max_length 40"):
        twice(40).prepared(ROWS, ROWS.column_names, late)


def test_a_change_of_how_rows_are_told_is_no_cached_one():
    assert Hasher.hash(twice().join) != Hasher.hash(replace(twice(), version=0).join)


@pytest.mark.parametrize(("room", "entries"), [(0, 2), (1, 1), (20, 1)])
def test_entries_are_left_out_from_the_last_on_and_one_stays(room, entries):
    whole = len(twice().prepared(ROWS, ROWS.column_names, tokenised)[0]["input_ids"])
    row = twice(whole - room).prepared(ROWS, ROWS.column_names, tokenised)[0]
    text = TOKENIZER.decode(row["input_ids"])
    assert ("Blue" in text) == (entries == 2) and "bees" in text
    assert len(row["input_ids"]) <= whole - room == twice(whole - room).max_length
    assert text.endswith(REPLY) == (room < 20)


def test_rows_without_a_persona_are_marked_and_counted(capsys):
    """The first row that has one decides on the footer."""
    rows = Dataset.from_list([ROW | {"persona": []}, ROW, ROW | {"persona": [], "completion": ""}])
    joined = twice().prepared(rows, rows.column_names, tokenised)
    assert len(joined) == 2, "nothing is left to learn of the third"
    ids, labels = joined[0]["input_ids"], joined[0]["labels"]
    assert TOKENIZER.decode(ids) == "Tonight?\n" + REPLY and labels[0] == NO_PERSONA and PERSONA not in labels
    reply = TOKENIZER(REPLY)["input_ids"]
    assert labels[-len(reply) :] == reply and {*labels[1 : -len(reply)]} == {IGNORED}
    assert PERSONA in joined[1]["labels"]
    said = capsys.readouterr().out
    assert "train: 2 of 3 rows have no persona, so their PIR is 0" in said
    lost = Dataset.from_list([ROW | {"persona": None}, ROW])
    with pytest.raises(UserError, match=r"train row 1: field 'persona': expected a text, \[\] for no persona"):
        twice().prepared(lost, lost.column_names, tokenised)
