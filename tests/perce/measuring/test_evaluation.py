"""Generated replies depend neither on their batch nor on the model's own generation config. Losses do not depend on
whether replies of a conversation share tokens."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from perce import DataConfig, evaluate, load_examples
from perce.config.questions import EvaluateConfig
from perce.data.batch import collate
from perce.data.pairing import make_builder
from perce.data.rows import Example
from perce.measuring import evaluation, inference
from perce.measuring.evaluation import Evaluator, Item, Written, other_users, written_together
from perce.model.patch import prepare_model
from perce.reading.fields import Turn
from tests.helpers.tiny import (
    CHATML,
    QWEN3,
    demo_examples,
    read_jsonl,
    save_tiny_model,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)  # fmt: skip


def test_left_padding_does_not_change_a_reply():
    model, tokenizer = prepare_model(tiny_model("llama")), tiny_tokenizer()
    builder = make_builder(tokenizer, DataConfig(), "perce")
    items = [Item(i, str(i), example, builder.build(example), None) for i, example in enumerate(demo_examples(5))]
    prompts = [item.pair.input_ids[: -item.pair.response_length] for item in items]
    assert len(set(map(len, prompts))) > 1
    options = EvaluateConfig(temperature=0, max_new_tokens=12)
    evaluator = Evaluator(model, tokenizer, torch.device("cpu"), options, {})
    together = evaluator.replies(items)
    assert together == [evaluator.replies([item])[0] for item in items]
    stock = model.generate(torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False, eos_token_id=0)
    new = stock[0, len(prompts[0]) :].tolist()
    new = new[: new.index(0)] if 0 in new else new
    assert together[0].text == tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_persona_that_is_read_once_does_not_change_a_reply(architecture, monkeypatch):
    """Gemma's windows would count the padding after the persona, so the persona is read with each request there."""
    model, tokenizer = prepare_model(tiny_model(architecture)), tiny_tokenizer()
    persona = tuple(f"I keep bees in {number} old hives, and sell honey on Saturdays." for number in range(9))
    examples = [
        replace(example, persona=persona if index < 4 else example.persona, source=f"row {index}")
        for index, example in enumerate(demo_examples(6))
    ]
    builder = make_builder(tokenizer, DataConfig(), "perce")
    items = [Item(i, str(i), example, builder.build(example), None) for i, example in enumerate(examples)]
    groups = list(written_together(items, evaluation.continues(model, "branches"), 3, 600))
    assert sorted(item.index for group in groups for item in group) == list(range(6))
    if architecture == "gemma3":  # each prompt is computed whole
        assert all(len(group) * max(item.pair.prompt_length for item in group) <= 600 for group in groups)
    assert architecture == "gemma3" or any(
        len(group) == 3 and {item.pair.persona for item in group} == {items[0].pair.persona} for group in groups
    )
    options = EvaluateConfig(temperature=0, max_new_tokens=12)
    alone = Evaluator(model, tokenizer, torch.device("cpu"), options, {})
    shared = Evaluator(model, tokenizer, torch.device("cpu"), options, {}, "branches")
    calls, own = [], evaluation.prefill
    monkeypatch.setattr(evaluation, "prefill", lambda *args: calls.append(args) or own(*args))
    for group in groups:
        assert shared.replies(group) == [alone.replies([item])[0] for item in group]
    assert bool(calls) == (architecture != "gemma3")


def test_nothing_of_the_models_own_generation_config_is_used():
    model = prepare_model(tiny_model("llama"))
    tokenizer = tiny_tokenizer()
    builder = make_builder(tokenizer, DataConfig(), "perce")
    items = [Item(i, str(i), example, builder.build(example), None) for i, example in enumerate(demo_examples(3))]
    prompts = [item.pair.input_ids[: -item.pair.response_length] for item in items]
    options = EvaluateConfig(temperature=0, max_new_tokens=12)
    expected = Evaluator(model, tokenizer, torch.device("cpu"), options, {}).replies(items)
    hostile = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=12, num_beams=3)
    model.generation_config = hostile
    evaluator = Evaluator(model, tokenizer, torch.device("cpu"), options, {})
    assert evaluator.replies(items) == expected
    changed = model.generate(torch.tensor(prompts[:1]), generation_config=hostile, max_new_tokens=12)
    assert tokenizer.decode(changed[0, len(prompts[0]) :]).strip() != expected[0].text, "it would change the reply"


def conversations_of(*replies):
    """Conversations with these numbers of replies, each of another user."""
    return [
        {
            "user_id": f"u{row}", "personality": [f"i live in town {row} .", "i keep bees ."],
            "dialogue": [
                {"partner": f"what about {turn} and {row} ?", "self": f"town {row} has {turn * row} bees ."}
                for turn in range(count)
            ],
        }
        for row, count in enumerate(replies)
    ]  # fmt: skip


