"""Training steps of perce's trainer and of others: `python -m benchmarks.trainers WAY PERSONA [SHAPE]`.

    perce          PerceTrainer, PerCE                           perce-ce   the same, cross-entropy
    perce-waits    the same, but the host waits for the GPU: for batches, which are in pageable memory, and for a look
                   in each forward pass whether rows are packed
    perce-liger    the same with Liger's kernels for norms, rotary embeddings and MLPs, on a GPU
    naive          transformers.Trainer, PerCE by its formula    naive-ce   the same, its own loss: logits of all tokens
    naive-kept     "naive" with only the response's logits, by the model's own logits_to_keep
    trl-perce      PerceSFTTrainer: TRL's SFTTrainer with PerCE   trl-perce-ce   the same, cross-entropy
    trl-ce         TRL's SFTTrainer with its fused head; it has no weights from a counterfactual pass. On a CPU its head
                   runs on the persona's tokens too (on a GPU it leaves them out), so its speed on a CPU says little

All with activation checkpointing, on one sequence of a persona and 80 + 128 tokens. SHAPE is "deep" (fp32, all weights;
small enough for two cores), "qwen3-8b" (bf16, LoRA; for a GPU) or "tiny" (the same at a small size), with random
weights. Printed as JSON: the first step's loss; the last step's peak memory, and how much of it was not held before the
step, gradients included; seconds and factual tokens per second as the median of all steps but the first (on a GPU, the
first two); on a GPU, how often the host waits for it in a step. Batches are copied to a GPU from pinned memory, by ours
without waiting, by the others as transformers does by default.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks.memory import return_freed_blocks

QUERY, RESPONSE, STEPS = 80, 128, 4
WAYS = ("perce", "naive", "naive-kept", "trl-perce", "perce-ce", "naive-ce", "trl-ce", "trl-perce-ce")
SHAPES: dict[str, dict[str, Any]] = {
    "deep": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 2**20, "initializer_range": 0.1,  # so that PIRs exceed the clip's floor
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "max_position_embeddings": 2**20,
    },
    "tiny": {
        "model_type": "qwen3", "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip


def measure(way: str, persona: int, shape: str = "deep") -> dict[str, float]:
    """Measured in this process; to be called once in a fresh one."""
    return_freed_blocks()
    return train(make_model(shape), way, persona, shape)


def make_model(shape: str) -> Any:
    """A model with random weights, the same every time, on the GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.for_model(**SHAPES[shape])
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if shape == "deep" else torch.bfloat16)


def train(model: Any, way: str, persona: int, shape: str, steps: int = STEPS) -> dict[str, float]:
    """So many steps of one trainer. Adapters and other changes that it makes to the model stay."""
    from datasets import Dataset

    from benchmarks.step_meter import StepMeter
    from benchmarks.test_step import pair
    from perce.config.schema import ModelConfig
    from perce.model.loading import lora_config
    from perce.model.memory import CHECKPOINTING
    from tests.helpers.tiny import tiny_tokenizer

    low, waits = shape != "deep", way == "perce-waits"
    meter = StepMeter()
    rows = Dataset.from_list([pair(persona, QUERY, RESPONSE) | {"passages": [], "example": 0}] * steps)
    make = {"perce": _ours, "naive": _naive, "trl": _trl}[way.partition("-")[0]]
    with tempfile.TemporaryDirectory() as directory:
        arguments = {
            "output_dir": directory, "use_cpu": model.device.type == "cpu", "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "max_steps": steps, "per_device_train_batch_size": 1,
            "learning_rate": 1e-6, "gradient_accumulation_steps": 1, "logging_steps": steps, "bf16": low,
            "logging_first_step": True, "dataloader_pin_memory": model.device.type != "cpu" and not waits,
            CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
        }  # fmt: skip
        trainer = make(model, tiny_tokenizer(), rows, arguments, lora_config(ModelConfig()) if low else None, way)
        trainer.add_callback(meter)
        try:
            with patch("perce.model.patch._is_unpacked", lambda *_: False) if waits else nullcontext():
                trainer.train()
        finally:
            meter.close()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds, tokens = median(meter.seconds), persona + QUERY + RESPONSE
    return {
        "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": meter.peak,
        "peak_extra_bytes": meter.peak - meter.before, "loss": losses[0],
    } | ({} if meter.waits is None else {"waits": meter.waits})  # fmt: skip


