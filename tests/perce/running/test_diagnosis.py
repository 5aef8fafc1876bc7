"""What is said about a run at its end, tested on made-up histories."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import Dataset

from perce import DataConfig, LossConfig
from perce.running.diagnosis import Outcome, best_evaluation, diagnose, outcome_of
from tests.helpers.tiny import demo_examples

WELL = Outcome(
    log=[
        *({"step": n, "loss": 4 - n, "ce": 4 - n, "weight_mean": 1.0, "frac_at_floor": 0.8} for n in range(1, 7)),
        {"step": 0, "eval_loss": 4.0}, {"step": 3, "eval_loss": 3.7}, {"step": 6, "eval_loss": 3.5},
        {"step": 6, "train_loss": 3.7, "train_runtime": 1.0},
    ],
    loss=LossConfig(), before={"eval_loss": 4.0, "eval_pir_mean": 0.3, "eval_loss_personal_tokens": 5.0},
    after={"eval_loss": 3.5, "eval_pir_mean": 0.4, "eval_loss_personal_tokens": 4.0}, documents=False, unit="users",
    units=12, keeps_best=False, warmup=1, steps=6, entries=100, dropped=3, max_length=5000,
)  # fmt: skip


def said(**changes):
    return "\n".join(diagnose(replace(WELL, **changes)))


def log(*values, key="ce", **columns):
    """Lines of a log: `values` under key, and constants or lists under the other names."""
    many = {name: column if isinstance(column, list) else [column] * len(values) for name, column in columns.items()}
    return [
        {"step": 10 * number, key: value} | {name: column[number] for name, column in many.items()}
        for number, value in enumerate(values)
    ]


def evaluated(*losses):
    return [line | {"eval_loss_with_persona": line["eval_loss"]} for line in log(*losses, key="eval_loss")]


def test_of_a_run_that_went_well_nothing_is_said():
    assert diagnose(WELL) == []


@pytest.mark.parametrize("floor", [[0.9, 1.0, 1.0], [1.0, 0.5, 0.998], [1.0]])
def test_every_token_at_the_floor_is_cross_entropy(floor):
    text = said(log=log(*([2.0] * len(floor)), loss=1.6, weight_mean=0.8, frac_at_floor=floor))
    assert f"{floor[-1]:.1%} of the tokens" in text and "PIR is at most 0.8" in text and "cross-entropy" in text
    assert "--columns persona=" in text and "--max_length" in text and "--model" in text


def test_a_floor_is_said_by_the_signal_and_the_clip_of_the_run():
    at_floor = log(2.0, weight_mean=0.1, frac_at_floor=1.0)
    assert "preference (0.9 or 0.1) is at most 0.1" in said(log=at_floor, loss=LossConfig("nextquill"))
    assert "PIR is at most 2" in said(log=at_floor, loss=LossConfig(clip_min=2.0))
    assert said(log=at_floor, loss=LossConfig(clip_min=1.0, clip_max=1.0)) == "", "the options ask for equal weights"
    assert said(log=at_floor, loss=LossConfig("lossce")) == "", "these weights say nothing about a persona"
    assert said(log=log(2.0, 1.9, 1.8), loss=LossConfig("ce")) == "", "this objective has no weights"
    assert said(log=log(2.0, 2.0, 2.0, frac_at_floor=[1.0, 1.0, 0.9])) == ""


def test_what_equal_weights_amount_to_follows_the_options():
    """Rescaled weights are 1; with a schedule the bound of a step is not the clip's."""
    at_floor = log(2.0, 2.0, 2.0, loss=2.0, weight_mean=0.8, frac_at_floor=1.0)

    def amount(**options):
        return said(log=at_floor, loss=LossConfig(**options)).partition("training: ")[2].partition(". ")[0]

    assert amount() == "all weigh the same, which is cross-entropy times 0.8"
    for normalize in ("batch", "sequence"):
        for schedule in ("constant", "falling"):
            text = amount(normalize=normalize, clip_schedule=schedule)
            assert text == f"rescaled by --normalize {normalize}, all weigh 1, which is cross-entropy"
    for schedule in ("rising", "falling"):
        text = amount(clip_schedule=schedule)
        assert "cross-entropy times a bound between 0.8 and 1" in text and f"--clip_schedule {schedule}" in text
        assert amount(clip_schedule=schedule, clip_min=2.0) == "", "a signal below 2 may be above the bound of its step"
    assert "weigh 0" in amount(clip_min=0.0) and "cross-entropy" not in amount(clip_min=0.0)
    assert "weigh 0" in amount(clip_min=0.0, normalize="batch"), "weights of 0 cannot be rescaled"
    assert "between 0 and 1" in amount(clip_min=0.0, clip_schedule="falling")


