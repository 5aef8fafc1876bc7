"""Token weights as other trainers read them, from records of perce.score: `--export`.

swift   ms-swift, 4.3 and newer: {"messages": [{"role": "assistant", "content": {"token_ids", "loss_scale"}}]}

ms-swift multiplies the cross-entropy of token_ids[t] by loss_scale[t] and divides by how many of a step's tokens have a
loss_scale above 0 (swift/trainers/seq2seq_trainer.py, 4.5.2). So prompts have 0, and replies never have.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perce.environment import in_one_move, written
from perce.errors import UserError
from perce.visible import as_json

LEAST = 1e-12  # of a token's weight: it still counts, and says nothing


def write_export(path: Path, records: Iterable[Mapping[str, Any]], tokenizer: Any) -> None:
    """One line a record; the file is there when all of it is."""
    opening = _opening(tokenizer)
    with written(path), in_one_move(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(as_json(swift_row(record, opening)) + "\n")


def swift_row(record: Mapping[str, Any], opening: list[int]) -> dict[str, Any]:
    """opening: token ids that ms-swift puts before every row by itself, and that stand there in ours already.

    UserError for a row that begins otherwise.
    """
    ids = record["prompt_ids"] + record["response_ids"]
    if ids[: len(opening)] != opening:
        raise UserError(
            f"--export swift: {record['source']} begins with the token ids {ids[: len(opening)]}, and ms-swift puts "
            f"{opening} before every row of this tokenizer's, so the weights would be of another text. Train it with "
            "perce.train, or with a tokenizer that adds none."
        )
    weights = [max(weight * record["data_weight"], LEAST) for weight in record["weight"]]
    scale = [0.0] * len(record["prompt_ids"]) + weights
    content = {"token_ids": ids[len(opening) :], "loss_scale": scale[len(opening) :]}
    return {"messages": [{"role": "assistant", "content": content}], "add_eos": False}


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: a beginning of sequence, as a rule, or nothing."""
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return ids[: ids.index(plain[0])]
