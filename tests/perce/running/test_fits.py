"""A batch that cannot fit is found before the first step, by the plan of the run's own model, lengths and options."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import Dataset

from perce import DataConfig, LossConfig, MemoryConfig, PerceArguments, UserError
from perce.config.commands import PlanOptions, TrainOptions
from perce.config.schema import ModelConfig, RunConfig
from perce.config.step import StepConfig
from perce.data.batch import collate
from perce.objectives import OBJECTIVES
from perce.planning import device as memory_there
from perce.planning.plans import Costs
from perce.planning.shapes import shape_of
from perce.running import fits
from perce.running.fits import check_fits, largest_step
from perce.train import main
from tests.helpers import training
from tests.helpers.replies import conversation, requests
from tests.helpers.tiny import save_tiny_model, tiny_model, write_jsonl

pytestmark = pytest.mark.whole

ROWS = [row | {"persona": row["persona"] * (1 + i)} for i, row in enumerate(training.ROWS)]


def pair(persona, query, response):
    return {
        "input_ids": [1] * (persona + query + response), "persona_span": [4, 4 + persona], "response_length": response,
        "personal": [False] * response, "passages": [], "example": 0,
    }  # fmt: skip


@pytest.fixture
def setting(tmp_path):
    """check_fits of a tiny model, given options and device memory."""
    pairs = [pair(20, 10, 5), pair(900, 12, 30), pair(30, 10, 40)]

    def make(loss=None, run=None, **arguments):
        model = ModelConfig(lora_r=4, precision="fp32")
        config = TrainOptions(model, loss=loss or LossConfig(), run=RunConfig(**(run or {})))
        args = PerceArguments(str(tmp_path), use_cpu=True, report_to="none", **arguments)
        return config, args, tiny_model("llama"), SimpleNamespace(train=Dataset.from_list(pairs))

    return make


def test_the_largest_step_is_that_of_the_longest_sequences(setting):
    config, args, _, _ = setting(per_device_train_batch_size=2)
    pairs = [pair(900, 12, 30)] * 2
    plan, _ = largest_step(config, args, SimpleNamespace(train=Dataset.from_list(pairs)))
    batch, shape = collate(pairs), shape_of(plan, MemoryConfig())
    assert (shape.batch, shape.tokens) == tuple(batch["input_ids"].shape)
    assert (shape.sequences_cf, shape.tokens_cf) == tuple(batch["input_ids_cf"].shape)
    assert shape.rows == batch["target"].numel()


def test_what_the_step_runs_is_planned(setting):
    def step(memory=None, **options):
        config, args, _, pairs = setting(**options)
        return largest_step(replace(config, memory=memory or config.memory), args, pairs)[0]

    assert step().computed.counterfactual and step().context == 942
    for loss in (LossConfig(objective="lossce"), LossConfig(estimate="frozen")):
        assert not step(loss=loss).computed.counterfactual
    assert step(run={"tokens_per_batch": 2000}).per_device_train_batch_size == 2
    assert step(run={"activation_checkpointing": True}).activation_checkpointing
    assert step(per_device_train_batch_size=8).per_device_train_batch_size == 3, "there are no more examples"
    unpadded = step(memory=MemoryConfig(persona_grad="none"), per_device_train_batch_size=2)
    assert unpadded.context == (942 + 80) // 2, "the two longest, one after the other"
    documents = Dataset.from_list([{"input_ids": [1] * 300, "windows": [[0, 300, 299]], "response_length": 299}])
    config, args, _, _ = setting(loss=LossConfig(objective="longce"))
    plan, _ = largest_step(config, args, SimpleNamespace(train=documents))
    assert (plan.objective, plan.context) == ("longce", 300)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_of_the_run_is_planned(setting, name):
    for estimate, computed in (("online", name), ("frozen", "ce")):
        if estimate == "online" or OBJECTIVES[name].weighting().of_model:
            config, args, model, pairs = setting(loss=LossConfig(name, estimate=estimate))
            assert largest_step(config, args, pairs)[0].computed is OBJECTIVES[computed]
            if name in ("perce", "longce", "random"):  # what each takes is planned in perce/test_objectives.py
                assert check_fits(config, args, model, pairs) is None


def test_enough_close_and_too_little(setting, monkeypatch):
    monkeypatch.setattr(memory_there, "HELD_BY_LIBRARIES", 0)
    config, args, model, pairs = setting(per_device_train_batch_size=3)
    peak = Costs(model.config, "cpu").of(PlanOptions(config.model, *largest_step(config, args, pairs))).memory.peak

    variants, found = fits.planned_variants, {}

    def once(planned, *rest):
        """What would fit is planned once, whatever room there is."""
        if str(planned) not in found:
            found[str(planned)] = [*variants(planned, *rest)]
        return found[str(planned)]

    monkeypatch.setattr(fits, "planned_variants", once)

    def check(room, **run):
        monkeypatch.setattr(fits, "device_memory", lambda device: int(room))
        return check_fits(replace(config, run=replace(config.run, **run)), args, model, pairs)

    assert check(1.2 * peak) is None
    assert "3 × 942 tokens" in check(peak) and check(peak).endswith("That is close.")
    with pytest.raises(UserError, match=r"3 × 942 tokens.*What would fit: .*--per_device_train_batch_size 1"):
        check(0.6 * peak)
    with pytest.raises(UserError, match=r"No single option makes it fit: use a smaller --max_length\."):
        check(peak / 50)
    with pytest.raises(UserError) as error:
        check(0.6 * peak, tokens_per_batch=3000)
    assert "--tokens_per_batch" in str(error.value) and "--per_device_train_batch_size" not in str(error.value)


@pytest.mark.parametrize(
    "unknown",
    ["optim", "use_liger_kernel", "fsdp", "deepspeed", "streaming", "quantised", "launcher"],
)
def test_what_is_not_planned_is_not_judged(setting, monkeypatch, unknown):
    monkeypatch.setattr(fits, "device_memory", lambda device: 1)
    config, args, model, pairs = setting()
    if unknown == "optim":
        args.optim = SimpleNamespace(value="adafactor")
    elif unknown == "streaming":
        config = replace(config, data=DataConfig(streaming=True))
    elif unknown == "quantised":
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
    elif unknown == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        setattr(args, unknown, True)
    assert check_fits(config, args, model, pairs) is None


@pytest.mark.parametrize("error", [UserError, AttributeError])
def test_a_plan_that_cannot_be_made_does_not_keep_a_run_from_being_tried(setting, monkeypatch, error):
    def refuse(*_):
        raise error("layers that are not alike")

    monkeypatch.setattr(fits, "peak_memory", refuse)
    monkeypatch.setattr(fits, "device_memory", lambda device: 1)
    said = check_fits(*setting())
    assert said and said.startswith("not planned: ") and said.endswith("layers that are not alike")
    assert ("AttributeError" in said) == (error is AttributeError), "a UserError is a sentence, others are named"


def test_a_mixture_of_experts_is_not_judged(setting, monkeypatch):
    monkeypatch.setattr(fits, "device_memory", lambda device: 1)
    config, args, model, pairs = setting()
    model.config.num_local_experts = 4
    assert "mixture of experts" in check_fits(config, args, model, pairs)


@pytest.fixture
def no_other_plans(monkeypatch):
    """Leaves out the plans of what would fit instead, seconds for each run that does not."""
    monkeypatch.setattr(fits, "planned_variants", lambda *_: iter(()))


def test_a_run_that_cannot_fit_stops_before_its_first_step(tmp_path, monkeypatch, capsys, no_other_plans):
    monkeypatch.setattr(fits, "device_memory", lambda device: memory_there.HELD_BY_LIBRARIES + 2**20)
    monkeypatch.setattr("perce.training.trainer.PerceTrainer.train", lambda *_: pytest.fail("found too late"))
    model, data = save_tiny_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", ROWS)
    flags = {"model": model, "data": data, "output_dir": tmp_path / "run", "max_steps": 2, "precision": "fp32"}
    assert main([word for name, value in flags.items() for word in (f"--{name}", str(value))]) == 2
    error = capsys.readouterr().err
    assert "The largest step" in error and "GiB are available" in error and "--max_length" in error


def test_planned_options_are_valid_for_any_pair(setting):
    config, args, _, _ = setting()
    for persona, query, response in [(0, 1, 30), (1, 1, 1), (5, 1, 200)]:
        plan, _ = largest_step(config, args, SimpleNamespace(train=Dataset.from_list([pair(persona, query, response)])))
        assert isinstance(plan, StepConfig)


def test_the_backend_of_the_run_is_planned(setting, monkeypatch):
    planned = []
    peak_memory = fits.peak_memory
    monkeypatch.setattr(
        fits, "peak_memory", lambda config, setup, *rest: planned.append(setup) or peak_memory(config, setup, *rest)
    )
    monkeypatch.setenv("PERCE_BACKEND", "reference")
    assert check_fits(*setting()) is None
    assert check_fits(*setting(backend="torch")) is None
    assert [setup.model.backend for setup in planned] == ["reference", "torch"]


@pytest.mark.parametrize("thought", [False, True])
def test_the_largest_step_of_conversations_is_what_a_batch_of_them_computes(setting, thought):
    """The largest step is one whole conversation, two that are alike, or a piece of a longer one."""
    config, args, *_ = setting(per_device_train_batch_size=4)
    for replies, first, last in (([4], 0, 4), ([2, 2], 0, 4), ([8], 4, 8)):
        talks = [conversation(n, number, thought, 60) for number, n in enumerate(replies)]
        talks.append(conversation(2, 9, thought, persona=5))
        pairs = [pair | {"example": 0} for talk in talks for pair in talk]
        plan, _ = largest_step(config, args, SimpleNamespace(train=Dataset.from_list(pairs)), "branches")
        shape, batch = shape_of(plan, MemoryConfig()), collate(pairs[first:last], sharing="branches")
        assert plan.branches == thought and plan.per_device_train_batch_size == 4
        assert len(shape.segments) == len(batch["spans"].spans)
        computed_cf = sum(len(segment.ids) for segment in shape.segments_cf)
        assert (shape.computed, computed_cf) == pytest.approx(
            (batch["input_ids"].numel(), batch["input_ids_cf"].numel()), rel=0.1
        )
        assert abs(shape.rows - len(batch["target"])) < 4


def test_a_forward_of_many_short_talks_or_few_long_replies(setting):
    """A conversation of three replies has more tokens than three separate pairs, but fewer are computed."""
    config, args, *_ = setting(per_device_train_batch_size=3)
    talk = conversation(3, 0, persona=60)
    alone = [pair(50, 20, 10) | {"conversation": number} for number in (7, 8, 9)]
    plan, _ = largest_step(
        config, args, SimpleNamespace(train=Dataset.from_list([p | {"example": 0} for p in talk + alone])), "branches"
    )
    assert (plan.context, plan.replies, plan.per_device_train_batch_size) == (80, 1, 3)
    budget = replace(config, run=RunConfig(tokens_per_batch=400))
    talks = [p | {"example": 0} for number in range(9) for p in conversation(3, number, persona=60)]
    plan, _ = largest_step(budget, args, SimpleNamespace(train=Dataset.from_list(talks)), "branches")
    assert plan.replies == 3 and 250 < shape_of(plan, MemoryConfig()).computed <= 400
    assert largest_step(config, args, SimpleNamespace(train=Dataset.from_list(talks)), "none")[0].replies == 1


@pytest.mark.parametrize("how", [{}, {"branches_per_forward": 1}, {"persona_grad": "none"}], ids=str)
def test_the_largest_step_of_requests_is_what_a_batch_of_them_computes(setting, how):
    memory = MemoryConfig(share_persona=4, **how)
    config, args, *_ = setting(per_device_train_batch_size=8)
    config = replace(config, memory=memory)
    pairs = [
        p for n, count in enumerate((8, 1, 3, 4)) for p in requests(count, persona=90 if count == 8 else 20, number=n)
    ]
    plan, planned = largest_step(config, args, SimpleNamespace(train=Dataset.from_list(pairs)), "branches")
    batch = collate(pairs[:8], sharing="branches", unit="persona", **how)  # the eight of one persona
    shape = shape_of(plan, planned)
    # They are drawn in two groups of four, which share their common tokens if they are in one batch.
    assert (planned.share_persona, shape.personas, plan.per_device_train_batch_size) == (8, 1, 8)
    assert shape.computed == pytest.approx(int((batch["uses"] > 0).sum()), rel=0.1)
    assert abs(shape.rows - len(batch["target"])) < 8
    for sharing in ("none", "chains"):
        _, planned = largest_step(config, args, SimpleNamespace(train=Dataset.from_list(pairs)), sharing)
        assert planned.share_persona == (8 if sharing == "chains" and how else 0)


@pytest.mark.parametrize("long_ones", ["many requests", "one request"])
def test_personas_of_very_different_length_are_planned_as_they_are(setting, long_ones):
    """One user of 900 tokens with eight requests and eight users of 30 tokens with one, and the other way round."""
    config, args, *_ = setting(per_device_train_batch_size=16)
    config = replace(config, memory=MemoryConfig(share_persona=8))
    many, one = (900, 30) if long_ones == "many requests" else (30, 900)
    pairs = [*requests(8, persona=many), *(p for n in range(1, 9) for p in requests(1, persona=one, number=n))]
    step, memory = largest_step(config, args, SimpleNamespace(train=Dataset.from_list(pairs)), "branches")
    computed = int((collate(pairs, sharing="branches", unit="persona")["uses"] > 0).sum())
    assert shape_of(step, memory).computed == pytest.approx(computed, rel=0.15)


@pytest.mark.parametrize("with_remedies", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_requests_that_do_not_fit_are_told_as_such(setting, monkeypatch, request, with_remedies):
    if not with_remedies:
        request.getfixturevalue("no_other_plans")
    monkeypatch.setattr(fits, "device_memory", lambda device: memory_there.HELD_BY_LIBRARIES + 2**18)
    config, args, model, _ = setting(per_device_train_batch_size=3)
    config = replace(config, memory=MemoryConfig(share_persona=3))
    pairs = SimpleNamespace(train=Dataset.from_list(requests(3, persona=90)))
    with pytest.raises(UserError, match=r"The largest step, 3 requests in \d+ tokens per forward pass, takes"):
        check_fits(config, args, model, pairs, "branches")


def test_a_budget_cuts_requests_as_a_run_does(setting, budget=260):
    config, args, *_ = setting()
    config = replace(config, memory=MemoryConfig(share_persona=8), run=RunConfig(tokens_per_batch=budget))
    pairs = Dataset.from_list([pair for number in range(4) for pair in requests(8, persona=90, number=number)])
    step, memory = largest_step(config, args, SimpleNamespace(train=pairs), "branches")
    assert memory.share_persona > 1 and 0.7 * budget < shape_of(step, memory).computed <= 1.1 * budget


@pytest.mark.slow
def test_a_conversation_that_does_not_fit_is_told_in_replies(setting, monkeypatch):
    monkeypatch.setattr(fits, "device_memory", lambda device: memory_there.HELD_BY_LIBRARIES + 2**20)
    config, args, model, _ = setting(per_device_train_batch_size=8)
    pairs = Dataset.from_list([pair | {"example": 0} for pair in conversation(8, thought=True, persona=60)])
    with pytest.raises(UserError, match=r"The largest step, 8 replies in \d+ tokens per forward pass, takes"):
        check_fits(config, args, model, SimpleNamespace(train=pairs), "branches")
