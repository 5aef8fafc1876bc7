"""LongCE, on documents: weights and gradients, a whole run, mistakes."""

import copy
import json
from functools import partial

import pytest
import torch
import yaml
from datasets import Dataset

from perce import DataConfig, LossConfig, UserError
from perce.config.commands import parse_args
from perce.data.batch import collate
from perce.data.pairing import make_builder
from perce.model.passes import token_statistics
from perce.model.patch import prepare_model
from perce.train import main
from tests.helpers.models import TEXT, TOKENIZER, K, S, documents
from tests.helpers.tiny import save_tiny_model, tiny_model, write_jsonl
from tests.helpers.trainers import arguments, trainer_for
from tests.helpers.training import fails

LONGCE = LossConfig(objective="longce", short_context=K, short_stride=S)

WEIGHTING = LONGCE.weighting


def plain_log_probabilities(model, ids):
    """(logp, logp_cf) of ids[1:]: token i from all before it, and from K to K + S - 1 tokens, window by window."""

    def logp(context, target):
        return model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)[target]

    long = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    long = long.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    with torch.no_grad():
        short = [logp(ids[max((i - K) // S * S, 0) if i >= K + S else 0 : i], ids[i]) for i in range(1, len(ids))]
    return long, torch.stack(short)


@pytest.mark.parametrize(
    ("lengths", "packing"), [([60], False), ([K + S + 1, 70, 3], False), ([K + S + 1, 70, 3], True)]
)
def test_weights_and_gradient_equal_a_plain_computation(tmp_path, lengths, packing):
    model = prepare_model(tiny_model()).double()
    model.set_attn_implementation("eager" if packing else "sdpa")
    close = partial(torch.testing.assert_close, atol=1e-5 if packing else 1e-7, rtol=1e-5)  # eager's softmax is fp32
    reference, pairs = copy.deepcopy(model), documents(lengths)
    trainer = trainer_for(model, arguments(tmp_path, loss=LONGCE), pairs=pairs)
    batch = collate(pairs, packing=packing)
    total = 0.0
    for pair, scored in zip(pairs, token_statistics(model, batch, WEIGHTING), strict=True):
        logp, logp_cf = plain_log_probabilities(reference, pair["input_ids"])
        token_weight = (logp.detach() - logp_cf).exp().clamp(0, 5)
        close(scored.token_weight, token_weight)
        close(scored.logp_cf, logp_cf)
        total = total - (token_weight * logp).sum()
    expected = total / sum(length - 1 for length in lengths)
    expected.backward()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=batch["target"].numel())
    loss.backward()
    close(loss, expected)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        close(p.grad, q.grad, msg=name)


def test_a_document_shorter_than_the_short_context_has_weights_of_one():
    model = prepare_model(tiny_model())
    pairs = documents([2, K, K + S])
    for scored in token_statistics(model, collate(pairs), WEIGHTING):
        torch.testing.assert_close(scored.token_weight, torch.ones_like(scored.token_weight), atol=1e-5, rtol=0)
    later = token_statistics(model, collate(documents([K + 2 * S])), WEIGHTING)[0].token_weight
    assert (later[K + S - 1 :] - 1).abs().min() > 1e-4, "and beyond it they differ"


def test_defaults_follow_the_objective_unless_given():
    assert (WEIGHTING.contrast, WEIGHTING.clip_min, WEIGHTING.clip_max) == ("ratio", 0.0, 5.0)
    assert (LossConfig().weighting.contrast, LossConfig().weighting.clip_min) == ("log", 0.8)
    given = LossConfig(objective="longce", contrast="log", clip_min=0.5).weighting
    assert (given.contrast, given.clip_min) == ("log", 0.5)
    config, _ = parse_args(["--objective=longce", "--clip_min=0.1", "--short_context=7"])
    assert (config.loss.weighting.contrast, config.loss.weighting.clip_min) == ("ratio", 0.1)
    assert config.loss.short_context == 7
    with pytest.raises(UserError, match="short_stride"):
        LossConfig(short_stride=0)


@pytest.mark.parametrize(
    ("format", "objective", "expected"),
    [("text", "perce", "persona.*got documents.*longce"), ("perce", "longce", "documents.*format perce.*text")],
)
def test_objective_and_rows_must_fit(format, objective, expected):
    with pytest.raises(UserError, match=expected):
        make_builder(TOKENIZER, DataConfig(), format, LossConfig(objective=objective))


ROWS = [{"text": TEXT * (1 + i % 3)} for i in range(12)]

FLAGS = ["--objective=longce", "--short_context=16", "--short_stride=8", "--max_length=64", "--precision=fp32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def test_a_whole_run(tmp_path, model, capsys):
    data, run = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"text": ""}]), tmp_path / "run"
    flags = [f"--model={model}", f"--data={data}", f"--output_dir={run}", "--max_steps=2", *FLAGS]
    assert main([*flags, "--skip_bad_rows"]) == 0
    out = capsys.readouterr().out
    assert "documents longer than --max_length 64 cut into pieces" in out and "loss, short context" in out
    assert "1 rows skipped" in out and "personal" not in out
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert next(entry for entry in history if "loss" in entry)["weight_mean"] > 0
    assert "Which tokens need the long context" in (run / "report.html").read_text()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["objective"], saved["clip_min"], saved["short_context"]) == ("longce", None, 16)


def test_mistakes(tmp_path, model, capsys):
    def result(rows, *flags):
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        code = main([f"--model={model}", f"--data={data}", f"--output_dir={tmp_path / 'run'}", *FLAGS, *flags])
        return code, *capsys.readouterr()

    fails(result([ROWS[0], {"text": None}]), "rows.jsonl:2", "'text'", "--skip_bad_rows")
    fails(result(ROWS, "--objective=perce"), "objective perce", "documents (format text)", "longce", "as --objective")
    persona = [{"persona": "p", "query": "q", "response": str(i)} for i in range(3)]
    fails(result(persona), "objective longce", "format perce", "{'text': …}")
    write_jsonl(tmp_path / "both" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "both" / "validation.jsonl", persona)
    fails(result(ROWS, f"--data={tmp_path / 'both'}"), "cannot be mixed", "format text", "format perce")


@pytest.mark.parametrize("objective", ["longce", "ce"])
def test_raw_rows_in_the_trainer(tmp_path, objective):
    args = arguments(
        tmp_path,
        loss=LossConfig(objective, short_context=K, short_stride=S),
        data=DataConfig(max_length=64),
        max_steps=1,
    )
    trainer = trainer_for(tiny_model(), args, pairs=ROWS, eval_dataset=Dataset.from_list(ROWS[:2]))
    trainer.train()
    assert trainer.evaluate()["eval_loss_without_persona"] > 0
