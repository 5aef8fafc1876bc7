"""Pairs on disk: the cache's key contains everything that they depend on, including the version of the code."""

import errno
import hashlib
import json
import tracemalloc
from types import SimpleNamespace

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perce import DataConfig, LossConfig, UserError
from perce.config.commands import TrainOptions
from perce.data import dataset
from perce.data.dataset import pair_dataset
from perce.data.pairing import make_builder
from perce.data.pairs import PairBuilder
from perce.data.retrieval import Retriever, recency_scores
from perce.data.rows import Document, Example, Examples
from perce.reading.fields import Turn
from perce.reading.sources import Source
from perce.training.arguments import fit_batch
from tests.helpers.pairs import builder, example
from tests.helpers.tiny import CHATML, GEMMA, QWEN3, demo_examples


def test_pairs_are_cached_and_equal(monkeypatch):
    examples = demo_examples(6)
    first = pair_dataset(examples, builder())
    monkeypatch.setattr(PairBuilder, "build", lambda *_: pytest.fail("built again"))
    assert pair_dataset(examples, builder())[:] == first[:]
    assert first["example"] == list(range(6))


def test_the_cache_sees_a_changed_limit_template_and_text():
    examples = demo_examples(6)
    whole = pair_dataset(examples, builder())
    variants = [
        whole,
        pair_dataset(examples, builder(max_length=max(map(len, whole["input_ids"])) - 1)),
        pair_dataset(examples, builder(template="llama3")),
        pair_dataset(examples, builder(retriever=Retriever(recency_scores, 1, "", ""))),
        pair_dataset(examples[1:], builder()),
    ]
    assert len({json.dumps(variant[:]) for variant in variants}) == 5


def test_an_example_that_does_not_fit_stops_or_is_left_out():
    examples = [*demo_examples(2), example(response="word " * 500)]
    with pytest.raises(UserError, match=r"train\.jsonl:3"):
        pair_dataset(examples, builder(max_length=600))
    assert pair_dataset(examples, builder(max_length=600), skip_bad_rows=True)["example"] == [0, 1]


GOLDEN = {
    1: "8c1fe31ba050742c",
    2: "ac781f2abbb1a4c9",
    3: "ac781f2abbb1a4c9",
    4: "c0d2a5d8814a33d0",
    5: "362b5d7ae8b1deff",
    6: "af2797484704d547",
    7: "1540645fa22c3f4b",
    8: "1540645fa22c3f4b",  # other scripts and possessives are not among these pairs
    9: "814ce8141a20a93c",  # whether a reply is copied
    10: "814ce8141a20a93c",  # earlier thoughts behind a blank are not among these pairs
}
"""PAIRS_VERSION → digest of the pairs below. A new digest needs a new version: old pairs may be on disks."""


