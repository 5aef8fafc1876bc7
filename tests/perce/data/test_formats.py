"""perce.data.formats: what a row of each format means."""

import copy
import csv
import json
import re
from functools import reduce

import pandas as pd
import pytest

from perce import DataConfig, UserError, load_examples
from perce.data.detection import detect_format, missing_fields
from perce.data.fields import Turn
from perce.data.formats import FORMATS
from perce.data.rows import Example, Examples, Reading
from perce.data.sources import Source
from perce.data.splits import load_splits
from tests.helpers.raw_rows import (
    ABSTRACT,
    CONVAI2,
    FILES,
    GOOD,
    LAMP,
    PAGE,
    ROWS,
    SPC,
    TALK,
    documented,
    documented_files,
    error,
    jsonl,
    load,
)


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
    (only,) = load(tmp_path, {"persona": "P", "messages": TALK[1:]})  # its opening line answers nothing: no example
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


def test_the_target_is_never_in_its_own_profile(tmp_path):
    leak = [{"text": "old"}, {"text": "- We  PROVE it\n"}, {"abstract": "We prove it.", "title": "T"}]
    (example,) = load(tmp_path, {**ABSTRACT, "profile": leak})
    assert example.persona == ("old",)
    assert "other than the row's own output" in error(tmp_path, {**ABSTRACT, "profile": leak[1:]})


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


def test_format_overrides(tmp_path):
    both = {**GOOD, "prompt": "Q", "completion": "R"}
    text = error(tmp_path, both)
    assert "data.jsonl:1" in text and "--format" in text and "perce" in text and "prompt_completion" in text
    assert load(tmp_path, both, format="perce")[0].response == "Walking my dog."
    assert load(tmp_path, both, format="prompt_completion")[0].response == "R"
    with pytest.raises(UserError, match=r"format: expected one of auto, perce.*got 'lapm'; did you mean 'lamp'"):
        load(tmp_path, both, format="lapm")


def test_columns(tmp_path):
    columns = {"persona": "profile", "query": "input", "response": "output", "user_id": "name"}
    (example,) = load(tmp_path, ABSTRACT, columns=columns)
    assert example.persona[0] == "Title: T1\nAbstract: A1"  # one's own persona keeps its order: best first
    assert (example.response, example.user_id) == ("We prove it.", "A. Uthor")
    assert [e.user_id for e in load(tmp_path, ABSTRACT, LAMP, columns=columns)] == ["A. Uthor", None]
    swapped = {**GOOD, "query": GOOD["response"], "response": GOOD["query"]}
    assert load(tmp_path, swapped, columns={"query": "response", "response": "query"})[0].response == GOOD["response"]
    text = error(tmp_path, GOOD, columns={"persona": "persna"})
    assert "data.jsonl:1: field 'persna'" in text and "did you mean --columns persona=persona." in text
    assert "Correct --columns" in text
    with pytest.raises(UserError, match=r"our name one of .*persona.*got 'person'; did you mean persona=profile\."):
        load(tmp_path, GOOD, columns={"person": "profile"})


# --- every format ---------------------------------------------------------------------------------------------------

# Where the schema of a format was seen. The rows of docs/DATA.md are our own.
SEEN = {
    "perce": "ours; messages: OpenAI's, huggingface/trl docs/source/dataset_formats.md",
    "prompt_completion": "huggingface/trl docs/source/dataset_formats.md",
    "preference": "huggingface/trl docs/source/dataset_formats.md (explicit prompt)",
    "sharegpt": "hiyouga/LLaMA-Factory data/README.md",
    "alpaca": "hiyouga/LLaMA-Factory data/README.md",
    "longlamp": "the README of author-abstracts, which has LongLaMP's records",
    "lamp": "annatrella/personalizing-llm-hl data/LaMP7_dev.csv",
    "lamp_qa": "LaMP-Benchmark/LaMP-QA utils/download_datasets.py, evaluation/evaluator.py, retrieval/rank_dataset.py",
    "amazon": "https://amazon-reviews-2023.github.io, and rows that public code prints",
    "convai2": "the README of personachat-convai2; ParlAI's records as objects",
    "personachat": "huggingface/transfer-learning-conv-ai example_entry.py; flat: bavard/personachat_truecased README",
    "spc": "google-research-datasets/Synthetic-Persona-Chat data/Synthetic-Persona-Chat_valid.csv",
    "msc": "facebookresearch/ParlAI parlai/tasks/msc/agents.py, issue 4050",
    "personamem": "bowen-upenn/PersonaMem inference_standalone_openai.py, baselines/data/shared_contexts_128k.jsonl",
    "personamem_v2": "bowen-upenn/PersonaMem-v2 MemAgent/data/data_preprocess.py, data/chat_history_32k",
    "prefeval": "amazon-science/PrefEval benchmark_dataset/explicit_preference, SFT/single_pref_remind",
    "aloe": "ShujinWu-0814/ALOE data_generation/data_generation.py, training/dpo.py",
    "prism": "HannahKirk/prism-alignment src/data_processing/process_conversations.py, prepare_survey.py",
    "text": "huggingface/trl docs/source/dataset_formats.md (language modeling)",
}


