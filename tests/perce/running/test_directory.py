"""A run's directory: claimed by one process at a time, never another run's, and resumed only as the run it holds."""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from perce import PerceTrainer, UserError, hub
from perce.config.commands import parse_args
from perce.files.lock import locked
from perce.running.directory import LOCK, would_replace
from perce.train import main, resolve
from perce.training.checkpoints import flaw
from tests.helpers.pages import Page
from tests.helpers.tiny import write_jsonl
from tests.helpers.training import ROWS, fails

SAVED = {"model": None, "data": None, "precision": None, "max_steps": None}  # not given: the run's saved options apply
ADAPTER = "adapter_model.safetensors"


def saved(run, *names):
    options = yaml.safe_load((run / "config.yaml").read_text())
    return [options.get(name) for name in names]


def steps(run):
    return json.loads((run / "trainer_state.json").read_text())["global_step"]


# ---- claimed


def test_output_directories(train, tmp_path, monkeypatch):
    assert train(max_steps=1, output_dir=tmp_path / "taken")[0] == 0
    fails(train(output_dir=tmp_path / "taken"), "--output_dir", "holds a run", "--resume")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("perce.running.run.load_tokenizer", lambda *_: pytest.fail("found too late"))
    fails(train(output_dir=tmp_path / "file" / "run"), "--output_dir", "cannot be written")
    with pytest.raises(UserError, match="--output_dir"):
        resolve(parse_args(["--resume"])[0])


@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize(
    "names", [["README.md"], ["a.txt", "report.html"], ["config.json"], ["config.yaml"],
              ["run.json"], ["tokenizer.json"], ["merged/config.json"]],
)  # fmt: skip
def test_files_of_others_are_not_replaced(train, tmp_path, monkeypatch, names, resume):
    monkeypatch.setattr("perce.running.run.load_tokenizer", lambda *_: pytest.fail("found too late"))
    for name in names:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine: 1\n")
    fails(train(*resume), f"--output_dir {tmp_path / 'run'}: holds {names[-1]}", "no run of perce")
    assert all((tmp_path / "run" / name).read_text() == "mine: 1\n" for name in names)


def test_every_file_of_a_run_is_known_beforehand(train, tmp_path):
    run = tmp_path / "run"
    for options in ({"lora_r": 4}, {"lora_r": 0}):
        assert train(*["--merge_adapter"] * bool(options["lora_r"]), **options, save_steps=0, max_steps=1)[0] == 0
        (run / "config.yaml").rename(run / "config.json.old")  # no longer a run
        (run / "run.json").rename(run / "run.old")
        files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        assert files - set(would_replace(run)) == {"config.json.old", "run.old", LOCK}
        shutil.rmtree(run)


def test_a_run_begins_among_files_that_it_leaves_alone(train, tmp_path):
    mine = [
        "notes.txt", "data.json", "vocab.csv", "tokenizer_notes.md", "tokenizer.py", "train.index.json",
        "features.safetensors", "merged/notes.txt", "tokenizers/a",
    ]  # fmt: skip
    for name in mine:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    assert train("--merge_adapter", max_steps=1)[0] == 0
    assert all((tmp_path / "run" / name).read_text() == "mine" for name in mine)
    (tmp_path / "run" / "features.safetensors").unlink()
    assert "is finished" in train("--resume", **SAVED)[1], "it is no part of the run"


