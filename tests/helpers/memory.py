"""What the tests of memory options share."""

import torch
from datasets import Dataset
from peft import LoraConfig

from perce import LossConfig, MemoryConfig, PerceArguments, PerceTrainer
from perce.model.loading import add_adapter
from perce.model.patch import prepare_model
from tests.helpers.tiny import demo_pairs, tiny_model, tiny_tokenizer

PAIRS = demo_pairs(3)

TILE = 32

DETACHED, TILED = MemoryConfig(persona_grad="none"), MemoryConfig(mlp_tile=TILE)


def trainer_for(tmp_path, model, pairs=PAIRS, **options):
    args = PerceArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=3, max_steps=1,
        logging_steps=1, save_strategy="no", loss=LossConfig(clip_min=0.005), dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return PerceTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tiny_tokenizer())


def model_for(architecture="llama", lora=False, dropout=0.0, **changes):
    model = prepare_model(tiny_model(architecture, **changes))
    if lora:
        model = add_adapter(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero, where the adapters of A would have no gradient
                torch.nn.init.normal_(parameter, std=0.05)
    return model
