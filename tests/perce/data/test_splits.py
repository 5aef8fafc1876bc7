"""The examples that are held out, and those that are drawn."""

import json
import random
import re

import pytest

from perce import DataConfig, LossConfig, UserError
from perce.config.questions import SplitConfig
from perce.data.dataset import conversations, sequence_lengths
from perce.data.splits import load_pairs, load_split, load_splits
from tests.helpers.tiny import tiny_tokenizer, write_jsonl


def row(user, number):
    named = {} if user is None else {"user_id": user}
    return {
        **named,
        "persona": [f"I keep bees, {number}."],
        "query": f"Where, {number}?",
        "response": f"Here, {number}.",
    }


def dialogue(number):
    said = [
        {"role": role, "content": f"{role} {number}, {turn}"} for turn in range(3) for role in ("user", "assistant")
    ]
    return {"persona": ["I bake."], "messages": said}


USERS = [row(f"u{i % 25}", i) for i in range(60)]
NAMELESS = [row(None, i) for i in range(30)]
DIALOGUES = [dialogue(i) for i in range(30)]


def splits(path, rows, seed=0):
    return load_splits(DataConfig(data=str(write_jsonl(path / "rows.jsonl", rows))), eval_examples=0, seed=seed)


def texts(examples):
    return {(example.turns, example.response) for example in examples}


def test_users_are_held_out_whole(tmp_path):
    drawn = splits(tmp_path, USERS)
    assert not {x.user_id for x in drawn.train} & {x.user_id for x in drawn.validation}
    assert len(drawn.train) + len(drawn.validation) == 60 and drawn.validation and "2 of 25 users" in drawn.notes[0]
    again, other = splits(tmp_path, USERS), splits(tmp_path, USERS, seed=1)
    assert again.validation == drawn.validation != other.validation


@pytest.mark.parametrize("rows", [USERS, NAMELESS, DIALOGUES, [row("ana", i) for i in range(30)]])
def test_who_is_held_out_does_not_depend_on_the_order_of_the_rows(tmp_path, rows):
    shuffled = random.Random(1).sample(rows, len(rows))
    drawn = [texts(splits(tmp_path, order).validation) for order in (rows, shuffled, rows[::-1])]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("user", [{}, {"user_id": "ana"}])
def test_a_dialogues_examples_are_held_out_together(tmp_path, user):
    drawn = splits(tmp_path, [{**user, **said} for said in DIALOGUES])
    assert len(drawn.validation) == 9 and "3 of 30 rows" in drawn.notes[0]
    assert not {x.source for x in drawn.train} & {x.source for x in drawn.validation}


def test_of_one_row_examples_are_held_out_and_of_one_example_nothing(tmp_path):
    drawn = splits(tmp_path, DIALOGUES[:1])
    assert len(drawn.train) == 2 and len(drawn.validation) == 1 and "1 of 3 examples" in drawn.notes[0]
    for rows in (NAMELESS[:1], NAMELESS[:1] * 3):
        with pytest.raises(UserError, match="no validation split: at least two different examples"):
            splits(tmp_path, rows)


def test_eval_examples_draws_the_same_sample_each_time():
    config = DataConfig()
    drawn = [load_splits(config, eval_examples=5, seed=3).validation for _ in range(2)]
    assert len(drawn[0]) == 5 and drawn[0] == drawn[1]
    assert load_splits(config, eval_examples=5, seed=4).validation != drawn[0]
    assert len(load_splits(config, eval_examples=0, seed=3).validation) == 42


@pytest.mark.parametrize(("few", "tokens", "uncut"), [(0, None, None), (2, None, 42), (42, None, None), (0, 9, 42)])
def test_validation_examples_that_are_left_out_are_counted(few, tokens, uncut):
    seeds = {"seed": 0, "validation_seed": 0}
    pairs = load_pairs(
        DataConfig(), tiny_tokenizer(), loss=LossConfig(), eval_examples=few, eval_tokens=tokens, **seeds
    )
    assert pairs.uncut == uncut and len(pairs.validation) == (1 if tokens else few or 42)


