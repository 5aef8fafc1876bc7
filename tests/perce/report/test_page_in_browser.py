"""The page in Chromium: what is found, sorted, toggled and told, by mouse and by keys."""

import math
import re
import struct
from dataclasses import replace

import pytest

from perce.objectives import OBJECTIVES
from perce.report.heatmap import ScoredResponse, ScoredToken
from perce.report.page import Weighed, write_page
from tests.helpers.browser import NoBrowser, chromium, opened

pytestmark = pytest.mark.slow

WORDS = "the bees are back and Juno barks at them all day long while the honey grows in the hive".split()
BEFORE, AFTER = "before training", "after training"


@pytest.fixture(scope="module")
def browser():
    try:
        with chromium() as found:
            yield found
    except NoBrowser as reason:
        pytest.skip(str(reason))


def response(number: int, tokens: int = 18) -> ScoredResponse:
    """Response n of user n // 3; its loss falls by n / 100 in training, and its PIR doubles from that."""
    passes = {}
    for name, logp, pir in ((BEFORE, -3.0, number / 100), (AFTER, -3.0 + number / 100, number / 50)):
        texts = (f" {WORDS[at % len(WORDS)]}" for at in range(tokens))
        passes[name] = [ScoredToken(t, logp, logp - pir, pir, min(max(pir, 0.8), 5.0)) for t in texts]
    persona, turns = (f"I am number {number}.", "I keep bees."), (("user", f"What of request{number}?"),)
    return ScoredResponse(persona, turns, passes, f"user {number // 3}", f"rows.jsonl:{number + 1}")


def write(path, responses, objective="perce", **more):
    entry = OBJECTIVES[objective]
    write_page(
        path, responses, title="Page", summary=[("model", "m")], weighed=Weighed(entry, entry.weighting()), **more
    )
    return path


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "page.html", [response(number) for number in range(1000)])


@pytest.fixture
def tab(browser, thousand):
    with opened(browser, thousand) as tab:
        yield tab


def shown(tab) -> list[int]:
    """The responses of the list, by their place in the data, rendered or not."""
    return tab.eval_on_selector_all("article", "all => all.map(x => x.card.place)")


def told(tab) -> str:
    return tab.inner_text("#detail") if tab.is_visible("#detail") else ""


def settled(tab) -> None:
    """Two frames later, when what has come into view is rendered."""
    tab.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )


def test_only_what_is_near_the_window_is_rendered_and_scrolling_renders_the_rest(tab):
    assert len(shown(tab)) == 1000 and tab.inner_text("#count") == "1,000 responses"
    assert 2 <= len(tab.query_selector_all("article .tokens")) < 30
    tab.evaluate("() => document.querySelectorAll('article')[700].scrollIntoView()")
    tab.wait_for_selector("article:nth-of-type(701) .t")
    assert tab.inner_text("article:nth-of-type(701) h2").startswith("Response 701")
    assert len(tab.query_selector_all("article .tokens")) < 40, "what is far away is let go of"
    top = "() => document.querySelectorAll('article')[700].getBoundingClientRect().top"
    place = tab.evaluate(top)
    tab.mouse.wheel(0, -300)
    tab.wait_for_function(
        "from => document.querySelectorAll('article')[700].getBoundingClientRect().top > from", arg=place + 200
    )
    settled(tab)
    assert tab.evaluate(top) == pytest.approx(place + 300, abs=2), "what is rendered above moves nothing"


@pytest.mark.parametrize(
    ("query", "places"),
    [("request123?", [123]), ("NUMBER 77.", [77]), ("user 33", [99, 100, 101]), ("jsonl:1000", [999]),
     ("bees are back and juno", [*range(1000)]), ("nothing of this", [])],
)  # fmt: skip
def test_search(tab, query, places):
    """In requests, personas, users, sources and across the tokens of responses."""
    tab.keyboard.press("/")
    tab.keyboard.type(query)
    found = shown(tab)
    assert [place for place in found if query != "user 33" or place < 300] == places
    assert tab.is_visible("#nothing") == (not places)
    if places and query != "user 33":
        settled(tab)
        marked = "() => [...CSS.highlights.get('found')].slice(0, 3).map(range => range.toString().toLowerCase())"
        texts = [text for text in tab.evaluate(marked) if "\n" not in text]
        assert texts and set(texts) == {query.lower()}
    if len(places) < 1000:
        assert tab.inner_text("#count") == f"{len(found):,} of 1,000 responses"
    tab.keyboard.press("Enter")
    assert tab.evaluate("() => document.activeElement === document.body") and shown(tab) == found
    tab.keyboard.press("/")
    tab.keyboard.press("Escape")
    assert len(shown(tab)) == 1000 and tab.input_value("#search") == ""


