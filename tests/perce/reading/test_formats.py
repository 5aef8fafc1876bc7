"""The formats: how rows are told apart, how each row of docs/DATA.md is read, and what all formats have in common."""

import re

import pandas as pd
import pytest

from perce import DataConfig, UserError, load_examples
from perce.data.splits import load_splits
from perce.reading.detection import detect_format, missing_fields
from perce.reading.fields import Turn
from perce.reading.formats import FORMATS
from tests.helpers.raw_rows import (
    ABSTRACT,
    FILES,
    GOOD,
    LAMP,
    PAGE,
    ROWS,
    SAID,
    TALK,
    documented,
    documented_files,
    error,
    jsonl,
    load,
)  # fmt: skip


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
    with pytest.raises(UserError, match=r"OURS one of .*persona.*got 'person'; did you mean persona=profile\."):
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
    """A row is recognised by its fields alone. With --format, rows of longlamp could also be read as lamp, and rows of
    amazon as text."""
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
    assert first.user_id == USERS.get(format) or format == "personachat"  # see test_parsers.py
    assert (first.persona, [turn.content for turn in first.turns], first.response) == READ[format]
    assert {turn.role for turn in first.turns} <= {"user", "system"}


# Fields by which a format is recognised, and which are not read.
NOT_READ = {"preference": ("rejected",), "lamp_qa": ("id", "rubric_aspects", "narrative")}
MAY_BE_EMPTY = ("id", "name", "persona_id", "previous_dialogs")  # any text may name a user
MAY_BE_NONE = ("persona", "profile", "personality", "user 1 personas", "user 2 personas")  # as an empty list
WRONG = {
    "persona_id": [4],
    "user_id": [4],
    "name": [4],
    "end_index_in_shared_context": "-3",
    "rating": [5],
}  # or 7


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_wrong_with_a_row_is_named(tmp_path, format):
    """A missing field, a wrong type, an empty text: file, line and field."""
    row = documented(format)[0]
    for need in FORMATS[format].needs:
        name = next(name for name in need.split("|") if name in row)
        empty = [" "] if name in MAY_BE_NONE else [] if isinstance(row[name], list) else " "
        wrongs = [None, WRONG.get(name, 7), empty]
        read = name not in NOT_READ.get(format, ())
        for wrong in wrongs[: 3 if read and name not in MAY_BE_EMPTY else 2 if read else 1]:
            path = documented_files(tmp_path, format, row, {**row, name: wrong}, *documented(format)[1:])
            with pytest.raises(UserError) as caught:
                load_examples(path, "train", unanswered=True)
            place, field, _ = re.split(r": field '|': expected ", str(caught.value), maxsplit=2)
            assert place == f"{path}:2" and name in field.split("' or '"), (wrong, str(caught.value))


LISTS_OF_A_PERSONA = {
    "persona": ["perce", "prompt_completion", "preference", "sharegpt", "alpaca"],
    "profile": ["longlamp", "lamp", "lamp_qa"], "personality": ["convai2", "personachat"], "user 2 personas": ["spc"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "format"), [(a, format) for a, of in LISTS_OF_A_PERSONA.items() for format in of])
def test_an_empty_list_is_no_persona(tmp_path, name, format):
    path = documented_files(tmp_path, format, {**documented(format)[0], name: []})
    assert load_examples(path, "train", unanswered=True).all[0].persona == ()


def test_the_users_of_msc_in_a_csv(tmp_path):
    pd.DataFrame(documented("msc")).to_csv(tmp_path / "d.csv", index=False)
    assert load_examples(tmp_path / "d.csv", "train").all[0].user_id == "valid_0"
    for nobody in ("", "x", 3, [], {}):
        assert load(tmp_path, {**documented("msc")[0], "metadata": nobody})[0].user_id is None


@pytest.mark.parametrize("lost", ["user_id", "title", "rating"])
def test_a_review_is_no_document(tmp_path, lost):
    row = {name: value for name, value in documented("amazon")[0].items() if name != lost}
    assert f"The nearest format is amazon; missing: {lost}." in error(tmp_path, row)
    assert load(tmp_path, row, format="text")[0].text == "No bee got in."


@pytest.mark.parametrize("format", ["personamem", "personamem_v2", "personachat"])
def test_the_files_that_are_csv(tmp_path, format):
    """The files that are CSV in the original data sets, as pandas writes them."""
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
    assert "The nearest format is alpaca; missing: persona or profile." in error(tmp_path, row)
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
    for persona in ("P", []):  # what is marked would stay in both prompts
        text = error(tmp_path, {**row, "persona": persona}, persona_markers=("<p>", "</p>"))
        assert "field 'persona': expected either this field or a persona behind '<p>'" in text and "got both" in text
    own = load(tmp_path, {**row, "persona": "P"}, persona_markers=("<q>", "</q>"))[0]
    assert own.persona == ("P",) and own.turns[0].content == MARKED


def test_a_row_has_a_persona_or_a_profile(tmp_path):
    """The profile was left out without a word."""
    row = {"profile": "P", "instruction": "Hi", "output": "Hello!"}
    marked = error(tmp_path, {**row, "system": MARKED}, persona_markers=("<p>", "</p>"))
    for text in (marked, error(tmp_path, {**row, "persona": "Q"})):
        assert "field 'profile': expected either 'persona' or 'profile', got both" in text


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


def test_a_second_persona_between_the_markers_is_not_left_in_both_prompts(tmp_path):
    said = [{"role": "system", "content": "<p>I bake.</p> Be brief. <p>I run.</p>"}, *TALK[:2]]
    text = error(tmp_path, {"messages": said}, persona_markers=("<p>", "</p>"))
    assert "field 'messages': expected a system message with the persona between '<p>' and '</p>' once" in text
    (only,) = load(tmp_path, {"messages": said}, persona_markers=("<p>", ""))
    assert only.persona == ("I bake.</p> Be brief. <p>I run.</p>",)


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
    with pytest.raises(UserError, match="all replies of its 1 rows have weight 0"):
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
    """The table as docs/DATA.md has it."""

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
    table = PAGE.partition("perce/reading/formats.py -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == table_of_formats()
