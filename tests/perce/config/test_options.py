"""Flags, YAML and --print_config."""

import pytest
import yaml

from perce.config.commands import parse_args
from tests.helpers.training import fails


@pytest.mark.parametrize(
    ("flag", "fragments"),
    [
        ("--learning_rat=1e-4", ["learning_rat", "learning_rate"]),
        ("--weight_decay=much", ["weight_decay", "number", "much"]),
        ("--objective=lossy", ["objective", "perce, ce"]),
        ("--max_steps=ten", ["max_steps", "whole number"]),
        ("--clip_min=6", ["clip_min", "6"]),
        ("--objective=lossce --contrast=ratio", ["contrast", "lossce", "ratio"]),
        ("--clip_max=inf", ["clip_max", "finite"]),
        ("--clip_max=nan", ["clip_max", "nan"]),
        ("--precision=fp8", ["precision", "auto, fp32, bf16"]),
        ("--backend=cuda", ["backend", "auto, triton, torch, reference"]),
        ("--lora_dropout=1.5", ["lora_dropout"]),
        ("--chat_template_kwargs={", ["chat_template_kwargs", "JSON"]),
        ("--columns=persona", ["columns"]),
        ("--bf16=true", ["--precision"]),
        ("--streaming", ["max_steps"]),
        ("--tokens_per_batch=0", ["tokens_per_batch", ">= 1"]),
        ("--packing", ["packing", "flash_attention_2", "sdpa on cpu", "--tokens_per_batch"]),
        ("--optim=adamw_bnb_8bit", ["cannot be used here"]),
        ("--seed=-1", ["seed"]),
        ("--mlp_tile=-1", ["mlp_tile", ">= 0"]),
        ("--persona_grad=half", ["persona_grad", "full, none"]),
        ("--activation_offload", ["activation_offload", "CPU"]),
        ("--use_liger_kernel", ["use_liger_kernel", "GPU"]),
        ("stray", ["stray"]),
    ],
)
def test_flags_that_are_off(train, tmp_path, flag, fragments):
    fails(train(*flag.split(), max_steps=None if "max_steps" in flag or flag == "--streaming" else 1), *fragments)
    assert not (tmp_path / "run" / "config.yaml").exists(), "it can be corrected and run again"


def test_a_mistyped_option_leaves_no_directory_behind(train, tmp_path):
    fails(train("--learning_rat=1e-4"), "learning_rat")
    assert not (tmp_path / "run").exists()


def test_flags_that_exclude_each_other(train):
    fails(train("--tokens_per_batch=99", "--per_device_train_batch_size=2"), "tokens_per_batch", "one of them")
    fails(train("--tokens_per_batch=99", "--streaming"), "--streaming, --tokens_per_batch", "read the data whole")


def test_the_clip_of_one_objective_is_not_anothers(train, tmp_path, capsys):
    """A run's options, taken for another objective: what was left open stays open."""
    assert train()[0] == 0
    config, _ = parse_args(["--config", str(tmp_path / "run" / "config.yaml"), "--objective", "longce"], {})
    weighting = config.loss.weighting
    assert (weighting.signal.name, weighting.clip_min, weighting.clip_max) == ("exp(PIR)", 0.0, 5.0)
    for name, clip in (("dft", (0.0, 1.0)), ("ce", (0.8, 5.0))):
        config, _ = parse_args(["--config", str(tmp_path / "run" / "config.yaml"), "--objective", name], {})
        assert (config.loss.weighting.clip_min, config.loss.weighting.clip_max) == clip
    asked, _ = parse_args(["--config", str(tmp_path / "run" / "config.yaml"), "--clip_min", "0.3"], {})
    assert (asked.loss.weighting.clip_min, asked.loss.weighting.clip_max) == (0.3, 5.0)


def test_yaml(train, tmp_path, model, data, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nclip_min: 0.5\nload_in_4bit: false\nweight_decay: 1e-2\n")
    assert train("--config", str(path), "--clip_min", "0.7", "--print_config")[0] == 0
    config, _ = parse_args(["--config", str(path), "--clip_min", "0.7"], {})
    assert (config.run.learning_rate, config.loss.clip_min, config.extra) == (1e-5, 0.7, {"weight_decay": 0.01})
    for content, fragments in {
        "learning_rte: 1e-5": ["learning_rte", "learning_rate"],
        "learning_rate: [1": ["c.yaml", "YAML"],
        "- a": ["c.yaml", "list"],
        "max_steps: 1.5": ["max_steps", "1.5"],
    }.items():
        path.write_text(content)
        fails(train("--config", str(path), max_steps=None), *fragments)
    fails(train("--config", str(tmp_path / "none.yaml")), "none.yaml", "cannot be read")


def test_print_config_names_every_option_and_can_be_read_back(train, tmp_path):
    code, out, _ = train("--print_config", lora_r=2)
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    config, _ = parse_args(["--config", str(path)], {})
    assert code == 0 and config.model.lora_r == 2 and config.to_dict() == yaml.safe_load(out)
    assert not (tmp_path / "run").exists()
