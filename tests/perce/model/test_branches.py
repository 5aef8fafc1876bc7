"""A row of segments has the loss and the gradients of separate sequences, in every architecture that takes it."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perce.config.schema import ModelConfig
from perce.data.batch import collate, token_inputs
from perce.data.pairs import PairBuilder
from perce.data.rows import Example
from perce.data.sharing import Spans
from perce.model import branches, prefill
from perce.model.branches import _made, _segment_by_segment, sharing_of
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import enable_checkpointing, tile_mlps
from perce.model.patch import prepare_model
from perce.model.prefill import prepare_prefill
from perce.reading.fields import Turn
from tests.helpers.models import perce_forward
from tests.helpers.replies import Exact, conversations, requests
from tests.helpers.tiny import SIZES, TEMPLATES, tiny_model, tiny_tokenizer, with_drawn_adapter

TREES = ("llama", "qwen3", "gemma3", "gpt2")


def prepared(architecture, attention="sdpa"):
    """A model in fp64; GPT-2 and Mamba too."""
    torch.manual_seed(0)
    if architecture in ("gpt2", "mamba"):
        options = {
            "gpt2": {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            "mamba": {"state_size": 4},
        }[architecture]
        config = transformers.AutoConfig.for_model(architecture, **(SIZES | options))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(architecture)
    model = prepare_model(model).double()
    if architecture != "mamba":
        model.set_attn_implementation(attention)
    return model


def step(model, pairs, sharing, **how):
    """Loss, gradients and tokens of a step, in fp64. `how`: arguments of collate."""
    batch = collate(pairs, sharing=sharing, **how)
    model.zero_grad()
    with Exact():
        loss = perce_forward(model, batch)[0]
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, batch["tokens"]


def largest_difference(one, other):
    """The differences of losses and of gradients, relative to their norms."""
    (loss, gradients, _), (other_loss, others, _) = one, other
    assert gradients.keys() == others.keys()
    of_gradients = [(gradients[n] - others[n]).norm() / others[n].norm() for n in gradients if others[n].any()]
    return max(abs(loss - other_loss) / abs(other_loss), *map(float, of_gradients))


TURNS = ("Hi!", "Hello, I keep bees.", "How many hives?", "Three of them.", "And honey?", "Plenty, ask my sister.")


def built(template):
    """Pairs of two conversations, as their chat template shows them."""
    builder, pairs = PairBuilder(tiny_tokenizer(TEMPLATES[template]), max_length=1000), []
    for number, persona in enumerate((("I keep bees.", "I have a sister."), ("I sell honey.",))):
        turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(TURNS[: 6 - 2 * number]))
        pairs += [
            vars(builder.build(Example(persona, turns[:place], turns[place].content, None, None, f"row {number}")))
            for place in range(1, len(turns), 2)
        ]
    return pairs


@pytest.mark.parametrize("template", TEMPLATES)
def test_replies_under_every_template_equal_separate_ones(template):
    model, pairs = prepared("llama"), built(template)
    shared = step(model, pairs, sharing_of(model)[0])
    assert largest_difference(shared, step(model, pairs, "none")) < 1e-9
    segments = len(collate(pairs, sharing="branches")["spans"].spans)
    assert segments == {"chatml": 2, "qwen3": 5, "mistral-v3": 2}.get(template, 2)
    assert shared[2][0] < shared[2][1]


@pytest.mark.parametrize(
    ("architecture", "attention", "thought"),
    [
        pytest.param(architecture, attention, thought, marks=[pytest.mark.slow] * ((attention == "eager") != thought))
        for architecture in (*TREES, "mamba")
        for attention in ("sdpa", "eager")
        for thought in (False, True)
    ],
)
def test_what_is_shared_equals_separate_sequences(architecture, attention, thought):
    model, pairs = prepared(architecture, attention), conversations(thought)
    sharing, _ = sharing_of(model)
    assert sharing == ("chains" if architecture == "mamba" else "branches")
    shared = step(model, pairs, sharing)
    assert largest_difference(shared, step(model, pairs, "none")) < 1e-9
    computed, needed = shared[2].tolist()
    assert computed < 0.7 * needed or (sharing, thought) == ("chains", True)


@pytest.mark.parametrize("how", ["checkpointing", "lora"])
@pytest.mark.parametrize("architecture", [*TREES, "mamba"])
def test_recomputed_and_adapted_layers_share_too(architecture, how):
    model, pairs = prepared(architecture), conversations(thought=architecture != "mamba")
    if how == "lora":
        model = with_drawn_adapter(add_adapter(model, lora_config(ModelConfig(lora_r=4)))).double()
    else:
        enable_checkpointing(model)
    model.train()
    shared = step(model, pairs, sharing_of(model)[0])
    assert largest_difference(shared, step(model, pairs, "none")) < 1e-9
    assert shared[2][0] < 0.7 * shared[2][1]


ONE_BY_ONE = {"branches_per_forward": 1}
HOW = {
    "together": {},
    "one by one": ONE_BY_ONE,
    "two by two": {"branches_per_forward": 2},
    "detached": {"persona_grad": "none"},
    "detached, one by one": {"persona_grad": "none", **ONE_BY_ONE},
}


def separately(how):
    return {name: value for name, value in how.items() if name == "persona_grad"}


@pytest.mark.parametrize(
    ("architecture", "count", "how"),
    [
        pytest.param(architecture, count, how, marks=[pytest.mark.slow] * ((i + k) % 4 != 2 * j))
        for i, architecture in enumerate(TREES)
        for j, count in enumerate((2, 8))
        for k, how in enumerate(HOW)
    ],
)
def test_requests_of_a_persona_equal_separate_ones(architecture, count, how, monkeypatch):
    """Requests of two personas, one of which is shorter than a window; the prefill takes several chunks."""
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 16)
    model, pairs = prepared(architecture), requests(count) + requests(2, persona=9, number=1)
    assert sharing_of(model)[0] == "branches"
    prepare_prefill(model)
    shared = step(model, pairs, "branches", unit="persona", **HOW[how])
    assert largest_difference(shared, step(model, pairs, "none", **separately(HOW[how]))) < 1e-9
    computed, needed = shared[2].tolist()
    assert computed < (0.9 if count == 2 else 0.6) * needed


@pytest.mark.parametrize(
    ("architecture", "options", "how"),
    [
        pytest.param(architecture, options, how, marks=[pytest.mark.slow] * ((i, j) != (k % 2, (k % 2 + k) % 3)))
        for i, architecture in enumerate(("llama", "gemma3"))
        for j, options in enumerate(("checkpointing", "lora", "tiles"))
        for k, how in enumerate(HOW)
    ],
)
def test_requests_share_with_less_memory_too(architecture, options, how):
    model, pairs = prepared(architecture), requests(4) + requests(2, persona=9, number=1)
    sharing_of(model)
    if options == "lora":
        model = with_drawn_adapter(add_adapter(model, lora_config(ModelConfig(lora_r=4)))).double()
    if options != "lora":
        enable_checkpointing(model)
    if options == "tiles":
        tile_mlps(model, 7)
    prepare_prefill(model)
    model.train()
    shared = step(model, pairs, "branches", unit="persona", **HOW[how])
    assert largest_difference(shared, step(model, pairs, "none", **separately(HOW[how]))) < 1e-9


def kept(function, *args, use_reentrant):
    return function(*args)


def as_on_a_gpu(function, *args, use_reentrant):
    """torch's checkpoint, which keeps the random state of the devices of the tensors among its arguments, and of the
    CPU in any case. Here the CPU is treated like any other device."""
    given = any(isinstance(x, torch.Tensor) for x in tree_leaves(args))
    return checkpoint(function, *args, use_reentrant=use_reentrant, preserve_rng_state=given)


@pytest.mark.parametrize("how", ["one by one", "detached, one by one"])
def test_dropout_of_an_adapter_is_the_same_when_requests_are_recomputed(how, monkeypatch):
    model = with_drawn_adapter(add_adapter(prepared("llama"), lora_config(ModelConfig(lora_dropout=0.5)))).double()
    pairs, found = requests(3), {}
    sharing_of(model)
    prepare_prefill(model)
    model.train()
    for run in (kept, as_on_a_gpu):
        monkeypatch.setattr(prefill, "checkpoint", run)
        torch.manual_seed(1)
        found[run] = step(model, pairs, "branches", unit="persona", **HOW[how])
    assert largest_difference(found[kept], found[as_on_a_gpu]) < 1e-9


@pytest.mark.parametrize("how", ["one by one", "detached"])
def test_a_persona_is_shared_where_nothing_branches(how):
    """The keys and values of the persona are shared: each request is then a forward pass of its own."""
    model, pairs = prepared("llama"), requests(4)
    prepare_prefill(model)
    shared = step(model, pairs, "chains", unit="persona", **HOW[how])
    assert largest_difference(shared, step(model, pairs, "none", **separately(HOW[how]))) < 1e-9
    assert shared[2][0] < 0.7 * shared[2][1]


def test_personas_that_differ_share_nothing():
    """For example if passages are picked for each request."""
    pairs = [pair for number in range(3) for pair in requests(1, number=number)]
    for how in HOW.values():
        batch = collate(pairs, sharing="branches", unit="persona", **how)
        assert batch["tokens"][0] == batch["tokens"][1] and batch["alone"] == 3
    shared = collate(pairs + requests(3), sharing="branches", unit="persona")
    assert shared["alone"] == 2


@pytest.mark.parametrize(
    ("architecture", "how"),
    [
        pytest.param(architecture, how, marks=[pytest.mark.slow] * (i != k))
        for i, architecture in enumerate(TREES)
        for k, how in enumerate(name for name in HOW if name != "together")
    ],
)
def test_a_trunk_off_by_one_token_shows(architecture, how, monkeypatch):
    model, pairs = prepared(architecture), requests(4)
    sharing_of(model)
    prepare_prefill(model)
    separate = step(model, pairs, "none", **separately(HOW[how]))
    of_batch = collate(pairs, sharing="branches", unit="persona", **HOW[how])
    (trunk,) = of_batch["trunks"].trunks
    late = trunk._replace(start=trunk.start + 1, end=trunk.end + 1)
    late = replace(of_batch["trunks"], trunks=(late,))
    monkeypatch.setitem(globals(), "collate", lambda *_, **__: of_batch | {"trunks": late})
    assert largest_difference(step(model, pairs, "branches"), separate) > 1e-3


def shifted(batch, what):
    """The batch with a mistake of one token in its first branch."""
    spans = [*batch["spans"].spans]
    at = next(index for index, span in enumerate(spans) if span.path)
    branch = spans[at]
    if what == "position":
        batch["position_ids"][:, branch.start : branch.end] += 1
    elif what == "place":
        batch["rows"] -= ((batch["rows"] > branch.start) & (batch["rows"] < branch.end)).long()
    else:
        *path, (start, end) = branch.path
        spans[at] = branch._replace(path=(*path, (start, end - 1)))
        batch["spans"] = Spans(tuple(spans))
    return batch


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        pytest.param(architecture, what, marks=[pytest.mark.slow] * (i % 3 != k))
        for i, architecture in enumerate(TREES)
        for k, what in enumerate(("position", "place", "path"))
    ],
)
def test_a_shift_by_one_token_shows(architecture, what, monkeypatch):
    model, pairs = prepared(architecture), conversations(thought=True)
    sharing_of(model)
    separate, batch = step(model, pairs, "none"), collate(pairs, sharing="branches")
    monkeypatch.setitem(globals(), "collate", lambda *_, **__: shifted(batch, what))
    assert largest_difference(step(model, pairs, "branches"), separate) > 1e-3


def lined_up_at_the_end(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What flash attention computes: queries are the last of the keys, and a window reaches back from each."""
    assert attention_mask is None and not kwargs.keys() & {"position_ids", "cu_seq_lens_q"}
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    at = torch.arange(key.shape[2])
    distance = at[-query.shape[2] :, None] - at
    hidden = (distance < 0) | (distance >= (sliding_window or key.shape[2]))
    scores = (query @ key.mT * scaling).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_flash_attention_is_given_no_mask(architecture, monkeypatch):
    model, pairs = prepared(architecture), conversations(thought=True)
    separate = step(model, pairs, "none")
    flash = _segment_by_segment(lined_up_at_the_end, "flash_attention_2")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", flash)
    assert largest_difference(step(model, pairs, "branches"), separate) < 1e-9


