"""The HTML page without a browser: what it embeds, that nothing in the data acts on it, and what its words say."""

import base64
import hashlib
import math
import random
import re
from dataclasses import replace

import pytest

from perce.objectives import OBJECTIVES, RATIO
from perce.report import page
from perce.report.heatmap import Cells, Histogram, ScoredResponse, ScoredToken
from perce.report.page import MOST_USERS, Weighed, users_table, write_page
from tests.helpers.pages import TOKENS, Page

HOSTILE = "</script><script>alert(1)</script><!--\"'&\x1b[31m\x00\u202e"
SHOWN = "</script><script>alert(1)</script><!--\"'&\\x1b[31m\\x00\\u202e"


def weighed(name="perce", documents=False, **changes) -> Weighed:
    objective = OBJECTIVES[name]
    return Weighed(objective, replace(objective.weighting(), **changes), documents)


def response(tokens=TOKENS, persona=("I have a dog called Juno.",), user_id="user 7") -> ScoredResponse:
    passes = {"before training": tokens[:2], "after training": tokens}
    return ScoredResponse(persona, (("user", "What now?"),), passes, user_id, "rows.jsonl:3")


def page_of(tmp_path, *responses, title="Report", summary=(("Loss", "2.41"),), of=None, **more) -> Page:
    path = tmp_path / "sub" / "report.html"
    write_page(path, responses, title=title, summary=summary, weighed=of or weighed(), **more)
    return Page(path)


def test_every_token_has_its_text_and_numbers(tmp_path):
    page = page_of(tmp_path, response())
    for name, tokens in (("before training", TOKENS[:2]), ("after training", TOKENS)):
        found = page.tokens(0, name)
        assert [t["text"] for t in found] == [t.text for t in tokens]
        assert [t["logp"] for t in found] == pytest.approx([t.logp for t in tokens], abs=0.005)
        assert [t["cf"] for t in found] == pytest.approx([t.logp_cf for t in tokens], abs=0.005)
        assert [t["weight"] for t in found] == pytest.approx([t.token_weight for t in tokens], abs=0.005)
        assert [t["text"] for t in found if t["top"]] == ["عربي"][: len(tokens) - 2]
    assert page.data["passes"] == ["before training", "after training"] and page.data["users"] == ["user 7"]
    assert page.data["strings"] == ["I have a dog called Juno.", "What now?"]
    assert page.data["responses"][0]["source"] == "rows.jsonl:3" and page.data["responses"][0]["turns"] == [["user", 1]]
    assert "Loss" in page.text and "2.41" in page.text


def test_data_cannot_act_on_the_page(tmp_path):
    hostile = ScoredResponse(
        (HOSTILE,), ((HOSTILE, HOSTILE),),
        {HOSTILE: [ScoredToken(HOSTILE, -1.0, -3.0, 2.0, 2.0), ScoredToken("\ud83d", -1.0, -1.0, 0.0, 0.8)]},
        HOSTILE, HOSTILE,
    )  # fmt: skip
    panels = [Histogram(HOSTILE, [0.0, 1.0], [1], (0.5, 0.5)), Cells(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)]
    harmless_panels = [Histogram("h", [0.0, 1.0], [1], (0.5, 0.5)), Cells("t", ["a"], [["b"]], "n")]
    users = [hostile, replace(hostile, user_id="b")]
    page = page_of(tmp_path, *users, title=HOSTILE, summary=[(HOSTILE, HOSTILE)], panels=panels)
    other = [response(TOKENS[:1]), response(TOKENS[:1], user_id="b")]  # without a word that is an example
    harmless = page_of(tmp_path, *other, panels=harmless_panels)
    elements = [[(tag, *attrs) for tag, attrs in each.tags] for each in (page, harmless)]
    assert elements[0] == elements[1], "the same elements, with the same attributes"
    assert page.inside["script"] == harmless.inside["script"] and page.inside["style"] == harmless.inside["style"]
    seen = 2 + 2 + 2 + 4 + 1  # title, summary, histogram, table, users
    assert page.html.count("<script") == 2 and page.text.count(SHOWN) == seen
    assert page.data["strings"] == [SHOWN] and page.data["users"] == [SHOWN, "b"]
    assert page.tokens(0, SHOWN)[0]["text"] == SHOWN and page.tokens(0, SHOWN)[1]["text"] == "\\ud83d"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page.html + page.json)


