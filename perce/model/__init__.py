"""A causal language model that returns what PerCE needs.

loading    precision, attention, LoRA, 4-bit bases   patch     the head and the model's own forward, taught PerCE
passes     the two forward passes of a batch         head      what the head computes of them: a loss, or statistics
prefill    the persona by itself, requests behind    memory    MLPs in tiles, checkpointing, positions
probe      running a model beside its training, on a few tokens
"""
