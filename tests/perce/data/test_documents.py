"""Pieces of documents, and windows, the short contexts of their tokens."""

import pytest

from perce import UserError, load_examples
from perce.data.documents import DocumentBuilder, short_windows
from perce.data.pairs import counterfactual_pieces
from perce.data.rows import Document
from tests.helpers.models import TEXT, TOKENIZER, K, S, documents
from tests.helpers.tiny import write_jsonl


@pytest.mark.parametrize("length", [2, 5, K, K + 1, K + S, K + S + 1, K + 2 * S, K + 2 * S + 3, 99])
def test_windows_predict_every_token_once_from_at_least_the_short_context(length):
    windows = short_windows(length, K, S)
    predicted = [i for _, end, count in windows for i in range(end - count, end)]
    assert predicted == list(range(1, length))
    assert windows[0][0] == 0 and all(end - count - start == K for start, end, count in windows[1:])
    assert all(end - start <= K + S for start, end, _ in windows)


def test_the_windows_are_those_of_the_authors_package():
    """Their loop: windows of K + S tokens every S, the last S predicted, the very last window cut to fit."""
    starts = range(0, 99 - K, S)
    theirs = [(start, min(start + K + S, 99), min(S, 99 - start - K)) for start in starts]
    assert short_windows(99, K, S)[1:] == theirs[1:], "their first predicts from K on; ours from the beginning"


@pytest.mark.parametrize("max_length", [16, 17, 40, 1000])
def test_pieces_of_a_long_document_predict_every_token_once(max_length):
    ids = [*TOKENIZER(TEXT * 3)["input_ids"], TOKENIZER.eos_token_id]
    pairs = DocumentBuilder(TOKENIZER, max_length=max_length, short_context=4, short_stride=2).pairs(
        Document(TEXT * 3, None, "d:1")
    )
    assert [token for pair in pairs for token in pair.input_ids[1:]] == ids[1:]
    assert all(2 <= len(pair.input_ids) <= max_length for pair in pairs)
    assert all(len(pair.personal) == pair.response_length == len(pair.input_ids) - 1 for pair in pairs)


def test_windows_that_miss_a_token_are_caught():
    (pair,) = documents([60])
    pair["windows"] = pair["windows"][:-1]
    with pytest.raises(AssertionError, match="same ids"):
        counterfactual_pieces(pair)


def test_rows_of_text(tmp_path):
    rows = [{"text": "One.", "user_id": 7}, {"text": "Two.", "meta": {}}]
    examples = load_examples(write_jsonl(tmp_path / "a.jsonl", rows), "train").all
    assert examples == [Document("One.", "7", "a.jsonl:1"), Document("Two.", None, "a.jsonl:2")]
    persona = {"text": "t", "persona": "p", "query": "q", "response": "r"}
    assert load_examples(write_jsonl(tmp_path / "b.jsonl", [persona]), "train").format == "perce"
    for row in ({"text": ""}, {"text": 3}, {"text": ["a"]}, {"txt": "a"}):
        with pytest.raises(UserError, match=r"c.jsonl:2.*'text'.*expected"):
            load_examples(write_jsonl(tmp_path / "c.jsonl", [rows[0], row]), "train")
