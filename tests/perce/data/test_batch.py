"""Packed batches, padded batches and single sequences give equal results if attention keeps packed sequences apart."""

import itertools

import pytest
import torch

from perce.data.batch import collate
from perce.objectives import OBJECTIVES
from tests.helpers.models import PACKABLE, PACKED, model_with, perce_forward


def loss_and_gradients(model, pairs, packing):
    """The PerCE loss of the pairs in one batch, and its gradients."""
    batch = collate(pairs, packing=packing)
    loss, *_ = perce_forward(model, batch, weighting=OBJECTIVES["perce"].weighting(clip_min=0.05), num_items=1)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", PACKABLE)
def test_a_packed_row_equals_its_sequences_one_by_one(architecture):
    """With eager attention, which keeps packed sequences apart by a T × T mask that it makes from position_ids."""
    model = model_with(architecture, "eager")
    whole, gradients = loss_and_gradients(model, PACKED, packing=True)
    parts = [loss_and_gradients(model, [pair], packing=False) for pair in PACKED]
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts), atol=1e-4, rtol=1e-5)
    for name, gradient in gradients.items():
        expected = sum(part[name] for _, part in parts)
        torch.testing.assert_close(gradient, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


def test_packing_holds_no_padding():
    batch = collate(PACKED, packing=True)
    lengths = [len(pair["input_ids"]) - 1 for pair in PACKED]
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
    assert torch.equal(batch["target"], collate(PACKED)["target"])
    assert batch["cu_seq_lens_q"].tolist() == [0, *itertools.accumulate(lengths)]
    assert batch["max_length_k"] == max(lengths) and "max_length_k" not in collate(PACKED)
