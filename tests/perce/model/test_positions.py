"""Encodings that depend on a forward pass's length: a run has one set of factors, or an error names lengths that
work."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from perce import DataConfig, MemoryConfig, PerceTrainer, UserError, disable_dropout, load_examples
from perce.data.batch import collate
from perce.data.pairing import make_builder
from perce.evaluate import main as evaluate
from perce.model.patch import prepare_model
from perce.model.positions import position_limit
from perce.score import main as score
from perce.train import main as train
from tests.helpers.architectures import tiny_config
from tests.helpers.models import perce_forward
from tests.helpers.tiny import demo_pairs, read_jsonl, tiny_model, tiny_tokenizer, write_jsonl
from tests.helpers.trainers import arguments, trainer_for

PAIRS = sorted(demo_pairs(8), key=lambda pair: len(pair["input_ids"]))
LENGTHS = [len(pair["input_ids"]) for pair in PAIRS]
SWITCH = (LENGTHS[0] + LENGTHS[-1]) // 2
assert LENGTHS[0] < SWITCH < LENGTHS[-1]


def longrope(architecture="phi3", switch=SWITCH):
    config = tiny_config(architecture)
    config.max_position_embeddings, config.original_max_position_embeddings = 16 * switch, switch
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 16.0, "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4, "original_max_position_embeddings": switch, "partial_rotary_factor": 1.0,
        "short_mscale": 1.1, "long_mscale": 1.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return disable_dropout(AutoModelForCausalLM.from_config(config))


def logp(model, pairs):
    with torch.no_grad():
        return perce_forward(model, collate(pairs))[1:3]


@pytest.mark.parametrize("architecture", ["phi3", "phimoe"])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(tmp_path, architecture):
    trainer = trainer_for(longrope(architecture), arguments(tmp_path), pairs=PAIRS)
    short = PAIRS[0]["response_length"]
    for together, alone in zip(logp(trainer.model, PAIRS), logp(trainer.model, PAIRS[:1]), strict=True):
        torch.testing.assert_close(together[:short], alone, atol=2e-5, rtol=1e-5)


def test_both_passes_have_the_factors_of_the_longest_sequence_of_the_run(tmp_path):
    """A sequence may be long only because of its persona: PIR would then measure the change of encoding."""
    pair = PAIRS[-1]
    start, end = pair["persona_span"]
    assert len(pair["input_ids"]) - (end - start) < SWITCH
    trainer = trainer_for(longrope(), arguments(tmp_path), pairs=[pair] * 4)
    config = longrope().config
    config.rope_parameters = config.rope_parameters | {"short_factor": config.rope_parameters["long_factor"]}
    always_long = AutoModelForCausalLM.from_config(config).eval()
    always_long.load_state_dict(trainer.model.state_dict())
    for ours, theirs in zip(logp(trainer.model, [pair]), logp(prepare_model(always_long), [pair]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_short_runs_keep_the_short_factors(tmp_path):
    trainer = trainer_for(longrope(switch=LENGTHS[-1]), arguments(tmp_path), pairs=PAIRS)
    own = longrope(switch=LENGTHS[-1])
    own.load_state_dict(trainer.model.state_dict())
    ids = torch.tensor([PAIRS[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(input_ids=ids).logits, own(input_ids=ids).logits)
    longer = [dict(PAIRS[-1]) | {"input_ids": [*PAIRS[-1]["input_ids"][:-1], 7, *PAIRS[-1]["input_ids"][-1:]]}]
    with pytest.raises(UserError, match=rf"eval_dataset: sequences have up to {LENGTHS[-1] + 1} .*longrope.*settled"):
        trainer.evaluate(longer)


def test_a_cached_persona_has_the_same_factors(tmp_path):
    """The persona is run in chunks, and the first chunks are short."""
    args = arguments(tmp_path, memory=MemoryConfig(persona_grad="none"), max_steps=1)
    one = trainer_for(longrope(), args, pairs=PAIRS)
    two = trainer_for(longrope(), arguments(tmp_path, max_steps=1), pairs=PAIRS)
    two.model.load_state_dict(one.model.state_dict())
    losses = [trainer.evaluate(PAIRS[:2])["eval_loss"] for trainer in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_later_run_of_the_same_model_has_its_own_factors(tmp_path):
    model = longrope(switch=LENGTHS[0])
    short = [{**PAIRS[0], "input_ids": PAIRS[0]["input_ids"][1:], "persona_span": (3, 20)}]
    before = logp(prepare_model(model.eval()), short)
    trainer_for(model, arguments(tmp_path), pairs=PAIRS)
    assert (logp(model.eval(), short)[0] - before[0]).abs().max() > 1e-3
    for _ in range(2):
        trainer_for(model, arguments(tmp_path), pairs=short * 2)
        torch.testing.assert_close(logp(model.eval(), short), before)


def test_a_model_that_was_pickled_is_settled_again(tmp_path):
    """Its encodings come back with their own forward, and still say that they have the long factors."""
    model = trainer_for(longrope(), arguments(tmp_path), pairs=PAIRS).model
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    trainer_for(other, arguments(tmp_path), pairs=PAIRS)
    torch.testing.assert_close(logp(other, PAIRS[:1]), logp(model, PAIRS[:1]))


def test_a_trainer_without_datasets_settles_at_its_first_evaluation(tmp_path):
    trainer = PerceTrainer(longrope(), arguments(tmp_path), processing_class=tiny_tokenizer())
    expected = [trainer.evaluate(PAIRS)["eval_loss"] for _ in range(2)]
    together = trainer_for(longrope(), arguments(tmp_path), pairs=PAIRS).evaluate(PAIRS)["eval_loss"]
    assert expected == [pytest.approx(together, rel=1e-5)] * 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with a switch in the middle of the built-in examples."""
    directory = tmp_path_factory.mktemp("longrope")
    longrope().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_scores_do_not_depend_on_the_batch(saved, tmp_path):
    records = []
    for size in (1, 8):
        file = tmp_path / f"{size}.jsonl"
        assert score(["--model", str(saved), "--jsonl", str(file), "--limit", "8", "--batch_size", str(size)]) == 0
        records.append(read_jsonl(file))
    lengths = [len(record["prompt_ids"]) + len(record["response_ids"]) for record in records[0]]
    assert min(lengths) < SWITCH < max(lengths)
    for one, other in zip(*records, strict=True):
        assert one["pir"] == pytest.approx(other["pir"], abs=1e-4)


