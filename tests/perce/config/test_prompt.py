"""How a prompt words the persona."""

import pytest

from perce import UserError
from perce.config.prompt import PromptStyle


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sytem": "x"}, "expected keys among system, place"),
        ({"place": "top"}, "system or user"),
        ({"item": "- "}, "one {} in item"),
        ({"system": "{persona}"}, "words besides the persona"),
        ({"header": 3}, "a text as header"),
        ("user", "expected a mapping with keys among system, place"),
    ],
)
def test_what_a_style_says_wrongly_is_named(keys, message):
    with pytest.raises(UserError, match=f"prompt: .*{message}"):
        PromptStyle.of(keys)