def test_every_format_has_a_row_on_the_page_and_a_source():
    assert list(SEEN) == list(FORMATS) == [*READ, "text"] and {*ROWS, *FILES} == FORMATS.keys()


@pytest.mark.parametrize("format", FORMATS)
def test_no_row_is_taken_for_another(tmp_path, format):
    """By its fields alone; and of the formats that it could be forced into, one asks for what it has not, or for less
    than it has."""
    for row in documented(format):
        assert detect_format(row) == format
        others = [name for name in FORMATS if name != format and not missing_fields(name, row)]
        assert others == {"longlamp": ["lamp"], "amazon": ["text"]}.get(format, [])


READ = {
    "perce": (("I keep bees.",), ["Coming tonight?"], "No, the bees need me."),
    "prompt_completion": (("I keep bees.",), ["Coming tonight?"], "No, the bees need me."),
    "preference": (("I keep bees.",), ["Coming tonight?"], "No, the bees need me."),
    "sharegpt": (("I keep bees.",), ["Be brief.", "Hi"], "Hello from the hives!"),
    "alpaca": (("I keep bees.",), ["Plan my evening.\nI have two hours."], "Look after the bees."),
    "longlamp": (("Title: Bees\nAbstract: Bees are …",), ["Write an abstract for …"], "We study …"),
    "lamp": (("so many bees",), ["Paraphrase the following tweet …"], "bees again"),
    "lamp_qa": (("My bees swarmed.",), ["How do I relax after work?"], ""),
    "amazon": (
        ("Rating: 2.0\nTitle: Thin gloves\nReview: The bees sting through them.",),
        ['Write a review with the rating 5.0 and the title "Good veil".'],
        "No bee got in.",
    ),
    "convai2": (("i keep bees .",), ["hi"], "hello from the hives"),
    "personachat": (("i keep bees .",), ["hi"], "hello from the hives"),
    "spc": (("I bake.",), ["Hi"], "Hello"),
    "msc": (("User: Hi\nAssistant: Hello", "I bake."), ["Back again!"], "How are the bees?"),
    "personamem": (
        ("User: My bees swarmed.\nAssistant: Oh no.", "Current user persona: keeps bees."),
        ["Coming tonight?"],
        "No, the bees need me.",
    ),
    "personamem_v2": (
        ("User: My bees swarmed.\nAssistant: Oh no.", "You talk to a beekeeper."),
        ["Coming tonight?"],
        "No, the bees need you.",
    ),
    "prefeval": (("I avoid honey.",), ["What goes well with tea?"], "Maple syrup."),
    "aloe": (("Keeps bees in Oslo.", "Dry humour."), ["Hi"], "Hello from the hives!"),
    "prism": (
        ("I keep bees.", "Wants of an assistant: Be brief.", "Age: 25-34 years old", "Lives in: Norway"),
        ["Hi"],
        "Hello from the hives!",
    ),
}
USERS = {"perce": "ana", "longlamp": "Ana", "lamp": "17", "lamp_qa": "q1", "amazon": "AE", 
         "msc": "valid_0", "personamem": "4", "personamem_v2": "100", "prism": "user0"}  # fmt: skip


@pytest.mark.parametrize("format", READ)
def test_the_row_of_the_page_is_read(tmp_path, format):
    rows = load_examples(documented_files(tmp_path, format), "train", unanswered=True)
    first = rows.all[0]
    assert rows.format == format
    assert first.user_id == USERS.get(format) or format == "personachat"  # see below
    assert (first.persona, [turn.content for turn in first.turns], first.response) == READ[format]
    assert {turn.role for turn in first.turns} <= {"user", "system"}


