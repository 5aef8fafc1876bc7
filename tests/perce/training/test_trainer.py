"""PerceTrainer against a plain loop on the model's own full logits, across every way to split a batch, and across a
stop.
"""

import copy
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, TrainerCallback
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from perce import DataConfig, LossConfig, MemoryConfig, PerceTrainer, UserError
from perce.data.pairing import PairSource
from perce.data.stream import PairStream
from perce.model.memory import CHECKPOINTING
from perce.model.passes import counterfactual_hidden
from tests.helpers.device import Waits
from tests.helpers.ranks import finish_rank, result_of_ranks
from tests.helpers.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from tests.helpers.trainers import LORA, PAIRS, arguments, logged, model_for, plain_loop, trainer_for

LOSSES = {
    "normalized": {"normalize": "batch"},
    "rising": {"clip_schedule": "rising"},
    "falling": {"clip_schedule": "falling"},
}  # fmt: skip; of each objective: perce/test_objectives.py


def scheduled(options, step, steps):
    """Both bounds on the straight line between 1 and their own values, at one of `steps` steps."""
    way = {"rising": step / (steps - 1), "falling": 1 - step / (steps - 1)}.get(options.get("clip_schedule"), 1)
    rest = {name: value for name, value in options.items() if name != "clip_schedule"}
    return LossConfig(**rest, clip_min=1 - 0.95 * way, clip_max=1 + 4 * way)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] * (kind == "lora" and name != "rising"))
        for name in LOSSES
        for kind in ("full", "lora")
    ],
)
def test_five_steps_equal_a_plain_loop_on_full_logits(tmp_path, kind, name):
    options = LOSSES[name]
    loss = LossConfig(clip_min=0.05, **options)
    model = model_for(kind)
    reference = copy.deepcopy(model).train()
    batches = []
    trainer = trainer_for(model, arguments(tmp_path, loss=loss))
    collator = trainer.data_collator
    trainer.data_collator = lambda pairs: (batches.append(pairs), collator(pairs))[1]
    trainer.train()
    expected = plain_loop(reference, batches[:5], [scheduled(options, step, 5) for step in range(5)])
    torch.testing.assert_close(
        torch.tensor(logged(trainer, "loss", "grad_norm")), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )


def without_personas(pairs):
    """The pairs, every other one without its persona, as data/pairs.py makes them of rows that have none."""
    changed = [
        pair | {"input_ids": pair["input_ids"][:start] + pair["input_ids"][end:], "persona_span": (start, start)}
        for pair in pairs for start, end in [pair["persona_span"]]
    ]  # fmt: skip
    return [changed[i] | {"persona": -i, "passages": []} if i % 2 else pair for i, pair in enumerate(pairs)]


MIXED = {
    "plain": {},
    "tokens": {"tokens_per_batch": 3000},
    "one by one": {"memory": MemoryConfig(branches_per_forward=1)},
    "sequence": {"loss": LossConfig(clip_min=0.05, normalize="sequence")},
}


@pytest.mark.parametrize("way", MIXED)
def test_rows_without_a_persona_are_trained_on_as_if_the_persona_changed_nothing(tmp_path, way):
    """Their PIR is 0, so all of their tokens weigh clip_min."""
    batches, args = [], arguments(tmp_path, max_steps=2, **MIXED[way])
    model = model_for()
    reference = copy.deepcopy(model).train()
    trainer = trainer_for(model, args, without_personas(PAIRS))
    collator = trainer.data_collator
    trainer.data_collator = lambda pairs: (batches.append(pairs), collator(pairs))[1]
    trainer.train()
    assert {len(pair["passages"]) > 0 for batch in batches[:2] for pair in batch} == {True, False}
    expected = plain_loop(reference, batches[:2], [args.loss] * 2)
    torch.testing.assert_close(
        torch.tensor(logged(trainer, "loss", "grad_norm")), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )


def test_rows_without_a_persona_have_the_same_loss_if_personas_are_detached(tmp_path):
    losses = {}
    for grad in ("full", "none"):
        memory = MemoryConfig(persona_grad=grad)
        trainer = trainer_for(model_for(), arguments(tmp_path, max_steps=1, memory=memory), without_personas(PAIRS))
        trainer.train()
        losses[grad] = logged(trainer, "loss")[0][0]
    assert losses["full"] == pytest.approx(losses["none"], rel=1e-5)


class Waiting(TrainerCallback):
    """Records what would wait for a GPU, from the beginning of the second step to the end of the third."""

    def __init__(self):
        self.waits = Waits()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.waits.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.waits.close()


def attention_that_looks(module, query, key, value, mask, position_ids=None, **kwargs):
    """Looks in each layer whether rows are packed, as flash attention does."""
    assert not flash._is_packed_sequence(position_ids, query.shape[0])
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


