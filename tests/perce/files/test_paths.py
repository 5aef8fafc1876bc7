"""Paths: what no path can be, outputs that are also read or written twice, and what a mistyped one may mean. All of it
is told in one paragraph, before anything is loaded."""

from pathlib import Path

import pytest

from perce.__main__ import main
from perce.config.commands import COMMANDS
from perce.files.paths import did_you_mean, near_paths
from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.training import ROWS, fails, printed_by

PATHS = [
    (command.name, name)
    for command in COMMANDS
    for name, item in command.fields.items()
    if item.metadata["metavar"] in ("DATA", "DIR", "FILE", "DIR|HUB_ID")
]
NOT_PATHS = {
    "": "expected a path",
    " ": "expected a path",
    "x" * 300: "File name too long",
    "d/" * 3000: "File name too long",
    "a\0b": "embedded null",
    "~nobody-of-this-name/x": "no user of this name",
}


def test_there_are_paths():
    assert {name for _, name in PATHS} >= {"data", "model", "output_dir", "jsonl", "output", "compare_with", "json"}


@pytest.mark.parametrize(("command", "name"), [*PATHS, *((command.name, "config") for command in COMMANDS)])
def test_what_no_path_can_be(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    for path, reason in NOT_PATHS.items():
        assert main([command, f"--{name}={path}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --{name}") and reason in said and said.count("\n") == 1 and len(said) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "name"), [x for x in PATHS if x[1] in ("output", "jsonl", "summary", "json")])
def test_a_directory_is_no_file_to_write_to(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    for path in ("/", ".", ".."):
        assert main([command, f"--{name}={path}"]) == 2
        assert f"--{name} {path}: expected the name of a file" in capsys.readouterr().err


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "argv", "names"),
    [
        ("score", "--data rows.jsonl --output rows.jsonl", ("--output rows.jsonl", "--data")),
        ("score", "--data rows.jsonl --jsonl ./rows.jsonl", ("--jsonl ./rows.jsonl", "--data")),
        ("score", "--data rows.jsonl --summary link", ("--summary link", "--data")),
        ("score", "--data link --summary rows.jsonl", ("--summary rows.jsonl", "--data")),
        ("score", "--data rows.jsonl --output hard.html", ("--output hard.html", "--data")),
        ("score", "--summary new.json --jsonl dir/../new.json", ("--jsonl dir/../new.json", "--summary")),
        ("score", "--output new --summary new", ("--output", "--summary new")),
        ("score", "--jsonl s --summary s.run.json", ("--jsonl", "--summary s.run.json")),
        ("score", "--output c.yaml --config c.yaml", ("--output c.yaml", "--config")),
        ("score", "--output p.yaml --prompt p.yaml", ("--output p.yaml", "--prompt")),
        ("score", "--data dir --jsonl dir/train.jsonl", ("--jsonl dir/train.jsonl", "--data")),
        ("score", "--summary model/config.json", ("--summary model/config.json", "--model")),
        ("evaluate", "--data rows.jsonl --output rows.json", ("--output", "rows.jsonl", "--data")),
        ("evaluate", "--data rows.jsonl --output rows", ("--output", "rows.jsonl", "--data")),
        ("evaluate", "--output other.json --compare_with other.json", ("--output other.json", "--compare_with")),
        ("evaluate", "--data dir --output dir/test.json", ("--output dir/test.json", "--data")),
        ("evaluate", "--output model/adapter_config.json", ("--output model/adapter_config.json", "--model")),
        ("plan", "--json model/complete.json", ("--json model/complete.json", "--model")),
        ("plan", "--json model/config.json", ("--json model/config.json", "--model")),
        ("plan", "--json model/model.safetensors", ("--json model/model.safetensors", "--model")),
        *(
            ("score", f"--jsonl model/{name}", (f"--jsonl model/{name}", "--model"))
            for name in "run.json complete.json README.md report.html curves.png before.pt scaler.pt".split()
        ),
        ("plan", "--json c.yaml --config c.yaml", ("--json c.yaml", "--config")),
    ],
)
def test_an_output_that_would_be_written_over_an_input_or_an_output_is_refused(here, capsys, command, argv, names):
    before = contents(here)
    err = printed_by(main, capsys, command, "--model", "model")(*argv.split(), code=2).err
    assert all(name in err for name in names) and "found too late" not in err and err.count("\n") == err.count("error:")
    assert contents(here) == before, "nothing was written"


def test_results_beside_model_and_data_are_welcome(scored, gemma, tmp_path):
    data, beside_model = tmp_path / "dir", ("--summary", gemma / "test.json", "--output", gemma / "s.html")
    write_jsonl(data / "train.jsonl", ROWS)
    for _ in range(2):
        scored("--data", data, "--jsonl", data / "s.jsonl", *beside_model)


@pytest.mark.parametrize("inside", ["", "merged", "checkpoint-5"])
def test_a_run_is_not_written_over_its_model(train, tmp_path, inside):
    base = save_tiny_model(tmp_path / "base" / inside)
    before = contents(tmp_path)
    fails(train(model=base, output_dir=tmp_path / "base"), "--output_dir", "--model", str(tmp_path / "base"))
    assert contents(tmp_path) == before


def test_a_run_is_not_written_into_its_data(train, tmp_path):
    write_jsonl(tmp_path / "dir" / "train.jsonl", ROWS)
    fails(train(data=tmp_path / "dir", output_dir=tmp_path / "dir"), "--output_dir", "--data")
    fails(train(data=tmp_path / "dir/train.jsonl", output_dir=tmp_path / "dir/train.jsonl"), "--output_dir", "--data")
    assert [path.name for path in (tmp_path / "dir").iterdir()] == ["train.jsonl"]
    assert train(data=tmp_path / "dir/train.jsonl", output_dir=tmp_path / "dir", max_steps=1)[0] == 0, "beside its rows"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("recipes/quik.yaml", ["recipes/quick.yaml"]), ("recipe/quick.yaml", ["recipes/quick.yaml"]),
        ("demo", ["runs/demo-2026-long"]), ("quick", []), ("a/b/c/d", []), ("recipes/other.json", []), ("", []),
        ("/", []),
    ],
)  # fmt: skip
def test_near_paths(tmp_path, monkeypatch, path, near):
    monkeypatch.chdir(tmp_path)
    for name in ("recipes/quick.yaml", "runs/demo-2026-long/config.yaml"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    assert near_paths(path) == near
    assert did_you_mean(path) == (f" Did you mean {near[0]}?" if near else "")


def test_mistyped_files_are_told_with_what_is_near(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("result.json").write_text("{}")
    Path("recipe.yaml").write_text("lora_r: 4")
    for argv, near in (
        (["--config", "recipes.yaml"], "recipe.yaml"), (["--prompt", "recip.yaml"], "recipe.yaml"),
        (["--compare_with", "results.json"], "result.json"),
    ):  # fmt: skip
        assert main(["evaluate", *argv]) == 2
        err = capsys.readouterr().err
        assert f"error: {' '.join(argv)}: cannot be read" in err and f"Did you mean {near}?" in err
    Path("recipes").mkdir()
    assert main(["train", "--config", "recipes"]) == 2
    assert capsys.readouterr().err == "error: --config recipes: cannot be read (Is a directory).\n"
    Path("runs/x1").mkdir(parents=True)
    assert main(["train", "--resume", "--output_dir", "runs/x"]) == 2
    assert "mistyped? Did you mean runs/x1?" in capsys.readouterr().err
