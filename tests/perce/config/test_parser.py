"""The command line's own behaviour: help that keeps its lines, and options that are given twice."""

import pytest

from perce.config.commands import COMMANDS, EVALUATE, TRAIN
from perce.config.parser import LineByLine, Parser


def test_help_keeps_its_lines(capsys):
    parser = Parser("prog", formatter_class=LineByLine)
    parser.add_argument("--name", help="first line\nsecond line")
    parser.print_help()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.endswith("first line") for line in lines) and "second line" in lines


def test_of_an_option_that_is_given_twice_the_last_counts_and_it_is_told(capsys, monkeypatch, tmp_path):
    seen = []
    main = TRAIN.main(lambda options: seen.append((options.run.seed, options.run.resume, options.extra)))
    argv = ["--seed", "1", "--weight_decay", "0.1", "--resume", "--seed=2", "--weight_decay=0.2", "--resume", "false"]
    assert main(argv) == 0 and seen == [(2, False, {"weight_decay": 0.2})]
    told = capsys.readouterr().err
    for name in ("seed", "weight_decay", "resume"):
        assert f"--{name}: given twice; the last value is used\n" in told
    (tmp_path / "a.yaml").write_text("seed: 3\n")
    (tmp_path / "b.yaml").write_text("seed: 4\n")
    assert main(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]) == 0
    assert seen.pop()[0] == 4 and "--config: given twice" in capsys.readouterr().err
    assert main(["--seed", "1", "--seed", "1"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    assert main(argv) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["--model", "--config", "--print_config", "--streaming", "--made-up"])
def test_dashes_are_no_value(capsys, option):
    for command in COMMANDS:
        assert command.main(lambda options: pytest.fail("argparse takes them for no value"))([f"{option}=--"]) == 2
        assert capsys.readouterr().err == f"error: {option}: expected a value, got '--'. `--help` lists the options.\n"


@pytest.mark.parametrize("argv", [["--"], ["--", "--print_config"], ["--seed", "1", "--"]])
def test_dashes_alone_are_no_option(capsys, argv):
    assert TRAIN.main(lambda options: None)(argv) == 2
    assert capsys.readouterr().err.startswith("error: --: expected an option")


def test_an_empty_value_is_refused(capsys):
    for argv in (["--attn_implementation="], ["--attn_implementation", " "], ["--chat_template_kwargs", ""]):
        assert TRAIN.main(lambda options: None)(argv) == 2
        assert "Is a variable of the shell empty?" in capsys.readouterr().err


def test_several_processes_do_not_all_run_a_command_that_one_of_them_can(capsys, monkeypatch):
    seen = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for processes, code in (("1", 0), ("2", 2)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert EVALUATE.main(seen.append)([]) == code
    assert len(seen) == 1 and "evaluate: 2 processes were started, and it runs in one" in capsys.readouterr().err
