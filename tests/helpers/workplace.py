"""A directory as the documentation presupposes it: files of rows, and tiny models under the names of real ones."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from perce.demo import DATA_DIR
from perce.demo.model import NAME, RECEIPT
from perce.files.integrity import sizes_and_digests
from tests.helpers import ROOT
from tests.helpers.templates import CHAT_TEMPLATES
from tests.helpers.tiny import VOCAB, read_jsonl, save_tiny_model, tiny_tokenizer, write_jsonl

USERS = 20
PASSED = ("Makefile", "benchmarks", "constraints.txt", "examples", "pyproject.toml", "recipes", "setup.py")
"""What a command finds in the repository; it writes elsewhere."""
HISTORY_ROWS = [
    {
        "reviewerId": user,
        "input": f"Write the review of a {thing}.",
        "output": f"{thing}: {words}",
        "profile": [{"overall": 4.0, "summary": f"Good {old}", "reviewText": f"The {old} {words}"} for old in olds],
    }
    for user, words in (("ana", "kept the bees calm."), ("bo", "went to sea with me."), ("cy", "smells of dough."))
    for thing, olds in (("veil", ("smoker", "hive", "glove")), ("rope", ("sail", "boat", "anchor")))
]


def save_models(shelf: Path, hub_ids: set[str]) -> None:
    """Tiny models in directories that are called as Hub ids, an encoder, and a default model for $PERCE_CACHE."""
    for name in sorted(hub_ids):
        save_tiny_model(shelf / name, "qwen3", CHAT_TEMPLATES["qwen3-switch"], max_position_embeddings=40960)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = shelf / "facebook" / "contriever"
    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=2, max_position_embeddings=64, **sizes)).save_pretrained(encoder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(encoder)
    default = save_tiny_model(shelf / "cache" / NAME, "llama-tied")
    receipt = {"files": sizes_and_digests(default, default.iterdir())}
    (default / RECEIPT).write_text(json.dumps(receipt), encoding="utf-8")


def furnish(place: Path, shelf: Path) -> None:
    """Lay out the models, the repository's files, and every file of rows that a page names."""
    for source in (*(ROOT / name for name in PASSED), *shelf.iterdir()):
        (place / source.name).symlink_to(source)
    by_user = itertools.groupby(read_jsonl(DATA_DIR / "train.jsonl"), lambda row: row["user_id"])
    rows = [next(own) for _, own in itertools.islice(by_user, USERS)]
    for name in ("my_rows.jsonl", "users.jsonl", "rows.jsonl"):
        write_jsonl(place / name, [{k: v for k, v in row.items() if k != "personal_spans"} for row in rows])
    for split, users in (("train", ("ana", "bo")), ("validation", ("cy",)), ("test", ("cy",))):
        own = [row for row in HISTORY_ROWS if row["reviewerId"] in users]
        write_jsonl(place / "longlamp" / "product_review" / f"{split}.jsonl", own)
    mails = [{"from": row["reviewerId"], "subject": row["input"], "body": row["output"]} for row in HISTORY_ROWS]
    write_jsonl(place / "mails.jsonl", mails)
    (place / "export.csv").write_text("persona;query;response\nI keep bees.;Café?;No.\n", encoding="cp1252")


def environment(place: Path, shelf: Path) -> dict[str, str]:
    """Offline; `perce`, `python` and `torchrun` are those of this interpreter, and of this repository."""
    programs = place / ".programs"
    programs.mkdir()
    scripts = {
        "perce": f'exec {sys.executable} -m perce "$@"',
        "python": f'exec {sys.executable} "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",  # so that a failure shows what was printed last
        "HF_HOME": str(place / ".huggingface"),
        "PERCE_CACHE": str(shelf / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def run(command: list[str], place: Path, env: dict[str, str], shown: str) -> None:
    """Fails with the end of what was printed."""
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600)
    printed = textwrap.indent(f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}", "  ")
    assert done.returncode == 0, f"{shown}\nended with {done.returncode}:\n{printed}"


def run_commands(script: str, place: Path, env: dict[str, str]) -> None:
    told = "set -E; trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n"
    run([shutil.which("bash") or "bash", "-euo", "pipefail", "-c", told + script], place, env, script)


def run_python(code: str, place: Path, env: dict[str, str]) -> None:
    (place / "block.py").write_text(code, encoding="utf-8")
    run([sys.executable, "block.py"], place, env, code)
