"""A row of segments has the loss and the gradients of separate sequences, in every architecture that takes it."""

import pytest
import torch
import transformers

from perce.data.batch import collate
from perce.data.sharing import Spans
from perce.model.branches import sharing_of
from perce.model.patch import prepare_model
from tests.helpers.conversations import Exact, conversations
from tests.helpers.models import perce_forward
from tests.helpers.tiny import SIZES, tiny_model

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


def step(model, pairs, sharing):
    """Loss, gradients and tokens of a step, in fp64."""
    batch = collate(pairs, sharing=sharing)
    model.zero_grad()
    with Exact():
        loss = perce_forward(model, batch)[0]
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, batch["tokens"]


def largest_difference(one, other):
    """Of losses and of gradients, in parts of their norms."""
    (loss, gradients, _), (other_loss, others, _) = one, other
    assert gradients.keys() == others.keys()
    of_gradients = [(gradients[n] - others[n]).norm() / others[n].norm() for n in gradients if others[n].any()]
    return max(abs(loss - other_loss) / abs(other_loss), *map(float, of_gradients))


@pytest.mark.parametrize("thought", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [*TREES, "mamba"])
def test_what_is_shared_equals_separate_sequences(architecture, attention, thought):
    model, pairs = prepared(architecture, attention), conversations(thought)
    sharing, _ = sharing_of(model)
    assert sharing == ("chains" if architecture == "mamba" else "branches")
    shared = step(model, pairs, sharing)
    assert largest_difference(shared, step(model, pairs, "none")) < 1e-9
    computed, needed = shared[2].tolist()
    assert computed < 0.7 * needed or (sharing, thought) == ("chains", True)


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


@pytest.mark.parametrize("what", ["position", "place", "path"])
@pytest.mark.parametrize("architecture", TREES)
def test_a_shift_by_one_token_shows(architecture, what, monkeypatch):
    model, pairs = prepared(architecture), conversations(thought=True)
    sharing_of(model)
    separate, batch = step(model, pairs, "none"), collate(pairs, sharing="branches")
    monkeypatch.setitem(globals(), "collate", lambda *_, **__: shifted(batch, what))
    assert largest_difference(step(model, pairs, "branches"), separate) > 1e-3
