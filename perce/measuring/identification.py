"""How well PIR finds labelled personal tokens, compared with scores that need no counterfactual pass.

    PIR                log P(token | persona, …) − log P(token | …)
    persona word       the token belongs to a word that is in the persona but not in the conversation (1 or 0)
    token loss         −log P(token | persona, …)
    entropy            predictive entropy before the token, with the persona

Labels are the spans marked by hand in the data. In examples without such marks, the persona words are the labels; they
find quoted facts but no paraphrase or style. Then the row "persona word" is left out, and of these examples the numbers
say only how well PIR finds quoted words.
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
    examples: int
    marked: int
    """Examples whose labels are marks in the data; those of the others are persona words."""


def identify(records: Sequence[dict[str, Any]]) -> Identified:
    """UserError if no token, or every token, is labelled."""
    columns: dict[str, list[float]] = {"PIR": [], PERSONA_WORD: [], "token loss": [], "entropy": []}
    labels: list[bool] = []
    for record in records:
        labels += record["personal"]
        columns["PIR"] += record["pir"]
        columns[PERSONA_WORD] += [float(flag) for flag in record["persona_word"]]
        columns["token loss"] += [-x for x in record["logp"]]
        columns["entropy"] += record["entropy"]
    marked = sum(record["marked"] for record in records)
    if marked < len(records):
        del columns[PERSONA_WORD]
    try:
        methods = {name: identification(column, labels) for name, column in columns.items()}
    except ValueError as error:
        raise UserError(
            f"--labels: {error}. In data without marked spans, the words of the persona that the reply uses are "
            "labelled."
        ) from None
    return Identified(methods, len(labels), sum(labels), len(records), marked)
