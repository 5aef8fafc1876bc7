"""PerceArguments: options that need a GPU, options that are always off, and options that would have no effect."""

import ast
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from perce import DataConfig, MemoryConfig, PerceTrainer, UserError
from perce.config.commands import parse_args
from perce.model.memory import CHECKPOINTING
from perce.train import resolve
from perce.training.arguments import NOT_READ, OURS, settle_device, training_arguments
from perce.training.resumable import ResumableTrainer
from tests.helpers import ROOT
from tests.helpers.trainers import arguments, model_for, trainer_for
from tests.helpers.training import fails


def on_a_gpu(**options):
    loaders = SimpleNamespace(non_blocking=False)
    fields = {
        "dataloader_pin_memory": True, "use_liger_kernel": False, "accelerator_config": loaders,
        "memory": MemoryConfig(),
    }  # fmt: skip
    return SimpleNamespace(**({"device": torch.device("cuda")} | fields | options))


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
    with pytest.raises(UserError, match=r"include_num_input_tokens_seen: .*non_padding"):
        training_arguments(config)


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


# ---- fields that nothing reads

REACHED_BY_REPLACED_METHODS_ALONE = {"prediction_step", "predict", "get_test_dataloader"}


def replaced_methods():
    """Methods of the Trainer that PerceTrainer replaces without calling them."""
    for name, method in {**vars(ResumableTrainer), **vars(PerceTrainer)}.items():
        source = inspect.getsource(method) if inspect.isfunction(method) else ""
        if hasattr(Trainer, name) and source and "super()" not in source and "Trainer." not in source:
            yield name


