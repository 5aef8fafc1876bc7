"""Encodings that follow the length of a forward: one set of factors for a run, or lengths that work are named."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from perce import MemoryConfig, UserError, disable_dropout
from perce.data.batch import collate
from perce.model.patch import prepare_model
from perce.model.positions import position_limit
from tests.helpers.architectures import tiny_config
from tests.helpers.models import perce_forward
from tests.helpers.tiny import demo_pairs, tiny_model
from tests.helpers.trainers import arguments, trainer_for

PAIRS = sorted(demo_pairs(8), key=lambda pair: len(pair["input_ids"]))
LENGTHS = [len(pair["input_ids"]) for pair in PAIRS]
SWITCH = (LENGTHS[0] + LENGTHS[-1]) // 2
assert LENGTHS[0] < SWITCH < LENGTHS[-1]


def longrope(architecture="phi3", switch=SWITCH):
    config = tiny_config(architecture)
    config.max_position_embeddings, config.original_max_position_embeddings = 16 * switch, switch
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 16.0, "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4, "original_max_position_embeddings": switch, "partial_rotary_factor": 1.0,
        "short_mscale": 1.1, "long_mscale": 1.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return disable_dropout(AutoModelForCausalLM.from_config(config))


def logp(model, pairs):
    with torch.no_grad():
        return perce_forward(model, collate(pairs))[1:3]


@pytest.mark.parametrize("architecture", ["phi3", "phimoe"])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(tmp_path, architecture):
    trainer = trainer_for(longrope(architecture), arguments(tmp_path), pairs=PAIRS)
    short = PAIRS[0]["response_length"]
    for together, alone in zip(logp(trainer.model, PAIRS), logp(trainer.model, PAIRS[:1]), strict=True):
        torch.testing.assert_close(together[:short], alone, atol=2e-5, rtol=1e-5)


def test_both_passes_have_the_factors_of_the_longest_sequence_of_the_run(tmp_path):
    """The persona's tokens alone may be what makes a sequence long: PIR would be that of an encoding."""
    pair = PAIRS[-1]
    start, end = pair["persona_span"]
    assert len(pair["input_ids"]) - (end - start) < SWITCH
    trainer = trainer_for(longrope(), arguments(tmp_path), pairs=[pair] * 4)
    config = longrope().config
    config.rope_parameters = config.rope_parameters | {"short_factor": config.rope_parameters["long_factor"]}
    always_long = AutoModelForCausalLM.from_config(config).eval()
    always_long.load_state_dict(trainer.model.state_dict())
    for ours, theirs in zip(logp(trainer.model, [pair]), logp(prepare_model(always_long), [pair]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_short_runs_keep_the_short_factors(tmp_path):
    trainer = trainer_for(longrope(switch=LENGTHS[-1]), arguments(tmp_path), pairs=PAIRS)
    own = longrope(switch=LENGTHS[-1])
    own.load_state_dict(trainer.model.state_dict())
    ids = torch.tensor([PAIRS[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(input_ids=ids).logits, own(input_ids=ids).logits)
    longer = [dict(PAIRS[-1]) | {"input_ids": [*PAIRS[-1]["input_ids"][:-1], 7, *PAIRS[-1]["input_ids"][-1:]]}]
    with pytest.raises(UserError, match=rf"eval_dataset: sequences of up to {LENGTHS[-1] + 1} .*longrope.*settled"):
        trainer.evaluate(longer)


def test_a_cached_persona_has_the_same_factors(tmp_path):
    """In chunks, of which the first are short."""
    args = arguments(tmp_path, memory=MemoryConfig(persona_grad="none"), max_steps=1)
    one = trainer_for(longrope(), args, pairs=PAIRS)
    two = trainer_for(longrope(), arguments(tmp_path, max_steps=1), pairs=PAIRS)
    two.model.load_state_dict(one.model.state_dict())
    losses = [trainer.evaluate(PAIRS[:2])["eval_loss"] for trainer in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_encoding_that_follows_every_length_has_no_longer_sequences(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=SWITCH)
    with pytest.raises(UserError, match=rf"the model has {SWITCH} positions.*rope_type dynamic.*--max_length {SWITCH}"):
        trainer_for(model, arguments(tmp_path), pairs=PAIRS)
    fits = [pair for pair in PAIRS if len(pair["input_ids"]) <= SWITCH]
    for persona_grad in ("full", "none"):
        trainer_for(model, arguments(tmp_path, memory=MemoryConfig(persona_grad=persona_grad)), pairs=fits)


def test_stretched_positions_count():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    assert position_limit(tiny_model(rope_parameters=rope).config) == 16384
    assert position_limit(tiny_model().config) == 8192