def test_of_documents_at_the_floor_the_context_is_spoken_of():
    at_floor = log(2.0, 2.0, 2.0, frac_at_floor=1.0)
    loss = LossConfig("longce", contrast="log", clip_min=0.8)
    text = said(log=at_floor, loss=loss, documents=True)
    assert "cross-entropy times 0.8" in text and "--short_context" in text and "persona" not in text


@pytest.mark.parametrize(
    ("before", "after", "fragments"),
    [
        (-0.02, -0.01, ("-0.0100", "before training -0.0200", "no likelier")),
        (0.3, 0.0, ("+0.0000", "before training +0.3000")),
        (None, -0.01, ("Mean PIR of the validation is -0.0100:",)),
        (-0.02, 0.05, ()),
        (None, 0.05, ()),
    ],
)
def test_a_persona_that_makes_replies_no_likelier(before, after, fragments):
    earlier = {} if before is None else WELL.before | {"eval_pir_mean": before}
    text = said(before=earlier, after=WELL.after | {"eval_pir_mean": after}, loss=LossConfig("ce"))
    assert bool(text) == bool(fragments) and all(fragment in text for fragment in fragments)


def test_of_documents_the_context_is_spoken_of():
    text = said(documents=True, after={"eval_pir_mean": -0.01, "eval_loss_personal_tokens": math.nan}, before={})
    assert "long context" in text and "--short_context" in text and "persona" not in text


def test_a_validation_loss_that_rises_is_told_with_its_step():
    text = said(log=evaluated(4.0, 3.0, 2.9, 3.0, 3.2))
    assert "lowest at step 20 (2.9000)" in text and "3.2000 at step 40, 10.3% higher" in text
    assert "--early_stopping" in text and "--load_best_model_at_end true" in text
    text = said(log=evaluated(2.9, 3.0, 3.1))
    assert "lowest before training (2.9000)" in text and "--learning_rate" in text and "--early_stopping" not in text


def test_noise_and_kept_weights_are_no_rise():
    assert said(log=evaluated(4.0, 3.0, 3.02)) == "" and said(log=evaluated(4.0, 3.5, 3.0)) == ""
    assert said(log=evaluated(4.0, 3.0, 3.5), keeps_best=True) == "", "the best are saved"
    assert said(log=evaluated(3.0)) == said(log=[]) == said(log=evaluated(math.nan, 3.0)) == ""
    assert "step 10" in said(log=evaluated(math.nan, 3.0, 3.5)), "without an evaluation before training"


def test_the_best_evaluation_is_the_earliest_of_the_lowest():
    assert best_evaluation(evaluated(4.0, 3.0, 3.0)) == (10, 3.0) and best_evaluation(log(1.0)) is None


def test_few_users_are_counted():
    text = said(units=3)
    assert "3 users" in text and "10" in text and "validation file" in text and "--eval_examples" not in text
    assert "--eval_examples 0 takes all" in said(units=3, cut=True)
    assert "1 user:" in said(units=1) and "9 rows" in said(units=9, unit="rows") and said(units=10) == ""


def test_a_weighted_loss_may_rise_while_cross_entropy_falls():
    falling, rising, weights = (
        [3.0, 2.9, 2.8, 2.7, 2.6, 2.5],
        [3.0, 3.0, 3.1, 3.1, 3.3, 3.5],
        [1.0, 1.0, 1.1, 1.1, 1.3, 1.4],
    )
    text = said(log=log(*falling, loss=rising, weight_mean=weights))
    for number in ("3.0000 to 3.4000", "2.9500 to 2.5500", "1.000 to 1.350"):
        assert number in text
    assert "no reason to stop" in text
    assert said(log=log(*falling, loss=falling, weight_mean=weights)) == ""
    for normalize in ("batch", "sequence"):  # the weights' mean in the loss is 1, whatever it was before
        assert said(log=log(*falling, loss=rising, weight_mean=weights), loss=LossConfig(normalize=normalize)) == ""
    assert said(log=log(*rising, loss=rising, weight_mean=weights)) == ""
    assert said(log=log(*falling, loss=rising, weight_mean=1.0)) == "", "another part rose, such as a router's loss"
    assert (
        said(log=log(*falling, loss=rising)) == said(log=log(3.0, 2.9, loss=[1.0, 2.0], weight_mean=[1.0, 2.0])) == ""
    )


