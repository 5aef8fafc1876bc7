"""Token weights for other trainers give the same loss there, by their own rules."""

import json

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from perce import LossConfig, PerceTrainer, UserError, load_examples, score
from perce.measuring.exports import LEAST, swift_row
from tests.helpers.tiny import read_jsonl, save_tiny_model, tiny_model, tiny_tokenizer, write_jsonl
from tests.helpers.trainers import arguments

ROWS = [
    {"persona": ["I keep bees."], "query": "Tonight?", "response": "No, the bees need me.", "weight": 1.0},
    {"persona": ["My dog is Juno."], "query": "Who?", "response": "Juno.", "weight": 2.0},
    {"persona": ["I knit."], "query": "A gift?", "response": "Mittens, of course, grey ones.", "weight": 1.0},
]


def loss_in_swift(model, rows, opening=()):
    """The loss of one step as ms-swift 4.5.2 computes it (swift/template/base.py, swift/trainers/seq2seq_trainer.py):
    tokens with a loss_scale above 0 have labels, a row's first token never, and the sum is divided by their number."""
    total, labelled = 0.0, 0
    for row in rows:
        (message,) = row["messages"]
        ids, scale = ([*first, *message["content"][name]] for first, name in (
            (opening, "token_ids"), ([0.0] * len(opening), "loss_scale")))  # fmt: skip
        assert len(ids) == len(scale) and message["role"] == "assistant" and not row["add_eos"]
        scale, target = torch.tensor(scale)[1:], torch.tensor(ids)[1:]
        losses = cross_entropy(model(input_ids=torch.tensor([ids])).logits[0, :-1], target, reduction="none")
        total, labelled = total + (losses * scale).sum(), labelled + int((scale > 0).sum())
    return total / labelled


@pytest.mark.parametrize("objective", ["perce", "nextquill"])
def test_the_exported_loss_is_that_of_frozen_weights(objective, tmp_path, capsys):
    model, data, file = save_tiny_model(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "w.jsonl"
    write_jsonl(data, ROWS)
    clip = {} if objective == "nextquill" else {"clip_min": 0.05}
    flags = [text for name, value in clip.items() for text in (f"--{name}", str(value))]
    command = ["--model", str(model), "--data", str(data), "--split", "train", "--jsonl", str(file), *flags]
    assert score.main([*command, "--objective", objective, "--export", "swift"]) == 0
    assert f"written  {tmp_path / 'w.swift.jsonl'}" in capsys.readouterr().out
    exported = read_jsonl(tmp_path / "w.swift.jsonl")
    found = loss_in_swift(tiny_model(), exported)
    loss = LossConfig(objective=objective, estimate="frozen", **clip)
    trainer = PerceTrainer(
        tiny_model(), arguments(tmp_path / "run", loss=loss, max_steps=1, per_device_train_batch_size=len(ROWS)),
        train_dataset=Dataset.from_list(ROWS), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert found.item() == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)
    assert len(load_examples(str(data), "train").all) == len(exported) == len(read_jsonl(file))


def test_what_the_tokenizer_puts_first_is_left_to_ms_swift(tmp_path):
    """A beginning-of-sequence token, which ms-swift also puts before token_ids."""
    record = {
        "source": "row 1",
        "prompt_ids": [1, 5, 6],
        "response_ids": [7, 8],
        "weight": [0.8, 0.0],
        "data_weight": 1.0,
    }
    (message,) = swift_row(record, [1])["messages"]
    assert message["content"] == {"token_ids": [5, 6, 7, 8], "loss_scale": [0.0, 0.0, 0.8, LEAST]}
    with pytest.raises(UserError, match=r"row 1 begins with the token ids \[1, 5\], and ms-swift puts \[1, 1\] before"):
        swift_row(record, [1, 1])


def test_records_of_another_form_are_not_gone_on_with(tmp_path, capsys):
    model, data, file = save_tiny_model(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "w.jsonl"
    write_jsonl(data, ROWS)
    command = ["--model", str(model), "--data", str(data), "--split", "train", "--jsonl", str(file)]
    assert score.main(command) == 0
    facts = json.loads((tmp_path / "w.jsonl.run.json").read_text())
    (tmp_path / "w.jsonl.run.json").write_text(json.dumps({**facts, "form": 1}))
    capsys.readouterr()
    assert score.main([*command, "--export", "swift"]) == 2
    assert "form was 1 and is 2 now" in capsys.readouterr().err


def test_an_export_without_records_or_weights_is_refused(capsys):
    for argv, message in (
        (["--export", "swift"], "export: expected a --jsonl FILE too"),
        (
            ["--export", "swift", "--jsonl", "w.jsonl", "--objective", "ce"],
            "export: expected an --objective that computes a weight",
        ),
        (["--export", "swift", "--jsonl", "w.jsonl", "--objective", "random"], "export: expected an --objective"),
        (["--export", "axolotl", "--jsonl", "w.jsonl"], "swift"),
        (["--export", "swift", "--jsonl", "w.jsonl", "--output", "w.swift.jsonl"], "w.swift.jsonl"),
    ):
        assert score.main(argv) == 2 and message in capsys.readouterr().err
