"""Every objective of OBJECTIVES: a new entry is tested by all of these, and asks for its formula in the table below."""

import copy
import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import yaml
from datasets import Dataset

import perce.model.head
from perce import DataConfig, LossConfig, MemoryConfig, UserError
from perce import plan as plan_command
from perce.config.commands import PlanOptions
from perce.data.pairing import make_builder
from perce.objectives import DOCUMENTS, OBJECTIVES, PERSONAS, PIR, Signal, TokenWeighting, permuted
from perce.planning.plans import Costs
from perce.score import main as score
from perce.train import main as train
from tests.helpers import ROOT
from tests.helpers.models import TOKENIZER, K, S, documents
from tests.helpers.pages import Page
from tests.helpers.plans import FULL, SHORT
from tests.helpers.tiny import read_jsonl, save_tiny_model, tiny_model, write_jsonl
from tests.helpers.trainers import PAIRS, arguments, logged, model_for, pir, plain_loop, plain_loss, trainer_for
from tests.helpers.training import LIMIT, ROWS


def dealt(signal, seed):
    return signal[torch.randperm(len(signal), generator=torch.Generator().manual_seed(seed))]


# (logp, logp_cf, entropy, personal) of the tokens → what is clipped to their weights; "1": all weights are 1; a pair:
# and what the signals of a step become.
FORMULAS = {
    "perce": pir,
    "ce": "1",
    "lossce": lambda logp, *_: -logp,
    "entce": lambda logp, logp_cf, entropy, personal: entropy,
    "longce": lambda logp, logp_cf, *_: torch.exp(logp) / torch.exp(logp_cf),
    "dft": lambda logp, *_: torch.exp(logp),
    "nextquill": lambda logp, logp_cf, *_: torch.where(torch.exp(logp) - torch.exp(logp_cf) > 0.05, 0.9, 0.1),
    "random": (pir, dealt),
    "wordmatch": lambda logp, logp_cf, entropy, personal: 0.8 + 4.2 * personal,
}
FAST = ("perce", "longce")  # of personas, of documents
ALL = pytest.mark.parametrize("name", OBJECTIVES)
MOST_SLOW = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
WITH_WEIGHTS = [name for name, objective in OBJECTIVES.items() if objective.signal]  # others have nothing to normalise
WEIGHTED = pytest.mark.parametrize("name", WITH_WEIGHTS)


def loss_of(name, **options):
    """With a floor below what a random model makes of a persona, and short contexts of a few tokens."""
    low = {"clip_min": 0.05} if OBJECTIVES[name].clip[0] == 0.8 else {}
    return LossConfig(name, **low, short_context=K, short_stride=S, **options)


def peaked_model(kind="full"):
    """One that gives some tokens a large probability, and others next to none."""
    model = model_for(kind)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    return model


@cache
def pairs_for_personas():
    """Every second token of a reply is the one that the model expects: what is likely, and likelier with the persona,
    is among them. Every third is personal."""
    model, pairs = peaked_model(), copy.deepcopy(PAIRS)
    for pair in pairs:
        pair["personal"] = [place % 3 == 0 for place in range(pair["response_length"])]
        ids, known, seen = pair["input_ids"], None, 0
        for place in range(len(ids) - pair["response_length"], len(ids) - 1, 2):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids[seen:place]]), past_key_values=known, use_cache=True)
            ids[place], known, seen = out.logits[0, -1].argmax().item(), out.past_key_values, place
    return pairs


def run(name, directory, steps=3, sequences=20, kind="full", loss=None, **options):
    args = arguments(
        directory, max_steps=steps, per_device_train_batch_size=sequences, loss=loss or loss_of(name), **options
    )
    pairs = pairs_for_personas() if PERSONAS in OBJECTIVES[name].takes else documents(range(K, K + 60, 3))
    return trainer_for(peaked_model(kind), args, pairs=pairs)


def test_every_objective_has_its_formula_here():
    assert FORMULAS.keys() == OBJECTIVES.keys()


