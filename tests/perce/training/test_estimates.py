"""--estimate epoch|frozen: the weights come from the model of that moment, are kept in checkpoints, and are refused for
other data or options."""

import copy

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from perce import LossConfig, PerceTrainer, UserError
from perce.training.checkpoints import seal
from perce.training.estimates import FILE
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.trainers import PAIRS, arguments, model_for, plain_loss, trainer_for

FEW = PAIRS[:8]
STEP = 8  # all of these in a step: an epoch is one step


def loss_config(estimate, **options):
    return LossConfig(clip_min=0.05, clip_max=5.0, estimate=estimate, **options)


def losses(directory, estimate, steps=3, **options):
    args = arguments(
        directory, max_steps=steps, per_device_train_batch_size=STEP, loss=loss_config(estimate, **options)
    )
    trainer = trainer_for(model_for("full"), args, FEW)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def test_estimates_are_of_the_epoch_and_their_seconds_are_counted(tmp_path):
    _, trainer = losses(tmp_path, "epoch")
    assert 0 < trainer.estimation_clock.seconds() < trainer.training_seconds and trainer.estimates.epoch == 2


@pytest.mark.parametrize("estimate", ["epoch", "frozen"])
def test_a_run_does_not_begin_with_the_estimates_of_an_earlier_one(tmp_path, estimate):
    args = arguments(
        tmp_path, max_steps=1, warmup_steps=0, per_device_train_batch_size=STEP, loss=loss_config(estimate)
    )
    trainer = trainer_for(model_for("full"), args, FEW)
    trainer.train()
    first = trainer.estimates
    trainer.estimate(0)
    expected, trainer.estimates = trainer.estimates, first
    trainer.train()
    assert not torch.equal(first.signal, expected.signal)
    assert torch.equal(trainer.estimates.signal, expected.signal)


def test_a_schedule_moves_the_clip_of_estimates_too(tmp_path):
    epoch, online = (
        losses(tmp_path / estimate, estimate, clip_schedule="falling")[0] for estimate in ("epoch", "online")
    )
    constant, _ = losses(tmp_path / "constant", "epoch")
    assert epoch == pytest.approx(online, abs=1e-5) and epoch[0] == constant[0] and epoch[2] != constant[2]


def test_frozen_weights_are_those_of_the_initial_model(tmp_path):
    initial = copy.deepcopy(model_for("full"))
    frozen, trainer = losses(tmp_path / "a", "frozen")
    online, _ = losses(tmp_path / "b", "online")
    assert frozen[0] == pytest.approx(online[0], abs=1e-5) and abs(frozen[2] - online[2]) > 1e-3

    logp, logp_cf, signal, *_ = trainer.estimates.of(torch.arange(len(FEW)), torch.device("cpu"))
    with torch.no_grad():
        expected = plain_loss(initial, FEW, loss_config("frozen"))
    weight = signal.clamp(0.05, 5.0)
    assert -(weight * logp).mean().item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(signal, logp - logp_cf)


def test_logged_statistics_are_those_of_the_estimates(tmp_path):
    _, trainer = losses(tmp_path, "frozen", steps=1)
    pir = trainer.estimates.signal
    entry = trainer.state.log_history[0]
    assert entry["pir_mean"] == pytest.approx(pir.mean().item(), abs=1e-5)
    assert entry["frac_at_floor"] == pytest.approx((pir <= 0.05).float().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("estimate", "stop"),  # at the end of the first epoch, and in the middle of the second
    [("epoch", 5), ("epoch", 7)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("frozen", 5), ("frozen", 7))],
)
def test_resume_is_bitwise_equal(tmp_path, estimate, stop):
    def weights(directory, **more):
        options = {"max_steps": 9, "save_strategy": "steps", "save_steps": stop, "loss": loss_config(estimate)}
        trainer = trainer_for(model_for("lora", dropout=0.3), arguments(directory, **options))
        trainer.train(**more)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    straight = weights(tmp_path / "a")
    checkpoint = tmp_path / "a" / f"checkpoint-{stop}"
    assert load_file(checkpoint / FILE)["signal"].dtype == torch.float32
    resumed = weights(tmp_path / "b", resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_changed_data_and_lost_estimates_are_refused(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, loss=loss_config("frozen"))
    trainer_for(model_for("full"), args).train()
    checkpoint = tmp_path / "checkpoint-1"

    def resume(pairs, args=args):
        trainer_for(model_for("full"), args, pairs).train(resume_from_checkpoint=str(checkpoint))

    start, _ = PAIRS[3]["persona_span"]
    for place in (start, -2):  # in the persona, and in the response
        changed = copy.deepcopy(PAIRS)
        changed[3]["input_ids"][place] ^= 1
        with pytest.raises(UserError, match="its weights belong to other training pairs than these"):
            resume(changed)
    with pytest.raises(UserError, match="its weights belong to other training pairs than these"):
        resume(PAIRS[:10])
    other = arguments(tmp_path, max_steps=2, loss=LossConfig("dft", estimate="frozen"))
    with pytest.raises(UserError, match="its weights come from PIR, and those of this objective from p"):
        resume(PAIRS, other)
    save_file(load_file(checkpoint / FILE), checkpoint / FILE, {"perce": '{"epoch": 0, "vocabulary": 400}'})
    seal(checkpoint)
    with pytest.raises(UserError, match=f"{FILE}: was written by another version of perce. Start a new run"):
        resume(PAIRS)
    (checkpoint / FILE).write_bytes(b"half")
    with pytest.raises(UserError, match=f"cannot be resumed from, because {FILE} has 4 of"):
        resume(PAIRS)
    (checkpoint / FILE).unlink()
    seal(checkpoint)  # like a checkpoint of a run whose weights were not estimated beforehand
    with pytest.raises(UserError, match="the token weights of this run cannot be read"):
        resume(PAIRS)


def test_a_list_of_pairs_is_estimated_like_a_dataset_of_them(tmp_path):
    args = arguments(tmp_path, max_steps=1, loss=loss_config("epoch"))
    trainers = [trainer_for(model_for("full"), args)]
    trainers += [PerceTrainer(model_for("full"), args, train_dataset=PAIRS, processing_class=tiny_tokenizer())]
    for trainer in trainers:
        trainer.train()
    assert torch.equal(*(trainer.estimates.signal for trainer in trainers))


def test_what_cannot_be_estimated_beforehand(tmp_path):
    with pytest.raises(UserError, match="online with --objective ce"):
        LossConfig(objective="ce", estimate="epoch")
    with pytest.raises(UserError, match="normalize: expected none with --objective ce, whose weights are 1"):
        LossConfig(objective="ce", normalize="batch")
    with pytest.raises(UserError, match="estimate: expected online with --objective wordmatch, whose weights ask no"):
        LossConfig(objective="wordmatch", estimate="epoch")
    with pytest.raises(UserError, match="clip_schedule: expected constant with --objective ce, whose weights are 1"):
        LossConfig(objective="ce", clip_schedule="rising")
    args = arguments(tmp_path, loss=loss_config("epoch"))
    with pytest.raises(UserError, match="a column `example`"):
        trainer_for(model_for("full"), args, [{**pair, "example": 0} for pair in PAIRS])
    stream = Dataset.from_list(PAIRS).to_iterable_dataset()
    with pytest.raises(UserError, match="a stream is not known beforehand"):
        PerceTrainer(model_for("full"), args, train_dataset=stream, processing_class=tiny_tokenizer())
