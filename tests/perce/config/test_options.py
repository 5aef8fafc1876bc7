"""Flags, YAML, --print_config, and what all commands do when they are stopped."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from perce import DataConfig, UserError, evaluate, plan, score
from perce import train as train_command
from perce.config.commands import EVALUATE, PLAN, SCORE, TRAIN, parse_args
from perce.process import guarded
from perce.training.arguments import training_arguments
from tests.helpers import ROOT
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
        ("--optim=lomo", ["cannot be used here"]),
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
    assert not (tmp_path / "run" / "config.yaml").exists(), "the corrected command can use the same directory"


def test_a_mistyped_option_leaves_no_directory_behind(train, tmp_path):
    fails(train("--learning_rat=1e-4"), "learning_rat")
    assert not (tmp_path / "run").exists()


def test_flags_that_exclude_each_other(train):
    fails(train("--tokens_per_batch=99", "--per_device_train_batch_size=2"), "tokens_per_batch", "one of them")
    fails(train("--tokens_per_batch=99", "--streaming"), "--streaming, --tokens_per_batch", "read the data whole")


def test_the_clip_of_one_objective_is_not_anothers(train, tmp_path, capsys):
    """A run's options used for another objective: options that the user did not set keep that objective's defaults."""
    assert train()[0] == 0
    config, _ = parse_args(["--config", str(tmp_path / "run" / "config.yaml"), "--objective", "longce"])
    weighting = config.loss.weighting
    assert (weighting.signal.name, weighting.clip_min, weighting.clip_max) == ("exp(PIR)", 0.0, 5.0)
    for name, clip in (("dft", (0.0, 1.0)), ("ce", (0.8, 5.0))):
        config, _ = parse_args(["--config", str(tmp_path / "run" / "config.yaml"), "--objective", name])
        assert (config.loss.weighting.clip_min, config.loss.weighting.clip_max) == clip
    asked, _ = parse_args(["--config", str(tmp_path / "run" / "config.yaml"), "--clip_min", "0.3"])
    assert (asked.loss.weighting.clip_min, asked.loss.weighting.clip_max) == (0.3, 5.0)


def test_yaml(train, tmp_path, model, data, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\nclip_min: 0.5\nload_in_4bit: false\nweight_decay: 1e-2\n")
    assert train("--config", str(path), "--clip_min", "0.7", "--print_config")[0] == 0
    config, _ = parse_args(["--config", str(path), "--clip_min", "0.7"])
    assert (config.run.learning_rate, config.loss.clip_min, config.extra) == (1e-5, 0.7, {"weight_decay": "1e-2"})
    for content, fragments in {
        "learning_rte: 1e-5": ["learning_rte", "learning_rate"],
        "learning_rate: [1": ["c.yaml", "YAML"],
        "- a": ["c.yaml", "list"],
        "max_steps: 1.5": ["max_steps", "1.5"],
    }.items():
        path.write_text(content)
        fails(train("--config", str(path), max_steps=None), *fragments)
    fails(train("--config", str(tmp_path / "none.yaml")), "none.yaml", "cannot be read")


@pytest.mark.parametrize("text", ["2024_11_25", "007", "0.50_", "1e3", "1.10", "12e4567", "inf", "12"])
def test_texts_that_look_like_numbers_stay_texts(text, tmp_path):
    """YAML itself reads a text without quotation marks."""
    (tmp_path / "c.yaml").write_text(f'model: "{text}"\noutput_dir: "{text}"\n')
    for argv in (["--config", str(tmp_path / "c.yaml")], ["--model", text, "--output_dir", text]):
        config, _ = parse_args(argv)
        assert (config.model.model, config.run.output_dir) == (text, text)
    for argv in (["--hub_model_id", text], ["--hub-model-id=" + text]):
        assert str(parse_args(argv)[0].extra["hub_model_id"]) == text


def test_numbers_may_be_written_as_python_reads_them():
    config, _ = parse_args(["--max_length", "131_072", "--max_steps", "1_000"])
    assert (config.data.max_length, config.run.max_steps) == (131072, 1000)


def test_numbers_and_booleans_that_came_as_texts(tmp_path):
    (tmp_path / "c.yaml").write_text('max_steps: "7"\nload_in_4bit: "false"\nweight_decay: "1e-5"\nwarmup_steps: .5\n')
    config, _ = parse_args(["--config", str(tmp_path / "c.yaml"), "--learning_rate", "1.", "--max_grad_norm", ".5"])
    assert (config.run.max_steps, config.model.load_in_4bit, config.run.learning_rate) == (7, False, 1.0)
    args = training_arguments(config)
    assert (args.weight_decay, args.max_grad_norm) == (1e-5, 0.5)


def test_truth_values_may_be_written_as_python_writes_them(tmp_path):
    """A text is true for whatever reads a field that takes texts too, such as fsdp."""
    (tmp_path / "c.yaml").write_text('fsdp: "False"\ninclude_num_input_tokens_seen: "True"\n')
    for argv in (["--config", str(tmp_path / "c.yaml")], "--fsdp False --include_num_input_tokens_seen True".split()):
        config, _ = parse_args(argv)
        assert config.extra == {"fsdp": False, "include_num_input_tokens_seen": True}
        args = training_arguments(replace(config, run=replace(config.run, learning_rate=1e-4)))
        assert args.fsdp is False and args.include_num_input_tokens_seen == "all"


def test_a_number_inside_a_mapping_of_a_yaml_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "lr_scheduler_kwargs: {min_lr: 1e-6}\ndeepspeed: {a: {lr: auto, betas: [0.9, 1e-3]}}\nprompt: {header: 1e3}"
    )
    config, _ = parse_args(["--config", str(path)])
    expected = {"lr_scheduler_kwargs": {"min_lr": 1e-6}, "deepspeed": {"a": {"lr": "auto", "betas": [0.9, 1e-3]}}}
    assert config.extra == expected and '"1e3"' in config.data.prompt


def test_a_directory_whose_name_yaml_reads_as_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: 12\noutput_dir: 2024\nresume: true\n")
    config, _ = parse_args(["--config", "c.yaml"])
    assert (config.model.model, config.run.output_dir) == ("12", "2024")
    assert SCORE.build(SCORE.parse(["--config", "c.yaml"]).raw).model.model == "12"


@pytest.mark.parametrize(("value", "text"), [("true", "True"), ("2024-01-31", "2024-01-31"), ("{a: b}", '{"a": "b"}')])
def test_a_path_that_yaml_reads_as_something_else_is_a_text(tmp_path, value, text):
    (tmp_path / "c.yaml").write_text(f"model: {value}\noutput_dir: {value}\nresume: true\n")
    config, _ = parse_args(["--config", str(tmp_path / "c.yaml")])
    assert (config.model.model, config.run.output_dir) == (text, text)
    assert SCORE.build(SCORE.parse(["--config", str(tmp_path / "c.yaml")]).raw).model.model == text


@pytest.mark.parametrize("name", ["model", "output_dir"])
def test_a_list_is_no_path(tmp_path, name):
    (tmp_path / "c.yaml").write_text(f"{name}: [a, b]\nresume: true\n")
    for parse in (parse_args, SCORE.parse)[: 1 + (name == "model")]:
        with pytest.raises(UserError, match=rf"^{name}: expected one text"):
            parse(["--config", str(tmp_path / "c.yaml")])


def test_a_value_that_begins_with_dashes_keeps_them():
    config, _ = parse_args(["--persona-markers", "-- about-me --...", "--output-dir=a-b"])
    assert (config.data.persona_markers, config.run.output_dir) == ("-- about-me --...", "a-b")


def test_print_config_names_every_option_and_can_be_read_back(train, tmp_path):
    code, out, _ = train("--print_config", lora_r=2)
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    config, _ = parse_args(["--config", str(path)])
    assert code == 0 and config.model.lora_r == 2 and config.to_dict() == yaml.safe_load(out)
    assert not (tmp_path / "run").exists()


LONG = "1" + 400 * "0"  # more than a float can hold, and less than what Python refuses to read
NUMBERS = ("nan", "inf", "-inf", "1e308", "9223372036854775808", LONG, f"-{LONG}")


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("option", ["learning_rate", "lora_r", "clip_max", "weight_decay", "data_seed", "eval_delay"])
def test_numbers_are_finite_and_fit(train, option, value):
    whole = option in ("lora_r", "data_seed")
    if value == "9223372036854775808" and not whole:
        return  # 2 ** 63 is a number that fp32 can hold
    fails(train(f"--{option}={value}"), option, "whole number" if whole else "finite number", value.strip("-")[:2])


@pytest.mark.parametrize("command", [SCORE, EVALUATE, PLAN], ids=lambda command: command.prog.split(".")[-1])
def test_every_command_takes_finite_numbers_alone(command, capsys):
    option = next(name for name, hint in command.types.items() if hint in (float, int))
    assert command.main(lambda options: None)([f"--{option}=nan"]) == 2
    assert option in capsys.readouterr().err


def test_a_recipe_that_names_an_option_of_plan_twice(tmp_path):
    (tmp_path / "c.yaml").write_text("max_length: 6000\ncontext: 5000\n")
    with pytest.raises(UserError, match=r"c\.yaml: context is there twice, in two spellings"):
        PLAN.parse(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("value", ["1" * 5000, '{"a": ' * 5000, '{"a": 1, "a": 2}'])
@pytest.mark.parametrize("option", ["chat_template_kwargs", "prompt"])
def test_json_that_has_two_meanings_or_none(option, value):
    with pytest.raises(UserError, match=option) as caught:
        DataConfig(**{option: value if value.startswith("{") else f'{{"header": {value}}}'})
    assert len(str(caught.value)) < 500


def test_a_column_without_a_name():
    for columns in ("persona= ,response=b", " =a"):
        with pytest.raises(UserError, match="columns: expected name=column"):
            DataConfig(columns=columns)


def test_a_column_that_is_renamed_twice():
    with pytest.raises(UserError, match=r"columns: expected each name before = once, got persona=a and persona=b"):
        DataConfig(columns="persona=a,query=q,persona=b")


ALL_WEIGHTS, NO_REPLIES = "with --lora_r 0, which trains all weights", "with --generate false"


@pytest.mark.parametrize(
    ("command", "beside", "idle", "default", "why"),
    [
        (TRAIN, "--lora_r=0", "--lora_alpha=8", "32", ALL_WEIGHTS),
        (TRAIN, "--lora_r=0", "--lora_dropout=0.1", "0.0", ALL_WEIGHTS),
        (PLAN, "--lora_r=0", "--lora_alpha=8", "32", ALL_WEIGHTS),
        (TRAIN, "--lora_r=0", "--load_in_4bit=True", "False", ALL_WEIGHTS),
        (TRAIN, "--retriever=none", "--retrieve_k=2", "4", "with --retriever none, which shows all passages"),
        (TRAIN, "--objective=ce", "--clip_schedule=rising", "constant", "with --objective ce, whose weights are 1"),
        (EVALUATE, "--generate=false", "--temperature=0.9", "0.4", NO_REPLIES),
        (EVALUATE, "--generate=false", "--max_new_tokens=9", "512", NO_REPLIES),
        (EVALUATE, "--split=test", "--split_seed=1", "none", "with --split test and without --sample"),
        (SCORE, "--terminal=1", "--shown=9", "1000", "without --output"),
    ],
)
def test_an_option_beside_which_another_has_no_effect(command, beside, idle, default, why):
    name, value = idle[2:].split("=")
    with pytest.raises(UserError, match=rf"^{name}: expected {default} {re.escape(why)}, got '?{value}'?\.$"):
        command.build(command.parse([beside, idle]).raw)
    command.build(command.parse([beside, f"--{name}={default}"]).raw)  # as in the options that a run has saved


@pytest.mark.parametrize("value", ["-1", "1e-38", "9e-7"])
def test_logits_divided_by_the_temperature_stay_finite(value):
    with pytest.raises(UserError, match=r"^temperature: expected 0 \(greedy\), or at least 1e-06, got "):
        EVALUATE.build(EVALUATE.parse([f"--temperature={value}"]).raw)


def test_options_that_have_an_effect_together():
    for flags in ("--split=test --sample=2 --split_seed=1", "--split=held_out --split_seed=1", "--split_seed=1"):
        EVALUATE.build(EVALUATE.parse(flags.split()).raw)
    assert SCORE.build(SCORE.parse(["--shown=9", "--output=s.html"]).raw).score.shown == 9


def test_numbers_in_a_yaml_file_are_finite_too(train, tmp_path):
    for content in ("learning_rate: .inf\nweight_decay: .nan\n", f"learning_rate: {LONG}\n"):
        (tmp_path / "c.yaml").write_text(content)
        fails(train("--config", str(tmp_path / "c.yaml")), "finite number")
    (tmp_path / "c.yaml").write_text(f"max_steps: {LONG}\n")
    fails(train("--config", str(tmp_path / "c.yaml"), max_steps=None), "whole number")


# ---- interrupted, and a stdout that is closed or knows few characters


@pytest.mark.parametrize("module", [train_command, score, evaluate, plan], ids=lambda module: module.__name__)
def test_ctrl_c_is_one_word_in_every_command(module, monkeypatch, capsys, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("perce.config.options.Command.build", stop)
    given = ["--output_dir", str(tmp_path / "run")] if module is train_command else []
    assert module.main(given) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_run_that_is_interrupted_while_it_writes_its_report(train, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("perce.running.run.write_run_report", stop)
    code, _, err = train()
    assert code == 130 and err.endswith("Interrupted.\n") and "Traceback" not in err


def test_characters_that_cannot_be_shown_are_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert guarded(lambda: print("PIR → 0.3")) == 0
    assert raw.getvalue() == b"PIR ? 0.3\n"


@pytest.mark.parametrize("command", ["train", "score", "evaluate", "plan"])
def test_a_closed_stdout_is_no_traceback(command):
    """As with `| head -0`, which does not read."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", f"perce.{command}", "--print_config"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def in_a_shell(command, redirected):
    return subprocess.run(["sh", "-c", f'"$0" {command} {redirected}', sys.executable], capture_output=True, cwd=ROOT)