def test_a_run_s_own_name_is_not_that_of_other_files(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/rows").mkdir(parents=True)
    Path("runs/rows/README.md").write_text("mine")
    assert main(["--model", model, "--data", data, "--max_steps", "1", "--precision", "fp32"]) == 0
    assert Path("runs/rows/README.md").read_text() == "mine" and Path("runs/rows-2/config.yaml").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output_directory(train, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(train(output_dir=tmp_path / "locked" / "run"), "cannot be written")


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_directory_is_one_process_s(train, tmp_path, monkeypatch, resume):
    run = tmp_path / "run"
    assert train(max_steps=1, save_steps=1)[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("perce.running.run.load_tokenizer", lambda *_: pytest.fail("found too late"))
    with locked(run / LOCK, "the run"):
        fails(train(*resume, **SAVED), "--output_dir", str(run), f"in use by process {os.getpid()} on ", "since 20")
        assert {path: path.read_bytes() for path in before if path.name != LOCK} == {
            path: content for path, content in before.items() if path.name != LOCK
        }


def test_a_full_disk_where_a_run_is_claimed(train, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("filelock.FileLock.acquire", full)
    fails(train(), "--output_dir", "cannot be written to", "No space left")
    monkeypatch.undo()
    write = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, *a, **k: full() if self.name == f"{LOCK}.holder" else write(self, *a, **k)
    )
    assert train(max_steps=1)[0] == 0, "the lock is held; only its holder's name is unknown"


def test_two_runs_that_begin_at_once_have_two_directories(model, data, tmp_path, monkeypatch, capsys):
    """Both have found runs/rows free before either claims it."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", model, "--data", data, "--max_steps", "1", "--precision", "fp32"]
    codes = []
    own = hub.load_tokenizer

    def another(path):
        monkeypatch.setattr("perce.running.run.load_tokenizer", own)
        codes.append(main(flags))
        return own(path)

    monkeypatch.setattr("perce.running.run.load_tokenizer", another)
    codes.append(main(flags))
    assert codes == [0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["rows", "rows-2"]
    assert saved(Path("runs/rows-2"), "output_dir") == ["runs/rows-2"]
    assert all((path / ADAPTER).exists() for path in Path("runs").iterdir())


def test_what_another_attempt_left_is_not_taken_for_this_run_s(train, tmp_path):
    """A run was killed before its options were written, so it is unknown which run the other files belong to."""
    run = tmp_path / "run"
    assert train(max_steps=1, save_steps=0)[0] == 0
    (run / "config.yaml").unlink()
    directory = tmp_path / "split"
    write_jsonl(directory / "train.jsonl", ROWS)
    write_jsonl(directory / "validation.jsonl", ROWS[:2])
    code, out, err = train("--eval_on_start=false", data=directory, lora_r=0, max_steps=1)
    assert code == 0, err
    assert "not evaluated" in out
    assert not (run / "held_out.json").exists() and not (run / "base.json").exists()


def test_a_lock_is_given_back_after_a_mistake(train):
    fails(train(data="nowhere.jsonl"), "nowhere.jsonl")
    assert train(max_steps=1)[0] == 0


# ---- resumed as the same run


OTHERS = {
    "learning_rate": 5e-3, "objective": "ce", "clip_max": 3.0, "contrast": "ratio", "estimate": "frozen", "seed": 7,
    "data": "elsewhere.jsonl", "max_length": 300, "retrieve_k": 2, "lora_r": 3, "persona_grad": "none",
    "warmup_steps": 3, "tokens_per_batch": 500,
    "eval_examples": 2, "optim": "sgd", "weight_decay": 0.2, "lr_scheduler_type": "cosine", "max_grad_norm": 3.0,
    "adam_beta2": 0.5, "data_seed": 3, "model": "elsewhere", "prompt": '{"header": "Known:"}', "columns": "query=q",
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(model, data, tmp_path_factory):
    """A run of four steps that stopped after its second."""
    directory = tmp_path_factory.mktemp("begun")
    argv = {"model": model, "data": data, "output_dir": directory, "max_steps": 4, "precision": "fp32", "save_steps": 1}
    flags = [x for name, value in argv.items() for x in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_step_end(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        main([*flags, "--lr_scheduler_type", "constant_with_warmup"])
    return directory


def at_step_end(patch, step, action):
    own = PerceTrainer._maybe_log_save_evaluate

    def before(self, *args, **kwargs):
        if self.state.global_step == step:
            action()
        return own(self, *args, **kwargs)

    patch.setattr(PerceTrainer, "_maybe_log_save_evaluate", before)


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_that_would_make_another_run_is_refused_by_name(train, begun, name, monkeypatch):
    monkeypatch.setattr("perce.running.run.load_tokenizer", lambda *_: pytest.fail("found too late"))
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.name != LOCK and path.is_file()}
    result = train("--resume", output_dir=begun, **SAVED | {name: OTHERS[name]})
    fails(result, "tokens_per_batch" if name == "tokens_per_batch" else f"--resume: {name} ")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_rows_under_the_same_name_are_refused(train, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert train(data=path, save_steps=1)[0] == 0
    write_jsonl(path, [{**row, "response": row["response"].upper()} for row in ROWS])
    fails(train("--resume", **SAVED | {"max_steps": 3}), "--resume", "training pairs")
    write_jsonl(path, ROWS)
    assert train("--resume", **SAVED | {"max_steps": 3})[0] == 0


def test_options_that_leave_the_run_what_it_is_are_applied_and_recorded(train, tmp_path):
    run = tmp_path / "run"
    assert train(max_steps=2, save_steps=1, weight_decay="1e-1")[0] == 0
    changes = {"max_steps": 3, "save_steps": 2, "logging_steps": 1, "save_total_limit": 3, "report_examples": 1}
    code, out, err = train("--resume", **SAVED | changes, weight_decay="0.1")
    assert code == 0 and "max_steps 3 (2 when it began)" in out, err
    assert saved(run, *changes) == [*changes.values()] and saved(run, "resume") == [False]
    assert steps(run) == 3


def test_other_intervals_are_kept(train, tmp_path):
    """A checkpoint's state has the intervals with which it was saved."""
    run = tmp_path / "run"
    assert train(max_steps=2, save_steps=1, logging_steps=1, save_total_limit=9)[0] == 0
    assert train("--resume", **SAVED | {"max_steps": 8, "save_steps": 3, "logging_steps": 4, "eval_steps": 3})[0] == 0
    assert sorted(int(path.name[11:]) for path in run.glob("checkpoint-*")) == [1, 2, 3, 6, 8]
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 4, 8]
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 3, 6, 8]


@pytest.mark.parametrize("epochs", [7, 1])
def test_lengths_that_could_not_be_kept_are_refused(train, tmp_path, epochs):
    fixed, by_epochs = tmp_path / "fixed", tmp_path / "by_epochs"
    assert train(max_steps=2, save_steps=1, output_dir=fixed)[0] == 0
    fails(train("--resume", output_dir=fixed, num_train_epochs=epochs, **SAVED), "num_train_epochs", "max_steps 2")
    assert train(num_train_epochs=2, save_steps=1, output_dir=by_epochs, max_steps=None)[0] == 0
    result = train("--resume", output_dir=by_epochs, num_train_epochs=epochs, **SAVED)
    if epochs == 7:
        assert result[0] == 0 and steps(by_epochs) == 14
    else:
        fails(result, "step 4", "2 steps")
        assert (
            saved(by_epochs, "num_train_epochs") == [2.0]
            and "finished" in train("--resume", output_dir=by_epochs, **SAVED)[1]
        )


def test_a_step_that_is_cut_otherwise_must_leave_the_epochs_as_they_are(train, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "save_steps": 1, "max_steps": 3}
    assert train("--dataloader_drop_last", "true", **options)[0] == 0
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 5}
    fails(train("--resume", **SAVED | cut), "the number of steps per epoch", "2", "3")


