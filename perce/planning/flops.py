"""Floating-point operations of an optimiser step, and a lower bound on the time it takes.

F is the number of factual input tokens, C of counterfactual ones; tokens that several replies share count once. The
layers' matrices have P weights, their adapters A. A forward pass of F tokens takes 2·(P + A)·F operations plus
attention. Its backward takes twice that; LoRA saves the half that computes weight gradients, except the adapters'.
Checkpointing adds one forward pass without each layer's last product; tiled MLPs add one forward pass of the MLPs.
With persona_grad="none", backward and recomputation process only the tokens after the persona. For N response tokens,
each product of the head costs 2·N·D·V: logits, dh, dW if the head trains, and those that the token weights need
(objectives.py). Norms, activation functions, the optimiser and memory traffic are left out, so this is a lower bound.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from perce.config.step import StepConfig
from perce.data.sharing import Segment
from perce.planning.building import Setup
from perce.planning.memory import Counts
from perce.planning.shapes import shape_of

GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
GEMM_SECONDS = 1.0
WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "moe", "mlp")  # of a config's layer_types


@dataclass(frozen=True)
class Flops:
    """Operations of one optimiser step on one device."""

    forward: int
    backward: int
    recomputation: int
    estimation: int  # of the layers, to compute the token weights: a counterfactual forward
    head: int
    head_estimation: int  # of the head, to compute the token weights
    tokens: int  # factual input tokens that are computed

    @property
    def cross_entropy(self) -> int:
        """The same step with all token weights 1."""
        return self.forward + self.backward + self.recomputation + self.head

    @property
    def total(self) -> int:
        return self.cross_entropy + self.estimation + self.head_estimation

    @property
    def overhead(self) -> float:
        """What the token weights cost, as a share of a cross-entropy step."""
        return self.total / self.cross_entropy - 1


def count_flops(config: Any, setup: Setup, step: StepConfig, counts: Counts) -> Flops:
    shape, forwards = shape_of(step, setup.memory), step.forwards
    product = 2 * shape.rows * counts.hidden * counts.vocabulary
    trains_all = not setup.model.lora_r

    def linear(tokens: int, weights: int) -> int:
        return 2 * tokens * weights

    every = counts.linear + counts.adapter
    attention = _attention(config, shape.segments)
    forward = linear(shape.computed, every) + attention
    behind = shape.computed - shape.personas * shape.prefix  # tokens after personas
    of_personas = shape.personas * attention_flops(config, shape.prefix)
    again = linear(behind, every) + attention - of_personas if shape.together else 0
    kept = shape.computed
    if shape.detached:  # only the other tokens have a backward pass; they attend to all tokens
        kept, attention = behind, attention - of_personas
    backward = linear(kept, (1 + trains_all) * counts.linear + 2 * counts.adapter) + 2 * attention
    in_one = shape.replies * shape.requests > 1 and not shape.together
    row = kept if in_one else shape.tokens - shape.prefix
    # The attention of branches is recomputed, see model/branches.py.
    recomputation = again + _attention(config, [segment for segment in shape.segments if segment.path])
    if setup.checkpointing:
        recomputation += linear(kept, every - counts.not_recomputed) + attention
    if 0 < setup.memory.mlp_tile < row:
        recomputation += linear(kept, counts.mlp - counts.not_recomputed)
    estimation = forward if shape.objective.over_step else 0  # such an objective's E-step has a factual pass too
    if shape.tokens_cf:
        computed_cf = sum(len(segment.ids) for segment in shape.segments_cf)
        estimation += linear(computed_cf, every) + _attention(config, shape.segments_cf)
    return Flops(
        forward=forwards * forward,
        backward=forwards * backward,
        recomputation=forwards * recomputation,
        estimation=forwards * estimation,
        head=forwards * product * (2 + counts.head_trains),
        head_estimation=forwards * product * shape.objective.products,
        tokens=forwards * shape.computed,
    )


def _attention(config: Any, segments: list[Segment]) -> int:
    """Attention of one forward pass over segments, each of which also attends to its path."""
    places = Counter((segment.position, len(segment.ids)) for segment in segments)
    return sum(
        times * (attention_flops(config, start + tokens) - attention_flops(config, start))
        for (start, tokens), times in places.items()
    )


def attention_flops(config: Any, tokens: int) -> int:
    """Attention of one whole sequence's forward pass: Q Kᵀ and P V over the visible positions, in all layers."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # In latent attention, head_dim is only the part of queries and keys that has positions.
    widths = (getattr(text, "qk_head_dim", None) or width) + (getattr(text, "v_head_dim", None) or width)
    per_pair = 2 * text.num_attention_heads * widths
    window = getattr(text, "sliding_window", None)
    alike = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    attending = [kind for kind in getattr(text, "layer_types", None) or alike if kind not in WITHOUT_ATTENTION]
    return sum(per_pair * _visible(tokens, window if kind == "sliding_attention" else None) for kind in attending)


def _visible(tokens: int, window: int | None) -> int:
    """How many pairs there are of a token and a token that it attends to."""
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def matmul_rate(device: str, low_precision: bool) -> float | None:
    """FLOP/s of a square matrix product on this machine, the best within one second; None without such a device."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    from torch.utils.benchmark import Timer  # takes a while to import

    side = GEMM_SIDE[device]
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if low_precision else torch.float32)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(timer.blocked_autorange(min_run_time=GEMM_SECONDS).times)
