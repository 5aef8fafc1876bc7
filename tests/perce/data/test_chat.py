"""The prompt: its text from the chat template and its ids from the tokenizer, with the persona as one span of them."""

import copy
import random
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from perce import UserError, prompt_ids
from perce.config.prompt import SYSTEM_MESSAGE
from perce.data.pairs import PairBuilder
from perce.data.prompt import PLAIN_CHAT_TEMPLATE, tell
from perce.data.template import on_one_day
from perce.reading.fields import Turn
from tests.helpers.conversations import conversations
from tests.helpers.pairs import EXAMPLE, example
from tests.helpers.templates import CHAT_TEMPLATES
from tests.helpers.tokenizers import EOS, FAMILIES, UNK, tokenizer_like

NATURAL = {  # the template that each kind of tokenizer comes with
    "gpt2": "chatml", "qwen2": "qwen3", "llama3": "llama3", "gemma": "gemma", "llama2": "llama2",
    "sentencepiece": "mistral",
}  # fmt: skip


def with_template(family, template):
    tokenizer = copy.deepcopy(tokenizer_like(family))
    tokenizer.chat_template = template
    return tokenizer


def builder(family, template, fim=False, **options):
    """fim: adds a control token that is not marked as special."""
    tokenizer = with_template(family, CHAT_TEMPLATES.get(template, template))
    if fim:
        tokenizer.add_tokens([AddedToken("<|fim_prefix|>", special=False, normalized=False)])
    return PairBuilder(tokenizer, **({"max_length": 10**6} | options))


def served(own, this, *, persona, reply):
    """The ids of the conversation by transformers' own call; without a reply, the ids of the prompt."""
    block = own.chat_format.block(this.persona) if persona else ""
    messages = own.chat_format.messages(this.turns, block, reply)
    return own.tokenizer.apply_chat_template(
        [{"role": role, "content": content.replace("\ue0f3", "")} for role, content in messages],
        add_generation_prompt=reply is None, return_dict=False,
        chat_template=None if own.tokenizer.chat_template else PLAIN_CHAT_TEMPLATE, **own.chat_format.template_kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("place", ["system", "user"])
@pytest.mark.parametrize("template", ["chatml", "gemma", "gemma-silent"])
def test_a_conversation_that_begins_with_a_reply_is_told_as_other_trainers_are(template, place):
    own = builder("qwen2", template, prompt={"place": place}).chat_format
    for roles in (["assistant", "user"], ["system", "assistant", "user"]):
        turns = [Turn(role, f" {role} ") for role in roles]
        told = tell(
            [{"role": turn.role, "content": turn.content} for turn in turns], "[P]", own.style, template == "chatml"
        )
        assert own.messages(turns, "[P]") == [(message["role"], message["content"]) for message in told]


@on_one_day()
def assert_served_as_trained(own, this, pair, ends=True):
    """Both passes have the ids that transformers gives for their texts: the whole, and the part before the response."""
    for trained, persona in ((pair.input_ids, True), (pair.counterfactual_ids(), False)):
        assert trained[: -pair.response_length] == served(own, this, persona=persona, reply=None)
        if ends:
            assert trained == served(own, this, persona=persona, reply=this.response.strip())[: len(trained)]
    bos = own.tokenizer.bos_token_id
    assert all(pair.input_ids[i : i + 2] != [bos, bos] for i in range(len(pair.input_ids)))


@pytest.mark.parametrize(
    ("family", "template"),
    [
        *((family, "natural") for family in FAMILIES),
        *(("qwen2", "chatml"), ("sentencepiece", "chatml"), ("gpt2", None), ("llama2", None)),
        *(pytest.param(x, "chatml", marks=pytest.mark.slow) for x in FAMILIES if x not in ("qwen2", "sentencepiece")),
        *(pytest.param(x, None, marks=pytest.mark.slow) for x in FAMILIES if x not in ("gpt2", "llama2")),
    ],
)
def test_both_passes_are_what_the_tokenizer_gives_for_their_texts(family, template):
    own = builder(family, NATURAL[family] if template == "natural" else template)
    refused, chance = 0, random.Random(0)
    systems = ["Be brief.", "(Be brief)", "1. Be brief.\n2. Be kind.", "- Be brief", "简短", "Sé breve:\n\n"]
    for this in conversations(80):
        if chance.random() < 0.3:
            this = replace(this, turns=(Turn("system", chance.choice(systems)), *this.turns))
        try:
            pair = own.build(this)
        except UserError as error:
            assert str(error).startswith(f"{this.source}: ") and "token" in str(error)
            refused += 1
        else:
            assert_served_as_trained(own, this, pair)
            assert this.response.strip() in own.tokenizer.decode(pair.input_ids) or family in ("qwen2", "sentencepiece")
    # This tokenizer merges across lines, unlike real ones: "\n-" is one token, and the prompt ends with "\n".
    assert refused <= (16 if (family, template) == ("sentencepiece", "chatml") else 0)


def test_pieces_that_were_tokenised_apart_are_one_text():
    """The line breaks of "- X.⏎" and "⏎" are two tokens apart; together Qwen's pre-tokenizer makes one of them."""
    own = builder("qwen2", "chatml")
    assert ".ĊĊ" in own.tokenizer.convert_ids_to_tokens(own.build(EXAMPLE).input_ids)


def outcome(own, this):
    """The pair, or the error message."""
    try:
        return vars(own.build(this))
    except UserError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [*CHAT_TEMPLATES, None])
