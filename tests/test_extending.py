"""The examples of docs/EXTENDING.md run unchanged."""

import json
import re
import sys
from types import ModuleType

import pytest
import torch

from perce import LossConfig, UserError, evaluate, load_examples, objectives
from perce.measuring import metrics
from perce.reading import formats, parsers
from perce.report.page import Weighed
from perce_kernels import backends, token_logprobs
from tests.helpers import ROOT
from tests.helpers.numerics import assert_matches, call, make_inputs, oracle
from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.trainers import PAIRS, arguments, logged, model_for, plain_loop, trainer_for

BLOCKS = dict(
    re.findall(r"^```python (\w+)\n(.*?)^```$", (ROOT / "docs/EXTENDING.md").read_text(encoding="utf-8"), re.M | re.S)
)


def test_every_example_is_run_here():
    assert list(BLOCKS) == ["objective", "formula", "parser", "format", "backend", "table", "metric"]


def test_an_objective(tmp_path, monkeypatch):
    entry = eval(BLOCKS["objective"], vars(objectives))
    monkeypatch.setitem(objectives.OBJECTIVES, entry.name, entry)
    said = "Here 1 − p is one minus a token's probability with the persona, so that unlikely tokens count more."
    assert Weighed(entry, entry.weighting()).meaning == said
    formulas = eval(f"{{{BLOCKS['formula']}}}", {"torch": torch})
    model, batches = model_for("full"), []
    loop_model = model_for("full").train()
    trainer = trainer_for(model, arguments(tmp_path, loss=LossConfig(entry.name), max_steps=3), PAIRS[:12])
    collator = trainer.data_collator
    trainer.data_collator = lambda pairs: (batches.append(pairs), collator(pairs))[1]
    trainer.train()
    expected = plain_loop(loop_model, batches[:3], [trainer.args.loss] * 3, formula=formulas[entry.name])
    found = torch.tensor(logged(trainer, "loss", "grad_norm"))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_a_format(tmp_path, monkeypatch):
    monkeypatch.setitem(formats.FORMATS, "forum", None)  # so that monkeypatch removes it again
    monkeypatch.setattr(parsers, "parse_forum", None, raising=False)
    exec(BLOCKS["parser"], vars(parsers))
    exec(BLOCKS["format"], vars(formats))
    row = {"about": "I keep bees.", "post": "Who?", "reply": "A keeper."}
    examples = load_examples(write_jsonl(tmp_path / "rows.jsonl", [row]), "train")
    (example,) = examples.all
    assert examples.format == "forum" and example.persona == ("I keep bees.",) and example.response == "A keeper."
    assert [(turn.role, turn.content) for turn in example.turns] == [("user", "Who?")]
    path = write_jsonl(tmp_path / "bad.jsonl", [row, row | {"post": ""}])
    with pytest.raises(UserError, match=r"bad\.jsonl:2.*post.*a non-empty string"):
        load_examples(path, "train")


def test_a_backend(monkeypatch):
    module = ModuleType("perce_kernels.exact")
    exec(BLOCKS["backend"], vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, backend in eval(f"{{{BLOCKS['table']}}}", vars(backends)).items():
        monkeypatch.setitem(backends.BACKENDS, name, backend)
        monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, name))
    inputs = make_inputs()
    assert_matches(call(inputs, backend="exact"), oracle(inputs), torch.float32, slack=0.01)  # from fp64, rounded once
    found, expected = (
        token_logprobs(inputs.hidden, inputs.lm_head, inputs.target, return_entropy=True, backend=backend)
        for backend in ("exact", "torch")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_metric(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    pytest.importorskip("nltk")
    for name, metric in eval(f"{{{BLOCKS['metric']}}}", vars(metrics)).items():
        monkeypatch.setitem(metrics.REPLY_METRICS, name, metric)
    model = save_tiny_model(tmp_path / "model")
    flags = ["--limit=2", "--max_new_tokens=4", f"--output={tmp_path / 'e.json'}"]
    assert evaluate.main([f"--model={model}", *flags]) == 0
    assert "– length, of the user's own" in capsys.readouterr().out
    result = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    lengths = [len(record["reply"]) / len(record["reference"]) for record in result["records"]]
    assert result["metrics"]["length"]["value"] == pytest.approx(sum(lengths) / 2)