ONE_SEQUENCE = {"per_device_train_batch_size": 1, CHECKPOINTING: True}
ONE_BY_ONE = {"memory": MemoryConfig(branches_per_forward=1), "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("attention", "options"),
    [("sdpa", {}), pytest.param("sdpa", ONE_SEQUENCE, marks=pytest.mark.slow),
     pytest.param("looks", ONE_SEQUENCE, marks=pytest.mark.slow),
     pytest.param("looks", ONE_BY_ONE, marks=pytest.mark.slow),
     ("looks", ONE_BY_ONE | {CHECKPOINTING: True}), ("sdpa", {"loss": LossConfig(objective="entce")}),
     ("sdpa", {"memory": MemoryConfig(persona_grad="none")}), ("sdpa", {"loss": LossConfig(normalize="batch")})],
    ids=["plain", "checkpointing", "flash", "flash, requests", "flash, requests, checkpointing", "entce",
         "persona_grad none", "normalized"],
)  # fmt: skip
def test_no_step_between_two_logs_waits_for_the_device(tmp_path, attention, options, monkeypatch):
    AttentionInterface.register("looks", attention_that_looks)
    AttentionMaskInterface.register("looks", sdpa_mask)
    monkeypatch.setattr("perce.model.prefill._check_attention", lambda *_: None)  # it knows flash attention by name
    model, waiting = model_for("lora"), Waiting()
    model.get_base_model().set_attn_implementation(attention)
    args = arguments(tmp_path, max_steps=4, logging_steps=4, gradient_accumulation_steps=2, **options)
    pairs = [pair | {"conversation": number, "persona": number} for number, pair in enumerate(PAIRS * 2)]
    trainer = trainer_for(model, args, pairs=pairs)
    trainer.add_callback(waiting)
    try:
        trainer.train()
    finally:
        waiting.waits.close()
    products = 2 if options.get("loss", LossConfig()).objective == "entce" else 1  # calls of the op in a batch
    assert waiting.waits.places == ["the op's rows"] * 2 * 2 * products


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_compiled_steps_are_the_same(tmp_path, kind):
    history = []
    for compiled in (False, True):
        trainer = trainer_for(model_for(kind), arguments(tmp_path, max_steps=2, torch_compile=compiled))
        trainer.train()
        history.append(logged(trainer, "loss", "grad_norm", "pir_mean"))
    torch.testing.assert_close(*map(torch.tensor, history), atol=1e-5, rtol=1e-5)


def train_split(directory, split, key):
    """A run of RUNS, its batch divided by accumulation, and over the processes of this group."""
    torch.manual_seed(0)
    batch, accumulation = (int(size) for size in split.split("x")[:2])
    kind, options = RUNS[key]
    loss = {name: value for name, value in options.items() if name not in ("memory", "weights")}
    weights = options.get("weights", [1.0])
    pairs = [{**pair, "data_weight": weights[i % len(weights)]} for i, pair in enumerate(PAIRS[:16])]
    args = arguments(
        directory, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=2,
        loss=LossConfig(clip_min=0.05, **loss), memory=MemoryConfig(**options.get("memory", {})),
    )  # fmt: skip
    trainer = trainer_for(model_for(kind), args, pairs=pairs, eval_dataset=Dataset.from_list(PAIRS[:7]))
    trainer.train()
    metrics = trainer.evaluate()
    history = logged(trainer, "loss", "grad_norm")
    names = ("eval_loss_with_persona", "eval_loss_without_persona", "eval_loss_personal_tokens", "eval_pir_mean")
    return {"steps": history, "eval": [metrics[name] for name in names]}


