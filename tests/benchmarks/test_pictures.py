"""Pictures for light and dark pages, and where their labels lie."""

import random
import re
from itertools import pairwise

import pytest

from benchmarks import pictures
from tests.helpers import ROOT


def panel():
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 4), layout="constrained").subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return axes


def test_both_themes_are_written_alike_each_time(tmp_path):
    from matplotlib.image import imread

    def draw(theme):
        axes = panel()
        axes.scatter([0.5], [0.5], color=theme.ink)
        return axes.figure

    def written():
        pictures.write(draw, tmp_path / "images" / "some.png")
        return {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}

    once = written()
    assert once.keys() == {"some.png", "some_dark.png"} and written() == once
    corners = [imread(tmp_path / "images" / name)[0, 0, :3].mean() for name in ("some.png", "some_dark.png")]
    assert corners[0] == 1 and corners[1] < 0.1


@pytest.mark.parametrize("theme", pictures.THEMES, ids=lambda theme: theme.suffix or "light")
def test_words_and_colours_are_seen_on_their_paper(theme):
    """WCAG: a contrast of 4.5 for text."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (theme.ink, theme.faint, *theme.colours):
        low, high = sorted((luminance(colour), luminance(theme.paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour
    assert len(set(theme.colours)) == len(theme.colours) == len(set(pictures.MARKERS))


def test_places_are_spread_in_their_order():
    assert pictures.spread([0.5, 0.1], 0.1, 0, 1) == [0.5, 0.1], "with room they stay"
    assert pictures.spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert pictures.spread([1, 0.99, 0], 0.2, 0, 1) == pytest.approx([1, 0.8, 0])
    assert pictures.spread([], 0.1, 0, 1) == []
    drawn = random.Random(0)
    for _ in range(100):
        wanted = [drawn.random() for _ in range(9)]
        places = pictures.spread(wanted, 0.1, 0, 1)
        order = sorted(range(9), key=wanted.__getitem__)
        gaps = [places[b] - places[a] for a, b in pairwise(order)]
        assert min(gaps) > 0.1 - 1e-9 and min(places) > -1e-9 and max(places) < 1 + 1e-9


def test_labels_lie_next_to_their_points_and_on_nothing():
    axes = panel()
    clouds = [[(0.5, 0.5), (0.53, 0.52)], [(0.55, 0.5), (0.52, 0.47)], [(0.5, 0.9)]]
    for cloud in clouds:
        axes.scatter(*zip(*cloud, strict=True), s=100)
    wall = ((0.58, 0.3), (0.58, 0.7))
    pictures.label_nearby(axes, [(f"method {at}", "#000000", cloud) for at, cloud in enumerate(clouds)], [wall])
    axes.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    points = [axes.transData.transform(point) for cloud in clouds for point in cloud]
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])
    assert not any(box.contains(*point) for box in boxes for point in points)
    across = axes.transData.transform(wall[0])[0]
    assert not any(box.x0 < across < box.x1 and box.y0 < axes.transData.transform(wall[1])[1] for box in boxes)


def test_every_picture_of_the_pages_is_there_in_both_themes():
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r'(?:srcset|src)="([^"]+)"|!\[[^]]*\]\(([^)]+)\)', text):
            path = page.parent / (name[0] or name[1])
            assert path.is_file(), f"{page.name}: {path}"
            shown.add(path.resolve())
    assert shown == set((ROOT / "docs" / "images").iterdir())
    assert {path.stem + "_dark" for path in shown if not path.stem.endswith("_dark")} == {
        path.stem for path in shown if path.stem.endswith("_dark")
    }