def test_a_long_persona_is_folded_but_where_the_search_has_found_something_in_it(browser, tmp_path):
    long = ScoredResponse(("I keep bees. " * 200, "My goat is Minister."), (), response(0).passes)
    with opened(browser, write(tmp_path / "p.html", [response(0), long])) as tab:
        folded = lambda: tab.eval_on_selector_all(".persona", "all => all.map(x => !x.open)")  # noqa: E731
        assert folded() == [False, True]
        tab.fill("#search", "minister")
        assert folded() == [False]
        tab.fill("#search", "")
        assert folded() == [False, True]
        tab.click(".persona >> nth=1 >> summary")
        tab.keyboard.press("b")
        assert folded() == [False, False], "what a reader has opened stays open"


def test_filter_by_user_in_the_list_and_on_a_card(tab):
    tab.select_option("#user", label="user 5 (3)")
    assert shown(tab) == [15, 16, 17] and tab.inner_text("#count") == "3 of 1,000 responses"
    tab.select_option("#user", "")
    tab.click("article .user >> nth=0")
    assert shown(tab) == [0, 1, 2]


@pytest.mark.parametrize(
    ("key", "first", "backwards"),
    [("order", 0, 999), ("pir", 999, 0), ("loss", 0, 999), ("change", 999, 0), ("ceiling", 250, 0)],
)
def test_sorting_in_both_directions(tab, key, first, backwards):
    """Highest PIR, loss and share at the ceiling first, and what training has changed most for the better."""
    tab.select_option("#sort", key)
    assert shown(tab)[0] == first, "ties are in the order of the data"
    tab.click("#direction")
    assert shown(tab)[0] == backwards and sorted(shown(tab)) == [*range(1000)]


def test_passes_one_or_both_and_the_response_that_is_read_stays(tab):
    heads = lambda: tab.eval_on_selector_all("article:first-of-type .pass h3", "all => all.map(x => x.textContent)")  # noqa: E731
    assert heads() == [AFTER]
    tab.keyboard.press("b")
    assert heads() == [BEFORE]
    tab.click("#passes label:has-text('both')")
    assert heads() == [BEFORE, AFTER]
    tab.evaluate("() => document.querySelectorAll('article')[500].scrollIntoView()")
    tab.wait_for_selector("article:nth-of-type(501) .t")
    settled(tab)
    top = "() => document.querySelectorAll('article')[500].getBoundingClientRect().top"
    place = tab.evaluate(top)
    tab.keyboard.press("b")
    settled(tab)
    assert tab.evaluate(top) == pytest.approx(place, abs=2)
    assert tab.eval_on_selector_all("article:nth-of-type(501) h3", "all => all.length") == 1


def test_keys_lead_from_response_to_response_and_token_to_token(tab):
    reads = "() => document.activeElement.closest('article')?.card.place ?? null"
    for key, place in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        tab.keyboard.press(key)
        assert tab.evaluate(reads) == place
    gap = "() => document.activeElement.getBoundingClientRect().top - document.getElementById('bar').offsetHeight"
    assert 0 <= tab.evaluate(gap) < 20, "below the bar"
    at = "() => document.activeElement.at ?? null"
    while tab.evaluate(at) is None:
        tab.keyboard.press("Tab")
    assert tab.evaluate(reads) == 1 and tab.evaluate(at) == 0 and "token 1 of response 2" in told(tab)
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        tab.keyboard.press(key)
        assert tab.evaluate(at) == place and f"token {place + 1} of response 2" in told(tab)
    assert "0.80 (floor)" in told(tab) and "+0.02" in told(tab) and BEFORE in told(tab)
    tab.keyboard.press("b")
    assert tab.evaluate(at) == 1 and tab.evaluate(reads) == 1, "the same token in the other pass"
    tab.keyboard.press("Escape")
    assert told(tab) == "" and tab.evaluate("() => document.querySelector('.active')") is None
    tab.keyboard.press("?")
    assert tab.is_visible("#keys") and "previous response" in tab.inner_text("#keys")
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#keys")