def test_evaluations_do_not_depend_on_the_batch(saved, tmp_path):
    losses = []
    for size in (1, 8):
        file = tmp_path / f"{size}.json"
        options = ["--limit", "8", "--batch_size", str(size), "--max_new_tokens", "2", "--output", str(file)]
        assert evaluate(["--model", str(saved), *options]) == 0
        records = read_jsonl(file.with_suffix(".jsonl"))
        losses.append([[record[name] for name in ("loss", "loss_without", "loss_swapped")] for record in records])
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("command", [score, evaluate])
def test_questions_beyond_what_dynamic_encodings_have(tmp_path, capsys, command):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_model(rope_parameters=rope, max_position_embeddings=SWITCH).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert command(["--model", str(tmp_path), "--limit", "8"]) == 2
    assert "rope_type dynamic) depends on the longest sequence of a batch" in capsys.readouterr().err


def test_a_long_reference_leaves_a_reply_its_room(tmp_path):
    """A reply follows the prompt, not the response in the data."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    row = {"persona": ["I ski."], "query": "Hi", "response": "Hello you. " * 30}
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    pair = make_builder(tiny_tokenizer(), DataConfig(), "perce").build(load_examples(data, "train").all[0])
    length, reply = len(pair.input_ids), pair.response_length
    tiny_model(rope_parameters=rope, max_position_embeddings=length).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--data", str(data), "--max_new_tokens"]
    assert [evaluate([*flags, str(most)]) for most in (reply, reply + 1)] == [0, 2]


def test_a_run_says_that_short_sequences_have_long_factors(saved, tmp_path, capsys):
    flags = ["--model", str(saved), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--precision", "fp32"]
    assert train([*flags, "--eval_examples", "2", "--report_examples", "1"]) == 0
    assert f"beyond {SWITCH}: the position encoding (longrope) uses its long factors" in capsys.readouterr().out


def test_an_encoding_that_follows_every_length_has_no_longer_sequences(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=SWITCH)
    with pytest.raises(UserError, match=rf"the model has {SWITCH} positions.*rope_type dynamic.*--max_length {SWITCH}"):
        trainer_for(model, arguments(tmp_path), pairs=PAIRS)
    fits = [pair for pair in PAIRS if len(pair["input_ids"]) <= SWITCH]
    for persona_grad in ("full", "none"):
        trainer_for(model, arguments(tmp_path, memory=MemoryConfig(persona_grad=persona_grad)), pairs=fits)


def test_stretched_positions_count():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    assert position_limit(tiny_model(rope_parameters=rope).config) == 16384
    assert position_limit(tiny_model().config) == 8192
    assert position_limit(tiny_config("xlnet")) is None, "-1 means without end"
