"""The best weights of a run: by which metric, when the run stops early, and that its reports are about them."""

import json
import math
import os
import signal
from functools import partial

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from perce import PerceTrainer, UserError
from perce.training.best import METRICS, EarlyStopping
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.trainers import PAIRS, arguments, model_for, trainer_for
from tests.helpers.training import fails

# The learning rate is too large: the first step helps, the later ones do harm.
AWAY = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0}
WORSE = {**AWAY, "eval_steps": 1, "max_steps": 8}


def with_evaluation(directory, eval_dataset=None, **options):
    args = arguments(directory, **({"eval_strategy": "steps", "eval_steps": 1} | options))
    return trainer_for(model_for("full"), args, eval_dataset=eval_dataset or Dataset.from_list(PAIRS[:4]))


def state_of(run):
    return json.loads((run / "trainer_state.json").read_text())


def test_the_numbers_of_an_evaluation_are_those_that_can_be_the_best(tmp_path):
    metrics = with_evaluation(tmp_path).evaluate()
    measured = {name.removeprefix("eval_") for name in metrics}
    assert measured - {"epoch", "runtime", "samples_per_second", "steps_per_second"} == set(METRICS)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss", False), ("loss_personal_tokens", False), ("eval_loss_without_persona", False),
        ("pir_mean", True), ("eval_pir_mean", True), ("eval_mine_loss_with_persona", False), ("mine_pir_mean", True),
    ],
)  # fmt: skip
def test_losses_are_better_lower_and_the_mean_pir_higher(tmp_path, metric, greater):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    with pytest.raises(UserError, match="greater_is_better"):
        arguments(tmp_path, metric_for_best_model=metric, greater_is_better=not greater)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("metric", "mode", "other"), [("pir_mean", "max", "min"), (None, "min", "max")])
def test_a_learning_rate_that_follows_the_metric_follows_it_in_its_direction(tmp_path, kind, metric, mode, other):
    """transformers leaves the mode at "min", whatever the metric is: a PIR that rose lowered the learning rate."""
    follows = partial(
        arguments, tmp_path, eval_strategy="steps", eval_steps=1, lr_scheduler_type=kind, metric_for_best_model=metric
    )
    assert follows(lr_scheduler_kwargs={"mode": mode}).lr_scheduler_kwargs == {"mode": mode}
    for refused in ({"mode": other}, f'{{"mode": "{other}"}}', *([None, {"factor": 0.5}] if metric else [])):
        with pytest.raises(UserError, match=f"lr_scheduler_kwargs: .*{metric or 'loss'} .*{mode}"):
            follows(lr_scheduler_kwargs=refused)


def test_a_number_that_the_evaluation_does_not_have_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"eval_loss_personal_tokens.*accuracy"):
        arguments(tmp_path, metric_for_best_model="accuracy")
    parts = {"mine": Dataset.from_list(PAIRS[:2])}
    with_evaluation(tmp_path, parts, metric_for_best_model="mine_loss")
    for name, dataset in (("loss", parts), ("eval_mine_loss", None), ("yours_loss", parts)):
        with pytest.raises(UserError, match=f"metric_for_best_model: .*eval_.*{name}"):
            with_evaluation(tmp_path, dataset, metric_for_best_model=name)


def test_a_metric_that_is_no_number_is_found_at_the_first_evaluation(tmp_path):
    pairs = [{**pair, "personal": [False] * len(pair["personal"])} for pair in PAIRS[:4]]
    options = {"metric_for_best_model": "loss_personal_tokens", "eval_on_start": True}
    trainer = with_evaluation(tmp_path, Dataset.from_list(pairs), **options)
    with pytest.raises(UserError, match=r"loss_personal_tokens is nan .* no personal token"):
        trainer.train()
    assert trainer.state.global_step == 0
    without = with_evaluation(tmp_path, Dataset.from_list(pairs))
    assert math.isnan(without.evaluate()["eval_loss_personal_tokens"]), "which alone is not an error"


def test_the_best_weights_are_kept_and_told_of(train, tmp_path):
    metric = "eval_loss_personal_tokens"
    flags = ("--load_best_model_at_end", "true", "--metric_for_best_model", metric)
    code, out, err = train(*flags, **WORSE)
    assert code == 0, err
    run, state = tmp_path / "run", state_of(tmp_path / "run")
    evaluations = {e["step"]: e for e in state["log_history"] if metric in e}
    best = min((step for step in evaluations if step), key=lambda step: evaluations[step][metric])
    assert 0 < best < state["global_step"] == 8 and len(evaluations) == 9
    assert sum(metric in entry for entry in state["log_history"]) == 9, "one evaluation per step"
    saved, kept = (load_file(d / "adapter_model.safetensors") for d in (run, run / f"checkpoint-{best}"))
    assert all(saved[name].equal(kept[name]) for name in saved)
    told = f"weights of step {best}, the best by {metric}"
    for text in (out, *((run / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))):
        assert told in text and f"{evaluations[best][metric]:.4f}" in text
    assert f"{evaluations[8][metric]:.4f}" not in out.split("before")[-1]


