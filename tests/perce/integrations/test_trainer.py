"""PerCE in any transformers.Trainer: the loss and gradients of the formula, however a step is made."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)  # fmt: skip

from perce import LossConfig, UserError
from perce.data.marked import PersonaCollator, labelled
from perce.integrations.trainer import PerceMixin, TokenOutput
from perce.model.memory import CHECKPOINTING
from tests.helpers.ranks import end_rank, run_ranks
from tests.helpers.sft import (
    BATCH,
    CLIP,
    STEPS,
    TOKENIZER,
    assert_same_steps,
    block_of,
    model_for,
    options_for,
    plain_steps,
    rows_of,
    steps_of,
    tokens_of,
)  # fmt: skip
from tests.helpers.tiny import tiny_model

LOSS = LossConfig(clip_min=CLIP[0], clip_max=CLIP[1])
ROWS = rows_of("completion")
LABELLED = labelled(
    [{"persona": row["persona"], "query": row["prompt"][0]["content"], "response": row["completion"][0]["content"]}
     for row in ROWS], TOKENIZER,
)  # fmt: skip
PADDED, FLAT = DataCollatorForSeq2Seq(TOKENIZER), DataCollatorWithFlattening()


class OurTrainer(PerceMixin, Trainer):
    pass


class LossOfTheModel(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As many are written: the number of tokens is not handed on."""
        out = model(**inputs)
        return (out.loss, out) if return_outputs else out.loss


class OverOldTrainer(PerceMixin, LossOfTheModel):
    pass


class OverMeans(PerceMixin, LossOfTheModel):
    loss_is_scaled_for_ga = False  # so that the Trainer divides, as transformers advises for means over a batch


def trainer_for(directory, model=None, collator=PADDED, rows=LABELLED, loss=LOSS, kind=OurTrainer, **options):
    names = ("eval_dataset", "compute_metrics", "model_init")
    more = {name: options.pop(name) for name in names if name in options}
    return kind(
        model_for() if model is None else model, TrainingArguments(**options_for(directory, **options)), loss=loss,
        train_dataset=rows, data_collator=collator, processing_class=TOKENIZER, **more,
    )  # fmt: skip


def test_rows_are_those_that_trl_makes():
    for row, own in zip(LABELLED, ROWS, strict=True):
        ids, places = tokens_of(own, "completion", block_of(own["persona"]))
        assert row["input_ids"] == ids
        assert [i for i, label in enumerate(row["labels"]) if label >= 0] == [*places]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({"lora": True}, {}),
        ({"architecture": "llama-tied"}, {}),
        ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ({}, {"collator": FLAT}),
        ({}, {"collator": PersonaCollator(PADDED), "gradient_checkpointing": True}),
    ],
    ids=["plain", "lora", "tied", "accumulated", "flattened", "checkpointing"],
)
def test_steps_are_those_of_the_formula(tmp_path, model, options):
    trainer = trainer_for(tmp_path, model_for(**model), **options)
    assert_same_steps(steps_of(trainer), plain_steps(model_for(**model), ROWS, "completion"))


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", OverOldTrainer), ("mixtral", OverMeans)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", OverMeans), ("mixtral", OverOldTrainer))],
)
def test_the_mean_is_over_the_tokens_of_a_step_if_a_compute_loss_hands_on_no_count(tmp_path, kind, architecture):
    own, ours = (
        steps_of(trainer_for(tmp_path, model_for(architecture), kind=each, max_steps=2, **ACCUMULATED))
        for each in (OurTrainer, kind)
    )
    assert_same_steps(ours, own)


def test_checkpointing_is_not_reentrant_unless_it_is_asked_to_be_which_is_refused(tmp_path):
    """torch's own default is True, with which the logits of routers would have no gradient."""
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"preserve_rng_state": True}}
    trainer = trainer_for(tmp_path, **options)
    assert getattr(trainer.args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False, "preserve_rng_state": True}


def test_rows_that_all_lack_a_persona_are_refused(tmp_path):
    none = labelled([{"persona": [], "query": f"Number {i}?", "response": "Yes."} for i in range(4)], TOKENIZER)
    with pytest.raises(UserError, match="train_dataset: no example has a persona, so the PIR of every token is 0"):
        trainer_for(tmp_path, rows=none)
    trainer_for(tmp_path, rows=none, loss=LossConfig(objective="ce"))


def test_a_training_step_that_hands_on_no_count_is_refused(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, kind=OverOldTrainer, **ACCUMULATED)
    own = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda model, inputs, *_: own(model, inputs))
    with pytest.raises(UserError, match="training_step: expected num_items_in_batch"):
        trainer.train()


