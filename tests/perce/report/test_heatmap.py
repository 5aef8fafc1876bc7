"""Reports: what a reader sees must be what was scored, and nothing in the data may act on the page or the terminal."""

import re
from html.parser import HTMLParser

import pytest

from perce.report.heatmap import Histogram, ScoredResponse, ScoredToken, Table, intensity, terminal_text, write_html

CLIP = (0.8, 5.0)

TOKENS = (
    ScoredToken("Take", -1.25, -1.50, 0.8),
    ScoredToken(" Juno", -0.50, -2.75, 2.25),
    ScoredToken(" out", -2.00, -1.00, 0.8),
    ScoredToken(".\n\n", -0.10, -0.10, 0.8),
    ScoredToken("عربي", -0.25, -7.00, 5.0),
)

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\x00"


class Page(HTMLParser):
    """Every tag with its attributes, every token span's text, and the character data outside <style>."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tokens: list[dict] = []
        self.text = ""
        self._in_style = self._in_token = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self._in_style = tag == "style"
        if tag == "span" and "t" in attrs.get("class", "").split():
            self.tokens.append({**attrs, "text": ""})
            self._in_token = True

    def handle_endtag(self, tag):
        self._in_style &= tag != "style"
        self._in_token &= tag != "span"

    def handle_data(self, data):
        self.text += "" if self._in_style else data
        if self._in_token:
            self.tokens[-1]["text"] += data


def response(tokens=TOKENS, persona=("I have a dog called Juno.",), user_id="user 7") -> ScoredResponse:
    return ScoredResponse(persona, (("user", "What now?"),), {"before training": tokens[:2], "after": tokens}, user_id)


def page_of(tmp_path, *responses, title="Report", summary=(("Loss", "2.41"),), clip=CLIP) -> Page:
    path = tmp_path / "sub" / "report.html"
    write_html(path, responses, title=title, summary=summary, clip=clip)
    return Page(path.read_text(encoding="utf-8"))


def test_every_token_is_one_span_with_its_text_and_numbers(tmp_path):
    page = page_of(tmp_path, response())
    assert [t["text"] for t in page.tokens] == [t.text for t in (*TOKENS[:2], *TOKENS)]
    expected = "PIR 2.25 · weight 2.25 · logp -0.50 with persona, logp_cf -2.75 without"
    assert page.tokens[1]["title"] == page.tokens[3]["title"] == expected
    assert [t["text"] for t in page.tokens if "top" in t["class"].split()] == ["عربي"]
    for shown in ("I have a dog called Juno.", "What now?", "user 7", "before training", "after", "Loss", "2.41"):
        assert shown in page.text
    assert "7 tokens" not in page.text and "5 tokens · mean PIR 1.65 · loss 0.82 · 1 at the ceiling" in page.text


def test_newlines_are_marked_and_kept_and_right_to_left_text_sets_its_own_direction(tmp_path):
    page = page_of(tmp_path, response())
    assert sum(tag == "i" and attrs.get("class") == "nl" for tag, attrs in page.tags) == 2
    assert all(a.get("dir") == "auto" for tag, a in page.tags if a.get("class") in ("tokens", "text") or tag == "li")


def test_data_cannot_act_on_the_page(tmp_path):
    hostile = ScoredResponse(
        (HOSTILE,),
        ((HOSTILE, HOSTILE),),
        {HOSTILE: [ScoredToken(HOSTILE, -1.0, -3.0, 2.0), ScoredToken("\ud83d", -1.0, -1.0, 0.8)]},
        user_id=HOSTILE,
    )
    page = page_of(tmp_path, hostile, title=HOSTILE, summary=[(HOSTILE, HOSTILE)])
    harmless = page_of(tmp_path, response())
    assert {(tag, *attrs) for tag, attrs in page.tags} <= {(tag, *attrs) for tag, attrs in harmless.tags}
    assert page.text.count("<script>alert(1)</script>\"'&␛[31m␀") == 10  # title twice, and each field once
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.text)


def test_the_file_needs_nothing_from_outside(tmp_path):
    path = tmp_path / "report.html"
    write_html(path, [response()], title="t", summary=[], clip=CLIP)
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", html)
    assert "prefers-color-scheme: dark" in html


def test_tint_grows_with_the_weight(tmp_path):
    weights = [0.0, 0.8, 0.81, 1.0, 2.9, 4.99, 5.0, 80.0, float("inf")]
    shades = [intensity(w, CLIP) for w in weights]
    assert shades == sorted(shades) and shades[0] == shades[1] == 0 and shades[-3:] == [1, 1, 1]
    assert shades[4] == pytest.approx(0.5) and len(set(shades)) == 6
    assert intensity(float("nan"), CLIP) == 0 and intensity(2.0, (1.0, 1.0)) == 1

    page = page_of(tmp_path, response([ScoredToken("x", -1.0, -1.0 - w, w) for w in weights]))
    written = [float(re.search(r"--w:([\d.e-]+)", t["style"])[1]) if "style" in t else 0 for t in page.tokens[2:]]
    assert written == pytest.approx(shades, rel=1e-2)


@pytest.mark.parametrize("clip", [(5.0, 0.8), (0.8, float("nan")), (0.8, float("inf"))])
def test_a_clip_that_is_no_scale_is_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="clip: expected finite clip_min <= clip_max"):
        page_of(tmp_path, response(), clip=clip)
    with pytest.raises(ValueError, match="clip"):
        terminal_text(TOKENS, clip)


def test_empty_inputs_and_long_personas(tmp_path):
    assert "No responses were scored" in page_of(tmp_path, summary=()).text
    page = page_of(tmp_path, ScoredResponse((), (), {"only": []}))
    assert "No persona" in page.text and "no tokens" in page.text
    page = page_of(tmp_path, response(persona=("short",)), response(persona=("long " * 300, "b")))
    assert ["open" in attrs for tag, attrs in page.tags if tag == "details"] == [True, False]
    assert "Persona, 1 entry" in page.text and "Persona, 2 entries" in page.text


def test_terminal_text_is_the_tokens_and_tints_by_weight():
    text = terminal_text(TOKENS, CLIP)
    assert text.plain == "".join(t.text for t in TOKENS)
    assert [text.plain[s.start : s.end] for s in text.spans if s.style] == [" Juno", "عربي"]
    assert [str(s.style).startswith("bold underline") for s in text.spans if s.style] == [False, True]
    assert "\x1b" not in terminal_text([ScoredToken(HOSTILE, -1.0, -2.0, 1.0)], CLIP).plain


def test_panels_show_counts_clip_shares_and_escaped_cells(tmp_path):
    path = tmp_path / "r.html"
    panels = [
        Histogram("Weights", [-1.0, 0.8, 2.0, 5.0, 6.0], [70, 20, 5, 5], (0.7, 0.05)),
        Table("T", ["a", "b"], [[HOSTILE, "2"]]),
    ]
    write_html(path, [], title="t", summary=[], clip=CLIP, panels=panels)
    html = path.read_text(encoding="utf-8")
    assert "70.0% lie at the floor" in html and "5.0% at the ceiling" in html
    assert html.count("<script") == 0 and "&lt;script&gt;" in html
    heights = [float(x) for x in re.findall(r"--h:([\d.]+)", html)]
    assert heights[0] == 1.0 and heights == sorted(heights, reverse=True)
