"""The page of tables that is committed, and the pictures of the committed results."""

import re

import pytest

from benchmarks import study_pictures, study_report, study_results
from benchmarks.pictures import THEMES
from perce.objectives import OBJECTIVES
from tests.helpers import ROOT

COMMITTED = [ROOT / "benchmarks" / "results" / f"study_{name}.json" for name in ("cpu", "control", "control_tweets")]


@pytest.fixture(scope="module")
def results():
    return study_results.Results(COMMITTED[0])


@pytest.fixture(scope="module")
def reports():
    """The lines of each committed study, without its pictures, which are tested below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_report, "write", lambda *_: None)
        return [[*study_report.report(study_results.Results(path))] for path in COMMITTED]


def test_the_committed_page_is_what_its_command_writes(reports):
    assert study_report.page(reports) == (ROOT / "docs" / "reference" / "study.md").read_text(encoding="utf-8")


def test_the_command_writes_the_page_and_the_pictures(tmp_path, monkeypatch):
    (tmp_path / "reference").mkdir()
    monkeypatch.setattr(study_report, "DOCS", tmp_path)
    monkeypatch.setattr(study_report, "comparison", lambda _: iter(()))  # its intervals take most of the time
    monkeypatch.setattr("sys.argv", ["study_report", str(COMMITTED[1])])
    study_report.main()
    assert "## Study" in (tmp_path / "reference" / "study.md").read_text(encoding="utf-8")
    assert len([*(tmp_path / "images").iterdir()]) == 2


def test_a_study_has_the_parts_that_it_ran(reports):
    cpu, control, tweets = ({line for line in lines if "###" in line} for lines in reports)
    shared = {"\n### personachat-convai2\n", "\n### Personal against other tokens\n"}
    assert control == shared and len(cpu - control) == 5
    clips = "\n### Clips, normalisations, schedules\n"
    assert tweets == {"\n### lamp7-tweets\n", "\n### Personal against other tokens\n", clips}
    lines = "\n".join(reports[1])
    assert "The learning rate is 0.0004." in lines and "| **PerCE** minus WordMatch |" in lines
    paired = [sum("clip_max 2.0 minus **PerCE** |" in line for line in lines) for lines in reports]
    assert paired == [0, 0, 2], "only there variants have generated replies"


def test_the_numbers_of_the_results_page_are_those_of_the_tables():
    page = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    page = page[page.index("## Does PerCE learn") : page.index("## What others found")]
    told = set(re.findall(r"\b\d\.\d{3}\b", page))
    tables = set(re.findall(r"\b\d\.\d{3}\b", (ROOT / "docs/reference/study.md").read_text(encoding="utf-8")))
    assert len(told) > 50 and told <= tables, told - tables


def test_intervals_of_shares_end_where_shares_do(results):
    """The base model's replies use the persona in 6 % of cases: a plain interval begins below 0."""
    column = "replies that use the persona, %"
    for data in results.config["data"]:
        for objective in results.objectives:
            text = study_report.cell_text(results.main(data, objective), data, column)
            low, high = map(float, re.search(r"\((.*) to (.*)\)", text).groups())
            assert 0 <= low < float(text.split()[0]) < high <= 100


def test_differences_are_told_by_pairs_of_seeds(results):
    data = next(iter(results.config["data"]))
    mine, ce = results.main(data, "perce"), results.main(data, "ce")
    pairs = study_results.by_pairs_of_seeds(mine, ce, data, study_pictures.PERSONAL)
    (text,) = study_report.difference_texts(mine, ce, data, [study_pictures.PERSONAL])
    assert len(pairs) == 4 and text.endswith(f"; seeds {min(pairs):+.3f} to {max(pairs):+.3f})")
    (text,) = study_report.difference_texts(mine[:1], ce[:1], data, [study_pictures.PERSONAL])
    assert "seeds" not in text


def words(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.suffix or "light")
def test_the_trade_names_units_methods_seeds_and_sizes(results, theme):
    figure = study_pictures.draw_trade(results, theme)
    assert len(figure.axes) == 2
    for axes, data, size in zip(figure.axes, results.config["data"], ("47 replies, 9 users", "69 replies, 69 users"),
                                strict=True):  # fmt: skip
        assert axes.get_xlabel() == "loss on other tokens, nats per token"
        assert axes.get_ylabel() == "loss on personal tokens, nats per token"
        assert {data, "better", "CE", "PerCE", "LossCE", "EntCE"} <= {*words(axes)}
        assert words(axes).count("0") == words(axes).count("1") == 4
        assert size in axes.get_title(loc="left") and "learning rate 0.0004" in axes.get_title(loc="left")
        assert len({tuple(map(tuple, dots.get_paths()[0].vertices)) for dots in axes.collections}) == 4, "markers"


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.suffix or "light")
def test_every_objective_has_a_look_of_its_own(theme):
    looks = [study_pictures.look(name, theme) for name in OBJECTIVES]
    for part in ("color", "marker"):
        assert len({look[part] for look in looks}) == len(OBJECTIVES)


def test_a_cross_spans_the_interval_of_the_difference_from_ce(results):
    data = next(iter(results.config["data"]))
    across, up = study_pictures._cross(results, data, "perce")
    found = study_results.difference(
        results.main(data, "perce"), results.main(data, "ce"), data, study_pictures.PERSONAL
    )
    assert found and up[1][1] - up[0][1] == pytest.approx(found[0].high - found[0].low)
    assert across[0][1] == across[1][1] == pytest.approx(1.853, abs=1e-3), "PerCE's mean over seeds"
    assert study_pictures._cross(results, data, "ce") == []


def test_the_variants_are_named_in_the_order_of_their_points(results):
    found = study_results.searched(results)
    figure = study_pictures.draw_variants(found, THEMES[0])
    for axes, data in zip(figure.axes, results.config["data"], strict=True):
        kept = {x.name: x.kept for x in found if x.data == data and x.cell["stage"] == "variants"}
        labels = [text for text in axes.texts if text.get_text() in kept]
        heights = {text.get_text(): text.xyann[1] for text in labels}
        assert sorted(kept, key=kept.get) == sorted(heights, key=heights.get) and len(kept) == 10
        assert {"PerCE", "CE", "better", data} <= {*words(axes)}
    assert figure.axes[-1].get_xlabel() == study_results.COST and figure.get_supylabel() == study_results.KEPT
