"""A training step rehearsed on tensors without data: the model's own code runs, and the bytes alive are counted.

    rehearse         both passes, the loss and the backward on fake tensors; allocations and releases are counted
    rehearse_depth   the same for a few layers only, extrapolated to the model's depth

A step is a sequence of phases: "counterfactual", "persona" (if it has a forward of its own), "forward", "head", "last
layer" (the first whose backward runs) and "first layer". The bytes at the start and at the peak of each phase grow
linearly with the number of layers of each kind, so the difference of two rehearsals is what one more layer adds. If
either of two moments in a phase may be its peak and they grow at different rates, each is a phase of its own, such as
"last layer/recomputed first". In backward, activations shrink while gradients grow, so their sum is largest at one end.
Requests that are recomputed after others find the gradients of those already alive. The backward of a persona with its
own forward comes last. Fake tensors show what operators return, not what they allocate inside: memory.py adds the
buffers of the loss.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from operator import sub
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

import perce.model.memory
import perce_kernels.loss
from perce.data.sharing import Segment, Spans
from perce.errors import UserError, first_line
from perce.model.branches import teach_branches
from perce.model.head import answer, logit_transforms
from perce.model.memory import run_tiles
from perce.model.positions import is_dynamic
from perce.model.prefill import (
    CACHE_ARGUMENT,
    PREFILL_CHUNK,
    PrefixCache,
    prefill_with_gradient,
    spans_arguments,
)  # fmt: skip
from perce.model.probe import decoder_of, unwrapped
from perce.objectives import HeadCall
from perce.planning.building import Setup, build, cut, decoder_layers, layer_kinds
from perce.planning.live import Live, Phase, Rehearsed
from perce.planning.shapes import StepShape

RECOMPUTED = ("last layer/recomputed first", "last layer/recomputed then")
PERSONAS_BACKWARD = ("persona's backward/last layer", "persona's backward/first layer")


def rehearse_depth(config: Any, setup: Setup, shape: StepShape) -> Rehearsed:
    """`rehearse` for the full depth, extrapolated from a stack with each kind of layer once and, for each kind, a stack
    with one more such layer. For a peak in the middle, all layers of a kind count as if they came before it: the
    estimate is a few checkpoints too high.

    With activation_offload, a layer's input is in host memory; inputs in transfer are assumed to take as much as in the
    shallow stack. Not measured.
    """
    kinds = layer_kinds(config)
    between = [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind not in (kinds[0], kinds[-1])]
    base = [0, *between, len(kinds) - 1] if len(kinds) > 1 else [0]
    shallow = rehearse(cut(config, base), setup, shape)
    phases, offloaded = dict(shallow.phases), 0
    present = Counter(kinds[index] for index in base)
    for kind, count in Counter(kinds).items():
        if more := count - present[kind]:
            stack = [0, kinds.index(kind), *base[1:]]
            deeper = rehearse(cut(config, stack), setup, shape)
            added: dict[str, Phase] = tree_map(sub, deeper.phases, shallow.phases)
            if setup.memory.activation_offload:
                keys_and_values = deeper.cached - shallow.cached
                inputs = added["head"].start.others - shape.personas * keys_and_values
                offloaded += more * inputs
                added = {name: _offloaded(name, phase, inputs, shape) for name, phase in added.items()}
            phases = tree_map(lambda total, layer, layers=more: total + layers * layer, phases, added)
    return Rehearsed(phases, offloaded)


def _offloaded(name: str, added: Phase, inputs: int, shape: StepShape) -> Phase:
    """What a layer adds to a phase when its inputs, in bytes for the whole forward, are in host memory."""
    if name in ("head", "last layer"):
        return Phase(*(moment.less(inputs) for moment in added))
    if name == "forward":  # its peak is at its end
        return added._replace(peak=added.peak.less(inputs))
    if shape.prefix and not shape.detached and name in (*RECOMPUTED, "first layer", PERSONAS_BACKWARD[0]):
        # At least the inputs of the current persona are offloaded; those of later personas are counted as on the GPU.
        return Phase(*(moment.less(inputs // shape.personas) for moment in added))
    return added


def rehearse(config: Any, setup: Setup, shape: StepShape) -> Rehearsed:
    """The bytes that one step of this model has alive in each of its phases."""
    live = Live()
    model = build(config, setup)
    if shape.shares:
        teach_branches(unwrapped(model))
    if is_dynamic(config):
        _fix_frequencies(model)
    try:
        # transformers looks for packed sequences in position ids. If these have no values, it assumes packing and
        # builds a T × T mask, which a real step never has. The reference checks target values, which are missing too.
        packed, targets = (masking_utils, "find_packed_sequence_indices"), (perce_kernels.loss, "check_target")
        tiles = (perce.model.memory, "run_tiles", _run_tiles_at_the_ends)
        with FakeTensorMode(), _replaced(*packed), _replaced(*targets), _replaced(*tiles):
            live.disregard(_give_storage(model))
            with live:
                if shape.accumulates:
                    _give_gradients(model, live)
                _step(model, setup, shape, live)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        name = type(unwrapped(model)).__name__
        raise UserError(
            f"{name}: a step of this architecture cannot be rehearsed without data ({first_line(error)})."
        ) from error
    return live.found


def _fix_frequencies(model: Any) -> None:
    """Dynamic NTK compares the values of positions, which are missing, to find those beyond the model's limit, which no
    step has."""
    for module in model.modules():
        if kinds := getattr(module, "rope_type", None):
            module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


@contextmanager
def _replaced(module: Any, name: str, by: Callable[..., Any] = lambda *_, **__: None) -> Iterator[None]:
    """Replaces the function by another one, or one that returns None, while the context is open."""
    own = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, own)


def _run_tiles_at_the_ends(run: Callable[[Tensor], Tensor], hidden: Tensor, tile: int) -> Tensor:
    """As run_tiles, with the same peaks: most is alive in the last whole tile of a forward pass, and in the backward of
    one of the first two. Of the tiles between, what stays is their input, output and gradient, which are made at once.
    """
    last = hidden.shape[1] % tile or tile
    between = hidden.shape[1] - 3 * tile - last
    if between <= 0:
        return run_tiles(run, hidden, tile)
    *first, middle, one, another = hidden.split([tile, tile, between, tile, last], dim=1)
    outputs = [run(part.contiguous()) for part in first]
    outputs.append(_Between.apply(middle.contiguous(), outputs[0].dtype))
    return torch.cat(outputs + [run(part.contiguous()) for part in (one, another)], dim=1)


class _Between(torch.autograd.Function):
    """Keeps its input, and returns an output and a gradient of its shape."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden)
        return torch.empty_like(hidden, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.empty_like(*ctx.saved_tensors), None


def _give_storage(model: nn.Module) -> Iterator[Tensor]:
    """Replaces tensors on the meta device by fake ones, tied ones once; to be called under a FakeTensorMode."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                    yield fake
                held[name] = made[id(tensor)]


def _give_gradients(model: nn.Module, live: Live) -> None:
    """Gradients as an earlier forward and its backward leave them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            live.count_gradient(parameter)


def _step(model: Any, setup: Setup, shape: StepShape, live: Live) -> None:
    """One forward and backward as PerceTrainer runs them; marks the phases."""
    base = unwrapped(model)
    decoder: Any = decoder_of(base)
    head = base.get_output_embeddings()
    layers = decoder_layers(base, base.config.get_text_config().num_hidden_layers)
    transform = logit_transforms(base.config)[0]
    rows = torch.zeros(shape.rows, dtype=torch.int64)

    def autocast() -> Any:  # one per pass, like Accelerate's wrapper: casts of the weights live as long as it
        return torch.autocast("cpu", torch.bfloat16, enabled=setup.low_precision)

    def at_rows(segments: list[Segment], tokens: int) -> Tensor:
        found = _of_segments(decoder, segments) if shape.shares else _hidden(decoder, len(segments), tokens)
        return found[rows]

    hidden_cf, signal = None, None
    if shape.tokens_cf:
        live.enter("counterfactual")
        model.eval()
        with torch.no_grad(), autocast():
            states = at_rows(shape.segments_cf, shape.tokens_cf)
        hidden_cf = states.float() if setup.low_precision else states  # the wrapper returns fp32
        model.train()
    if shape.objective.over_step:  # the E-step's two forwards end before the step's own begins; its factual forward
        hidden_cf, signal = None, torch.ones(shape.rows)  # has less alive than one with a backward
    live.leave()
    handles = [*_watch_backward(layers, live), *_watch_gradients(model, live)]
    with autocast():
        if setup.memory.on_trunks:
            states = _behind_personas(decoder, shape, rows, live)
        else:
            live.enter("forward")
            states = at_rows(shape.segments, shape.tokens)
        live.enter("head")
        backend = "reference" if setup.model.backend == "reference" else "torch"
        nothing = torch.zeros_like(rows, dtype=torch.bool)
        call = HeadCall(rows, shape.objective.weighting(), hidden_cf, personal=nothing, signal=signal, num_items=1)
        loss = answer(call, states, lm_head=head.weight, bias=head.bias, backend=backend, **vars(transform)).loss
    del states, hidden_cf, call
    live.enter("last layer")
    loss.backward()
    live.leave()
    for handle in handles:
        handle.remove()


def _hidden(decoder: Any, sequences: int, tokens: int, **kwargs: Any) -> Tensor:
    ids = torch.zeros(sequences, tokens, dtype=torch.int64)
    return decoder(input_ids=ids, use_cache=False, **kwargs)[0].flatten(0, 1)


def _of_segments(decoder: Any, segments: list[Segment]) -> Tensor:
    """Hidden states of a row, arranged like collate's and passed on as by the patched forward."""
    *starts, tokens = [0, *accumulate(len(segment.ids) for segment in segments)]
    spans = Spans.of(dict(enumerate(segments)), dict(enumerate(starts)))
    return _of_spans(decoder, spans, tokens)


def _of_spans(decoder: Any, spans: Spans, tokens: int, **kwargs: Any) -> Tensor:
    positions = torch.zeros(1, tokens, dtype=torch.int64)
    return _hidden(decoder, 1, tokens, position_ids=positions, **spans_arguments(spans, positions), **kwargs)


def _behind_personas(decoder: Any, shape: StepShape, rows: Tensor, live: Live) -> Tensor:
    """Hidden states of the requests at these rows, as hidden_on_trunks computes them; marks the phases of a persona."""
    rests, length, together = [], shape.tokens - shape.prefix, shape.together or shape.requests

    def behind(cache: PrefixCache, requests: int) -> Tensor:
        again = live.has_been("last layer")
        live.enter(RECOMPUTED[live.has_been(RECOMPUTED[0])] if again else "forward")
        if shape.requests == 1:
            return _hidden(decoder, 1, length, **{CACHE_ARGUMENT: cache})
        spans = Spans.behind(shape.prefix, [length] * requests)
        return _of_spans(decoder, spans, requests * length, **{CACHE_ARGUMENT: cache})

    run = functools.partial(checkpoint, behind, use_reentrant=False) if shape.together else behind
    for _ in range(shape.personas):
        live.enter("persona")
        if shape.detached:
            cache = _prefix_cache(decoder, shape.prefix)
        else:
            cache = prefill_with_gradient(decoder, torch.zeros(1, shape.prefix, dtype=torch.int64))
            last: Any = cache.layers[-1]  # its keys get their gradient after the backward of all that follows
            last.keys.register_hook(lambda _: live.enter(PERSONAS_BACKWARD[0]))
        live.found.cached = _held(cache)
        for first in range(0, shape.requests, together):
            rests.append(run(cache, min(together, shape.requests - first)))
    return torch.cat(rests)[rows]


def _held(cache: PrefixCache) -> int:
    """Bytes of the cache's keys and values."""
    layers: list[Any] = cache.layers
    storages = (held.untyped_storage() for layer in layers for held in (layer.keys, layer.values))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def _prefix_cache(decoder: Any, tokens: int) -> PrefixCache:
    """The cache as prefill leaves it. For a long prefix only the first chunk and the last two run: the chunks between
    would only lengthen the keys and values, which are allocated at that length instead."""
    cache = PrefixCache(config=decoder.config)
    first, *rest = torch.zeros(1, tokens, dtype=torch.int64).split(PREFILL_CHUNK, dim=1)
    between, last = rest[:-2], rest[-2:]
    decoder(input_ids=first, use_cache=False, **{CACHE_ARGUMENT: cache})
    for layer in cache.layers if between else ():
        _lengthen(layer, len(between) * PREFILL_CHUNK)
    for chunk in last:
        decoder(input_ids=chunk, use_cache=False, **{CACHE_ARGUMENT: cache})
    cache.filled = True
    return cache


def _lengthen(layer: Any, tokens: int) -> None:
    """Lengthens keys and values by so many tokens. A sliding layer keeps only the last of them, as views of the tensor
    to which the last chunk was appended."""
    length = layer.keys.shape[2] + tokens
    window = getattr(layer, "sliding_window", None)
    if window:
        length = min(length, window - 1 + PREFILL_CHUNK)
        layer.cumulative_length += tokens
    for name in ("keys", "values"):
        held = getattr(layer, name)
        longer = held.new_empty(*held.shape[:2], length, held.shape[3])
        setattr(layer, name, longer[:, :, -window + 1 :] if window else longer)


def _watch_backward(layers: nn.ModuleList, live: Live) -> Iterator[Any]:
    """Marks the end of the last layer's backward and the start of the first layer's."""

    def when_its_gradient_is_there(mark: Callable[[str], None]) -> Callable[..., None]:
        def on_output(_module: nn.Module, _args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                phase = PERSONAS_BACKWARD[1] if live.phase == "persona" else "first layer"
                states.register_hook(lambda _: mark(phase))

        return on_output

    if len(layers) > 2:
        yield layers[-2].register_forward_hook(when_its_gradient_is_there(lambda _: live.leave()))
    if len(layers) > 1:
        yield layers[0].register_forward_hook(when_its_gradient_is_there(live.enter))


def _watch_gradients(model: nn.Module, live: Live) -> Iterator[Any]:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            yield parameter.register_post_accumulate_grad_hook(live.count_gradient)