def test_pairs_are_those_of_whole_texts_and_of_transformers_own_call(family, template, monkeypatch):
    try:
        own = [builder(family, template, max_length=limit) for limit in (10**6, 120)]
    except UserError as refused:
        monkeypatch.setattr("perce.data.tokens.knows_borders", lambda _: False)
        with pytest.raises(UserError) as again:
            builder(family, template)
        assert str(again.value) == str(refused)
        return
    monkeypatch.setattr("perce.data.tokens.knows_borders", lambda _: False)
    plain = [builder(family, template, max_length=limit) for limit in (10**6, 120)]
    for one in plain:
        one.chat_format._template._given = None
    chance = random.Random(f"{family}-{template}")
    for this in conversations(60, chance.randrange(10**6)):
        text = chance.choice(CONTROL)
        if chance.random() < 0.3:
            this = replace(this, response=f"{this.response}{text} {this.persona[0]}", persona=(text, *this.persona))
        if chance.random() < 0.2:
            this = replace(this, response=f"<think>\n{this.persona[0]}\n</think>\n\n{this.response}")
        for one, other in zip(own, plain, strict=True):
            assert outcome(one, this) == outcome(other, this)


CHANGES, LOSES, JINJA = "changes the persona", "repeats or drops", "does not render"
AGREES_NOT, INSIDE = "a finished reply begins with", "inside a token"
REFUSED = {
    "needs-tools": JINJA, "loops-over-tools": JINJA, "raises": JINJA, "named-without-default": JINJA,
    "parts-only": LOSES, "repeats-messages": LOSES, "drops-reply": LOSES, "json-content": CHANGES,
    "prompt-adds-line": AGREES_NOT, "deepseek-r1": AGREES_NOT,
}  # fmt: skip
"""Templates that cannot be trained with, and why."""
BY_FAMILY = {
    # Two newlines are one token at the end of a text, but two tokens before a word.
    "gpt2": dict.fromkeys(("llama3", "llama3-date", "llama3-tools", "qwen3-thinking", "think-prompt"), INSIDE),
    "qwen2": {"qwen3-thinking": INSIDE},
    "llama2": {},
}
DROPS = {"drops-history": AGREES_NOT, "repeats-system": LOSES}
"""Of longer conversations."""
WITHOUT_END = ("falcon", "bare", "chatml-open-end")


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama2"])
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_every_template_is_trained_as_it_is_served_or_refused_before(family, template):
    why = (REFUSED | BY_FAMILY[family]).get(template)
    if why:
        with pytest.raises(UserError) as refused:
            builder(family, template).build(EXAMPLE)
        assert why in str(refused.value) and "\n" not in str(refused.value)
        return
    own = builder(family, template)
    talk = (*EXAMPLE.turns, Turn("assistant", "Perhaps."), Turn("user", "Say."))
    for this in (EXAMPLE, example(response="Bees! Yes.", turns=talk)):
        if template in DROPS and this is not EXAMPLE:
            with pytest.raises(UserError, match=rf"train\.jsonl:3: .*{DROPS[template]}"):
                own.build(this)
            return
        pair = own.build(this)
        assert_served_as_trained(own, this, pair, ends=template not in (*WITHOUT_END, "think-prompt"))
        reply = own.tokenizer.decode(pair.input_ids[-pair.response_length :])
        ends = {token.content for token in own.tokenizer.added_tokens_decoder.values()}
        assert reply.split(this.response)[1].strip() in ends or template in ("phi4", "command-r7b", "command-a")
        assert own.chat_format.end_of_turn == pair.input_ids[-1]