@pytest.mark.parametrize("share", ["conversations", "none"])
def test_validation_replies_stand_by_length_and_beside_those_of_their_conversation(tmp_path, share):
    data = DataConfig(data=str(write_jsonl(tmp_path / "rows.jsonl", [*DIALOGUES, *NAMELESS])), share=share)
    loss, tokenizer = LossConfig(), tiny_tokenizer()
    pairs = load_pairs(
        data, tokenizer, loss=loss, eval_examples=0, eval_tokens=None, seed=0, validation_seed=0
    ).validation
    lengths, together = sequence_lengths(pairs), conversations(pairs)
    assert max(map(len, together)) == 3
    if share == "none":
        assert lengths == sorted(lengths)
    else:
        assert [index for indices in together for index in indices] == list(range(len(pairs)))
        longest = [max(lengths[index] for index in indices) for indices in together]
        assert longest == sorted(longest)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_split_that_a_file_does_not_have_is_named(tmp_path, streaming):
    rows = [{"persona": "I bake.", "query": "Hi", "response": "Hello"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for name in ("train-00000-of-00001", "valid"):
        write_jsonl(tmp_path / f"parts/{name}.jsonl", rows)
    with pytest.raises(UserError, match=r"no such split; it has validation; not read: train-00000-of-00001\.jsonl \("):
        load_split(DataConfig(data=str(tmp_path / "parts")), SplitConfig(split="train"))
    with pytest.raises(UserError, match=r"--split test: .*rows\.jsonl has no such split; it has train\."):
        load_split(DataConfig(data=str(path), streaming=streaming), SplitConfig(split="test"))


def test_rows_without_users_are_warned_of(tmp_path):
    """A user with several rows may be on both sides."""
    assert not any("warning" in note for note in splits(tmp_path, USERS).notes)
    for rows, words in (
        (NAMELESS, "30 of 30 examples have no user_id: rows are held out, not users"),
        (USERS + NAMELESS, "30 of 90 examples have no user_id: rows are held out, not users"),
        (USERS + [row("", i) for i in range(30)], "30 of 90 examples have no user_id: rows are held out, not users"),
        ([row("", i) for i in range(30)], "30 of 30 examples have no user_id: rows are held out, not users"),
        ([row("ana", i) for i in range(30)], "all rows are of one user: rows are held out, not users"),
    ):
        (warning,) = (note for note in splits(tmp_path, rows).notes if note.startswith("warning"))
        assert words in warning and "--columns user_id=FIELD" in warning
    assert splits(tmp_path, USERS + NAMELESS).notes[0] == "6 of 55 users and rows without one held out for validation"


def test_the_seed_of_who_is_drawn_follows_no_model():
    assert [SplitConfig(split_seed=seed).seed for seed in (None, 3, 0)] == [42, 3, 0]


@pytest.mark.parametrize("swapped", [False, True])
def test_splits_whose_prompts_are_made_in_other_ways_are_refused(tmp_path, swapped):
    """Passages would be retrieved from personas, or histories be shown whole, because one builder makes both splits."""
    histories = [{"input": "i", "output": f"o{n}", "profile": [{"text": "t"}] * 6} for n in range(3)]
    for name, rows in zip(("train", "valid"), (USERS, histories)[:: -1 if swapped else 1], strict=True):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    given = f"training rows are of format {'lamp' if swapped else 'perce'}"
    with pytest.raises(UserError, match=f"documents, personas and histories cannot be mixed; the {given}"):
        load_splits(DataConfig(data=str(tmp_path)), eval_examples=0, seed=0)


def test_what_a_run_has_held_out_is_whom_alone(tmp_path):
    assert set(json.loads(splits(tmp_path, USERS).held_out.to_json())) == {"unit", "held_out"}


def own_split(path, train, validation):
    write_jsonl(path / "train.jsonl", train)
    write_jsonl(path / "validation.jsonl", validation)
    return load_splits(DataConfig(data=str(path)), eval_examples=0, seed=0).notes


def test_validation_rows_that_are_trained_on_are_warned_of(tmp_path):
    new, said = [row(f"new{i}", 100 + i) for i in range(5)], "validation examples are also trained on"
    assert own_split(tmp_path, USERS, new) == []
    (warning,) = own_split(tmp_path, USERS, [*new, *USERS[:20], {**USERS[40], "user_id": "other"}])
    assert warning.startswith(f"warning: 21 of 26 {said} (the first: validation.jsonl:6), and 20 of 26 users")
    (warning,) = own_split(tmp_path, DIALOGUES, DIALOGUES[:2])
    assert warning.startswith(f"warning: 6 of 6 {said} (the first: validation.jsonl:1), which")
    (warning,) = own_split(tmp_path, [{"text": "One two."}, {"text": "Three."}], [{"text": "Three."}])
    assert warning.startswith(f"warning: 1 of 1 {said} ")
    later = [{**USERS[i], "query": "And later?"} for i in range(3)]
    assert own_split(tmp_path, USERS, later) == ["3 of 3 users of the validation split are also trained on"]


def test_replies_that_the_prompt_shows_are_counted(tmp_path):
    rows = [{**row(f"u{i}", i), "response": f"Here, at the old mill, since {i}."} for i in range(20)]
    rows[:19] = [{**x, "persona": [*x["persona"], x["response"]]} for x in rows[:19]]
    data = DataConfig(data=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    arguments = {"loss": LossConfig(), "eval_examples": 0, "eval_tokens": None, "seed": 0, "validation_seed": 0}
    warnings = [note for note in load_pairs(data, tiny_tokenizer(), **arguments).notes if "word for word" in note]
    (held_out, trained) = warnings
    assert held_out.startswith("validation: 2 of 2 replies stand word for word in their persona: they are")
    assert trained.startswith("training: 17 of 18 replies")


def test_files_of_no_split_are_named_once(tmp_path):
    for name in ("eval", "train_part2"):
        write_jsonl(tmp_path / f"{name}.jsonl", USERS[:2])
    write_jsonl(tmp_path / "train.jsonl", USERS)
    (note,) = [note for note in load_splits(DataConfig(data=str(tmp_path)), eval_examples=0, seed=0).notes
               if "not read" in note]  # fmt: skip
    assert note.startswith("not read: eval.jsonl, train_part2.jsonl (the names of splits are train; validation, valid,")
    own = own_split(tmp_path, USERS, [row(None, 100 + i) for i in range(5)])
    assert own == [note]


def test_examples_without_a_persona_are_counted_and_trained_on(tmp_path):
    """Validation measures what personas do: they are not drawn for it, and are left out of it."""
    rows = USERS + [{"persona": [], "query": f"Number {i}?", "response": "Yes."} for i in range(30)]
    data = DataConfig(data=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    arguments = {"loss": LossConfig(), "eval_examples": 0, "eval_tokens": None, "seed": 0, "validation_seed": 0}
    notes = load_pairs(data, tiny_tokenizer(), **arguments).notes
    assert not any("warning" in note for note in notes)
    assert notes[0] == "2 of 55 users and rows without one held out for validation"
    said = "examples have no persona: both passes are the same, and PIR is 0"
    assert any(re.fullmatch(rf"training: 30 of 8\d {said}", note) for note in notes)
    own_split(tmp_path / "both", USERS, rows[-3:] + USERS[:2])
    found = load_pairs(DataConfig(data=str(tmp_path / "both")), tiny_tokenizer(), **arguments)
    assert "validation: 3 examples without a persona left out" in found.notes and len(found.validation) == 2
    assert splits(tmp_path, rows[-3:]).validation, "if none has a persona, some of them"
    named = USERS + [{**row, "user_id": "u3"} for row in rows[-3:]]
    drawn = next(x for x in (splits(tmp_path, named, seed) for seed in range(99)) if "u3" in x.held_out.keys)
    assert not any(x.user_id == "u3" for x in drawn.train), "they go with their user"
    assert all(x.persona for x in drawn.validation)
