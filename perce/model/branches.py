"""Attention over a row of segments, each of which sees only its own path. data/sharing.py divides the row.

    segment   queries of its tokens     keys and values of its path, and of its own tokens

Behind a trunk (prefill.py) the keys and values of the row follow those of the trunk.

The other parts of a layer treat the row token by token, so a linear layer is one product. Attention is one call of the
model's own function per segment; keys and values get gradient from every segment that reads them. Masks are (segment ×
the tokens that it sees), are made only if an implementation needs one, and are never T × T of the row.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perce.data.batch import PACKED, collate, token_inputs
from perce.data.sharing import Sharing, Span, Spans
from perce.errors import in_one_line
from perce.model.positions import is_dynamic, switch_length
from perce.model.probe import attention_of_any_device, evaluating, unwrapped, windows_of
from perce.model.trial import SHORT, made_up_pairs

Attention = Callable[..., tuple[Tensor, Any]]
EAGER = "eager_attention_forward"  # in each modeling file of transformers

# Largest allowed change of a hidden state, relative to its norm. The default model in bf16 shows 0.007; branches that
# are off by one token in position, path or place show 0.1, 0.3 and 0.5.
TOLERANCE, TOLERANCE_LOW_PRECISION = 1e-3, 0.05


def sharing_of(model: Any) -> tuple[Sharing, str]:
    """What a prepared model can share and, if that is not everything, why. A few tokens in eval mode decide; trial.py
    tries it again in the manner of a run."""
    base, config = unwrapped(model), unwrapped(model).config
    if reason := shares_nothing(config):
        return "none", reason
    teach_branches(model)
    try:
        with evaluating(model), attention_of_any_device(base), windows_of(base, SHORT), torch.no_grad():
            change, low = _change_by_branches(model)
    except Exception as error:  # the model's own code may raise anything
        return "chains", f"{config.model_type} fails on branches: {in_one_line(error)}"
    if not change <= (TOLERANCE_LOW_PRECISION if low else TOLERANCE):
        return "chains", f"{config.model_type} computes different states on branches, by {change:.2g} of their norm"
    return "branches", ""


def shares_nothing(config: Any) -> str:
    """Why sequences of a model cannot share the tokens that they begin with; "" if they can."""
    if is_dynamic(config) or switch_length(config) is not None:
        return f"the position encoding of {config.model_type} depends on the length of a forward pass"
    return ""


def _change_by_branches(model: Any) -> tuple[float, bool]:
    """The largest change of hidden states when a chain, a branch and a sequence by itself are shared in one row, and
    whether the states have 16 bits."""
    pairs, found = made_up_pairs(model, "conversation"), []
    for sharing in ("none", "branches"):
        batch = send_to_device(collate(pairs, sharing=sharing), model.device)
        found.append(model(**token_inputs(batch), perce={"rows": batch["rows"]}))
    alone, shared = found
    low = alone.dtype.itemsize == 2 or torch.is_autocast_enabled(alone.device.type)
    change = (alone - shared).float().norm(dim=-1) / alone.float().norm(dim=-1)
    return change.max().item(), low


def teach_branches(model: nn.Module) -> None:
    """Let attention take `spans`; without them it is unchanged. It is replaced for all models of this process."""
    for name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        if not hasattr(own := ALL_ATTENTION_FUNCTIONS[name], "perce"):
            ALL_ATTENTION_FUNCTIONS.register(name, _segment_by_segment(own, name))
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        if (own := getattr(module, EAGER, None)) and not hasattr(own, "perce"):
            setattr(module, EAGER, _segment_by_segment(own, "eager"))


def _segment_by_segment(own: Attention, name: str) -> Attention:
    @functools.wraps(own)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any,
        spans: Spans | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        if spans is None:
            return own(module, query, key, value, attention_mask, *args, **kwargs)
        kwargs = {option: given for option, given in kwargs.items() if option not in PACKED}
        window = kwargs.get("sliding_window")
        outputs = []
        lost = spans.before - (key.shape[2] - query.shape[2])  # keys of the trunk that a sliding window has dropped

        def of_segment(
            queries: Tensor, key: Tensor, value: Tensor, seen: Sequence[tuple[int, int]], mask: Any
        ) -> Tensor:
            keys, values = (
                torch.cat([states[:, :, start:end] for start, end in seen], dim=2) for states in (key, value)
            )
            return own(module, queries, keys, values, mask, *args, **kwargs)[0]

        # Without recomputation each branch would keep a copy of its path's keys and values for backward, and sdpa with
        # a mask one per query head. Tensors are arguments because a checkpoint keeps alive what a closure holds.
        recomputed = functools.partial(checkpoint, of_segment, use_reentrant=False, preserve_rng_state=False)
        for span in spans.spans:
            seen = [(start - lost, end - lost) for start, end in _seen(span, window)]
            queries = query[:, :, span.start - spans.before : span.end - spans.before]
            mask = _mask(spans, name, queries, sum(end - start for start, end in seen), window)
            run = recomputed if len(seen) > 1 and torch.is_grad_enabled() else of_segment
            outputs.append(run(queries, key, value, seen, mask))
        return torch.cat(outputs, dim=1), None

    attention.perce = True  # type: ignore[attr-defined]
    return attention


def _seen(span: Span, window: int | None) -> list[tuple[int, int]]:
    """Ranges of the row that a segment sees: its path, as far as a window reaches back from its first token, and the
    segment itself."""
    if window is None:
        return [*span.path, (span.start, span.end)]
    seen, reach = [(span.start, span.end)], window - 1
    for start, end in reversed(span.path):
        if reach > 0:
            seen.insert(0, (max(start, end - reach), end))
        reach -= end - start
    return seen


def _mask(spans: Spans, name: str, queries: Tensor, seen: int, window: int | None) -> Any:
    """The mask with which an implementation aligns the queries with the end of the keys; None if it needs none."""
    n = queries.shape[2]
    if "flash" in name:
        return None
    reach = window or seen
    plain = name not in ("eager", "flex_attention")
    if plain and seen <= reach and n in (1, seen):  # one token sees all keys, and otherwise sdpa's is_causal is right
        return None
    kept = name, n, seen, reach, queries.dtype, queries.device
    if kept not in spans.masks:
        spans.masks[kept] = _made(*kept)
    return spans.masks[kept]


def _made(name: str, n: int, seen: int, reach: int, dtype: torch.dtype, device: torch.device) -> Any:
    before = seen - n  # keys of the path

    def sees(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + before) & (key > query + before - reach)

    if name == "flex_attention":
        return create_block_mask(sees, 1, None, n, seen, device=device, _compile=device.type == "cuda")
    mask = sees(None, None, torch.arange(n, device=device)[:, None], torch.arange(seen, device=device))[None, None]
    # Numbers, not bools: sdpa would convert bools to numbers in each layer, and keep each result for backward.
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