RUNS = {
    "full": ("full", {}), "lora": ("lora", {}), "ce": ("full", {"objective": "ce"}),
    "sequence": ("full", {"normalize": "sequence"}), "random": ("full", {"objective": "random"}),
    "batch": ("full", {"normalize": "batch", "clip_schedule": "rising"}),
    "detached": ("lora", {"memory": {"persona_grad": "none"}}),
    "weighted": ("full", {"normalize": "batch", "weights": [1.0, 0.25, 3.0]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undivided batch of 8, for each kind of run that is compared with it."""
    return functools.cache(lambda key: train_split(tmp_path_factory.mktemp("whole"), "8x1", key))


# Every split and every kind of run once; with `make slow` each kind of run in one process and in two.
OF_ONE = [("4x2", "full"), ("1x8", "full"), ("2x4", "ce"), ("2x4", "detached")]
OF_TWO = [
    ("4x1x2", "full"),
    ("1x4x2", "lora"),
    *(("2x2x2", key) for key in ("sequence", "batch", "weighted", "random")),
]
MORE_OF_ONE = [("2x4", key) for key in ("full", "lora", "sequence", "batch", "weighted", "random")]
MORE_OF_TWO = [("1x4x2", "full"), *(("2x2x2", key) for key in ("full", "lora", "ce", "detached"))]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_OF_ONE + MORE_OF_TWO]


def by_two(directory, cases):
    """Results of cases that run one after the other in the same two processes."""
    return result_of_ranks("tests.perce.training.test_trainer", 2, directory, *map("-".join, cases))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return by_two(tmp_path_factory.mktemp("two"), OF_TWO)


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory):
    return by_two(tmp_path_factory.mktemp("two"), MORE_OF_TWO)


@pytest.mark.parametrize(("split", "key"), [*OF_ONE, *OF_TWO, *SLOW])
def test_every_split_of_a_batch_trains_the_same(request, tmp_path, whole, split, key):
    if split.count("x") == 2:
        result = request.getfixturevalue("of_two" if (split, key) in OF_TWO else "more_of_two")[f"{split}-{key}"]
    else:
        result = train_split(tmp_path, split, key)
    for name in ("steps", "eval"):
        torch.testing.assert_close(torch.tensor(result[name]), torch.tensor(whole(key)[name]), atol=1e-5, rtol=1e-5)


def test_a_detached_persona_changes_the_gradient_only(whole):
    lora, detached = (torch.tensor(whole(key)["steps"]) for key in ("lora", "detached"))
    torch.testing.assert_close(detached[0, 0], lora[0, 0], atol=1e-6, rtol=1e-6)  # the loss before any step
    assert ((detached - lora)[:, 1] / lora[:, 1]).abs().min() > 1e-3, "the gradient's norm differs"


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
def test_resume_in_the_second_epoch_is_bitwise_equal(tmp_path, options):
    def weights(directory, **more):
        loss = LossConfig(clip_min=0.05, clip_schedule="rising")
        # Five steps are an epoch.
        args = arguments(directory, loss=loss, max_steps=9, save_strategy="steps", save_steps=7, **options)
        trainer = trainer_for(model_for("lora", dropout=0.3), args)
        trainer.train(**more)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, trainer

    straight, trainer = weights(tmp_path / "a")
    resumed, again = weights(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert logged(trainer, "loss", "grad_norm") == logged(again, "loss", "grad_norm")


def test_the_counterfactual_pass_has_no_dropout(tmp_path):
    with pytest.warns(UserWarning, match=r"Dropout of 0\.5 in the adapter .* PIR is a little too low"):
        trainer = trainer_for(model_for("lora", dropout=0.5), arguments(tmp_path))
    model = trainer.model.train()
    batch = trainer.data_collator(PAIRS[:2])
    first = counterfactual_hidden(model, batch)
    assert torch.equal(first, counterfactual_hidden(model, batch))
    assert model.training and not first.requires_grad


@pytest.mark.parametrize(
    ("options", "middle"),
    [({}, (0.9, 3.0)), ({"clip_min": 2.0, "clip_max": 4.0}, (1.5, 2.5)), ({"objective": "longce"}, (0.5, 3.0))],
)
def test_a_schedule_moves_both_bounds_between_one_and_their_own(options, middle):
    def bounds(schedule, progress):
        loss = LossConfig(clip_schedule=schedule, **options).at(progress)
        return loss.weighting.clip_min, loss.weighting.clip_max

    own = bounds("constant", 0.0)
    assert bounds("constant", 1.0) == own
    assert [bounds("rising", x) for x in (0.0, 0.5, 1.0)] == [(1, 1), pytest.approx(middle), own]
    assert [bounds("falling", x) for x in (0.0, 0.5, 1.0)] == [own, pytest.approx(middle), (1, 1)]


RATIO = {"contrast": "ratio", "clip_min": 0.0}


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        ({}, {"clip_min": 0.2}), (RATIO, RATIO | {"clip_max": 1.0}), ({}, {"contrast": "ratio"}),
        ({}, {"normalize": "batch"}), ({"clip_min": 0.01}, {"clip_min": 0.01, "normalize": "sequence"}),
    ],
)  # fmt: skip
def test_every_loss_option_changes_the_step(tmp_path, base, changed):
    def first_step(options):
        trainer = trainer_for(model_for("full"), arguments(tmp_path, max_steps=1, loss=LossConfig(**options)))
        trainer.train()
        return logged(trainer, "loss", "grad_norm")[0]

    assert first_step(changed) != first_step(base)


ROWS = [{"persona": [f"I am {i}."], "query": "Who are you?", "response": f"I am number {i}."} for i in range(6)]


def test_raw_rows_a_path_and_a_peft_config(tmp_path):
    path = save_tiny_model(tmp_path / "model")
    rows = [{"profile": row["persona"], "q": row["query"], "output": row["response"]} for row in ROWS]
    args = arguments(
        tmp_path / "run",
        max_steps=2,
        data=DataConfig(columns="persona=profile,query=q,response=output", max_length=900),
    )
    trainer = PerceTrainer(
        str(path), args, train_dataset=Dataset.from_list(rows), eval_dataset=rows[:2], peft_config=LoraConfig(**LORA)
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss_with_persona"] > 0
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_config.json").exists() and (tmp_path / "run" / "tokenizer.json").exists()
    json.dumps(args.to_dict())  # experiment loggers do this


def test_a_bad_raw_row_is_named(tmp_path):
    row = {"persona": "p", "query": "q", "response": "r"}
    with pytest.raises(UserError, match=r"train_dataset row 2.*response"):
        PerceTrainer(
            tiny_model(), arguments(tmp_path), processing_class=tiny_tokenizer(),
            train_dataset=[row, row | {"response": ""}],
        )  # fmt: skip


def test_a_model_by_path_is_trained_in_fp32_whatever_it_is_saved_in(tmp_path):
    path = save_tiny_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    dtypes = {}
    for kind, options in {"full": {}, "adapter": {"peft_config": LoraConfig(**LORA)}}.items():
        trainer = PerceTrainer(str(path), arguments(tmp_path / kind, bf16=True), train_dataset=ROWS, **options)
        dtypes[kind] = {p.dtype for p in trainer.model.parameters() if p.requires_grad == (kind == "full")}
    assert dtypes == {"full": {torch.float32}, "adapter": {torch.bfloat16}}


def test_ligers_own_loss_is_always_off(tmp_path):
    config = arguments(
        tmp_path, liger_kernel_config={"rope": True, "fused_linear_cross_entropy": True}
    ).liger_kernel_config
    assert config == {"rope": True, "fused_linear_cross_entropy": False, "cross_entropy": False}
    tiled = arguments(tmp_path, memory=MemoryConfig(mlp_tile=64)).liger_kernel_config
    assert tiled["swiglu"] is tiled["geglu"] is False and not {"swiglu", "geglu"} & config.keys()


def test_several_evaluation_sets_and_the_usual_metric_name(tmp_path):
    sets = {"short": Dataset.from_list(PAIRS[:3]), "raw": [{"persona": "p", "query": "q", "response": "r"}]}
    trainer = trainer_for(model_for("full"), arguments(tmp_path, max_steps=1), eval_dataset=sets)
    metrics = trainer.evaluate()
    assert metrics["eval_short_loss"] == metrics["eval_short_loss_with_persona"] > 0 and metrics["eval_raw_loss"] > 0
    assert trainer.evaluate("short")["eval_loss"] == metrics["eval_short_loss"]
    without = trainer_for(model_for("full"), arguments(tmp_path))
    for asked, name in ((trainer, "long"), (without, "long"), (without, None)):
        with pytest.raises(UserError, match=f"^eval_dataset: expected a dataset, or the name of one .* got {name!r}"):
            asked.evaluate(name)


def test_numbers_before_and_after_training_are_of_the_same_precision(tmp_path):
    """With autocast too, a learning rate near zero must change nothing in an evaluation."""
    args = arguments(tmp_path, bf16=True, learning_rate=1e-30, max_steps=1)
    trainer = trainer_for(model_for("full"), args, eval_dataset=Dataset.from_list(PAIRS[:7]))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_pir_mean"] == after["eval_pir_mean"] and before["eval_loss"] == after["eval_loss"]
    exact = trainer_for(model_for("full"), arguments(tmp_path), eval_dataset=Dataset.from_list(PAIRS[:7])).evaluate()
    assert before["eval_loss"] != exact["eval_loss"], "bf16 was not in use"


def test_a_stream_is_read_whole_to_be_evaluated(tmp_path):
    """By datasets or by torch, and of one example after the other: what is known of a list is known of it."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(PAIRS[:7])

    trainer = trainer_for(model_for("full"), arguments(tmp_path), eval_dataset=Stream())
    expected = trainer.evaluate(Dataset.from_list(PAIRS[:7]))
    for stream in (None, Stream(), IterableDataset.from_generator(lambda: iter(PAIRS[:7]))):
        assert trainer.evaluate(stream)["eval_loss"] == expected["eval_loss"] and len(trainer.last_evaluation) == 7


@pytest.mark.parametrize(
    ("stream", "said"),
    [(IterableDataset.from_generator(lambda: iter(())), "at least one example"),
     (PairStream(PairSource([], None, False), 0), "never ends")],
)  # fmt: skip
def test_a_stream_of_nothing_or_without_an_end_is_not_evaluated(tmp_path, stream, said):
    with pytest.raises(UserError, match=f"^eval_dataset: .*{said}"):
        trainer_for(model_for("full"), arguments(tmp_path), eval_dataset=stream)


if __name__ == "__main__":  # one rank of by_two
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    finish_rank(directory, {case: train_split(directory / case, *case.split("-")) for case in sys.argv[2:]})
