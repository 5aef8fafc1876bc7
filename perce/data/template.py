"""The chat template of a tokenizer: messages → text, as transformers renders them.

transformers' apply_chat_template converts many kinds of input and takes twice as long as the template itself. If all
contents are texts, the template that transformers has compiled is called directly, with the same variables.
"""

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

PROBE = (("user", "u"), ("assistant", "a"))
DAY = datetime(2026, 1, 1)


@contextmanager
def on_one_day() -> Iterator[None]:
    """Templates that write today's date write DAY meanwhile: cached pairs, evaluations and resumed runs are of the same
    prompts on every day. transformers has a function for the date in each template's globals, and replaces functions
    that are given as variables."""
    from transformers.utils import chat_template_utils as utils

    clock, utils.datetime = utils.datetime, SimpleNamespace(now=lambda: DAY)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        utils.datetime = clock  # type: ignore[misc]


class ChatTemplate:
    """Renders (role, content) messages. Exceptions of the template are not caught.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: a template to use instead of the tokenizer's own.
        variables: variables of the template, besides those that transformers gives it.
    """

    @on_one_day()
    def __init__(self, tokenizer: Any, template: str | None, variables: dict[str, Any]):
        self.tokenizer, self.template, self.variables = tokenizer, template, variables
        self._given: dict[str, Any] | None = None
        """All variables except the messages if the template is called directly; None if transformers calls it."""
        given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **variables}
        try:
            asked = inspect.signature(tokenizer.apply_chat_template).parameters.keys() & variables.keys()
            plain = json.loads(json.dumps(variables)) == variables
            if plain and not asked and self._called(PROBE, True, given) == self.render(PROBE, True):
                self._given = given
        except Exception:  # a template may refuse PROBE, and transformers may move its private functions
            return

    @on_one_day()
    def render(self, messages: Sequence[tuple[str, str]], generation: bool) -> str:
        """The text of the conversation. generation: append the generation prompt, after which a reply begins."""
        if self._given is not None:
            return self._called(messages, generation, self._given)
        return self.tokenizer.apply_chat_template(
            _said(messages), tokenize=False, add_generation_prompt=generation, chat_template=self.template,
            **self.variables,
        )  # fmt: skip

    def _called(self, messages: Sequence[tuple[str, str]], generation: bool, given: dict[str, Any]) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled = _compile_jinja_template(self.tokenizer.get_chat_template(self.template))  # it caches each template
        return compiled.render(messages=_said(messages), add_generation_prompt=generation, **given)


def _said(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def has_system_role(tokenizer: Any, template: str | None = None) -> bool:
    """Whether a chat template, by default the tokenizer's own, renders a system message."""
    from jinja2 import TemplateError

    try:
        return "PERSONA" in tokenizer.apply_chat_template(
            _said([("system", "PERSONA"), ("user", "u")]), tokenize=False, chat_template=template
        )  # fmt: skip
    except (TemplateError, ValueError):  # the template refuses it, or there is no template
        return False