def test_lines_and_right_to_left_text(browser, tmp_path):
    texts = [" word"] * 60
    arabic = [" كلمة", " أخرى", " هنا"]
    passes = [{"response": [ScoredToken(t, -1.0, -2.0, 1.0, 1.0) for t in each]} for each in (texts, arabic)]
    path = write(tmp_path / "p.html", [ScoredResponse((), (), each) for each in passes])
    with opened(browser, path) as tab:
        at = "() => document.activeElement.at"
        tab.click("article:nth-of-type(1) .t >> nth=3")
        tab.keyboard.press("ArrowDown")
        below = tab.evaluate(at)
        assert 10 < below < 60
        tab.keyboard.press("ArrowUp")
        assert tab.evaluate(at) == 3
        tab.click("article:nth-of-type(2) .t >> nth=0")
        for key, place in (("ArrowLeft", 1), ("ArrowLeft", 2), ("ArrowRight", 1)):
            tab.keyboard.press(key)
            assert tab.evaluate(at) == place, "left is forward"
        assert tab.is_hidden("#passes") and tab.is_hidden("#user")


def tints(tab) -> list[tuple[float, str]]:
    each = "all => all.map(x => [Number(x.style.getPropertyValue('--w')), x.className])"
    return [tuple(found) for found in tab.eval_on_selector_all("article:first-of-type .t", each)]


def test_tints_and_their_legends(browser, tmp_path):
    rows = [(-2.0, 0.5), (-2.0, 2.9), (-2.0, 5.0), (-5.0, -1.5), (-1.0, -9.0)]  # logp after, PIR after; before: −2, 0
    after = [ScoredToken(" a", a, a - pir, pir, min(max(pir, 0.8), 5.0)) for a, pir in rows]
    before = [ScoredToken(" a", -2.0, -2.0, 0.0, 0.8) for _ in rows]
    with opened(browser, write(tmp_path / "p.html", [ScoredResponse((), (), {BEFORE: before, AFTER: after})])) as tab:
        assert tints(tab) == [(0, "t"), (0.5, "t"), (1, "t top"), (0, "t"), (0, "t")]
        assert "Token weight: PIR, clipped" in tab.inner_text(".legend")
        tab.keyboard.press("t")
        assert tints(tab) == [(0.167, "t"), (0.967, "t"), (1, "t top"), (0.5, "t minus"), (1, "t minus low")]
        assert "PIR, nats" in tab.inner_text(".legend") and "Token weight" not in tab.inner_text(".legend")
        tab.keyboard.press("t")
        assert tints(tab) == [(0, "t")] * 3 + [(1, "t minus low"), (pytest.approx(1 / 3, abs=1e-3), "t")]
        assert "Change of log p with the persona" in tab.inner_text(".legend")
        line = tab.eval_on_selector(".t.low", "x => getComputedStyle(x).textDecorationLine")
        assert line == "overline"
        tab.keyboard.press("t")
        assert "Token weight" in tab.inner_text(".legend")


def test_the_objectives_signal_is_told_of_a_token(browser, tmp_path):
    tokens = [ScoredToken(" a\n", -2.0, -2.5, 3.21, 3.21), ScoredToken(" b", -math.inf, -1.0, math.nan, math.nan)]
    with opened(browser, write(tmp_path / "p.html", [ScoredResponse((), (), {"response": tokens})], "entce")) as tab:
        tab.hover(".t >> nth=0")
        assert "entropy" in told(tab) and "3.21" in told(tab) and "+0.50" in told(tab) and "a↵" in told(tab)
        tab.hover(".t >> nth=1")
        assert told(tab).count("–") >= 5 and "NaN" not in told(tab), "what is no number is a dash"


def test_a_phone_taps_and_nothing_is_wider_than_it(browser, thousand):
    with opened(browser, thousand, has_touch=True) as tab:
        tab.set_viewport_size({"width": 390, "height": 800})
        settled(tab)
        tab.tap("article .t >> nth=2")
        assert "token 3 of response 1" in told(tab)
        assert tab.evaluate("() => document.documentElement.scrollWidth") == 390
        assert tab.evaluate("() => document.querySelector('#detail .wide').scrollWidth") <= 390
        assert tab.eval_on_selector("#detail .wide", "wide => wide.scrollWidth <= wide.clientWidth"), "none is cut off"
        assert tab.evaluate("() => document.getElementById('bar').offsetHeight") < 140


def test_a_token_that_is_tapped_is_not_behind_its_numbers(browser, thousand):
    with opened(browser, thousand, has_touch=True, viewport={"width": 390, "height": 800}) as tab:
        low = "node => scrollBy(0, node.getBoundingClientRect().bottom - innerHeight + 20)"
        tab.eval_on_selector("article .t >> nth=2", low)
        settled(tab)
        tab.tap("article .t >> nth=2")
        assert "token 3 of response 1" in told(tab)
        top = tab.eval_on_selector("#detail", "node => node.getBoundingClientRect().top")
        assert tab.eval_on_selector(".t.active", "node => node.getBoundingClientRect().bottom") <= top


