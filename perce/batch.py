"""Pairs → one batch of tensors: two right-padded token matrices and, flattened over the batch, the N response tokens.

Padding is on the right and there is no attention mask: under causal attention no real token can see a pad after it. A
mask would make sdpa build a (T, T) matrix a sequence, and leave its fast path.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perce.pairs import counterfactual_ids

Batch = dict[str, Tensor]


def collate(pairs: Sequence[Mapping[str, Any]], pad_id: int = 0) -> Batch:
    """Columns of Pair → tensors.

    Returns:
        input_ids (B, T), input_ids_cf (B, T_cf): factual and counterfactual inputs, the last token left off.
        rows, rows_cf (N,): rows of the flattened hidden states that predict the response tokens.
        target (N,): those tokens, identical for both passes by construction.
        prefix (B, 2): tokens of each factual input through its persona, and tokens of it in all.
        sequence (N,): which of the B sequences each belongs to. personal (N,): bool.
        tokens (): factual tokens without padding. example (B,): index into the examples, -1 where the pairs have none.
    """
    factual = [list(pair["input_ids"]) for pair in pairs]
    counterfactual = [
        counterfactual_ids(pair["input_ids"], pair["persona_span"], pair["response_length"]) for pair in pairs
    ]
    lengths = torch.tensor([pair["response_length"] for pair in pairs])
    batch = {}
    for suffix, sequences in (("", factual), ("_cf", counterfactual)):
        width = max(map(len, sequences)) - 1
        batch[f"input_ids{suffix}"] = torch.tensor(
            [ids[:-1] + [pad_id] * (width - len(ids) + 1) for ids in sequences], dtype=torch.int64
        )
        batch[f"rows{suffix}"] = torch.cat(
            [
                torch.arange(len(ids) - 1 - length, len(ids) - 1) + width * row
                for row, (ids, length) in enumerate(zip(sequences, lengths.tolist(), strict=True))
            ]
        )
    # At least the token that predicts the response's first is behind the prefix.
    batch["prefix"] = torch.tensor(
        [
            (min(pair["persona_span"][1], len(ids) - pair["response_length"] - 1), len(ids) - 1)
            for pair, ids in zip(pairs, factual, strict=True)
        ]
    )
    batch["target"] = torch.tensor(
        [token for ids, length in zip(factual, lengths.tolist(), strict=True) for token in ids[-length:]],
        dtype=torch.int64,
    )
    batch["sequence"] = torch.repeat_interleave(torch.arange(len(pairs)), lengths)
    batch["personal"] = torch.tensor([flag for pair in pairs for flag in pair["personal"]], dtype=torch.bool)
    batch["example"] = torch.tensor([pair.get("example", -1) for pair in pairs])
    batch["tokens"] = torch.tensor(sum(map(len, factual)))
    return batch
