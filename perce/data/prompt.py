"""The words of a prompt: the persona block, and the system message around it. chat.py renders and tokenises them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perce.errors import UserError
from perce.visible import shortened

SYSTEM_MESSAGE = "Write the next message exactly as this user would."
PERSONA_FOOTERS = ("\n", "\n ")
"""Ends of the persona block. The first is used after which the next word has the same tokens as without the block."""
SLOT = "{persona}"
"""Marks the persona's place in a system message."""
PLACES = ("system", "user")
STYLE = "perce_prompt"
"""Key of tokenizer_config.json under which a run's own style is saved."""

# For tokenizers without a chat template (base models): plain text, and an end-of-sequence token after each reply.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}Message: {{ message.content }}\n"
    "{% else %}Reply: {{ message.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Reply:{% endif %}"
)
CONVERSATION_START = "(the conversation begins)"  # for templates that require a user turn first


@dataclass(frozen=True)
class PromptStyle:
    """How a prompt words the persona; the keys of --prompt. UserError for values of the wrong type."""

    system: str = SYSTEM_MESSAGE
    """System message of a conversation that has none of its own; the persona replaces SLOT in it."""
    place: str = "system"
    """One of PLACES: the persona stands before the system message's text, or before the first user turn's."""
    header: str = "About the user:\n"
    item: str = "- {}\n"
    """The text of one persona entry, which replaces {}."""
    footer: str | None = None
    """None: the first of PERSONA_FOOTERS that fits the tokenizer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str) and (name, value) != ("footer", None):
                raise UserError(f"prompt: expected a text as {name}, got {type(value).__name__} {value!r}.")
        if self.place not in PLACES:
            raise UserError(f"prompt: expected place to be {' or '.join(PLACES)}, got {self.place!r}.")
        if self.item.count("{}") != 1:
            raise UserError(f"prompt: expected one {{}} in item, which an entry replaces, got {self.item!r}.")
        if not self.system.replace(SLOT, "").strip():
            raise UserError("prompt: expected words besides the persona in system, got none.")

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> "PromptStyle":
        known = ", ".join(cls.__dataclass_fields__)
        if not isinstance(keys, Mapping):
            raise UserError(f"prompt: expected a mapping with keys among {known}, got {keys!r}.")
        if unknown := [name for name in keys if name not in cls.__dataclass_fields__]:
            raise UserError(f"prompt: expected keys among {known}, got {', '.join(unknown)}.")
        return cls(**keys)

    @classmethod
    def saved_with(cls, tokenizer: Any) -> "PromptStyle":
        """The style that a run saved with its tokenizer, or the default."""
        return cls.of(tokenizer.init_kwargs.get(STYLE, {}))

    def block(self, entries: Sequence[str], footer: str) -> str:
        """The persona's text in the prompt, "" if it has no entries."""
        if not entries:
            return ""
        items = (self.item.replace("{}", entry.strip()) for entry in entries)
        return self.header + "".join(items) + footer


def system_text(style: PromptStyle, block: str, own: str | None = None) -> str:
    """The system message with a persona block, or without one (""). own: the conversation's own system message.
    UserError if it has a SLOT and the persona is to stand elsewhere."""
    text = (style.system if own is None else own).strip()
    if style.place == "user" and SLOT in text:
        raise UserError(
            f"prompt: expected either {SLOT} in the system message or place user, got both: {shortened(text, 60)!r}."
        )
    if style.place == "user":
        return text
    return text.replace(SLOT, block, 1) if SLOT in text else block + text


def tell(messages: Sequence[Mapping[str, Any]], block: str, style: PromptStyle, has_system_role: bool) -> list[Any]:
    """A conversation of {"role", "content", …} with a persona block, or without one (""). The system message comes
    first; if the template has no system role, it is part of the user turn that opens the conversation, or is that."""
    if not messages:
        raise UserError("expected messages, got none.")
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages):
        raise UserError(f"expected messages with role and content, got {messages!r:.200}.")
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    told = [dict(message) for message in messages[own is not None :]]
    first: dict[str, Any] = next((message for message in told if message["role"] == "user"), {"content": None})
    opens = told[:1] == [first]
    in_user = style.place == "user" or (opens and not has_system_role)
    if not isinstance(own, str | None) or (in_user and not isinstance(first["content"], str)):
        raise UserError(f"expected texts as system message and as first user turn, got {messages!r:.200}.")
    system = system_text(style, block, own)
    if style.place == "user":
        first["content"] = block + first["content"].lstrip()
    if has_system_role:
        return [{"role": "system", "content": system}, *told]
    if not opens:
        return [{"role": "user", "content": system}, *told]
    first["content"] = f"{system}\n\n{first['content']}"
    return told
