"""Two processes and one: each continues the other's checkpoints and estimates the same weights, and failures are
shared."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file

from perce import LossConfig, UserError
from perce.model.loading import add_adapter
from perce.model.patch import prepare_model
from perce.model.reach import freeze_beside_text
from perce.train import main as train_command
from perce.training.checkpoints import SaveError, flaw
from perce.training.estimates import FILE
from tests.helpers.ranks import end_rank, run_ranks
from tests.helpers.tiny import tiny_model
from tests.helpers.trainers import LORA, PAIRS, arguments, logged, model_for, trainer_for

BATCH, STEPS, SAVED = 8, 4, 3  # of 16 pairs: two steps per epoch, and the checkpoint in the middle of the second epoch


def train(directory, kind, ranks, resume_from=None, **options):
    """(loss and gradient norm per step, trainable parameters) after STEPS steps, with a checkpoint after SAVED."""
    args = arguments(
        directory, per_device_train_batch_size=BATCH // ranks, max_steps=STEPS, save_strategy="steps", save_steps=SAVED,
        loss=LossConfig(clip_min=0.05, **options),
        per_device_eval_batch_size=6,  # three batches of an E-step: two processes must make two forwards each
    )  # fmt: skip
    trainer = trainer_for(model_for(kind), args, pairs=PAIRS[:16])
    forwards = []
    trainer.model.register_forward_hook(lambda *_: forwards.append(trainer.state.global_step))
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from / f"checkpoint-{SAVED}"))
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    if trainer.args.loss.estimate != "online":  # at step 0: two passes of each batch of the E-step, and the step's own
        assert forwards.count(0) == 2 * (3 if ranks == 1 else 2) + 1
    return logged(trainer, "loss", "grad_norm"), weights


class Idle(torch.nn.Module):
    """An MLP with an additional weight that nothing reads."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.idle = mlp, torch.nn.Parameter(torch.ones(3))

    def forward(self, hidden):
        return self.mlp(hidden)


def model_of(what):
    """All weights or an adapter of a model that sees images, or all weights of one with a weight that is never used."""
    if what == "idle":
        model = prepare_model(tiny_model())
        model.model.layers[0].mlp = Idle(model.model.layers[0].mlp)
        return model
    from tests.helpers.architectures import tiny  # of many models, whose modules the other runs do not need

    model = tiny("gemma3")
    model.config.text_config.final_logit_softcapping = None
    freeze_beside_text(prepare_model(model))
    torch.manual_seed(1)
    return add_adapter(model, LoraConfig(**LORA)) if what == "gemma3 lora" else model


def steps(directory, what, ranks, **options):
    """(loss and gradient norm per step, trainable parameters), without a checkpoint."""
    args = arguments(
        directory, per_device_train_batch_size=BATCH // ranks, max_steps=2, loss=LossConfig(clip_min=0.05), **options
    )
    trainer = trainer_for(model_of(what), args, pairs=PAIRS[:16])
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return logged(trainer, "loss", "grad_norm"), weights


def streamed(directory):
    """The metrics of a stream of five examples."""
    trainer = trainer_for(model_for(), arguments(directory, per_device_eval_batch_size=2))
    metrics = trainer.evaluate(IterableDataset.from_generator(lambda: iter(PAIRS[:5])))
    return {name: value for name, value in metrics.items() if "loss" in name or "pir" in name}


UNUSUAL = {"gemma3 full": {}, "gemma3 lora": {}, "idle": {"ddp_find_unused_parameters": True}}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The runs of a kind of model by (where it began, where it ended), and the directory they wrote to."""

    @cache
    def of(kind):
        directory = tmp_path_factory.mktemp(kind)
        results = {("one", "one"): train(directory / "one", kind, 1)}
        run_ranks("tests.perce.training.test_ranks", str(directory), kind)
        results |= torch.load(directory / "result.pt")
        return results | {("two", "one"): train(directory / "back", kind, 1, directory / "two")}, directory

    return of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every other run by (what, where it began, where it ended), and the directory they wrote to."""
    directory = tmp_path_factory.mktemp("ranks")
    results = {("epoch", "one", "one"): train(directory / "one epoch", "full", 1, estimate="epoch")}
    for what, options in UNUSUAL.items():
        results[what, "one", "one"] = steps(directory / f"one {what}", what, 1, **options)
    run_ranks("tests.perce.training.test_ranks", str(directory))
    return results | torch.load(directory / "result.pt"), directory


def close(one, other):
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [("two", "two"), ("two", "one"), ("one", "two")], ids="-".join)
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(moved, kind, way):
    results, directory = moved(kind)
    began, ended = way
    close(results[began, ended], results["one", "one"])
    checkpoint = directory / began / f"checkpoint-{SAVED}"
    assert flaw(checkpoint) is None
    assert len(list(checkpoint.glob("rng_state*"))) == (1 if began == "one" else 2)


