"""The chat template of a tokenizer: messages → text, as transformers renders them.

transformers' apply_chat_template converts many kinds of input and takes twice as long as the template itself. If all
contents are texts, the template that transformers has compiled is called directly, with the same variables.
"""

import difflib
import inspect
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from perce.errors import UserError
from perce.visible import in_short

PROBE = (("user", "u"), ("assistant", "a"))
DAY = datetime(2026, 1, 1)
_CLOCK = threading.RLock()


@contextmanager
def on_one_day(day: datetime = DAY) -> Iterator[None]:
    """Templates that write today's date write this day meanwhile: cached pairs, evaluations and resumed runs are of the
    same prompts on every day. transformers' own call gives templates its clock, which one thread at a time replaces."""
    from transformers.utils import chat_template_utils as utils

    with _CLOCK:
        clock, utils.datetime = utils.datetime, SimpleNamespace(now=lambda: day)  # type: ignore[assignment, misc]
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

    def __init__(self, tokenizer: Any, template: str | None, variables: dict[str, Any]):
        self.tokenizer, self.template, self.variables = tokenizer, template, variables
        self._given: dict[str, Any] | None = None
        """All variables except the messages if the template is called directly; None if transformers calls it."""
        given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **variables}
        try:
            asked = inspect.signature(tokenizer.apply_chat_template).parameters.keys() & variables.keys()
            plain = json.loads(json.dumps(variables)) == variables
            if plain and not asked and self._called(PROBE, True, DAY, given) == self.render(PROBE, True):
                self._given = given
        except Exception:  # a template may refuse PROBE, and transformers may move its private functions
            return

    def render(self, messages: Sequence[tuple[str, str]], generation: bool, day: datetime = DAY) -> str:
        """The text of the conversation on this day. generation: append the generation prompt, after which a reply
        begins."""
        if self._given is not None:
            return self._called(messages, generation, day, self._given)
        with on_one_day(day):
            return self.tokenizer.apply_chat_template(
                _said(messages), tokenize=False, add_generation_prompt=generation, chat_template=self.template,
                **self.variables,
            )  # fmt: skip

    def check_variables(self) -> None:
        """UserError for a variable that the template does not read, if that can be known."""
        from jinja2 import meta
        from transformers import PreTrainedTokenizerBase
        from transformers.utils.chat_template_utils import _compile_jinja_template

        own = type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        if own or not self.variables:
            return
        try:
            source = self.tokenizer.get_chat_template(self.template, self.variables.get("tools"))
            read = meta.find_undeclared_variables(_compile_jinja_template(source).environment.parse(source))
        except Exception:  # what does not compile fails where it is rendered
            return
        if unread := [name for name in self.variables if name not in read]:
            given = {"messages", "tools", "documents", "add_generation_prompt", *self.tokenizer.special_tokens_map}
            others = sorted(read - given)
            near = difflib.get_close_matches(unread[0], others, n=2)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"It reads {in_short(others) or 'none'}."
            raise UserError(
                f"chat_template_kwargs: the chat template of {self.tokenizer.name_or_path!r} does not read "
                f"{', '.join(unread)}. {hint} Leave it out; instead of a recipe's value give none."
            )

    def _called(
        self, messages: Sequence[tuple[str, str]], generation: bool, day: datetime, given: dict[str, Any]
    ) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled = _compile_jinja_template(self.tokenizer.get_chat_template(self.template))  # it caches each template
        # A variable has precedence over the function of this name that transformers gives to templates.
        said = {"messages": _said(messages), "add_generation_prompt": generation}
        return compiled.render(**said, strftime_now=day.strftime, **given)


def _said(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def has_system_role(tokenizer: Any, template: str | None = None) -> bool:
    """Whether a chat template, by default the tokenizer's own, renders a system message, also when the conversation
    ends with a reply. Mistral's of v0.3 does so only in front of a user turn that ends the conversation."""
    from jinja2 import TemplateError

    asked = [("system", "PERSONA"), ("user", "u")]
    try:
        return all(
            "PERSONA" in tokenizer.apply_chat_template(_said(said), tokenize=False, chat_template=template)
            for said in (asked, [*asked, ("assistant", "a")])
        )
    except (TemplateError, ValueError):  # the template refuses it, or there is no template
        return False
