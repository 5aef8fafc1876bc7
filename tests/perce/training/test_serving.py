"""A saved run can be prompted with transformers alone, and its replies end."""

import copy

import pytest
import torch
from jinja2.exceptions import TemplateError
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from perce import DataConfig, LossConfig, PerceTrainer, UserError, prompt_text
from perce.config.prompt import SYSTEM_MESSAGE, PromptStyle
from perce.data.chat import ChatFormat
from perce.data.dataset import pair_dataset
from perce.data.pairing import PairSource
from perce.data.prompt import PLAIN_CHAT_TEMPLATE
from perce.data.stream import PairStream
from perce.data.template import on_one_day
from perce.reading.fields import Turn
from perce.training.serving import end_of_reply, serve_as_trained, takes_persona, with_persona
from tests.helpers.models import documents
from tests.helpers.pairs import EXAMPLE, builder
from tests.helpers.templates import CHAT_TEMPLATES
from tests.helpers.tiny import tiny_model
from tests.helpers.tokenizers import tokenizer_like
from tests.helpers.trainers import LORA, PAIRS, arguments

ROW = {"persona": ["I keep bees."], "query": "Why?", "response": "The bees."}


def base_tokenizer(template):
    """The tokenizer of a base model, whose end of sequence does not end a turn of the chat template."""
    tokenizer = copy.deepcopy(tokenizer_like("qwen2"))
    tokenizer.chat_template = template and CHAT_TEMPLATES[template]
    return tokenizer


@pytest.mark.parametrize(("kind", "template"), [("full", "chatml"), ("lora", "chatml"), ("full", None)])
def test_a_base_model_learns_to_stop_and_does_from_its_saved_files_alone(tmp_path, kind, template):
    tokenizer = base_tokenizer(template)
    model = tiny_model(vocab_size=1000, eos_token_id=tokenizer.eos_token_id, bos_token_id=0, pad_token_id=1)
    model.save_pretrained(tmp_path / "base")
    trainer = PerceTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        arguments(tmp_path / "run", max_steps=30, loss=LossConfig(objective="ce")),
        train_dataset=[ROW] * 8, processing_class=tokenizer,
        peft_config=LoraConfig(**{**LORA, "r": 16, "lora_alpha": 64}) if kind == "lora" else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "saved")

    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    auto = AutoPeftModelForCausalLM if kind == "lora" else AutoModelForCausalLM
    served = auto.from_pretrained(tmp_path / "saved")
    system = f"About the user:\n- I keep bees.\n\n{SYSTEM_MESSAGE}"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Why?"}]
    prompt = saved.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    config = GenerationConfig.from_pretrained(tmp_path / "saved", max_new_tokens=40, do_sample=False)
    with torch.no_grad():
        reply = served.generate(prompt, generation_config=config)[0, prompt.shape[1] :]
    end = "<|im_end|>" if template else "</s>"
    assert saved.decode(reply).strip() == f"The bees.{end}"
    assert config.eos_token_id == ([1, saved.convert_tokens_to_ids(end)] if template else [1])
    assert saved.chat_template.endswith(CHAT_TEMPLATES[template] if template else PLAIN_CHAT_TEMPLATE)
    asked = [{"role": "user", "content": "Why?"}]
    by_persona = {"persona": ["I keep bees."], "add_generation_prompt": True, "return_dict": False}
    assert saved.apply_chat_template(asked, **by_persona) == prompt[0].tolist()


def test_the_end_of_replies_of_every_kind_of_dataset():
    own = builder()
    pairs = pair_dataset([EXAMPLE], own)
    assert end_of_reply(pairs) == own.chat_format.end_of_turn == own.tokenizer.eos_token_id
    assert end_of_reply(PairStream(PairSource([EXAMPLE], own, False), seed=0)) == own.tokenizer.eos_token_id
    assert end_of_reply(documents([60])) is None and end_of_reply(None) is None
    model = tiny_model(eos_token_id=3)
    tokenizer = copy.deepcopy(own.tokenizer)
    for _ in range(2):
        serve_as_trained(model, tokenizer, pairs, DataConfig())
    assert model.generation_config.eos_token_id == [3, own.tokenizer.eos_token_id]


STYLES = {
    "default": {}, "before the user's turn": {"place": "user"}, "own words": {"system": "Be brief.", "item": "* {}\n"},
    "a slot": {"system": "You know this:\n{persona}Use it.", "header": "", "footer": ""},
}  # fmt: skip
LEFT_AS_THEY_ARE = ()


PLACES = ("default", "before the user's turn")  # what else a style has are words, quick in every sixth template


