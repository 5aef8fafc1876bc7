"""Labels that mark the persona, and batches of both passes."""

from itertools import chain

import pandas
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithFlattening

from perce import UserError
from perce.data import marked
from perce.data.batch import collate
from perce.data.marked import IGNORED, NO_PERSONA, PERSONA, PersonaCollator, collate_pairs, labelled, row_of
from tests.helpers.tiny import demo_pairs, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PADDED = PersonaCollator(DataCollatorForSeq2Seq(TOKENIZER))
FLAT = PersonaCollator(DataCollatorWithFlattening(return_flash_attn_kwargs=True))


def test_a_row_says_what_a_pair_says():
    pair = {"input_ids": [5, 6, 7, 8, 9], "persona_span": (1, 3), "response_length": 1}
    assert row_of(pair) == {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, PERSONA, PERSONA, IGNORED, 9]}
    none = row_of(pair | {"persona_span": (2, 2)})
    assert none == {"input_ids": [5, 6, 7, 8, 9], "labels": [NO_PERSONA, *[IGNORED] * 3, 9]}


@pytest.mark.parametrize("collator", [PADDED, FLAT])
def test_a_batch_predicts_the_tokens_of_the_pairs_in_both_passes(collator):
    """Each row of hidden states belongs to the token before its target."""
    of_nobody = {"input_ids": [5, 6, 7, 8], "persona_span": (1, 1), "response_length": 2, "personal": [False] * 2}
    pairs = [*demo_pairs(4), of_nobody]
    batch, own = collate_pairs(pairs, collator), collate(pairs)
    assert torch.equal(batch["target"], own["target"])
    for suffix in ("", "_cf"):
        for inputs, rows in ((batch, batch), (own, own)):
            before = inputs[f"input_ids{suffix}"].flatten()[rows[f"rows{suffix}"]]
            assert before.tolist() == own[f"input_ids{suffix}"].flatten()[own[f"rows{suffix}"]].tolist()
    assert batch["uses"].sum() == sum(len(pair["input_ids"]) for pair in pairs)
    assert (batch["labels"] >= IGNORED).all() and (batch["labels"][:, 1:] != IGNORED).sum() == len(batch["target"])


def test_rows_of_several_sequences_are_the_sequences():
    rows = [row_of(pair) for pair in demo_pairs(3)]
    together = {name: [*chain(*(row[name] for row in rows))] for name in ("input_ids", "labels")}
    seen = []

    def keep(given):
        seen.append([row["seq_lengths"] for row in given])
        return FLAT.collator([{name: row[name] for name in ("input_ids", "labels")} for row in given])

    lengths = [len(row["input_ids"]) for row in rows]
    PersonaCollator(keep)([together | {"seq_lengths": lengths}])
    kept = [sum(label != PERSONA for label in row["labels"]) for row in rows]
    assert seen == [[lengths], [kept]]


def test_what_a_sequence_begins_with_is_not_learnt():
    """Without the persona no token precedes it that could predict it, so it is not learnt with the persona either."""
    rows = [{"input_ids": [7, 8, 5, 6], "labels": [PERSONA, PERSONA, 5, 6]}]
    batch = PADDED(rows)
    assert batch["target"].tolist() == [6] and batch["rows"].tolist() == [2] and batch["rows_cf"].tolist() == [0]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 6]]


@pytest.mark.parametrize("labels", [[IGNORED, 2, 3], [PERSONA] * 3, [NO_PERSONA, PERSONA, 3], [IGNORED, NO_PERSONA, 3]])
def test_rows_without_a_persona_or_with_nothing_else_are_refused(labels):
    with pytest.raises(UserError, match=f"labels: expected {PERSONA} at the persona's tokens"):
        PADDED([{"input_ids": [1, 2, 3], "labels": labels}])


def test_a_collator_that_changes_one_of_the_passes_is_refused():
    def cutting(rows):
        return PADDED.collator([{name: row[name][:400] for name in row} for row in rows])

    with pytest.raises(UserError, match=r"data_collator: expected the labels .* the same in both passes"):
        PersonaCollator(cutting)([row_of(pair) for pair in demo_pairs(3)])
    with pytest.raises(UserError, match="labels: expected -101 at"):
        PADDED([{"query": "raw"}])


def test_a_collator_that_makes_labels_of_its_own_is_refused():
    """As transformers' for language modelling does, of rows of equal length: it learns the prompt too."""

    def of_ids(rows):
        return FLAT.collator([{"input_ids": row["input_ids"], "labels": [*row["input_ids"]]} for row in rows])

    def reordered(rows):
        return PADDED.collator(rows[::-1])

    for collator in (of_ids, reordered):
        with pytest.raises(UserError, match="data_collator: expected the labels of the rows, in their order"):
            PersonaCollator(collator)([row_of(pair) for pair in demo_pairs(3)])
    with pytest.raises(UserError, match="data_collator: DataCollatorForLanguageModeling replaces the labels"):
        PersonaCollator(DataCollatorForLanguageModeling(TOKENIZER, mlm=False))


@pytest.mark.parametrize("collator", [PADDED, FLAT])
def test_a_batch_tells_of_which_row_a_token_is(collator):
    pairs = demo_pairs(3)
    expected = [i for i, pair in enumerate(pairs) for _ in range(pair["response_length"])]
    assert collate_pairs(pairs, collator)["of_row"].tolist() == expected


def test_padding_on_the_left_is_refused():
    left = tiny_tokenizer()
    left.padding_side = "left"
    rows = [row_of(pair) for pair in demo_pairs(2)]
    with pytest.raises(UserError, match="padding_side: expected padding on the right"):
        PersonaCollator(DataCollatorForSeq2Seq(left))(rows)


def test_the_span_without_which_ids_are_others():
    assert marked.persona_span([1, 2, 3, 4], [1, 4]) == (1, 3)
    assert marked.persona_span([1, 2, 1, 2, 4], [1, 2, 4]) == (2, 4)  # either span is right
    for ids, other in (([1, 4], [1, 4]), ([1, 4], [1, 2, 4]), ([1, 2, 3, 4], [1, 5]), ([1, 2, 3], [2, 1])):
        assert marked.persona_span(ids, other) is None


def test_rows_of_any_format_are_labelled():
    rows = [{"persona": "I keep bees.", "query": "Tonight?", "response": "No."}]
    (row,) = labelled(rows, TOKENIZER)
    learnt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    assert TOKENIZER.decode(learnt) == "No.<|im_end|>" and PERSONA in row["labels"]
    with pytest.raises(UserError, match="rows: expected weights of 0 or 1"):
        labelled([rows[0] | {"weight": 0.5}, rows[0]], TOKENIZER)
    with pytest.raises(UserError, match="row 1"):
        labelled([{"persona": "I keep bees."}], TOKENIZER)


@pytest.mark.parametrize(
    "rows", ["rows.jsonl", None, {"persona": ["I keep bees."]}, pandas.DataFrame({"persona": ["B."]})]
)
def test_what_are_no_rows_is_named(rows):
    with pytest.raises(UserError, match=f"rows: expected a Dataset or a list of rows, got {type(rows).__name__}"):
        labelled(rows, TOKENIZER)
