"""Retrieval: the passages that fit a request, best first, and the latest if none fits better than others."""

import os
import subprocess
import sys
import unicodedata
from itertools import islice

import numpy as np
import pytest
from transformers import AutoTokenizer

from perce import DataConfig, LossConfig, PerceArguments, PerceTrainer, UserError, pick_passages, prompt_ids
from perce.data.dataset import rows_dataset_pairs
from perce.data.retrieval import QUERIES, Retriever, bm25_scores, indexed_text, query_of
from perce.data.splits import load_pairs
from perce.reading.fields import PASSAGES, passage_text
from perce.train import main
from tests.helpers import ROOT
from tests.helpers.histories import HISTORY, TOKENIZER, TWEET, history, picks, row, shown
from tests.helpers.pages import Page
from tests.helpers.tiny import save_tiny_model, tiny_model, write_jsonl

# ---- queries and indexed text

REQUESTS = {
    "Amazon reviews": ('Write a review with the rating 5.0 and the title "A "good" veil".', 'A "good" veil'),
    "LongLaMP abstracts": (
        'Generate an abstract for the title "On "Deep" Bees" using the following items: 1. hives 2. "honey"',
        '1. hives 2. "honey"',
    ),
    "LongLaMP reviews": (
        'Generate the review text written by a reviewer who has a given an overall rating of "5.0" for a product with '
        'description "A 12" pan". The summary of the review text is "Sturdy".',
        'A 12" pan Sturdy',
    ),
    "LongLaMP topics": ("Generate the content for a reddit post My first\nhive", "My first\nhive"),
    "LaMP-1": (
        'For an author who has written the paper with the title "Bees", which reference is related? Just answer with '
        '[1] or [2] without explanation. [1]: "Wasps" [2]: "Honey: a study"',
        "Wasps Honey: a study",
    ),
    "LaMP-2": (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        "explanation. tags: [sci-fi, comedy] description: A bee. Job description: drone.",
        "A bee. Job description: drone.",
    ),
    "LaMP-2N": (
        "Which category does this article relate to among the following categories? Just answer with the category name "
        "without further explanation. categories: [travel, crime] article: Bees stolen.",
        "Bees stolen.",
    ),
    "LaMP-3": (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: Fine honey.",
        "Fine honey.",
    ),
    "LaMP-4": ("Generate a headline for the following article: Bees stolen.", "Bees stolen."),
    "LaMP-5": ("Generate a title for the following abstract of a paper: We keep bees.", "We keep bees."),
    "LaMP-6": ("Generate a subject for the following email: Dear all, bees.", "Dear all, bees."),
    "LaMP-7": (f"{TWEET}I miss: bees", "I miss: bees"),
}


@pytest.mark.parametrize("task", QUERIES)
def test_the_query_is_the_part_that_the_request_is_about(task):
    request, query = REQUESTS[task]
    assert query_of(request) == query


def test_an_unknown_wording_is_the_query_as_a_whole():
    assert query_of("Write about bees: now") == "Write about bees: now"


@pytest.mark.parametrize("parts", [parts for _, parts in PASSAGES], ids=[kind for kind, _ in PASSAGES])
def test_labels_ratings_tags_and_categories_are_not_searched(parts):
    entry = {field: f"{field} Review: x\nof two lines" for _, field in parts}
    left_out = {"overall", "rating", "score", "tag", "category"}
    entry |= {field: "5.0" for field in left_out & entry.keys()}
    expected = "\n".join(entry[field] for _, field in parts if field not in left_out)
    passage = passage_text(entry, "profile[0]")
    assert passage != expected and indexed_text(passage) == expected


# ---- ranking


@pytest.mark.parametrize(
    ("retriever", "expected"), [("bm25", [3, 1, 0, 2]), ("recency", [0, 1, 2, 3])], ids=["bm25", "recency"]
)
def test_best_first(retriever, expected):
    assert picks(f"{TWEET}bees and honey", retriever=retriever) == expected
    assert picks(f"{TWEET}bees and honey", retriever=retriever, retrieve_k=1) == expected[:1]


def test_the_instruction_is_not_searched():
    passages = ("Bees again.", "A tweet following any explanation: paraphrase it before or after.")
    assert picks(f"{TWEET}bees", *passages) == [0, 1]


def test_rare_words_count_more_than_frequent_ones():
    assert picks("bees honey", "bees near", "bees far", "some honey") == [2, 0, 1]


@pytest.mark.parametrize(
    "request_", ["ein ganz anderes Thema", "🐝🐝", "the of and"], ids=["paraphrase", "emoji", "stop"]
)
def test_without_a_word_in_common_the_latest_are_taken(request_):
    assert picks(request_) == [0, 1, 2, 3]


def test_equal_passages_stay_in_order():
    assert picks("bees", "Rain.", *["My bees, all of them."] * 5) == [1, 2, 3, 4]


