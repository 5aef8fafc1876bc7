"""The datasets that a trainer is given: what becomes of them, and what is refused."""

import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from perce import LossConfig, MemoryConfig, PerceTrainer, UserError
from perce.model.patch import prepare_model
from perce.training.datasets import check_context
from tests.helpers.architectures import CONFIGS
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.trainers import PAIRS, arguments, model_for, trainer_for

DETACHED = MemoryConfig(persona_grad="none")
DOCUMENT = {"input_ids": [5, 6, 7, 8], "response_length": 3, "personal": [False] * 3, "windows": [[0, 4, 3]]}


def test_a_context_beyond_the_models_positions_is_found_before_training(tmp_path):
    longest = max(len(pair["input_ids"]) for pair in PAIRS)
    trainer_for(prepare_model(tiny_model(max_position_embeddings=longest)), arguments(tmp_path))
    with pytest.raises(UserError, match=rf"train_dataset: .*{longest} tokens.* {longest - 1} positions"):
        trainer_for(prepare_model(tiny_model(max_position_embeddings=longest - 1)), arguments(tmp_path))
    stream, config = IterableDataset.from_generator(lambda: iter(PAIRS)), tiny_model().config
    check_context(stream, "train_dataset", config, MemoryConfig(), 8192)
    with pytest.raises(UserError, match=r"8193 tokens.* 8192 positions"):
        check_context(stream, "train_dataset", config, MemoryConfig(), 8193)


@pytest.mark.parametrize(
    ("architecture", "attention", "length", "refused"),
    [
        ("gemma3", "sdpa", 29_400, True), ("gemma3", "sdpa", 29_200, False), ("llama", "sdpa", 100_000, False),
        ("llama", "eager", 16_500, True), ("llama", "eager", 16_300, False),
        ("gemma3", "flex_attention", 99_999, False),
    ],
)  # fmt: skip
def test_attention_over_all_pairs_of_tokens_is_refused_by_name(architecture, attention, length, refused):
    config = tiny_model(architecture, max_position_embeddings=100_000).config
    config._attn_implementation = attention
    pairs = Dataset.from_list([{"input_ids": [0] * length}])
    check_context(pairs, "train_dataset", config, DETACHED, 0)
    if refused:
        with pytest.raises(UserError, match=rf"{length} × {length}.*--persona_grad none"):
            check_context(pairs, "train_dataset", config, MemoryConfig(), 0)
    else:
        check_context(pairs, "train_dataset", config, MemoryConfig(), 0)


def test_a_token_without_an_embedding_is_found_before_training(tmp_path):
    pairs = [{**PAIRS[0], "input_ids": [*PAIRS[0]["input_ids"][:-1], 400]}]
    with pytest.raises(UserError, match=r"train_dataset: token id 400 .* vocabulary of 400"):
        trainer_for(model_for("full"), arguments(tmp_path), pairs=pairs)
    trainer = trainer_for(model_for("full"), arguments(tmp_path))
    for dataset in (pairs, Dataset.from_list(pairs), {"one": pairs}):
        with pytest.raises(UserError, match=r"eval_dataset.*: token id 400 .* vocabulary of 400"):
            trainer.evaluate(dataset)


def test_rows_that_were_filtered_out_are_not_judged(tmp_path):
    too_large = {**PAIRS[0], "input_ids": [*PAIRS[0]["input_ids"][:-1], 400]}
    dataset = Dataset.from_list([*PAIRS[:4], too_large])
    with pytest.raises(UserError, match="token id 400"):
        trainer_for(model_for("full"), arguments(tmp_path)).evaluate(dataset)
    kept = dataset.filter(lambda pair: max(pair["input_ids"]) < 400)
    assert trainer_for(model_for("full"), arguments(tmp_path)).evaluate(kept)["eval_loss"] > 0


@pytest.mark.parametrize(
    ("name", "dataset", "fragments"),
    [
        ("train_dataset", [], "at least one example"),
        ("train_dataset", Dataset.from_list(PAIRS[:1]).select([]), "at least one example"),
        ("train_dataset", DatasetDict(train=Dataset.from_list(PAIRS)), r"DatasetDict.*train_dataset\['train'\]"),
        ("train_dataset", "rows.jsonl", "got str.*load_examples"), ("train_dataset", 3, "got int"),
        ("eval_dataset", [], "at least one example"), ("eval_dataset", {"mine": []}, "at least one example"),
        ("eval_dataset", {}, "at least one"), ("eval_dataset", 3, "got int"),
    ],
)  # fmt: skip
def test_a_dataset_that_is_none_is_refused_by_its_argument(tmp_path, name, dataset, fragments):
    datasets = {"train_dataset": Dataset.from_list(PAIRS)} | {name: dataset}
    with pytest.raises(UserError, match=rf"{name}.*expected.*{fragments}"):
        PerceTrainer(model_for("full"), arguments(tmp_path), processing_class=tiny_tokenizer(), **datasets)


def test_the_dataset_of_one_evaluation_is_checked_too(tmp_path):
    with pytest.raises(UserError, match=r"eval_dataset: expected at least one example"):
        trainer_for(model_for("full"), arguments(tmp_path)).evaluate([])


