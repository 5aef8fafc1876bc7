"""Pairs: the two passes must have the same response tokens, and differ only by the persona."""

from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perce import DataConfig, UserError, prompt_ids
from perce.config.prompt import SYSTEM_MESSAGE, PromptStyle
from perce.data.pairs import PairBuilder, counterfactual_ids
from perce.data.prompt import PLAIN_CHAT_TEMPLATE
from perce.data.retrieval import make_retriever
from perce.reading.fields import Turn
from tests.helpers.pairs import EXAMPLE, TOKENIZERS, builder, example
from tests.helpers.tiny import TEMPLATES, tiny_tokenizer


def decode(template, ids):
    return TOKENIZERS[template].decode(ids)


CONVERSATIONS = {
    "one turn": EXAMPLE.turns,
    "three turns": (Turn("user", "Hi"), Turn("assistant", "Hello!"), Turn("user", "Tonight?")),
    "reply first": (Turn("assistant", "Hello!"), Turn("user", "Tonight?")),
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", TEMPLATES)
def test_counterfactual_is_factual_minus_one_contiguous_persona_span(template, turns):
    pair = builder(template).build(example(turns=turns))
    start, end = pair.persona_span
    without = pair.counterfactual_ids()
    assert without == pair.input_ids[:start] + pair.input_ids[end:]
    entries = "".join(f"- {entry}\n" for entry in EXAMPLE.persona)
    block = decode(template, pair.input_ids[start:end])  # its first token may contain a space of the template
    assert block.strip() == (PromptStyle().header + entries).strip()
    text = decode(template, without)
    assert SYSTEM_MESSAGE in text and "bees.\n" not in text and "Oslo" not in text
    assert "You are helpful" not in text, "the template's own system prompt must not come in"
    assert all(turn.content in text for turn in turns)


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_to_write_from_is_the_one_that_was_trained_on(template, turns):
    pair = builder(template).build(example(turns=turns))
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = prompt_ids(TOKENIZERS[template], EXAMPLE.persona, messages)
    assert ids == pair.input_ids[: -pair.response_length]
    if len(turns) == 1:
        assert ids == prompt_ids(TOKENIZERS[template], EXAMPLE.persona, turns[0].content)


def test_messages_of_a_prompt_may_be_any_mapping():
    tokenizer, said = TOKENIZERS["chatml"], {"role": "user", "content": "Hi"}
    asked = prompt_ids(tokenizer, "I keep bees.", [said])
    assert prompt_ids(tokenizer, "I keep bees.", [MappingProxyType(said)]) == asked
    for one in (said, MappingProxyType(said)):
        with pytest.raises(UserError, match="query: expected a text or a list of messages, got"):
            prompt_ids(tokenizer, "I keep bees.", one)


def test_a_prompt_needs_a_persona_and_something_to_reply_to():
    tokenizer = TOKENIZERS["chatml"]
    assert prompt_ids(tokenizer, "I keep bees.", "Hi") == prompt_ids(tokenizer, ["I keep bees.", " "], "Hi")
    for persona in ("", [" "], None, 3):
        with pytest.raises(UserError, match="persona"):
            prompt_ids(tokenizer, persona, "Coming tonight?")
    wrong = {
        "a non-empty list": [], "end with a user turn": [{"role": "assistant", "content": "Hi"}],
        "'user' or 'assistant'": [{"role": "user", "content": "Hi"}, {"role": "judge", "content": "No."}],
        "alternating": [{"role": "user", "content": "Hi"}] * 2, "a text or a list of messages": None,
        "an object with 'role' and 'content'": ["Hi"],
    }  # fmt: skip
    for message, query in wrong.items():
        with pytest.raises(UserError, match=f"query.*{message}"):
            prompt_ids(tokenizer, ["I keep bees."], query)


@pytest.mark.parametrize("value", [True, "alow"])
def test_control_tokens_in_a_prompt_are_text_or_allowed(value):
    with pytest.raises(UserError, match=f"special_tokens_in_text: expected text or allow, got {value!r}"):
        prompt_ids(TOKENIZERS["chatml"], "I say <|im_end|>.", "Hi", special_tokens_in_text=value)


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "qwen3"])
def test_factual_sequence_reads_as_the_template_renders_it(template):
    own = builder(template)
    pair = own.build(EXAMPLE)
    system = own.chat_format.block(EXAMPLE.persona) + SYSTEM_MESSAGE
    rendered = TOKENIZERS[template].apply_chat_template(
        [
            {"role": "system", "content": system},
            {"role": "user", "content": "Coming tonight?"},
            {"role": "assistant", "content": EXAMPLE.response},
        ],
        tokenize=False,
    )
    assert decode(template, pair.input_ids) == rendered.rstrip("\n")


