"""Peak extra memory and time of one long-context step: `python -m benchmarks.context WAY PERSONA` prints it as JSON.

SmolLM2-135M's shape with random weights, LoRA of rank 16 and fp32, on one sequence of a persona and 80 + 128 tokens.
"Extra" is what exceeds the memory that the process holds before the step, which includes the adapters' gradients; see
benchmarks/memory.py. "naive" computes the loss by its formula on the logits of all tokens.
"""

import json
import sys
from typing import Any

from benchmarks.memory import measured_step, return_freed_blocks

QUERY, RESPONSE = 80, 128
TILE = 512
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "mlp_tile": {"mlp_tile": TILE},
    "checkpointing": {"checkpointing": True},
    "checkpointing + mlp_tile": {"checkpointing": True, "mlp_tile": TILE},
    "persona_grad none": {"persona_grad": "none"},
    "persona_grad none + checkpointing": {"persona_grad": "none", "checkpointing": True},
    "naive": {"naive": True},
    "naive + checkpointing": {"naive": True, "checkpointing": True},
}


def measure(way: str, persona: int) -> dict[str, float]:
    """Measured in this process; to be called once in a fresh one."""
    return_freed_blocks()

    import torch
    from peft import LoraConfig

    from benchmarks.test_step import pair, smollm2_135m
    from benchmarks.trainers import labelled, naive_perce
    from perce.config.schema import MemoryConfig
    from perce.data.batch import collate
    from perce.model.loading import add_adapter
    from perce.model.memory import enable_checkpointing, prepare_memory
    from perce.model.passes import counterfactual_hidden, factual
    from perce.objectives import OBJECTIVES, HeadCall

    options = dict(WAYS[way])
    checkpointing, naive = options.pop("checkpointing", False), options.pop("naive", False)
    memory = MemoryConfig(**options)
    torch.manual_seed(0)
    model = add_adapter(smollm2_135m(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    if checkpointing:
        enable_checkpointing(model)
    prepare_memory(model, memory)

    def step(persona: int) -> float:
        row = pair(persona, QUERY, RESPONSE)
        if naive:
            loss = naive_perce(model, {name: torch.tensor([ids]) for name, ids in labelled(row).items()}, RESPONSE)
            loss.backward()
            return loss.item()
        batch = collate([row], persona_grad=memory.persona_grad)
        call = HeadCall(batch["target"], OBJECTIVES["perce"].weighting(), counterfactual_hidden(model, batch))
        loss = factual(model, batch, call).loss
        loss.backward()
        return loss.item()

    step(16)  # thread pools, GEMM primitives, the adapters' gradients
    return measured_step(lambda: step(persona))


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in WAYS:
        sys.exit(f"{__doc__}\nWAY is one of: {', '.join(WAYS)}.")
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))


if __name__ == "__main__":
    main()