@WEIGHTED
def test_signals_are_their_formulas_over_all_probabilities(name):
    """A random model gives few tokens a probability that a threshold could tell apart."""
    logp, logp_cf = torch.rand(2, 1000, generator=torch.Generator().manual_seed(1)).log()
    entropy, personal = torch.rand(1000) * 6, torch.rand(1000) < 0.1
    signal = OBJECTIVES[name].weighting().signal_of(logp=logp, logp_cf=logp_cf, entropy=entropy, personal=personal)
    formula = FORMULAS[name][0] if isinstance(FORMULAS[name], tuple) else FORMULAS[name]
    expected = formula(logp, logp_cf, entropy, personal)
    torch.testing.assert_close(signal, expected, atol=1e-6, rtol=1e-5)
    assert signal.dtype == torch.float32 and signal.shape == (1000,) and len(signal.unique()) > 1


@pytest.mark.parametrize(
    ("name", "normalize"),
    [
        pytest.param(name, how, marks=() if name == "perce" or (name, how) == ("lossce", "none") else pytest.mark.slow)
        for name in OBJECTIVES
        for how in (("none", "batch", "sequence") if name in WITH_WEIGHTS else ("none",))
    ],
)
def test_weights_of_the_data_multiply_those_of_the_tokens(tmp_path, name, normalize):
    """After the normalisation, and without a change of what the loss is divided by."""
    loss = loss_of(name, normalize=normalize)
    made = run(name, tmp_path, sequences=4, gradient_accumulation_steps=2, loss=loss)
    weights = [1.0, 0.25, 3.0, 1.0, 2.0]
    pairs = [{**pair, "data_weight": weights[i % 5]} for i, pair in enumerate(made.train_dataset)]
    made.train_dataset = Dataset.from_list(pairs)
    reference, batches, collator = copy.deepcopy(made.model).train(), [], made.data_collator
    made.data_collator = lambda pairs: (batches.append(pairs), collator(pairs))[1]
    made.train()
    steps = [[pair for batch in batches[i : i + 2] for pair in batch] for i in (0, 2, 4)]  # five of 4 are an epoch
    expected = plain_loop(reference, steps, [loss] * 3, formula=FORMULAS[name])
    found = torch.tensor(logged(made, "loss", "grad_norm"))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"estimate": "epoch"}, {"estimate": "frozen"}, {"memory": MemoryConfig(share_persona=4)},
        {"memory": MemoryConfig(branches_per_forward=1)}, {"name": "longce"},
    ],
    ids=str,
)  # fmt: skip
def test_weights_of_two_double_the_first_step(tmp_path, options):
    """However the tokens' own weights are known and the persona is computed."""
    name, found = options.get("name", "perce"), []
    for weight in (1.0, 2.0):
        made = run(
            name, tmp_path / str(weight), steps=1, sequences=4, memory=options.get("memory", MemoryConfig()),
            loss=loss_of(name, estimate=options.get("estimate", "online")), max_grad_norm=0.0,
        )  # fmt: skip
        made.train_dataset = Dataset.from_list([{**pair, "data_weight": weight} for pair in made.train_dataset])
        made.train()
        found.append(torch.tensor(logged(made, "loss", "grad_norm")))
    torch.testing.assert_close(found[1], 2 * found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=[pytest.mark.slow] * (bool(options) or name not in (*FAST, "ce", "random")))
        for name in OBJECTIVES
        for options in ({}, {"normalize": "batch", "clip_schedule": "rising"})
    ],
)
def test_five_steps_equal_a_plain_loop_on_full_logits(tmp_path, name, options):
    if OBJECTIVES[name].signal is None:
        options = {}
    kind = "lora" if options else "full"
    trainer = run(name, tmp_path, steps=5, sequences=4, kind=kind, loss=loss_of(name, **options))
    reference, loss, batches = copy.deepcopy(trainer.model).train(), trainer.args.loss, []
    collator = trainer.data_collator
    trainer.data_collator = lambda pairs: (batches.append(pairs), collator(pairs))[1]
    trainer.train()
    losses = [loss.at(step / 4) for step in range(5)]
    expected = plain_loop(reference, batches[:5], losses, formula=FORMULAS[name])
    torch.testing.assert_close(
        torch.tensor(logged(trainer, "loss", "grad_norm")), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )
    if OBJECTIVES[name].signal:
        shares = logged(trainer, "frac_at_floor", "frac_at_ceiling")[0]
        assert max(shares) < 1, "weights that are all the same test nothing"


