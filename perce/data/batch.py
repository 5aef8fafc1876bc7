"""Pairs → one batch of tensors: two token matrices and, flattened over the batch, the N response tokens.

Sequences stand in a row each, padded on the right, without an attention mask: under causal attention no real token can
see a pad after it. A mask would make sdpa build a (T, T) matrix a sequence, and leave its fast path.

Packed, they stand in a single row one after the other, without padding. Flex attention tells them apart by
position_ids, which begin again at 0 with each, flash attention by where they begin: left to transformers, that would be
computed again in every layer, and the longest length be a tensor, which flash-attn-4 refuses and others wait for.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from perce.data.pairs import counterfactual_pieces

Batch = dict[str, Any]
"""Tensors by name; packed, also the length of the longest sequence, a number."""
Piece = tuple[Sequence[int], int]  # ids, and how many of the last ones are predicted


def collate(pairs: Sequence[Mapping[str, Any]], pad_id: int = 0, packing: bool = False) -> Batch:
    """Columns of Pair → tensors.

    Returns:
        input_ids (B, T), input_ids_cf (B_cf, T_cf): factual and counterfactual inputs, the last token left off; packed,
            (1, sum of lengths), with the `packed` arguments of both.
        rows, rows_cf (N,): rows of the flattened hidden states that predict the response tokens.
        target (N,): those tokens, identical for both passes by construction.
        prefix (B, 2): tokens of each factual input through its persona, and tokens of it in all.
        sequence (N,): which of the B sequences each belongs to. personal (N,): bool.
        lengths (B,): factual tokens without padding.
        example (B,): index into the examples, -1 where the pairs have none.
    """
    factual = [(list(pair["input_ids"]), pair["response_length"]) for pair in pairs]
    counterfactual = [piece for pair in pairs for piece in counterfactual_pieces(pair)]
    batch: Batch = {}
    for suffix, pieces in (("", factual), ("_cf", counterfactual)):
        arranged = _pack(pieces) if packing else _pad(pieces, pad_id)
        batch |= {f"{name}{suffix}": tensor for name, tensor in arranged.items()}
    response_lengths = torch.tensor([length for _, length in factual])
    batch["target"] = torch.tensor([token for ids, length in factual for token in ids[-length:]], dtype=torch.int64)
    if not packing and all("persona_span" in pair for pair in pairs):
        # At least the token that predicts the response's first is behind the prefix.
        batch["prefix"] = torch.tensor(
            [
                (min(pair["persona_span"][1], len(ids) - length - 1), len(ids) - 1)
                for pair, (ids, length) in zip(pairs, factual, strict=True)
            ]
        )
    batch["sequence"] = torch.repeat_interleave(torch.arange(len(pairs)), response_lengths)
    batch["personal"] = torch.tensor([flag for pair in pairs for flag in pair["personal"]], dtype=torch.bool)
    batch["example"] = torch.tensor([pair.get("example", -1) for pair in pairs])
    batch["lengths"] = torch.tensor([len(ids) for ids, _ in factual])
    return batch


def token_inputs(batch: Batch, suffix: str = "") -> Batch:
    """What the model's own forward takes of a batch, for the factual pass or ("_cf") the counterfactual one."""
    names = ("input_ids", *PACKED)
    return {name: batch[name + suffix] for name in names if name + suffix in batch}


def real_tokens(batch: Batch) -> Tensor | None:
    """(B, T) which of the factual inputs are no padding; None of a packed row, which has none."""
    if "position_ids" in batch:
        return None
    lengths = batch["lengths"] - 1  # the last token is no input
    return torch.arange(batch["input_ids"].shape[1], device=lengths.device) < lengths[:, None]


def _pad(pieces: Sequence[Piece], pad_id: int) -> Batch:
    width = max(len(ids) for ids, _ in pieces) - 1
    matrix = [[*ids[:-1], *[pad_id] * (width - len(ids) + 1)] for ids, _ in pieces]
    return {
        "input_ids": torch.tensor(matrix, dtype=torch.int64),
        "rows": _rows(pieces, range(0, width * len(pieces), width)),
    }


def _pack(pieces: Sequence[Piece]) -> Batch:
    starts = [0, *accumulate(len(ids) - 1 for ids, _ in pieces)][:-1]
    return {
        "input_ids": torch.tensor([[token for ids, _ in pieces for token in ids[:-1]]], dtype=torch.int64),
        "rows": _rows(pieces, starts),
        **packed([len(ids) - 1 for ids, _ in pieces]),
    }


PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def packed(lengths: Sequence[int]) -> dict[str, Any]:
    """What attention tells sequences of these lengths in one row apart by, under transformers' names (PACKED):
    position_ids (1, T), cumulative lengths (B + 1,) int32 of queries and keys, and the longest of both."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return dict(zip(PACKED, (positions, ends, ends, max(lengths), max(lengths)), strict=True))


def _rows(pieces: Sequence[Piece], starts: Sequence[int]) -> Tensor:
    """(N,) places that predict the last ids of each piece, which begins at its start in the flattened matrix."""
    return torch.cat(
        [
            torch.arange(start + len(ids) - 1 - predicted, start + len(ids) - 1)
            for start, (ids, predicted) in zip(starts, pieces, strict=True)
        ]
    )
