"""Does PIR find the personal tokens? Against labelled tokens, beside what could be had without the contrast.

    PIR                log P(token | persona, …) − log P(token | …)
    persona word       the token belongs to a word that is in the persona but not in the conversation (1 or 0)
    token loss         −log P(token | persona, …)
    entropy            predictive entropy before the token, with the persona

Labels are the spans marked in the data by hand; without such marks they *are* the persona words, which find quoted
facts and no paraphrase or style: then that row is left out, and the numbers say how PIR relates to quoting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perce.errors import UserError
from perce.measuring.metrics import Identification, identification

PERSONA_WORD = "persona word"


@dataclass(frozen=True)
class Identified:
    """Each method's result on all response tokens of the scored examples."""

    methods: dict[str, Identification]
    tokens: int
    labelled: int
    marked: bool
    """Labels are marks in the data; else persona words."""


def identify(records: Sequence[dict[str, Any]]) -> Identified:
    """UserError where no token, or every token, is labelled."""
    columns: dict[str, list[float]] = {"PIR": [], PERSONA_WORD: [], "token loss": [], "entropy": []}
    labels: list[bool] = []
    for record in records:
        labels += record["personal"]
        columns["PIR"] += record["pir"]
        columns[PERSONA_WORD] += [float(flag) for flag in record["persona_word"]]
        columns["token loss"] += [-x for x in record["logp"]]
        columns["entropy"] += record["entropy"]
    for name, column in columns.items():
        if len(column) != len(labels):
            raise UserError(
                f"--labels: {len(labels)} labels for {len(column)} tokens of {name}; the records are damaged."
            )
    marked = all(record["marked"] for record in records)
    if not marked:
        del columns[PERSONA_WORD]
    try:
        methods = {name: identification(column, labels) for name, column in columns.items()}
    except ValueError as error:
        raise UserError(
            f"--labels: {error}. Data without marked spans is labelled by persona words that the reply uses."
        ) from None
    return Identified(methods, len(labels), sum(labels), marked)