# Fields that are asked for to tell the format, and not read.
NOT_READ = {"preference": ("rejected",), "lamp_qa": ("id", "rubric_aspects", "narrative")}
MAY_BE_EMPTY = ("id", "name", "persona_id", "previous_dialogs")  # names of users are any text
WRONG = {"persona_id": [4], "user_id": [4], "name": [4], "end_index_in_shared_context": "-3", "rating": [5]}  # else 7


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_wrong_with_a_row_is_named(tmp_path, format):
    """A missing field, a wrong type, an empty text: file, line and field."""
    row = documented(format)[0]
    for need in FORMATS[format].needs:
        name = next(name for name in need.split("|") if name in row)
        wrongs = [None, WRONG.get(name, 7), [] if isinstance(row[name], list) else " "]
        read = name not in NOT_READ.get(format, ())
        for wrong in wrongs[: 3 if read and name not in MAY_BE_EMPTY else 2 if read else 1]:
            path = documented_files(tmp_path, format, row, {**row, name: wrong}, *documented(format)[1:])
            with pytest.raises(UserError) as caught:
                load_examples(path, "train", unanswered=True)
            place, field, _ = re.split(r": field '|': expected ", str(caught.value), maxsplit=2)
            assert place == f"{path}:2" and name in field.split("' or '"), (wrong, str(caught.value))


SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
ALOE = {"user": "Hi", "assistant": {"preferred": "Yo", "rejected": "No"}, "chosen": "rejected"}
WITHIN = [
    ("sharegpt", "conversations", [{"from": "bing", "value": "x"}], "conversations[0].from"),
    ("sharegpt", "conversations", [*SAID, {"from": "observation", "value": "x"}], "conversations[2]"),
    ("sharegpt", "conversations", [SAID[0], {"from": "gpt", "value": ""}], "conversations[1].value"),
    ("sharegpt", "conversations", [{"from": "system", "value": "x"}, *SAID], "system"),  # the row has one already
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
    ("personachat", "history", [], "history"),
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
    {"a": [1], "b": []},
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
    """Nobody is named, and a persona is played in many conversations: whoever has it is one."""
    row = documented("personachat")[0]
    path = jsonl(tmp_path / "d.jsonl", row, {**row, "conv_id": 8}, {**row, "personality": ["i bake ."]})
    first, second, third = (example.user_id for example in load_examples(path, "train"))
    assert first == second != third
    assert load(tmp_path, documented("personachat")[1])[0].user_id == first  # in the other form too


def test_what_is_null_within_an_object_is_absent(tmp_path):
    (msc,), (aloe,) = documented("msc"), documented("aloe")
    msc["previous_dialogs"][0]["dialog"] = {"text": ["Hi", "Hello"], "id": [None, None]}  # a struct of lists
    assert load(tmp_path, msc)[0].persona[0] == "User: Hi\nAssistant: Hello"
    aloe["conversations"] = [{**ALOE, "chosen": None}] * 2
    assert load(tmp_path, aloe)[1].turns[1].content == "Yo"
    said = [{"role": "system", "content": "<p>I bake.</p>"}, *TALK[:2]]
    struct = {"role": [x["role"] for x in said], "content": [x["content"] for x in said]}
    assert load(tmp_path, {"messages": struct}, persona_markers=("<p>", "</p>"))[0].persona == ("I bake.",)


def test_the_users_of_msc_in_a_csv(tmp_path):
    pd.DataFrame(documented("msc")).to_csv(tmp_path / "d.csv", index=False)
    assert load_examples(tmp_path / "d.csv", "train").all[0].user_id == "valid_0"
    for nobody in ("", "x", 3, [], {}):
        assert load(tmp_path, {**documented("msc")[0], "metadata": nobody})[0].user_id is None


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
    (only,) = load(tmp_path, {"personality": ["i bake ."], "utterances": utterances})  # an opening answers nothing
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
    assert "choose with --format" in error(tmp_path, row)  # or LaMP's, with an instruction that would be lost
    (chosen,) = load(tmp_path, row, format="alpaca")
    assert chosen.persona == ("P",) and chosen.turns[0].content == "Go on.\nthis"


def test_preference_pairs_with_conversations(tmp_path):
    """LLaMA-Factory's: what was chosen answers the conversation, whose own replies are not trained on."""
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
    assert "ShareGPT's, beside a persona: --columns persona=profile" in error(tmp_path, row)
    assert load(tmp_path, row, columns={"persona": "profile"})[0].persona == ("P",)


def test_messages_of_a_table_have_all_names(tmp_path):
    """Which are null in most of them."""
    said = [{"from": None, "value": None, **message} for message in TALK[:2]]
    marked = [{"role": "system", "content": "<p>I bake.</p>", "from": None, "value": None}, *said]
    (only,) = load(tmp_path, {"messages": marked}, persona_markers=("<p>", "</p>"))
    assert only.persona == ("I bake.",) and only.response == "Hello!"


def test_messages_may_have_sharegpts_names(tmp_path):
    (only,) = load(tmp_path, {"persona": "P", "messages": SAID})
    assert only.turns == (Turn("user", "Hi"),) and only.response == "Yo"


@pytest.mark.parametrize("lost", ["user_id", "title", "rating"])
def test_a_review_is_no_document(tmp_path, lost):
    row = {name: value for name, value in documented("amazon")[0].items() if name != lost}
    assert f"Nearest is amazon; missing: {lost}." in error(tmp_path, row)
    assert load(tmp_path, row, format="text")[0].text == "No bee got in."


@pytest.mark.parametrize("format", ["personamem", "personamem_v2", "personachat"])
def test_the_files_that_are_csv(tmp_path, format):
    """As pandas writes them."""
    read = load_examples(documented_files(tmp_path, format), "train").all
    frame = pd.DataFrame(documented(format)[:1])
    path = tmp_path / FILES.get(format, "rows.jsonl").replace(".jsonl", ".csv")
    frame.to_csv(path, index=False)
    rows = load_examples(path, "train")
    assert rows.format == format
    assert [(e.persona, e.turns, e.response, e.user_id) for e in rows] == [
        (e.persona, e.turns, e.response, e.user_id) for e in read[:1]
    ]


def test_what_lacks_a_persona_is_no_document(tmp_path):
    row = {"instruction": "Plan.", "input": "", "output": "Done.", "text": "### Instruction: Plan. ### Response: Done."}
    assert "Nearest is alpaca; missing: persona or profile." in error(tmp_path, row)
    plain = {"text": "A page.", "title": "Bees", "author": "Ana", "url": "x", "id": 1}
    assert load(tmp_path, plain)[0].text == "A page."


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Hi", "response": "Yo"},
        {"messages": TALK[:2]},
        {"prompt": "Hi", "completion": "Yo"},
        {"prompt": TALK[:1], "chosen": "Yo", "rejected": "No"},
        {"conversations": SAID},
        {"instruction": "Hi", "output": "Yo"},
    ],
)
def test_a_system_message_that_is_a_field_is_never_lost(tmp_path, row):
    (only,) = load(tmp_path, {**row, "persona": "P", "system": "Be brief."})
    assert only.turns == (Turn("system", "Be brief."), Turn("user", "Hi"))
    (marked,) = load(tmp_path, {**row, "system": "Be brief. <p>I bake.</p>"}, persona_markers=("<p>", "</p>"))
    assert marked.persona == ("I bake.",) and marked.turns == only.turns
    (empty,) = load(tmp_path, {**row, "persona": "P", "system": ""})
    assert empty.turns == (Turn("user", "Hi"),)
    assert "field 'system': expected a non-empty string" in error(tmp_path, {**row, "persona": "P", "system": 0})


