"""What a row of each format means, and the error if it means nothing."""

import copy
import csv
import json
from functools import reduce

import pytest

from perce import UserError, load_examples
from perce.data.rows import Example, Examples, Reading
from perce.reading.fields import PASSAGES, Turn
from perce.reading.formats import FORMATS
from perce.reading.sources import Source
from tests.helpers.raw_rows import (
    ABSTRACT,
    CONVAI2,
    GOOD,
    LAMP,
    SAID,
    SPC,
    TALK,
    documented,
    documented_files,
    error,
    jsonl,
    load,
)  # fmt: skip


def test_perce_query(tmp_path):
    spans = {**GOOD, "user_id": 3, "personal_spans": [[8, 14]], "extra": "ignored"}
    first, second = load(tmp_path, {**GOOD, "persona": "I bake."}, spans)
    assert first == Example(("I bake.",), (Turn("user", "Any plans?"),), "Walking my dog.", None, None, "data.jsonl:1")
    assert (second.persona, second.user_id, second.source) == (("I bake.", "I have a dog."), "3", "data.jsonl:2")
    assert [second.response[a:b] for a, b in second.personal_spans] == ["my dog"]


def test_perce_messages(tmp_path):
    given, *replies = load(
        tmp_path, {"persona": "P", "messages": TALK[:3], "response": "R"}, {"persona": "P", "messages": TALK}
    )
    assert [turn.role for turn in given.turns] == ["user", "assistant", "user"]
    assert [(len(e.turns), e.response, e.source) for e in replies] == [
        (1, "Hello!", "data.jsonl:2"),
        (3, "A walk.", "data.jsonl:2"),
    ]


def test_perce_messages_may_open_with_the_assistant(tmp_path):
    (only,) = load(tmp_path, {"persona": "P", "messages": TALK[1:]})  # an opening line answers nothing
    assert [turn.role for turn in only.turns] == ["assistant", "user"] and only.response == "A walk."


def test_longlamp_passages_newest_first(tmp_path):
    (abstract,) = load(tmp_path, ABSTRACT)
    assert abstract.persona == ("Title: T2\nAbstract: A2", "Title: T1\nAbstract: A1")
    assert (abstract.user_id, abstract.turns) == ("A. Uthor", (Turn("user", "Generate an abstract"),))
    entry = {"overall": 5.0, "summary": "S", "description": "D", "reviewText": "R"}
    (review,) = load(tmp_path, {"reviewerId": "r", "input": "i", "output": "o", "profile": [entry]})
    assert review.persona == ("Rating: 5.0\nProduct: D\nSummary: S\nReview: R",) and review.user_id == "r"
    entry = {"author": "w", "summary": "S", "content": "C", "id": 1}
    (topic,) = load(tmp_path, {"author": "w", "input": "i", "output": "o", "profile": [entry]})
    assert topic.persona == ("Summary: S\nContent: C",) and topic.user_id == "w"


@pytest.mark.parametrize(
    ("entry", "passage"),
    [
        ({"text": "T", "id": 1, "date": "2001"}, "T"),
        ({"text": "T", "title": "H"}, "Title: H\nText: T"),
        ({"text": "T", "title": "H", "category": "sport"}, "Category: sport\nTitle: H\nText: T"),
        ({"text": "T", "score": "4"}, "Rating: 4\nReview: T"),
        ({"description": "D", "tag": "comedy"}, "Tag: comedy\nDescription: D"),
        ({"title": "H", "abstract": "A"}, "Title: H\nAbstract: A"),
        ({"title": None, "abstract": "A"}, "A"),
    ],
)
def test_lamp_passages(tmp_path, entry, passage):
    (example,) = load(
        tmp_path, {**LAMP, "profile": [entry, {**entry, next(iter(entry)): "", "text": "", "abstract": ""}]}
    )
    assert example.persona[-1] == passage and example.user_id == "7"