def test_other_validation_rows_are_refused(train, tmp_path):
    directory = tmp_path / "split"
    write_jsonl(directory / "train.jsonl", ROWS[:8])
    write_jsonl(directory / "validation.jsonl", ROWS[8:])
    assert train(data=directory, save_steps=1)[0] == 0
    write_jsonl(directory / "validation.jsonl", ROWS[7:])
    fails(train("--resume", **SAVED | {"max_steps": 3}), "validation pairs")


def test_a_device_that_evaluates_other_rows_is_named(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("perce.running.run.EVAL_TOKENS_ON_CPU", 1)
        assert train(save_steps=1)[0] == 0
    fails(train("--resume", **SAVED | {"max_steps": 3}), "validation pairs", "a CPU", "--eval_examples")


@pytest.mark.parametrize("gone", ["never saved", "deleted"])
def test_a_finished_run_without_checkpoints_is_not_begun_again(train, tmp_path, gone):
    run = tmp_path / "run"
    assert train(save_steps=0 if gone == "never saved" else 1)[0] == 0
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    whole = (run / ADAPTER).read_bytes()
    fails(train("--resume", **SAVED | {"logging_steps": 2}), "finished", "no checkpoint")
    assert (run / ADAPTER).read_bytes() == whole
    assert "finished" in train("--resume", **SAVED)[1]
    (run / ADAPTER).write_bytes(whole[:-1])
    fails(train("--resume", **SAVED), ADAPTER, "no checkpoint")


def test_the_same_step_may_be_cut_otherwise_and_not_become_another(train, begun, tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1, "max_steps": 1}
    assert train(**options)[0] == 0
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    assert train("--resume", **SAVED | cut)[0] == 0
    assert saved(tmp_path / "run", *cut) == [*cut.values()]
    fails(
        train("--resume", **SAVED | {"per_device_train_batch_size": 2, "max_steps": 3}),
        "8 sequences now", "was 4 sequences when the run began", "--gradient_accumulation_steps",
    )  # fmt: skip


def test_a_run_that_was_extended_and_stopped_goes_on_to_its_new_end(train, tmp_path, monkeypatch):
    assert train(max_steps=2, save_steps=1)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step_end(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train("--resume", **SAVED | {"max_steps": 5})
    code, out, _ = train("--resume", **SAVED)
    assert code == 0 and "finished" not in out and steps(tmp_path / "run") == 5
    fails(train("--resume", **SAVED | {"max_steps": 3}), "3 steps", "step 5")


def test_a_run_whose_options_are_gone_or_damaged_is_not_begun_again(train, tmp_path):
    run = tmp_path / "run"
    assert train(save_steps=1)[0] == 0
    (run / "config.yaml").write_bytes(bytes(100))
    fails(train("--resume"), "config.yaml")
    (run / "config.yaml").unlink()
    fails(train("--resume"), "config.yaml", "checkpoint-2")
    fails(train(), "checkpoint-2")
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "run.json").unlink()
    fails(train("--resume"), "run.json", "checkpoint-2")
    fails(train("--resume", **SAVED), "holds no run (run.json is missing)", "Put it back")
    (run / "config.yaml").rename(run / "run.json")
    fails(train("--resume", **SAVED), "holds no run (config.yaml is missing)", "Put it back", "To begin a run there")


@pytest.mark.parametrize(
    "damage", ["half", "one bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zeros", "text"))]
)
def test_numbers_of_before_training_that_are_damaged_are_told_of_at_once_and_passed_over(
    train, tmp_path, monkeypatch, damage
):
    assert train(save_steps=1)[0] == 0
    path = tmp_path / "run" / "before.pt"
    content = bytearray(path.read_bytes())
    place = content.index(b"storage") if damage == "one bit" else 0  # in a tensor, not in the archive's padding
    content[content.index(b"ZZ", place) + 70 if damage == "one bit" else 0] ^= 1
    others = {"half": content[: len(content) // 2], "zeros": bytes(len(content)), "text": b"[]"}
    path.write_bytes(others.get(damage, content))
    own = PerceTrainer.train
    told = []

    def trained(self, *args, **kwargs):
        told.append("before.pt" in sys.stderr.getvalue())
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PerceTrainer, "train", trained)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    code, out, _ = train("--resume", **SAVED | {"max_steps": 3})
    assert code == 0 and told == [True] and "not evaluated" in out


def test_the_numbers_of_before_training_are_whole_or_not_there(train, tmp_path, monkeypatch):
    def half(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr("torch.save", half)
    with pytest.raises(RuntimeError, match="killed"):
        train()
    assert not (tmp_path / "run" / "before.pt").exists()


# ---- one command for every moment


def test_a_finished_run_says_so_and_trains_no_more(train, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert train("--lr_scheduler_type", "constant", max_steps=2, save_steps=1)[0] == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("perce.running.run.load_tokenizer", lambda *_: pytest.fail("nothing is left to do"))
    code, out, err = train("--resume", **SAVED)
    assert code == 0 and "finished" in out and "2 steps" in out, err
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before if path.name != LOCK}
    assert after == {path: content for path, content in before.items() if path.name != LOCK}


def test_what_a_run_did_not_come_to_write_is_written_and_nothing_trained(train, tmp_path, monkeypatch):
    run, final = tmp_path / "run", PerceTrainer.save_model
    options = {"lr_scheduler_type": "constant", "save_steps": 1, "max_steps": 3}  # in the middle of an epoch
    assert train(**options, output_dir=tmp_path / "straight")[0] == 0

    def killed(self, *args, _internal_call=False, **kwargs):
        if not _internal_call:
            raise KeyboardInterrupt
        final(self, *args, _internal_call=_internal_call, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PerceTrainer, "save_model", killed)
        assert train(**options)[0] == 130
    assert not (run / ADAPTER).exists()
    code, _, err = train("--resume", **SAVED)
    assert code == 0, err
    assert steps(run) == 3 and (run / "report.html").exists()
    assert (run / ADAPTER).read_bytes() == (tmp_path / "straight" / ADAPTER).read_bytes()
    assert (run / "checkpoint-3").exists() and not (run / "checkpoint-4").exists()


def test_an_evaluation_that_was_due_after_the_checkpoint_is_made_when_the_run_is_resumed(train, tmp_path, monkeypatch):
    """An epoch's evaluation comes after a checkpoint of its last step, and belongs to neither epoch on disk."""
    evaluate = PerceTrainer.evaluate

    def killed(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise RuntimeError("killed")
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PerceTrainer, "evaluate", killed)
        train(max_steps=3, save_steps=2)
    assert flaw(tmp_path / "run" / "checkpoint-2") is None
    assert train("--resume", **SAVED)[0] == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 2, 3]


def test_the_last_evaluation_is_logged_once(train, tmp_path, monkeypatch):
    """If a run was stopped after it, its numbers are known, but not those of single tokens."""
    own = PerceTrainer.save_model

    def killed(self, *args, _internal_call=False):
        if not _internal_call:
            raise RuntimeError("killed")
        own(self, *args, _internal_call=True)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(PerceTrainer, "save_model", killed)
        train(max_steps=3, save_steps=3, eval_steps=3)
    code, out, _ = train("--resume", **SAVED)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert code == 0 and "loss with persona" in out
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 3]
    assert "after training" in Page(tmp_path / "run" / "report.html").data["passes"]