@pytest.mark.parametrize(
    ("template", "style"),
    [
        pytest.param(template, style, marks=[pytest.mark.slow] * (style not in PLACES and number % 6 > 0))
        for number, template in enumerate([None, *CHAT_TEMPLATES])
        for style in STYLES
    ],
)
@on_one_day()
def test_the_saved_template_takes_the_persona_and_is_else_as_it_was(template, style):
    style = STYLES[style]
    tokenizer = base_tokenizer(template)
    try:
        chat_format = ChatFormat(tokenizer, {}, style=PromptStyle.of(style))
    except UserError:
        return  # refused in training
    before = tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    talk = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "?"},
    ]
    options = {"add_generation_prompt": True, "tokenize": False}
    plain = tokenizer.apply_chat_template(talk, **options)
    tokenizer.chat_template = with_persona(tokenizer, chat_format)
    assert tokenizer.apply_chat_template(talk, **options) == plain
    if tokenizer.chat_template == before:
        assert template in LEFT_AS_THEY_ARE
        return
    assert with_persona(tokenizer, chat_format) == tokenizer.chat_template, "once"
    for entries in (["I keep bees."], [" I keep bees. ", 'I\'m "Ana"\\ {x}.'], []):
        turns = tuple(Turn(turn["role"], turn["content"]) for turn in talk)
        trained = chat_format.prompt(turns, chat_format.block(entries))
        assert tokenizer.apply_chat_template(talk, persona=entries, **options) == trained
        told = prompt_text(entries, tokenizer=tokenizer, prompt=style or None)
        if not style.get("place") and chat_format.has_system_role:
            messages = [{"role": "system", "content": told}, *talk]
            assert tokenizer.apply_chat_template(messages, **options) == trained
        assert told.strip() in trained or template == "drops-history"


def test_the_persona_variable_fills_the_first_slot_of_a_system_message_by_what_llama_cpp_knows():
    tokenizer = base_tokenizer("chatml")
    chat_format = ChatFormat(tokenizer, {})
    tokenizer.chat_template = with_persona(tokenizer, chat_format)
    turns = (Turn("system", "One {persona} two {persona}."), Turn("user", "Why?"))
    asked = [{"role": turn.role, "content": turn.content} for turn in turns]
    for persona in (["A.", "{persona}"], []):
        said = tokenizer.apply_chat_template(asked, persona=persona, tokenize=False, add_generation_prompt=True)
        assert said == chat_format.prompt(turns, chat_format.block(persona))
    assert "replace(" not in tokenizer.chat_template, "its Jinja refuses the count"


def test_what_the_persona_variable_cannot_stand_for_is_an_error_and_blanks_are_nothing():
    tokenizer = base_tokenizer("chatml")
    keys = {"header": "🐝:\n"}
    chat_format = ChatFormat(tokenizer, {}, style=PromptStyle.of(keys))
    tokenizer.chat_template = with_persona(tokenizer, chat_format)
    assert takes_persona(tokenizer.chat_template) and not takes_persona(None)
    asked, options = [{"role": "user", "content": "Why? "}], {"tokenize": False, "add_generation_prompt": True}
    trained = chat_format.prompt((Turn("user", "Why? "),), chat_format.block(["A."]))
    for persona in ("A.", ["A."], ["A.", " ", None, 3]):
        assert tokenizer.apply_chat_template(asked, persona=persona, **options) == trained
    trained = chat_format.prompt((Turn("user", "Why? "),), "")
    for persona in ([], "", [" "]):
        assert tokenizer.apply_chat_template(asked, persona=persona, **options) == trained
    assert tokenizer.apply_chat_template(asked, persona=None, **options) != trained, "as without the variable"
    for wrong in ([{"role": "assistant", "content": "Hi"}, *asked], [{"role": "user", "content": [{"type": "text"}]}]):
        with pytest.raises(TemplateError, match="persona: expected"):
            tokenizer.apply_chat_template(wrong, persona=["A."], **options)


def test_pairs_of_a_tokenizer_that_knows_no_letters_need_none(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    PerceTrainer(tiny_model(), arguments(tmp_path), train_dataset=PAIRS, processing_class=tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    with pytest.raises(UserError, match="would never stop"):
        ChatFormat(tokenizer, {})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_generation_config_that_could_not_be_saved_is_found_before_training(tmp_path, kind):
    def trainer(**generation):
        tokenizer = base_tokenizer("chatml")
        model = tiny_model(vocab_size=1000)
        for name, value in generation.items():
            setattr(model.generation_config, name, value)
        lora = LoraConfig(**LORA) if kind == "lora" else None
        made = PerceTrainer(
            model, arguments(tmp_path), train_dataset=[ROW], processing_class=tokenizer, peft_config=lora
        )
        assert tokenizer.chat_template == CHAT_TEMPLATES["chatml"], "the caller's tokenizer stays as it was"
        return made

    trainer(temperature=0.6, do_sample=False).save_model(tmp_path / kind)
    saved = GenerationConfig.from_pretrained(tmp_path / kind)
    assert saved.do_sample and saved.temperature == 0.6
    with pytest.raises(UserError, match=r"generation_config\.json is invalid"):
        trainer(cache_implementation="none such")
