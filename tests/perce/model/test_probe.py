"""Packed sequences are kept apart, or packing is refused; modes for a while."""

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from perce import UserError
from perce.data.batch import collate, token_inputs
from perce.model.probe import check_packing, check_sequences_apart, in_mode
from tests.helpers.models import PACKABLE, PACKED, model_with
from tests.helpers.tiny import tiny_model
from tests.helpers.trainers import arguments, trainer_for


@pytest.mark.parametrize("architecture", PACKABLE)
def test_flex_attention_keeps_packed_sequences_apart(architecture):
    """Forward only: on a CPU flex attention has no backward."""
    model = model_with(architecture, "flex_attention")
    packed, padded = (collate(PACKED, packing=packing) for packing in (True, False))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        check_packing(model, "cuda")
        for suffix in ("", "_cf"):
            one, other = (
                model(**token_inputs(batch, suffix), perce={"rows": batch[f"rows{suffix}"]})
                for batch in (packed, padded)
            )
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_an_attention_that_mixes_packed_sequences_is_refused():
    AttentionInterface.register("blind", sdpa_attention_forward)  # without a mask function: causal only
    model = model_with("llama", "blind")
    with pytest.raises(UserError, match="does not keep packed sequences apart"):
        check_sequences_apart(model)
    check_sequences_apart(model_with("llama", "eager"))


def by_lengths(
    module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **_
):
    """Attention as flash-attn takes packed sequences: where they begin, and how long the longest is, as a number."""
    assert type(max_length_q) is type(max_length_k) is int, "CuTe DSL takes no tensor here, and FA 2 waits for one"
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    lengths = cu_seq_lens_q.diff().tolist()
    assert max(lengths) == max_length_q == max_length_k and cu_seq_lens_q.tolist() == cu_seq_lens_k.tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("suffix", ["", "_cf"])
def test_attention_that_is_told_lengths_gets_them(suffix):
    AttentionInterface.register("by_lengths", by_lengths)
    packed, padded = (collate(PACKED, packing=packing) for packing in (True, False))
    with torch.no_grad():
        one = model_with("llama", "by_lengths")(**token_inputs(packed, suffix), perce={"rows": packed[f"rows{suffix}"]})
        other = model_with("llama", "sdpa")(**token_inputs(padded, suffix), perce={"rows": padded[f"rows{suffix}"]})
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_the_check_of_packing_tells_lengths_too():
    def lenient(*args, cu_seq_lens_q=None, **kwargs):
        if cu_seq_lens_q is None:  # alone, or mixed up on purpose
            return sdpa_attention_forward(*args, **kwargs)
        return by_lengths(*args, cu_seq_lens_q=cu_seq_lens_q, **kwargs)

    AttentionInterface.register("by_lengths", lenient)
    check_sequences_apart(model_with("llama", "by_lengths"))


def test_packing_without_flash_or_flex_attention_or_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"packing: expected flash.*got sdpa on cpu.*--tokens_per_batch"):
        trainer_for(tiny_model(), arguments(tmp_path, packing=True))
    with pytest.raises(UserError, match="got sdpa on cuda"):
        check_packing(model_with("llama", "sdpa"), "cuda")


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_for_a_while_leaves_each_module_as_it_was(training):
    """Also one that its owner keeps in another mode than the model, such as a frozen norm."""
    model = tiny_model("llama").train(not training)
    kept = model.get_submodule("model.norm").train(training)
    with in_mode(model, training=training):
        assert {module.training for module in model.modules()} == {training}
    assert kept.training == training
    assert {module.training for module in model.modules() if module is not kept} == {not training}
