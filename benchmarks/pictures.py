"""Pictures of the documentation: each is drawn for light and for dark pages, and a page shows the one that suits it."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

Point = tuple[float, float]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Theme(NamedTuple):
    suffix: str
    """Of the file's stem."""
    paper: str
    ink: str
    faint: str
    """Of axes, their labels and lines that lead from a label to its point."""
    colours: tuple[str, ...]


THEMES = (
    Theme("", "#ffffff", "#1b1d21", "#5c636d",
          ("#2458d3", "#5f6670", "#b3560b", "#1d7a52", "#7b46b0", "#b5322a", "#76592a", "#127a8a", "#8f2a6b")),
    Theme("_dark", "#0d1117", "#e6edf3", "#9aa4af",
          ("#7aa7ff", "#b0b8c3", "#f0a35e", "#5fc796", "#c39bf0", "#f2877f", "#d0b27c", "#63c7d6", "#e79ac9")),
)  # fmt: skip
MARKERS = ("D", "o", "s", "^", "p", "h", "8", "v", "P")  # told apart without colours; as many as colours


def write(draw: Callable[[Theme], "Figure"], path: Path) -> None:
    """PATH.png and PATH_dark.png; the same bytes each time."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        settings = {
            "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
            "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint,
            "xtick.color": theme.faint, "ytick.color": theme.faint, "figure.dpi": 150, "savefig.dpi": 150,
            "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.labelsize": 10,
        }  # fmt: skip
        with rc_context(settings):
            draw(theme).savefig(path.with_stem(path.stem + theme.suffix), metadata={"Software": None})


def embedded(name: str, text: str, directory: str) -> str:
    """A picture that `write` wrote, in Markdown; `text` for those who do not see it."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{directory}/{name}_dark.png">'
    return f'<picture>{dark}<img alt="{escape(text)}" src="{directory}/{name}.png"></picture>'


def title(ax: "Axes", first: str, second: str, theme: Theme) -> None:
    """A bold line, and below it a plain one that says how much stands behind the panel."""
    ax.set_title(second, loc="left", fontsize=9, color=theme.faint)
    ax.annotate(
        first, (0, 1), (0, 22), xycoords="axes fraction", textcoords="offset points", fontsize=11, fontweight="bold"
    )


def better(ax: "Axes", tail: tuple[float, float], head: tuple[float, float], theme: Theme) -> None:
    """The word, with an arrow from it into the corner; both places are shares of the axes."""
    ax.annotate(
        "better", head, tail, xycoords="axes fraction", textcoords="axes fraction", ha="center", va="center",
        color=theme.faint, fontstyle="italic", arrowprops={"arrowstyle": "->", "color": theme.faint, "shrinkB": 0},
    )  # fmt: skip


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the order of `wanted`, near them and at least `gap` apart; within low and high if there is room."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    groups: list[list[float]] = []  # [first place, number of places]: each group is centred on what its members want
    for number, index in enumerate(order):
        groups.append([wanted[index], 1])
        while len(groups) > 1 and groups[-1][0] < groups[-2][0] + groups[-2][1] * gap:
            size = int(groups.pop()[1] + groups.pop()[1])
            members = order[number + 1 - size : number + 1]
            groups.append([sum(wanted[x] - gap * at for at, x in enumerate(members)) / size, size])
    places = [first + gap * at for first, size in groups for at in range(int(size))]
    for at in range(len(places)):
        places[at] = max(places[at], low + gap * at)
    for back in range(len(places)):
        places[-1 - back] = min(places[-1 - back], high - gap * back)
    return [place for _, place in sorted(zip(order, places, strict=True))]


def label_at_the_right(ax: "Axes", labels: Sequence[tuple[str, float, float]], theme: Theme, gap: float) -> None:
    """(text, x, y): texts in a column to the right of the axes, each with a line to its point.

    `gap`: least distance of two texts, as a share of the axes' height.
    """
    low, high = ax.get_ylim()
    heights = spread([(y - low) / (high - low) for _, _, y in labels], gap, 0, 1)
    for (text, x, y), height in zip(labels, heights, strict=True):
        line: dict[str, Any] = {"arrowstyle": "-", "color": theme.faint, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4}
        ax.annotate(
            text, (x, y), (1.02, height), textcoords="axes fraction", va="center", fontsize=9, arrowprops=line,
            annotation_clip=False,
        )  # fmt: skip


Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


def label_nearby(
    ax: "Axes", labels: Sequence[tuple[str, str, Sequence[Point]]], lines: Sequence[Sequence[Point]]
) -> None:
    """(text, colour, points): each text next to one of its points, clear of all points, lines and other texts."""
    ax.get_figure(root=True).draw_without_rendering()  # the layout: where the axes lie
    scale = 72 / ax.get_figure(root=True).dpi

    def place(point: Point) -> Point:
        x, y = ax.transData.transform(point) * scale
        return float(x), float(y)

    taken: list[Box] = []
    for x, y in (place(point) for _, _, points in labels for point in points):
        taken.append((x - 6, y - 6, x + 6, y + 6))
    for ends in lines:
        (left, bottom), (right, top) = place(ends[0]), place(ends[1])
        taken.append((left, bottom, right, top))
    for text, colour, points in labels:
        wide, high = 7.2 * len(text), 11.0
        sides = [(9 + wide / 2, 0), (-9 - wide / 2, 0), (0, 14), (0, -14), (wide / 2, 14), (wide / 2, -14)]
        sides += [(x * (wide / 2 + 4), y) for x in (1, -1) for y in (13, -13)]  # between the lines of a cross
        candidates = []
        for point in points:
            for right, up in sides:
                x, y = place(point)[0] + right, place(point)[1] + up
                box = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
                candidates.append((sum(_meet(box, other) for other in taken), point, (right, up), box))
        _, point, offset, box = min(candidates, key=lambda candidate: candidate[0])
        taken.append(box)
        ax.annotate(text, point, offset, textcoords="offset points", ha="center", va="center", color=colour,
                    fontweight="bold")  # fmt: skip


def _meet(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
