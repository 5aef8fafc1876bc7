"""Fields of TrainingArguments that nothing reads, or that other options leave idle, are refused with the remedy."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import transformers
from transformers import Trainer, TrainingArguments

from perce import DataConfig, PerceTrainer, UserError
from perce.config.commands import parse_args
from perce.train import resolve
from perce.training.arguments import training_arguments
from perce.training.idle import NOT_READ, OURS
from perce.training.resumable import ResumableTrainer
from tests.helpers.trainers import arguments
from tests.helpers.training import fails

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
        ("--tokens_per_batch=700 --train_sampling_strategy=sequential", ["train_sampling_strategy"]),
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
        ("--warmup_steps=5 --lr_scheduler_type=reduce_lr_on_plateau", ["warmup_steps", "reduce_lr_on_plateau"]),
        ("--warmup_steps=5 --lr_scheduler_type=greedy", ["warmup_steps", "--lr_scheduler_type greedy"]),
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


def test_the_optimiser_gets_what_it_is_given(tmp_path):
    args = arguments(tmp_path, optim="sgd", optim_args="momentum=0.9")
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum"] == 0.9
    assert arguments(tmp_path, adam_beta2=0.5).adam_beta2 == 0.5
