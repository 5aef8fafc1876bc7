"""Chromium without a window, by playwright, which no extra of the package brings."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


class NoBrowser(Exception):
    """What to install."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Raises NoBrowser where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise NoBrowser("needs playwright: pip install playwright") from None
    if CHROMIUM is None:
        raise NoBrowser("needs Chromium on the PATH: chromium, chromium-browser or google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, path: Path, wait: str = ".t, #nothing:not([hidden])", **context: Any) -> Iterator[Any]:
    """A tab with the page, whose first responses are there (`wait`: a selector). AssertionError at the end if anything
    but the file was asked for, or anything was said on the console, as of a script that the policy does not allow."""
    tab = browser.new_context(**{"viewport": {"width": 1000, "height": 900}} | context).new_page()
    said: list[str] = []
    tab.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(path.as_uri())
    tab.wait_for_selector(wait)
    try:
        yield tab
    finally:
        tab.context.close()
    assert not said
