"""The builder of pairs for a format."""

import pytest

from perce import DataConfig, LossConfig, UserError
from perce.data.pairing import PairSource, make_builder
from perce.data.rows import load_examples
from tests.helpers.pairs import TOKENIZERS
from tests.helpers.tiny import write_jsonl


def test_only_histories_are_cut_to_retrieve_k():
    tokenizer, config = TOKENIZERS["chatml"], DataConfig(retrieve_k=2)
    assert make_builder(tokenizer, config, "longlamp").retriever.k == 2
    assert make_builder(tokenizer, config, "lamp").retriever.k == 2
    assert make_builder(tokenizer, config, "convai2").retriever is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("persona_markers", "<p>...</p>"), ("retriever", "recency"), ("retrieve_k", 2), ("share", "none"),
        ("chat_template_kwargs", '{"x": 1}'), ("prompt", '{"header": "Facts:"}'),
    ],
)  # fmt: skip
def test_documents_have_no_persona_that_options_could_change(name, value):
    for objective in ("longce", "ce"):
        with pytest.raises(UserError, match=f"^{name}: expected .* for documents, got "):
            make_builder(TOKENIZERS["chatml"], DataConfig(**{name: value}), "text", LossConfig(objective))


@pytest.mark.parametrize("name", ["short_context", "short_stride"])
def test_personas_have_no_short_context(name):
    for objective in ("perce", "ce"):
        with pytest.raises(UserError, match=f"^{name}: expected .* for rows with a persona, got 8"):
            make_builder(TOKENIZERS["chatml"], DataConfig(), "perce", LossConfig(objective, **{name: 8}))


@pytest.mark.parametrize(("format", "row"), [
    ("perce", {"persona": "I keep bees.", "query": "Tonight? " * 50, "response": "No."}), ("text", {"text": "a"}),
])  # fmt: skip
def test_who_skips_rows_is_not_told_to_skip_them(tmp_path, format, row):
    examples = load_examples(write_jsonl(tmp_path / "rows.jsonl", [row]), "train")
    tokenizer = TOKENIZERS["chatml"]
    tokenizer.eos_token, before = None if format == "text" else tokenizer.eos_token, tokenizer.eos_token
    loss = LossConfig(objective="ce")
    builder = make_builder(tokenizer, DataConfig(max_length=60), format, loss)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .* --skip_bad_rows leaves such rows out\.$"):
        PairSource(examples, builder, False).build(0, examples.all[0])
    source = PairSource(examples, builder, True)
    assert source.build(0, examples.all[0]) == []
    for told in (*source.notes(), source.nothing_left()):
        assert "rows.jsonl:1: " in told and "skip_bad_rows" not in told
    tokenizer.eos_token = before


def test_what_is_left_out_is_of_what_is_asked(tmp_path):
    rows = [{"persona": "I bake.", "query": "Hi?", "response": response} for response in ("Hello.", "No. " * 200, "")]
    examples = load_examples(write_jsonl(tmp_path / "rows.jsonl", rows), "train", skip_bad_rows=True)
    builder = make_builder(TOKENIZERS["chatml"], DataConfig(max_length=150), "perce")
    for prefix in ("training: ", ""):
        source = PairSource(examples, builder, True, prefix)
        pairs = [pair for example in examples for pair in source.built(example)]
        bad, unfit = source.notes()
        assert len(pairs) == 1 and bad.startswith("1 rows skipped; the first: ") and "rows.jsonl:3: field" in bad
        assert unfit.startswith(f"{prefix}1 examples skipped, the first: rows.jsonl:2: query and response take")