def test_what_is_printed_has_all_responses(browser, tmp_path):
    with opened(browser, write(tmp_path / "p.html", [response(number) for number in range(60)])) as tab:
        assert len(tab.query_selector_all("article .tokens")) < 60
        tab.evaluate("() => dispatchEvent(new Event('beforeprint'))")
        assert len(tab.query_selector_all("article .tokens")) == 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_on_every_tint_can_be_read(browser, tmp_path, scheme):
    """A contrast of 4.5 at least, as WCAG asks for."""
    tokens = [ScoredToken(" a", -2.0, -2.0 - pir, pir, min(max(pir, 0.8), 5.0)) for pir in (0.0, 9.0, -9.0)]
    contrasts = """() => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      const light = (colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(linear);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      return [...document.querySelectorAll(".t, .label, dt, summary, #bar b, #detail th, #detail td")].map((node) => {
        const behind = [];
        for (let up = node; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
        const [ink, ground] = [light([...behind, getComputedStyle(node).color]), light(behind)];
        return [node.className || node.tagName, (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)];
      });
    }"""
    with opened(
        browser, write(tmp_path / "p.html", [ScoredResponse((), (), {"r": tokens})]), color_scheme=scheme
    ) as tab:
        for _ in range(2):
            tab.hover(".t >> nth=0")
            found = tab.evaluate(contrasts)
            assert len(found) > 10 and not [each for each in found if each[1] < 4.5]
            tab.keyboard.press("t")


def test_a_page_without_responses_says_so(browser, tmp_path):
    with opened(browser, write(tmp_path / "p.html", [])) as tab:
        assert "No responses were scored." in tab.inner_text("body") and tab.is_hidden("#bar")


def test_documents_have_no_persona_to_lack(browser, tmp_path):
    entry, tokens = OBJECTIVES["longce"], [ScoredToken(" a", -1.0, -2.0, 2.7, 2.7)]
    for documents in (True, False):
        weighed, path = Weighed(entry, entry.weighting(), documents), tmp_path / f"{documents}.html"
        write_page(path, [ScoredResponse((), (), {"after training": tokens})], title="t", summary=[], weighed=weighed)
        with opened(browser, path) as tab:
            assert ("No persona" in tab.inner_text("article")) == (not documents)
            tab.hover(".t")
            assert ("log p after the short context" in told(tab)) == documents
            assert "exp(PIR)" in told(tab) and "2.70" in told(tab)


def marked(tab) -> list[tuple[str, str]]:
    """What the search has marked, each with the class or the name of the element that it begins in."""
    settled(tab)
    found = """() => [...CSS.highlights.get("found")].map((range) => {
      const begins = range.startContainer.parentNode;
      return [range.toString(), begins.className || begins.tagName];
    })"""
    return [tuple(each) for each in tab.evaluate(found)]


def test_letters_that_are_longer_in_lower_case_are_searched_and_marked(browser, tmp_path):
    tokens = [ScoredToken(text, -1.0, -2.0, 1.0, 1.0) for text in ("İİİİ", " honey", " jam")]
    path = write(tmp_path / "p.html", [ScoredResponse(("İİİİ İstanbul honey",), (), {"response": tokens})])
    with opened(browser, path) as tab:
        for query, texts in (("honey", ["honey", "honey"]), ("JAM", ["jam"]), ("istanbul h", ["İstanbul h"])):
            tab.fill("#search", query)
            assert shown(tab) == [0] and [text for text, _ in marked(tab)] == texts
        longer = "() => [...Array(0x10000).keys()].filter(x => lower(String.fromCharCode(x)).length !== 1)"
        assert tab.evaluate(longer) == []


def test_marks_lie_in_data_and_not_in_the_pages_own_words(browser, tmp_path):
    tokens = [ScoredToken(text, -1.0, -2.0, 1.0, 1.0) for text in ("Her", " persona", " has", " no", " tokens")]
    turns = (("user", "A persona, before training?"),)
    all_of_it = ScoredResponse(("My persona",), turns, {BEFORE: tokens}, "persona 1", "persona.jsonl:1")
    with opened(browser, write(tmp_path / "p.html", [all_of_it])) as tab:
        for query, places in (
            ("persona", ["source", "user", "LI", "text", "t"]), (BEFORE, ["text"]), ("tokens", ["t"]),
        ):  # fmt: skip
            tab.fill("#search", query)
            assert [re.sub(" .*", "", place) for _, place in marked(tab)] == places, query


