"""The counts and prompts that a preview prints, compared with the pairs themselves."""

import pytest

from perce import UserError
from perce.config.commands import PREVIEW
from perce.data.preview import print_preview
from tests.helpers.raw_rows import GOOD, TALK, documented_files, jsonl
from tests.helpers.templates import CHAT_TEMPLATES
from tests.helpers.tiny import CHATML, tiny_tokenizer


@pytest.fixture
def previewed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def of(data, *arguments, template=CHATML):
        options = PREVIEW.build(PREVIEW.parse(["--data", str(data), *map(str, arguments)]).raw)
        print_preview(options, tiny_tokenizer(template))
        return capsys.readouterr().out

    return of


def cells(printed, first):
    return next(line.split() for line in printed.splitlines() if line.split()[:1] == [first])


def test_counts_of_every_split(previewed, tmp_path):
    talk = {"user_id": "a", "persona": "P", "messages": [*TALK[:3], {**TALK[3], "weight": 0}]}
    jsonl(tmp_path / "train.jsonl", GOOD, talk, {**GOOD, "response": ""}, GOOD)
    jsonl(tmp_path / "validation.jsonl", GOOD)
    printed = previewed(tmp_path)
    # split, format, rows, examples, users, personas, bad rows, weight 0
    assert cells(printed, "train") == ["train", "perce", "4", "3", "1", "2", "1", "1"]
    assert cells(printed, "validation") == ["validation", "perce", "1", "1", "0", "1", "0", "0"]
    assert f"bad row: {tmp_path / 'train.jsonl'}:3: field 'response': expected a non-empty string" in printed
    assert "bad rows" in printed and "refused" not in printed and "not read" not in printed
    jsonl(tmp_path / "eval.jsonl", GOOD)
    assert previewed(tmp_path).count("not read: eval.jsonl") == 1
    with pytest.raises(UserError, match=r"no such split; it has train, validation; not read: eval\.jsonl \("):
        previewed(tmp_path, "--split", "test")
    assert "perce: your own rows; chat logs, known by its fields persona, query or messages" in printed


def test_replies_that_the_prompt_shows_are_counted(previewed, tmp_path):
    row = {**GOOD, "response": "I bake bread, and sing to the bees."}
    printed = previewed(jsonl(tmp_path / "rows.jsonl", GOOD, row, {**row, "persona": f"Says: {row['response']}"}))
    assert "1 of 3 replies stand word for word in their persona" in " ".join(printed.split())
    assert "word for word" not in previewed(jsonl(tmp_path / "rows.jsonl", GOOD, row))


def test_both_prompts_are_the_text_with_marks(previewed, tmp_path):
    row = {**GOOD, "query": "Any plans?\nTell me.", "response": "Walking \x1b[1m my dog."}
    printed = previewed(jsonl(tmp_path / "rows.jsonl", row))
    block = "⟦persona: About the user:\n- I bake.\n- I have a dog.\n\n⟧"
    rest = "<|im_start|>user\nAny plans?\nTell me.<|im_end|>\n<|im_start|>assistant\n"
    reply = "⟦response: Walking \\x1b[1m my dog.<|im_end|>⟧\n"
    with_it, without = printed.partition("without the persona, ")[::2]
    assert "chat template writes" not in printed
    dated = previewed(tmp_path / "rows.jsonl", template=CHAT_TEMPLATES["date-now"])
    assert "Today is 01 January 2026.\n" in dated and "a date that the chat template writes is 01 January 2026" in dated
    given = "{% set date_string = date_string or strftime_now('%d %B %Y') %}Today is {{ date_string }}.\n"
    day = ("--chat_template_kwargs", '{"date_string": "5 May 2025"}')
    fixed = previewed(tmp_path / "rows.jsonl", *day, template=given + CHAT_TEMPLATES["chatml"])
    assert "Today is 5 May 2025.\n" in fixed and "chat template writes" not in fixed
    assert f"<|im_start|>system\n{block}" in with_it and f"{rest}{reply}" in with_it
    assert "persona:" not in without and f"{rest}{reply}" in without and "<|im_start|>system\n" in without


