"""Uploads of runs: which files, when, and that no token is printed or kept; what is saved when."""

import pickle
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from perce.config.commands import parse_args
from perce.running.card import CARD
from tests.helpers.trainers import arguments, model_for, trainer_for
from tests.helpers.training import fails

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja"}  # fmt: skip
PRIVATE = ("report.html", "before.pt", "held_out.json", "config.yaml", "run.json", "trainer_state.json")


@pytest.fixture
def hub(monkeypatch):
    """The uploads, each with its files, their card and the token that it was made with."""
    uploads = []

    def upload_folder(self, *, folder_path, run_as_future=False, path_in_repo="", token=None, **options):
        folder = Path(folder_path)
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        patterns = {name: options.get(name) for name in ("allow_patterns", "ignore_patterns")}
        card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
        files = set(filter_repo_objects(files, **patterns))
        uploads.append(SimpleNamespace(files=files, card=card, token=token, path=path_in_repo or "."))
        done = Future()
        done.set_result(None)
        return done if run_as_future else None

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/x"))
    return uploads


def kept_in(directory, text):
    return [str(path) for path in directory.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


PUSH = ("--push_to_hub", "true", "--hub_token", TOKEN)


@pytest.mark.parametrize("lora_r", [0, 2], ids=["model", "adapter"])
def test_the_model_its_tokenizer_and_card_are_uploaded_and_nothing_else(train, tmp_path, hub, lora_r):
    code, out, err = train(*PUSH, lora_r=lora_r, max_steps=1, save_steps=1)
    assert code == 0, err
    run = tmp_path / "run"
    model = MODEL - {"config.json", "model.safetensors"} | {"adapter_config.json", "adapter_model.safetensors"}
    assert [upload.token for upload in hub] == [TOKEN, TOKEN] and all((run / name).is_file() for name in PRIVATE)
    for upload in hub:
        assert upload.files - {CARD} == (model if lora_r else MODEL), "at the checkpoint, and at the end"
    assert CARD not in hub[0].files, "PEFT's card says nothing"
    assert hub[-1].card == (run / CARD).read_text(encoding="utf-8") and "trained with PerCE" in hub[-1].card
    assert not kept_in(run, TOKEN) and TOKEN not in out + err


def test_checkpoints_are_uploaded_whole_where_they_are_asked_for(train, tmp_path, hub):
    assert train(*PUSH, "--hub_strategy", "checkpoint", max_steps=1, save_steps=1)[0] == 0
    assert [upload.path for upload in hub] == [".", "last-checkpoint", "."]
    assert {"optimizer.pt", "trainer_state.json", "complete.json"} <= hub[1].files and not {*PRIVATE[:5]} & hub[1].files


def test_a_token_is_given_again_when_a_run_is_resumed(train, tmp_path, hub):
    assert train(*PUSH, max_steps=1, save_steps=1)[0] == 0
    assert "hub_token" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    saved = {"model": None, "data": None, "precision": None}
    other = TOKEN[::-1]
    code, out, err = train("--resume", "--hub_token", other, max_steps=2, **saved)
    assert code == 0 and hub[-1].token == other and not kept_in(tmp_path / "run", other), err
    assert other not in out + err and TOKEN not in out + err
    assert train("--resume", max_steps=3, **saved)[0] == 0 and hub[-1].token is None, "of the environment, if any"
    fails(train("--resume", "--hub_token", "<HUB_TOKEN>", max_steps=4, **saved), "hub_token: expected a token")


def test_what_is_printed_of_the_options_has_no_token(train, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"hub_token: {TOKEN}\npush_to_hub: true\n")
    for argv in (PUSH, ("--config", str(file))):
        code, out, err = train(*argv, "--print_config")
        assert code == 0 and TOKEN not in out + err and "hub_token" in err
        (tmp_path / "printed.yaml").write_text(out)
        config, _ = parse_args(["--config", str(tmp_path / "printed.yaml")])
        assert config.extra == {"push_to_hub": True}


def test_errors_have_no_token(train, tmp_path, monkeypatch):
    def refused(*_, token, **__):
        raise ValueError(f"Illegal header value b'Bearer {token}'")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    short = "hf_secret"
    for token in (TOKEN, short, f"{short}\n"):
        result = train("--push_to_hub", "--hub_token", token, max_steps=1)
        fails(result, "--push_to_hub", "Illegal header value")
        assert token.strip() not in result[1] + result[2]
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/x"))
    monkeypatch.setattr(HfApi, "upload_folder", refused)
    code, out, err = train("--push_to_hub", "--hub_token", short, max_steps=1)
    assert code == 0 and "the upload failed" in err and short not in out + err
    file = tmp_path / "c.yaml"
    file.write_text(f"push_to_hub: true\nhub_token: '{TOKEN}\n")
    mistakes = (("--config", str(file)), (f"hub_token={TOKEN}",), ("--push_to_hub", "true", TOKEN), (f"-t={TOKEN}",))
    for argv in (*mistakes, ("--hub_tokne", TOKEN), ("--hub_token", TOKEN)):
        result = train(*argv)
        fails(result)
        assert TOKEN not in result[1] + result[2], argv[0]


def test_an_upload_in_the_background_that_fails_is_told(tmp_path, monkeypatch, capsys):
    jobs = []

    def upload_folder(self, *, run_as_future, **options):
        assert run_as_future
        jobs.append(Future())
        return jobs[-1]

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/x"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    options = {"push_to_hub": True, "hub_token": "hf_secret", "hub_strategy": "checkpoint"}
    trainer = trainer_for(model_for("full"), arguments(tmp_path, **options))
    trainer._upload_checkpoint(tmp_path)
    jobs[0].set_result(None)
    jobs[1].cancel()
    assert not capsys.readouterr().err
    trainer._upload_checkpoint(tmp_path)
    jobs[3].set_exception(RuntimeError("403 Forbidden: hf_secret\nadvice"))
    said = capsys.readouterr().err
    assert said.count("the upload failed (403 Forbidden: …)") == 1 and "hf_secret" not in said and "advice" not in said


def test_arguments_are_pickled_without_their_token(tmp_path):
    args = arguments(tmp_path, push_to_hub=True, hub_token=TOKEN)
    assert TOKEN.encode() not in pickle.dumps(args) and TOKEN not in f"{args} {args.to_dict()}"
    assert args.hub_token == TOKEN and pickle.loads(pickle.dumps(args)).hub_token is None


OWN_FILES = {"notes.html", "vocab.csv", "tokenizer_notes.md", "features.safetensors"}


def test_in_python_a_push_saves_and_uploads_the_model_alone(tmp_path, hub):
    trainer = trainer_for(model_for("full"), arguments(tmp_path, push_to_hub=True))
    for name in OWN_FILES:
        (tmp_path / name).write_text("private")
    trainer.save_model()
    assert not hub, "saving does not upload"
    (tmp_path / "model.safetensors").unlink()
    trainer.push_to_hub()
    assert "model.safetensors" not in hub[-1].files, "saved weights are not saved again"
    trainer_for(model_for("full"), arguments(tmp_path, push_to_hub=True)).push_to_hub()
    assert {"model.safetensors", "config.json", CARD} <= hub[-1].files and not hub[-1].files & OWN_FILES


@pytest.mark.parametrize("private", [None, True])
def test_a_push_that_was_not_announced_makes_the_repository(tmp_path, hub, monkeypatch, private):
    """With init_hf_repo as it is in transformers 5.16, which takes no `private`."""
    made, own = [], Trainer.init_hf_repo

    def create_repo(*_, private, **options):
        made.append(private)
        return SimpleNamespace(repo_id="me/x")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: own(self, token=token))
    trainer_for(model_for("full"), arguments(tmp_path)).push_to_hub(private=private)
    assert made == [private] and "model.safetensors" in hub[-1].files


def test_a_push_uploads_the_weights_as_they_are_now(tmp_path, hub):
    class Saving(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.save_model()

    trainer = trainer_for(model_for("full"), arguments(tmp_path, push_to_hub=True, max_steps=2), callbacks=[Saving()])
    trainer.train()
    trainer.push_to_hub()
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", ["x", "./x", "x/"])
def test_the_weights_of_a_checkpoint_are_written_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    written, save = [], Trainer._save
    monkeypatch.setattr(Trainer, "_save", lambda self, *args, **options: written.append(save(self, *args, **options)))
    trainer_for(model_for("full"), arguments(name, max_steps=2, save_strategy="steps", save_steps=1)).train()
    assert len(written) == 2
