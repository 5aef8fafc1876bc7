"""The curves of a run: `trainer_state.log_history` as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from perce.environment import in_one_move

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Panel(NamedTuple):
    title: str
    unit: str
    series: tuple[tuple[str, str, str], ...]
    """(key in the log, label, colour)"""


_BLUE, _ORANGE, _GREY = "#2d69e1", "#d9822b", "#7a808c"
_PANELS = (
    _Panel("Training loss", "nats", (("loss", "weighted", _BLUE), ("ce", "unweighted (CE)", _GREY))),
    _Panel(
        "Evaluation loss",
        "nats",
        (("eval_loss_with_persona", "with persona", _BLUE), ("eval_loss_without_persona", "without persona", _GREY)),
    ),
    _Panel(
        "Persona influence (PIR) and weight",
        "mean per token",
        (("pir_mean", "PIR", _BLUE), ("eval_pir_mean", "PIR, evaluation", _ORANGE), ("weight_mean", "weight", _GREY)),
    ),
    _Panel("Tokens at the clip", "%", (("frac_at_floor", "floor", _GREY), ("frac_at_ceiling", "ceiling", _BLUE))),
    _Panel("Router", "experts a token where balanced", (("router_aux_loss", "load-balancing loss", _BLUE),)),
)


def write_curves(path: str | Path, log_history: Sequence[Mapping[str, Any]]) -> None:
    """Draw `trainer_state.log_history` as a PNG. Panels of which nothing was logged are left out."""
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(_points(log_history, key) for key, _, _ in panel.series)]
    columns = min(len(panels), 2) or 1
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(4.8 * columns, 3.1 * rows), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, log_history)
    for ax in list(axes)[len(panels) :]:
        ax.set_axis_off()
    if not panels:
        figure.text(0.5, 0.5, "Nothing logged yet", ha="center", color=_GREY)
    with in_one_move(Path(path)) as unfinished:
        figure.savefig(unfinished, format="png")


def _draw(ax: Axes, panel: _Panel, log_history: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    scale = 100 if panel.unit == "%" else 1
    for key, label, colour in panel.series:
        points = _points(log_history, key)
        if points:
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) <= 12 else None  # a single point has no line to be seen by
            ax.plot(steps, [scale * v for v in values], color=colour, label=label, lw=1.7, marker=marker, ms=3.5)
    ax.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color="#1b1d22", pad=22)
    ax.set_xlabel("step", fontsize=8.5, color=_GREY)
    ax.set_ylabel(panel.unit, fontsize=8.5, color=_GREY)
    ax.tick_params(labelsize=8.5, colors=_GREY, length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    ax.set_xlim(left=0)
    ax.grid(axis="y", color="#e8e8e4", lw=0.8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#d5d5d0")
    # Above the axes, so that it never lies on a curve.
    spacing = {"handlelength": 1.2, "columnspacing": 1.4, "borderpad": 0, "borderaxespad": 0.5}
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8.5, **spacing)


def _points(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that hold a finite number under `key`."""
    return [(r["step"], r[key]) for r in log_history if "step" in r and _is_finite_number(r.get(key))]


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