def test_a_signal_in_the_last_step(train, tmp_path, monkeypatch):
    options = {"lr_scheduler_type": "constant", "save_steps": 1, "max_steps": 3}
    assert train(**options, output_dir=tmp_path / "straight")[0] == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        at_step_end(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(**options)
    assert train("--resume", **SAVED)[0] == 0 and steps(tmp_path / "run") == 3
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (tmp_path / "straight" / ADAPTER).read_bytes()


def test_a_finished_run_whose_model_is_damaged_is_written_again(train, tmp_path):
    run = tmp_path / "run"
    assert train(save_steps=1)[0] == 0
    whole = (run / ADAPTER).read_bytes()
    (run / ADAPTER).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert train("--resume", **SAVED)[0] == 0
    assert (run / ADAPTER).read_bytes() == whole


def test_the_same_command_begins_goes_on_and_ends_a_run(train, tmp_path, monkeypatch):
    """A supervisor repeats one command: first, after a stop before or in the first checkpoint, and when all is done."""
    run, options = tmp_path / "run", {"save_steps": 2, "max_steps": 4}
    assert train(**options, output_dir=tmp_path / "straight")[0] == 0
    for where in ("perce.train.load_nothing", "training_step", "save"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):

            def killed(*args, **kwargs):
                raise RuntimeError("killed")

            if where == "training_step":
                patch.setattr(PerceTrainer, "training_step", killed)
            elif where == "save":
                patch.setattr("perce.training.checkpoints.seal", killed)
            else:
                patch.setattr("perce.running.run.load_tokenizer", killed)
            train("--resume", **options)
    assert flaw(run / "checkpoint-2")
    code, out, err = train("--resume", **options)
    assert code == 0 and "begins again" in out, err
    assert (run / ADAPTER).read_bytes() == (tmp_path / "straight" / ADAPTER).read_bytes()
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 2, 4], "the evaluation before training"
    assert "finished" in train("--resume", **options)[1]


