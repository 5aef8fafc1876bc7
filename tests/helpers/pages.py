"""Tokens to show, and what a page of scored responses holds, read without a browser."""

import base64
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from perce.report.heatmap import ScoredToken

TOKENS = (
    ScoredToken("Take", -1.25, -1.50, 0.25, 0.8),
    ScoredToken(" Juno", -0.50, -2.75, 2.25, 2.25),
    ScoredToken(" out", -2.00, -1.00, -1.0, 0.8),
    ScoredToken(".\n\n", -0.10, -0.10, 0.0, 0.8),
    ScoredToken("عربي", -0.25, -7.00, 6.75, 5.0),
)


class Page(HTMLParser):
    """Every tag with its attributes, the text outside <style> and <script>, those two, and the embedded data."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_bytes().decode()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.inside: dict[str, str] = {"style": "", "script": "", "data": ""}
        self._in = ""
        self.feed(self.html)
        self.json = zlib.decompress(base64.b64decode(self.inside["data"], validate=True)).decode()
        self.data: dict[str, Any] = json.loads(self.json)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag in ("style", "script"):
            self._in = attrs.get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("style", "script"):
            self._in = ""

    def handle_data(self, data):
        if self._in:
            self.inside[self._in] += data
        else:
            self.text += data

    def words(self) -> str:
        """Of the data: users, entries, turns and responses."""
        texts = [text for response in self.data["responses"] for text, _ in response["texts"]]
        return "\n".join([*self.data["users"], *self.data["strings"], *texts])

    def tokens(self, response: int, name: str) -> list[dict[str, Any]]:
        """The tokens of one pass: their text and columns, in nats."""
        content = self.data["responses"][response]
        own = content["passes"][self.data["passes"].index(name)]
        text, lengths = content["texts"][own["text"]]
        utf_16, at, found = text.encode("utf-16-le"), 0, []
        units = {"logp": 0.01, "cf": 0.01, "weight": self.data["unit"], "signal": self.data["unit"]}
        for place, length in enumerate(lengths):
            piece = utf_16[2 * at : 2 * (at + length)].decode("utf-16-le")
            at += length
            whole = {name: own[name][place] for name in units if name in own}
            columns = {name: None if value is None else value * units[name] for name, value in whole.items()}
            found.append({"text": piece, "top": own["ends"][place] == "c", **columns})
        return found