FIVE = LABELLED.select(range(5))
MEANS = ("eval_loss_with_persona", "eval_loss_without_persona", "eval_pir_mean")


def evaluated(directory, collator, size):
    return trainer_for(directory, collator=collator, eval_dataset=FIVE, per_device_eval_batch_size=size).evaluate()


def train_a_rank(directory):
    streamed = LABELLED.to_iterable_dataset()
    for name, rows, kind in (
        ("steps.pt", LABELLED, OurTrainer), ("streamed.pt", streamed, OurTrainer), ("old.pt", LABELLED, OverOldTrainer),
    ):  # fmt: skip
        options = ACCUMULATED | {"gradient_accumulation_steps": 2}
        trainer = trainer_for(directory, rows=rows, kind=kind, **options)
        found = steps_of(trainer)
        if trainer.args.process_index == 0:
            torch.save((found, trainer.state.log_history[0]), directory / name)
    means = [evaluated(directory, *of) for of in ((PADDED, 1), (FLAT, 2), (PADDED, 4))]
    with pytest.warns(UserWarning, match="eval_dataset: a stream"):
        trainer.evaluate(FIVE.to_iterable_dataset())
    if trainer.args.process_index == 0:
        torch.save([[found[name] for name in MEANS] for found in means], directory / "means.pt")
    end_rank()


def test_steps_of_two_processes_are_those_of_the_formula(tmp_path):
    """An evaluation counts a row once, though accelerate repeats rows so that each process has as many."""
    run_ranks("tests.perce.integrations.test_trainer", str(tmp_path))
    (found, log), (streamed, _), (old, _) = (
        torch.load(tmp_path / name) for name in ("steps.pt", "streamed.pt", "old.pt")
    )
    for steps in (found, streamed, old):
        assert_same_steps(steps, plain_steps(model_for(), ROWS, "completion"))
    whole = evaluated(tmp_path, PADDED, 5)
    for means in torch.load(tmp_path / "means.pt"):
        assert means == pytest.approx([whole[name] for name in MEANS], rel=1e-5)
    alone = trainer_for(tmp_path / "alone", max_steps=1)
    alone.train()
    for name in ("ce", "pir_mean", "weight_mean", "frac_at_floor"):
        assert log[name] == pytest.approx(alone.state.log_history[0][name], rel=1e-5)


def test_a_loss_that_is_not_ours_is_noticed(tmp_path, monkeypatch):
    """A subclass may compute its own, of the logits, and nothing of it would be PerCE."""
    trainer = trainer_for(tmp_path, logging_steps=500)
    own = lambda model, inputs, **_: model(input_ids=inputs["input_ids"]).logits.mean()  # noqa: E731
    monkeypatch.setattr(trainer, "compute_loss", own)
    with pytest.raises(UserError, match=r"^compute_loss: .*PerceMixin"):
        trainer.train()


@pytest.mark.parametrize("objective", ["perce", "ce"])
def test_a_compute_loss_in_the_class_of_the_mixin_is_told_where_to_stand(tmp_path, objective):
    """The model's own loss cannot take the fields of both passes, and would say so in its own words."""

    class Ours(PerceMixin, Trainer):
        compute_loss = LossOfTheModel.compute_loss

    with pytest.raises(UserError, match=r"^compute_loss: .*PerceMixin.* behind it"):
        trainer_for(tmp_path, kind=Ours, loss=LossConfig(objective=objective)).train()


class Beside:
    pass


class Mixed(PerceMixin):
    pass


@pytest.mark.parametrize(
    ("bases", "expected"),
    [
        ((Seq2SeqTrainer, PerceMixin), "PerceMixin, Seq2SeqTrainer"),
        ((Beside, Trainer, PerceMixin), "PerceMixin, Beside, Trainer"),
        ((Trainer, Mixed), "Mixed, Trainer"),
        # The Trainer would stand between PerceMixin and its base, which loads the weights of checkpoints.
        ((Seq2SeqTrainer, PerceMixin, Trainer), "PerceMixin, Seq2SeqTrainer, Trainer"),
    ],
)
def test_a_mixin_behind_the_trainer_is_refused_when_the_class_is_made(bases, expected):
    with pytest.raises(UserError, match=rf"^Late: expected PerceMixin before the Trainer: class Late\({expected}\)\.$"):
        type("Late", bases, {})
    by_name = {base.__name__: base for base in bases}
    type("InTime", tuple(by_name[name] for name in expected.split(", ")), {})


