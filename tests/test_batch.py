"""Packed batches equal padded ones equal single sequences, where attention keeps packed sequences apart."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from perce.data.batch import collate, token_inputs
from perce.data.retrieval import Retriever, recency_scores
from perce.errors import UserError
from perce.model.patch import prepare_model
from perce.model.probe import check_packing, check_sequences_apart
from tests.test_trainer import arguments, trainer_for
from tests.tiny import demo_pairs, tiny_model

PAIRS = demo_pairs(2, retriever=Retriever(recency_scores, 1, "", ""))
ARCHITECTURES = ("llama", "qwen3", "gemma3")


def model_with(architecture, attention):
    model = prepare_model(tiny_model(architecture))
    model.set_attn_implementation(attention)
    return model


def loss_and_gradients(model, pairs, packing):
    """The PerCE loss of the pairs in one batch, and its gradients."""
    batch = collate(pairs, packing=packing)
    with torch.no_grad():
        hidden_cf = model(**token_inputs(batch, "_cf"), perce={"rows": batch["rows_cf"]})
    call = {"hidden_cf": hidden_cf, "clip_min": 0.05, "reduction": "sum"}
    loss, *_ = model(
        **token_inputs(batch), perce={"rows": batch["rows"], "target": batch["target"], "loss": call}
    )  # fmt: skip
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_row_equals_its_sequences_one_by_one(architecture):
    """With eager attention, which tells packed sequences apart by the same position_ids, by a T × T mask."""
    model = model_with(architecture, "eager")
    whole, gradients = loss_and_gradients(model, PAIRS, packing=True)
    parts = [loss_and_gradients(model, [pair], packing=False) for pair in PAIRS]
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts), atol=1e-4, rtol=1e-5)
    for name, gradient in gradients.items():
        expected = sum(part[name] for _, part in parts)
        torch.testing.assert_close(gradient, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flex_attention_keeps_packed_sequences_apart(architecture):
    """Forward only: on a CPU flex attention has no backward."""
    model = model_with(architecture, "flex_attention")
    packed, padded = (collate(PAIRS, packing=packing) for packing in (True, False))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        check_packing(model, "cuda")
        for suffix in ("", "_cf"):
            one, other = (
                model(**token_inputs(batch, suffix), perce={"rows": batch[f"rows{suffix}"]})
                for batch in (packed, padded)
            )
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_packing_holds_no_padding():
    batch = collate(PAIRS, packing=True)
    lengths = [len(pair["input_ids"]) - 1 for pair in PAIRS]
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
    assert torch.equal(batch["target"], collate(PAIRS)["target"])


def test_an_attention_that_mixes_packed_sequences_is_refused():
    AttentionInterface.register("blind", sdpa_attention_forward)  # without a mask function: causal only
    model = model_with("llama", "blind")
    with pytest.raises(UserError, match="does not keep them apart"):
        check_sequences_apart(model)
    check_sequences_apart(model_with("llama", "eager"))


def test_packing_without_flash_or_flex_attention_or_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"packing: expected flash.*got sdpa on cpu.*--tokens_per_batch"):
        trainer_for(tiny_model(), arguments(tmp_path, packing=True))
    with pytest.raises(UserError, match="got sdpa on cuda"):
        check_packing(model_with("llama", "sdpa"), "cuda")
