"""Estimates of the memory and time of a training step, without loading weights or using a GPU.

rehearsal   a step on tensors without data      live     the bytes alive in each phase of a step
memory      the peak memory, by phase and part  flops    the operations, and a lower bound on time
plans       what fits, and what options change  tables   a plan in the terminal and as JSON
ways        the fastest options that fit        device   how much memory a device has
building    models without data                 shapes   how many sequences and tokens a step has
four_bit    linear layers as bitsandbytes stores them
"""
