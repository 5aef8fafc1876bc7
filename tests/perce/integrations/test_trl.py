"""PerCE in TRL's SFTTrainer: the loss and gradients of the formula, TRL's formats and metrics, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset

pytest.importorskip("trl", reason="TRL is not installed: pip install 'perce[trl]' (Python 3.11 and newer)")

from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from perce import UserError
from perce.data.marked import IGNORED, PERSONA
from perce.integrations import trl
from perce.integrations.trl import PerceSFTConfig, PerceSFTTrainer
from tests.helpers.ranks import end_rank, run_ranks
from tests.helpers.sft import (
    CLIP,
    KINDS,
    TOKENIZER,
    assert_same_steps,
    block_of,
    model_for,
    options_for,
    plain_steps,
    rows_of,
    steps_of,
    told,
)  # fmt: skip
from tests.helpers.templates import CHAT_TEMPLATES
from tests.helpers.tiny import GEMMA, MISTRAL_V3, tiny_model, tiny_tokenizer
from tests.helpers.trainers import LORA


def config_for(directory, **options):
    clip = dict(zip(("clip_min", "clip_max"), CLIP, strict=True))
    fixed = {"gradient_checkpointing": False, "max_length": None}
    return PerceSFTConfig(**options_for(directory, **(clip | fixed | options)))


def trainer_for(directory, rows, model=None, tokenizer=TOKENIZER, **options):
    return PerceSFTTrainer(
        model_for() if model is None else model, config_for(directory, **options),
        train_dataset=rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


NAMES = {"assistant": "conversation", "all of a completion": "completion"}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_formula(tmp_path, kind):
    rows = rows_of(NAMES.get(kind, kind))
    trainer = trainer_for(tmp_path, rows, **KINDS[kind])
    assert_same_steps(steps_of(trainer), plain_steps(model_for(), rows, kind))
    assert 0.2 < trainer.state.log_history[0]["frac_at_floor"] < 0.8, "weights that are all the floor show little"


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({"lora": True}, {}),
        ({"architecture": "llama-tied"}, {}),
        ({"architecture": "gemma3"}, {}),
        ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"padding_free": True}),
    ],
    ids=["lora", "tied", "softcap", "accumulated", "checkpointing", "padding free"],
)
def test_steps_are_those_of_the_formula_however_they_are_made(tmp_path, model, options):
    rows = rows_of("completion")
    trainer = trainer_for(tmp_path, rows, model_for(**model), **options)
    assert_same_steps(steps_of(trainer), plain_steps(model_for(**model), rows, "completion"))


@pytest.mark.parametrize("kind", ["conversation", "assistant", "completion-text", "text"])
def test_rows_without_a_persona_are_mixed_in(tmp_path, kind):
    """Their PIR is 0. The first row is one of them."""
    rows = rows_of(NAMES.get(kind, kind))
    for row in rows[::2]:
        row["persona"] = []
    trainer = trainer_for(tmp_path, rows, **KINDS[kind])
    assert_same_steps(steps_of(trainer), plain_steps(model_for(), rows, kind))


class HandsOnNothing(PerceSFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class OverMeans(PerceSFTTrainer):
    loss_is_scaled_for_ga = False  # so that the Trainer divides


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", HandsOnNothing), ("mixtral", OverMeans)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", OverMeans), ("mixtral", HandsOnNothing))],
)
def test_the_mean_is_over_the_tokens_of_a_step_in_subclasses(tmp_path, architecture, kind):
    rows, found = rows_of("completion"), []
    for each in (PerceSFTTrainer, kind):
        config = config_for(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
        given = {"train_dataset": Dataset.from_list(rows), "processing_class": TOKENIZER}
        found.append(steps_of(each(model_for(architecture), config, **given)))
    assert_same_steps(found[1], found[0])


def test_rows_that_all_lack_a_persona_are_refused_and_a_stream_is_not_searched_for_one(tmp_path):
    rows = [{"persona": [], "prompt": "Hi\n", "completion": "Yes."}] * 4
    with pytest.raises(UserError, match="train_dataset: no example has a persona, so the PIR of every token is 0"):
        trainer_for(tmp_path, rows)

    def endless():
        for number in range(10**9):
            assert number < 5000, "more is read than is needed"
            yield from rows

    stream = IterableDataset.from_generator(endless)
    trainer_for(tmp_path, stream, objective="ce", max_steps=1, per_device_train_batch_size=1).train()


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 4000}, {"padding_free": True}])
def test_packed_rows_without_a_persona(tmp_path, options):
    rows = rows_of("completion", 8)
    for row in rows[::2]:
        row["persona"] = []
    found = [
        trainer_for(tmp_path, rows, eval_packing=False, **more).evaluate(Dataset.from_list(rows))
        for more in ({}, options)
    ]
    names = ("eval_loss_with_persona", "eval_loss_without_persona")
    assert [found[1][name] for name in names] == pytest.approx([found[0][name] for name in names], rel=1e-5)


def train_a_rank(directory):
    trainer = trainer_for(
        directory, rows_of("completion"), per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    found = steps_of(trainer)
    if trainer.args.process_index == 0:
        torch.save(found, directory / "steps.pt")
    end_rank()


@pytest.mark.slow  # test_trainer.py has one of PerceMixin, which shares batches and counts
def test_steps_of_two_processes_are_those_of_the_formula(tmp_path):
    run_ranks("tests.perce.integrations.test_trl", str(tmp_path))
    rows = rows_of("completion")
    assert_same_steps(torch.load(tmp_path / "steps.pt"), plain_steps(model_for(), rows, "completion"))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "assistant"), ("mixtral", "completion")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("llama", "completion"),
            ("mixtral", "assistant"),
            ("qwen3-moe", "completion"),
            ("qwen3-moe", "assistant"),
        )
    ],
)
def test_cross_entropy_is_trls_own(tmp_path, kind, architecture):
    """Its loss, gradients, load balancing and metrics, on rows whose prompts tell the persona already."""
    rows, name = rows_of(NAMES.get(kind, kind)), "messages" if kind == "assistant" else "prompt"
    plain = [{**row, name: told(row[name], block_of(row["persona"]))} for row in rows]
    options = options_for(tmp_path, gradient_checkpointing=False, max_length=None, per_device_train_batch_size=2,
                          gradient_accumulation_steps=2, **KINDS[kind])  # fmt: skip
    trls = SFTTrainer(
        model_for(architecture), SFTConfig(**options), train_dataset=Dataset.from_list(plain),
        eval_dataset=Dataset.from_list(plain[:5]), processing_class=TOKENIZER,
    )  # fmt: skip
    ours = PerceSFTTrainer(
        model_for(architecture), PerceSFTConfig(**options, objective="ce"), train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:5]), processing_class=TOKENIZER,
    )  # fmt: skip
    assert_same_steps(steps_of(ours), steps_of(trls))
    for entry, own in zip(ours.state.log_history, trls.state.log_history, strict=True):
        for metric in {"loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"} & own.keys():
            assert entry[metric] == pytest.approx(own[metric], rel=1e-4), metric
    assert ("aux_loss" in entry or "aux_loss" in ours.state.log_history[0]) == (architecture != "llama")
    before, after = trls.evaluate(), ours.evaluate()
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-4)


def test_options_may_be_changed_until_the_trainer_is_made(tmp_path):
    """As sweeps do; what the options say afterwards is what was trained."""
    args = PerceSFTConfig(**options_for(tmp_path))
    args.objective, args.prompt = "ce", {"place": "user"}
    assert args.loss.objective == "ce" and args.style.place == "user"
    args.clip_min = -1.0
    with pytest.raises(UserError, match="clip_min"):
        _ = args.loss


@pytest.mark.parametrize("kind", ["conversation", "completion"])
def test_packed_rows_are_kept_apart_in_both_passes(tmp_path, kind):
    """One step over all rows, in whatever order they are packed."""
    rows = rows_of(kind, 8)
    packed = trainer_for(
        tmp_path, rows, max_steps=1, packing=True, max_length=1200, per_device_train_batch_size=8
    )  # fmt: skip
    assert max(len(row["seq_lengths"]) for row in packed.train_dataset) > 1
    assert_same_steps(steps_of(packed), plain_steps(model_for(), rows, kind, steps=1))


def test_padding_free_is_refused_by_name_where_sequences_see_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr("perce.data.batch.PACKED", ())  # as a model that hands none of these on
    with pytest.raises(UserError, match=r"with padding_free, .* leave padding_free out"):
        trainer_for(tmp_path, rows_of("completion", 4), padding_free=True)


def parts_of(row):
    """Of a row's tokens those of the persona and those that are learnt, as texts; what is between is left out."""
    found = []
    for wanted in (PERSONA, None):
        runs, last = [], None
        for i, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            if label == wanted or (wanted is None and label not in (IGNORED, PERSONA)):
                runs = [*runs, [token]] if last != i - 1 else [*runs[:-1], [*runs[-1], token]]
                last = i
        found.append([TOKENIZER.decode(run) for run in runs])
    return found


