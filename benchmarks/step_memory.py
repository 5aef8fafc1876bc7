"""Peak memory of real training steps: `python -m benchmarks.step_memory JSON` prints it as JSON.

A PerceTrainer takes two steps on a model with random weights, in a process of its own. The result is the peak resident
set of the second step, when optimiser states exist, minus what the process held after a run of the same model with a
single layer: plans do not count Python, the libraries and their scratch space. glibc is set to return every freed block
of 64 KiB or more at once; otherwise it keeps freed activations, which in small models are below its usual threshold.
"""

import ctypes
import gc
import json
import sys
import tempfile
from typing import Any

from benchmarks.memory import in_a_child, return_freed_blocks, status_bytes

STEPS = 2
HEADER = 4  # tokens of a prompt before its persona

Spec = dict[str, Any]
"""The options of `python -m perce.plan`; "model" has a config's fields, including its model_type."""


def measure(spec: Spec) -> dict[str, float]:
    """{"peak_bytes", "step_seconds", "libraries_bytes"} of this process; to be called once in a fresh one."""
    return_freed_blocks(2**16)
    train(spec | {"model": spec["model"] | {"num_hidden_layers": 1}})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    peak, seconds = train(spec)
    return {"peak_bytes": peak - before, "step_seconds": seconds, "libraries_bytes": before}


def train(spec: Spec) -> tuple[int, float]:
    """(peak resident bytes, seconds) of the last step."""
    from datasets import Dataset

    from benchmarks.step_meter import StepMeter
    from perce.config.schema import LossConfig, MemoryConfig
    from perce.model.memory import CHECKPOINTING
    from perce.training.arguments import PerceArguments
    from perce.training.trainer import PerceTrainer
    from tests.helpers.tiny import tiny_tokenizer

    meter = StepMeter()
    batch, accumulation = spec["per_device_train_batch_size"], spec["gradient_accumulation_steps"]
    how = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    with tempfile.TemporaryDirectory() as directory:
        args = PerceArguments(
            directory, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=STEPS,
            bf16=spec["precision"] == "bf16", per_device_train_batch_size=batch, dataloader_pin_memory=False,
            gradient_accumulation_steps=accumulation, loss=LossConfig(objective=spec["objective"]),
            memory=MemoryConfig(**{name: spec[name] for name in MemoryConfig.__dataclass_fields__ if name in spec}),
            **(how if spec["activation_checkpointing"] else {}),
        )  # fmt: skip
        trainer = PerceTrainer(
            make_model(spec), args, train_dataset=Dataset.from_list(pairs(spec, STEPS * accumulation * batch)),
            processing_class=tiny_tokenizer(), callbacks=[meter],
        )  # fmt: skip
        trainer.train()
    return meter.peak, meter.seconds[-1]


def make_model(spec: Spec) -> Any:
    """A model with random weights, in the dtypes that load_model gives a checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from perce.config.schema import ModelConfig
    from perce.model.loading import add_adapter, lora_config
    from perce.model.patch import prepare_model

    torch.manual_seed(0)
    low = spec["precision"] == "bf16" and spec["lora_r"]
    config = AutoConfig.for_model(**spec["model"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if low else torch.float32)
    prepare_model(model)
    return add_adapter(model, lora_config(ModelConfig(lora_r=spec["lora_r"]))) if spec["lora_r"] else model


def pairs(spec: Spec, count: int) -> list[dict[str, Any]]:
    """Token pairs; with several replies, those of whole conversations. The persona fills what queries and responses
    leave of the context. With branches, a reply at the end of its sequence has ids of its own; with share_persona, so
    does each request."""
    response, replies, vocabulary = spec["response"], spec["replies"], spec["model"]["vocab_size"]
    turn, sharing = response + spec["query"], spec.get("share_persona") or 1
    persona = spec["context"] - replies * turn

    def pair(row: int) -> dict[str, Any]:
        conversation, reply = divmod(row, replies)
        ids = [(7 * i + conversation // sharing) % vocabulary for i in range(persona + turn * (reply + 1))]
        if sharing > 1:
            ids[HEADER + persona :] = [(i + 1 + row) % vocabulary for i in ids[HEADER + persona :]]
        if spec["branches"]:
            ids[-response:] = [(i + 1) % vocabulary for i in ids[-response:]]
        return {
            "input_ids": ids, "persona_span": [HEADER, HEADER + persona], "response_length": response,
            "personal": [False] * response, "passages": [], "example": row, "conversation": conversation,
            "persona": conversation // sharing,
        }  # fmt: skip

    return [pair(row) for row in range(count)]


def measured(spec: Spec) -> dict[str, float]:
    """`measure`, in a child process."""
    return in_a_child("benchmarks.step_memory", json.dumps(spec))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(measure(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
