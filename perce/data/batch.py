"""Pairs → one batch of tensors: two token matrices and, flattened over the batch, the N response tokens.

Each sequence has a row of its own, padded on the right, without an attention mask: under causal attention no real token
sees a padding token after it. With a mask, sdpa would build a (T, T) matrix per sequence and leave its fast path.

If packed, all sequences stand in a single row, without padding. Flex attention tells them apart by position_ids, which
begin again at 0 with each sequence; flash attention by their first places. These are computed here once: transformers
would compute them in every layer, and the longest length as a tensor, which flash-attn-4 refuses and for whose value
other implementations wait.

Replies of a conversation share the tokens with which they begin (sharing.py). The rows then consist of segments. With
chains, segments are treated like sequences. With branches, all segments stand in a single row, and model/branches.py
lets each see the keys and values of its path.

A persona with a forward pass of its own, without a gradient or with requests run one at a time after it, is a segment
of such a row too. model/prefill.py divides the row into forward passes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perce.data.pairs import counterfactual_pieces
from perce.data.sharing import (
    Forward,
    Segment,
    Sharing,
    Spans,
    Trunk,
    Trunks,
    UnitKind,
    places,
    segmented,
    segmented_on_trunks,
)  # fmt: skip

Batch = dict[str, Any]
"""Tensors by name. Also the length of the longest sequence, a number, if packed; the Spans if branched; the Trunks."""


def collate(
    pairs: Sequence[Mapping[str, Any]], pad_id: int = 0, packing: bool = False, sharing: Sharing = "none",
    unit: UnitKind = "conversation", persona_grad: str = "full", branches_per_forward: int = 0,
) -> Batch:  # fmt: skip
    """Columns of Pair → tensors.

    Args:
        sharing: how the pairs of a `unit` share tokens; see sharing.py.
        persona_grad, branches_per_forward: the options in MemoryConfig.

    Returns:
        input_ids (R, T), input_ids_cf (R_cf, T_cf): factual and counterfactual segments, without the last token of each
            sequence; packed or with branches (1, sum of lengths), with the arguments in PACKED or the Spans of both.
        trunks: the Trunks of the factual segments, which are a single row, if personas have a forward of their own.
        rows, rows_cf (N,): rows of the flattened hidden states that predict the response tokens; with trunks, rows of
            the hidden states after them.
        target (N,): those tokens, identical for both passes by construction.
        uses (R, T): the number of sequences that each factual input is a part of; 0 for padding.
        sequence (N,): which of the B pairs each token belongs to. personal (N,): bool.
        lengths (B,): factual tokens of each pair.
        tokens (2,): the inputs of both passes: how many are computed, and how many the sequences have without sharing.
        alone (): how many pairs share no token of the factual pass with another pair.
        data_weight (N,): the data's factors for the weights of the tokens; left out if all are 1.
        example (B,): index into the examples, -1 if the pairs have none.
    """
    units = [pair.get(unit) for pair in pairs]
    known = [key for key in units if key is not None]
    if len(set(known)) == len(known):
        sharing = "none"
    factual = [(list(pair["input_ids"]), pair["response_length"]) for pair in pairs]
    pieces_cf = [counterfactual_pieces(pair) for pair in pairs]
    units_cf = [key for key, of_pair in zip(units, pieces_cf, strict=True) for _ in of_pair]
    apart = persona_grad == "none" or branches_per_forward > 0
    computed, needed = 0, 0
    batch: Batch = {}
    for suffix, pieces, of_unit in (("", factual, units), ("_cf", [*chain(*pieces_cf)], units_cf)):
        inputs = [ids[:-1] for ids, _ in pieces]
        if apart and not suffix:
            segments, paths = segmented_on_trunks(inputs, of_unit, sharing, _trunks(pairs))
            together = (branches_per_forward or len(segments)) if sharing == "branches" else 0
            arranged, starts, outputs = _on_trunks(segments, together, persona_grad == "none", branches_per_forward > 0)
        else:
            segments, paths = segmented(inputs, of_unit, sharing)
            if sharing == "branches":
                arranged, starts = _branched(segments)
            else:
                arranged, starts = _packed(segments) if packing else _padded(segments, pad_id)
            outputs = np.arange(arranged["input_ids"].numel())
        places_of = [places(path, starts) for path in paths]
        predicting = [place[-n:] for place, (_, n) in zip(places_of, pieces, strict=True)]
        arranged["rows"] = torch.from_numpy(outputs[np.concatenate(predicting)])
        if not suffix:
            beginnings = Counter(path[0][0] for path in paths)
            uses = np.bincount(np.concatenate(places_of), minlength=arranged["input_ids"].numel())
            arranged["uses"] = torch.from_numpy(uses).view_as(arranged["input_ids"])
        batch |= {f"{name}{suffix}": value for name, value in arranged.items()}
        computed += sum(len(segment.ids) for segment in segments)
        needed += sum(map(len, places_of))
    batch["tokens"] = torch.tensor([computed, needed])
    batch["alone"] = torch.tensor(sum(count == 1 for count in beginnings.values()))
    response_lengths = torch.tensor([length for _, length in factual])
    batch["target"] = torch.tensor([token for ids, length in factual for token in ids[-length:]], dtype=torch.int64)
    batch["sequence"] = torch.repeat_interleave(torch.arange(len(pairs)), response_lengths)
    batch["personal"] = torch.tensor([flag for pair in pairs for flag in pair["personal"]], dtype=torch.bool)
    weights = [pair.get("data_weight", 1.0) for pair in pairs]
    if any(weight != 1 for weight in weights):
        batch["data_weight"] = torch.tensor(weights, dtype=torch.float32).repeat_interleave(response_lengths)
    batch["example"] = torch.tensor([pair.get("example", -1) for pair in pairs])
    batch["lengths"] = torch.tensor([len(ids) for ids, _ in factual])
    return batch


PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def token_inputs(batch: Batch, suffix: str = "") -> Batch:
    """The model's inputs in a batch, for the factual pass or (suffix "_cf") the counterfactual pass."""
    names = ("input_ids", *PACKED, "spans")
    return {name: batch[name + suffix] for name in names if name + suffix in batch}