BLOCK = "About the user:\n- I keep bees.\n- My dog is Juno.\n\n"
PERSONA_OF = {"persona": ["I keep bees.", "My dog is Juno."]}
SAID = [{"role": "user", "content": "Tonight?"}, {"role": "assistant", "content": "No."}]
THEN = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Bees."}]
EVERYTHING = None
REPLY = "No.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "options", "learnt"),
    [
        ({"prompt": SAID[:1], "completion": SAID[1:]}, {}, [REPLY]),
        ({"prompt": "Tonight?\n", "completion": "No."}, {}, ["No.<|im_end|>"]),
        ({"text": "No. Bees."}, {}, ["No. Bees.<|im_end|>"]),
        ({"story": "No. Bees."}, {"dataset_text_field": "story"}, ["No. Bees.<|im_end|>"]),
        ({"messages": SAID + THEN}, {"assistant_only_loss": True}, [REPLY, "Bees.<|im_end|>"]),
        ({"messages": [{"role": "system", "content": "Be brief."}, *SAID]}, {"assistant_only_loss": True}, [REPLY]),
        ({"conversations": [{"from": m["role"], "value": m["content"]} for m in SAID]}, {}, EVERYTHING),
    ],
    ids=["prompt", "texts", "text", "text field", "turns", "system message", "from and value"],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_each_format_is_told_and_learnt(tmp_path, row, options, learnt, streamed):
    rows = Dataset.from_list([row | PERSONA_OF] * 3)
    trainer = trainer_for(tmp_path, rows.to_iterable_dataset() if streamed else rows, max_steps=1, **options)
    first = next(iter(trainer.train_dataset))
    told, learns = parts_of(first)
    assert told == [BLOCK] and (learns == learnt or (learnt is EVERYTHING and len(learns) == 2))
    text = TOKENIZER.decode(first["input_ids"])
    assert text.count("You are helpful") == 0 and ("Be brief." in text) == ("Be brief." in str(row))
    trainer.train()


