"""Rows that perce knows are taken for one sequence; all others are still looked at."""

import threading

import pytest
import torch
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash

from perce.model.unpacked import answer_transformers, known_unpacked
from tests.helpers.models import model_with
from tests.helpers.trainers import model_for

POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])


@pytest.fixture(autouse=True)
def answering():
    answer_transformers()


def taken_for_packed(positions):
    return masking_utils.find_packed_sequence_indices(positions) is not None, bool(
        flash._is_packed_sequence(positions, 1)
    )


def test_rows_are_looked_at_outside_the_context_alone():
    assert taken_for_packed(POSITIONS.clone()) == (True, True)
    assert taken_for_packed(torch.arange(5)[None]) == (False, False)
    with known_unpacked():
        known = POSITIONS.clone()
        assert taken_for_packed(known) == (False, False)
        with known_unpacked(False):
            assert taken_for_packed(POSITIONS.clone()) == (False, False), "what is known of the outer one stays known"
    assert taken_for_packed(known) == (False, False), "in backward, where a layer is computed again"
    assert taken_for_packed(POSITIONS.clone()) == (True, True)


def test_another_thread_looks():
    found = []
    with known_unpacked():
        other = threading.Thread(target=lambda: found.append(taken_for_packed(POSITIONS.clone())))
        other.start()
        other.join()
    assert found == [(True, True)]


def test_after_a_forward_that_fails_rows_are_looked_at():
    model = model_for("full")
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]), perce={"rows": torch.tensor([0])})
    assert taken_for_packed(POSITIONS.clone()) == (True, True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by place"])
def test_a_row_with_positions_of_its_own_is_looked_at(attention, by_name):
    """As from the collator of another trainer, which gives no more than the positions."""
    model, ids = model_with("llama", attention).eval(), torch.tensor([[5, 6, 7, 8, 9]])
    rows = {"rows": torch.arange(5)}
    with torch.no_grad():
        if by_name:
            packed = model(input_ids=ids, position_ids=POSITIONS.clone(), perce=rows)
        else:
            packed = model(ids, None, POSITIONS.clone(), perce=rows)
        alone = [
            model(input_ids=part, perce={"rows": torch.arange(part.shape[1])}) for part in ids.split([3, 2], dim=1)
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_flash_attention_that_is_told_where_sequences_begin_does_not_look(monkeypatch):
    """Other implementations need the answer for their mask."""
    seen = []
    for attention in ("sdpa", "flash_attention_2"):
        model = model_with("llama", "sdpa")
        monkeypatch.setattr(model.config, "_attn_implementation_internal", attention)
        decoder = model.get_submodule(model.perce_decoder)

        def forward(*args, **kwargs):
            seen.append(taken_for_packed(POSITIONS.clone()))
            return (torch.zeros(1, 5, 4),)

        monkeypatch.setattr(decoder, "forward", forward)
        lengths = torch.tensor([0, 3, 5], dtype=torch.int32)
        model(input_ids=POSITIONS, position_ids=POSITIONS, cu_seq_lens_q=lengths, perce={"rows": torch.arange(5)})
    assert seen == [(True, True), (False, False)]
