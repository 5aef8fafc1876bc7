"""The chat template of a tokenizer: messages → text, as transformers renders them.

transformers' own call converts whatever it may be given and takes twice as long as the template itself. Where it is
given texts alone, the template that it has compiled is called with what it would hand on.
"""

import inspect
import json
from collections.abc import Sequence
from typing import Any

PROBE = (("user", "u"), ("assistant", "a"))


class ChatTemplate:
    """Renders (role, content) messages. Whatever a template may raise comes as it is.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: instead of the tokenizer's own.
        variables: of the template, besides those that transformers gives it.
    """

    def __init__(self, tokenizer: Any, template: str | None, variables: dict[str, Any]):
        self.tokenizer, self.template, self.variables = tokenizer, template, variables
        self._given: dict[str, Any] | None = None
        """All variables but the messages, where the template is called itself."""
        given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **variables}
        try:
            asked = inspect.signature(tokenizer.apply_chat_template).parameters.keys() & variables.keys()
            plain = json.loads(json.dumps(variables)) == variables
            if plain and not asked and self._called(PROBE, True, given) == self.render(PROBE, True):
                self._given = given
        except Exception:  # a template may refuse these two messages, and transformers move what is not its interface
            return

    def render(self, messages: Sequence[tuple[str, str]], generation: bool) -> str:
        """The text of the conversation; generation: up to where a reply begins."""
        if self._given is not None:
            return self._called(messages, generation, self._given)
        return self.tokenizer.apply_chat_template(
            _said(messages), tokenize=False, add_generation_prompt=generation, chat_template=self.template,
            **self.variables,
        )  # fmt: skip

    def _called(self, messages: Sequence[tuple[str, str]], generation: bool, given: dict[str, Any]) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled = _compile_jinja_template(self.tokenizer.get_chat_template(self.template))  # each template once
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
    except (TemplateError, ValueError):  # it refuses one, or there is no template
        return False