@pytest.mark.parametrize("template", TEMPLATES)
def test_response_is_tokenised_once_and_ends_with_the_end_of_turn(template):
    pair = builder(template).build(EXAMPLE)
    response = pair.input_ids[-pair.response_length :]
    thought = "<think>\n\n</think>\n\n" if template == "qwen3" else ""
    assert decode(template, response).lstrip(" ") == thought + EXAMPLE.response + "<|im_end|>"
    assert response[-1] == TOKENIZERS[template].pad_token_id, "kept although it is the pad token too"
    assert pair.counterfactual_ids()[-pair.response_length :] == response
    assert len(pair.personal) == pair.response_length


@pytest.mark.parametrize("prepends_space", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_end_of_the_prompt_and_the_reply_are_tokenised_as_in_one_text(template, prepends_space):
    """No space that the template or tokenizer adds may be a token of its own between them: models never write one."""
    tokenizer = tiny_tokenizer(TEMPLATES[template], prepends_space=prepends_space)
    own = PairBuilder(tokenizer, max_length=2000)
    assert own.chat_format.prepends_space == prepends_space
    pair = own.build(example(response="Bees. Juno too.", personal_spans=((0, 4),)))
    turns = [*EXAMPLE.turns, Turn("assistant", "Bees. Juno too.")]
    messages = own.chat_format.messages(turns, own.chat_format.block(EXAMPLE.persona))
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        chat_template=tokenizer.chat_template or PLAIN_CHAT_TEMPLATE, return_dict=False,
    )  # fmt: skip
    assert pair.input_ids == whole[: len(pair.input_ids)]
    ids = pair.input_ids[-pair.response_length :]
    personal = [token for token, flag in zip(ids, pair.personal, strict=True) if flag]
    assert tokenizer.decode(personal).strip() == "Bees"


text = st.text(st.characters(exclude_categories=("Cs", "Co")), min_size=1, max_size=40).filter(lambda s: s.strip())


@given(
    persona=st.lists(text, min_size=1, max_size=5), query=text, response=text,
    template=st.sampled_from(list(TEMPLATES)), max_length=st.integers(40, 400),
)  # fmt: skip
def test_any_text_gives_aligned_pairs_or_a_named_error(persona, query, response, template, max_length):
    this = example(persona=tuple(persona), turns=(Turn("user", query),), response=response)
    try:
        pair = builder(template, max_length=max_length).build(this)
    except UserError as error:
        assert "train.jsonl:3" in str(error) and "max_length" in str(error)
        return
    ids, n = pair.input_ids, pair.response_length
    assert len(ids) <= max_length and len(pair.personal) == n
    assert counterfactual_ids(ids, pair.persona_span, n)[-n:] == ids[-n:]
    assert response.strip() in decode(template, ids[-n:])
    assert pair.dropped_passages < len(persona)


def test_trimming_drops_the_last_passages_only_and_counts_them():
    whole = builder().build(EXAMPLE)
    shorter = builder(max_length=len(whole.input_ids) - 1).build(EXAMPLE)
    start, end = shorter.persona_span
    kept = decode("chatml", shorter.input_ids[start:end])
    assert shorter.dropped_passages == 1 and "bees" in kept and "Juno" in kept and "Oslo" not in kept
    assert shorter.counterfactual_ids() == whole.counterfactual_ids(), "query and response are never trimmed"


def test_trimming_a_long_persona_tries_few_lengths(monkeypatch):
    """1,000 entries of which 40 fit: the borders of a few are looked at, not of each one that is left out."""
    made = []
    monkeypatch.setattr(PromptStyle, "block", lambda *args, block=PromptStyle.block: made.append(1) or block(*args))
    persona = tuple(f"On day {number} I did something else." for number in range(1000))
    pair = builder(max_length=1000).build(example(persona=persona))
    assert len(pair.passages) + pair.dropped_passages == 1000 and 900 < len(pair.input_ids) <= 1000
    assert len(made) < 30


def test_the_retriever_decides_which_entries_are_shown_and_in_which_order():
    pair = builder(retriever=lambda example: [2, 0]).build(EXAMPLE)
    start, end = pair.persona_span
    shown = decode("chatml", pair.input_ids[start:end])
    assert 0 < shown.index("Oslo") < shown.index("bees") and "Juno" not in shown
    assert pair.passages == [2, 0] and pair.dropped_passages == 0, "what retrieval does not pick is not trimming"
    trimmed = builder(retriever=lambda example: [2, 0], max_length=len(pair.input_ids) - 1).build(EXAMPLE)
    assert trimmed.passages == [2] and trimmed.dropped_passages == 1