@pytest.mark.parametrize("what", UNUSUAL)
def test_models_with_weights_that_no_text_reaches(runs, what):
    """Data parallelism waits for the gradient of every trained weight."""
    results, _ = runs
    close(results[what, "two", "two"], results[what, "one", "one"])
    assert "vision_tower" not in "".join(results[what, "one", "one"][1])


def test_a_weight_without_a_gradient_is_named_before_the_processes_wait_for_it(runs):
    error = runs[0]["idle"]
    assert "model.layers.0.mlp.idle" in error and "--ddp_find_unused_parameters true" in error


def test_weights_estimated_by_two_processes_are_those_of_one(runs):
    results, directory = runs
    close(results["epoch", "two", "two"], results["epoch", "one", "one"])
    one, two = (load_file(directory / f"{name} epoch" / f"checkpoint-{SAVED}" / FILE) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    assert one["signal"].std() > 1e-3


def test_no_example_of_a_stream_is_evaluated_twice(runs):
    """Two processes with batches of two take eight examples: the last three would be the first ones again."""
    assert runs[0]["streamed"] == pytest.approx(streamed(runs[1] / "streamed"), rel=1e-6)


def test_a_checkpoint_that_one_process_could_not_write_fails_on_all(runs):
    results, directory = runs
    errors = results["failure"]
    assert "another process could not write" in errors[0] and "No space left on device" in errors[1]
    assert all("No checkpoint was saved before" in error for error in errors)
    assert not list((directory / "failure").glob("checkpoint-*"))


def test_weights_that_one_process_could_not_write_fail_on_all_beside_the_best_ones(runs):
    """If best weights are kept, the Trainer has a barrier after saving the weights."""
    errors = runs[0]["best failure"]
    assert "No space left on device" in errors[0] and "another process could not write" in errors[1]


def test_fsdp_on_a_cpu_is_one_paragraph(tmp_path, capsys, monkeypatch):
    for flags in (["--fsdp"], ["--fsdp", "full_shard"], ["--use_cpu", "true", "--fsdp", "true"]):
        assert train_command(["--model", "m", "--output_dir", str(tmp_path / "run"), *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: fsdp on a CPU") and error.count("\n") == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp on a CPU"):
        arguments(tmp_path)


def test_sequences_cut_over_processes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"parallelism_config: context.*What works: one process per GPU"):
        arguments(tmp_path, parallelism_config=ParallelismConfig(cp_size=2))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="parallelism_config"):
        arguments(tmp_path)


def failing_save(directory):
    """The message on this rank of a checkpoint whose second process finds the disk full."""
    args = arguments(directory, per_device_train_batch_size=4, save_strategy="steps", save_steps=1, max_steps=2)
    trainer = trainer_for(model_for("lora"), args)
    if args.process_index == 1:
        trainer._save_rng_state = lambda directory: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(SaveError) as raised:
        trainer.train()
    return str(raised.value)


def failing_weights(directory):
    """The message on this rank of a second checkpoint whose weights the first process cannot write."""
    args = arguments(
        directory, per_device_train_batch_size=4, save_strategy="steps", save_steps=1, max_steps=2,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = trainer_for(model_for("lora"), args, eval_dataset=Dataset.from_list(PAIRS[:4]))
    save = trainer._save

    def full(output_dir=None, state_dict=None):
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")
        save(output_dir, state_dict)

    if args.process_index == 0:
        trainer._save = full
    with pytest.raises(SaveError) as raised:
        trainer.train()
    return str(raised.value)


def main(directory, kind=None):
    torch.set_num_threads(1)
    results = (
        others(directory)
        if kind is None
        else {
            ("two", "two"): train(directory / "two", kind, 2),
            ("one", "two"): train(directory / "there", kind, 2, directory / "one"),
        }
    )
    if os.environ["RANK"] == "0":
        torch.save(results, directory / "result.pt")
    end_rank()


def others(directory):
    results = {}
    results["epoch", "two", "two"] = train(directory / "two epoch", "full", 2, estimate="epoch")
    for what, options in UNUSUAL.items():
        results[what, "two", "two"] = steps(directory / f"two {what}", what, 2, **options)
    results["streamed"] = streamed(directory / "streamed")
    with pytest.raises(UserError) as raised:
        steps(directory / "idle", "idle", 2)
    results["idle"] = str(raised.value)
    results["failure"] = [None, None]
    torch.distributed.all_gather_object(results["failure"], failing_save(directory / "failure"))
    results["best failure"] = [None, None]
    torch.distributed.all_gather_object(results["best failure"], failing_weights(directory / "best failure"))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
