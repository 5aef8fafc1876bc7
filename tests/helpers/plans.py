"""Shared by the tests of plans."""

from dataclasses import replace

from perce import MemoryConfig
from perce.config.schema import ModelConfig
from perce.config.step import StepConfig

FULL, LORA = ModelConfig(lora_r=0, precision="fp32"), ModelConfig(lora_r=4, precision="fp32")
NONE, TILED = MemoryConfig(persona_grad="none"), MemoryConfig(mlp_tile=16)
SHORT = StepConfig(context=96, query=8, response=16, gradient_accumulation_steps=1)
TALK = replace(SHORT, replies=3, per_device_train_batch_size=6)
TREE = replace(TALK, branches=True)
