"""The curves of a run."""

import struct

import pytest

from perce.report.curves import write_curves

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
        (HISTORY[:1], 3),
        ([HISTORY[0] | {"router_aux_loss": 2.1}], 4),
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
