"""A run whose numbers are no longer finite stops, says where and why, and leaves good checkpoints as they are."""

import json

import pytest
import torch
from transformers import TrainerCallback

from perce import UserError
from perce.training.checkpoints import flaw
from tests.helpers.tiny import tiny_model
from tests.helpers.trainers import arguments, model_for, trainer_for
from tests.helpers.training import fails


class At(TrainerCallback):
    """Do something to the model or the optimiser at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.action(model, optimizer)


def spoil_a_weight(model, optimizer):
    next(p for p in model.parameters() if p.requires_grad).view(-1)[3] = float("nan")


def spoil_a_state(model, optimizer):
    state = next(iter(optimizer.state.values()))
    state["exp_avg_sq"].view(-1)[0] = float("inf")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("spoil", "what"), [(spoil_a_weight, "weights"), (spoil_a_state, "optimiser")])
def test_what_is_not_finite_is_not_saved(tmp_path, kind, spoil, what):
    args = arguments(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1, logging_steps=100,
    )  # fmt: skip
    trainer = trainer_for(model_for(kind), args, callbacks=[At(2, spoil)])
    with pytest.raises(UserError, match=rf"step 2: .*{what}.*not finite.*--learning_rate.*checkpoint-1 "):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert flaw(tmp_path / "checkpoint-1") is None
    if spoil is spoil_a_weight:
        with pytest.raises(UserError, match="not finite"):
            trainer.save_model(tmp_path / "final")
        assert not (tmp_path / "final").exists()


def test_a_log_that_is_not_finite_stops_the_run(tmp_path):
    trainer = trainer_for(model_for(), arguments(tmp_path, max_steps=9), callbacks=[At(2, spoil_a_weight)])
    with pytest.raises(UserError, match=r"step 3: loss is nan"):
        trainer.train()
    assert trainer.state.log_history[-1]["step"] == 3


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(train, tmp_path):
    """Weights grow until the forward overflows; all checkpoints before are finite."""
    options = {"lora_r": 0, "learning_rate": 1e30, "max_steps": 9, "save_steps": 1, "warmup_steps": 4}
    result = train(lr_scheduler_type="constant_with_warmup", **options)
    fails(result, "step ", "--learning_rate 1e+30", "checkpoint")
    assert "--resume continues" not in result[2]
    whole = [checkpoint for checkpoint in (tmp_path / "run").glob("checkpoint-*") if flaw(checkpoint) is None]
    assert whole
    for checkpoint in whole:
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        assert all(torch.tensor(line["loss"]).isfinite() for line in history if "loss" in line)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_checkpoint_whose_evaluation_diverges_is_not_called_good(train, tmp_path):
    """Its weights were finite, but the numbers that they compute are not."""
    options = {"lora_r": 0, "learning_rate": 1e30, "max_steps": 1, "warmup_steps": 0, "save_steps": 1}
    fails(train(**options), "step 1: eval_loss is", "No checkpoint was saved before")
    assert flaw(tmp_path / "run" / "checkpoint-1")


def test_a_model_that_is_broken_from_the_start(tmp_path):
    model = model_for("lora")
    trainer = trainer_for(model, arguments(tmp_path))
    model.base_model.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="before the first step: eval_loss is nan"):
        trainer.evaluate(trainer.train_dataset)
    broken = tiny_model()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"its logits on a few tokens are NaN.*weights"):
        trainer_for(broken, arguments(tmp_path))
