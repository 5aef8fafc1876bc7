"""A plan as tables in the terminal, and as JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from perce.plan import Plan, Result
from perce.plan_memory import UPDATE, accumulation

GIB = 2**30
PHASES = {  # as columns, and in words
    "counterfactual": ("no persona", "counterfactual pass"),
    "persona": ("persona", "persona's keys and values"),
    "forward": ("forward", "factual forward"),
    "head": ("head", "head and loss"),
    "last layer": ("last layer", "backward of the last layer"),
    "first layer": ("first layer", "backward of the first layer"),
    UPDATE: ("update", "optimiser update"),
}


def print_plan(result: Result) -> None:
    Console(highlight=False, soft_wrap=True).print(
        *_header(result), "", _phases(result), "", _details(result), "", _times(result), "", _variants(result), sep="\n"
    )


def _header(result: Result) -> list[str]:
    config, counts = result.config, result.plan.counts
    plan, memory, lora, backend = config.plan, config.memory, config.model.lora_r, config.model.backend
    persona = plan.context - plan.query - plan.response
    method = f"LoRA r {lora}" if lora else "all weights"
    tokens = f"{persona:,} persona, {plan.query:,} query, {plan.response:,} response"
    if plan.objective == "longce":
        tokens = f"documents; short contexts of {plan.short_context:,} tokens"
    changed = [f.name for f in fields(memory) if getattr(memory, f.name) != f.default]
    options = "".join(f", {name} {str(getattr(memory, name)).lower()}" for name in changed)
    name = config.model.model or "SmolLM2-135M-Instruct (default)"
    return [
        f"model  {name}: {counts.parameters / 1e6:,.1f} M parameters, "
        f"{counts.trained / 1e6:,.1f} M trained ({method}), {result.precision} arithmetic",
        f"step   {accumulation(plan)} forwards of {plan.per_device_train_batch_size} × {plan.context:,} tokens "
        f"({tokens}), {plan.objective} objective, "
        f"activation checkpointing {'on' if plan.activation_checkpointing else 'off'}{options}",
        f"device {result.device}{f' × {plan.devices}, sharding {plan.sharding}' if plan.devices > 1 else ''}"
        f"{'' if backend == 'auto' else f', backend {backend}'}",
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _phases(result: Result) -> Table:
    """A column a phase, a row a part."""
    memory = result.plan.memory
    table = _table("GiB", *(PHASES[name][0] for name in memory.phases))
    for part in memory.parts:
        sizes = [phase[part] for phase in memory.phases.values()]
        if any(sizes):
            table.add_row(part, *(_gib(size) for size in sizes))
    table.add_row("sum", *(_gib(sum(phase.values())) for phase in memory.phases.values()))
    return table


def _details(result: Result) -> Table:
    plan, memory = result.config.plan, result.plan.memory
    budget = plan.memory_bytes()
    rows = [("peak memory", f"{_gib(memory.peak)} GiB: {PHASES[memory.peak_phase][1]}")]
    if budget is not None:
        rows.append(("device memory", f"{_gib(budget)} GiB: {'enough' if memory.peak <= budget else 'too little'}"))
        longest = (
            f"{result.largest_context:,} tokens"
            if result.largest_context
            else "none: a persona of one token is too long"
        )
        rows.append(("largest context that fits", longest))
    if result.device == "cpu":
        rows.append(("beside it", "what Python and its libraries hold before there is a model"))
    rows += [
        ("a layer's attention, forward", f"{_gib(memory.attention)} GiB"),
        ("a layer's MLP, forward", f"{_gib(memory.mlp)} GiB"),
        ("hidden rows of the response", f"{_gib(memory.hidden_rows)} GiB"),
    ]
    if memory.offloaded:
        rows.append(("in host memory", f"{_gib(memory.offloaded)} GiB of checkpoints"))
    rows += [
        (f"not there: logits {which}", f"{_gib(size)} GiB in fp32") for which, size in memory.logits_not_held.items()
    ]
    return _facts(rows)


def _times(result: Result) -> Table:
    flops, rate = result.plan.flops, result.rate
    rows = [("optimiser step", f"{flops.total / 1e12:,.2f} TFLOP a device")]
    if rate:
        seconds = flops.total / rate
        tokens = flops.tokens * result.config.plan.devices / seconds
        rows.append(
            ("takes at least", f"{seconds:,.2f} s at {rate / 1e12:,.2f} TFLOP/s; at most {tokens:,.0f} tokens/s")
        )
    else:
        rows.append(("takes at least", "give the device's rate with --tflops: there is none here to measure"))
    if result.config.plan.objective != "ce":
        rows.append(("counterfactual pass", f"{flops.overhead:.1%} on top of a cross-entropy step"))
    return _facts(rows)


def _variants(result: Result) -> Table:
    base = result.plan
    table = _table("what an option changes", "peak, GiB", "GiB", "FLOP")
    for variant in result.variants:
        peak = variant.plan.memory.peak
        work = variant.plan.flops.total / base.flops.total - 1
        table.add_row(variant.flags, _gib(peak), f"{(peak - base.memory.peak) / GIB:+,.2f}", f"{work:+.1%}")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def to_json(result: Result) -> dict[str, Any]:
    """Bytes, FLOP, FLOP/s, seconds, tokens."""
    return {
        "options": asdict(result.config.model) | asdict(result.config.memory) | asdict(result.config.plan),
        "device": result.device,
        "precision": result.precision,
        **_plan_json(result.plan, result.rate),
        "matmul_flops_per_second": result.rate,
        "largest_context": result.largest_context,
        "variants": {variant.flags: _plan_json(variant.plan, None) for variant in result.variants},
    }


def _plan_json(plan: Plan, rate: float | None) -> Mapping[str, Any]:
    memory, flops = plan.memory, plan.flops
    return {
        "counts": asdict(plan.counts),
        "memory": {**asdict(memory), "peak_phase": memory.peak_phase, "parts": memory.parts, "peak": memory.peak},
        "flops": {**asdict(flops), "total": flops.total, "overhead": flops.overhead},
        "least_seconds": flops.total / rate if rate else None,
    }