def test_the_policy_allows_this_style_and_this_script_alone(tmp_path):
    page = page_of(tmp_path, response())
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    digests = {kind: hashlib.sha256(page.inside[kind].encode()).digest() for kind in ("style", "script")}
    hashes = {kind: base64.b64encode(digest).decode() for kind, digest in digests.items()}
    assert policy.split("; ") == [
        "default-src 'none'", f"style-src 'sha256-{hashes['style']}'", f"script-src 'sha256-{hashes['script']}'",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    assert page.html.index("http-equiv") < page.html.index("<style") < page.html.index("<script")
    assert "unsafe" not in policy


def test_the_file_needs_nothing_from_outside_and_is_the_same_each_time(tmp_path):
    panels = [Histogram("h", [0.0, 1.0], [1], (0.5, 0.5))]
    page = page_of(tmp_path, response(), response(user_id="b"), panels=panels)
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not attributes & {"src", "href", "srcset", "action", "style"} and not any(x[:2] == "on" for x in attributes)
    rest = page.html.replace(page.inside["data"], "")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<img|<iframe", rest)
    acts = r"\b(fetch|XMLHttpRequest|WebSocket|import|eval|innerHTML|outerHTML|insertAdjacentHTML|write)\b"
    assert not re.search(acts, page.inside["script"])
    assert "prefers-color-scheme: dark" in page.inside["style"]
    assert page.html == page_of(tmp_path, response(), response(user_id="b"), panels=panels).html


@pytest.mark.parametrize("name", OBJECTIVES)
def test_words_are_about_the_objectives_own_signal(tmp_path, name):
    objective = OBJECTIVES[name]
    of = weighed(name, documents=name == "longce")
    page, reported = page_of(tmp_path, response(), of=of), of.weighting.reported
    text = " ".join(page.text.split())
    assert f"{reported.signal.name}, clipped" in text and page.data["signal"] == reported.signal.name
    assert (
        f"weight of a token is {reported.signal.name}, clipped to {reported.clip_min:g} … {reported.clip_max:g}" in text
    )
    assert f"{reported.clip_min:g} <i></i> {reported.clip_max:g}" in page.html
    assert reported.signal.meaning and f" is {reported.signal.meaning[:12]}" in text, "each entry says what it means"
    twice = "A token with twice the weight of another counts twice as much in the loss."
    assert ("gives every token the same weight" in text) == (objective.signal is None) == (twice not in text)
    own = "PerCE's weight" if objective.signal is None else "weight"
    assert page.data["weight"] == own
    if name in ("perce", "ce"):
        assert f"within the clip, so {'' if name == 'ce' else 'its '}{own} is" in text
    assert ("to other tokens" in text) == (name == "random")
    assert ("after the long context" in text) == (name == "longce") != ("with the persona" in text)
    columns = page.data["responses"][0]["passes"][1]
    assert ("signal" in columns) == (reported.signal.name != "PIR")


def test_another_contrast_and_clip_are_those_of_the_words(tmp_path):
    text = " ".join(page_of(tmp_path, response(), of=weighed(signal=RATIO, clip_min=0.25, clip_max=7.5)).text.split())
    assert "weight of a token is exp(PIR), clipped to 0.25 … 7.5" in text and "how many times as likely" in text


def test_an_example_of_the_page_is_worked_out(tmp_path):
    text = " ".join(page_of(tmp_path, response()).text.split())
    assert "Juno in response 1 has log-probability −0.50 with the persona and −2.75 without it: PIR is 2.25." in text
    assert "within the clip, so its weight is 2.25" in text
    low = [ScoredToken(" no", -1.0, -0.5, -0.5, 0.8)]
    assert "PIR is −0.50. That is below the clip, which raises it to 0.80" in page_of(tmp_path, response(low)).text
    for none in ([ScoredToken(" a", -1.0, -9.0, 8.0, 5.0)], [ScoredToken(" 1", -1.0, -2.0, 1.0, 1.0)], []):
        assert "For example" not in page_of(tmp_path, response(none)).text


def test_what_is_left_out_is_told(tmp_path):
    assert "This page shows 1 of 1,234 scored responses." in page_of(tmp_path, response(), scored=1234).text
    assert "This page shows" not in page_of(tmp_path, response()).text


def test_what_would_make_the_page_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_TOKENS", 20)  # of 7 per response: 2 before training, 5 after it
    found = page_of(tmp_path, *[response(user_id=str(number)) for number in range(4)])
    assert found.data["users"] == ["0", "1"] and "This page shows 2 of 4 scored responses." in found.text
    assert "This page shows 2 of 9 scored" in page_of(tmp_path, *[response()] * 3, scored=9).text
    assert len(page_of(tmp_path, response(TOKENS * 9), response()).data["responses"]) == 1, "the first is always shown"


def test_a_page_that_shows_none_of_what_was_scored_says_so(tmp_path):
    text = page_of(tmp_path, scored=200).text
    assert "This page shows 0 of 200 scored responses." in text and "No responses were scored" not in text
    assert "No responses are shown." in text


def test_empty_inputs(tmp_path):
    page = page_of(tmp_path, summary=())
    assert "No responses were scored." in page.text and page.data["responses"] == []
    page = page_of(tmp_path, ScoredResponse((), (), {"only": []}))
    assert page.tokens(0, "only") == [] and page.data["responses"][0]["user"] is None
    assert "allow scripts" in page.text and ("noscript", {}) in page.tags


def test_panels_show_counts_and_clip_shares(tmp_path):
    histogram = Histogram("Weights", [-1.0, 0.8, 2.0, 5.0, 6.0], [70, 20, 5, 5], (0.7, 0.05))
    page = page_of(tmp_path, panels=[histogram, Cells("T", ["a", "b"], [["1", "2"]] * 9), Cells("U", ["a"], [["1"]])])
    assert "70.0% lie at the floor (0.8 or less)" in page.text and "5.0% at the ceiling (5 or more)" in page.text
    assert "Weights -1 to 0.8: 70 tokens, 70.0%" in page.text
    heights = [float(attrs["height"]) for tag, attrs in page.tags if tag == "rect" and attrs["class"] == "base"]
    assert (
        heights[0] == 100 and heights == sorted(heights, reverse=True) and heights[1] == pytest.approx(53.45, abs=0.01)
    )
    assert ["open" in attrs for tag, attrs in page.tags if tag == "details"] == [False, False, True]


def test_users_of_a_page_that_shows_some_responses_are_those_of_these(tmp_path):
    two = response(), response(user_id="b")
    assert "Of the responses shown." in page_of(tmp_path, *two, scored=9).text
    assert "Of the responses shown." not in page_of(tmp_path, *two).text


def test_users_have_their_means(tmp_path):
    found = users_table([response(user_id="b"), response(TOKENS[:1], user_id="a"), response(user_id="b")])
    assert found.rows == [("b", "2", "10", "1.65", "0.82"), ("a", "1", "1", "0.25", "1.25")] and not found.note
    assert users_table([response()]) is None and users_table([response(user_id=None)]) is None
    infinite = [ScoredToken("a", -math.inf, -1.0, -math.inf, 0.8)]
    found = users_table([response([], user_id="a"), response(infinite, user_id="b"), response(user_id="c")])
    assert [row[2:] for row in found.rows] == [("0", "–", "–"), ("1", "–", "–"), ("5", "1.65", "0.82")]
    many = users_table([response(user_id=str(number)) for number in range(MOST_USERS + 1)])
    assert len(many.rows) == MOST_USERS and many.note == f"The {MOST_USERS} users with the most responses, of 51."


WORDS = ["".join(random.Random(seed).choices("etaoinshrdlu", k=2 + seed % 8)) for seed in range(5000)]


def random_pass(rng, texts) -> list[ScoredToken]:
    numbers = ((-rng.expovariate(0.4), -rng.expovariate(0.3)) for _ in texts)
    rows = zip(texts, numbers, strict=True)
    return [ScoredToken(t, a, b, a - b, min(max(a - b, 0.8), 5.0)) for t, (a, b) in rows]


def test_a_thousand_responses_take_less_than_five_megabytes(tmp_path):
    """Of 100 tokens, scored twice, each with a persona of its own of 100 words."""
    rng, responses = random.Random(0), []
    for number in range(1000):
        texts = [f" {rng.choice(WORDS)}" for _ in range(100)]
        passes = {name: random_pass(rng, texts) for name in ("before training", "after training")}
        persona = tuple(" ".join(rng.choices(WORDS, k=20)) for _ in range(5))
        responses.append(ScoredResponse(persona, (("user", " ".join(rng.choices(WORDS, k=20))),), passes, str(number)))
    found = page_of(tmp_path, *responses)
    assert len(found.data["responses"]) == 1000 and len(found.html.encode()) < 5_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["perce", "entce"])
def test_so_do_as_many_tokens_as_a_page_shows(tmp_path, name):
    """Scored once, which takes more per token than twice; another signal than PIR takes more again."""
    rng = random.Random(0)
    texts = [[f" {rng.choice(WORDS)}" for _ in range(1000)] for _ in range(page.MOST_TOKENS // 1000 + 5)]
    found = page_of(
        tmp_path, *[ScoredResponse((), (), {"p": random_pass(rng, each)}) for each in texts], of=weighed(name)
    )
    assert 3_000_000 < len(found.html.encode()) < 5_000_000
    assert len(found.data["responses"]) == page.MOST_TOKENS // 1000
