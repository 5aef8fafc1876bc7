"""What a training step takes, before a GPU is spent on it. No weights are read.

rehearsal   a step on tensors without data      live     the bytes that are alive in each of its phases
memory      its peak, by phase and part         flops    its operations, and the least time they take
plans       what fits, and what options change  tables   a plan in the terminal and as JSON
ways        the fastest options that fit        device   how much memory there is
four_bit    linear layers as bitsandbytes holds them
"""
