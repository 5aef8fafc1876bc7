"""The study end to end on a tiny model and data set: every stage, its results file, resume, and the report."""

import json
from dataclasses import asdict

import pytest

from benchmarks import study, study_report, study_results
from perce import evaluate, train
from perce.demo import DATA_DIR
from tests.helpers.tiny import save_tiny_model

CONFIG = {
    "name": "tiny", "data": {"one": {}, "two": {"limit": 7}}, "tuned": ["ce", "perce"], "untuned": ["lossce"],
    "learning_rates": [1e-3, 1e-2], "seeds": [0, 1],
    "train": {"max_steps": 2, "lora_r": 2, "max_length": 600, "eval_examples": 2},
    "evaluate": {"limit": 8, "max_new_tokens": 4, "max_length": 600}, "variants": [{"clip_min": 0.2}],
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the study with its children in this process; returns it and the names of the commands that ran."""
    save_tiny_model(tmp_path / "model")
    for data in CONFIG["data"]:
        (tmp_path / "data" / data).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
            (tmp_path / "data" / data / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_report, "ROOT", tmp_path)
    monkeypatch.setattr(study_report, "DOCS", tmp_path / "docs")
    for directory in ("results", "docs"):
        (tmp_path / directory).mkdir()
    commands = []

    def child(self, module, options, log):
        commands.append(module)
        main = {"perce.train": train.main, "perce.evaluate": evaluate.main}[module]
        assert main([f"--{name}={value}" for name, value in options.items()]) == 0

    monkeypatch.setattr(study.Study, "_child", child)

    def run(**changes):
        commands.clear()
        config = CONFIG | {"model": str(tmp_path / "model")} | changes
        running = study.Study(config, tmp_path / "data", 1)
        running.run()
        return running, list(commands)

    return run


@pytest.mark.slow
def test_every_stage_runs_once_and_is_reported(run, tmp_path, monkeypatch, capsys):
    running, commands = run()
    cells = running.results["cells"]
    # a data set: base, 2 objectives × 2 rates, 2 × the other seed, lossce × 2 seeds, 1 variant
    assert len(cells) == 2 * (1 + 4 + 2 + 2 + 1)
    assert commands.count("perce.train") == 2 * 9
    for cell in running.main_cells():
        tested = {"one", "two"} if cell.seed == 0 else {cell.data}
        assert set(cells[cell.name]["evaluations"]) == tested, "transfer is measured, on the first seed"
    for cell in (*running.other_rate_cells(), *running.variant_cells()):
        assert set(cells[cell.name]["evaluations"]) == {cell.data}
    assert len(cells["one-base"]["evaluations"]["two"]["records"]) == 7, "a data set's own evaluation options"
    record = cells["one-base"]["evaluations"]["one"]["records"][0]
    assert record["tokens"] > 0 and "reply" not in record, "texts belong to the data"

    again, commands = run()
    assert not commands and again.results["cells"].keys() == cells.keys()
    del again.results["cells"]["two-base"]
    again._save()
    _, commands = run()
    assert commands == ["perce.evaluate"] * 2, "only what is missing"
    with pytest.raises(SystemExit, match="its cells ran with different settings of train"):
        run(train={"max_steps": 3})

    results = study_results.Results(tmp_path / "results" / "study_tiny.json")
    monkeypatch.setattr("sys.argv", ["study_report", str(results.path)])
    study_report.main()
    text = (tmp_path / "docs" / "reference" / "study.md").read_text(encoding="utf-8")
    assert text.startswith("# Tables of the studies\n") and "not run" not in text.lower()
    metric = cells["one-base"]["evaluations"]["one"]["metrics"]["loss_personal_tokens"]["value"]
    assert f"| base model | {metric:.3f} (" in text and "PerCE** minus CE" in text and "| clip_min 0.2 |" in text
    for name in ("study_tiny", "study_tiny_dark"):
        assert (f'../images/{name}.png"' in text) and (tmp_path / "docs/images" / f"{name}.png").stat().st_size > 5000


def results_of(tmp_path, *losses):
    """Results of one data set: (stage, objective, options, loss on personal tokens, on others), on the first seed."""
    cells = {}
    for number, (stage, objective, options, personal, other) in enumerate(losses):
        metrics = {"loss_personal_tokens": {"value": personal}, "loss_other_tokens": {"value": other}}
        cells[str(number)] = {
            "stage": stage, "data": "one", "objective": objective, "learning_rate": 1e-3, "seed": 0, "options": options,
            "validation": {"eval_loss_with_persona": 1.0}, "evaluations": {"one": {"metrics": metrics, "records": []}},
        }  # fmt: skip
    config = CONFIG | {"data": {"one": {}}, "learning_rates": [1e-3]}
    (tmp_path / "results.json").write_text(json.dumps({"config": config, "cells": cells}))
    return study_results.Results(tmp_path / "results.json")


CE, PERCE = ("rates", "ce", {}, 3.0, 2.0), ("rates", "perce", {}, 2.0, 2.1)
GENTLE = ("variants", "perce", {"clip_min": 1.0}, 2.25, 2.02)


def test_what_a_variant_keeps_and_costs(tmp_path, monkeypatch):
    found = study_results.searched(results_of(tmp_path, CE, PERCE, GENTLE))
    assert [x.name for x in found] == ["CE", "**PerCE**", "clip_min 1.0"]
    assert [x.cost for x in found] == pytest.approx([0, 5, 1]) and [x.kept for x in found] == pytest.approx(
        [0, 100, 75]
    )


def test_without_a_gain_or_perce_there_is_nothing_to_keep_but_a_cost(tmp_path):
    for others in ([(*PERCE[:3], 3.1, 2.1)], []):
        *_, variant = study_results.searched(results_of(tmp_path, CE, *others, GENTLE))
        assert variant.cost == pytest.approx(1) and variant.kept is None
    *_, variant = study_results.searched(results_of(tmp_path, PERCE, GENTLE))
    assert (variant.cost, variant.kept) == (None, None)
    texts = [study_report.share_text(x, form) for x, form in ((-0.04, "+.1f"), (-0.3, ".0f"), (-1, ".0f"), (None, ""))]
    assert texts == ["0.0", "0", "-1", "not measured"]


def test_the_rate_is_picked_by_validation_and_untuned_objectives_take_perces(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    running = study.Study(CONFIG, tmp_path, 1)
    losses = {("ce", 1e-3): 2.0, ("ce", 1e-2): 3.0, ("perce", 1e-3): 2.5, ("perce", 1e-2): 2.4}
    for cell in running.rate_cells():
        loss = losses[cell.objective, cell.learning_rate]
        running.results["cells"][cell.name] = asdict(cell) | {"validation": {"eval_loss_with_persona": loss}}
    rates = [running.best_rate("one", objective) for objective in ("ce", "perce", "lossce")]
    assert rates == [1e-3, 1e-2, 1e-2]
    names = [cell.name for cell in running.main_cells()]
    assert len(set(names)) == len(names) == 12 and "one-lossce-0.01-seed1" in names
    assert json.loads(json.dumps(names))


def test_a_failing_child_is_named_and_keeps_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    running = study.Study(CONFIG, tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"perce.compare failed with code \d+; see .*one-base-on-one"):
        running._child("perce.compare", {"nonsense": 1}, tmp_path / "one-base-on-one")
    assert (tmp_path / "one-base-on-one.compare.log").is_file()
