"""The curves of a run."""

import struct

import pytest

from perce.report.curves import draw_curves, write_curves

HISTORY = [
    {"step": 5, "loss": 2.5, "ce": 2.6, "pir_mean": 0.6, "weight_mean": 1.2, "frac_at_floor": 0.7},
    {"step": 10, "loss": 2.1, "ce": 2.4, "pir_mean": 0.8, "weight_mean": 1.3, "frac_at_floor": 0.6},
    {"step": 10, "eval_loss_with_persona": 2.0, "eval_loss_without_persona": 3.0, "eval_pir_mean": 1.0},
    {"step": 10, "train_runtime": 3.0, "train_loss": 2.3},
]


@pytest.mark.parametrize(
    ("history", "panels"),
    [
        (HISTORY, 4),
        (HISTORY[:1], 4),
        ([HISTORY[0] | {"router_aux_loss": 2.1}], 5),
        ([{"step": 1, "loss": float("nan"), "ce": None, "eval_pir_mean": 0.5}, {"loss": 1.0}], 1),
        ([], 0),
    ],
)
def test_curves_are_a_png_whatever_was_logged(tmp_path, history, panels):
    path = tmp_path / "sub" / "curves.png"
    write_curves(path, history)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (720 * min(max(panels, 1), 2), 465 * max((panels + 1) // 2, 1))


def curves(axes):
    """label → ([steps], [values]) of the curves in a panel."""
    lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines.items()}


def test_training_and_validation_are_drawn_on_one_scale():
    """Cross-entropies: the weighted loss, which they do not compare with, has a panel of its own."""
    evaluated = HISTORY[2] | {"eval_loss_personal_tokens": 2.8}
    first, second, third, _ = draw_curves([*HISTORY, evaluated]).axes
    assert curves(first) == {
        "training": ([5, 10], [2.6, 2.4]), "validation": ([10, 10], [2.0, 2.0]),
        "validation, no persona": ([10, 10], [3.0, 3.0]), "validation, personal tokens": ([10], [2.8]),
    }  # fmt: skip
    low, high = first.get_ylim()
    assert low <= 2.0 and high >= 3.0
    assert curves(second) == {"training": ([5, 10], [2.5, 2.1])}
    assert set(curves(third)) == {"PIR, training", "PIR, validation", "weight, training"}


def test_every_axis_says_its_unit():
    figure = draw_curves([HISTORY[0] | {"router_aux_loss": 2.1}])
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_ylabel() for axes in shown] == [
        "nats per token", "weighted nats per token", "PIR in nats; weight", "% of the response tokens",
        "experts per token",
    ]  # fmt: skip
    assert {axes.get_xlabel() for axes in shown} == {"training step"}
    assert len({axes.get_title(loc="left") for axes in shown}) == len(shown)


def test_of_documents_the_short_context_is_named():
    figure = draw_curves(HISTORY, documents=True)
    third = figure.axes[2]
    words = " ".join([*curves(figure.axes[0]), *curves(third), third.get_title(loc="left"), third.get_ylabel()])
    assert "validation, short context" in words and "persona" not in words and "PIR" not in words


def test_a_step_is_marked_in_every_panel_and_named_in_one():
    figure = draw_curves(HISTORY, marked=(10, "saved"))
    for axes in figure.axes:
        assert [10, 10] in [list(line.get_xdata()) for line in axes.get_lines() if line.get_label().startswith("_")]
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["step 10, saved"]
    assert not any(axes.texts for axes in draw_curves(HISTORY).axes)