def byte_tokenizer(template=CHATML, prepends_space=False):
    """One id per byte, so that the pairs depend on nothing except our own code."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prepends_space)
    tokenizer.add_special_tokens(["<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def test_other_pairs_have_another_version():
    tokenizer = byte_tokenizer()
    talk = tuple(Turn(role, text) for role, text in (("user", "Hi!"), ("assistant", "Hello."), ("user", "Plans?")))
    examples = [
        Example(("I keep bees.", " I run. "), talk, " The bees, then a run!", "ana", None, "a:1"),
        Example(("I bake.",), talk[:1], "Bread.", None, ((0, 5),), "a:2"),
        Example(("I bake. ", "I sing."), talk[1:], "Bread, and a song.", None, None, "a:3"),  # a reply comes first
    ]
    entry = {"title": "Bees", "abstract": "Bees are few.", "id": "1"}
    profile = [entry, {"title": "Rain", "abstract": "Rain falls."}, {"title": "Dance", "abstract": "How bees dance."}]
    row = {
        "name": "Ana",
        "input": 'Generate an abstract for the title "Bees" using the following items: rain falls',
        "output": "Many bees.",
        "profile": profile,
    }
    histories = Examples(Source("h", "h", lambda: iter([(":1", row)]))).all
    tokenizers = [tokenizer, *map(byte_tokenizer, (None, GEMMA, QWEN3)), byte_tokenizer(prepends_space=True)]
    made = [builder_of(each, "perce").build(example) for each in tokenizers for example in examples]
    made.append(
        builder_of(tokenizer, "perce", max_length=len(made[0].input_ids) - 1).build(examples[0])
    )  # one entry less
    for retriever, k in (("bm25", 1), ("recency", 1), ("none", 4)):
        made += builder_of(tokenizer, "longlamp", retriever=retriever, retrieve_k=k).pairs(histories[0])
    made += builder_of(tokenizer, "text", max_length=24).pairs(
        Document("Bees are few, and bees are many.", None, "t:1")
    )
    digest = hashlib.sha256(json.dumps([vars(pair) for pair in made]).encode()).hexdigest()[:16]
    assert GOLDEN[dataset.PAIRS_VERSION] == digest, "raise PAIRS_VERSION, and note the new digest under it"


def builder_of(tokenizer, format, **options):
    short = {"short_context": 8, "short_stride": 4} if format == "text" else {}
    loss = LossConfig(objective="ce", **short)
    return make_builder(tokenizer, DataConfig(**options), format, loss)


def test_the_version_is_part_of_the_caches_key(monkeypatch):
    before = dataset._fingerprint(demo_examples(1), builder(), False)
    monkeypatch.setattr(dataset, "PAIRS_VERSION", dataset.PAIRS_VERSION + 1)
    assert dataset._fingerprint(demo_examples(1), builder(), False) != before


@pytest.mark.parametrize(("name", "value"), [("pad_token", "!"), ("split_special_tokens", True)])
def test_what_else_ids_depend_on_is_part_of_the_caches_key(name, value):
    tokenizer = byte_tokenizer("{{ pad_token }}" + CHATML)
    tokenizer.pad_token = "?"
    before = pair_dataset(demo_examples(1), PairBuilder(tokenizer, max_length=2000))
    setattr(tokenizer, name, value)
    own = PairBuilder(tokenizer, max_length=2000)
    assert pair_dataset(demo_examples(1), own)["input_ids"][0] == own.build(demo_examples(1)[0]).input_ids
    assert own.build(demo_examples(1)[0]).input_ids != before["input_ids"][0]


@pytest.mark.parametrize("of", ["fingerprint", "longest", "digest"])
def test_no_copy_of_all_texts_or_ids_is_made(of):
    """For 2 MB of texts, and for 400,000 ids, which would take 14 MB as Python integers."""
    text = "bees " * 2000
    examples = [example(response=f"{text}{number}") for number in range(200)]
    columns = {
        "input_ids": [[1000 + i for i in range(2000)]], "response_length": [9], "personal": [[True] * 9],
        "example": [0], "persona_span": [[1, 2]], "passages": [[0]], "dropped_passages": [0], "copied": [False],
        "conversation": [0], "persona": [0], "data_weight": [1.0],
    }  # fmt: skip
    columns = {name: values * 200 for name, values in columns.items()}
    pairs = datasets.Dataset.from_dict(columns, features=dataset.FEATURES[PairBuilder])
    config, args = TrainOptions(), SimpleNamespace(device=SimpleNamespace(type="cpu"))
    run = {
        "fingerprint": lambda: dataset._fingerprint(examples, own, False),
        "longest": lambda: fit_batch(config, args, pairs),
        "digest": lambda: dataset.pairs_digest(pairs),
    }[of]
    own = builder()
    run()
    tracemalloc.start()
    try:
        run()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_cache_tells_apart_texts_that_are_cut_elsewhere():
    cuts = [("a", "b c"), ("a b", "c"), ("a b c",), ("", "a b c")]
    found = {dataset._fingerprint([example(persona=cut)], builder(), False) for cut in cuts}
    found |= {dataset._fingerprint([example(user_id=name)], builder(), False) for name in (None, "", "None")}
    documents = [Document("a b", None, "t:1"), Document("a", None, "b t:1"), Document("a b", "t:1", "")]
    found |= {dataset._fingerprint([document], builder(), False) for document in documents}
    assert len(found) == len(cuts) + 3 + len(documents)


def test_the_key_of_equal_texts_is_equal():
    """It does not matter whether Python holds equal texts once or several times."""
    one = example(persona=("".join(["ab", "cd"]), "abcd"), response="".join(["ab", "cd"]))
    other = example(persona=("abcd", "abcd"), response="abcd")
    assert dataset._fingerprint([one], builder(), False) == dataset._fingerprint([other], builder(), False)


def test_the_digest_of_pairs_is_that_of_earlier_runs():
    """A run that was stopped under an earlier version is resumed only if the digest is the same."""
    digest = dataset.pairs_digest(pair_dataset(demo_examples(6), PairBuilder(byte_tokenizer(), max_length=2000)))
    assert digest == "e839a894aebf4cb4c299673a7545aa7e"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def truncated(content, place):
    return content[:place]


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped])
@pytest.mark.parametrize("pattern", ["*.arrow", dataset.DIGESTS])
def test_pairs_that_were_damaged_on_the_disk_are_built_again(cache, damage, pattern):
    pairs = pair_dataset(demo_examples(6), builder())[:]
    (file,) = cache.rglob(pattern)
    for share in (0, 0.5, 1):  # at the beginning, in the middle and at the end
        content = file.read_bytes()
        file.write_bytes(damage(content, round(share * (len(content) - 1))))
        assert pair_dataset(demo_examples(6), builder())[:] == pairs
        (file,) = cache.rglob(pattern)


def test_damaged_pairs_that_cannot_be_removed_are_not_used(cache, monkeypatch):
    pair_dataset(demo_examples(6), builder())
    (file,) = cache.rglob("*.arrow")
    file.write_bytes(flipped(file.read_bytes(), file.stat().st_size // 2))

    def fail(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(UserError, match=r"cache.*Permission denied.*HF_DATASETS_CACHE"):
        pair_dataset(demo_examples(6), builder())


def test_whole_pairs_that_others_own_are_read(cache, monkeypatch):
    """The cache of others may be read-only, so that no lock can be taken in it."""
    pairs = pair_dataset(demo_examples(6), builder())[:]

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert pair_dataset(demo_examples(6), builder())[:] == pairs
    with pytest.raises(UserError, match=r"cache.*Permission denied.*HF_DATASETS_CACHE"):
        pair_dataset(demo_examples(5), builder())


def test_pairs_without_a_digest_are_built_again(cache, monkeypatch):
    """A process that is stopped after writing the pairs and before writing their digest leaves such pairs."""
    pair_dataset(demo_examples(2), builder())
    (digests,) = cache.rglob(dataset.DIGESTS)
    digests.unlink()
    built = []
    plain = PairBuilder.build
    monkeypatch.setattr(PairBuilder, "build", lambda self, example: built.append(example) or plain(self, example))
    for _ in range(2):
        pair_dataset(demo_examples(2), builder())
    assert len(built) == 2


def test_a_cache_that_cannot_be_written_is_told_with_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"file/cache.*cannot be written.*HF_DATASETS_CACHE"):
        pair_dataset(demo_examples(2), builder())


def test_a_full_disk_is_told_with_the_cache(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", full)
    with pytest.raises(UserError, match=r"cache.*No space left.*HF_DATASETS_CACHE"):
        pair_dataset(demo_examples(2), builder())
    monkeypatch.undo()
    assert len(pair_dataset(demo_examples(2), builder())) == 2


def test_other_weights_of_the_data_are_other_training_data():
    """A run is not resumed with other weights. Pairs without weights have the same digest as if all weights were 1."""
    pairs = [vars(builder().build(example(data_weight=weight))) for weight in (1.0, 1.0)]
    plain, heavy = ([{**pair, "data_weight": weight} for pair in pairs] for weight in (1.0, 2.0))
    without = [{name: value for name, value in pair.items() if name != "data_weight"} for pair in pairs]
    digests = [dataset.pairs_digest(datasets.Dataset.from_list(rows)) for rows in (plain, without, heavy)]
    assert digests[0] == digests[1] != digests[2]


def test_which_tokens_are_personal_is_training_data_if_weights_depend_on_it():
    pair = vars(builder().build(example()))
    rows = ([{**pair, "personal": [flag] * pair["response_length"]}] for flag in (False, True))
    plain, other = map(datasets.Dataset.from_list, rows)
    assert dataset.pairs_digest(plain) == dataset.pairs_digest(other)
    assert dataset.pairs_digest(plain, personal=True) != dataset.pairs_digest(other, personal=True)


def test_rows_with_arrays_are_read_as_rows_with_lists():
    """pandas has an array for each list of a Parquet file, and so has a Dataset of another format."""
    talk = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    rows = [{"persona": ["I keep bees.", "I run."], "messages": talk, "user_id": n, "weight": 0.5} for n in range(2)]

    def pairs(given):
        return dataset.rows_dataset_pairs(given, "rows", byte_tokenizer(), DataConfig())[:]

    table, expected = datasets.Dataset.from_list(rows), pairs(rows)
    for name in ("numpy", "torch", "pandas", "arrow"):
        assert pairs(table.with_format(name)) == pairs(table.to_iterable_dataset().with_format(name)) == expected, name
    assert pairs(table.to_pandas().to_dict("records")) == expected