def test_scores_that_differ_by_rounding_alone_are_equal():
    retriever = Retriever(lambda query, passages: np.float32([0.3, 0.4, 0.4 + 1e-7, 0.4 + 1e-4]), 4, "", "")
    assert retriever(history("bees", *"abcd")) == [3, 1, 2, 0]


def test_passages_without_words():
    assert picks("bees", "🐝", "…", "!") == [0, 1, 2]
    assert picks("bees", "🐝", "…", "bees") == [2, 0, 1]


def test_a_short_history_is_shown_whole_and_ranked():
    assert picks("honey", *HISTORY[2:4], retrieve_k=9) == [1, 0]
    assert picks("honey", HISTORY[0], retrieve_k=9) == [0]


@pytest.mark.parametrize(
    ("query", "passage"),
    [
        ("STRASSE", "In der Straße."),
        (unicodedata.normalize("NFD", "café"), unicodedata.normalize("NFC", "Am Café")),
        ("蜂蜜", "今天的蜂蜜很好"),
        ("пчёлы", "Мои Пчёлы летают"),
        ("मधु", "मधु मीठा"),
        ("ชอบผึ้งไหม", "เมื่อวานผมเลี้ยงผึ้งที่บ้าน"),
        ("ชา", "กาแฟ ชา"),
        ("သစ်ပင်များ", "ကျွန်တော်သစ်ပင်စိုက်တယ်"),
        ("អ្នកចូលចិត្តឃ្មុំទេ", "ខ្ញុំចិញ្ចឹមឃ្មុំ"),
    ],
)
def test_words_of_any_script_match(query, passage):
    assert bm25_scores(query, ["Rain.", passage])[1] > 0 == bm25_scores(query, ["Rain.", passage])[0]


def test_vowel_signs_belong_to_their_word():
    assert bm25_scores("मधु", ["मध", "मधु"])[1] > 0 == bm25_scores("मधु", ["मध", "मधु"])[0]