def test_a_persona_is_told_as_the_prompt_says(tmp_path):
    rows = [{"persona": "I keep bees.", "prompt": SAID[:1], "completion": SAID[1:]}]
    for options, text in (
        ({"prompt": {"header": "Who: "}}, "<|im_start|>system\nWho: - I keep bees.\n\nWrite"),
        (
            {"prompt": '{"place": "user"}'},
            "<|im_end|><|im_start|>user\nAbout the user:\n- I keep bees.\n\nTonight?",
        ),
    ):
        trainer = trainer_for(tmp_path, rows, **options)
        assert text in TOKENIZER.decode(trainer.train_dataset[0]["input_ids"])
        assert trainer.processing_class.init_kwargs["perce_prompt"] == trainer.args.prompt
        assert "perce_prompt" not in TOKENIZER.init_kwargs
    saved = tiny_tokenizer(TOKENIZER.chat_template)
    saved.init_kwargs["perce_prompt"] = {"header": "Who: "}  # of an earlier run
    assert "Who: - I keep" in TOKENIZER.decode(
        trainer_for(tmp_path, rows, tokenizer=saved).train_dataset[0]["input_ids"]
    )
    gemma = tiny_tokenizer(GEMMA)  # without a system role
    trainer = trainer_for(tmp_path, rows, tokenizer=gemma)
    assert gemma.decode(trainer.train_dataset[0]["input_ids"]).startswith("<s><turn>user\nAbout the user:\n- I keep")


def test_what_is_longer_than_max_length_loses_entries_of_its_persona_then_its_end(tmp_path, capsys):
    whole = {
        "persona": ["I keep bees.", "My dog is Juno.", "Blue is my colour."],
        "prompt": "Tonight?\n",
        "completion": "No.",
    }
    length = len(trainer_for(tmp_path, [whole]).train_dataset[0]["input_ids"])
    trainer = trainer_for(tmp_path, [whole, whole | {"completion": "No." * 99}, whole | {"prompt": "Tonight? " * 99}],
                          max_length=length - 1)  # fmt: skip
    assert "train: 1 rows left out, 3 persona entries, and the end of 1 rows, to fit" in capsys.readouterr().out
    (shorter, cut) = trainer.train_dataset  # of the third nothing would be left to learn
    assert parts_of(shorter) == [[BLOCK], ["No.<|im_end|>"]]
    assert len(cut["input_ids"]) == length - 1 and parts_of(cut)[0] == ["About the user:\n- I keep bees.\n\n"]
    with pytest.raises(UserError, match="no row has a token to learn within max_length 9"):
        trainer_for(tmp_path, [whole], max_length=9)


