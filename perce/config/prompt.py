"""How a prompt words the persona: the keys of --prompt. data/prompt.py puts the words together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perce.errors import UserError

SYSTEM_MESSAGE = "Write the next message exactly as this user would."
PERSONA_FOOTERS = ("\n", "\n ")
"""Ends of the persona block. The first is used after which the next word has the same tokens as without the block."""
SLOT = "{persona}"
"""Marks the persona's place in a system message."""
PLACES = ("system", "user")
STYLE = "perce_prompt"
"""Key of tokenizer_config.json under which a run's own style is saved."""


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
