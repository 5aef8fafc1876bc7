"""Packed sequences are kept apart, or packing is refused."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from perce import UserError
from perce.data.batch import collate, token_inputs
from perce.model.probe import check_packing, check_sequences_apart
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
    with pytest.raises(UserError, match="does not keep them apart"):
        check_sequences_apart(model)
    check_sequences_apart(model_with("llama", "eager"))


def test_packing_without_flash_or_flex_attention_or_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"packing: expected flash.*got sdpa on cpu.*--tokens_per_batch"):
        trainer_for(tiny_model(), arguments(tmp_path, packing=True))
    with pytest.raises(UserError, match="got sdpa on cuda"):
        check_packing(model_with("llama", "sdpa"), "cuda")