def test_several_ends_of_a_turn_are_all_learnt():
    pair = (own := builder("qwen2", "command-r7b")).build(EXAMPLE)
    last = own.tokenizer.convert_ids_to_tokens(pair.input_ids[-2:])
    assert last == ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"]


def test_a_template_without_an_end_and_a_tokenizer_without_one_are_refused():
    tokenizer = with_template("qwen2", CHAT_TEMPLATES["bare"])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="would never stop"):
        PairBuilder(tokenizer, max_length=1000)


# --- reasoning -------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nWhich friend?\n</think>\n\nThe bees."


def response_of(template, reply, **kwargs):
    own = builder("qwen2", template, chat_template_kwargs=kwargs)
    pair = own.build(example(response=reply, personal_spans=((len(reply) - 5, len(reply) - 1),)))
    ids = pair.input_ids[-pair.response_length :]
    marked = own.tokenizer.decode([token for token, flag in zip(ids, pair.personal, strict=True) if flag])
    assert marked.strip() == "bees"
    return own.tokenizer.decode(pair.input_ids[: -pair.response_length])[-60:], own.tokenizer.decode(ids)


def test_a_thought_of_the_reply_takes_the_place_of_the_templates():
    header = "<|im_start|>assistant\n"
    assert response_of("qwen3-switch", THOUGHT)[1] == f"{THOUGHT}<|im_end|>"
    empty = "<think>\n\n</think>\n\n"
    assert response_of("qwen3-switch", "The bees.")[1] == f"{empty}The bees.<|im_end|>"
    prompt, reply = response_of("qwen3-switch", "The bees.", enable_thinking=False)
    assert prompt.endswith(f"{header}{empty}") and reply == "The bees.<|im_end|>"
    with pytest.raises(UserError, match=AGREES_NOT):
        response_of("qwen3-switch", THOUGHT, enable_thinking=False)


THOUGHTS = {
    "": "The bees.", "The bees.": "The bees.", "Coming tonight?": "The bees.", "I keep bees.": "The bees.",
    " <|im_end|> bees ": "The bees.",
}  # fmt: skip
"""A thought of nothing, and of words that occur elsewhere in the conversation → an answer."""


@pytest.mark.parametrize("template", ["qwen3", "qwen3-switch", "think-stripped", "deepseek-r1", "chatml"])
@pytest.mark.parametrize("blanks", ["\n", ""])
@pytest.mark.parametrize("thought", THOUGHTS)
def test_thoughts_of_any_words_are_all_learnt(template, blanks, thought):
    reply = f"<think>{blanks}{thought}{blanks}</think>{blanks}The bees."
    prompt, response = response_of(template, reply)
    said = (prompt + response).rpartition("assistant")[2]
    assert said.count("<think>") == said.count("</think>") == 1
    assert thought.strip() in said and said.count("The bees.") == 1 + (thought == "The bees.")
    assert prompt.endswith("<think>\n") == (template == "deepseek-r1")


@pytest.mark.parametrize("template", ["qwen3", "think-stripped", "deepseek-r1", "deepseek-v3.1"])
@pytest.mark.parametrize("blanks", ["", "\n", " "])
def test_thoughts_in_earlier_replies_are_what_the_template_makes_of_them(template, blanks):
    own = builder("qwen2", template)
    said = f"{blanks}<think>\nplan\n</think>\n\nHello."
    turns = (Turn("user", "Hi"), Turn("assistant", said), Turn("user", "Coming?"))
    this = example(turns=turns, response=THOUGHT)
    pair = own.build(this)
    assert pair.input_ids[: -pair.response_length] == served(own, this, persona=True, reply=None)
    assert ("plan" in own.tokenizer.decode(pair.input_ids)) == (template == "deepseek-v3.1")


