"""The words of a prompt: how the persona is told, and the system message around it. chat.py renders and tokenises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perce.errors import UserError

SYSTEM_MESSAGE = "Write the next message exactly as this user would."
PERSONA_FOOTERS = ("\n", "\n ")
"""What ends the block: the first after which the next word is tokenised as it is without the block."""
SLOT = "{persona}"
"""In a system message: where the persona stands."""
PLACES = ("system", "user")
STYLE = "perce_prompt"
"""Key of tokenizer_config.json under which a run's own style is saved."""

# For tokenizers without a chat template (base models): plain text, the end-of-sequence token closes each reply.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}Message: {{ message.content }}\n"
    "{% else %}Reply: {{ message.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Reply:{% endif %}"
)
CONVERSATION_START = "(the conversation begins)"  # for templates that insist on a user turn first


@dataclass(frozen=True)
class PromptStyle:
    """How a prompt tells the persona; --prompt has these keys. UserError for values of another kind."""

    system: str = SYSTEM_MESSAGE
    """System message of a conversation that has none of its own; SLOT in it is where the persona stands."""
    place: str = "system"
    """Of PLACES: before the system message's text, or before the first user turn's."""
    header: str = "About the user:\n"
    item: str = "- {}\n"
    """Of each entry of the persona, which takes the place of {}."""
    footer: str | None = None
    """None: the first of PERSONA_FOOTERS that fits the tokenizer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str) and (name, value) != ("footer", None):
                raise UserError(f"prompt: expected a text as {name}, got {type(value).__name__} {value!r}.")
        if self.place not in PLACES:
            raise UserError(f"prompt: expected place to be {' or '.join(PLACES)}, got {self.place!r}.")
        if self.item.count("{}") != 1:
            raise UserError(f"prompt: expected one {{}} in item, where an entry stands, got {self.item!r}.")
        if not self.system.replace(SLOT, "").strip():
            raise UserError("prompt: expected a system message that is there without the persona too, got none.")

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> "PromptStyle":
        known = ", ".join(cls.__dataclass_fields__)
        if not isinstance(keys, Mapping):
            raise UserError(f"prompt: expected a mapping of any of {known}, got {keys!r}.")
        if unknown := [name for name in keys if name not in cls.__dataclass_fields__]:
            raise UserError(f"prompt: expected any of {known}, got {', '.join(unknown)}.")
        return cls(**keys)

    @classmethod
    def saved_with(cls, tokenizer: Any) -> "PromptStyle":
        """The one that a run saved with its tokenizer, or the default."""
        return cls.of(tokenizer.init_kwargs.get(STYLE, {}))

    def block(self, entries: Sequence[str], footer: str) -> str:
        """The persona as the prompt has it."""
        items = (self.item.replace("{}", entry.strip()) for entry in entries)
        return self.header + "".join(items) + footer


def system_text(style: PromptStyle, block: str, own: str | None = None) -> str:
    """The system message with a persona block, or without one (""); own: of the conversation."""
    text = (style.system if own is None else own).strip()
    if style.place == "user":
        return text
    return text.replace(SLOT, block, 1) if SLOT in text else block + text


def tell(messages: Sequence[Mapping[str, Any]], block: str, style: PromptStyle, has_system_role: bool) -> list[Any]:
    """A conversation of {"role", "content", …} with a persona block, or without one (""): the system message leads it,
    or the first user turn where the template has no role for it."""
    if not messages:
        raise UserError("expected messages, got none.")
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages):
        raise UserError(f"expected messages of role and content, got {messages!r:.200}.")
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    told = [dict(message) for message in messages[own is not None :]]
    first: dict[str, Any] = next((message for message in told if message["role"] == "user"), {"content": None})
    in_user = style.place == "user" or not has_system_role
    if not isinstance(own, str | None) or (in_user and not isinstance(first["content"], str)):
        raise UserError(f"expected a user turn with a text, or a system message that is one, got {messages!r:.200}.")
    system = system_text(style, block, own)
    if style.place == "user":
        first["content"] = block + first["content"].lstrip()
    if has_system_role:
        return [{"role": "system", "content": system}, *told]
    first["content"] = f"{system}\n\n{first['content']}"
    return told
