"""The page in Chromium: what is found, sorted, toggled and told, by mouse and by keys."""

import math

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
        assert tab.evaluate("() => document.getElementById('bar').offsetHeight") < 140


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


def test_letters_that_are_longer_in_lower_case_are_searched_too(browser, tmp_path):
    tokens = [ScoredToken(text, -1.0, -2.0, 1.0, 1.0) for text in ("İİİİ", " honey")]
    with opened(browser, write(tmp_path / "p.html", [ScoredResponse((), (), {"response": tokens})])) as tab:
        tab.fill("#search", "honey")
        assert shown(tab) == [0]
        settled(tab)
