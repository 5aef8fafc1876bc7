"""The verdict of a plan, and the fastest options that fit, as a perce.train command."""

import shlex
from dataclasses import replace

import pytest

from perce import MemoryConfig
from perce.config.commands import TRAIN, PlanOptions
from perce.config.schema import ModelConfig
from perce.config.step import StepConfig
from perce.planning import ways
from perce.planning.ways import command, fastest
from perce.train import resolve
from tests.helpers.plans import FULL, LORA, SHORT

BIG = replace(SHORT, per_device_train_batch_size=4, gradient_accumulation_steps=2)


def peak(options):
    """A made-up peak, which each option reduces."""
    step, memory = options.step, options.memory
    size = 100 * step.per_device_train_batch_size // (4 if step.activation_checkpointing else 1)
    size -= 10 * bool(memory.mlp_tile) + 5 * memory.activation_offload
    size //= 2 if memory.persona_grad == "none" else 1
    return size + (10 if options.model.load_in_4bit else 40)


def work(options):
    step, memory = options.step, options.memory
    return 100 + 30 * step.activation_checkpointing + 10 * bool(memory.mlp_tile) - 60 * (memory.persona_grad == "none")


def found(room, options=None, device="cuda"):
    options = options or PlanOptions(LORA, BIG)
    chosen = fastest(options, device, room, peak, work)
    return chosen and command(chosen).split("DATA ")[1]


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (440, "--max_length 96 --per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
        (430, "--max_length 96 --per_device_train_batch_size 1 --gradient_accumulation_steps 8"),
        (139, "--max_length 96 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --mlp_tile 1024"),
        (64, "--max_length 96 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 "
             "--activation_checkpointing --activation_offload"),
        (49, "--max_length 96 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --persona_grad none "
             "--mlp_tile 1024 --activation_checkpointing"),
    ],
)  # fmt: skip
def test_the_fastest_that_fits_is_found(room, expected):
    """Options that change what is learned are taken only if nothing else fits; among the others the fastest is."""
    text = found(room)
    assert text is not None
    flags = text.split(" --lora_r 4 ")[-1] if "--lora_r" in text else text
    assert {*shlex.split(expected)} <= {*shlex.split(flags)}


def test_options_that_are_not_needed_are_left_out():
    wish = PlanOptions(LORA, replace(BIG, activation_checkpointing=True), MemoryConfig(mlp_tile=512))
    text = found(10**6, wish)
    assert "--activation_checkpointing" not in text and "--mlp_tile" not in text


def test_where_nothing_fits_there_is_no_command():
    assert found(1) is None


def test_a_batch_of_one_may_take_more():
    """Accumulated gradients are alive during the next forward: if all weights train, they take one copy of them."""
    whole = PlanOptions(FULL, replace(SHORT, per_device_train_batch_size=4, gradient_accumulation_steps=1))
    chosen = fastest(whole, "cpu", 70, lambda way: 95 if way.step.forwards > 1 else 60, work)
    assert chosen and chosen.step.per_device_train_batch_size == 4 and chosen.memory == MemoryConfig()


def test_what_a_run_would_refuse_is_not_proposed():
    full = list(ways.candidates(PlanOptions(FULL, SHORT), "cuda"))
    assert not any(options.model.load_in_4bit for options in full), "4-bit weights need adapters"
    cpu = list(ways.candidates(PlanOptions(LORA, SHORT), "cpu"))
    assert not any(options.model.load_in_4bit or options.memory.activation_offload for options in cpu)
    documents = StepConfig(context=60, objective="longce", short_context=16, short_stride=4)
    longce = list(ways.candidates(PlanOptions(LORA, documents), "cuda"))
    assert not any(options.memory.persona_grad == "none" for options in longce)


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(LORA, BIG),
        PlanOptions(LORA, replace(BIG, devices=2)),
        PlanOptions(
            ModelConfig("hub/m", lora_r=8, precision="bf16", attn_implementation="eager", backend="torch"),
            replace(BIG, objective="nextquill", estimate="frozen", devices=8), MemoryConfig(mlp_tile=7),
        ),
        PlanOptions(FULL, StepConfig(context=60, objective="longce", short_context=16, short_stride=4, devices=2)),
        PlanOptions(LORA, replace(BIG, replies=2, branches=True)),
    ],
)  # fmt: skip
def test_train_takes_every_command(options, monkeypatch, tmp_path):
    """perce.train accepts every proposed command and begins its run, in as many processes as the command names."""
    monkeypatch.chdir(tmp_path)
    for way in ways.candidates(options, "cuda"):
        launcher, argv = command(way).split(" -m perce.train ")
        monkeypatch.setenv("WORLD_SIZE", launcher.partition("torchrun --nproc_per_node ")[2] or "1")
        taken = resolve(TRAIN.build(TRAIN.parse(shlex.split(argv)).raw))
        step, run, loss = way.step, taken.run, taken.loss
        assert (taken.model, taken.memory, taken.data.max_length) == (way.model, way.memory, step.context)
        assert (loss.objective, loss.estimate, loss.short_context, loss.short_stride) == (
            step.objective, step.estimate, step.short_context, step.short_stride,
        )  # fmt: skip
        assert (
            run.per_device_train_batch_size, run.gradient_accumulation_steps, run.activation_checkpointing
        ) == (step.per_device_train_batch_size, step.forwards, step.activation_checkpointing)  # fmt: skip


def test_a_conversation_is_read_whole_or_reply_by_reply():
    options = PlanOptions(LORA, replace(BIG, context=97, per_device_train_batch_size=8, replies=4, branches=True))
    steps = {
        (way.step.per_device_train_batch_size, way.step.replies, way.step.branches, way.step.forwards)
        for way in ways.candidates(options, "cpu")
    }
    assert steps == {(8, 4, True, 2), (4, 4, True, 4), (1, 1, False, 16)}


def test_the_command_is_one_of_train():
    model = ModelConfig(model="a dir/m", lora_r=8, precision="bf16", load_in_4bit=True)
    step = replace(BIG, objective="lossce", activation_checkpointing=True, devices=2)
    text = command(PlanOptions(model, step, MemoryConfig("none", mlp_tile=7)))
    run, *argv = shlex.split(text.replace("torchrun --nproc_per_node 2 -m perce.train", "train"))
    options = TRAIN.build(TRAIN.parse(argv).raw)
    assert run == "train" and options.model == model and options.memory == MemoryConfig("none", mlp_tile=7)
    assert (options.loss.objective, options.data.max_length, options.run.activation_checkpointing) == (
        "lossce",
        96,
        True,
    )
    assert (options.run.per_device_train_batch_size, options.run.gradient_accumulation_steps) == (4, 2)
    assert command(PlanOptions(FULL, SHORT)).startswith("python -m perce.train --data DATA ")
