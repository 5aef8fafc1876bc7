"""The memory of all layers follows from a few rehearsed ones; which tensors are alive when."""

from dataclasses import replace

import pytest
import torch

from perce.config.schema import MemoryConfig
from perce.model.memory import run_tiles
from perce.model.prefill import prefill
from perce.planning import rehearsal
from perce.planning.building import Setup
from perce.planning.live import Rehearsed
from perce.planning.memory import count
from perce.planning.rehearsal import RECOMPUTED, rehearse, rehearse_depth
from perce.planning.shapes import StepShape
from tests.helpers.plans import FULL, LORA, NONE, TILED
from tests.helpers.tiny import LAYERS, tiny_model


@pytest.mark.parametrize(
    ("options", "low", "checkpointing"),
    [
        (FULL, False, False),
        pytest.param(FULL, True, True, marks=pytest.mark.slow),
        pytest.param(LORA, True, True, marks=pytest.mark.slow),
    ],
)
def test_a_few_layers_tell_what_all_take(options, low, checkpointing):
    kinds = [LAYERS[0]] * 2 + [LAYERS[1]] + [LAYERS[0]] * 2
    config = tiny_model("gemma3", num_hidden_layers=5, layer_types=kinds).config
    setup = Setup(options, low, checkpointing)
    shape = StepShape(batch=2, tokens=70, tokens_cf=20, rows=9, accumulates=False)
    assert rehearse(config, setup, shape) == rehearse_depth(config, setup, shape)


def test_gradients_of_earlier_forwards_stay():
    config = tiny_model("llama").config
    trained = 4 * count(config, Setup(FULL, False, False)).trained
    for accumulates in (False, True):
        phases = rehearse(config, Setup(FULL, False, False), StepShape(1, 40, 10, 5, accumulates)).phases
        assert phases["forward"].peak.gradients == trained * accumulates
        assert phases["counterfactual"].start.gradients == trained * accumulates


@pytest.mark.slow  # requests behind a persona, below, are branches too
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_layers_tell_what_branches_take(checkpointing):
    config = tiny_model("llama", num_hidden_layers=4).config
    shape = StepShape(2, 70, 50, 12, accumulates=False, replies=3, turn=12, branch=4)
    setup = Setup(LORA, False, checkpointing)
    assert rehearse(config, setup, shape) == rehearse_depth(config, setup, shape)


BY_ITSELF, DETACHED = MemoryConfig(branches_per_forward=1), replace(NONE, branches_per_forward=1)


@pytest.mark.parametrize(
    ("memory", "options", "checkpointing", "accumulates"),
    [
        (BY_ITSELF, FULL, True, True),
        pytest.param(DETACHED, FULL, True, True, marks=pytest.mark.slow),
        pytest.param(BY_ITSELF, LORA, True, False, marks=pytest.mark.slow),
        pytest.param(BY_ITSELF, LORA, False, False, marks=pytest.mark.slow),
        pytest.param(DETACHED, LORA, True, False, marks=pytest.mark.slow),
        pytest.param(DETACHED, LORA, False, False, marks=pytest.mark.slow),
    ],
)
def test_a_few_layers_tell_what_requests_behind_a_persona_take(memory, options, checkpointing, accumulates):
    """The requests' backward ends before the persona's begins; the persona's keys, values and gradients are alive."""
    config = tiny_model("llama", num_hidden_layers=4).config
    shape = StepShape(
        2, 230, 30, 9, accumulates, prefix=200, detached=memory.persona_grad == "none", requests=2, persona=200,
        together=1,
    )  # fmt: skip
    setup = Setup(options, False, checkpointing, memory)
    few, every = (_bytes(found(config, setup, shape)) for found in (rehearse_depth, rehearse))
    assert few == pytest.approx(every, rel=0.02)  # in the first layer's backward, either of two moments may be the peak