@pytest.mark.parametrize("architecture", sorted({"mamba", "dots3_note_text"} & CONFIGS.keys()))
def test_scores_of_all_pairs_are_looked_for_in_attention_alone(architecture):
    """A recurrent model has no heads, and another model has different numbers of them in its layers."""
    config = CONFIGS[architecture]()
    config._attn_implementation = "eager"
    check_context(Dataset.from_list([{"input_ids": [1] * 40_000}]), "train_dataset", config, MemoryConfig(), 2**20)


@pytest.mark.parametrize("made", [list, Dataset.from_list], ids=["list", "dataset"])
@pytest.mark.parametrize("memory", [DETACHED, MemoryConfig(branches_per_forward=1), MemoryConfig(share_persona=2)])
def test_documents_have_no_persona_that_runs_by_itself(tmp_path, memory, made):
    args = arguments(tmp_path, loss=LossConfig(objective="ce"), memory=memory)
    with pytest.raises(UserError, match=r"train_dataset: .* needs rows with a persona, and these are documents"):
        PerceTrainer(model_for("full"), args, made([DOCUMENT] * 4), processing_class=tiny_tokenizer())


@pytest.mark.parametrize("made", [list, Dataset.from_list], ids=["list", "dataset"])
def test_documents_and_dialogues_are_not_mixed(tmp_path, made):
    args = arguments(tmp_path, loss=LossConfig(objective="ce"))
    with pytest.raises(UserError, match="train_dataset: has documents as well as examples with a persona"):
        PerceTrainer(model_for("full"), args, made([PAIRS[0], DOCUMENT]), processing_class=tiny_tokenizer())


def test_a_list_of_pairs_is_trained_on_by_its_own_columns(tmp_path):
    """Some pairs lack what a pair need not have, and some have more, of several types."""
    pairs: list = [dict(pair) for pair in PAIRS[:8]]
    for place, pair in enumerate(pairs):
        pair["note"] = [3, "x", object()][place % 3]
        for name in ("example", "data_weight", "conversation", "persona") if place % 2 else ():
            pair.pop(name, None)
    trainers = [
        PerceTrainer(model_for("full"), arguments(tmp_path, max_steps=2), made, processing_class=tiny_tokenizer())
        for made in (pairs, Dataset.from_list(PAIRS[:8]))
    ]
    for trainer in trainers:
        trainer.train()
    assert len({trainer.state.log_history[1]["loss"] for trainer in trainers}) == 1


def test_pairs_whose_columns_are_not_known_are_pairs(tmp_path):
    stream = Dataset.from_list(PAIRS[:4]).to_iterable_dataset().map(lambda pair: pair)
    assert stream.column_names is None
    args = arguments(tmp_path, max_steps=1)
    trainer = PerceTrainer(model_for("full"), args, stream, processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_table_of_another_library_is_no_dataset(tmp_path):
    frame = pandas.DataFrame({"persona": ["I keep bees."], "query": ["Tonight?"], "response": ["No."]})
    with pytest.raises(UserError, match=r"train_dataset: expected a Dataset or a list of rows, got DataFrame"):
        PerceTrainer(model_for("full"), arguments(tmp_path), frame, processing_class=tiny_tokenizer())


def test_a_name_is_of_a_dataset_that_the_trainer_has(tmp_path):
    with pytest.raises(UserError, match=r"^eval_dataset: expected a Dataset or a list .*, got str"):
        trainer_for(model_for(), arguments(tmp_path), eval_dataset="rows.jsonl")
    trainer = trainer_for(model_for(), arguments(tmp_path), eval_dataset={"short": PAIRS[:2], "other": PAIRS[2:4]})
    assert trainer.evaluate("short")["eval_loss"] == trainer.evaluate(PAIRS[:2])["eval_loss"]


def test_training_rows_that_all_lack_a_persona_are_refused(tmp_path):
    none = [{**pair, "persona_span": (3, 3)} for pair in PAIRS[:3]]
    with pytest.raises(UserError, match="train_dataset: no example has a persona, so the PIR of every token is 0"):
        trainer_for(model_for("full"), arguments(tmp_path), pairs=none)
    for pairs, loss in ((none, LossConfig(objective="ce")), ([PAIRS[3], *none], LossConfig())):
        trainer = trainer_for(model_for("full"), arguments(tmp_path, loss=loss), pairs=pairs, eval_dataset=none)
        assert trainer.evaluate()["eval_pir_mean"] == pytest.approx(0, abs=1e-5)


def test_training_rows_of_which_none_quotes_its_persona_are_refused_if_weights_come_from_that(tmp_path):
    plain = [{**pair, "personal": [False] * pair["response_length"]} for pair in PAIRS[:3]]
    quoting = [*plain[:2], {**plain[2], "personal": [True] * plain[2]["response_length"]}]
    loss = LossConfig(objective="wordmatch")
    with pytest.raises(
        UserError, match="no reply quotes its persona, so objective wordmatch weighs all tokens the same"
    ):
        trainer_for(model_for("full"), arguments(tmp_path, loss=loss), pairs=plain)
    trainer_for(model_for("full"), arguments(tmp_path, loss=loss), pairs=quoting)
    trainer_for(model_for("full"), arguments(tmp_path), pairs=plain)
