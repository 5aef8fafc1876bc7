"""The curves of a run: `trainer_state.log_history` as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from perce.files.outputs import in_one_move

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Panel(NamedTuple):
    title: str
    unit: str
    """Of the vertical axis."""
    series: tuple[tuple[str, str, str], ...]
    """(key in the log, label, colour)"""
    scale: float = 1


_BLUE, _ORANGE, _GREEN, _GREY = "#2d69e1", "#d9822b", "#2f8f63", "#7a808c"


def _panels(documents: bool) -> tuple[_Panel, ...]:
    """Curves that can be compared share a panel: the weighted loss is in none with a cross-entropy."""
    other, contrast = ("short context", "Log-ratio") if documents else ("no persona", "PIR")
    return (
        _Panel(
            "Cross-entropy of the responses", "nats per token",
            (("ce", "training", _BLUE), ("eval_loss_with_persona", "validation", _ORANGE),
             ("eval_loss_without_persona", f"validation, {other}", _GREY),
             ("eval_loss_personal_tokens", "validation, personal tokens", _GREEN)),
        ),
        _Panel("Training loss: weighted cross-entropy", "weighted nats per token", (("loss", "training", _BLUE),)),
        _Panel(
            f"{contrast} and weight, means over tokens", f"{contrast} in nats; weight",
            (("pir_mean", f"{contrast}, training", _BLUE), ("eval_pir_mean", f"{contrast}, validation", _ORANGE),
             ("weight_mean", "weight, training", _GREY)),
        ),
        _Panel(
            "Tokens at the bounds of the clip", "% of the response tokens",
            (("frac_at_floor", "floor", _GREY), ("frac_at_ceiling", "ceiling", _BLUE)), 100,
        ),
        _Panel(
            "Load-balancing loss of the experts", "experts per token",
            (("router_aux_loss", "training; equals the experts per token at equal load", _BLUE),),
        ),
    )  # fmt: skip


def write_curves(
    path: str | Path, log_history: Sequence[Mapping[str, Any]], *, documents: bool = False,
    marked: tuple[int, str] | None = None,
) -> None:  # fmt: skip
    """Draw `trainer_state.log_history` as a PNG. `marked`: a step and what it is, such as (60, "saved")."""
    figure = draw_curves(log_history, documents=documents, marked=marked)
    with in_one_move(Path(path)) as unfinished:
        figure.savefig(unfinished, format="png")


def draw_curves(
    log_history: Sequence[Mapping[str, Any]], *, documents: bool = False, marked: tuple[int, str] | None = None
) -> Figure:  # fmt: skip
    """The panels of which something was logged."""
    from matplotlib.figure import Figure

    panels = [panel for panel in _panels(documents) if any(_points(log_history, key) for key, _, _ in panel.series)]
    columns = min(len(panels), 2) or 1
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(4.8 * columns, 3.1 * rows), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel, log_history)
        if marked:
            ax.axvline(marked[0], color=_GREY, lw=1, ls=(0, (4, 3)), zorder=0)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if marked and panels:
        _name(axes[0], *marked)
    if not panels:
        figure.text(0.5, 0.5, "Nothing logged yet", ha="center", color=_GREY)
    return figure


def _draw(ax: Axes, panel: _Panel, log_history: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for key, label, colour in panel.series:
        points = _points(log_history, key)
        if points:
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) <= 12 else None  # a single point has no line to be seen by
            scaled = [panel.scale * value for value in values]
            ax.plot(steps, scaled, color=colour, label=label, lw=1.7, marker=marker, ms=3.5, clip_on=False)
    two_rows = len(ax.get_lines()) > 3
    ax.set_title(
        panel.title, loc="left", fontsize=10, fontweight="bold", color="#1b1d22", pad=36 if two_rows else 22
    )  # fmt: skip
    ax.set_xlabel("training step", fontsize=8.5, color=_GREY)
    ax.set_ylabel(panel.unit, fontsize=8.5, color=_GREY)
    ax.tick_params(labelsize=8.5, colors=_GREY, length=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    ax.set_xlim(left=0)
    ax.grid(axis="y", color="#e8e8e4", lw=0.8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#d5d5d0")
    # Above the axes, so that it never lies on a curve.
    spacing = {"handlelength": 1.2, "columnspacing": 1.4, "borderpad": 0, "borderaxespad": 0.5}
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2 if two_rows else 3, frameon=False, fontsize=8.5, **spacing
    )  # fmt: skip


def _name(ax: Axes, step: int, what: str) -> None:
    """The words of the line at a step, on the side of it where there is room."""
    late = step > sum(ax.get_xlim()) / 2
    ax.annotate(
        f"step {step}, {what}", (step, 0.97), (-4 if late else 4, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right" if late else "left", va="top", fontsize=8.5, color=_GREY,
    )  # fmt: skip


def _points(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that hold a finite number under `key`."""
    return [(r["step"], r[key]) for r in log_history if "step" in r and _is_finite_number(r.get(key))]


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
