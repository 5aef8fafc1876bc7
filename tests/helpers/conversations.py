"""Made-up conversations whose texts begin, end and break lines in all ways that cause trouble for tokenizers and
templates."""

import random

from perce.data.rows import Example
from perce.reading.fields import Turn

# Texts are combined from these. Invisible characters are escaped.
WORDS = (
    *"I we you the my a cats dog Lisbon bread tomorrow never because with about play love seven evening".split(),
    *"antidisestablishmentarianism x über naïve Zürich STOP oK isn't I'm they've we'll WON'T O'Neill it’s".split(),
)
PIECES = (
    *"0 7 42 1999 3.14159 1,000,000 -5 12:30 50% £9.99 2024-02-29 1e-05 ½ x²".split(),
    *"东京 我喜欢面包。 こんにちは、世界！ 한국어 「引用」 กรุงเทพ हिन्दी Ελλάδα Привет".split(),
    *"ﷺ مرحبا بالعالم، שלום עולם? مُدَرِّس שָׁלוֹם \u200fיד".split(),
    *"🙂 👍🏽 👩\u200d💻 👨🏿\u200d👩🏻\u200d👧\u200d👦 🇵🇹 ❤\ufe0f 🏳\ufe0f\u200d🌈".split(),
    *"cafe\u0301 a\u0323\u0308 Z\u0351\u036b\u0343 soft\u00adhyphen \ufeffmark".split(),
    *"https://example.org/a_b?c=1&d=%20#e www.example.org me+you@example.org @someone #hash_tag C:\\dir".split(),
    *("def f(x):\n    return x[1:-1]  # half", "`a = b`", "```\nls -l | wc\n```", "if (a && !b) { c++; }"),
    *("{{ x }}", "{% y %}", "$\\frac{1}{2}$", "&amp;", "<b>", "a/b", "~", "^_^", ":-)"),
    *("- one\n- two\n  - three", "1. first\n2. second", "* a\n* b", "# Title\n\ntext", "| a | b |\n|---|---|"),
    *("**bold** _it_", "...", "--", "—", "?!", "(sic)", "[1]", '"quoted"', "“so”"),
)
SHORT = ("ok", ".", "5", "?", "👍", "好", "é", "-", "I", "no", "...", "\u0301")
OPENINGS = (
    *("-", "- ", "(", '"', "...", "?!", "#", "# ", "*", "* ", "'s ", ", ", "> ", "1"),
    *(" ", "  ", "\n", "\n\n", "\t"),
)
CLOSINGS = (
    *(".", "?", "!", "?!", "...", ":", ")", '"', ".)", "-", "*", "#"),
    *(" ", "  ", ". ", "\n", "\n\n", ".\n\n", " \n", "\t"),
)
JOINTS = (
    *(", ", ". ", ": ", "-", "", "  ", "    ", "\u00a0", "\u3000"),
    *("\n", "\n\n", "\n\n\n", " \n", "  \n\n", "\n  ", ".\n", ":\n\n", "\t", "\n\t", "\r\n"),
)


def _text(rng: random.Random) -> str:
    """Never blank: every word and piece has a character that is not a space."""
    if rng.random() < 0.12:
        return rng.choice(SHORT)
    text = rng.choice(rng.choice((WORDS, PIECES)))
    for _ in range(rng.randrange(12)):
        joint = " " if rng.random() < 0.7 else rng.choice(JOINTS)
        text += joint + rng.choice(rng.choice((WORDS, PIECES)))
    opening = rng.choice(OPENINGS) if rng.random() < 0.35 else ""
    closing = rng.choice(CLOSINGS) if rng.random() < 0.7 else ""
    return opening + text + closing


def conversations(count: int, seed: int = 0) -> list[Example]:
    """The first `count` conversations of a seed, the same in every process; a larger count only adds to them."""
    rng = random.Random(seed)
    return [
        Example(
            persona=tuple(_text(rng) for _ in range(rng.randint(1, 4))),
            turns=tuple(Turn(("user", "assistant")[i % 2], _text(rng)) for i in range(rng.choice((1, 3, 5)))),
            response=_text(rng),
            user_id=None,
            personal_spans=None,
            source=f"made:{number}",
        )
        for number in range(count)
    ]