@pytest.mark.parametrize(
    ("entry", "passage"),
    [
        ({"text": "T"}, "T"),
        ({"text": "T", "title": "H"}, "Title: H\nText: T"),
        ({"text": "T", "score": "4"}, "Rating: 4\nReview: T"),
        ({"abstract": "A", "title": "H"}, "Title: H\nAbstract: A"),
        ({"description": "D", "tag": "comedy"}, "Tag: comedy\nDescription: D"),
    ],
)
def test_an_entry_whose_other_fields_are_null_or_empty_has_the_same_passage(tmp_path, entry, passage):
    """A table has all fields in all entries: a history of several kinds of entries lost all but one kind."""
    names = {name for kind, parts in PASSAGES for name in (kind, *(name for _, name in parts))}
    for nothing in (None, ""):
        given = dict.fromkeys(sorted(names), nothing) | entry
        (example,) = load(tmp_path, {**LAMP, "profile": [given, dict.fromkeys(names, nothing)]})
        assert example.persona == (passage,)


@pytest.mark.parametrize("parts", [parts for _, parts in PASSAGES], ids=[kind for kind, _ in PASSAGES])
def test_a_text_of_an_entry_may_not_be_the_target_and_its_label_may(tmp_path, parts):
    for label, field in parts:
        entry = {name: "4" if name in ("overall", "rating", "score") else f"a {name}" for _, name in parts}
        (example,) = load(tmp_path, {**LAMP, "output": entry[field], "profile": ["old", entry]})
        assert len(example.persona) == 1 + (label in ("Category", "Rating", "Tag")), field


def test_the_target_is_never_in_its_own_profile(tmp_path):
    leak = [{"text": "old"}, {"text": "- We  PROVE it\n"}, {"abstract": "We prove it.", "title": "T"}]
    (example,) = load(tmp_path, {**ABSTRACT, "profile": leak})
    assert example.persona == ("old",)
    assert "other than the row's own output" in error(tmp_path, {**ABSTRACT, "profile": leak[1:]})
    (example,) = load(tmp_path, {**LAMP, "output": "🎉🎉", "profile": ["😂😂😂", "!!!", "🎉🎉 ", "bees"]})
    assert example.persona == ("bees", "!!!", "😂😂😂")


def test_convai2(tmp_path):
    first, second = load(tmp_path, {**CONVAI2, "user_id": "family07"})
    assert first == Example(("i bake .",), (Turn("user", "hi"),), "hello", "family07", None, "data.jsonl:1")
    assert (
        second.turns == (Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "a")) and second.response == "b"
    )


def test_synthetic_persona_chat_is_seen_from_each_speaker(tmp_path):
    boy, baker = load(tmp_path, SPC)
    assert boy.persona == ("I am a boy.",) and baker.persona == ("I bake.", "I run.")
    assert boy.turns == (Turn("user", "Hi!"),) and boy.response == "Hello! Who are you?"  # one speaker's turns merged
    assert baker.turns == (Turn("assistant", "Hi!"), Turn("user", "Hello! Who are you?"))
    assert baker.response == "A baker."