def test_a_reply_that_stands_in_what_is_shown_is_copied():
    said = "I keep bees behind the house."

    def copied(reply, **options):
        return builder(**options).build(example(persona=("It rains.", f"- {said}"), response=reply)).copied

    assert copied(said) and copied(f" {said}\n") and not copied(said.replace("house", "barn"))
    assert not copied(said, retriever=lambda _: [0]), "that entry is not shown"
    assert not copied("behind the house."), "a few words, such as a rating or a tag, stand there by chance"


def test_a_conversation_is_shown_whole_from_its_beginning_where_it_fits():
    """If it does not fit, the retriever chooses; without a retriever the latest passages remain."""
    said = tuple(f"User: {word} and more" for word in ("latest", "bees", "third", "oldest"))
    asked = example(persona=said, turns=(Turn("user", "What of the bees?"),))
    whole = builder(whole_if_it_fits=True, retriever=make_retriever(DataConfig(retrieve_k=2))).build(asked)
    assert whole.passages == [3, 2, 1, 0] and whole.dropped_passages == 0
    prompt = TOKENIZERS["chatml"].decode(whole.input_ids)
    assert prompt.index("oldest") < prompt.index("third") < prompt.index("bees and") < prompt.index("latest")
    short = {"whole_if_it_fits": True, "max_length": len(whole.input_ids) - 1}
    picked = builder(**short, retriever=make_retriever(DataConfig(retrieve_k=2))).build(asked)
    assert picked.passages == [1, 0] and picked.dropped_passages == 0
    latest = builder(**short).build(asked)
    assert latest.passages == [0, 1, 2] and latest.dropped_passages == 1
    assert builder(**short).settings != builder(max_length=short["max_length"]).settings
    exactly = builder(whole_if_it_fits=True, max_length=len(whole.input_ids)).build(asked)
    assert exactly.passages == whole.passages


def test_response_longer_than_max_length_names_the_row_and_the_remedy():
    with pytest.raises(UserError, match=r"train\.jsonl:3: .*max_length=60.*Raise --max_length\. --skip_bad_rows "):
        builder(max_length=60).build(example(response="word " * 100))


def test_personal_tokens_follow_marked_spans_even_after_leading_blanks():
    response = "  No, Juno is ill."
    marked = example(response=response, personal_spans=((6, 10),))
    pair = builder().build(marked)
    ids = pair.input_ids[-pair.response_length :]
    named = decode("chatml", [token for token, flag in zip(ids, pair.personal, strict=True) if flag])
    assert named.strip() == "Juno"


def test_no_chat_template_and_no_end_token_is_refused():
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a chat template nor an end-of-sequence token"):
        PairBuilder(tokenizer, max_length=100)


def test_a_template_that_repeats_a_message_is_refused():
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="repeats or drops"):
        PairBuilder(tokenizer, max_length=1000)


def test_chat_template_kwargs_reach_the_template():
    template = "{% if shout %}!!!{% endif %}" + TEMPLATES["chatml"]
    built = [
        PairBuilder(tiny_tokenizer(template), max_length=1000, chat_template_kwargs=kwargs).build(EXAMPLE)
        for kwargs in ({}, {"shout": True})
    ]
    assert decode("chatml", built[1].input_ids).startswith("!!!")
    assert not decode("chatml", built[0].input_ids).startswith("!!!")


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", TEMPLATES)
def test_without_a_persona_both_sequences_are_the_one_that_others_have_without_theirs(template, turns):
    known, unknown = (builder(template).build(example(turns=turns, persona=who)) for who in (EXAMPLE.persona, ()))
    assert unknown.input_ids == unknown.counterfactual_ids() == known.counterfactual_ids()
    start, end = unknown.persona_span
    assert start == end and known.persona_span[0] <= start < unknown.prompt_length
    assert unknown.passages == [] and not any(unknown.personal) and not unknown.copied
    assert unknown.persona != known.persona
    said = [{"role": turn.role, "content": turn.content} for turn in turns]
    of_prompt = prompt_ids(TOKENIZERS[template], [], said)
    assert of_prompt == unknown.input_ids[: unknown.prompt_length]


def test_without_a_persona_nothing_is_picked_or_cut():
    def retriever(example):
        raise AssertionError("there is nothing to pick from")

    nobody = example(persona=())
    whole = builder(retriever=retriever, whole_if_it_fits=True).build(nobody)
    n = len(whole.input_ids)
    assert builder(max_length=n).build(nobody).input_ids == whole.input_ids
    too_long = rf"take {n} of max_length={n - 1} tokens \(the response {whole.response_length}\)\. Raise"
    with pytest.raises(UserError, match=too_long):
        builder(max_length=n - 1).build(nobody)


def test_only_equal_examples_without_a_persona_may_share_its_pass():
    one, other = (builder().build(example(persona=(), response=text)) for text in ("Yes, I am.", "No."))
    assert one.persona != other.persona
    assert one.persona == builder().build(example(persona=(), response="Yes, I am.", user_id="u2")).persona
