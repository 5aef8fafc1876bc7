"""The heat map in the terminal: what a reader sees is what was scored, and nothing in the data acts there."""

import pytest

from perce.report.heatmap import ScoredToken, intensity, terminal_text
from tests.helpers.pages import TOKENS

CLIP = (0.8, 5.0)

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\x00"


def test_tint_grows_with_the_weight():
    weights = [0.0, 0.8, 0.81, 1.0, 2.9, 4.99, 5.0, 80.0, float("inf")]
    shades = [intensity(w, CLIP) for w in weights]
    assert shades == sorted(shades) and shades[0] == shades[1] == 0 and shades[-3:] == [1, 1, 1]
    assert shades[4] == pytest.approx(0.5) and len(set(shades)) == 6
    assert intensity(float("nan"), CLIP) == 0 and intensity(2.0, (1.0, 1.0)) == 1


def test_terminal_text_is_the_tokens_and_tints_by_weight():
    text = terminal_text(TOKENS, CLIP)
    assert text.plain == "".join(t.text for t in TOKENS)
    assert [text.plain[s.start : s.end] for s in text.spans if s.style] == [" Juno", "عربي"]
    assert [str(s.style).startswith("bold underline") for s in text.spans if s.style] == [False, True]
    assert "\x1b" not in terminal_text([ScoredToken(HOSTILE, -1.0, -2.0, 1.0, 1.0)], CLIP).plain
