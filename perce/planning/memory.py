"""Peak memory of a training step on one device, by phase and by part.

    weights           parameters and buffers, counted on the real model
    optimiser states  8 bytes per trained parameter (AdamW in fp32)
    activations       alive when a phase begins, gradients left out: for the backward all that was kept, with
                      checkpointing only the layers' inputs
    working set       what the phase adds at its peak, for example one layer's recomputation and gradients
    gradients         of parameters, as far as backward has come
    loss buffers      inside the op: a chunk of logits; on a CPU also an fp32 copy of a bf16 head. The logits of backend
                      "reference" are rehearsed and therefore part of the working set

Activations, working sets and gradients are rehearsed (rehearsal.py); the others are formulae. The parts of a phase sum
to its peak, and the largest phase is the step's peak. On a CPU, what the process holds before the model is built comes
on top.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from perce.config.step import StepConfig
from perce.errors import UserError
from perce.model.head import logit_transforms
from perce.model.probe import unwrapped
from perce.planning.building import Setup, build, decoder_layers, layer_kinds
from perce.planning.rehearsal import rehearse_depth
from perce.planning.shapes import StepShape, shape_of
from perce_kernels import chunked
from perce_kernels.backends import chosen

UPDATE = "update"  # the phase of the optimiser, whose fused AdamW works in place
ADAMW_BYTES = 8
CUDA_RESERVE = 2**30  # context, kernels, cuBLAS workspaces, fragmentation; assumed
MULTIPROCESSORS = 132  # of an H100 or H200; their number decides how many tokens a chunk of the loss has


@dataclass(frozen=True)
class Counts:
    """Exact sizes of a model, counted on its modules."""

    parameters: int  # tied ones count once
    trained: int
    weight_bytes: int
    embedding: int  # parameters outside the layers
    linear: int  # matrices of the layers, adapters left out
    mlp: int  # the part of linear that --mlp_tile computes in tiles
    adapter: int  # LoRA weights
    not_recomputed: int  # the part of linear in each layer's last product, whose result backward does not need
    hidden: int
    vocabulary: int
    layers: int
    head_trains: bool
    head_bias: bool


def count(config: Any, setup: Setup) -> Counts:
    """The sizes of a config's model. UserError for a model whose layers differ in size."""
    plain = replace(setup, model=replace(setup.model, load_in_4bit=False))
    model = build(config, plain)
    held = build(config, setup) if setup.model.load_in_4bit else model
    text = config.get_text_config()
    layers = decoder_layers(model, text.num_hidden_layers)
    sizes: dict[Any, int] = {}
    for layer, kind in zip(layers, layer_kinds(config), strict=True):
        size = sum(p.numel() for p in layer.parameters())
        if sizes.setdefault(kind, size) != size:
            raise UserError(
                f"{type(unwrapped(model)).__name__}: it has layers of {sizes[kind]:,} and of {size:,} parameters. "
                "perce.plan expects layers of equal size."
            )
    parameters = sum(p.numel() for p in model.parameters())
    matrices = {name: p.numel() for name, p in layers.named_parameters() if p.dim() > 1}
    adapter = sum(size for name, size in matrices.items() if "lora_" in name)
    mlp = sum(size for name, size in matrices.items() if "lora_" not in name and name.split(".")[1] == "mlp")
    # With an adapter, the layer's last product is the adapter's, which is too small to count.
    last = 0 if adapter else sum([p.numel() for p in layer.parameters() if p.dim() > 1][-1] for layer in layers)
    head = model.get_output_embeddings()
    return Counts(
        parameters=parameters,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weight_bytes=sum(x.numel() * x.itemsize for x in [*held.parameters(), *held.buffers()]),
        embedding=parameters - sum(p.numel() for p in layers.parameters()),
        linear=sum(matrices.values()) - adapter,
        mlp=mlp,
        adapter=adapter,
        not_recomputed=last,
        hidden=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
        layers=len(layers),
        head_trains=head.weight.requires_grad,
        head_bias=head.bias is not None,
    )


