"""Writes token weights from records of perce.score in formats of other trainers: `--export`.

swift   ms-swift, 4.3 and newer: {"messages": [{"role": "assistant", "content": {"token_ids", "loss_scale"}}]}

ms-swift multiplies the cross-entropy of token_ids[t] by loss_scale[t] and divides by the number of the step's tokens
with a loss_scale above 0 (swift/trainers/seq2seq_trainer.py, 4.5.2). So only prompt tokens have 0.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perce.errors import UserError
from perce.files.outputs import in_one_move, written
from perce.visible import as_json

LEAST = 1e-12  # the smallest weight of a token: it still counts in the divisor and adds nothing to the loss


def write_export(path: Path, records: Iterable[Mapping[str, Any]], tokenizer: Any) -> None:
    """Writes one line per record; the file appears only when it is complete."""
    opening = _opening(tokenizer)
    with written(path), in_one_move(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(as_json(swift_row(record, opening)) + "\n")


def swift_row(record: Mapping[str, Any], opening: list[int]) -> dict[str, Any]:
    """opening: token ids that ms-swift puts before every row itself, so they are removed from ours.

    UserError for a row that does not begin with them.
    """
    ids = record["prompt_ids"] + record["response_ids"]
    if ids[: len(opening)] != opening:
        raise UserError(
            f"--export swift: {record['source']} begins with the token ids {ids[: len(opening)]}, and ms-swift puts "
            f"{opening} before every row with this tokenizer, so the weights would belong to another text. Train with "
            "perce.train, or with a tokenizer that adds none."
        )
    weights = [max(weight * record["data_weight"], LEAST) for weight in record["weight"]]
    scale = [0.0] * len(record["prompt_ids"]) + weights
    content = {"token_ids": ids[len(opening) :], "loss_scale": scale[len(opening) :]}
    return {"messages": [{"role": "assistant", "content": content}], "add_eos": False}


def _opening(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before every text: usually a beginning-of-sequence token, or none."""
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return ids[: ids.index(plain[0])]
