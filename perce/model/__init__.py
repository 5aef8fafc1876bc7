"""A causal language model that returns what PerCE needs.

loading    precision, attention, LoRA, 4-bit bases   patch      adds PerCE to the model's own forward and its head
passes     the two forward passes of a batch         head       the loss or statistics from the passes' hidden states
prefill    the persona by itself, then its requests  branches   attention over segments that share tokens
positions  encodings that follow the length          unpacked   no waiting for the device to look for packed sequences
auxiliary  balancing and other losses of the model   memory     MLPs in tiles, activation checkpointing
noise      what is random in training mode           reach      which weights a text trains, which layers LoRA adapts
probe      a few tokens, outside of training steps   trial      a made-up step, compared with the model's own logits
"""