def test_a_user_with_one_review(tmp_path):
    rows = documented("amazon")
    path = jsonl(tmp_path / "rows.jsonl", *rows, {**rows[0], "user_id": "one"})
    with pytest.raises(UserError, match=r"rows\.jsonl:3: field 'user_id': expected .*--skip_bad_rows"):
        load_examples(path, "train")
    kept = load_examples(path, "train", skip_bad_rows=True)
    assert (len(kept.all), kept.skipped) == (2, 1)
    assert [e.persona[0].splitlines()[1] for e in kept] == ["Title: Thin gloves", "Title: Good veil"]


# --- the persona in a system message --------------------------------------------------------------------------------

MARKED = "Be kind. <p> I bake. </p> Be brief."


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [{"role": "system", "content": MARKED}, *TALK[:2]]}, "messages"),
        ({"prompt": [{"role": "system", "content": MARKED}, TALK[0]], "completion": "Hello!"}, "prompt"),
        ({"conversations": [{"from": "system", "value": MARKED}, *SAID[:1], {"from": "gpt", "value": "Hello!"}]},
         "conversations"),
        ({"system": MARKED, "instruction": "Hi", "output": "Hello!"}, "system"),
    ],
)  # fmt: skip
def test_a_persona_between_markers(tmp_path, row, field):
    (only,) = load(tmp_path, row, persona_markers=("<p>", "</p>"))
    assert only.persona == ("I bake.",) and only.response == "Hello!"
    assert only.turns == (Turn("system", "Be kind.\nBe brief."), Turn("user", "Hi"))
    (rest,) = load(tmp_path, row, persona_markers=("<p>", ""))
    assert rest.persona == ("I bake. </p> Be brief.",) and rest.turns[0] == Turn("system", "Be kind.")
    text = error(tmp_path, row, persona_markers=("<q>", "</q>"))
    assert f"data.jsonl:1: field '{field}': expected a system message with the persona between '<q>' and '</q>'" in text
    told = error(tmp_path, row)
    assert "missing: persona" in told and "--persona_markers START...END" in told
    own = load(tmp_path, {**row, "persona": "P"}, persona_markers=("<p>", "</p>"))[0]  # a field goes before
    assert own.persona == ("P",) and own.turns[0].content == MARKED