@pytest.mark.parametrize("command", ["-m perce.train --print_config", "-m perce.plan --help"])
def test_without_a_stdout_a_command_ends_well(command):
    done = in_a_shell(command, ">&-")
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_stdout_and_stderr_a_command_ends_well(gemma, tmp_path, monkeypatch):
    """As Python has them if the shell closed both; closed by a shell: below, and for short commands above."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert score.main(["--model", str(gemma), "--limit", "2", "--summary", str(tmp_path / "s.json")]) == 0
    assert (tmp_path / "s.json").stat().st_size


@pytest.mark.slow
def test_with_stdout_and_stderr_closed_by_a_shell_a_command_ends_well(gemma, tmp_path):
    command = f"-m perce.score --model {gemma} --limit 2 --summary {tmp_path / 's.json'}"
    assert in_a_shell(command, ">&- 2>&-").returncode == 0
    assert (tmp_path / "s.json").stat().st_size


@pytest.mark.parametrize("command", ["-m perce.train --print_config", "-m perce.plan --help"])
def test_a_full_stdout_is_one_paragraph(command):
    done = in_a_shell(command, "> /dev/full")
    assert (done.returncode, done.stderr) == (2, b"error: stdout: cannot be written to (No space left on device).\n")


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
GUARDED = """
import sys
from perce import UserError
from perce.process import guarded
from perce.report import terminal
def run():
    {}
