"""The words of a prompt: the system message around the persona block. chat.py renders and tokenises them."""

from collections.abc import Mapping, Sequence
from typing import Any

from perce.config.prompt import SLOT, PromptStyle
from perce.errors import UserError
from perce.visible import shortened

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