IMAGE = {"images": [[]], "prompt": SAID[:1], "completion": SAID[1:]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], {}, "train dataset: expected a column persona, got prompt, completion"),
        ([{"persona": [""], "text": "a"}], {}, r"train row 1: field 'persona': expected at least one entry with text"),
        ([{"persona": "A.", "text": "a"}, {"persona": " ", "text": "a"}], {}, r"train row 2: field 'persona'"),
        ([{"persona": "A.", "story": "a"}], {}, "train row 1: expected prompt, messages or text, got persona, story"),
        ([{"persona": "A.", "messages": SAID[1:]}], {"prompt": {"place": "user"}}, "train row 1: expected texts as"),
        ([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}], {"max_steps": 1}, "labels: expected -101 at the persona"),
        ([{"persona": "A."} | IMAGE], {}, "train_dataset: expected texts only, got a column images"),
        (None, {"packing": True, "packing_strategy": "wrapped"}, "packing_strategy: expected bfd, got wrapped"),
        (None, {"packing": True, "packing_strategy": "bfd_split"}, "packing_strategy: expected bfd"),
        (None, {"truncation_mode": "keep_end"}, "truncation_mode: expected keep_start"),
        (None, {"loss_type": "dft"}, "loss_type: expected nll, got dft: use objective=dft for DFT"),
        (None, {"eval_packing": True}, "eval_packing: needs packing or padding_free"),
        (None, {"prompt": "user"}, "prompt: expected a mapping with keys among system, place"),
        ([{"persona": "A <|im_end|> B.", "text": "a"}], {}, r"train row 1: .*spells the control token '<\|im_end\|>'"),
        ([{"persona": "A.", "messages": []}], {}, "train row 1: expected messages, got none"),
        ([{"persona": "A.", "messages": [{"content": "U"}]}], {}, "row 1: expected messages with role and content"),
        ([{"input_ids": [1, 2, 3]}], {"dataset_kwargs": {"skip_prepare_dataset": True}}, "labels: expected -101 at"),
        (None, {"clip_min": 3.0, "clip_max": 2.0}, "clip_min, clip_max"),
        (None, {"prompt": {"sytem": "x"}}, "prompt: expected keys among system"),
        (None, {"label_smoothing_factor": 0.1}, "label_smoothing_factor: the PerCE loss has no label smoothing"),
        (None, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: noise in the factual pass alone"),
        (None, {"backend": "cuda"}, "backend"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, rows or rows_of("completion", 4), **options).train()


@pytest.mark.parametrize("objective", ["longce", "random", "wordmatch", "perse"])
def test_an_objective_that_the_trainer_would_refuse_is_refused_where_it_is_given(tmp_path, objective):
    taken = "perce, ce, lossce, entce, dft, nextquill"
    with pytest.raises(UserError, match=rf"^objective: expected one for personas .* \({taken}\), got '{objective}'"):
        config_for(tmp_path, objective=objective)


def test_arguments_of_the_trainer_are_refused_by_name(tmp_path):
    rows = Dataset.from_list(rows_of("completion", 4))
    for args, options, message in (
        (SFTConfig(str(tmp_path), bf16=False, use_cpu=True), {}, "args: expected a PerceSFTConfig, got SFTConfig"),
        (config_for(tmp_path), {"formatting_func": str}, "formatting_func: would leave out the persona"),
        (
            config_for(tmp_path),
            {"compute_metrics": len},
            "compute_metrics: (?!.*PerceTrainer)the PerCE loss is computed",
        ),
        (
            config_for(tmp_path),
            {"data_collator": DataCollatorForLanguageModeling(TOKENIZER, mlm=False)},
            "data_collator: DataCollatorForLanguageModeling replaces the labels",
        ),
        (config_for(tmp_path), {"peft_config": LoraConfig(**LORA | {"target_modules": ["lm_head"]})}, "lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceSFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=TOKENIZER, **options)


@pytest.mark.parametrize("objective", ["lossce", "entce", "dft", "nextquill"])
def test_other_objectives_are_their_formulae(tmp_path, objective):
    rows = rows_of("completion", 8)
    trainer = trainer_for(tmp_path, rows, objective=objective, clip_min=None, clip_max=None, max_steps=2)
    assert_same_steps(steps_of(trainer), plain_steps(model_for(), rows, "completion", objective, steps=2))
    assert ("pir_mean" in trainer.state.log_history[0]) == (objective == "nextquill")
    found = trainer.evaluate(Dataset.from_list(rows[:3]))
    assert ("eval_pir_mean" in found) == (objective == "nextquill") and "eval_loss_with_persona" in found


def test_an_evaluation_is_of_plain_cross_entropy_with_and_without_the_persona(tmp_path):
    rows = rows_of("completion", 6)
    config = config_for(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1, learning_rate=0.0,
                        per_device_eval_batch_size=6)  # fmt: skip
    held = {"one": Dataset.from_list(rows), "two": Dataset.from_list(rows[:3])}
    trainer = PerceSFTTrainer(
        model_for(), config, train_dataset=Dataset.from_list(rows), eval_dataset=held, processing_class=TOKENIZER
    )
    trainer.train()
    found = trainer.evaluate(held["one"])
    (loss, _), *_ = plain_steps(model_for(), rows, "completion", objective="ce", steps=1)
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_loss_without_persona"] - found["eval_pir_mean"] == pytest.approx(loss, rel=1e-5)
    logged = [entry for entry in trainer.state.log_history if "eval_one_loss" in entry]
    assert logged[0]["eval_one_pir_mean"] == pytest.approx(found["eval_pir_mean"], rel=1e-5)
    with pytest.raises(UserError, match="predict: would return logits"):
        trainer.predict(held["one"])


def test_a_run_is_saved_and_resumed_as_trl_does(tmp_path):
    rows = rows_of("completion")
    whole = trainer_for(tmp_path / "a", rows)
    expected = steps_of(whole)
    first = trainer_for(tmp_path / "b", rows, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer_for(tmp_path / "b", rows)
    gradients = steps_of(second, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert_same_steps(gradients, expected[2:])
    card = (tmp_path / "b" / "README.md").read_text()
    assert "trained with PerCE" in card and "2603.06595" in card


def test_a_model_by_name_has_no_dropout_and_a_yaml_is_read_as_trls_users_write_it(tmp_path):
    from trl import TrlParser

    model = tiny_model("llama")
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    options = options_for(tmp_path / "run", objective="dft", max_steps=1, prompt={"place": "user"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    (config,) = TrlParser((PerceSFTConfig,)).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    assert config.objective == "dft" and config.style.place == "user"
    rows = Dataset.from_list(rows_of("completion", 4))
    trainer = PerceSFTTrainer(str(tmp_path / "model"), config, train_dataset=rows)
    assert trainer.model.config.attention_dropout == 0.0
    trainer.train()


def test_a_processor_of_images_is_refused_by_name(tmp_path):
    trainer, processor = trainer_for(tmp_path, rows_of("text", 4)), object.__new__(ProcessorMixin)
    with pytest.raises(UserError, match="processing_class: expected a tokenizer"):
        trainer._prepare_dataset(Dataset.from_list(rows_of("text", 4)), processor, trainer.args, False, None, "eval")


def test_rows_may_be_a_list_and_lose_no_field(tmp_path):
    rows = rows_of("completion", 4)
    rows[1] = rows[1] | {"note": "kept"}
    trainer = PerceSFTTrainer(
        model_for(), config_for(tmp_path), train_dataset=rows, eval_dataset=rows[:2], processing_class=TOKENIZER
    )
    assert len(trainer.train_dataset) == 4 and len(trainer.eval_dataset) == 2
    assert trl._as_dataset(rows, "train_dataset")["note"] == [None, "kept", None, None]


def test_labels_in_a_row_of_texts_are_not_those_of_its_tokens(tmp_path):
    rows = rows_of("completion", 4)
    plain, topics = (
        trainer_for(tmp_path, [row | more for row in rows]).train_dataset[:] for more in ({}, {"labels": [3, 1]})
    )
    assert topics == plain


def test_rows_to_evaluate_may_be_lists_and_several_by_name(tmp_path):
    rows = rows_of("completion", 4)
    rows[0] = rows[0] | {"persona": "A text, where others have several."}

    def trainer(train=rows, **more):
        return PerceSFTTrainer(
            model_for(), config_for(tmp_path), train_dataset=train, processing_class=TOKENIZER, **more
        )

    ours = trainer(eval_dataset={"a": rows, "b": tuple(rows[:2])})
    loss, found = ours.evaluate(Dataset.from_list(rows[1:]))["eval_loss_with_persona"], ours.evaluate()
    assert ours.evaluate(rows[1:])["eval_loss_with_persona"] == loss
    assert ours.evaluate({"x": rows[1:]})["eval_x_loss_with_persona"] == loss
    assert found["eval_a_pir_mean"] == ours.evaluate("a")["eval_pir_mean"] == ours.evaluate(rows)["eval_pir_mean"]
    assert found["eval_b_pir_mean"] == ours.evaluate(rows[:2])["eval_pir_mean"]
    for wrong, message in (
        ([], "eval_dataset: expected at least one row, got none"),
        (Dataset.from_list(rows[1:]).select([]), "eval_dataset: expected at least one row, got none"),
        ({"a": rows, "b": []}, r"eval_dataset\['b'\]: expected at least one row, got none"),
        (["A text."], "eval_dataset: expected rows with fields, got str"),
        ((row for row in rows), "eval_dataset: expected a Dataset or a list of rows, got generator"),
    ):
        with pytest.raises(UserError, match=message):
            ours.evaluate(wrong)
        with pytest.raises(UserError, match=message):
            trainer(rows, eval_dataset=wrong)
    with pytest.raises(UserError, match=r"train_dataset: expected one dataset, got dict. Give train_dataset\['a'\]"):
        trainer({"a": rows})


@pytest.mark.parametrize("place", ["system", "user"])
@pytest.mark.parametrize("kind", ["completion", "conversation", "several turns"])
def test_a_template_that_drops_the_system_message_of_a_finished_conversation(tmp_path, kind, place):
    """As Mistral's of v0.3, which gives it to the last user turn while no reply follows. What is learnt follows the
    prompt that the template makes."""
    tokenizer, system = tiny_tokenizer(MISTRAL_V3), "Be brief."
    block = BLOCK + " " if place == "system" else BLOCK  # the footer after which the next word keeps its tokens
    said = [{"role": "system", "content": system}, *SAID, *(THEN if kind == "several turns" else [])]
    row = {"messages": said} if kind == "conversation" else {"prompt": said[:-1], "completion": said[-1:]}
    trainer = trainer_for(tmp_path, [row | PERSONA_OF], tokenizer=tokenizer, prompt={"place": place})
    (found,) = trainer.train_dataset
    told = f"{block}{system}\n\n" if place == "system" else f"{system}\n\n{block}"
    text = tokenizer.decode(found["input_ids"])
    then = "" if kind != "several turns" else "[INST] Why?[/INST] Bees.<|im_end|>"
    assert text == f"<s>[INST] {told}Tonight?[/INST] No.<|im_end|>{then}"
    learnt = [token for token, label in zip(found["input_ids"], found["labels"], strict=True) if label >= 0]
    reply = {"completion": " No.<|im_end|>", "several turns": " Bees.<|im_end|>"}.get(kind)
    assert tokenizer.decode(learnt) == (reply or text.replace(block, ""))
    if kind == "completion" and place == "system":
        asked = [{"role": "system", "content": block + system}, *said[1:-1]]
        assert text == tokenizer.apply_chat_template(asked, tokenize=False) + reply


def test_a_date_that_the_template_writes_is_the_day_of_the_commands(tmp_path):
    tokenizer = tiny_tokenizer(CHAT_TEMPLATES["date-now"])
    trainer = trainer_for(tmp_path, rows_of("conversation", 2), tokenizer=tokenizer)
    assert "Today is 01 January 2026." in tokenizer.decode(trainer.train_dataset[0]["input_ids"])


def test_arguments_may_be_left_out_and_a_dataset_may_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        PerceSFTTrainer(tiny_model(), config_for(tmp_path), processing_class=TOKENIZER)
    with pytest.raises(UserError, match="train_dataset: expected at least one row"):
        PerceSFTTrainer(tiny_model(), config_for(tmp_path), train_dataset=[], processing_class=TOKENIZER)
    rows = rows_of("completion", 4)  # a list, as it may be
    own = PerceSFTConfig.__post_init__

    def on_a_cpu(config):
        config.use_cpu, config.bf16 = True, False
        own(config)

    monkeypatch.setattr(PerceSFTConfig, "__post_init__", on_a_cpu)
    trainer = PerceSFTTrainer(tiny_model(), train_dataset=rows, processing_class=TOKENIZER)
    assert isinstance(trainer.args, PerceSFTConfig) and trainer.args.output_dir == "trainer_output"


if __name__ == "__main__":
    train_a_rank(Path(sys.argv[1]))