@dataclass(frozen=True)
class PeakMemory:
    """In bytes. Every phase has the same parts."""

    phases: dict[str, dict[str, int]]
    hidden_rows: int  # hidden states of the response tokens, of both passes
    offloaded: int  # checkpointed layer inputs in host memory
    logits_not_held: dict[str, int]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def peak_memory(config: Any, setup: Setup, step: StepConfig, counts: Counts, device: str) -> PeakMemory:
    """The rehearsal and the formulae of the module's docstring combined."""
    shape = shape_of(step, setup.memory)
    rehearsed = rehearse_depth(config, setup, shape)
    resident = _resident(counts, setup, step, device)
    shares = step.devices if step.sharding == "full" else 1
    phases = {
        name: resident
        | {
            "gradients": phase.peak.gradients // shares,
            "activations": phase.start.others,
            "working set": phase.working_set,
            "loss buffers": loss_buffers(config, setup, shape, counts, device) if name == "head" else 0,
        }
        for name, phase in rehearsed.largest.items()
    }
    trained_bytes = 4 * counts.trained
    nothing = {"activations": 0, "working set": 0, "loss buffers": 0}
    phases[UPDATE] = resident | {"gradients": trained_bytes // shares} | nothing
    holds_cf = bool(shape.tokens_cf and not shape.objective.over_step)
    not_held = {"of all tokens": shape.computed * counts.vocabulary * 4}
    if setup.model.backend != "reference":
        not_held = {"of the response tokens": shape.rows * counts.vocabulary * 4} | not_held
    return PeakMemory(
        phases,
        offloaded=rehearsed.offloaded,
        # Autocast's wrapper returns those of the counterfactual pass in fp32.
        hidden_rows=shape.rows * counts.hidden * ((2 if setup.low_precision else 4) + 4 * holds_cf),
        logits_not_held=not_held,
    )


def _resident(counts: Counts, setup: Setup, step: StepConfig, device: str) -> dict[str, int]:
    """The parts alive in every phase. With sharding, two layers (the current and the next) and the embeddings are
    gathered."""
    weights, states = counts.weight_bytes, ADAMW_BYTES * counts.trained
    resident = {"weights": weights, "optimiser states": states}
    if step.sharding == "full":
        layer = (counts.parameters - counts.embedding) // counts.layers
        gathered = (2 * layer + counts.embedding) * (2 if setup.low_precision else 4)
        resident = {name: size // step.devices for name, size in resident.items()} | {"gathered weights": gathered}
    elif step.devices > 1:
        resident["gradient buckets"] = 4 * counts.trained  # DistributedDataParallel copies them for its all-reduce
    if device == "cuda":
        resident["CUDA context"] = CUDA_RESERVE
    return resident


def loss_buffers(config: Any, setup: Setup, shape: StepShape, counts: Counts, device: str) -> int:
    """Bytes that fused_perce_loss allocates besides its inputs and outputs, as far as they are not rehearsed."""
    backend: str = setup.model.backend
    if backend == "reference":  # plain PyTorch tensors, which the rehearsal counts
        return 0
    n, d, v = shape.rows, counts.hidden, counts.vocabulary
    softcap = logit_transforms(config)[0].softcap is not None
    passes = 1 + shape.objective.fused
    if device == "cuda" and torch.cuda.is_available():
        backend, _ = chosen(backend, torch.device(device))
    if backend == "triton" or (backend == "auto" and device == "cuda"):  # of a GPU elsewhere, kernels are assumed
        return _gpu_loss_buffers(n, d, v, 2 if setup.low_precision else 4, passes, counts)
    buffers = 1 + softcap
    chunk = min(chunked.chunk_rows(v, torch.float32, buffers, device), n)
    logits, dhidden = buffers * chunk * v * 4, chunk * d * 4
    if not setup.low_precision:
        return logits + dhidden
    # CPU products have no out_dtype, so their operands are copied to fp32; on a GPU, dz is copied to 16 bits.
    return logits + dhidden + ((v + passes * chunk) * d * 4 if device == "cpu" else chunk * v * 2)


def _gpu_loss_buffers(n: int, d: int, v: int, itemsize: int, passes: int, counts: Counts) -> int:
    try:
        from perce_kernels.gpu import driver, tiles
        from perce_kernels.gpu.cut import cut_of
    except ImportError as error:
        raise UserError(
            f"--device cuda: the plan needs the chunk sizes of the Triton backend, which cannot be imported ({error}). "
            "Install triton, plan on the Linux machine that will train, or plan with --backend torch."
        ) from error
    # Without a GPU to ask, a Hopper is assumed, as for MULTIPROCESSORS.
    arch = tiles.architecture(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"
    way = tiles.WAY[arch] if itemsize == 2 else "fused"
    return driver.extra_bytes(
        n, d, v, itemsize, cut=cut_of(n, d, v, itemsize, way, MULTIPROCESSORS), way=way, passes=passes, gathered=False,
        masked=False, needed=(True, counts.head_trains, counts.head_bias and counts.head_trains),
    )  # fmt: skip
