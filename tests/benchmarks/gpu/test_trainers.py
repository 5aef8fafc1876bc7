"""Steps by other people's trainers beside ours, on a tiny double of the model."""

import pytest

pytest.importorskip("triton")
from benchmarks.gpu import trainers
from benchmarks.trainers import make_model
from perce.config.schema import ModelConfig
from perce.model import loading
from tests.helpers.stages import lines_of


@pytest.mark.slow
def test_steps_by_other_trainers():
    found = lines_of(trainers.stage, "trainers", seconds=270)
    again = {f"{way}/300, again" for way in ("perce", "perce-ce", "perce-waits")}
    assert found.keys() == {f"{way}/300" for way in trainers.WAYS} | again
    assert list(found)[:4] == ["perce/300", "perce-ce/300", "perce-waits/300", "perce/300, again"], "in turn"
    lines = {
        way: found[f"{way}/300"] for way in ("perce", "perce-ce", "perce-waits", "naive-ce", "naive-kept", "naive")
    }
    for way, line in lines.items():
        assert line["seconds"] > 0 and line["peak_bytes"] >= line["peak_extra_bytes"]
        of_the_same_loss = lines["perce-ce" if way.endswith("-ce") else "perce"]
        assert line["loss"] == pytest.approx(of_the_same_loss["loss"], rel=1e-3), "and no adapter of the one before"
    assert "need a GPU" in found["perce-liger/300"]["reason"]


def test_a_trainer_leaves_the_model_as_it_was():
    model = make_model("tiny")
    before = {name: type(module) for name, module in model.named_modules()}
    loading.add_adapter(model, loading.lora_config(ModelConfig(lora_r=2)))
    assert len(list(model.modules())) > len(before)
    trainers.remove_adapter(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