@ALL
def test_the_first_gradient_is_the_formulas_in_every_entry(tmp_path, name):
    """In fp64, where next to nothing is lost, of every parameter."""
    trainer = run(name, tmp_path, steps=1, sequences=4, max_grad_norm=0.0, learning_rate=0.0)
    trainer.model.double()
    reference, batches = copy.deepcopy(trainer.model), []
    collator = trainer.data_collator
    trainer.data_collator = lambda pairs: (batches.append(pairs), collator(pairs))[1]
    gradients = {}
    for parameter_name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, parameter_name=parameter_name: gradients.update({parameter_name: p.grad.clone()})
        )
    trainer.train()
    plain_loss(reference, batches[0], trainer.args.loss, FORMULAS[name]).backward()
    for parameter_name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[parameter_name], parameter.grad, atol=1e-7, rtol=1e-5)


@MOST_SLOW
def test_an_epoch_of_one_step_is_the_same_estimated_at_its_start_or_online(tmp_path, name):
    if not OBJECTIVES[name].weighting().of_model:
        pytest.skip("there are no weights to estimate")
    losses = {}
    for estimate in ("online", "epoch", "frozen"):
        trainer = run(name, tmp_path / estimate, steps=2, loss=loss_of(name, estimate=estimate))
        trainer.train()
        losses[estimate] = [loss for (loss,) in logged(trainer, "loss")]
    assert losses["epoch"] == pytest.approx(losses["online"], abs=1e-5, rel=1e-5)
    assert losses["frozen"][0] == pytest.approx(losses["online"][0], abs=1e-5, rel=1e-5)


RESUMED = [("perce", "online"), ("perce", "frozen"), ("longce", "online")]