@pytest.mark.parametrize("column", ["conversation", "Best Generated Conversation"])
def test_synthetic_persona_chat_as_published(tmp_path, column):
    said = "User 1: Hi!\r\nUser 2: Hello!\nWho are you?\nuser 1:A baker."
    row = {"user 1 personas": "I bake.\nI run.", "user 2 personas": "I am a boy.\n", column: said}
    strip = [(e.persona, e.turns, e.response) for e in load(tmp_path, row)]
    assert strip == [(e.persona, e.turns, e.response) for e in load(tmp_path, SPC)]
    with (tmp_path / "spc.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(row), list(row.values()), list(row.values())])
    rows = load_examples(tmp_path / "spc.csv", "train")
    assert [(e.persona, e.turns, e.response) for e in rows] == strip * 2 and rows.format == "spc"
    # Lines are the file's: the header is 1; the first record holds 1 + 1 + 3 + 0 line breaks in its cells.
    assert [e.source for e in rows][::2] == ["spc.csv:2", "spc.csv:8"]


def test_prompt_completion(tmp_path):
    plain = {"persona": "P", "prompt": "Hi", "completion": " Hello!"}
    chat = {"persona": "P", "prompt": TALK[:3], "completion": TALK[3:]}
    first, second = load(tmp_path, plain, chat)
    assert (first.turns, first.response) == ((Turn("user", "Hi"),), "Hello!")
    assert (len(second.turns), second.response) == (3, "A walk.")


ALOE = {"user": "Hi", "assistant": {"preferred": "Yo", "rejected": "No"}, "chosen": "rejected"}

WITHIN = [
    ("sharegpt", "conversations", [{"from": "bing", "value": "x"}], "conversations[0].from"),
    ("sharegpt", "conversations", [*SAID, {"from": "observation", "value": "x"}], "conversations[2]"),
    ("sharegpt", "conversations", [SAID[0], {"from": "gpt", "value": ""}], "conversations[1].value"),
    ("sharegpt", "conversations", [{"from": "system", "value": "x"}, *SAID], "system"),  # the row already has one
    ("sharegpt", "system", 7, "system"),
    ("sharegpt", "system", False, "system"),
    ("alpaca", "history", True, "history"),
    ("alpaca", "history", {}, "history"),
    ("msc", "previous_dialogs", False, "previous_dialogs"),
    ("msc", "previous_dialogs", "", "previous_dialogs"),
    ("personamem", "end_index_in_shared_context", "9" * 5000, "end_index_in_shared_context"),
    ("personamem_v2", "chat_history_32k_link", "x" * 5000, "chat_history_32k_link"),
    ("personamem_v2", "chat_history_32k_link", "/etc/hostname", "chat_history_32k_link"),
    ("personamem_v2", "chat_history_32k_link", "../../x.json", "chat_history_32k_link"),
    (
        "prism",
        "conversation_history",
        [{"role": "user", "content": "x"}, {"role": "model", "content": "y", "if_chosen": "False"}],
        "conversation_history[1].if_chosen",
    ),
    (
        "prism",
        "conversation_history",
        [{"role": "user", "content": "x"}, {"role": "model", "content": "y"}, {"role": "user", "content": "z"}],
        "conversation_history[2].role",
    ),
    ("sharegpt", "conversations", [SAID[0], {**SAID[1], "weight": -1}], "conversations[1].weight"),
    ("alpaca", "history", [["Hi"]], "history[0]"),
    ("alpaca", "history", [["Hi", " "]], "history[0][1]"),
    ("alpaca", "input", 7, "input"),
    ("preference", "chosen", [{"role": "user", "content": "x"}], "chosen"),
    ("preference", "prompt", [{"role": "user", "content": ""}], "prompt[0].content"),
    ("lamp_qa", "profile", [{"id": "p1"}], "profile[0]"),
    ("lamp_qa", "response", "", "response"),
    ("amazon", "user_id", "nobody else", "user_id"),  # one review is no history
    ("personachat", "candidates", ["x", ""], "candidates[-1]"),
    ("personachat", "history", ["hi", 3], "history[1]"),
    ("msc", "personas", [["one"]], "personas"),
    ("msc", "personas", [["one"], [""]], "personas[1]"),
    ("msc", "dialog", [{"id": "bot_0", "text": "x"}], "dialog[0].id"),
    ("msc", "dialog", [{"id": "Speaker 1", "text": ""}], "dialog[0].text"),
    ("msc", "previous_dialogs", [{"dialog": [{"text": ""}]}], "previous_dialogs[0].dialog[0].text"),
    ("personamem", "correct_answer", "(d)", "correct_answer"),
    ("personamem", "all_options", ["(b)"], "all_options"),
    ("personamem", "shared_context_id", "other", "shared_context_id"),
    ("personamem", "end_index_in_shared_context", "5", "end_index_in_shared_context"),
    ("personamem_v2", "chat_history_32k_link", "data/none.json", "chat_history_32k_link"),
    ("personamem_v2", "user_query", "{'role': 'user', 'content': ''}", "user_query"),
    ("prefeval", "response_to_q", " ", "response_to_q"),
    ("aloe", "conversations", [{"user": "Hi", "assistant": "Yo"}], "conversations[0]"),
    ("aloe", "conversations", [{**ALOE, "assistant": {"preferred": ""}}], "conversations[0].assistant.preferred"),
    ("aloe", "conversations", [{**ALOE, "chosen": "both"}], "conversations[0].chosen"),
    ("aloe", "conversations", [{**ALOE, "assistant": {"preferred": "Yo"}}] * 2, "conversations[0].assistant.rejected"),
    ("prism", "user_id", "user1", "user_id"),
    ("prism", "conversation_history", [{"role": "judge", "content": "x"}], "conversation_history[0].role"),
    ("prism", "conversation_history", [{"role": "user", "content": ""}], "conversation_history[0].content"),
]


@pytest.mark.parametrize(("format", "name", "wrong", "field"), WITHIN)
def test_what_is_wrong_within_a_field_is_named(tmp_path, format, name, wrong, field):
    row = documented(format)[0]
    path = documented_files(tmp_path, format, row, {**row, name: wrong}, *documented(format)[1:])
    with pytest.raises(UserError) as caught:
        load_examples(path, "train", unanswered=True)
    assert str(caught.value).startswith(f"{path}:2: field '{field}': expected "), str(caught.value)


NASTY = [
    None, 0, True, 1.5, float("nan"), "", " ", "9" * 5000, "{", "\ud83d", [], {}, [1], [[]], {"a": 1},
    {"a": [1], "b": []}, {"a": []}, {1: "a"}, ("a", "b"),
]  # fmt: skip


def places(value, path=()):
    """The path to every value within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize("format", FORMATS)
def test_whatever_stands_in_a_field_it_is_read_or_refused_by_name(tmp_path, format):
    path = documented_files(tmp_path, format)
    for whole in documented(format):
        for place in places(whole):
            for nasty in NASTY:
                row = copy.deepcopy(whole)
                parent = reduce(lambda at, key: at[key], place[:-1], row)
                parent[place[-1]] = nasty
                source = Source(
                    path.name, path.name, lambda rows=(whole, row): zip((":1", ":2"), rows, strict=True), path
                )
                try:
                    assert len(Examples(source, Reading(unanswered=True)).all) >= 1
                except UserError as error:
                    assert str(error).startswith(f"{path.name}:"), error


def test_names_that_are_numbers(tmp_path):
    """pandas numbers the columns of a file that is read without a header."""

    def read(row, **how):
        return Examples(Source("rows", "rows", lambda: iter([(" row 1", row)])), Reading(**how)).all

    with pytest.raises(UserError, match="rows row 1: expected the fields of a known format, got the fields 0, 1, 2"):
        read({0: "p", 1: "q", 2: "r"})
    columns = {"persona": "0", "query": "1", "response": "2"}
    assert read({0: "p", 1: "q", 2: "r"}, columns=columns) == read({"persona": "p", "query": "q", "response": "r"})


def test_a_table_of_no_entries_is_an_empty_list(tmp_path):
    """Older versions of datasets keep a list of objects as an object of lists."""
    (example,) = load(tmp_path, {**LAMP, "profile": {"id": [], "text": []}})
    assert example.persona == ()


def test_an_utterance_before_which_nothing_was_said(tmp_path):
    row = {"personality": ["p"], "utterances": [{"history": said, "candidates": ["Yo"]} for said in ([], ["Hi"])]}
    assert [example.turns for example in load(tmp_path, row)] == [(Turn("user", "Hi"),)]


def test_a_conversation_of_several_turns_in_each_shape(tmp_path):
    talk = [("Hi", "Yo"), ("Plans?", "A walk.")]
    shapes = {
        "sharegpt": {"persona": "P", "conversations": [{"from": who, "value": text} for pair in talk
                                                       for who, text in zip(("human", "gpt"), pair, strict=True)]},
        "aloe": {"profile": "P", "conversations": [{**ALOE, "assistant": {"preferred": "Good."}, "chosen": "preferred"},
                                                   {**ALOE, "user": "Plans?", "assistant": {"preferred": "A walk."}}]},
        "prism": None,
    }  # fmt: skip
    (tmp_path / "survey.jsonl").write_text('{"user_id": "u", "self_description": "P"}\n')
    said = [{"role": role, "content": text, "if_chosen": True} for pair in talk
            for role, text in (("user", pair[0]), ("model", pair[1]), ("model", "the same again"))]  # fmt: skip
    shapes["prism"] = {"user_id": "u", "conversation_history": said}
    for format, row in shapes.items():
        first, second = load_examples(jsonl(tmp_path / "rows.jsonl", row), "train").all
        assert (len(first.turns), len(second.turns), second.response) == (1, 3, "A walk."), format
        assert second.turns[1].content == ("Good." if format == "aloe" else "Yo")
        assert first.conversation == second.conversation


def test_the_rejected_reply_may_be_what_the_conversation_went_on_with(tmp_path):
    for rejected in ("No", ["No", "Nope"]):
        turns = [{**ALOE, "assistant": {"preferred": "Yo", "rejected": rejected}}] * 2
        _, second = load(tmp_path, {"profile": '"Keeps bees."\n', "conversations": turns})
        assert second.persona == ("Keeps bees.",) and second.turns[1] == Turn("assistant", "No")


def test_who_is_a_user_of_personachat(tmp_path):
    """Rows name no user, and a persona is played in many conversations: all with one persona are one user."""
    row = documented("personachat")[0]
    path = jsonl(tmp_path / "d.jsonl", row, {**row, "conv_id": 8}, {**row, "personality": ["i bake ."]})
    first, second, third = (example.user_id for example in load_examples(path, "train"))
    assert first == second != third
    assert load(tmp_path, documented("personachat")[1])[0].user_id == first  # also in the other form


def test_what_is_null_within_an_object_is_absent(tmp_path):
    (msc,), (aloe,) = documented("msc"), documented("aloe")
    msc["previous_dialogs"][0]["dialog"] = {"text": ["Hi", "Hello"], "id": [None, None]}  # a struct of lists
    assert load(tmp_path, msc)[0].persona[0] == "User: Hi\nAssistant: Hello"
    aloe["conversations"] = [{**ALOE, "chosen": None}] * 2
    assert load(tmp_path, aloe)[1].turns[1].content == "Yo"
    said = [{"role": "system", "content": "<p>I bake.</p>"}, *TALK[:2]]
    struct = {"role": [x["role"] for x in said], "content": [x["content"] for x in said]}
    assert load(tmp_path, {"messages": struct}, persona_markers=("<p>", "</p>"))[0].persona == ("I bake.",)


def test_texts_within_texts(tmp_path):
    (aloe,) = documented("aloe")
    (only,) = load(tmp_path, {**aloe, "profile": json.dumps('Says "hi", and é.') + "\n"})
    assert only.persona[0] == 'Says "hi", and é.'
    row = {**documented("personamem_v2")[0], "user_query": "{hello} (hm)"}
    assert (
        load_examples(documented_files(tmp_path, "personamem_v2", row), "train").all[0].turns[0].content
        == "{hello} (hm)"
    )
    row = {name.replace("32k", "128k"): value for name, value in documented("personamem_v2")[0].items()}
    path = documented_files(tmp_path, "personamem_v2", row)
    (tmp_path / "data/chat_history_32k/p100.json").write_text('[{"role": "user", "content": ""}]')
    with pytest.raises(UserError, match=r"field 'chat_history_128k_link\[0\]\.content'"):
        load_examples(path, "train")


def test_personachat_utterances_and_silence(tmp_path):
    utterances = [{"history": ["__ SILENCE __"], "candidates": ["no", "hi"]},
                  {"history": ["__ SILENCE __", "hi", "hello"], "candidates": ["no", "i bake"]}]  # fmt: skip
    (only,) = load(tmp_path, {"personality": ["i bake ."], "utterances": utterances})  # an opening line answers nothing
    assert only.turns == (Turn("assistant", "hi"), Turn("user", "hello")) and only.response == "i bake"


def test_msc_is_seen_from_each_speaker(tmp_path):
    row = documented("msc")[0]
    row["personas"][1] = ["I bake.", "I run."]
    row["dialog"] += [{"id": "Speaker 1", "text": "Well."}]
    row["previous_dialogs"] += [{"dialog": [{"id": "Speaker 2", "text": "Honey?"}, {"id": "Speaker 1", "text": "No."}]}]
    baker, keeper = load(tmp_path, row)
    assert baker.persona == ("User: No.", "Assistant: Honey?", "User: Hi\nAssistant: Hello", "I run.", "I bake.")
    assert keeper.persona == ("User: Honey?\nAssistant: No.", "User: Hello", "Assistant: Hi", "I keep bees.")
    assert keeper.response == "Well." and keeper.user_id == "valid_0"


def test_alpaca_with_a_history_and_without_input(tmp_path):
    row = {"persona": "P", "instruction": "Go on.", "input": "", "output": "Done.", "history": [["Begin.", "Begun."]]}
    (only,) = load(tmp_path, {**row, "system": "Be brief."})
    assert [(turn.role, turn.content) for turn in only.turns] == [
        ("system", "Be brief."), ("user", "Begin."), ("assistant", "Begun."), ("user", "Go on."),
    ]  # fmt: skip
    row = {"profile": "P", "instruction": "Go on.", "input": "this", "output": "Done."}
    assert "choose it with --format" in error(tmp_path, row)  # as LaMP's, the instruction would be lost
    (chosen,) = load(tmp_path, row, format="alpaca")
    assert chosen.persona == ("P",) and chosen.turns[0].content == "Go on.\nthis"


def test_preference_pairs_with_conversations(tmp_path):
    """LLaMA-Factory's format: the chosen reply answers the conversation, whose earlier replies are not trained on."""
    said = [*SAID, {"from": "human", "value": "Plans?"}]
    row = {"persona": "P", "conversations": said, "rejected": {"from": "gpt", "value": "None."}}
    (only,) = load(tmp_path, {**row, "chosen": {"from": "gpt", "value": "A walk."}})
    assert only.response == "A walk." and len(only.turns) == 3
    for wrong in ({"from": "human", "value": "A walk."}, "A walk.", [], {"from": "gpt", "value": ""}):
        assert "data.jsonl:1: field 'chosen" in error(tmp_path, {**row, "chosen": wrong})
    assert "field 'conversations': expected a user turn at the end" in error(
        tmp_path, {**row, "conversations": SAID, "chosen": {"from": "gpt", "value": "A walk."}}
    )


def test_sharegpt_beside_a_profile_is_told_of_its_name(tmp_path):
    row = {"profile": "P", "conversations": SAID}
    assert "field 'conversations[0]': expected" in error(tmp_path, row)
    assert "for ShareGPT's messages with a persona: --columns persona=profile" in error(tmp_path, row)
    assert load(tmp_path, row, columns={"persona": "profile"})[0].persona == ("P",)


def test_roles_are_asked_for_in_the_words_of_their_format(tmp_path):
    row = {"persona": ["p"], "conversations": [{"from": "Human", "value": "Hi"}, {"from": "Bot", "value": "No."}]}
    assert "expected 'human' or 'gpt', or 'system' at the beginning, got str 'Human'" in error(tmp_path, row)
    row = {"persona": ["p"], "messages": [{"role": "User", "content": "Hi"}, {"role": "assistant", "content": "No."}]}
    assert "expected 'user' or 'assistant', or 'system' at the beginning, got str 'User'" in error(tmp_path, row)


def test_two_messages_of_one_side_are_to_be_joined(tmp_path):
    said = [{"from": who, "value": "Hi"} for who in ("human", "human", "gpt")]
    assert "join messages of one side" in error(tmp_path, {"persona": ["p"], "conversations": said})


def test_messages_of_a_table_have_all_names(tmp_path):
    """In a table every message has the names of all messages, most of them null."""
    said = [{"from": None, "value": None, **message} for message in TALK[:2]]
    marked = [{"role": "system", "content": "<p>I bake.</p>", "from": None, "value": None}, *said]
    (only,) = load(tmp_path, {"messages": marked}, persona_markers=("<p>", "</p>"))
    assert only.persona == ("I bake.",) and only.response == "Hello!"


def test_messages_may_have_sharegpts_names(tmp_path):
    (only,) = load(tmp_path, {"persona": "P", "messages": SAID})
    assert only.turns == (Turn("user", "Hi"),) and only.response == "Yo"


def test_a_user_with_one_review(tmp_path):
    rows = documented("amazon")
    path = jsonl(tmp_path / "rows.jsonl", *rows, {**rows[0], "user_id": "one"})
    with pytest.raises(UserError, match=r"rows\.jsonl:3: field 'user_id': expected .*--skip_bad_rows"):
        load_examples(path, "train")
    kept = load_examples(path, "train", skip_bad_rows=True)
    assert (len(kept.all), kept.skipped) == (2, 1)
    assert [e.persona[0].splitlines()[1] for e in kept] == ["Title: Thin gloves", "Title: Good veil"]