def read_in(path, replaced):
    """Fields of TrainingArguments that a module of transformers reads, except in `replaced` and in their setters."""
    own, found = path.name == "training_args.py", set()

    def visit(node):
        if isinstance(node, ast.FunctionDef) and (node.name in replaced or (own and node.name.startswith("set_"))):
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = getattr(node.value, "id", None) or getattr(node.value, "attr", None) or ""
            if of.endswith("args") or (own and of == "self"):
                found.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_field_is_read_or_refused():
    """A field that a new version of transformers adds, and that our Trainer would not read, is noticed here."""
    root, replaced = Path(transformers.__file__).parent, {*replaced_methods(), *REACHED_BY_REPLACED_METHODS_ALONE}
    assert {"compute_loss", "evaluation_loop"} <= replaced and "training_step" not in replaced
    modules = [*root.glob("trainer*.py"), *root.glob("integrations/*.py"), root / "training_args.py"]
    left_out = ("trainer_seq2seq.py", "trainer_jit_checkpoint.py")
    read = set().union(*(read_in(path, replaced) for path in modules if path.name not in left_out))
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {"prediction_loss_only", "do_train"}.isdisjoint(read) and {"max_grad_norm", "run_name"} <= read
    ours = {*NOT_READ, *OURS, "gradient_checkpointing_kwargs"}  # the last is passed on under its newer name
    assert fields - read - ours == set() and set(NOT_READ) <= fields


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ("--resume_from_checkpoint=x", ["resume_from_checkpoint", "--resume"]),
        ("--do_train", ["do_train"]), ("--do_eval", ["--eval_strategy"]), ("--do_predict", ["perce.evaluate"]),
        ("--fp16_full_eval", ["--precision"]), ("--bf16_full_eval=false", ["bf16_full_eval", "--precision"]),
        ("--remove_unused_columns", ["remove_unused_columns"]), ("--label_names=labels", ["label_names"]),
        ("--prediction_loss_only", ["last_evaluation"]), ("--average_tokens_across_devices=false", ["processes"]),
        ("--enable_jit_checkpoint", ["SIGTERM"]), ("--logging_nan_inf_filter", ["diverge"]),
        ("--optim_args=momentum=0.9", ["momentum", "adamw_torch_fused"]),
        ("--optim=sgd --optim_args=momentun=0.9", ["optim_args", "momentun", "sgd"]),
        ("--optim=sgd --optim_args=momentum", ["optim_args", "name=value"]),
        ("--optim=sgd --adam_beta1=0.8", ["adam_beta1", "sgd"]),
        ("--optim=sgd --adam_beta1=0.5", ["adam_beta1", "sgd"]),
        ("--optim_target_modules=all-linear", ["optim_target_modules", "adamw_torch_fused"]),
        ("--streaming --max_steps=2 --data_seed=3", ["data_seed", "--seed"]),
        ("--tokens_per_batch=700 --train_sampling_strategy=group_by_length", ["train_sampling_strategy"]),
        ("--tokens_per_batch=700 --dataloader_drop_last", ["dataloader_drop_last", "--tokens_per_batch"]),
        ("--streaming --max_steps=2 --dataloader_drop_last", ["dataloader_drop_last", "--streaming"]),
        ("--auto_find_batch_size", ["auto_find_batch_size", "perce.plan"]),
        ("--lr_scheduler_type=constant --lr_scheduler_kwargs={}", ["lr_scheduler_kwargs", "constant"]),
        ("--eval_steps=5 --eval_strategy=epoch", ["eval_steps", "--eval_strategy epoch"]),
        ("--save_steps=5 --save_strategy=epoch", ["save_steps", "--save_strategy epoch"]),
        ("--logging_steps=5 --logging_strategy=epoch", ["logging_steps", "--logging_strategy epoch"]),
        ("--eval_steps=5 --eval_strategy=no", ["eval_steps", "--eval_strategy no"]),
        ("--save_steps=5 --save_strategy=no", ["save_steps", "--save_strategy no"]),
        ("--logging_steps=5 --logging_strategy=no", ["logging_steps", "--logging_strategy no"]),
        ("--warmup_steps=5 --lr_scheduler_type=constant", ["warmup_steps", "--lr_scheduler_type constant"]),
        ("--run_name=x", ["run_name", "--report_to"]), ("--dataloader_in_order=false", ["dataloader_num_workers"]),
        ("--hub_model_id=me/x", ["hub_model_id", "--push_to_hub"]), ("--fsdp_config={}", ["fsdp_config", "--fsdp"]),
        ("--gradient_checkpointing_kwargs={}", ["checkpointing_kwargs", "--activation_checkpointing"]),
    ],
)  # fmt: skip
def test_a_field_without_an_effect_is_refused_with_the_remedy(train, tmp_path, flags, fragments):
    fails(train(*flags.split()), *fragments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", ["--weight_decay=-1", "--report_to=nobody"])
def test_a_field_that_nothing_reads_is_told_before_other_mistakes(tmp_path, other):
    config = resolve(parse_args(["--output_dir", str(tmp_path), other, "--bf16_full_eval=false"])[0])
    with pytest.raises(UserError, match=r"^bf16_full_eval: has no effect here"):
        training_arguments(config)


def test_fields_without_an_effect_are_refused_in_python_too(tmp_path):
    for name, value in {
        "do_train": True, "label_names": ["x"], "remove_unused_columns": True,
        "eval_accumulation_steps": 2, "resume_from_checkpoint": "x", "logging_nan_inf_filter": True,
        "optim_args": "momentum=0.9", "hub_model_id": "me/x",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=name):
            arguments(tmp_path, **{name: value})
    with pytest.raises(UserError, match="dataloader_drop_last"):
        arguments(tmp_path, data=DataConfig(streaming=True), dataloader_drop_last=True)
    args = arguments(tmp_path, eval_strategy="steps", optim="sgd", optim_args="momentum=0.0,nesterov=no", eval_steps=1)
    assert args.logging_nan_inf_filter is False and args.label_names == []
    again = dataclasses.replace(args, seed=3)  # fields that TrainingArguments have set themselves are accepted
    assert again.seed == 3 and again.loss == args.loss


def test_uneven_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"accelerator_config: .*even_batches"):
        arguments(tmp_path, accelerator_config={"even_batches": False})


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


def test_the_optimiser_gets_what_it_is_given(tmp_path):
    args = arguments(tmp_path, optim="sgd", optim_args="momentum=0.9")
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum"] == 0.9
    assert arguments(tmp_path, adam_beta2=0.5).adam_beta2 == 0.5


def test_checkpointing_arguments_are_taken_by_their_older_name(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--activation_checkpointing", "--precision", "fp32"]
    given = ['--gradient_checkpointing_kwargs={"preserve_rng_state": false}']
    args = training_arguments(resolve(parse_args([*flags, *given])[0]))
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False, "preserve_rng_state": False}