def test_what_is_trimmed_refused_shared_and_unanswered(previewed, tmp_path):
    talk = {"persona": ["I bake."], "messages": TALK}
    long = {**GOOD, "persona": ["I bake.", "very " * 150], "query": "Plans?"}
    refused = {**GOOD, "query": "very " * 300}
    path = jsonl(tmp_path / "rows.jsonl", talk, long, refused)
    printed = previewed(path, "--max_length", 160, "--rows", 9)
    assert cells(printed, "trimmed")[1:5] == ["1", "examples,", "by", "1"]
    assert f"refused 1 examples; the first: {path.name}:3: query and response take" in " ".join(printed.split())
    assert cells(printed, "shared")[2:5] == ["of", "the", "tokens,"]
    assert printed.count("without the persona") == 2  # the first of each row that fits
    printed = previewed(documented_files(tmp_path, "lamp_qa"))
    assert "1 examples have no response: perce.evaluate writes replies to them" in printed
    assert "4 passages of each history, by bm25" in printed


def test_the_most_frequent_personal_words_are_told(previewed, tmp_path):
    """Of other languages than English no word is known to be common."""
    row = {"persona": "Ich mag den Garten nicht.", "query": "Und?", "response": "Nein, nicht den\nGarten! Nicht!"}
    printed = previewed(jsonl(tmp_path / "rows.jsonl", row, {**row, "response": "Nicht."}, {**row, "response": "Ja."}))
    assert " ".join(cells(printed, "personal")) == "personal words nicht (3), den (1), garten (1)"
    words = [f"wort{n:02}" for n in range(11)]
    printed = previewed(jsonl(tmp_path / "rows.jsonl", {"persona": words, "query": "?", "response": " ".join(words)}))
    assert printed.count("(1)") == 10 and "wort09 (1), …" in printed
    assert "personal words" not in previewed(jsonl(tmp_path / "rows.jsonl", {**row, "response": "Ja."}))


def test_documents_are_pieces_without_a_persona(previewed, tmp_path):
    printed = previewed(jsonl(tmp_path / "rows.jsonl", {"text": "bees " * 50}), "--max_length", 20)
    assert "1 documents, into pieces that fit --max_length 20" in printed
    assert "a piece, 20 tokens\nbees bees" in printed and "persona" not in printed.partition("tokens")[2]


def test_long_parts_are_shortened_in_the_middle(previewed, tmp_path):
    row = {**GOOD, "persona": "begin " + "word " * 900 + "end"}
    printed = previewed(jsonl(tmp_path / "rows.jsonl", row))
    assert "begin word" in printed and "word end" in printed and "characters …" in printed and len(printed) < 7000


def test_the_sample_is_of_whole_rows_and_drawn_by_the_seed(previewed, tmp_path):
    talks = [{"persona": "P", "messages": [*TALK[:3], {**TALK[3], "content": f"Walk {i}."}]} for i in range(9)]
    path = jsonl(tmp_path / "rows.jsonl", *talks)
    assert "\nsample            4 of 18 examples" in previewed(path, "--sample", 3)
    seeds = (previewed(path, "--sample", 1, "--rows", 1, "--seed", seed) for seed in (1, 1, 2))
    drawn = [printed.partition("\nrows.jsonl:")[2] for printed in seeds]
    assert drawn[0] == drawn[1] != drawn[2]
    printed = previewed(path, "--sample", 3, "--streaming", "true", "--rows", 0)
    assert "rows.jsonl, the first 3 examples of each split" in printed and cells(printed, "train")[2:4] == ["2", "3"]
    assert "without the persona" not in printed


@pytest.mark.parametrize("format", ["msc", "personamem", "prism", "aloe"])
def test_formats_with_histories_and_second_files(previewed, tmp_path, format):
    printed = previewed(documented_files(tmp_path, format))
    assert f"{format}: " in printed and "⟦persona: " in printed and "⟦response: " in printed


def test_rows_of_no_format_get_their_lines(previewed, tmp_path):
    with pytest.raises(UserError) as caught:
        previewed(jsonl(tmp_path / "rows.jsonl", {"bio": "p", "query": "q", "response": "r"}))
    assert "all 1 rows skipped; the first: " in caught.value.args[0] and "--columns persona=bio" in caught.value.args[2]
    with pytest.raises(UserError, match=r"--split test: .* has no such split; it has train"):
        previewed(jsonl(tmp_path / "rows.jsonl", GOOD), "--split", "test")
