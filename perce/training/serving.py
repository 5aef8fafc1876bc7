"""What is saved with a run so that it can be prompted without perce: chat template and end of turn."""

import json
import re
from contextlib import suppress
from typing import Any

from perce.config.prompt import SLOT, STYLE, PromptStyle
from perce.data.chat import ChatFormat
from perce.data.prompt import PLAIN_CHAT_TEMPLATE
from perce.data.stream import PairStream
from perce.data.template import ChatTemplate
from perce.errors import UserError, first_line
from perce.model.probe import unwrapped
from perce.reading.fields import Turn

# Put before a chat template: if the variable `persona` is given, it is put into the messages as in training; without an
# entry nothing is, but the system message is that of training. Names in capitals are replaced by texts, PLACED by the
# lines for the place of the persona.
_BEGINS, _ENDS = "{%- if persona is defined and persona is not none %}", "{{- '' }}"
_PERSONA = (
    _BEGINS
    + """
{%- set told = namespace(text='') %}
{%- for entry in ([persona] if persona is string else persona) if entry is string and entry | trim %}
{%- set told.text = told.text ~ BEFORE ~ (entry | trim) ~ AFTER %}
{%- endfor %}
{%- set told = HEADER ~ told.text ~ FOOTER if told.text else '' %}
{%- set own = (messages[0].content | trim) if messages[0].role == 'system' else SYSTEM %}
{%- set others = messages[1:] if messages[0].role == 'system' else messages %}
{%- if others[0].role != 'user' or messages[0].content is not string %}
{{- raise_exception('persona: expected texts as contents, and a user message first, behind the system message') }}
{%- endif %}
PLACED
{%- endif %}"""
    + _ENDS
)
# Not replace(SLOT, told, 1): llama.cpp's Jinja does not know the count.
_IN_SYSTEM = """{%- set parts = own.split(SLOT) %}
{%- set own = parts[0] ~ told ~ (parts[1:] | join(SLOT)) if parts[1:] else told ~ own %}
"""
_BEFORE_USER = """{%- set others = [{'role': 'user', 'content': told ~ others[0].content.lstrip()}] + others[1:] %}"""
_WITH_ROLE = "{%- set messages = [{'role': 'system', 'content': own}] + others %}"
_WITHOUT_ROLE = """{%- set first = own ~ '\\n\\n' ~ others[0].content %}
{%- set messages = [{'role': 'user', 'content': first}] + others[1:] %}"""


def serve_as_trained(model: Any, tokenizer: Any, dataset: Any, data: Any) -> None:
    """Complete what will be saved, from the dataset that is trained on and its options (DataConfig).

    The token that ends a trained reply is added to the generation config's ends: otherwise a base model with another
    end of sequence would never stop. A tokenizer without a chat template is given the one that its prompts are rendered
    with, and the template takes the persona as a variable.
    """
    config, end = getattr(unwrapped(model), "generation_config", None), end_of_reply(dataset)
    if config is None or end is None:
        return
    _check_generation(config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = list(dict.fromkeys([*(token for token in known if token is not None), end]))
    if tokenizer is None:
        return
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    keys = data.prompt_style()
    if keys:
        tokenizer.init_kwargs[STYLE] = keys
    with suppress(UserError):  # pairs that were made elsewhere need no template that perce can use
        chat_format = ChatFormat(tokenizer, data.template_kwargs(), style=PromptStyle.of(keys) if keys else None)
        tokenizer.chat_template = with_persona(tokenizer, chat_format)


def _check_generation(config: Any) -> None:
    """Turn sampling on if the config asks for it but has it off (a temperature with do_sample=False). UserError for a
    config that transformers would refuse to save for another reason, after all is computed."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise UserError(
                f"The model's generation_config.json is invalid, so it could not be saved: {first_line(error)}"
            ) from error


def end_of_reply(dataset: Any) -> int | None:
    """The last token of the dataset's replies; None for documents, and if it is not known beforehand."""
    if isinstance(dataset, PairStream):
        chat_format = getattr(dataset.source.builder, "chat_format", None)
        return None if chat_format is None else chat_format.end_of_turn
    first = dataset[0] if hasattr(dataset, "__len__") and len(dataset) else {"windows": []}
    return None if "windows" in first else int(first["input_ids"][-1])


def takes_persona(template: Any) -> bool:
    """Whether the chat template(s) have what `with_persona` adds."""
    template = template.get("default") if isinstance(template, dict) else template
    return bool(template) and template.startswith(_BEGINS)


def with_persona(tokenizer: Any, chat_format: ChatFormat) -> Any:
    """The tokenizer's chat template(s), extended by the variable `persona`, a text or a list of texts. They are
    unchanged if that would not render what is trained on, or if they have that variable already."""
    named = tokenizer.chat_template
    template = named if isinstance(named, str) else named["default"]
    if takes_persona(template):  # added by the run that this one continues
        template = template.partition(_ENDS)[2]
    if re.search(r"\bpersona\b", template):
        return named
    style = chat_format.style
    placed = _BEFORE_USER if style.place == "user" else _IN_SYSTEM
    before, after = style.item.split("{}")
    texts = {
        "HEADER": style.header, "BEFORE": before, "AFTER": after, "FOOTER": chat_format.footer,
        "SYSTEM": style.system.strip(), "SLOT": SLOT,
    }  # fmt: skip
    prelude = _PERSONA.replace("PLACED", placed + (_WITH_ROLE if chat_format.has_system_role else _WITHOUT_ROLE))
    prelude = re.sub(rf"\b({'|'.join(texts)})\b", lambda name: json.dumps(texts[name[0]], ensure_ascii=False), prelude)
    extended = prelude + template
    turns, facts = [Turn("system", "S."), Turn("user", "U?")], ["A fact.", "Another."]

    def rendered(turns: list[Turn], template: str, **variables: Any) -> str:
        of = ChatTemplate(tokenizer, template, {**chat_format.template_kwargs, **variables})
        return of.render([(turn.role, turn.content) for turn in turns], generation=True)

    for asked in (turns[1:], turns) if chat_format.has_system_role else (turns[1:],):
        same = all(
            rendered(asked, extended, persona=persona) == chat_format.prompt(asked, chat_format.block(persona))
            for persona in (facts, [])
        )
        if not same or rendered(asked, extended) != rendered(asked, template):
            return named
    return extended if isinstance(named, str) else {**named, "default": extended}
