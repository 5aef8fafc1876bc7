"""Predictions of `python -m perce.plan` compared with real steps: peak memory within 15 %, and the bound on time.

Models have the shapes of SmolLM2-135M, Qwen3 and Gemma-3 with fewer and narrower layers, and random weights.
"""

from typing import Any

import pytest
from transformers import AutoConfig

from benchmarks.step_memory import Spec, measured
from perce.config.commands import PLAN
from perce.planning.flops import matmul_rate
from perce.planning.plans import Cost, Costs

LLAMA = {
    "model_type": "llama", "vocab_size": 16384, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 32768, "hidden_size": 320, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "sliding_window": 256,
    "max_position_embeddings": 8192,
}  # fmt: skip
MIB = 2**20

PERSONA = {"query": 32, "response": 96, "share_persona": 8, "per_device_train_batch_size": 8}
CONVERSATION = {"query": 32, "response": 32, "replies": 8, "per_device_train_batch_size": 8}


def spec(model: dict[str, Any], context: int, lora_r: int, precision: str, checkpointing: bool, **changes: Any) -> Spec:
    return {
        "model": model, "context": context, "query": 64, "response": 128, "lora_r": lora_r, "precision": precision,
        "activation_checkpointing": checkpointing, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "objective": "perce", "persona_grad": "full", "mlp_tile": 0, "replies": 1, "branches": False,
    } | changes  # fmt: skip


SPECS = {
    "smollm2-full-fp32-1024": spec(LLAMA, 1024, 0, "fp32", False),
    "smollm2-full-fp32-2048-checkpointed": spec(LLAMA, 2048, 0, "fp32", True),
    "smollm2-full-bf16-2048": spec(LLAMA, 2048, 0, "bf16", False),
    "smollm2-lora-fp32-2x1024": spec(LLAMA, 1024, 16, "fp32", False, per_device_train_batch_size=2),
    "smollm2-lora-bf16-2x1024": spec(LLAMA, 1024, 16, "bf16", False, per_device_train_batch_size=2),
    "qwen3-full-fp32-1024-accumulated": spec(QWEN3, 1024, 0, "fp32", False, gradient_accumulation_steps=2),
    "qwen3-full-fp32-2x1024-checkpointed": spec(QWEN3, 1024, 0, "fp32", True, per_device_train_batch_size=2),
    "qwen3-full-bf16-1024-ce": spec(QWEN3, 1024, 0, "bf16", False, objective="ce"),
    "qwen3-lora-fp32-2048-checkpointed": spec(QWEN3, 2048, 16, "fp32", True),
    "qwen3-lora-bf16-2048-checkpointed": spec(QWEN3, 2048, 16, "bf16", True),
    "gemma3-full-fp32-2048": spec(GEMMA3, 2048, 0, "fp32", False),
    "gemma3-full-bf16-2048-checkpointed": spec(GEMMA3, 2048, 0, "bf16", True),
    "gemma3-lora-bf16-1024": spec(GEMMA3, 1024, 16, "bf16", False),
    "smollm2-lora-fp32-4096-none": spec(LLAMA, 4096, 16, "fp32", False, persona_grad="none"),
    "smollm2-lora-fp32-4096-checkpointed-none": spec(LLAMA, 4096, 16, "fp32", True, persona_grad="none"),
    "gemma3-lora-fp32-2x2048-checkpointed-none": spec(
        GEMMA3, 2048, 16, "fp32", True, persona_grad="none", per_device_train_batch_size=2
    ),
    "smollm2-lora-fp32-4096-tiled": spec(LLAMA, 4096, 16, "fp32", False, mlp_tile=512),
    "qwen3-full-fp32-2048-checkpointed-tiled": spec(QWEN3, 2048, 0, "fp32", True, mlp_tile=512),
    "smollm2-lora-fp32-1024-8-replies": spec(LLAMA, 1024, 16, "fp32", False, **CONVERSATION),
    "smollm2-full-fp32-2x1024-checkpointed-8-replies": spec(
        LLAMA, 1024, 0, "fp32", True, **CONVERSATION | {"per_device_train_batch_size": 16}
    ),
    "qwen3-lora-fp32-1024-8-branches": spec(QWEN3, 1024, 16, "fp32", False, **CONVERSATION, branches=True),
    "qwen3-lora-bf16-1024-checkpointed-8-branches": spec(QWEN3, 1024, 16, "bf16", True, **CONVERSATION, branches=True),
    "gemma3-lora-fp32-1024-8-branches": spec(GEMMA3, 1024, 16, "fp32", False, **CONVERSATION, branches=True),
} | {
    f"{name}-8-requests{name_of}": spec(*given, **PERSONA, **how, gradient_accumulation_steps=forwards)
    for name, given, forwards in (
        ("smollm2-lora-fp32-2048", (LLAMA, 2048, 16, "fp32", False), 1),
        ("smollm2-full-fp32-4096-checkpointed", (LLAMA, 4096, 0, "fp32", True), 1),
        ("qwen3-lora-bf16-4096-checkpointed", (QWEN3, 4096, 16, "bf16", True), 1),
        ("qwen3-full-fp32-2048-accumulated", (QWEN3, 2048, 0, "fp32", False), 2),
    )
    for name_of, how in (
        ("", {}),
        ("-one-by-one", {"branches_per_forward": 1}),
        ("-none", {"persona_grad": "none"}),
        ("-none-one-by-one", {"persona_grad": "none", "branches_per_forward": 1}),
    )
}

QUICK = ("smollm2-full-fp32-1024", "qwen3-lora-fp32-2048-checkpointed", "gemma3-full-fp32-2048")
"""The steps that a run of all benchmarks measures; -m slow runs the others. Not in bf16, which a CPU without bf16
arithmetic emulates: a step that takes 4 seconds with it took 109."""


def planned(spec: Spec) -> Cost:
    """The plan of the step that `measured` runs."""
    options = PLAN.build({name: value for name, value in spec.items() if name != "model"})
    return Costs(AutoConfig.for_model(**spec["model"]), "cpu").of(options)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]
)
@pytest.mark.benchmark(group="plan: predicted and measured peak memory")
def test_plan_against_real_steps(benchmark, name):
    plan = planned(SPECS[name])
    real = benchmark.pedantic(measured, args=(SPECS[name],), rounds=1)
    bound = plan.flops.total / (matmul_rate("cpu", SPECS[name]["precision"] == "bf16") or 1)
    benchmark.extra_info |= {
        "predicted_mib": round(plan.memory.peak / MIB),
        "measured_mib": round(real["peak_bytes"] / MIB),
        "difference": round(plan.memory.peak / real["peak_bytes"] - 1, 3),
        "peak_in": plan.memory.peak_phase,
        "libraries_mib": round(real["libraries_bytes"] / MIB),
        "least_seconds": round(bound, 2),
        "step_seconds": round(real["step_seconds"], 2),
    }
    assert abs(plan.memory.peak / real["peak_bytes"] - 1) <= 0.15