def test_very_many_hits_are_marked_up_to_a_bound(browser, tmp_path):
    long = ScoredResponse(("e bee " * 170_000,), (), response(0).passes)
    with opened(browser, write(tmp_path / "p.html", [response(1), long])) as tab:
        tab.fill("#search", "bee")
        texts = [text for text, _ in marked(tab)]
        assert shown(tab) == [0, 1] and 100 < len(texts) < 10_000 and set(texts) == {"bee"}
        assert texts.count("bee") > tab.evaluate("MOST_MARKS"), "the bound is per response"


def fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("low", [0.8, 0.9])
def test_the_ends_of_the_clip_are_told_exactly(browser, tmp_path, low):
    """Of rounded weights some would seem to lie at an end; the clip and the weights are in fp32."""
    weights = [fp32(low), low + 0.004, 4.999, 5.0, math.nan]
    tokens = [ScoredToken(" a", -1.0, -2.0, 1.0, weight) for weight in weights]
    weighed = Weighed(OBJECTIVES["perce"], replace(OBJECTIVES["perce"].weighting(), clip_min=low))
    write_page(tmp_path / "p.html", [ScoredResponse((), (), {"r": tokens})], title="t", summary=[], weighed=weighed)
    with opened(browser, tmp_path / "p.html") as tab:
        ends = []
        for place in range(len(tokens)):
            tab.hover(f".t >> nth={place}")
            ends.append(re.findall(r"\((floor|ceiling)\)", told(tab)))
        assert ends == [["floor"], [], [], ["ceiling"], []]


def test_the_focus_stays_in_the_response_when_the_list_changes(tab):
    reads = "() => document.activeElement.closest('article')?.card.place ?? null"
    tab.focus("article .user >> nth=4")
    tab.keyboard.press("Enter")
    assert shown(tab) == [3, 4, 5] and tab.evaluate(reads) == 4
    tab.focus("article .user >> nth=2")
    tab.keyboard.press("b")
    assert tab.evaluate(reads) == 5
    tab.keyboard.press("j")
    assert tab.evaluate(reads) == 5, "it is the last one"


def test_the_numbers_close_without_a_keyboard(browser, thousand):
    with opened(browser, thousand, has_touch=True) as tab:
        for closes in ("#detail button", "article h2 >> nth=0", "h1"):
            tab.tap("article .t >> nth=2")
            assert "token 3 of response 1" in told(tab)
            tab.tap("#detail b")
            assert told(tab), "a tap in it keeps it"
            tab.tap(closes)
            assert not told(tab), closes
        assert tab.get_attribute("#detail button", "aria-label") == "Close the numbers"


def test_escape_closes_the_numbers_and_else_clears_the_search(tab):
    tab.fill("#search", "number 77.")
    tab.press("#search", "Enter")
    tab.focus("article .t")
    tab.keyboard.press("Escape")
    assert not told(tab) and tab.input_value("#search") == "number 77."
    tab.focus("#sort")
    tab.keyboard.press("Escape")
    assert tab.input_value("#search") == "number 77." and shown(tab) == [77], "a list of choices has its own Esc"
    tab.keyboard.press("Escape")
    assert tab.input_value("#search") == "" and len(shown(tab)) == 1000
    assert "close the numbers, else clear the search" in tab.text_content("#keys")


def test_what_has_no_pass_says_so(browser, tmp_path):
    none = ScoredResponse((), (), {})
    with opened(browser, write(tmp_path / "a.html", [none]), wait="article p.label") as tab:
        assert "Not scored at all." in tab.inner_text("article")
    with opened(browser, write(tmp_path / "b.html", [response(0), none])) as tab:
        assert f"Not scored {AFTER}." in tab.inner_text("article >> nth=1")
        tab.click("#passes label:has-text('both')")
        assert "Not scored at all." in tab.inner_text("article >> nth=1")


def test_colours_that_are_forced_leave_the_tints(browser, tmp_path):
    with opened(browser, write(tmp_path / "p.html", [response(250)]), forced_colors="active") as tab:
        ground = "node => getComputedStyle(node).backgroundColor"
        assert tab.eval_on_selector(".t.top", ground) == "rgba(45, 105, 225, 0.46)"
        assert "gradient" in tab.eval_on_selector(".scale i", "node => getComputedStyle(node).backgroundImage")


def test_numbers_are_announced_on_focus_and_not_on_hover(tab):
    live = lambda: tab.evaluate("() => document.querySelector('#detail b').closest('[aria-live]').ariaLive")  # noqa: E731
    tab.hover("article .t >> nth=3")
    assert live() == "off"
    tab.focus("article .t")
    assert live() == "polite"