def _ours(model: Any, tokenizer: Any, rows: Any, arguments: dict[str, Any], lora: Any, way: str) -> Any:
    from perce.config.schema import LossConfig
    from perce.training.arguments import PerceArguments
    from perce.training.trainer import PerceTrainer

    loss = LossConfig(objective="ce" if way == "perce-ce" else "perce")
    return PerceTrainer(
        model, PerceArguments(**arguments, loss=loss, use_liger_kernel=way == "perce-liger"), train_dataset=rows,
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def naive_perce(model: Any, inputs: Any, num_items: Any, kept: int = 0) -> Any:
    """The loss by its formula, on logits of all tokens or of the last `kept`. inputs: from `labelled`, (1, T)."""
    import torch

    def logp(suffix: str) -> torch.Tensor:
        call = {"input_ids": inputs[f"input_ids{suffix}"], "use_cache": False, "logits_to_keep": kept}
        logits = model(**call).logits[:, :-1].float()
        labels = inputs[f"labels{suffix}"][:, -logits.shape[1] :]
        every = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return every[labels != -100]

    with torch.no_grad():
        logp_cf = logp("_cf")
    factual = logp("")
    weight = (factual.detach() - logp_cf).clamp(0.8, 5.0)
    return -(weight * factual).sum() / num_items


def labelled(row: dict[str, Any]) -> dict[str, Any]:
    """Columns for a trainer without personas: ids, ids without the persona, and labels, which are the response."""
    ids, (start, end), length = row["input_ids"], row["persona_span"], row["response_length"]
    without = ids[:start] + ids[end:]
    return {
        "input_ids": ids, "labels": [-100] * (len(ids) - length) + ids[-length:],
        "input_ids_cf": without, "labels_cf": [-100] * (len(without) - length) + without[-length:],
    }  # fmt: skip


def _naive(model: Any, tokenizer: Any, rows: Any, arguments: dict[str, Any], lora: Any, way: str) -> Any:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    class NaivePerce(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            return naive_perce(model, inputs, num_items_in_batch, kept=RESPONSE + 1 if way == "naive-kept" else 0)

    data = rows.map(labelled, remove_columns=rows.column_names)
    if way == "naive-ce":
        data = data.remove_columns(["input_ids_cf", "labels_cf"])
    return (Trainer if way == "naive-ce" else NaivePerce)(
        get_peft_model(model, lora) if lora else model, TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=data, processing_class=tokenizer, data_collator=default_data_collator,
    )  # fmt: skip


def _trl(model: Any, tokenizer: Any, rows: Any, arguments: dict[str, Any], lora: Any, way: str) -> Any:
    from trl import SFTConfig, SFTTrainer

    arguments = arguments | {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    if way == "trl-ce":
        data = rows.map(labelled, remove_columns=rows.column_names).remove_columns(["input_ids_cf", "labels_cf"])
        options = SFTConfig(**arguments)
        return SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    from perce.data.marked import row_of
    from perce.integrations.trl import PerceSFTConfig, PerceSFTTrainer

    data = rows.map(row_of, remove_columns=rows.column_names)
    options = PerceSFTConfig(**arguments, objective="ce" if way == "trl-perce-ce" else "perce")
    return PerceSFTTrainer(model, options, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def measured(way: str, persona: int, shape: str = "deep") -> dict[str, float] | None:
    """`measure`, in a child process; None if the machine has too little memory for it."""
    command = [sys.executable, "-m", "benchmarks.trainers", way, str(persona), shape]
    child = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if child.returncode == -9 or "OutOfMemoryError" in child.stderr:
        return None
    if child.returncode:
        raise RuntimeError(child.stderr)
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    ways = (*WAYS, "perce-waits", "perce-liger")
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ways or (sys.argv[3:] or ["deep"])[0] not in SHAPES:
        sys.exit(f"{__doc__}\nWAY is one of: {', '.join(ways)}; SHAPE one of: {', '.join(SHAPES)}.")
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])))


if __name__ == "__main__":
    main()
