"""The words of a prompt."""

import pytest

from perce import UserError, prompt_text
from perce.config.prompt import SYSTEM_MESSAGE, PromptStyle
from perce.data.prompt import system_text, tell


def test_a_prompt_is_told_as_text():
    for wrong in ([" "], ["A", None], 3, None, {"job": "baker"}, {"A", "B"}, b"A"):
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


def test_a_conversation_is_told_with_a_persona():
    user, own = {"role": "user", "content": " U"}, {"role": "system", "content": "S."}
    reply = {"role": "assistant", "content": "A", "tool_calls": []}
    for messages, style, has_role, expected in (
        ([user, reply], {}, True, [("system", f"[P]{SYSTEM_MESSAGE}"), ("user", " U")]),
        ([own, user, reply], {}, True, [("system", "[P]S."), ("user", " U")]),
        ([own, user, reply], {"place": "user"}, True, [("system", "S."), ("user", "[P]U")]),
        ([own, user, reply], {}, False, [("user", "[P]S.\n\n U")]),
        ([own, user, reply], {"place": "user"}, False, [("user", "S.\n\n[P]U")]),
    ):
        told = tell(messages, "[P]", PromptStyle.of(style), has_role)
        assert [(m["role"], m["content"]) for m in told[:-1]] == expected and told[-1] is not reply == told[-1]
    told = tell([own, reply, user], "[P]", PromptStyle(), False)
    assert told == [{"role": "user", "content": "[P]S."}, reply, user], "the persona comes before the first reply"
    assert user["content"] == " U", "what was given stays as it is"
    assert tell([own, reply], "[P]", PromptStyle(), True)[0]["content"] == "[P]S.", "no user turn is needed for that"
    for wrong in ([reply], [{"role": "user", "content": [{"type": "text", "text": "U"}]}]):
        with pytest.raises(UserError, match="expected texts as system message and as first user turn"):
            tell(wrong, "[P]", PromptStyle(place="user"), True)
    with pytest.raises(UserError, match="expected messages, got none"):
        tell([], "[P]", PromptStyle(), True)
