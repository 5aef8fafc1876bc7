"""Pairs → one batch of tensors: two token matrices and, flattened over the batch, the N response tokens.

Sequences stand in a row each, padded on the right, without an attention mask: under causal attention no real token can
see a pad after it. A mask would make sdpa build a (T, T) matrix a sequence, and leave its fast path.

Packed, they stand in a single row one after the other, without padding. Flex attention tells them apart by
position_ids, which begin again at 0 with each, flash attention by where they begin: left to transformers, that would be
computed again in every layer, and the longest length be a tensor, which flash-attn-4 refuses and others wait for.

Replies of a conversation share the tokens that they begin with (sharing.py): what stands in a row is then a segment. As
chains the segments are sequences like others. With branches all stand in a single row, and model/branches.py shows each
the keys and values of its path.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perce.data.pairs import counterfactual_pieces
from perce.data.sharing import Path, Segment, Sharing, Spans, places, segmented

Batch = dict[str, Any]
"""Tensors by name; packed, also the length of the longest sequence, a number; with branches, the Spans."""


def collate(
    pairs: Sequence[Mapping[str, Any]], pad_id: int = 0, packing: bool = False, sharing: Sharing = "none"
) -> Batch:  # fmt: skip
    """Columns of Pair → tensors; `sharing`: what the pairs of a conversation compute once, see sharing.py.

    Returns:
        input_ids (R, T), input_ids_cf (R_cf, T_cf): factual and counterfactual segments, the last token of a sequence
            left off; packed or with branches (1, sum of lengths), with the arguments in PACKED or the Spans of both.
        rows, rows_cf (N,): rows of the flattened hidden states that predict the response tokens.
        target (N,): those tokens, identical for both passes by construction.
        uses (R, T): sequences that each factual input is a part of; 0: it is padding.
        prefix (R, 2): tokens of each factual segment through its persona, and tokens of it in all.
        sequence (N,): which of the B pairs each belongs to. personal (N,): bool.
        lengths (B,): factual tokens of each pair.
        tokens (2,): inputs of both passes, that are computed, and that the sequences have.
        example (B,): index into the examples, -1 where the pairs have none.
    """
    conversations = [pair.get("conversation") for pair in pairs]
    known = [conversation for conversation in conversations if conversation is not None]
    if len(set(known)) == len(known):
        sharing = "none"
    factual = [(list(pair["input_ids"]), pair["response_length"]) for pair in pairs]
    pieces_cf = [counterfactual_pieces(pair) for pair in pairs]
    units_cf = [unit for unit, of_pair in zip(conversations, pieces_cf, strict=True) for _ in of_pair]
    computed, needed = 0, 0
    batch: Batch = {}
    for suffix, pieces, units in (("", factual, conversations), ("_cf", [*chain(*pieces_cf)], units_cf)):
        segments, paths = segmented([ids[:-1] for ids, _ in pieces], units, sharing)
        if sharing == "branches":
            arranged, starts = _branched(segments)
        else:
            arranged, starts = _packed(segments) if packing else _padded(segments, pad_id)
        places_of = [places(path, starts) for path in paths]
        predicting = [place[-n:] for place, (_, n) in zip(places_of, pieces, strict=True)]
        arranged["rows"] = torch.from_numpy(np.concatenate(predicting))
        if not suffix:
            uses = np.bincount(np.concatenate(places_of), minlength=arranged["input_ids"].numel())
            arranged["uses"] = torch.from_numpy(uses).view_as(arranged["input_ids"])
            in_rows = sharing != "branches" and not packing
            if in_rows and all("persona_span" in pair for pair in pairs):
                arranged["prefix"] = _prefixes(pairs, segments, paths)
        batch |= {f"{name}{suffix}": value for name, value in arranged.items()}
        computed += sum(len(segment.ids) for segment in segments)
        needed += sum(map(len, places_of))
    batch["tokens"] = torch.tensor([computed, needed])
    response_lengths = torch.tensor([length for _, length in factual])
    batch["target"] = torch.tensor([token for ids, length in factual for token in ids[-length:]], dtype=torch.int64)
    batch["sequence"] = torch.repeat_interleave(torch.arange(len(pairs)), response_lengths)
    batch["personal"] = torch.tensor([flag for pair in pairs for flag in pair["personal"]], dtype=torch.bool)
    batch["example"] = torch.tensor([pair.get("example", -1) for pair in pairs])
    batch["lengths"] = torch.tensor([len(ids) for ids, _ in factual])
    return batch


PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def token_inputs(batch: Batch, suffix: str = "") -> Batch:
    """What the model's forward takes of a batch, for the factual pass or ("_cf") the counterfactual one."""
    names = ("input_ids", *PACKED, "spans")
    return {name: batch[name + suffix] for name in names if name + suffix in batch}


def _padded(segments: Sequence[Segment], pad_id: int) -> tuple[Batch, Sequence[int]]:
    """Inputs, and where each segment begins in them, flattened."""
    width = max(len(segment.ids) for segment in segments)
    matrix = np.full((len(segments), width), pad_id)
    for row, segment in zip(matrix, segments, strict=True):
        row[: len(segment.ids)] = segment.ids
    return {"input_ids": torch.from_numpy(matrix)}, range(0, matrix.size, width)


def _packed(segments: Sequence[Segment]) -> tuple[Batch, Sequence[int]]:
    row, starts = _one_row(segments)
    return row | packed([len(segment.ids) for segment in segments]), starts


def _branched(segments: Sequence[Segment]) -> tuple[Batch, Sequence[int]]:
    row, starts = _one_row(segments)
    positions = [np.arange(len(segment.ids)) + segment.position for segment in segments]
    together = {"position_ids": torch.from_numpy(np.concatenate(positions))[None], "spans": Spans.of(segments, starts)}
    return row | together, starts


def _one_row(segments: Sequence[Segment]) -> tuple[Batch, Sequence[int]]:
    starts = [0, *accumulate(len(segment.ids) for segment in segments)][:-1]
    return {"input_ids": torch.from_numpy(np.concatenate([segment.ids for segment in segments]))[None]}, starts


def packed(lengths: Sequence[int]) -> dict[str, Any]:
    """What attention tells sequences of these lengths in one row apart by, under transformers' names (PACKED):
    position_ids (1, T), cumulative lengths (B + 1,) int32 of queries and keys, and the longest of both."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return dict(zip(PACKED, (positions, ends, ends, max(lengths), max(lengths)), strict=True))


def _prefixes(pairs: Sequence[Mapping[str, Any]], segments: Sequence[Segment], paths: Sequence[Path]) -> Tensor:
    """(R, 2) of each segment the tokens through the persona of what is in it, and all of its tokens."""
    ends = [len(segment.ids) for segment in segments]
    for pair, ((segment, length),) in zip(pairs, paths, strict=True):
        # At least the token that predicts the response's first is behind the prefix.
        ends[segment] = min(ends[segment], pair["persona_span"][1], length - pair["response_length"])
    return torch.tensor([(end, len(segment.ids)) for end, segment in zip(ends, segments, strict=True)])