def test_the_last_weights_are_told_of_as_ever(train, tmp_path):
    code, out, err = train("--load_best_model_at_end", "true", learning_rate=1e-4, eval_steps=2)
    assert code == 0 and "the best by" not in out + (tmp_path / "run" / "README.md").read_text(), err


def test_saving_follows_evaluation_unless_it_is_told_not_to(train, tmp_path):
    assert train("--load_best_model_at_end", "true", max_steps=4)[0] == 0
    assert state_of(tmp_path / "run")["best_global_step"], "at the end of an epoch"
    code, _, err = train("--load_best_model_at_end", "true", output_dir=tmp_path / "b", eval_steps=2, save_steps=3)
    fails((code, "", err), "multiple")
    fails(train("--load_best_model_at_end", "true", "--eval_strategy=no", output_dir=tmp_path / "c"), "--eval_strategy")


def test_a_run_stops_early_with_its_best_weights(train, tmp_path):
    code, out, err = train(early_stopping=2, **WORSE)
    assert code == 0, err
    state = state_of(tmp_path / "run")
    assert state["global_step"] == state["best_global_step"] + 2 < 8
    assert f"weights of step {state['best_global_step']}, the best by eval_loss" in out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["early_stopping"] == 2


@pytest.mark.parametrize("flag", ["--early_stopping=-1", "--early_stopping=1 --load_best_model_at_end=false"])
def test_early_stopping_keeps_the_best_weights(train, flag):
    fails(train(*flag.split()), "early_stopping")


