"""The HTML page of scored responses: `python -m benchmarks.pages`, its size and the time until it can be read.

    size     in megabytes of a page of --examples responses that are made up from the built-in examples, scored twice
    open     from the start of the navigation until the first responses are rendered, in Chromium, median of 5
    search   from a key in the search field until the list is there, median of 5
    --page   another page, such as a run's report.html
    --output DIR    screenshots of it: light, dark, both passes, tinted by PIR and by change, filtered, 390 pixels wide

    python -m benchmarks.pages --picture runs/demo/report.html --response 1 --output docs/images/reply

draws one response of the last pass, docs/images/reply.png and reply_dark.png. Needs playwright and Chromium.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from perce.demo import DATA_DIR
from perce.objectives import OBJECTIVES
from perce.report.heatmap import ScoredResponse, ScoredToken
from perce.report.page import Weighed, write_page
from tests.helpers.browser import NoBrowser, chromium, opened

REPEATS = 5
COLOURS = 96  # of a picture
TOKEN = re.compile(r" ?\w{1,6}|\w+|\s|[^\w\s]")  # about as long as a tokenizer's
SHOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "light": ("", {}),
    "dark": ("", {"color_scheme": "dark"}),
    "both": ("choosePass('both')", {}),
    "pir": ("choose('tint', 'pir')", {}),
    "change_dark": ("choosePass('both'), choose('tint', 'change')", {"color_scheme": "dark"}),
    "filtered": ("find('my '), choose('sort', 'loss')", {}),
    "reading": ("document.querySelector('.reading').open = true", {}),
    "keys": ("$('keys').showModal()", {}),
    "narrow": ("", {"viewport": {"width": 390, "height": 844}, "has_touch": True}),
    "narrow_dark": (
        "choosePass('both'), $('bar').scrollIntoView(), focusToken(document.querySelectorAll('.t')[4])",
        {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "dark"},
    ),
}
"""Name → what is done in the page before, and the browser's context."""


def made_up(count: int) -> list[ScoredResponse]:
    """Responses of sentences of the built-in examples, about four in five tokens without personal weight."""
    rng = random.Random(0)
    lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    sentences = [part for row in rows for part in re.findall(r"[^.!?]+[.!?]+ ?", row["response"])]
    queries = [row["query"] for row in rows if "query" in row]
    entries = [entry for row in rows for entry in row["persona"]]
    responses = []
    for number in range(count):
        if number % 5 == 0:
            persona = tuple(rng.sample(entries, 6))
        texts = TOKEN.findall("".join(rng.sample(sentences, 7)))
        pairs = [(-rng.expovariate(0.4), rng.gauss(0.1, 0.3) if rng.random() < 0.8 else rng.gauss(2, 2)) for _ in texts]
        passes = {
            "before training": [_token(*each) for each in zip(texts, pairs, strict=True)],
            "after training": [_token(t, (0.9 * a, 1.1 * b)) for t, (a, b) in zip(texts, pairs, strict=True)],
        }
        turns = (("user", rng.choice(queries)),)
        responses.append(ScoredResponse(persona, turns, passes, f"user-{number // 5}", f"train.jsonl:{number + 1}"))
    return responses


def _token(text: str, numbers: tuple[float, float]) -> ScoredToken:
    logp, pir = numbers
    return ScoredToken(text, logp, logp - pir, pir, min(max(pir, 0.8), 5.0))


def measured(browser: Any, path: Path) -> dict[str, float]:
    """Milliseconds: until the first responses are there, and of a search."""
    times: dict[str, list[float]] = {"open": [], "search": []}
    search = """query => {
      const begun = performance.now();
      find(query);
      document.body.offsetHeight;
      return performance.now() - begun;
    }"""
    # The frame after the first tokens are in the page: what is measured has been laid out.
    ready = """new MutationObserver((_, observer) => {
      if (!document.querySelector(".t")) return;
      observer.disconnect();
      requestAnimationFrame(() => setTimeout(() => (window.ready = performance.now())));
    }).observe(document, { childList: true, subtree: true })"""
    for _ in range(REPEATS):
        context = browser.new_context(viewport={"width": 1000, "height": 900})
        context.add_init_script(ready)
        tab = context.new_page()
        tab.goto(path.as_uri())
        times["open"].append(tab.wait_for_function("() => window.ready").json_value())
        times["search"].append(tab.evaluate(search, "the"))
        context.close()
    return {name: median(found) for name, found in times.items()}


def photographed(browser: Any, path: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, (done, context) in SHOTS.items():
        with opened(browser, path, **context) as tab:
            tab.evaluate(f"() => {{ {done} }}")
            tab.wait_for_timeout(200)
            tab.screenshot(path=directory / f"{name}.png")


def picture(browser: Any, path: Path, response: int, output: str) -> None:
    """One response, as it is after training, light and dark. SystemExit if the page has no such response."""
    for scheme, suffix in (("light", ""), ("dark", "_dark")):
        view = {"width": 800, "height": 1200}
        with opened(browser, path, color_scheme=scheme, viewport=view, device_scale_factor=2) as tab:
            card = tab.evaluate_handle(
                """place => {
                  const card = cards[place];
                  if (!card) return null;
                  choosePass(data.passes.length - 1);
                  $("list").replaceChildren(card.node);
                  fill(card);
                  return card.node;
                }""",
                response - 1,
            ).as_element()
            if card is None:
                sys.exit(f"{path}: has no response {response}.")
            shot = Image.open(BytesIO(card.screenshot()))
            # A fifth of the bytes; the tints are few.
            shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(f"{output}{suffix}.png", optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    words, _, rest = (__doc__ or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.pages", description=words + rest, formatter_class=form)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--output")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--response", type=int, default=1)
    asked = parser.parse_args(argv)
    if asked.picture and not asked.output:
        parser.error("--picture needs --output, the beginning of the names of the files")
    try:
        with chromium() as browser, tempfile.TemporaryDirectory() as scratch:
            if asked.picture:
                return picture(browser, asked.picture.resolve(), asked.response, asked.output)
            path = asked.page and asked.page.resolve()
            if path is None:
                path, entry = Path(scratch) / "page.html", OBJECTIVES["perce"]
                summary = [("data", f"{asked.examples:,} made-up responses")]
                weighed = Weighed(entry, entry.weighting())
                write_page(path, made_up(asked.examples), title="Made up", summary=summary, weighed=weighed)
            found = measured(browser, path)
            print(f"size    {path.stat().st_size / 1e6:.2f} MB")
            print(f"open    {found['open']:.0f} ms until the first responses are rendered, median of {REPEATS}")
            print(f"search  {found['search']:.0f} ms, median of {REPEATS}")
            if asked.output:
                photographed(browser, path, Path(asked.output))
    except NoBrowser as reason:
        sys.exit(f"benchmarks.pages: {reason}")


if __name__ == "__main__":
    main()
