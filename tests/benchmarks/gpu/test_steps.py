"""Steps of a large model, on a tiny double of it."""

import pytest

pytest.importorskip("triton")
from benchmarks.gpu import steps
from tests.helpers.stages import lines_of


@pytest.mark.slow
def test_steps_of_a_model_with_random_weights():
    found = lines_of(steps.stage, "steps")
    for case in steps.CASES["steps"]["cpu"]:
        line = found[str(case)]
        assert line["seconds"] > 0 and line["tokens_per_second"] > 0 and line["peak_bytes"] is None
        assert found[f"{case}/plan"]["planned_bytes"] > 0
    assert found["perce/96/plan"]["planned_flop"] > found["ce/96/plan"]["planned_flop"]
    assert found["perce/160/plan"]["planned_flop"] > found["perce/160, persona_grad none/plan"]["planned_flop"]
    assert found["perce/96/kernels"] == {"kernels": {}, "sum": 0}, "no device, no kernel"


@pytest.mark.slow
def test_a_long_step():
    for stage in ("long", "longest"):
        (case,) = steps.CASES[stage]["cpu"]
        found = lines_of(steps.stage, stage)
        assert found.keys() == {str(case), f"{case}/plan"} and found[str(case)]["seconds"] > 0
    assert str(case) == "perce/200, mlp_tile 32"


@pytest.mark.slow
def test_steps_by_attention():
    found = lines_of(steps.stage, "attention")
    assert found["perce/160"]["seconds"] > 0 and found["perce/160, eager"]["seconds"] > 0
    assert found["perce/160, eager/plan"]["planned_bytes"] > found["perce/160/plan"]["planned_bytes"], "T × T"


@pytest.mark.slow
def test_steps_on_requests_for_one_persona():
    found = lines_of(steps.stage, "personas")
    cases = steps.CASES["personas"]["cpu"]
    assert [str(case) for case in cases] == [
        "perce/160", "perce/160, 3 requests", "perce/160, 3 requests, one by one",
        "perce/160, 3 requests, persona_grad none", "perce/160, 3 requests, one by one, persona_grad none",
    ]  # fmt: skip
    assert all(found[str(case)]["seconds"] > 0 and found[f"{case}/plan"]["planned_bytes"] > 0 for case in cases)
    work = [found[f"{case}/plan"]["planned_flop"] for case in cases]
    assert work[0] < work[3] < work[1] < 3 * work[0], "the persona once"


@pytest.mark.slow
def test_steps_go_on_after_a_crash(monkeypatch):
    monkeypatch.setattr(steps, "CASES", {"steps": {"cpu": (steps.Case("perce", 64), steps.Case("ce", 64))}})
    found = lines_of(steps.stage, "steps", finished=["steps/perce/64/plan"], lost={"steps/perce/64": "it crashed"})
    assert "perce/64" not in found and found["ce/64"]["seconds"] > 0


def test_steps_without_the_training_layers_needs_say_which(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(steps, "Steps", missing)
    assert lines_of(steps.stage, "steps")["model"]["reason"].endswith("needs datasets, which is not installed")