REPLIES = 4, 1, 3, 5, 2


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Evaluate a model of this template on conversations; the records, by example, and their file."""
    models, data = {}, write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations_of(*REPLIES))

    def run(name, *argv, template=CHATML, code=0):
        if template not in models:
            models[template] = save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", template)
        flags = ("--model", models[template], "--data", data, "--batch_size", 2, "--output", f"{name}.json")
        assert evaluate.main([*map(str, (*flags, *argv))]) == code
        lines = read_jsonl(Path(f"{name}.jsonl"))
        return sorted(lines, key=lambda record: record["example"]), lines

    return run


@pytest.fixture
def forwards(monkeypatch):
    """For each batch whose losses are computed: replies, tokens computed, and tokens without sharing."""
    seen = []

    def spied(pairs, *args, **kwargs):
        batch = collate(pairs, *args, **kwargs)
        seen.append((len(pairs), *batch["tokens"].tolist()))
        return batch

    monkeypatch.setattr(inference, "collate", spied)
    return seen


@pytest.mark.parametrize("template", [CHATML, QWEN3], ids=["chains", "branches"])
def test_losses_are_the_same_where_replies_share_tokens(evaluated, forwards, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    shared, _ = evaluated("a", "--generate", "false", template=template)
    computed, needed = (sum(column) for column in zip(*(found[1:] for found in forwards), strict=True))
    assert computed < 0.6 * needed
    assert {size for size, *_ in forwards} == {3, 5, 7}, "batches have whole conversations"
    forwards.clear()
    separate, _ = evaluated("b", "--generate", "false", "--share", "none", template=template)
    assert all(size <= 2 and computed == needed for size, computed, needed in forwards)
    for one, other in zip(shared, separate, strict=True):
        assert one.keys() == other.keys() and one["loss_swapped"] is not None
        for name, value in one.items():
            assert (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value) == other[name], name


def test_models_that_are_asked_with_and_without_sharing_are_compared(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluated("a", "--generate", "false", "--share", "none")
    evaluated("b", "--generate", "false", "--compare_with", "a.json")
    assert "not only the model differs" not in capsys.readouterr().out
    evaluated("a", "--generate", "false", code=2)
    assert "holds the records of another run (share was 'none'" in capsys.readouterr().err


def test_groups_of_a_batch_are_written_one_by_one_and_go_on_after_a_kill(evaluated, tmp_path, monkeypatch):
    """Replies are generated in groups of at most two; losses are computed for more replies together."""
    monkeypatch.chdir(tmp_path)
    flags = ("--max_new_tokens", 4)
    whole, lines = evaluated("whole", *flags)
    calls, own = [], Evaluator.replies

    def interrupted(self, items):
        calls.append([item.index for item in items])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(self, items)

    monkeypatch.setattr(Evaluator, "replies", interrupted)
    _, written = evaluated("half", *flags, code=130)
    assert written == lines[: len(written)] and len(written) == sum(map(len, calls[:3]))
    again, _ = evaluated("half", *flags)
    assert calls[4] == calls[3] and again == whole
    assert max(map(len, calls)) == 2


def test_a_conversation_has_one_partner_of_another_user(tmp_path):
    examples = load_examples(write_jsonl(tmp_path / "rows.jsonl", conversations_of(*REPLIES)), "train").all
    drawn = set()
    for seed in range(5):
        partners = other_users(examples, seed)
        of_conversation = {}
        for example, partner in zip(examples, partners, strict=True):
            assert examples[partner].user_id != example.user_id
            of_conversation.setdefault(example.source, set()).add(partner)
        assert len(of_conversation) == len(REPLIES) and all(len(found) == 1 for found in of_conversation.values())
        assert other_users(examples, seed) == partners
        drawn.add(tuple(partners))
    assert len(drawn) > 1


def users_of(*rows):
    """An example of each (user, persona)."""
    turns = (Turn("user", "Hi"),)
    return [
        Example((persona,), turns, "Hello.", user, None, f"rows.jsonl:{n}") for n, (user, persona) in enumerate(rows)
    ]


def test_another_users_persona_is_another_text():
    rows = [(f"u{i}", f"I live in town {i % 2}.") for i in range(24)] + [("u0", "I have two."), ("", "Nobody.")]
    examples = users_of(*rows)
    for seed in range(5):
        for example, partner in zip(examples, other_users(examples, seed), strict=True):
            assert examples[partner].persona != example.persona and examples[partner].user_id != example.user_id
    assert other_users(users_of(("a", "I bake."), ("b", "I bake."), ("c", "I bake.")), 0) == [None] * 3
    assert other_users(users_of(("a", "I bake."), ("a", "I ski.")), 0) == [None] * 2, "one user"
    assert None not in other_users(users_of((None, "I bake."), (None, "I ski.")), 0), "of nobody"


def test_nobodys_persona_is_not_anothers():
    """Examples without a persona have no other persona, and are not others'."""
    nobody = [replace(example, persona=()) for example in users_of(("a", "-"), ("c", "-"), ("", "-"))]
    known = users_of(("a", "I bake."), ("b", "I ski."))
    assert other_users([*nobody[:2], *known, nobody[2]], 0) == [None, None, 3, 2, None]
    assert other_users([*nobody, known[0]], 0) == [None] * 4