@pytest.mark.parametrize(
    ("name", "estimate"),
    [
        pytest.param(name, estimate, marks=[pytest.mark.slow] * ((name, estimate) not in RESUMED))
        for name in OBJECTIVES
        for estimate in ("online", "frozen")
    ],
)
def test_resume_is_bitwise_equal(tmp_path, name, estimate):
    if estimate == "frozen" and not OBJECTIVES[name].weighting().of_model:
        pytest.skip("there are no weights to freeze")

    def weights(directory, **more):
        options = {"save_strategy": "steps", "save_steps": 3, "loss": loss_of(name, estimate=estimate)}
        trainer = run(name, directory, steps=5, sequences=8, gradient_accumulation_steps=2, **options)
        trainer.train(**more)
        return list(trainer.model.parameters())

    straight = weights(tmp_path / "a")
    resumed = weights(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


@ALL
def test_a_step_makes_the_passes_and_products_that_its_entry_says(tmp_path, name, monkeypatch):
    """And no more: each is 2·N·D·V operations, or a forward through the layers."""
    trainer, products, forwards = run(name, tmp_path, steps=1), [], []
    for op in (perce.model.head.token_logprobs, perce.model.head.fused_perce_loss):

        def spy(hidden, op=op, **options):
            products.append(1 + (options.get("hidden_cf") is not None))
            return op(hidden, **options)

        monkeypatch.setattr(perce.model.head, op.__name__, spy)
    trainer.model.base_model.register_forward_hook(lambda *_: forwards.append(1))
    trainer.train()
    objective = OBJECTIVES[name]
    assert sum(products) - 1 == objective.products
    assert len(forwards) - 1 == objective.counterfactual + (objective.over_step is not None)


@ALL
def test_a_plan_counts_what_the_weights_take(name):
    objective, config = OBJECTIVES[name], tiny_model().config
    step = replace(SHORT, objective=name, short_context=K, short_stride=S)

    def cost(step):
        return Costs(config, "cpu").of(PlanOptions(FULL, step))

    known = cost(replace(step, estimate="frozen"))
    assert step.computed is objective and replace(step, estimate="epoch").computed is OBJECTIVES["ce"]
    flops, rows = cost(step).flops, 95 if step.of_documents else 16
    assert flops.head_estimation == objective.products * 2 * rows * 32 * 400
    assert (flops.estimation > 0) == objective.counterfactual and flops.cross_entropy == known.flops.total
    phases = cost(step).memory.phases
    assert ("counterfactual" in phases) == objective.counterfactual and "counterfactual" not in known.memory.phases


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


TEXTS = [{"text": f"The bees left on day {i}. Ana wrote it down, as she does. " * 3} for i in range(12)]


@MOST_SLOW
def test_every_command_knows_it(tmp_path, model, name, capsys, monkeypatch):
    objective = OBJECTIVES[name]
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS if PERSONAS in objective.takes else TEXTS)
    flags = [f"--model={model}", f"--objective={name}", "--precision=fp32"]
    short = [] if PERSONAS in objective.takes else ["--short_context=16", "--short_stride=8"]
    training = [*flags, *short, f"--data={data}", f"--output_dir={tmp_path / 'run'}"]
    assert train([*training, "--max_steps=1", "--eval_examples=2"]) == 0
    out = capsys.readouterr().out
    assert f"{name} objective" in out
    assert ("counterfactual pass" in out) == (objective.counterfactual and objective.over_step is None)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entry = next(entry for entry in log if "loss" in entry)
    assert ("weight_mean" in entry) == (objective.signal is not None)
    assert ("pir_mean" in entry) == objective.counterfactual
    weighting = objective.weighting().reported
    page = Page(tmp_path / "run" / "report.html")
    clip = f"{weighting.clip_min:g} … {weighting.clip_max:g}"
    assert f"weight of a token is {weighting.signal.name}, clipped to {clip}" in page.text
    assert (f"{objective.title} gives every token the same weight" in page.text) == (objective.signal is None)
    assert ("after the long context" in page.text) == (PERSONAS not in objective.takes)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (saved["objective"], saved["clip_min"], saved["clip_max"]) == (name, None, None)
    assert train([f"--output_dir={tmp_path / 'run'}", "--resume", "--max_steps=2"]) == 0

    lengths = ["--query=8", "--response=16"] if PERSONAS in objective.takes else []
    monkeypatch.setattr("perce.planning.plans.planned_variants", lambda *_: ())  # each takes as long as the plan
    plan = [*flags, *lengths, "--context=96", "--tflops=1", "--device=cpu"]
    assert plan_command.main(plan) == 0
    assert f"{name} objective" in capsys.readouterr().out


