"""LongCE: weights and gradients equal a plain computation over explicit windows; windows cover a document once."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from datasets import Dataset

from perce.config.commands import parse_args
from perce.config.schema import DataConfig, LossConfig
from perce.data.batch import collate
from perce.data.documents import DocumentBuilder, short_windows
from perce.data.pairing import make_builder
from perce.data.pairs import counterfactual_pieces
from perce.data.rows import Document, load_examples
from perce.errors import UserError
from perce.model.passes import token_statistics
from perce.model.patch import prepare_model
from perce.train import main
from tests.test_trainer import arguments, trainer_for
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer, write_jsonl
from tests.training import fails

K, S = 16, 8
LONGCE = LossConfig(objective="longce", short_context=K, short_stride=S)
TOKENIZER = tiny_tokenizer()
TEXT = "The bees left on Monday. Ana wrote it down, as she does. By Friday they were back, louder than before. "
WEIGHTS = {"clip_min": 0.0, "clip_max": 5.0, "contrast": "ratio"}


def documents(lengths):
    """Pairs of documents of so many tokens, chance ids."""
    torch.manual_seed(2)
    builder = DocumentBuilder(TOKENIZER, max_length=1000, short_context=K, short_stride=S)
    return [{**vars(builder._pair(torch.randint(1, 400, (n,)).tolist())), "example": i} for i, n in enumerate(lengths)]


def plain_log_probabilities(model, ids):
    """(logp, logp_cf) of ids[1:]: token i from all before it, and from K to K + S - 1 tokens, window by window."""

    def logp(context, target):
        return model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)[target]

    long = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    long = long.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    with torch.no_grad():
        short = [logp(ids[max((i - K) // S * S, 0) if i >= K + S else 0 : i], ids[i]) for i in range(1, len(ids))]
    return long, torch.stack(short)


# ---- windows and pieces


@pytest.mark.parametrize("length", [2, 5, K, K + 1, K + S, K + S + 1, K + 2 * S, K + 2 * S + 3, 99])
def test_windows_predict_every_token_once_from_at_least_the_short_context(length):
    windows = short_windows(length, K, S)
    predicted = [i for _, end, count in windows for i in range(end - count, end)]
    assert predicted == list(range(1, length))
    assert windows[0][0] == 0 and all(end - count - start == K for start, end, count in windows[1:])
    assert all(end - start <= K + S for start, end, _ in windows)


def test_the_windows_are_those_of_the_authors_package():
    """Their loop: windows of K + S tokens every S, the last S predicted, the very last window cut to fit."""
    starts = range(0, 99 - K, S)
    theirs = [(start, min(start + K + S, 99), min(S, 99 - start - K)) for start in starts]
    assert short_windows(99, K, S)[1:] == theirs[1:], "their first predicts from K on; ours from the beginning"


@pytest.mark.parametrize("max_length", [16, 17, 40, 1000])
def test_pieces_of_a_long_document_predict_every_token_once(max_length):
    ids = [*TOKENIZER(TEXT * 3)["input_ids"], TOKENIZER.eos_token_id]
    pairs = DocumentBuilder(TOKENIZER, max_length=max_length, short_context=4, short_stride=2).pairs(
        Document(TEXT * 3, None, "d:1")
    )
    assert [token for pair in pairs for token in pair.input_ids[1:]] == ids[1:]
    assert all(2 <= len(pair.input_ids) <= max_length for pair in pairs)
    assert all(len(pair.personal) == pair.response_length == len(pair.input_ids) - 1 for pair in pairs)


def test_windows_that_miss_a_token_are_caught():
    (pair,) = documents([60])
    pair["windows"] = pair["windows"][:-1]
    with pytest.raises(AssertionError, match="same ids"):
        counterfactual_pieces(pair)


# ---- weights and gradients


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
    for pair, scored in zip(pairs, token_statistics(model, batch, **WEIGHTS), strict=True):
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
    for scored in token_statistics(model, collate(pairs), **WEIGHTS):
        torch.testing.assert_close(scored.token_weight, torch.ones_like(scored.token_weight), atol=1e-5, rtol=0)
    later = token_statistics(model, collate(documents([K + 2 * S])), **WEIGHTS)[0].token_weight
    assert (later[K + S - 1 :] - 1).abs().min() > 1e-4, "and beyond it they differ"


# ---- options and rows


def test_defaults_follow_the_objective_unless_given():
    assert (LONGCE.contrast, LONGCE.clip_min, LONGCE.clip_max) == ("ratio", 0.0, 5.0)
    assert (LossConfig().contrast, LossConfig().clip_min) == ("log", 0.8)
    given = LossConfig(objective="longce", contrast="log", clip_min=0.5)
    assert (given.contrast, given.clip_min) == ("log", 0.5)
    config, _ = parse_args(["--objective=longce", "--clip_min=0.1", "--short_context=7"], {})
    assert (config.loss.contrast, config.loss.clip_min, config.loss.short_context) == ("ratio", 0.1, 7)
    with pytest.raises(UserError, match="short_stride"):
        LossConfig(short_stride=0)


def test_rows_of_text(tmp_path):
    rows = [{"text": "One.", "user_id": 7}, {"text": "Two.", "meta": {}}]
    examples = load_examples(write_jsonl(tmp_path / "a.jsonl", rows), "train").all
    assert examples == [Document("One.", "7", "a.jsonl:1"), Document("Two.", None, "a.jsonl:2")]
    persona = {"text": "t", "persona": "p", "query": "q", "response": "r"}
    assert load_examples(write_jsonl(tmp_path / "b.jsonl", [persona]), "train").format == "perce"
    for row in ({"text": ""}, {"text": 3}, {"text": ["a"]}, {"txt": "a"}):
        with pytest.raises(UserError, match=r"c.jsonl:2.*'text'.*expected"):
            load_examples(write_jsonl(tmp_path / "c.jsonl", [rows[0], row]), "train")


@pytest.mark.parametrize(
    ("format", "objective", "expected"),
    [("text", "perce", "persona.*got documents.*longce"), ("perce", "longce", "documents.*format perce.*text")],
)
def test_objective_and_rows_must_fit(format, objective, expected):
    with pytest.raises(UserError, match=expected):
        make_builder(TOKENIZER, DataConfig(), format, LossConfig(objective=objective))


# ---- runs

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
    assert (saved["contrast"], saved["clip_min"], saved["short_context"]) == ("ratio", 0.0, 16)


def test_mistakes(tmp_path, model, capsys):
    def result(rows, *flags):
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        code = main([f"--model={model}", f"--data={data}", f"--output_dir={tmp_path / 'run'}", *FLAGS, *flags])
        return code, *capsys.readouterr()

    fails(result([ROWS[0], {"text": None}]), "rows.jsonl:2", "'text'", "--skip_bad_rows")
    fails(result(ROWS, "--objective=perce"), "objective perce", "documents (format text)", "longce or ce")
    persona = [{"persona": "p", "query": "q", "response": str(i)} for i in range(3)]
    fails(result(persona), "objective longce", "format perce", "{'text': …}")
    write_jsonl(tmp_path / "both" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "both" / "validation.jsonl", persona)
    fails(result(ROWS, f"--data={tmp_path / 'both'}"), "cannot be mixed", "format text", "format perce")


@pytest.mark.parametrize("objective", ["longce", "ce"])
def test_raw_rows_in_the_trainer(tmp_path, objective):
    args = arguments(tmp_path, loss=replace(LONGCE, objective=objective), data=DataConfig(max_length=64), max_steps=1)
    trainer = trainer_for(tiny_model(), args, pairs=ROWS, eval_dataset=Dataset.from_list(ROWS[:2]))
    trainer.train()
    assert trainer.evaluate()["eval_loss_without_persona"] > 0