@pytest.mark.slow  # flex attention is compiled, which takes ten seconds; test_probe.py has it with packing
@torch.no_grad()
def test_flex_attention_has_a_block_mask_a_segment():
    """Forward only, because flex attention has no backward on a CPU."""
    model, pairs = prepared("llama", "flex_attention").float(), conversations(thought=True)
    sharing_of(model)
    separate, shared = (perce_forward(model, collate(pairs, sharing=sharing))[1] for sharing in ("none", "branches"))
    torch.testing.assert_close(shared, separate, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "seen", "reach"), [(3, 7, 7), (3, 7, 4), (5, 5, 2), (1, 4, 4)])
def test_a_mask_shows_what_is_on_the_path_and_in_the_window(n, seen, reach):
    query, key = torch.arange(seen - n, seen)[:, None], torch.arange(seen)
    expected = (key <= query) & (query - key < reach)
    how = n, seen, reach, torch.float64, torch.device("cpu")
    of_blocks = _made("flex_attention", *how).mask_mod(0, 0, torch.arange(n)[:, None], key)
    assert torch.equal(_made("sdpa", *how)[0, 0] == 0, expected) and torch.equal(of_blocks, expected)


def test_masks_are_never_of_the_whole_row():
    """No mask is made for what begins a sequence, or for a single token; all layers have the same mask."""
    model, pairs = prepared("llama"), conversations(thought=True)
    sharing_of(model)
    batch = collate(pairs, sharing="branches")
    spans = batch["spans"]
    with torch.no_grad():
        model(**token_inputs(batch), perce={"rows": batch["rows"]})
    of_branches = {(x.end - x.start, x.end - x.start + sum(b - a for a, b in x.path)) for x in spans.spans if x.path}
    assert {mask.shape[-2:] for mask in spans.masks.values()} == of_branches
    assert all(n * seen < batch["input_ids"].numel() ** 2 / 20 for n, seen in of_branches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["position", "place", "path"])
def test_a_shift_by_one_token_is_found_when_a_model_is_loaded(what, dtype, monkeypatch):
    model = prepare_model(tiny_model().to(dtype))
    assert sharing_of(model) == ("branches", "")
    own = branches.collate

    def wrong(pairs, sharing):
        batch = own(pairs, sharing=sharing)
        return shifted(batch, what) if sharing == "branches" else batch

    monkeypatch.setattr(branches, "collate", wrong)
    sharing, reason = sharing_of(model)
    assert sharing == "chains" and "computes different states on branches" in reason


@pytest.mark.parametrize(
    ("rope", "why"),
    [({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "depends on the length of a forward pass")],
)
def test_encodings_that_follow_the_length_share_nothing(rope, why):
    sharing, reason = sharing_of(prepare_model(tiny_model(rope_parameters=rope)))
    assert sharing == "none" and why in reason


def test_a_model_whose_attention_takes_no_branches_has_chains():
    model = prepare_model(tiny_model())
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, spans=None, **kwargs: own(*args, **kwargs)
    sharing, reason = sharing_of(model)
    assert sharing == "chains" and "llama" in reason
