"""Generated replies do not depend on their batch, nor on what the model would generate with."""

import torch
from transformers import GenerationConfig

from perce import DataConfig
from perce.config.schema import EvaluateConfig
from perce.data.pairing import make_builder
from perce.measuring.evaluation import Evaluator, Item
from perce.model.patch import prepare_model
from tests.helpers.tiny import demo_examples, tiny_model, tiny_tokenizer


def test_left_padding_does_not_change_a_reply():
    model, tokenizer = prepare_model(tiny_model("llama")), tiny_tokenizer()
    builder = make_builder(tokenizer, DataConfig(), "perce")
    items = [Item(i, str(i), example, builder.build(example), None) for i, example in enumerate(demo_examples(5))]
    prompts = [item.pair.input_ids[: -item.pair.response_length] for item in items]
    assert len(set(map(len, prompts))) > 1
    options = EvaluateConfig(temperature=0, max_new_tokens=12)
    evaluator = Evaluator(model, tokenizer, torch.device("cpu"), options, {})
    together = evaluator.replies(prompts, items)
    assert together == [evaluator.replies([p], [item])[0] for p, item in zip(prompts, items, strict=True)]
    stock = model.generate(torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False, eos_token_id=0)
    new = stock[0, len(prompts[0]) :].tolist()
    new = new[: new.index(0)] if 0 in new else new
    assert together[0] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_nothing_of_the_models_own_generation_config_is_used():
    model = prepare_model(tiny_model("llama"))
    tokenizer = tiny_tokenizer()
    builder = make_builder(tokenizer, DataConfig(), "perce")
    items = [Item(i, str(i), example, builder.build(example), None) for i, example in enumerate(demo_examples(3))]
    prompts = [item.pair.input_ids[: -item.pair.response_length] for item in items]
    options = EvaluateConfig(temperature=0, max_new_tokens=12)
    expected = Evaluator(model, tokenizer, torch.device("cpu"), options, {}).replies(prompts, items)
    hostile = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=12, num_beams=3)
    model.generation_config = hostile
    evaluator = Evaluator(model, tokenizer, torch.device("cpu"), options, {})
    assert evaluator.replies(prompts, items) == expected
    changed = model.generate(torch.tensor(prompts[:1]), generation_config=hostile, max_new_tokens=12)
    assert tokenizer.decode(changed[0, len(prompts[0]) :]).strip() != expected[0], "it would have mattered"
