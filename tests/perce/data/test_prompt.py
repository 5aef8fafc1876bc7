"""The words of a prompt."""

import pytest

from perce import UserError, prompt_text
from perce.data.prompt import SYSTEM_MESSAGE, PromptStyle, system_text


def test_what_a_prompt_says_wrongly_is_named():
    for keys, message in (
        ({"sytem": "x"}, "expected any of system, place"), ({"place": "top"}, "system or user"),
        ({"item": "- "}, "one {} in item"), ({"system": "{persona}"}, "without the persona too"),
        ({"header": 3}, "a text as header"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"prompt: .*{message}"):
            PromptStyle.of(keys)
    for wrong in ([" "], ["A", None], 3, None):
        with pytest.raises(UserError, match=r"persona.*expected"):
            prompt_text(wrong)
    with pytest.raises(UserError, match="system: expected a text, got 5"):
        prompt_text("A", 5)
    assert prompt_text("I keep bees.") == f"About the user:\n- I keep bees.\n\n{SYSTEM_MESSAGE}"
    assert prompt_text(["A."], "Be brief.") == "About the user:\n- A.\n\nBe brief."


def test_the_persona_stands_where_the_style_says():
    for keys, expected in (
        ({}, "[P]Be brief."), ({"place": "user"}, "Be brief."),
    ):  # fmt: skip
        assert system_text(PromptStyle.of(keys), "[P]", " Be brief.\n") == expected
    assert system_text(PromptStyle(), "[P]", "Know {persona}and {persona}.") == "Know [P]and {persona}."
    assert system_text(PromptStyle(), "") == SYSTEM_MESSAGE