def test_a_template_that_leaves_out_thoughts_is_trained_with_those_that_it_asks_for():
    own = builder("qwen2", "deepseek-r1")
    with pytest.raises(UserError, match=r"train\.jsonl:3: .*give replies a <think> block"):
        own.build(EXAMPLE)
    prompt, reply = response_of("deepseek-r1", THOUGHT)
    assert prompt.endswith("<think>\n") and reply == f"{THOUGHT.removeprefix('<think>')[1:]}</s>"


# --- system messages, and control tokens in texts --------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "gemma", "mistral", None])
def test_a_rows_own_system_message_is_in_both_passes(template):
    own = builder("qwen2", template)
    this = example(turns=(Turn("system", " Answer in one word.\n"), *EXAMPLE.turns))
    pair = own.build(this)
    assert_served_as_trained(own, this, pair)
    for ids in (pair.input_ids, pair.counterfactual_ids()):
        text = own.tokenizer.decode(ids)
        assert "Answer in one word." in text and SYSTEM_MESSAGE not in text
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Coming tonight?"}]
    assert prompt_ids(own.tokenizer, EXAMPLE.persona, messages) == pair.input_ids[: -pair.response_length]


CONTROL = (
    "<|fim_prefix|>",
    "<|im_end|>",
    "<|im_start|>system",
    "[INST]",
    "</s>",
    "<|im_<|im_end|>end|>",
    "<think>x</think>",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["chatml", "natural"])
@pytest.mark.parametrize("text", CONTROL)
def test_no_text_of_the_data_becomes_a_control_token(family, template, text):
    own = builder(family, NATURAL[family] if template == "natural" else template, fim=True)
    clean, spelt = (
        example(
            persona=(f"I keep {x} bees.",), turns=(Turn("system", f"Be {x} brief."), Turn("user", f"Why {x} so?")),
            response=f"No {x} idea.",
        )
        for x in ("x", text)
    )  # fmt: skip
    pair, other = own.build(spelt), own.build(clean)

    def control(ids):
        return [token for token in ids if token in own.tokenizer.added_tokens_decoder]

    assert control(pair.input_ids) == control(other.input_ids)
    decoded = own.tokenizer.decode(pair.input_ids)
    assert decoded.count(text) >= 4, "and it is all there"
    asked = [{"role": turn.role, "content": turn.content} for turn in spelt.turns]
    assert prompt_ids(own.tokenizer, spelt.persona, asked) == pair.input_ids[: -pair.response_length]


def test_control_tokens_are_allowed_on_request():
    this = example(persona=("I say <|im_end|> a lot.",), response="No <|im_end|> idea.")
    own = builder("qwen2", "chatml", special_tokens_in_text="allow")
    pair = own.build(this)
    asked = prompt_ids(own.tokenizer, this.persona, "Coming tonight?", special_tokens_in_text="allow")
    assert asked == pair.input_ids[: -pair.response_length]
    end = own.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert pair.input_ids.count(end) == builder("qwen2", "chatml").build(this).input_ids.count(end) + 2
    assert_served_as_trained(own, this, pair)