@pytest.mark.slow  # test_memory.py has it in a plan
@pytest.mark.parametrize("memory", [MemoryConfig(), NONE, BY_ITSELF])
def test_offload_takes_inputs_of_layers_alone_elsewhere(memory):
    """Sums of gradients, and keys and values of a persona with their gradient, stay; so do inputs of two layers."""
    config = tiny_model("llama", num_hidden_layers=6).config
    by_itself = memory.branches_per_forward > 0
    shape = StepShape(
        2, 130, 30, 9, accumulates=True, prefix=100 * memory.on_trunks, detached=memory == NONE,
        requests=2 if by_itself else 1, persona=100, together=memory.branches_per_forward,
    )  # fmt: skip
    kept, freed = (
        rehearse_depth(config, Setup(FULL, False, True, replace(memory, activation_offload=offload)), shape)
        for offload in (False, True)
    )
    tokens = 100 if by_itself else 2 * (30 if memory.on_trunks else 130)
    inputs = 4 * tokens * config.hidden_size * 4
    assert freed.offloaded == inputs
    saved = {name: phase.peak.alive - freed.phases[name].peak.alive for name, phase in kept.phases.items()}
    holding = {"forward", "head", "last layer"}
    if by_itself:  # the persona's, until its backward
        holding |= {"first layer", "persona's backward/last layer", *RECOMPUTED}
    assert saved == {name: inputs if name in holding else 0 for name in kept.phases}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [(architecture, prefix) for architecture in ("llama", "gemma3") for prefix in (30, 70, 128, 150)],
)
def test_a_long_prefix_is_rehearsed_from_its_ends(architecture, prefix, monkeypatch):
    """gemma3's window has 16 tokens, chunks here have 32."""
    monkeypatch.setattr("perce.model.prefill.PREFILL_CHUNK", 32)
    monkeypatch.setattr(rehearsal, "PREFILL_CHUNK", 32)
    config = tiny_model(architecture).config
    shape = StepShape(batch=2, tokens=prefix + 20, tokens_cf=20, rows=9, accumulates=False, prefix=prefix)
    setup = Setup(LORA, False, True, NONE)
    short_cut = rehearse(config, setup, shape)
    monkeypatch.setattr(
        rehearsal, "_prefix_cache",
        lambda base, tokens: prefill(base, torch.zeros(1, tokens, dtype=torch.int64)),
    )  # fmt: skip
    assert short_cut == rehearse(config, setup, shape)


@pytest.mark.parametrize(
    ("options", "low", "checkpointing", "batch", "grad"),
    [
        (FULL, True, True, 2, "full"),
        pytest.param(LORA, True, True, 1, "none", marks=pytest.mark.slow),
        pytest.param(LORA, False, False, 2, "none", marks=pytest.mark.slow),
        pytest.param(FULL, False, False, 1, "full", marks=pytest.mark.slow),
    ],
)
def test_four_tiles_tell_what_all_take(options, low, checkpointing, batch, grad, monkeypatch):
    """Of MLPs that take most of the memory, in tiles of 16 tokens with a shorter one at the end."""
    config = tiny_model("llama", intermediate_size=2048).config
    prefix = 60 if grad == "none" else 0
    shape = StepShape(batch, 6 * 16 + 9 + prefix, 40, 9, accumulates=False, prefix=prefix)
    setup = Setup(options, low, checkpointing, MemoryConfig(grad, mlp_tile=16))
    few = rehearse(config, setup, shape)
    tiles = []

    def counted(run, hidden, tile):
        tiles.append(-(-hidden.shape[1] // tile))
        return run_tiles(run, hidden, tile)

    monkeypatch.setattr(rehearsal, "_run_tiles_at_the_ends", counted)
    assert few == rehearse(config, setup, shape)
    assert max(tiles) > 5


@pytest.mark.parametrize(
    "memory", [pytest.param(NONE, id="none"), pytest.param(TILED, id="tiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_few_layers_tell_what_all_take_under_memory_options(memory, checkpointing):
    kinds = [LAYERS[0]] * 2 + [LAYERS[1]] + [LAYERS[0]] * 2
    config = tiny_model("gemma3", num_hidden_layers=5, layer_types=kinds).config
    setup = Setup(LORA, False, checkpointing, memory)
    prefix = 50 if memory == NONE else 0
    shape = StepShape(batch=1, tokens=70, tokens_cf=20, rows=9, accumulates=False, prefix=prefix)
    # The peak is in the one layer of full attention, and is extrapolated as if the other layers came before it.
    few, every = (_bytes(found(config, setup, shape)) for found in (rehearse_depth, rehearse))
    assert few == pytest.approx(every, rel=0.05)


def _bytes(found: Rehearsed) -> dict[str, int]:
    moments = {f"{name} {at}": getattr(phase, at) for name, phase in found.phases.items() for at in ("start", "peak")}
    sizes = {f"{name} {what}": size for name, moment in moments.items() for what, size in moment._asdict().items()}
    return sizes | {"offloaded": found.offloaded}