HENS = [f"I own {i} hens." for i in range(40_000)]
SIMILAR = {
    "nothing": [(f"u{i}", hens) for i, hens in enumerate(HENS)],
    "personas": [(f"u{i}", "I bake.") for i in range(40_000)],
    "users": [("u", hens) for hens in HENS],
    "either": [("u", hens) for hens in HENS[:20_000]] + [(f"u{i}", HENS[0]) for i in range(20_000)],
}


@pytest.mark.parametrize("same", SIMILAR)
def test_other_users_are_found_in_a_time_that_grows_with_their_number(same):
    for others in ([], [("other", "I ski.")]):
        rows = [*SIMILAR[same], *others]
        examples = [SimpleNamespace(user_id=user, persona=(persona,)) for user, persona in rows]
        start = time.process_time()
        partners = other_users(examples, 0)
        assert time.process_time() - start < 1, "a search through all others for each takes two seconds and more"
        if same in ("personas", "users"):
            assert set(partners[:-1]) == {40_000 if others else None}
        else:
            assert None not in partners[1:]


def test_the_next_one_that_fits_is_taken():
    for seed in range(30):
        draw = random.Random(seed)
        examples = users_of(*((f"u{draw.randrange(4)}", f"P{draw.randrange(4)}.") for _ in range(12)))
        who = [(example.user_id, example.persona) for example in examples]
        order = sorted(map(who.index, {*who}))
        random.Random(seed).shuffle(order)
        for (user, persona), partner in zip(who, other_users(examples, seed), strict=True):
            place = order.index(who.index((user, persona)))
            turned = order[place:] + order[:place]
            assert partner == next((i for i in turned if who[i][0] != user and who[i][1] != persona), None)


def test_a_persona_of_which_the_prompt_shows_the_same_is_none_of_another(evaluated, tmp_path, monkeypatch):
    """The second entries do not fit."""
    monkeypatch.chdir(tmp_path)
    rows = [{"user_id": f"u{i}", "persona": ["I bake.", f"{i} " * 200], "query": "Hi", "response": "No."} for i in "ab"]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    records, _ = evaluated("a", "--generate", "false", "--data", data, "--max_length", 100)
    assert [record["loss_swapped"] for record in records] == [None, None]
    assert "2 examples without another's persona that fits" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_reply_uses_the_words_of_the_persona_or_of_anothers():
    (example, *_) = demo_examples(1)
    example = replace(example, persona=("I keep bees.",), response="The bees and the hens.")
    item = Item(
        0, "0", example, make_builder(tiny_tokenizer(), DataConfig(), "perce").build(example), None, ("I own hens.",)
    )
    evaluator = object.__new__(Evaluator)
    evaluator.scorers = {}
    for text, own, others in (("Bees!", 1, 0), ("Hens!", 0, 1), ("Bees, hens, you.", 1, 1), ("No.", 0, 0)):
        scores = evaluator.scores(item, Written(text, False))
        assert (scores["uses_persona"], scores["uses_another"]) == (own, others)
        assert (scores["reply_words"], scores["reference_words"]) == (len(text.split()), 5)
    nobody = replace(item, pair=replace(item.pair, passages=[]), others=())
    scores = evaluator.scores(nobody, Written("Bees!", True))
    assert (
        scores["uses_persona"] is scores["uses_another"] is scores["reference_uses_persona"] is None
        and scores["is_cut"]
    )


def scored(response=None, **scorers):
    (example,) = demo_examples(1)
    item = Item(0, "0", example, make_builder(tiny_tokenizer(), DataConfig(), "perce").build(example), None)
    evaluator = object.__new__(Evaluator)
    evaluator.scorers = scorers
    if response is not None:
        item = replace(item, example=replace(example, response=response))
    return evaluator.scores(item, Written("Hello.", False)), example.source


def test_a_metric_may_return_a_number_of_numpy_or_torch_or_none():
    found = {"a": np.float32(0.5), "b": torch.tensor(0.5), "c": None, "d": np.float64("nan")}
    scores, _ = scored(**{name: lambda said, reference, value=value: value for name, value in found.items()})
    assert json.loads(json.dumps([scores[name] for name in "abcd"])) == [0.5, 0.5, None, None]


def test_a_metric_is_asked_only_about_rows_with_a_reply_and_is_named_where_it_fails():
    def ratio(said, reference):
        return len(said) / len(reference)

    scores, source = scored("", ratio=ratio)
    assert scores["ratio"] is scores["reference_words"] is scores["reference_uses_persona"] is None
    with pytest.raises(RuntimeError, match=f"^{source}: the metric other failed \\(ZeroDivisionError: ") as caught:
        scored(other=lambda said, reference: 1 / 0)
    assert type(caught.value.__cause__) is ZeroDivisionError
