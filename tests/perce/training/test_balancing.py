"""The load-balancing loss of mixtures of experts is transformers' own for one forward pass over the whole step, however
the step is divided.
"""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from perce import LossConfig, MemoryConfig, UserError
from perce.model.auxiliary import Router
from perce.training.arguments import CHECKPOINTING
from perce.training.balancing import StepBalance
from tests.helpers.ranks import end_rank, run_ranks
from tests.helpers.tiny import MIXTURES
from tests.helpers.trainers import PAIRS, arguments, model_for, trainer_for

COEFFICIENT = 0.3  # in the tiny models' configs
STEP = PAIRS[:8]


class Gradients(TrainerCallback):
    """The gradients of the step, before the optimiser uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(directory, model, batch=8, accumulation=1, memory=None, loss=None, **options):
    """(loss, logged router loss, gradients) of one step over all of STEP."""
    args = arguments(
        directory, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
        max_grad_norm=0, memory=MemoryConfig(**(memory or {})), loss=LossConfig(**({"clip_min": 0.05} | (loss or {}))),
        **options,
    )  # fmt: skip
    trainer, seen = trainer_for(model, args, pairs=STEP), Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.state.log_history[0].get("router_aux_loss"), seen.found


def padded(sequences):
    """(ids, attention mask) of the model's own forward."""
    ids = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in sequences])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def own_step(model, pairs=STEP, coefficient=COEFFICIENT):
    """(loss, load-balancing loss, gradients) of a step, from one forward of the model's own over the padded batch."""

    def logp(sequences, **options):
        ids, mask = padded([sequence[:-1] for sequence in sequences])
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        rows = [
            output.logits[b, len(ids) - 1 - pair["response_length"] : len(ids) - 1].log_softmax(-1)
            for b, (ids, pair) in enumerate(zip(sequences, pairs, strict=True))
        ]
        targets = torch.tensor([token for pair in pairs for token in pair["input_ids"][-pair["response_length"] :]])
        return torch.cat(rows).gather(1, targets[:, None])[:, 0], getattr(output, "aux_loss", None)

    model.eval()
    factual = [list(pair["input_ids"]) for pair in pairs]
    spans = [pair["persona_span"] for pair in pairs]
    found, balance = logp(factual, output_router_logits=True)
    with torch.no_grad():
        found_cf, _ = logp([ids[:a] + ids[b:] for ids, (a, b) in zip(factual, spans, strict=True)])
    weight = (found.detach() - found_cf).clamp(0.05, 5.0)
    loss = -(weight * found).mean() + coefficient * balance
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), balance.item(), gradients


