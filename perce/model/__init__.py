"""A causal language model that returns what PerCE needs.

loading    precision, attention, LoRA, 4-bit bases   patch     adds PerCE to the model's own forward and its head
passes     the two forward passes of a batch         head      the loss or statistics from the passes' hidden states
prefill    the persona by itself, then its requests  memory    MLPs in tiles, activation checkpointing
probe      running a model on a few tokens, outside its training steps
"""
