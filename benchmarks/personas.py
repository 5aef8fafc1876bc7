"""A step on eight requests for one persona: `python -m benchmarks.personas WAY PERSONA` prints time and memory as JSON.

    separate      one request after the other, each with its own copy of the persona
    batched       all requests in one forward, each with its own copy of the persona
    together      the persona once, in one forward with all requests: --share_persona 8
    one by one    the persona once, then one request at a time: --branches_per_forward 1

Each also with --persona_grad none ("none, …") and with activation checkpointing ("…, checkpointing"); "one" is a step
on a single request. A request has 64 tokens and a reply of 64. SmolLM2-135M's shape, random weights, all of which
train, fp32. Memory is what exceeds the memory held before the step, which includes gradients; see benchmarks/memory.py.
"""

import json
import random
import sys
from typing import Any

from benchmarks.memory import measured_step, return_freed_blocks

REQUESTS, BEFORE, QUERY, RESPONSE = 8, 8, 64, 64
WAYS = ("one", "separate", "batched", "together", "one by one")
SHARED = {"sharing": "branches", "unit": "persona"}
Pairs = list[dict[str, Any]]


def pairs_of(persona: int) -> Pairs:
    """Pairs of random ids."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(49152) for _ in range(count)]

    shown = tokens(BEFORE + persona)
    return [
        {
            "input_ids": shown + tokens(QUERY + RESPONSE), "persona_span": (BEFORE, BEFORE + persona),
            "response_length": RESPONSE, "personal": [False] * RESPONSE, "conversation": number, "persona": 0,
        }
        for number in range(REQUESTS)
    ]  # fmt: skip


def parsed(way: str) -> tuple[str, bool, bool]:
    """(way, persona_grad none, checkpointing)."""
    parts = way.split(", ")
    (name,) = set(parts) - {"none", "checkpointing"}
    return name, "none" in parts, "checkpointing" in parts


def batches(name: str, pairs: Pairs, detached: bool) -> list[dict[str, Any]]:
    from perce.data.batch import collate

    how: dict[str, Any] = {"persona_grad": "none" if detached else "full"}
    if name in ("one", "separate"):
        return [collate([pair], **how) for pair in (pairs[:1] if name == "one" else pairs)]
    if name != "batched":
        how |= SHARED | {"branches_per_forward": int(name == "one by one")}
    return [collate(pairs, **how)]


def measure(way: str, persona: int) -> dict[str, float]:
    """Measured in this process; to be called once in a fresh one."""
    return_freed_blocks()

    from benchmarks import sharing
    from benchmarks.test_step import smollm2_135m
    from perce.model.branches import teach_branches
    from perce.model.memory import enable_checkpointing
    from perce.model.prefill import prepare_prefill

    name, detached, checkpointing = parsed(way)
    model = smollm2_135m().train()
    teach_branches(model)
    prepare_prefill(model)
    if checkpointing:
        enable_checkpointing(model)
    sharing.step(model, batches(name, pairs_of(16), detached))  # thread pools, GEMM primitives, the gradients
    dealt = batches(name, pairs_of(persona), detached)
    return measured_step(lambda: sharing.step(model, dealt))


def main() -> None:
    if len(sys.argv) != 3 or not sys.argv[1].endswith(tuple(WAYS) + tuple(f"{way}, checkpointing" for way in WAYS)):
        sys.exit(f"{__doc__}\nWAY ends with one of: {', '.join(WAYS)}.")
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))


if __name__ == "__main__":
    main()