def _padded(segments: Sequence[Segment], pad_id: int) -> tuple[Batch, Sequence[int]]:
    """The inputs, and where each segment begins in the flattened inputs."""
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
    spans = Spans.of(dict(enumerate(segments)), dict(enumerate(starts)))
    return row | {"position_ids": _positions(segments), "spans": spans}, starts


def _one_row(segments: Sequence[Segment]) -> tuple[Batch, Sequence[int]]:
    starts = [0, *accumulate(len(segment.ids) for segment in segments)][:-1]
    return {"input_ids": torch.from_numpy(np.concatenate([segment.ids for segment in segments]))[None]}, starts


def _positions(segments: Sequence[Segment]) -> Tensor:
    positions = [np.arange(len(segment.ids)) + segment.position for segment in segments]
    return torch.from_numpy(np.concatenate(positions))[None]


def _trunks(pairs: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each pair the number of tokens up to its persona's end, at least one, and without the one that predicts the
    first of the response."""
    return [
        min(max(pair["persona_span"][1], 1), len(pair["input_ids"]) - 1 - pair["response_length"]) for pair in pairs
    ]


def _on_trunks(
    segments: Sequence[Segment], together: int, detached: bool, recomputed: bool
) -> tuple[Batch, Sequence[int], np.ndarray]:
    """The inputs; where each segment begins; and for every input its index among the inputs that run after trunks.

    After a trunk, `together` segments, each with the segments that continue it, are run in one forward. 0: without
    branches, one segment per forward.
    """
    branches, together = together > 0, max(together, 1)
    hanging: dict[int, dict[int, list[int]]] = {}  # trunk → segment right after it → that and those that continue it
    for number, segment in enumerate(segments):
        if not segment.path:
            hanging[number] = {}
        else:
            trunk, root = [*(on for on, _ in segment.path), number][:2]
            hanging[trunk].setdefault(root, []).append(number)
    order = [n for trunk, roots in hanging.items() for n in (trunk, *chain(*roots.values()))]
    row, begins = _one_row([segments[number] for number in order])
    starts = dict(zip(order, begins, strict=True))
    trunks, is_output = [], np.ones(row["input_ids"].numel(), dtype=bool)
    for trunk, roots in hanging.items():
        start, length = starts[trunk], len(segments[trunk].ids)
        is_output[start : start + length] = False
        families = list(roots.values())
        forwards = [
            _forward({n: segments[n] for n in chain(*families[i : i + together])}, starts, trunk, length, branches)
            for i in range(0, len(families), together)
        ]
        trunks.append(Trunk(start, start + length, tuple(forwards)))
    row["position_ids"] = _positions([segments[number] for number in order])
    row["trunks"] = Trunks(tuple(trunks), detached, recomputed)
    return row, [starts[number] for number in range(len(segments))], is_output.cumsum() - 1


def _forward(
    segments: Mapping[int, Segment], starts: Mapping[int, int], trunk: int, before: int, branches: bool
) -> Forward:  # fmt: skip
    """The forward of consecutive segments after a trunk of `before` tokens."""
    start = starts[next(iter(segments))]
    behind = {number: before + starts[number] - start for number in segments} | {trunk: 0}
    spans = Spans.of(segments, behind, before) if branches else None
    return Forward(start, start + sum(len(segment.ids) for segment in segments.values()), spans)


def packed(lengths: Sequence[int]) -> dict[str, Any]:
    """The arguments by which attention tells apart sequences of these lengths in one row, under transformers' names
    (PACKED): position_ids (1, T), cumulative lengths (B + 1,) int32 of queries and keys, and the longest of both."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return dict(zip(PACKED, (positions, ends, ends, max(lengths), max(lengths)), strict=True))