def test_a_run_that_is_nowhere_is_begun_only_when_it_is_said_what_it_is(train, tmp_path):
    fails(train("--resume", output_dir=tmp_path / "mistyped", **SAVED), "--resume", "holds no run", "--model", "--data")
    assert not (tmp_path / "mistyped").exists()


def test_checkpoints_that_are_damaged_are_no_reason_to_begin_again(train, tmp_path):
    assert train(save_steps=1)[0] == 0
    run = tmp_path / "run"
    (run / "complete.json").unlink()
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").write_text("{}")
    fails(train("--resume", **SAVED), "no whole checkpoint")


def test_checkpoints_of_the_model_alone(train, tmp_path, monkeypatch):
    """After a kill nothing is there to resume from, and an error says so; a signal's stop saves all that is needed."""
    flags = ["--save_only_model", "true", "--lr_scheduler_type", "constant"]
    options = {"save_steps": 1, "max_steps": 3}
    assert train(*flags, **options, output_dir=tmp_path / "straight")[0] == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        at_step_end(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(*flags, **options)
    assert train("--resume", **SAVED)[0] == 0
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (tmp_path / "straight" / ADAPTER).read_bytes()
    (tmp_path / "straight" / "complete.json").unlink()
    result = train("--resume", output_dir=tmp_path / "straight", **SAVED)
    fails(result, "no whole checkpoint", "--save_only_model")
    assert "saved without optimizer.pt, which a resume needs" in result[2]


@pytest.mark.parametrize("gone", ["a file", pytest.param("all", marks=pytest.mark.slow), "between two looks"])
def test_a_checkpoint_that_goes_while_it_is_read_is_no_beginning(train, tmp_path, monkeypatch, gone):
    assert train(max_steps=2, save_steps=1)[0] == 0
    load = PerceTrainer._load_from_checkpoint

    def then_it_goes(self, checkpoint, *args):
        load(self, checkpoint, *args)
        state = Path(checkpoint) / "trainer_state.json"
        if gone == "a file":
            state.unlink()
        elif gone == "all":
            shutil.rmtree(checkpoint)
        else:
            monkeypatch.setattr("os.path.isfile", lambda path, own=os.path.isfile: own(path) and Path(path) != state)

    monkeypatch.setattr(PerceTrainer, "_load_from_checkpoint", then_it_goes)
    fails(train("--resume", **SAVED | {"max_steps": 3}), "checkpoint-2", "step 2")


@pytest.mark.parametrize("call", ["begin", "finish"])
def test_a_full_disk_at_either_end_is_one_paragraph(train, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"perce.running.run.{call}", full)
    fails(train(), "could not be written", "No space left")
