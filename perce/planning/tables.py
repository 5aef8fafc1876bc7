"""A plan as tables in the terminal, and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from rich.table import Table

from perce.planning.device import DOUBTFUL, GIB
from perce.planning.memory import UPDATE
from perce.planning.plans import Cost, Plan
from perce.report.terminal import facts, show, table

PHASE_NAMES = {  # (column title, words in a sentence)
    "counterfactual": ("no\npersona", "counterfactual pass"),
    "persona": ("persona", "persona's keys and values"),
    "forward": ("forward", "factual forward"),
    "head": ("head", "head and loss"),
    "last layer": ("last\nlayer", "backward of the last layer"),
    "first layer": ("first\nlayer", "backward of the first layer"),
    "persona's backward": ("persona\nback", "persona's backward"),
    UPDATE: ("AdamW", "optimiser update"),
}


def print_plan(plan: Plan) -> None:
    show(
        *_verdict(plan),
        "",
        *_header(plan),
        "",
        _phases(plan),
        "",
        _details(plan),
        "",
        _times(plan),
        "",
        _variants(plan),
    )


def _verdict(plan: Plan) -> list[str]:
    """Whether the step fits, by how much, and a command that trains with such steps."""
    peak, there = plan.cost.memory.peak, plan.available
    if there is None:
        return [f"takes   {_gib(peak)} GiB; give the device's memory with --gpu_memory to learn whether that fits"]
    whose = "--gpu_memory" if plan.options.step.gpu_memory else f"this {plan.device}, without what libraries take"
    if peak <= there:
        close = ", which is close" if peak > DOUBTFUL * there else ""
        said = f"fits    {_gib(peak)} of {_gib(there)} GiB ({whose}): {_gib(there - peak)} are left{close}"
    else:
        said = f"too much  {_gib(peak)} GiB, {_gib(peak - there)} more than the {_gib(there)} GiB ({whose})"
    if plan.command:
        return [said, f"run     {plan.command}", *([f"but     {plan.caveat}"] if plan.caveat else [])]
    remedy = "a shorter --context, a smaller model, or more memory"
    if plan.options.step.sharding == "none":
        return [said, f"run     no combination of options tried here fits: use {remedy}"]
    if peak <= there:
        return [said, "run     sharded, with a recipe such as recipes/several_gpus_fsdp2.yaml"]
    return [said, f"run     not with these options: see below what each option changes, or use {remedy}"]


def _header(plan: Plan) -> list[str]:
    options, counts = plan.options, plan.cost.counts
    step, memory, lora, backend = options.step, options.memory, options.model.lora_r, options.model.backend
    persona = step.context - step.without_persona
    method = f"LoRA r {lora}" if lora else "all weights"
    batch, turn = f"{step.sequences} × {step.context:,} tokens", f"{step.query:,} query, {step.response:,} response"
    tokens = f"{persona:,} persona, {turn}"
    if step.replies > 1:
        computed = plan.cost.flops.tokens // step.forwards
        batch = f"{step.batch} replies in {batch}"
        beside = ", earlier ones also as branches next to their copies" if step.branches else ""
        tokens = f"{persona:,} persona, {step.replies} replies of {turn}{beside}: {computed:,} are computed"
    if step.of_documents:
        tokens = f"documents; short contexts of {step.short_context:,} tokens"
    estimate = "" if step.estimate == "online" else f", weights estimated {step.estimate}"
    changed = [f.name for f in fields(memory) if getattr(memory, f.name) != f.default]
    settings = "".join(f", {name} {str(getattr(memory, name)).lower()}" for name in changed)
    name = options.model.model or "SmolLM2-135M-Instruct (default)"
    return [
        f"model  {name}: {counts.parameters / 1e6:,.1f} M parameters, "
        f"{counts.trained / 1e6:,.1f} M trained ({method}), {plan.precision} arithmetic",
        f"step   {step.forwards} forward{'s' * (step.forwards > 1)} of {batch} ({tokens}), {step.objective} "
        f"objective{estimate}, activation checkpointing {'on' if step.activation_checkpointing else 'off'}{settings}",
        f"device {plan.device}{f' × {step.devices}, sharding {step.sharding}' if step.devices > 1 else ''}"
        f"{'' if backend == 'auto' else f', backend {backend}'}",
    ]


def _phases(plan: Plan) -> Table:
    """One column per phase, one row per part. Sizes of at most five characters let eight phases fit into 80 columns."""

    def short(size: int) -> str:
        return f"{size / GIB:.1f}" if 100 * GIB <= size < 1000 * GIB else _gib(size)

    memory = plan.cost.memory
    rows = table("GiB", *(PHASE_NAMES[name][0] for name in memory.phases), numbers=True)
    for part in memory.parts:
        sizes = [phase[part] for phase in memory.phases.values()]
        if any(sizes):
            rows.add_row(part, *(short(size) for size in sizes))
    rows.add_row("sum", *(short(sum(phase.values())) for phase in memory.phases.values()))
    return rows


def _details(plan: Plan) -> Table:
    memory, budget = plan.cost.memory, plan.options.step.memory_bytes()
    rows = [("peak memory", f"{_gib(memory.peak)} GiB: {PHASE_NAMES[memory.peak_phase][1]}")]
    if budget is not None:
        rows.append(("device memory", f"{_gib(budget)} GiB: {'enough' if memory.peak <= budget else 'too little'}"))
        longest = (
            f"{plan.largest_context:,} tokens" if plan.largest_context else "none: not even the shortest context fits"
        )
        rows.append(("largest context that fits", longest))
    if plan.device == "cpu":
        rows.append(("in addition", "what Python and its libraries hold before the model is loaded"))
    rows.append(("hidden rows of the response", f"{_gib(memory.hidden_rows)} GiB"))
    if memory.offloaded:
        rows.append(("in host memory", f"{_gib(memory.offloaded)} GiB of checkpointed layer inputs"))
    rows += [
        (f"never held: logits {which}", f"{_gib(size)} GiB in fp32") for which, size in memory.logits_not_held.items()
    ]
    return facts(rows)


def _times(plan: Plan) -> Table:
    flops, rate = plan.cost.flops, plan.rate
    rows = [("optimiser step", f"{flops.total / 1e12:,.2f} TFLOP per device")]
    if rate:
        seconds = flops.total / rate
        tokens = flops.tokens * plan.options.step.devices / seconds
        rows.append(
            ("takes at least", f"{seconds:,.2f} s at {rate / 1e12:,.2f} TFLOP/s; at most {tokens:,.0f} tokens/s")
        )
    else:
        rows.append(("takes at least", "unknown: no such device here to measure; give its rate with --tflops"))
    if (computed := plan.options.step.computed).products:
        rows.append((computed.cost, f"{flops.overhead:.1%} on top of a cross-entropy step"))
    return facts(rows)


def _variants(plan: Plan) -> Table:
    base = plan.cost
    rows = table("what an option changes", "peak, GiB", "GiB", "FLOP", numbers=True)
    for variant in plan.variants:
        peak = variant.cost.memory.peak
        work = variant.cost.flops.total / base.flops.total - 1
        rows.add_row(variant.flags, _gib(peak), f"{(peak - base.memory.peak) / GIB:+,.2f}", f"{work:+.1%}")
    return rows


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}" if size < 1000 * GIB else f"{size / GIB:,.0f}"


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes, FLOP, FLOP/s, seconds, tokens."""
    options = plan.options
    return {
        "kind": "perce.plan",
        "options": asdict(options.model) | asdict(options.memory) | asdict(options.step),
        "device": plan.device,
        "precision": plan.precision,
        **_cost_json(plan.cost, plan.rate),
        "matmul_flops_per_second": plan.rate,
        "largest_context": plan.largest_context,
        "memory_available": plan.available,
        "fits": None if plan.available is None else plan.cost.memory.peak <= plan.available,
        "command": plan.command,
        "variants": {variant.flags: _cost_json(variant.cost, None) for variant in plan.variants},
    }


def _cost_json(cost: Cost, rate: float | None) -> Mapping[str, Any]:
    memory, flops = cost.memory, cost.flops
    return {
        "counts": asdict(cost.counts),
        "memory": {**asdict(memory), "peak_phase": memory.peak_phase, "parts": memory.parts, "peak": memory.peak},
        "flops": {**asdict(flops), "total": flops.total, "overhead": flops.overhead},
        "least_seconds": flops.total / rate if rate else None,
    }