sys.exit(guarded(run))
"""
PRINTS = {
    "a little": "print('x')",
    "much": "print('x' * 2**20)",
    "by rich": "terminal.show('x' * 2**20)",
    "before an end": "print('x'); sys.exit(0)",
}


@pytest.mark.parametrize("prints", PRINTS.values(), ids=PRINTS)
def test_a_stdout_that_breaks_is_known_by_itself(prints):
    code = GUARDED.format(prints)
    for where, expected in (("full", 2), ("closed", 141)):
        reader, writer = os.pipe()
        os.close(reader)
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-c", code],
                stdout=full if where == "full" else writer,
                stderr=subprocess.PIPE,
                cwd=ROOT,
            )
        os.close(writer)
        assert done.returncode == expected and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_a_pipe_or_file_that_breaks_elsewhere_is_not_stdout(error, capsys):
    def run():
        print("so far")
        raise error

    with pytest.raises(type(error)):
        guarded(run)
    assert capsys.readouterr().out.startswith("so far\n")


def test_a_mistake_is_told_though_stdout_is_broken():
    code = GUARDED.format("print('x'); raise UserError('mine')")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, env=BUFFERED)
    assert done.returncode == 2 and done.stderr.startswith(b"error: mine\n") and b"Traceback" not in done.stderr
