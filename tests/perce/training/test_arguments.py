"""PerceArguments: options that need a GPU, and how options of a command line become it."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from perce import MemoryConfig, PerceArguments, UserError
from perce.config.commands import parse_args
from perce.model.memory import CHECKPOINTING
from perce.train import resolve
from perce.training.arguments import settle_device, training_arguments
from tests.helpers import ROOT
from tests.helpers.trainers import arguments, model_for, trainer_for


def on_a_gpu(**options):
    loaders = SimpleNamespace(non_blocking=False)
    fields = {
        "dataloader_pin_memory": True, "use_liger_kernel": False, "accelerator_config": loaders,
        "memory": MemoryConfig(),
    }  # fmt: skip
    return SimpleNamespace(**({"device": torch.device("cuda")} | fields | options))


TEXTS = (
    "metric_for_best_model", "report_to", "optim", "lr_scheduler_type", "debug", "torch_compile_backend", "deepspeed",
)  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(("flag", "got"), [("", "True"), ("=", "''"), ("=false", "False")])
def test_a_field_of_texts_needs_a_value(name, flag, got):
    """A flag without a value is true, as for fields that are true or false."""
    with pytest.raises(UserError, match=f"^{name}: expected a value, got {got}"):
        training_arguments(resolve(parse_args([f"--{name}{flag}", "--output_dir=run"])[0]))


def test_none_is_no_name_of_a_logger_or_metric(tmp_path):
    for none in ("None", "none", "null"):
        flags = [f"--report_to={none}", f"--metric_for_best_model={none}", f"--output_dir={tmp_path}", "--use_cpu"]
        args = training_arguments(resolve(parse_args(flags)[0]))
        assert args.report_to in ("none", []) and args.metric_for_best_model is None


def test_an_empty_metric_is_no_metric(tmp_path):
    with pytest.raises(UserError, match=r"metric_for_best_model: expected one of eval_loss, .*, got ''"):
        PerceArguments(str(tmp_path), use_cpu=True, metric_for_best_model="")


def test_offload_needs_a_transformers_that_has_it(monkeypatch):
    monkeypatch.setattr("perce.training.arguments.CHECKPOINTING", "gradient_checkpointing")
    with pytest.raises(UserError, match=r"activation_offload: .*transformers 5\.23"):
        settle_device(on_a_gpu(memory=MemoryConfig(activation_offload=True), gradient_checkpointing=True))


@pytest.mark.skipif(CHECKPOINTING == "gradient_checkpointing", reason="transformers before 5.23 does not offload")
def test_offload_needs_a_gpu_and_checkpointing(tmp_path):
    with pytest.raises(UserError, match="on a CPU, whose activations are in host memory"):
        arguments(tmp_path, memory=MemoryConfig(activation_offload=True))
    fields = {CHECKPOINTING: False, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    args = on_a_gpu(memory=MemoryConfig(activation_offload=True), **fields)
    with pytest.raises(UserError, match="Add --activation_checkpointing"):
        settle_device(args)
    setattr(args, CHECKPOINTING, True)
    settle_device(args)
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False, "offload": True}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("pinned", [True, False])
def test_batches_in_pinned_memory_are_sent_to_a_gpu_without_waiting_for_it(device, pinned):
    args = on_a_gpu(device=torch.device(device), dataloader_pin_memory=pinned)
    settle_device(args)
    assert args.accelerator_config.non_blocking is (pinned and device == "cuda")


def test_parsers_of_others_change_no_type():
    """transformers' argument parser replaces the types of the fields in all classes, permanently."""
    HfArgumentParser((TrainingArguments,))
    config = resolve(parse_args(["--include_num_input_tokens_seen", "nope"])[0])
    with pytest.raises(UserError, match=r"include_num_input_tokens_seen: .*no, all, True"):
        training_arguments(config)


def test_no_in_a_yaml_file_is_a_strategy(tmp_path):
    """YAML takes it for false."""
    (tmp_path / "c.yaml").write_text("eval_strategy: no\nsave_strategy: no\nlogging_strategy: no\n")
    args = training_arguments(resolve(parse_args(["--config", str(tmp_path / "c.yaml")])[0]))
    assert {args.eval_strategy, args.save_strategy, args.logging_strategy} == {"no"}
    (tmp_path / "c.yaml").write_text("eval_strategy: no\neval_steps: 2\n")
    with pytest.raises(UserError, match="eval_steps: has no effect with --eval_strategy no"):
        training_arguments(resolve(parse_args(["--config", str(tmp_path / "c.yaml")])[0]))