def test_picks_do_not_depend_on_the_hash_seed():
    code = (
        "from perce.data.retrieval import bm25_scores; "
        "print(bm25_scores('some new bees and honey, five miles in the rain', "
        f"{[f'{a} {b}' for a in HISTORY for b in HISTORY]!r}).tolist())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT,
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert printed[0] == printed[1] and "0.56" in printed[0]


# ---- from rows to pairs

ROW = row(f"{TWEET}My bees make honey", "bees! honey!", ["Honey from the bees!", *"abcdef", "Rain again."])


def test_the_prompt_shows_the_best_first_and_the_request_unchanged():
    pairs = rows_dataset_pairs([ROW], "rows", TOKENIZER, DataConfig())
    assert pairs["passages"] == [[7, 0, 1, 2]], "the oldest entry is the last"
    assert shown(pairs).index("Honey") < shown(pairs).index("Rain") and "- c\n" not in shown(pairs)
    assert ROW["input"] in TOKENIZER.decode(pairs["input_ids"][0])


def test_the_target_in_its_own_profile_is_never_picked():
    leaking = row(ROW["input"], ROW["output"], ["Rain.", " - Bees... HONEY", "Sun."])
    assert "HONEY" not in shown(rows_dataset_pairs([leaking], "rows", TOKENIZER, DataConfig()))
    kept = row(ROW["input"], ROW["output"], ["Rain.", "bees, honey, more", "Sun."])
    assert "honey" in shown(rows_dataset_pairs([kept], "rows", TOKENIZER, DataConfig()))


def test_trimming_drops_the_worst_ranked():
    whole = rows_dataset_pairs([ROW], "rows", TOKENIZER, DataConfig())
    shorter = DataConfig(max_length=len(whole["input_ids"][0]) - 1)
    pairs = rows_dataset_pairs([ROW], "rows", TOKENIZER, shorter)
    assert pairs["passages"] == [[7, 0, 1]] and pairs["dropped_passages"] == [1]


def test_none_keeps_everything_the_latest_first():
    pairs = rows_dataset_pairs([ROW], "rows", TOKENIZER, DataConfig(retriever="none"))
    assert pairs["passages"] == [list(range(8))] and shown(pairs).index("Rain") < shown(pairs).index("Honey")


def test_a_persona_is_no_history():
    facts = {"persona": list("abcdef"), "query": "Which is f?", "response": "f"}
    assert rows_dataset_pairs([facts], "rows", TOKENIZER, DataConfig())["passages"] == [list(range(6))]


def test_a_stream_picks_as_the_cache_does(tmp_path):
    rows = [row(f"{TWEET}word{i}", f"reply {i}", [f"word{j} of {i}" for j in range(9)]) for i in range(8)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    runs = [
        load_pairs(
            DataConfig(str(tmp_path), streaming=streaming),
            TOKENIZER,
            eval_examples=0,
            eval_tokens=None,
            seed=0,
            validation_seed=0,
            loss=LossConfig(),
        )
        for streaming in (False, True)
    ]
    cached, streamed = (
        {pair["example"]: pair["passages"] for pair in islice(run.train, len(rows))} for run in runs
    )  # a stream does not end
    assert cached == streamed and cached[3][0] == 5, "word3 is the sixth entry from the end"
    assert all("persona: 4 passages of each history, by bm25" in run.notes for run in runs)


def test_the_trainers_rows_are_retrieved(tmp_path):
    def passages(data):
        args = PerceArguments(str(tmp_path), use_cpu=True, report_to="none", data=data)
        trainer = PerceTrainer(tiny_model(), args, processing_class=TOKENIZER, train_dataset=[ROW], eval_dataset=[ROW])
        return trainer.train_dataset["passages"], trainer.eval_dataset["passages"]

    assert passages(DataConfig(retriever="bm25", retrieve_k=1)) == ([[7]], [[7]])
    assert passages(DataConfig(retriever="recency", retrieve_k=1)) == ([[0]], [[0]])


# ---- command line


def test_a_run_retrieves_and_its_report_shows_what_was_picked(tmp_path, capsys):
    rows = [ROW | {"id": str(i)} for i in range(4)]
    argv = ["--model", str(save_tiny_model(tmp_path / "model")), "--data", str(write_jsonl(tmp_path / "a.jsonl", rows))]
    run = tmp_path / "run"
    argv += ["--output_dir", str(run), "--max_steps", "1", "--precision", "fp32", "--retrieve-k", "1"]
    assert main(argv) == 0
    assert "persona: 1 passages of each history, by bm25" in capsys.readouterr().out
    report = Page(run / "report.html").words()
    assert "Honey from the bees!" in report and "Rain again." not in report
    assert "retriever: bm25" in (run / "config.yaml").read_text(encoding="utf-8")
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "`perce.pick_passages(history, request, retriever='bm25', k=1)`" in card


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--retriever", "tfidf"], ["retriever", "bm25, dense, recency, none", "tfidf"]),
        (["--retrieve_k", "0"], ["retrieve_k", ">= 1"]),
        (["--retriever_model", "some/encoder"], ["retriever_model", "--retriever dense", "--retriever bm25"]),
        (
            ["--retriever", "dense", "--retriever_model", "./nowhere"],
            ["--retriever_model ./nowhere", "no such directory", "--retriever bm25 needs no model"],
        ),
        (["--retriever", "dense"], ["--retriever_model facebook/contriever", "cannot reach the Hub (no net)", "bm25"]),
    ],
    ids=["unknown retriever", "k", "model without dense", "no directory", "no Hub"],
)
def test_mistakes(flags, fragments, tmp_path, capsys, monkeypatch):
    rows = [ROW | {"id": str(i)} for i in range(2)]
    model, data = str(save_tiny_model(tmp_path / "model")), str(write_jsonl(tmp_path / "a.jsonl", rows))
    load = AutoTokenizer.from_pretrained

    def offline(path, **options):
        if path == "facebook/contriever":
            raise OSError("We couldn't connect to 'https://huggingface.co'")
        return load(path, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    monkeypatch.setattr("perce.hub.hub_failure", lambda: "no net")
    capsys.readouterr()
    assert main(["--model", model, "--data", data, "--output_dir", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for fragment in fragments:
        assert fragment in error, f"{fragment!r} not in {error!r}"


@pytest.mark.parametrize(("retriever", "k"), [("bm25", 2), ("recency", 3), ("none", 4)])
def test_what_a_server_shows_is_what_training_shows(retriever, k):
    (pair,) = rows_dataset_pairs([ROW], "rows", TOKENIZER, DataConfig(retriever=retriever, retrieve_k=k))
    told = pick_passages(ROW["profile"], ROW["input"], retriever=retriever, k=k)
    assert prompt_ids(TOKENIZER, told, ROW["input"]) == pair["input_ids"][: -pair["response_length"]]


def test_a_server_has_texts_or_nothing_to_pick_from():
    assert pick_passages([], "Hi") == []
    assert pick_passages(["I keep bees.", "I bake."], "bees?", k=1) == ["I keep bees."]
    assert pick_passages("I keep bees.", "Hi", k=1) == ["I keep bees."], "one passage, not its characters"
    for wrong, request, message in (
        (["a", "b", {"a": 1}], "Hi", r"history\[2\]"), ([" "], "Hi", "history': expected at least one entry"),
        (None, "Hi", "history: expected a text or a list of texts"), (["a"], None, "request: expected a text"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            pick_passages(wrong, request)
    for name in ("word2vec", "Bm25"):
        with pytest.raises(UserError, match=f"retriever: expected bm25, dense, recency or none, got '{name}'"):
            pick_passages(["a"] * 3, "Hi", retriever=name)


def test_a_server_loads_an_encoder_once(monkeypatch):
    loaded = []
    monkeypatch.setattr("perce.data.encoder.Encoder", lambda name: loaded.append(name) or Stub())
    for request in ("bees", "hives"):
        assert pick_passages(["a", "b"], request, retriever="dense", k=1) == ["b"]
    assert loaded == ["facebook/contriever"]


class Stub:
    name = identity = "stub"

    def scores(self, query, passages):
        return np.arange(len(passages))[::-1]