def test_what_cannot_be_told_from_a_control_token_is_refused():
    tokenizer = with_template("qwen2", CHAT_TEMPLATES["chatml"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["§"]})
    with pytest.raises(UserError, match=r"train\.jsonl:3: The text 'Why § so\?' has '§'"):
        PairBuilder(tokenizer, max_length=1000).build(example(turns=(Turn("user", "Why § so?"),)))
    tokenizer = with_template("qwen2", CHAT_TEMPLATES["chatml"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<|zap|>", special=True, normalized=True)], special_tokens=True)
    for text in ("＜|zap|＞", "＜|zap|＞ <|zap|>"):
        with pytest.raises(UserError, match=r"becomes the control token '<.zap.>'"):
            PairBuilder(tokenizer, max_length=1000).build(example(turns=(Turn("user", text),)))
    PairBuilder(tokenizer, max_length=1000).build(example(turns=(Turn("user", "<|zap|>"),)))
    with pytest.raises(UserError, match="private-use character"):
        builder("qwen2", "chatml").build(example(response="a \ue0f3 b"))
    with pytest.raises(UserError, match="private-use character"):
        prompt_ids(with_template("qwen2", CHAT_TEMPLATES["chatml"]), ["\ue0f0reply\ue0f1"], "Hi")


# --- trimming, and which tokens are personal -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [None, {"place": "user", "item": "{}", "header": "", "footer": "\n\n"}])
def test_as_many_entries_stay_as_fit(family, prompt):
    this = example(persona=tuple(f"Fact {i} of {'many ' * (i % 3)}bees." for i in range(5)))
    template = NATURAL[family]
    whole = builder(family, template, prompt=prompt)
    lengths = [len(whole.build(replace(this, persona=this.persona[:kept])).input_ids) for kept in range(1, 6)]
    for max_length in sorted({length + step for length in lengths for step in (-1, 0, 1)} - {lengths[0] - 1}):
        pair = builder(family, template, prompt=prompt, max_length=max_length).build(this)
        fitting = max(kept for kept, length in enumerate(lengths, 1) if length <= max_length)
        assert len(pair.passages) == fitting and len(pair.input_ids) == lengths[fitting - 1]


@pytest.mark.parametrize("template", ["chatml", "qwen3", "deepseek-r1"])
@pytest.mark.parametrize("response", ["  I am with Juno ", "Juno\n", " Juno <|im_end|> Juno", "Juno"])
def test_marks_are_where_the_words_are(template, response):
    thought = "<think>Juno</think>" if template != "chatml" else ""
    text = thought + response
    start = text.rindex("Juno")
    own = builder("qwen2", template)
    pair = own.build(example(response=text, personal_spans=((start, min(start + 5, len(text))),)))
    ids = pair.input_ids[-pair.response_length :]
    flagged = [place for place, flag in enumerate(pair.personal) if flag]
    assert own.tokenizer.decode([ids[place] for place in flagged]).strip() == "Juno"
    assert "Juno" not in own.tokenizer.decode(ids[flagged[-1] + 1 :])


@pytest.mark.parametrize("template", ["qwen3", "chatml"])
def test_marks_on_a_reply_that_is_only_a_thought_mark_nothing(template):
    text = "<think>Juno</think>\n"
    pair = builder("qwen2", template).build(example(response=text, personal_spans=((0, len(text)),)))
    assert not any(pair.personal)


@pytest.mark.parametrize("style", [{"system": "Facts: {persona} Write."}, {}])
def test_a_slot_for_the_persona_in_the_system_message_is_not_left_as_text(style):
    said = () if style else (Turn("system", "Facts: {persona} Be brief."),)
    with pytest.raises(UserError, match=r"prompt: expected either .* 'Facts: {persona} "):
        builder("qwen2", "chatml", prompt={"place": "user", **style}).build(example(turns=(*said, *EXAMPLE.turns)))


@pytest.mark.parametrize("edge", ["{persona}\n\nBe brief.", "Be brief.\n\n{persona}"])
def test_a_persona_at_an_edge_that_the_template_trims_is_refused_with_what_helps(edge):
    with pytest.raises(UserError, match=r"changes the persona.* Begin and end the system message with words"):
        builder("qwen2", "llama3", prompt={"system": edge}).build(EXAMPLE)


def test_a_prompt_may_have_characters_that_the_vocabulary_lacks_and_a_reply_may_not():
    words = {UNK: 0, **{word: number for number, word in enumerate("abcdefghijklmnopqrstuvwxyz .:-<>\n", 1)}}
    backend = Tokenizer(models.BPE(words, [], unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([UNK, EOS])
    own = PairBuilder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token=UNK), max_length=1000)
    pair = own.build(example(persona=("i keep 🐝.",), response="the bees."))
    assert words[UNK] in pair.input_ids[slice(*pair.persona_span)]
    with pytest.raises(UserError, match=f"becomes the control token '{UNK}', because the tokenizer replaces or lacks"):
        own.build(example(response="the 🐝."))
    spelt = own.build(example(response=f"the {UNK}."))
    assert words[UNK] not in spelt.input_ids[spelt.prompt_length :], "its name is text"