def close(actual, expected):
    torch.testing.assert_close(torch.tensor(actual[:2]), torch.tensor(expected[:2]), atol=1e-5, rtol=1e-5)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(actual[2][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def own():
    """The results of the model's own forward, by architecture and kind."""
    return {
        (architecture, kind): own_step(model_for(kind, architecture=architecture))
        for architecture in MIXTURES
        for kind in ("full", "lora")
    }


WAYS = {
    "whole": {}, "accumulated": {"batch": 2, "accumulation": 4}, "one by one": {"batch": 1, "accumulation": 8},
    "checkpointed": {CHECKPOINTING: True}, "tiled": {"memory": {"mlp_tile": 32}},
    "tiled, checkpointed, accumulated":
        {CHECKPOINTING: True, "memory": {"mlp_tile": 32}, "batch": 4, "accumulation": 2},
}  # fmt: skip


QUICK = {
    ("mixtral", "full"): ("whole", "accumulated", "checkpointed", "tiled"),
    ("qwen3-moe", "full"): ("one by one", "tiled, checkpointed, accumulated"),
    ("qwen3-moe", "lora"): ("whole", "tiled, checkpointed, accumulated"),
}


@pytest.mark.parametrize(
    ("architecture", "kind", "way"),
    [
        pytest.param(*of, way, marks=[pytest.mark.slow] * (way not in quick))
        for of, quick in QUICK.items()
        for way in WAYS
    ],
)
def test_a_step_is_that_of_the_models_own_forward(tmp_path, own, architecture, kind, way):
    expected = own[architecture, kind]
    close(one_step(tmp_path, model_for(kind, architecture=architecture), **WAYS[way]), expected)
    if kind == "full":
        router = "model.layers.0.mlp.gate.weight"
        without = own_step(model_for(kind, architecture=architecture), coefficient=0.0)
        assert (expected[2][router] - without[2][router]).abs().max() > 1e-3, "the term must matter to the router"


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mean_over_forwards_would_be_another_loss(own, architecture):
    parts = [own_step(model_for(architecture=architecture), [pair])[1] for pair in STEP]
    assert abs(sum(parts) / len(parts) - own[architecture, "full"][1]) > 1e-3


@pytest.mark.parametrize(
    "split", [(2, 2), pytest.param((4, 1), marks=pytest.mark.slow), pytest.param((1, 4), marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one(tmp_path, own, split):
    run_ranks("tests.perce.training.test_balancing", str(tmp_path), *map(str, split))
    for architecture in MIXTURES:
        close(torch.load(tmp_path / f"{architecture}.pt"), own[architecture, "full"])


@pytest.mark.parametrize("division", [{}, {"batch": 2, "accumulation": 4}])
def test_a_detached_persona_counts_without_a_gradient(tmp_path, own, division):
    """The value is the same: every token of a persona is routed, and none is kept for the backward."""
    detached = one_step(tmp_path, model_for(architecture="mixtral"), memory={"persona_grad": "none"}, **division)
    expected = own["mixtral", "full"]
    assert detached[:2] == pytest.approx(expected[:2], abs=1e-5)
    name = "model.layers.0.mlp.gate.weight"
    assert (detached[2][name] - expected[2][name]).abs().max() > 1e-4, "the gradient differs"


def test_a_detached_persona_has_one_gradient_however_the_step_is_divided(tmp_path):
    memory = {"persona_grad": "none", "mlp_tile": 32}
    whole = one_step(tmp_path, model_for(architecture="mixtral"), memory=memory)
    close(one_step(tmp_path, model_for(architecture="mixtral"), 2, 4, memory=memory, **{CHECKPOINTING: True}), whole)


@pytest.mark.parametrize(
    ("objective", "estimate"), [("ce", "online"), ("random", "online"), ("perce", "frozen"), ("lossce", "epoch")]
)
def test_every_objective_has_the_term(tmp_path, objective, estimate):
    division = {"batch": 2, "accumulation": 4}
    loss = {"objective": objective, "estimate": estimate}
    (with_term, balance, _), (without, none, _) = (
        one_step(
            tmp_path, model_for(architecture="mixtral"), loss=loss | {"router_aux_loss_coef": coefficient}, **division
        )
        for coefficient in (None, 0.0)
    )
    assert with_term - without == pytest.approx(COEFFICIENT * balance, abs=1e-5) and none is None


@pytest.mark.parametrize(
    ("asks", "given", "used"), [(True, 0.7, 0.7), (False, 0.2, 0.2), (False, None, 0), (True, 0.0, 0)]
)
def test_a_number_that_is_given_goes_before_the_config(tmp_path, own, asks, given, used):
    model = model_for(architecture="mixtral", output_router_logits=asks)
    loss, balance, _ = one_step(tmp_path, model, loss={"router_aux_loss_coef": given})
    expected, own_balance, _ = own["mixtral", "full"]
    assert loss == pytest.approx(expected + (used - COEFFICIENT) * own_balance, abs=1e-5)
    assert balance == (pytest.approx(own_balance, abs=1e-5) if used else None)


def test_what_is_logged_is_a_mean_over_steps_and_cross_entropy_and_evaluations_are_without_it(tmp_path):
    def run(coefficient=None, **changes):
        loss = LossConfig(objective="ce", router_aux_loss_coef=coefficient)
        args = arguments(
            tmp_path, loss=loss, max_steps=4, learning_rate=1e-30, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, **changes,
        )  # fmt: skip
        validation = Dataset.from_list(PAIRS[:3])
        trainer = trainer_for(model_for(architecture="qwen3-moe"), args, PAIRS[:16], eval_dataset=validation)
        trainer.train()
        metrics = trainer.evaluate()
        return trainer.state.log_history[:4], [metrics[f"eval_{name}"] for name in ("loss", "loss_without_persona")]

    (single, metrics), (windows, _), (off, metrics_off) = run(), run(logging_steps=2), run(coefficient=0.0)
    for entry, without in zip(single, off, strict=True):
        assert entry["loss"] == pytest.approx(entry["ce"] + COEFFICIENT * entry["router_aux_loss"], abs=1e-5)
        assert entry["ce"] == pytest.approx(without["loss"], abs=1e-5) and "router_aux_loss" not in without
    for window, first, second in zip(windows[:2], single[::2], single[1::2], strict=True):
        for name in ("loss", "router_aux_loss"):
            assert window[name] == pytest.approx((first[name] + second[name]) / 2, abs=1e-5)
    assert metrics == pytest.approx(metrics_off, abs=1e-6)


def test_a_loss_outside_a_step_counts_its_own_forward(tmp_path):
    """Also after a step that counted other forward passes."""
    trainer = trainer_for(
        model_for(architecture="mixtral"),
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    )
    batch = trainer.data_collator(PAIRS[:3])
    trainer.model.eval()
    before = trainer.compute_loss(trainer.model, batch).item()
    state = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train()
    trainer.model.load_state_dict(state)
    assert trainer.compute_loss(trainer.model.eval(), batch).item() == pytest.approx(before, abs=1e-6)


def test_a_step_that_was_given_up_is_forgotten():
    """Its ten tokens on one expert must not count in the next step, which has one token."""
    balance = StepBalance(Router(top_k=1, coefficient=0.3), lambda counts: counts)
    experts = torch.tensor([[0.0, 1.0], [0.2, 0.8]])
    balance.begin([torch.tensor([5.0, 0.0])] * 2)
    assert balance.share(experts).item() == pytest.approx(2 * 0.2 / 10)
    balance.begin([])
    assert balance.share(experts).item() == pytest.approx(2 * 0.8)


def test_what_cannot_be_right_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"normalize=batch: .*--router_aux_loss_coef 0"):
        one_step(tmp_path, model_for(architecture="mixtral"), loss={"normalize": "batch"})
    memory = {"branches_per_forward": 1}
    with pytest.raises(UserError, match=r"branches_per_forward: .*--router_aux_loss_coef 0"):
        one_step(tmp_path, model_for(architecture="mixtral"), memory=memory)
    one_step(tmp_path, model_for(architecture="mixtral"), memory=memory, loss={"router_aux_loss_coef": 0.0})
    off = {"normalize": "batch", "router_aux_loss_coef": 0.0}
    one_step(tmp_path, model_for(architecture="mixtral"), loss=off)


if __name__ == "__main__":  # one rank of two
    directory, batch, accumulation = sys.argv[1:]
    torch.set_num_threads(1)
    for name in MIXTURES:
        found = one_step(Path(directory) / name, model_for(architecture=name), int(batch), int(accumulation))
        found = (*found[:2], {key.removeprefix("module."): value for key, value in found[2].items()})
        if torch.distributed.get_rank() == 0:
            torch.save(found, Path(directory) / f"{name}.pt")
    end_rank()