def test_a_compute_loss_that_calls_another_model_than_it_is_given_is_told_so(tmp_path):
    class Calls(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.model(**inputs).loss

    with pytest.raises(UserError, match=r"^compute_loss: .*PerceMixin.* behind it"):
        trainer_for(tmp_path, kind=type("Ours", (PerceMixin, Calls), {})).train()


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("method", ["compute_loss", "_prepare_inputs"])
def test_a_type_error_of_another_class_stays_its_own(tmp_path, behind, method):
    def fails(*args, **kwargs):
        return "one" + 1

    other = type("Other", (Trainer,) if behind else (), {method: fails})
    kind = type("Ours", (PerceMixin, other) if behind else (other, PerceMixin, Trainer), {})
    with pytest.raises(TypeError, match="can only concatenate"):
        trainer_for(tmp_path, kind=kind).train()


def test_a_compute_loss_that_hands_on_part_of_the_batch_is_told_so(tmp_path):
    """The collator is not to blame."""

    class Ours(PerceMixin, Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {name: inputs[name] for name in ("input_ids", "labels")})

    with pytest.raises(UserError, match=r"^compute_loss: .*, got input_ids, labels"):
        trainer_for(tmp_path, kind=Ours).train()


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda model, inputs: model(input_ids=inputs["input_ids"], labels=inputs["labels"]), "input_ids, labels"),
        (lambda model, inputs: model(inputs["input_ids"]), "one without a name"),
        (lambda model, inputs: model(inputs.pop("input_ids"), **inputs), "one without a name, "),
    ],
)
def test_a_compute_loss_that_calls_the_model_with_part_of_the_batch_is_told_so(tmp_path, call, got):
    class Picks(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return call(model, inputs).loss

    with pytest.raises(UserError, match=rf"^compute_loss: expected .*\*\*inputs.*, got {got}"):
        trainer_for(tmp_path, kind=type("Ours", (PerceMixin, Picks), {})).train()


@pytest.mark.parametrize(
    "read", [lambda out: out.logits, lambda out: out["logits"], lambda out: out.get("logits"), lambda out: out[1]]
)
def test_a_compute_loss_that_reads_logits_is_told_that_there_are_none(tmp_path, read):
    class ReadsLogits(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return read(model(**inputs)).sum()

    class OverLogits(PerceMixin, ReadsLogits):
        pass

    with pytest.raises(UserError, match=r"^logits: .* never held"):
        trainer_for(tmp_path, kind=OverLogits).train()


def test_an_output_has_no_logits_for_those_who_ask_whether_it_has():
    out = TokenOutput(loss=torch.zeros(()))
    assert getattr(out, "logits", None) is None and not hasattr(out, "logits") and out[0] is out["loss"] is out.loss


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer])
def test_a_model_by_name_is_refused_if_the_trainer_loads_none(tmp_path, kind):
    arguments = Seq2SeqTrainingArguments(**options_for(tmp_path))
    with pytest.raises(UserError, match=r"^model: expected a model, got the name 'x/y'"):
        type("Ours", (PerceMixin, kind), {})("x/y", arguments, train_dataset=LABELLED, data_collator=PADDED)


def test_an_empty_evaluation_is_refused_by_name_and_an_empty_share_is_none(tmp_path):
    trainer = trainer_for(tmp_path)
    with pytest.raises(UserError, match=r"^eval_dataset: expected at least one row"):
        trainer.evaluate(LABELLED.select([]))
    stream = IterableDataset.from_generator(lambda: iter(()))
    assert "eval_loss_with_persona" not in trainer.evaluate(stream)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_cross_entropy_is_the_trainers_own(tmp_path, architecture):
    """Its load balancing included, of a step of one forward: over several the Trainer adds that up, and we average."""
    options = options_for(tmp_path)
    plain = [{"input_ids": row["input_ids"], "labels": [max(x, -100) for x in row["labels"]]} for row in LABELLED]
    own = Trainer(
        model_for(architecture), TrainingArguments(**options), train_dataset=Dataset.from_list(plain),
        data_collator=PADDED,
    )  # fmt: skip
    ours = trainer_for(tmp_path, model_for(architecture), loss=LossConfig(objective="ce"))
    assert_same_steps(steps_of(ours), steps_of(own))


def test_the_load_balancing_loss_is_the_mean_over_the_forwards_of_a_step(tmp_path):
    """Two forwards, on the same rows, are one."""
    twice = Dataset.from_list([row for row in [*LABELLED][:STEPS] for _ in range(2)])
    one, two = (
        steps_of(trainer_for(tmp_path, model_for("mixtral"), rows=twice, learning_rate=0.0, **how))
        for how in (
            {"per_device_train_batch_size": 2},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        )
    )
    assert_same_steps(two, one)