def test_optim_args_are_no_mapping(tmp_path):
    (tmp_path / "c.yaml").write_text("optim_args: {eps: 1e-6}\n")
    with pytest.raises(UserError, match=r"optim_args: expected name=value,name=value, got \{'eps': 1e-06\}"):
        training_arguments(resolve(parse_args(["--config", str(tmp_path / "c.yaml")])[0]))


def test_ligers_kernels_are_refused_on_a_cpu(tmp_path):
    with pytest.raises(UserError, match="use_liger_kernel"):
        arguments(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ligers_kernels_leave_our_forwards_in_place(tmp_path, monkeypatch, lora):
    """The Trainer patches Liger's kernels into the model when training begins, after perce's patch."""
    pytest.importorskip("liger_kernel")
    for name in ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = model_for("lora" if lora else "full")
    base = model.get_base_model() if lora else model
    trainer = trainer_for(model, arguments(tmp_path, memory=MemoryConfig(mlp_tile=32)))
    layer = base.model.layers[0]
    before = [module.forward.__func__ for module in (base, base.lm_head, layer.mlp)]
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    assert [module.forward.__func__ for module in (base, base.lm_head, layer.mlp)] == before
    assert "Liger" in layer.input_layernorm.forward.__func__.__qualname__, "its other kernels are in use"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_options_that_the_trainer_takes(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.training.arguments.check_parallelism", lambda _: None)  # FSDP is refused without a GPU
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the Trainer sets it: put back afterwards
    config = resolve(parse_args(["--config", str(recipe), "--output_dir", str(tmp_path), "--precision", "fp32"])[0])
    args = training_arguments(config)
    if args.fsdp:
        plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        assert plugin.fsdp_version == 2 and plugin.activation_checkpointing
        assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"


def test_uneven_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"accelerator_config: .*even_batches"):
        arguments(tmp_path, accelerator_config={"even_batches": False})


@pytest.mark.parametrize(("section", "kind"), [("loss", "Loss"), ("data", "Data"), ("memory", "Memory")])
def test_a_section_is_refused_by_name_if_it_is_a_name_or_a_mapping(tmp_path, section, kind):
    for wrong in ("ce", {"objective": "ce"}, None):
        with pytest.raises(UserError, match=f"^{section}: expected a perce.{kind}Config, got"):
            PerceArguments(str(tmp_path), use_cpu=True, **{section: wrong})


def test_a_number_is_no_accelerator_config(tmp_path):
    """transformers would take it for an open file, and close it: 1 and true are stdout."""
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UserError, match=f"accelerator_config: expected a mapping.*, got {handle}"):
        arguments(tmp_path, accelerator_config=handle)
    os.close(handle)


def test_ligers_kernels_are_chosen_on_the_command_line_too(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--precision", "fp32", '--liger_kernel_config={"rope": false}']
    config = training_arguments(resolve(parse_args(flags)[0])).liger_kernel_config
    assert config == {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False}


def test_unused_parameters_are_looked_for_where_that_is_asked(tmp_path):
    """It is not the default, because it walks the graph of every step."""
    flags = ["--output_dir", str(tmp_path), "--precision", "fp32"]
    for given, value in (([], False), (["--ddp_find_unused_parameters", "true"], True)):
        args = training_arguments(resolve(parse_args([*flags, *given])[0]))
        assert args.ddp_find_unused_parameters is value
    assert arguments(tmp_path).ddp_find_unused_parameters is False
    assert arguments(tmp_path, ddp_find_unused_parameters=True).ddp_find_unused_parameters is True


def test_checkpointing_arguments_are_taken_by_their_older_name(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--activation_checkpointing", "--precision", "fp32"]
    given = ['--gradient_checkpointing_kwargs={"preserve_rng_state": false}']
    args = training_arguments(resolve(parse_args([*flags, *given])[0]))
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False, "preserve_rng_state": False}