@ALL
def test_score_records_what_the_clip_acted_on(tmp_path, model, name, capsys):
    low, high = (0.05, 5.0) if OBJECTIVES[name].clip[0] == 0.8 else OBJECTIVES[name].clip
    paths = {kind: tmp_path / f"s.{kind}" for kind in ("html", "json", "jsonl")}
    flags = {"model": model, "limit": LIMIT, "objective": name, "clip_min": low, "clip_max": high, "terminal": 0}
    flags |= {"output": paths["html"], "summary": paths["json"], "jsonl": paths["jsonl"], "labels": "true"}
    assert score([f"--{flag}={value}" for flag, value in flags.items()]) == 0
    out = capsys.readouterr().out
    records = read_jsonl(paths["jsonl"])
    logp, logp_cf, entropy, personal, signal, weight = (
        torch.tensor([x for record in records for x in record[column]])
        for column in ("logp", "logp_cf", "entropy", "personal", "signal", "weight")
    )
    formula = FORMULAS[name][0] if isinstance(FORMULAS[name], tuple) else FORMULAS[name]
    plain = formula == "1"
    if plain:
        assert signal.unique().tolist() == weight.unique().tolist() == [1.0]
        signal = logp - logp_cf  # what the tint is of
    else:
        torch.testing.assert_close(signal, formula(logp, logp_cf, entropy, personal), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(weight, signal.clamp(low, high))
    summary, page = json.loads(paths["json"].read_text(encoding="utf-8")), Page(paths["html"])
    floor, ceiling = ((signal <= low).float().mean().item(), (signal >= high).float().mean().item())
    shares = [summary.get("frac_at_floor"), summary.get("frac_at_ceiling")]
    assert shares == ([None, None] if plain else pytest.approx([floor, ceiling], abs=1e-6))
    assert f"{floor:.1%} lie at the floor" in page.text and f"{ceiling:.1%} at the ceiling" in page.text
    tokens = [token for place in range(len(records)) for token in page.tokens(place, "response")]
    assert bool(re.search(f"at the floor +{floor:.1%}", out)) != plain
    assert sum(token["top"] for token in tokens) == (signal >= high).sum()
    acted_on = [token["signal"] for token in tokens] if "signal" in tokens[0] else None
    if OBJECTIVES[name].weighting().reported.signal is PIR:
        assert acted_on is None, "it is the difference of what is embedded"
    else:
        assert acted_on == pytest.approx(signal.tolist(), abs=0.00501)


@pytest.mark.parametrize("kind", [PERSONAS, DOCUMENTS])
def test_rows_are_refused_by_what_the_entry_takes(kind):
    for name, objective in OBJECTIVES.items():
        format = "text" if kind == DOCUMENTS else "perce"
        if kind in objective.takes:
            make_builder(TOKENIZER, DataConfig(), format, LossConfig(name))
        else:
            with pytest.raises(UserError, match=f"objective {name}: expected {objective.takes[0]}, got {kind}"):
                make_builder(TOKENIZER, DataConfig(), format, LossConfig(name))


def test_dealing_out_keeps_the_values_and_depends_on_the_seed_alone():
    values = torch.arange(1000.0)
    dealt = permuted(values, seed=3)
    assert torch.equal(dealt.sort().values, values) and torch.equal(dealt, permuted(values, seed=3))
    assert (dealt == permuted(values, seed=4)).sum() < 20 and (dealt == values).sum() < 20


def test_what_a_signal_needs_is_what_its_function_takes():
    assert TokenWeighting(Signal("", lambda entropy, logp: entropy, ""), 0, 1).needs == {"entropy", "logp"}
    assert [OBJECTIVES[name].counterfactual for name in ("perce", "nextquill", "dft", "ce")] == [
        True,
        True,
        False,
        False,
    ]


@ALL
def test_the_table_of_objectives_has_its_row(name):
    objective = OBJECTIVES[name]
    clip = f"{objective.clip[0]:g}, {objective.clip[1]:g}" if objective.signal else ""
    data = "both" if len(objective.takes) > 1 else {PERSONAS: "personas", DOCUMENTS: "documents"}[objective.takes[0]]
    passes = 1 + objective.counterfactual + (objective.over_step is not None)
    table = (ROOT / "docs/reference/objectives.md").read_text(encoding="utf-8")
    row = next((line for line in table.splitlines() if line.startswith(f"| `{name}` |")), "")
    assert [cell.strip() for cell in row.split("|")][3:-1] == [clip, data, str(passes), str(objective.products)]


def test_an_e_step_over_a_step_knows_a_persona_without_a_gradient(tmp_path):
    trainer = run("random", tmp_path, steps=1, memory=MemoryConfig(persona_grad="none"))
    trainer.train()
    whole = run("random", tmp_path, steps=1)
    whole.train()
    assert logged(trainer, "loss")[0] == pytest.approx(logged(whole, "loss")[0], abs=1e-6)