def test_the_option_of_the_markers(tmp_path):
    said = [{"role": "system", "content": "About: I bake."}, *TALK[:2]]
    path = jsonl(tmp_path / "data.jsonl", {"messages": said}, {"messages": [said[0], *TALK[2:]]})
    splits = load_splits(DataConfig(data=str(path), persona_markers="About:..."), eval_examples=0, seed=1)
    assert [example.persona for example in (*splits.train, *splits.validation)] == [("I bake.",)] * 2
    assert DataConfig(persona_markers="<p>...</p>").markers() == ("<p>", "</p>")
    for wrong in ("<p>", "...</p>", ""):
        with pytest.raises(UserError, match=r"persona_markers: expected START\.\.\.END"):
            DataConfig(persona_markers=wrong)


def test_a_system_message_that_is_the_persona_alone(tmp_path):
    (only,) = load(
        tmp_path, {"messages": [{"role": "system", "content": "<p>I bake.</p>"}, *TALK[:2]]},
        persona_markers=("<p>", "</p>"),
    )  # fmt: skip
    assert only.turns == (Turn("user", "Hi"),)
    assert "no system message" in error(tmp_path, {"messages": TALK}, persona_markers=("<p>", ""))


# --- weights, and rows without a response ---------------------------------------------------------------------------


def test_weights_of_rows_and_messages_multiply(tmp_path):
    talk = [TALK[0], {**TALK[1], "weight": 0}, TALK[2], {**TALK[3], "weight": 0.5}]
    path = jsonl(tmp_path / "data.jsonl", {"persona": "P", "messages": talk, "weight": 3}, {**GOOD, "weight": 0})
    rows = load_examples(path, "train")
    (only,) = rows.all
    assert only.response == "A walk." and only.data_weight == 1.5 and len(only.turns) == 3
    assert (rows.weightless, rows.skipped, rows.rows) == (2, 0, 2)
    (plain,) = load(tmp_path, {**documented("preference")[0], "weight": 2,
                               "chosen": [{"role": "assistant", "content": "R", "weight": 0.25}]})  # fmt: skip
    assert plain.data_weight == 0.5
    for wrong in (-1, "heavy", True, [1], float("nan"), 10**7):
        text = error(tmp_path, {**GOOD, "weight": wrong})
        assert "data.jsonl:1: field 'weight': expected a number from 0 to 1e+06" in text
    with pytest.raises(UserError, match="0 of 1 rows were skipped, and all other replies have weight 0"):
        load(tmp_path, {**GOOD, "weight": 0})


def test_weights_in_a_csv(tmp_path):
    (tmp_path / "d.csv").write_text("persona,query,response,weight\np,q,r,0.5\np,q,s,\n")
    assert [example.data_weight for example in load_examples(tmp_path / "d.csv", "train").all] == [0.5, 1]


@pytest.mark.parametrize("format", ["lamp_qa", "prefeval"])
def test_rows_without_a_response(tmp_path, format):
    row = {name: value for name, value in documented(format)[0].items() if not name.startswith("response")}
    text = error(tmp_path, row)
    assert f"data.jsonl:1: field 'response': expected a response, got a row of format {format}" in text
    assert "--columns response=FIELD" in text and "perce.evaluate" in text
    (given,) = load(tmp_path, {**row, "answer": "Tea."}, columns={"response": "answer"})
    assert given.response == "Tea."
    (asked,) = load(tmp_path, row, unanswered=True)
    assert asked.response == ""


# --- docs/DATA.md ---------------------------------------------------------------------------------------------------


def table_of_formats() -> str:
    """As the page has it."""

    def said(needs):
        return ", ".join(" or ".join(f"`{name}`" for name in need.split("|")) for need in needs)

    lines = ["| format | of | needs | may have | examples a row | user |", "| --- | --- | --- | --- | --- | --- |"]
    for name, entry in FORMATS.items():
        users = ", ".join(f"`{user}`" for user in entry.users)
        lines.append(
            f"| `{name}` | {entry.title} | {said(entry.needs)} | {said(entry.may_have)} | {entry.gives} | {users} |"
        )
    return "\n".join(lines)


def test_the_table_of_the_page_is_that_of_the_entries():
    table = PAGE.partition("perce/data/formats.py -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == table_of_formats()