def test_what_early_stopping_has_counted_is_resumed(tmp_path):
    """A constant number is never better: the third evaluation is the second in a row that is not better."""

    class Constant(PerceTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = {**super().evaluate(*args, **kwargs), "eval_loss": 1.0}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    def trainer(max_steps, **options):
        args = arguments(
            tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=max_steps,
            early_stopping=2, **options,
        )  # fmt: skip
        made = Constant(
            model_for("full"), args, train_dataset=Dataset.from_list(PAIRS), eval_dataset=Dataset.from_list(PAIRS[:2]),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        handler = made.callback_handler
        plain, handler.on_evaluate = (
            handler.on_evaluate,
            lambda args, state, control, metrics: (
                plain(args, state, control, metrics) if metrics["eval_loss"] == 1.0 else control
            ),
        )
        return made

    trainer(2).train()
    resumed = trainer(9)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    (counting,) = [x for x in resumed.callback_handler.callbacks if isinstance(x, EarlyStopping)]
    assert counting.early_stopping_patience_counter == 2


def test_a_trainer_that_has_stopped_early_can_train_again(tmp_path):
    trainer = with_evaluation(tmp_path, max_steps=8, early_stopping=1, save_strategy="steps", save_steps=1, **AWAY)
    trainer.train()
    steps = trainer.state.global_step
    trainer.train()
    assert 0 < steps < 8 and trainer.state.global_step > 0


def test_the_patience_is_that_of_the_options(tmp_path):
    """The patience is not the checkpoint's, and a run without early stopping can be continued with it."""
    options = {"save_strategy": "steps", "save_steps": 1}
    with_evaluation(tmp_path, max_steps=1, **options).train()
    for patience, steps in ((3, 2), (4, 3)):
        trainer = with_evaluation(tmp_path, max_steps=steps, early_stopping=patience, **options)
        trainer.train(resume_from_checkpoint=True)
        (counting,) = [x for x in trainer.callback_handler.callbacks if isinstance(x, EarlyStopping)]
        assert counting.early_stopping_patience == patience and trainer.state.global_step == steps


# ---- resumed


def test_a_trainer_that_has_resumed_evaluates_again_where_it_was_asked_to(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_on_start": True}
    with_evaluation(tmp_path, max_steps=1, **options).train()
    trainer = with_evaluation(tmp_path, max_steps=2, **options)
    trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 1, 2]


AGAIN = {"model": None, "data": None, "precision": None, "max_steps": None}
KEEPS = {**AWAY, "max_steps": 8}
ADAPTER = "adapter_model.safetensors"


def stop_in_evaluation(patch, step):
    """SIGTERM in the first evaluation at this step."""
    own = PerceTrainer._prepare_inputs

    def stopping(self, *args):
        if self.state.global_step == step and not self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *args)

    patch.setattr(PerceTrainer, "_prepare_inputs", stopping)


@pytest.mark.parametrize(
    ("step", "how"),
    [
        pytest.param(2, {"eval_steps": 1}, id="steps"),
        pytest.param(2, {"early_stopping": 1}, id="stops early"),
        pytest.param(2, {}, id="epochs", marks=pytest.mark.slow),
        pytest.param(4, {"eval_steps": 1}, id="steps, later", marks=pytest.mark.slow),
        pytest.param(4, {"early_stopping": 1}, id="stops early, later", marks=pytest.mark.slow),
        pytest.param(4, {}, id="epochs, later", marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_an_evaluation_changes_nothing_of_what_is_the_best(train, tmp_path, monkeypatch, how, step):
    flags = ["--load_best_model_at_end", "true"] if "early_stopping" not in how else []
    assert train(*flags, output_dir=tmp_path / "straight", **KEEPS | how)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        stop_in_evaluation(patch, step)
        train(*flags, **KEEPS | how)
    code, _, err = train("--resume", **AGAIN)
    assert code == 0, err
    one, other = state_of(tmp_path / "straight"), state_of(tmp_path / "run")
    for name in ("global_step", "best_metric", "best_global_step"):
        assert one[name] == other[name], name
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (tmp_path / "straight" / ADAPTER).read_bytes()
    evaluated = [[line["step"] for line in state["log_history"] if "eval_loss" in line] for state in (one, other)]
    assert evaluated[0] == evaluated[1]


def test_best_weights_that_a_later_evaluation_has_replaced_may_be_gone(train, tmp_path, monkeypatch):
    """A signal cut off the last evaluation. Made later, it shows the best weights, and older ones are deleted."""
    flags = ("--load_best_model_at_end", "true", "--save_total_limit", "1", "--eval_steps", "1")
    options = {"lora_r": 0, "learning_rate": 1e-3, "max_steps": 3}
    own = PerceTrainer.save_model

    def killed(self, *args, _internal_call=False):
        if not _internal_call:
            raise RuntimeError("killed")
        own(self, *args, _internal_call=True)

    assert train(*flags, output_dir=tmp_path / "straight", **options)[0] == 0
    assert state_of(tmp_path / "straight")["best_global_step"] == 3
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_evaluation(patch, 3)
        train(*flags, **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PerceTrainer, "save_model", killed)
        train("--resume", **AGAIN)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    code, _, err = train("--resume", **AGAIN)
    assert code == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "straight")]
    assert weights[0] == weights[1]


@pytest.fixture
def stopped_before_its_end(train, tmp_path, monkeypatch):
    """A run whose best weights are those of its first step, and have not been loaded yet."""

    def killed(self):
        raise RuntimeError("killed")

    flags = ("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss_personal_tokens")
    assert train(*flags, output_dir=tmp_path / "straight", **WORSE)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PerceTrainer, "_load_best_model", killed)
        train(*flags, **WORSE)
    best = state_of(tmp_path / "straight")["best_global_step"]
    assert best < WORSE["max_steps"]
    return tmp_path / "run", f"checkpoint-{best}", (tmp_path / "straight" / ADAPTER).read_bytes()


def test_the_best_weights_are_found_where_the_run_is_now(train, tmp_path, stopped_before_its_end):
    run, _, expected = stopped_before_its_end
    moved = run.rename(tmp_path / "moved")
    assert train("--resume", output_dir=moved, **AGAIN)[0] == 0
    assert (moved / ADAPTER).read_bytes() == expected


def test_the_best_weights_are_whole_or_not_loaded(train, stopped_before_its_end):
    run, best, _ = stopped_before_its_end
    path = run / best / ADAPTER
    content = bytearray(path.read_bytes())
    content[-100] ^= 64
    path.write_bytes(content)
    before = {file: file.stat().st_mtime_ns for file in run.glob("checkpoint-*/*")}
    result = train("--resume", **AGAIN)
    fails(result, best, ADAPTER, "eval_loss")
    assert "--resume" not in result[2] and not (run / ADAPTER).exists()
    assert {file: file.stat().st_mtime_ns for file in run.glob("checkpoint-*/*")} == before, "nothing was trained"


def test_numbers_of_the_best_weights_are_finite(train, monkeypatch):
    load = PerceTrainer._load_best_model

    def spoiled(self):
        load(self)
        next(p for p in self.model.parameters() if p.requires_grad).data.fill_(float("nan"))

    monkeypatch.setattr(PerceTrainer, "_load_best_model", spoiled)
    flags = ("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss_personal_tokens")
    fails(train(*flags, **WORSE), "eval_loss is nan")


def test_a_run_that_stopped_early_says_so_when_it_is_resumed(train, tmp_path):
    options = WORSE | {"early_stopping": 1}
    assert train(**options)[0] == 0
    before = state_of(tmp_path / "run")["global_step"]
    assert before < options["max_steps"]
    code, out, _ = train("--resume", **AGAIN | {"max_steps": 20})
    assert code == 0 and f"stopped early at step {before}" in out
    assert state_of(tmp_path / "run")["global_step"] == before


@pytest.mark.parametrize("options", [{"early_stopping": 1, "save_steps": 3}, {"early_stopping": 1, "save_steps": 0}])
def test_early_stopping_says_what_does_not_go_with_it(train, options):
    fails(train(**options), "early_stopping", "--save_steps", "--eval_steps")