def test_personal_tokens_that_got_worse_or_are_none():
    text = said(after=WELL.after | {"eval_loss_personal_tokens": 5.5})
    assert "personal tokens rose from 5.0000 to 5.5000" in text and "--learning_rate" in text
    assert said(after=WELL.after | {"eval_loss_personal_tokens": 5.02}) == ""
    none = {"eval_loss_personal_tokens": math.nan}
    text = said(before=WELL.before | none, after=WELL.after | none)
    assert "No token" in text and "--columns persona=" in text
    assert said(before={}, after=WELL.after | {"eval_loss_personal_tokens": 5.5}) == ""


def test_personal_tokens_of_data_that_marks_them_itself():
    """Then words are not looked for in the persona, and the message is about the marks."""
    train, none = Dataset.from_list([{"input_ids": [1]}]), {"eval_loss_personal_tokens": math.nan}
    marked = demo_examples(2)
    plain = [replace(example, personal_spans=None) for example in marked]

    def told(examples):
        return "\n".join(diagnose(replace(run_of(train, examples), after=none, units=12, warmup=0)))

    assert all(example.personal_spans is not None for example in marked)
    assert "none of their words is in the persona" in told(plain) and "personal_spans" not in told(plain)
    for examples in (marked, [plain[0], marked[1]]):
        text = told(examples)
        assert "No token" in text and "personal_spans" in text and "none of their words" not in text


def test_personas_that_were_mostly_dropped():
    text = said(dropped=300)
    assert "75% of the persona entries" in text and "300 of 400" in text and "--max_length 5000" in text
    assert said(dropped=100) == said(dropped=0, entries=0) == ""


def test_a_run_that_is_mostly_warm_up():
    text = said(warmup=5, steps=8)
    assert "5 of 8 steps" in text and "--warmup_steps" in text
    assert said(warmup=4, steps=8) == said(warmup=0, steps=0) == ""


def test_all_at_once_is_a_few_lines():
    lines = diagnose(replace(WELL, units=2, dropped=300, warmup=6, before={}, after={}, log=evaluated(3.0, 2.0, 3.0)))
    assert len(lines) == 4 and all(line.endswith(".") and "\n" not in line for line in lines)


def run_of(train, examples, **changes):
    """The facts of a run on these pairs, the first three of which are its validation."""
    args = SimpleNamespace(
        loss=LossConfig(), data=DataConfig(max_length=99), load_best_model_at_end=False, lr_scheduler_type="linear",
        get_warmup_steps=lambda steps: steps // 2,
    )  # fmt: skip
    state = SimpleNamespace(log_history=[], global_step=7, max_steps=8)
    pairs = SimpleNamespace(
        train=train, validation=Dataset.from_dict({"example": [0, 0, 1]}), examples=examples, format="perce", uncut=9
    )
    trainer = SimpleNamespace(args=SimpleNamespace(**(vars(args) | changes)), state=state)
    return outcome_of(trainer, pairs, {}, {})


def test_the_outcome_of_a_run():
    train = Dataset.from_list([{"input_ids": [1], "passages": [0, 1], "dropped_passages": 3}] * 2)
    named, nameless = demo_examples(3), [replace(example, user_id=None) for example in demo_examples(3)]
    facts = run_of(train, named)
    assert (facts.entries, facts.dropped, facts.max_length) == (4, 6, 99)
    assert (facts.unit, facts.units) == ("users", len({named[0].user_id, named[1].user_id}))
    assert (facts.warmup, facts.steps, facts.keeps_best, facts.cut) == (4, 7, False, True)
    facts = run_of(Dataset.from_list([{"input_ids": [1], "windows": []}]), nameless, lr_scheduler_type="constant")
    assert (facts.entries, facts.dropped, facts.unit, facts.units, facts.warmup) == (0, 0, "rows", 2, 0)
    assert run_of(train, named, lr_scheduler_type="reduce_lr_on_plateau").warmup == 0
    stream = SimpleNamespace(column_names=("input_ids", "response_length"))
    assert (run_of(stream, named).entries, run_of(stream, named).dropped) == (0, 0), "not known for a stream"
