"""Before anything is loaded: outputs that are also read, or written twice; and the modes of what is written."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perce import evaluate, plan, score, train
from perce.files import outputs
from perce.files.outputs import did_you_mean, near_paths
from tests.helpers import ROOT
from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.training import ROWS, fails, printed_by

MAINS = {"score": score.main, "evaluate": evaluate.main, "plan": plan.main}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def here(tmp_path, base, monkeypatch):
    """A directory with everything that the commands read, by short names."""
    monkeypatch.chdir(tmp_path)
    for command in ("perce.measuring.inference.load_to_measure", "perce.planning.plans.make_plan"):
        monkeypatch.setattr(command, lambda *_: pytest.fail("found too late"))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "dir" / "train.jsonl", ROWS)
    (tmp_path / "model").symlink_to(base)
    (tmp_path / "link").symlink_to("rows.jsonl")
    os.link(tmp_path / "rows.jsonl", tmp_path / "hard.html")
    (tmp_path / "c.yaml").write_text("precision: fp32\n")
    (tmp_path / "p.yaml").write_text("header: 'Known: '\n")
    (tmp_path / "other.json").write_text("{}")
    return tmp_path


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
            for name in (
                "run.json",
                "complete.json",
                "README.md",
                "report.html",
                "curves.png",
                "before.pt",
                "scaler.pt",
            )
        ),
        ("plan", "--json c.yaml --config c.yaml", ("--json c.yaml", "--config")),
    ],
)
def test_an_output_that_would_be_written_over_an_input_or_an_output_is_refused(here, capsys, command, argv, names):
    before = contents(here)
    err = printed_by(MAINS[command], capsys, "--model", "model")(*argv.split(), code=2).err
    assert all(name in err for name in names) and "found too late" not in err and err.count("\n") == err.count("error:")
    assert contents(here) == before, "nothing was written"


@pytest.mark.parametrize(
    ("command", "argv", "name"),
    [
        ("score", "--output mine", "mine"), ("score", "--summary mine.json", "mine.json"),
        ("score", "--jsonl mine.jsonl", "mine.jsonl"), ("score", "--jsonl a.jsonl --export swift", "a.swift.jsonl"),
        ("evaluate", "--output mine.json", "mine.json"), ("evaluate", "--output mine.json", "mine.jsonl"),
        ("plan", "--json mine.json", "mine.json"),
    ],
)  # fmt: skip
def test_a_file_that_perce_did_not_write_is_not_replaced(here, capsys, command, argv, name):
    (here / name).write_text('{"mine": 1}\n')
    err = printed_by(MAINS[command], capsys, "--model", "model")(*argv.split(), code=2).err
    assert f"error: {name}: exists already, and was not written by" in err
    assert (here / name).read_text() == '{"mine": 1}\n'


def test_what_perce_wrote_or_is_empty_is_replaced(scored, gemma, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("s.html", "s.json", "s.swift.jsonl", "p.json", "e.json"):
        Path(name).touch()
    for _ in range(2):
        scored("--output", "s.html", "--summary", "s.json", "--jsonl", "s.jsonl", "--export", "swift")
        flags = ("--model", gemma, "--tflops", 1, "--context", 1000, "--json", "p.json")
        printed_by(plan.main, capsys)(*flags)
        flags = ("--model", gemma, "--limit", 2, "--generate", "false", "--output", "e.json")
        printed_by(evaluate.main, capsys)(*flags)
    for name in ("s.json", "p.json", "e.json"):
        assert Path(name).read_text().startswith("{") and "perce." in json.loads(Path(name).read_text())["kind"]


def test_results_beside_model_and_data_are_welcome(scored, gemma, tmp_path):
    write_jsonl(tmp_path / "dir" / "train.jsonl", ROWS)
    for _ in range(2):
        flags = (
            "--jsonl",
            tmp_path / "dir" / "s.jsonl",
            "--summary",
            gemma / "test.json",
            "--output",
            gemma / "s.html",
        )
        scored("--data", tmp_path / "dir", *flags)


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


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize(
    "options", [{"lora_r": 0, "estimate": "frozen"}, {"merge_adapter": "true", "estimate": "epoch"}], ids=str
)
def test_the_umask_decides_who_may_read_what_a_run_saves(train, tmp_path, umask, options):
    before = os.umask(umask)
    try:
        assert train(max_steps=1, save_steps=1, **options)[0] == 0
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    names = {path.name for path in modes}
    assert {"estimates.safetensors", "trainer_state.json"} <= names
    assert {"model.safetensors", "adapter_model.safetensors"} & names
    assert {path: mode for path, mode in modes.items() if mode != 0o666 & ~umask} == {}


WRITERS = {
    "score": "--limit 2 --terminal 0 --output out.html --summary out.json --jsonl out.jsonl",
    "evaluate": "--limit 2 --generate false --output out.json",
    "plan": "--context 96 --query 8 --response 16 --tflops 1 --device cpu --json out.json",
}


@pytest.mark.parametrize(
    ("command", "name"),
    [("score", "out.html"), ("score", "out.json"), ("score", "out.jsonl.run.json"), ("evaluate", "out.json"),
     pytest.param("plan", "out.json", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_result_is_whole_or_as_it_was(base, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    run = printed_by(MAINS[command], capsys, "--model", base, *WRITERS[command].split())
    run()
    before = (tmp_path / name).read_bytes()
    (tmp_path / "out.jsonl").unlink(missing_ok=True)  # begun anew
    replace = os.replace

    def killed(source, target):
        if os.path.basename(target) == name:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    run("--precision", "fp32", code=130)
    assert (tmp_path / name).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if ".unfinished" in path.name]


def test_results_go_where_a_link_leads_with_the_mode_that_was_there(scored, tmp_path):
    (tmp_path / "real.json").write_text("")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    scored("--summary", tmp_path / "link.json", "--output", "/dev/null", "--terminal", 0)
    assert (tmp_path / "link.json").is_symlink() and "pir_mean" in (tmp_path / "real.json").read_text()
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o600


def test_a_command_that_fails_leaves_no_empty_result(scored, tmp_path):
    out = tmp_path / "new" / "s.html"
    scored("--output", out, "--data", "nowhere.jsonl", code=2)
    assert not list(out.parent.iterdir())
    out.mkdir()
    assert f"{out}: cannot be written to" in scored("--output", out, code=2).err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to_is_found_before(scored, tmp_path):
    (tmp_path / "s.html").write_text("")
    tmp_path.chmod(0o500)
    assert "cannot be written to" in scored("--output", tmp_path / "s.html", code=2).err
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("command", "name"), [("score", "out.html"), ("score", "out.json"), ("evaluate", "out.json"),
     pytest.param("plan", "out.json", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_disk_that_is_full_at_the_end_is_one_paragraph(base, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    err = printed_by(MAINS[command], capsys, "--model", base, *WRITERS[command].split())(code=2).err
    assert f"error: {name}: cannot be written to (No space left on device)" in err and "Traceback" not in err
    assert not (tmp_path / name).exists()


def test_a_page_for_a_device_that_takes_nothing_is_one_paragraph(scored):
    assert (
        "error: /dev/full: cannot be written to (No space left on device)"
        in scored("--output", "/dev/full", code=2).err
    )


def test_a_name_is_as_long_as_the_file_system_has_it_or_is_refused_before(scored, here, tmp_path, monkeypatch):
    assert "File name too long" in scored("--summary", "s" * 256, "--data", "rows.jsonl", code=2).err
    assert not [path for path in here.iterdir() if path.name.startswith(("s", ".s"))]
    monkeypatch.undo()
    scored("--summary", tmp_path / ("s" * 255), "--output", tmp_path / ("ü" * 127))
    assert (tmp_path / ("s" * 255)).stat().st_size and (tmp_path / ("ü" * 127)).stat().st_size


def test_two_processes_do_not_write_the_same_unfinished_file(tmp_path, monkeypatch):
    target = tmp_path / "out.json"
    with outputs.in_one_move(target) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 1)  # which runs, wherever this does
        with outputs.in_one_move(target) as other:
            other.write_text("other")
        assert mine.read_text() == "mine" and target.read_text() == "other"
    assert target.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_what_a_killed_process_left_unfinished_is_swept_up(tmp_path):
    code = "from perce.files.outputs import in_one_move; import os, pathlib, sys\nfor name in sys.argv[1:]:\n"
    code += "    with in_one_move(pathlib.Path(name)) as file:\n        file.write_text('half')\n        "
    for name in ("[a].json", "[a].json", "b.json"):
        subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)", str(tmp_path / name)], cwd=ROOT)
    with outputs.in_one_move(tmp_path / "[a].json") as file:
        file.write_text("whole")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and left[0].startswith(".b.json") and left[1] == "[a].json"


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
        assert evaluate.main(argv) == 2
        err = capsys.readouterr().err
        assert f"error: {' '.join(argv)}: cannot be read" in err and f"Did you mean {near}?" in err
    Path("recipes").mkdir()
    assert train.main(["--config", "recipes"]) == 2
    assert capsys.readouterr().err == "error: --config recipes: cannot be read (Is a directory).\n"
    Path("runs/x1").mkdir(parents=True)
    assert train.main(["--resume", "--output_dir", "runs/x"]) == 2
    assert "mistyped? Did you mean runs/x1?" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_progress_is_shown_on_a_terminal_where_it_takes_long(monkeypatch, terminal, patience, shown):
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(outputs, "PATIENCE", patience)
    assert [*outputs.progress("reading", "example", range(3))] == [0, 1, 2]
    with outputs.progress("pairing", "example", total=3) as bar:
        bar.update(3)
    assert [what in out.getvalue() for what in ("reading", "pairing")] == [shown, shown]


def test_reading_and_pairing_show_progress(monkeypatch, tmp_path):
    from perce import load_examples
    from perce.data.dataset import pair_dataset
    from tests.helpers.pairs import builder

    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(outputs, "PATIENCE", 0.0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_examples(write_jsonl(tmp_path / "rows.jsonl", ROWS), "train")
    pair_dataset(rows.all, builder())
    assert "reading" in out.getvalue() and "pairing:" in out.getvalue()