def test_the_mean_is_over_tokens_for_models_too_whose_own_loss_takes_no_count(tmp_path):
    model = model_for()
    model.accepts_loss_kwargs = False  # as of many that see images
    trainer = trainer_for(tmp_path, model, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_steps(steps_of(trainer), plain_steps(model_for(), ROWS, "completion"))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_evaluation_is_of_cross_entropy_with_and_without_the_persona(tmp_path, architecture):
    """Over the tokens of all batches, which have other numbers of them."""
    options = {"eval_dataset": LABELLED.select(range(6)), "per_device_eval_batch_size": 4}
    trainer = trainer_for(tmp_path, model_for(architecture), **options)
    found = trainer.evaluate()
    (loss, _), *_ = plain_steps(model_for(architecture), ROWS[:6], "completion", objective="ce", steps=1)
    assert found["eval_loss_with_persona"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_loss_without_persona"] - found["eval_pir_mean"] == pytest.approx(loss, rel=1e-5)
    if architecture == "llama":
        whole = trainer_for(tmp_path, **options | {"per_device_eval_batch_size": 6}).evaluate()
        assert whole["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert "loss_without_persona" not in trainer.state.log_history[0]
    with pytest.raises(UserError, match="predict: would return logits"):
        trainer.predict(LABELLED)


def test_a_step_without_a_token_to_learn_is_no_nan(tmp_path):
    """Of a row of which a reply was cut off, say."""
    rows = [{**row, "labels": [min(label, -100) for label in row["labels"]]} for row in LABELLED.select(range(BATCH))]
    trainer = trainer_for(tmp_path, rows=Dataset.from_list(rows), max_steps=1)
    ((loss, gradients),) = steps_of(trainer)
    assert loss == 0.0 and all((gradient == 0).all() for gradient in gradients.values())


def test_a_mixture_is_resumed_with_its_experts(tmp_path):
    """transformers' own Trainer would resume with those that the model was made with."""

    def trainer():
        return trainer_for(tmp_path, tiny_model("qwen3-moe"), max_steps=2, save_strategy="steps", save_steps=1)

    straight, resumed = trainer(), trainer()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for own, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_the_clip_moves_along_its_schedule(tmp_path):
    rising = LossConfig(clip_min=CLIP[0], clip_max=CLIP[1], clip_schedule="rising")
    trainer = trainer_for(tmp_path, loss=rising, learning_rate=0.0, rows=LABELLED.select(range(BATCH)), max_steps=3)
    trainer.train()
    first, _, last = (entry for entry in trainer.state.log_history if "ce" in entry)
    assert first["loss"] == pytest.approx(first["ce"], rel=1e-5) and first["weight_mean"] == pytest.approx(1.0)
    assert last["loss"] < 0.8 * first["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": LossConfig(objective="longce")}, "objective: expected one for personas"),
        ({"loss": LossConfig(estimate="frozen")}, "estimate: expected online, got frozen"),
        ({"loss": LossConfig(normalize="sequence")}, "normalize: expected none, got sequence"),
        ({"compute_metrics": len}, "compute_metrics: (?!.*PerceTrainer)"),
        ({"model_init": model_for}, "model_init: (?!.*PerceTrainer)"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha"),
        (
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            f"{CHECKPOINTING}_kwargs: expected use_reentrant: false",
        ),
        ({"collator": DataCollatorForSeq2Seq(TOKENIZER, padding=False)}, "data_collator: expected one that pads"),
        ({"collator": None}, "data_collator: expected one that pads"),
        ({"collator": DataCollatorForLanguageModeling(TOKENIZER, mlm=False)}, "data_collator: DataCollatorForLang"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches: expected false"),
        (
            {"metric_for_best_model": "loss_without_persona", "eval_strategy": "steps", "eval_dataset": LABELLED},
            "greater_is_better: a smaller eval_loss_without_persona is better",
        ),
        (
            {"metric_for_best_model": "pir_mean", "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps",
             "eval_dataset": LABELLED},
            "lr_scheduler_kwargs: a greater eval_pir_mean is better",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trainer_for(tmp_path, **options)


def test_a_loss_that_is_only_a_name_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"^loss: expected a perce.LossConfig, got 'ce'"):
        trainer_for(tmp_path, loss="ce")


def test_a_model_with_dropout_is_refused_by_name(tmp_path):
    noisy = tiny_model(attention_dropout=0.1)
    with pytest.raises(UserError, match="attention_dropout"):
        trainer_for(tmp_path, noisy)


def test_a_batch_that_another_collator_made_is_refused_by_name(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.data_collator = PADDED
    with pytest.raises(UserError, match=r"PersonaCollator.*, got attention_mask, input_ids, labels.* data_collator"):
        trainer.train()


if __name__ == "__main__":
    train_a_rank(Path(sys.argv[1]))
