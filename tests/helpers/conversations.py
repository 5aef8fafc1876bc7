"""Pairs of conversations, of chance ids, as ChatML or Qwen3 shows them; and arithmetic that stays in fp64."""

import random

import torch
from torch.overrides import TorchFunctionMode

HEADER, THOUGHT, END = [3], [7, 8], [0]  # of the ids below, 10 … 399 are words


def conversation(replies: int, number: int = 0, thought: bool = False, persona: int = 12) -> list[dict]:
    """Pairs of one conversation; with `thought` the last reply of each begins with one that later ones do not show."""
    rng = random.Random(number)

    def words(count: int) -> list[int]:
        return [rng.randint(10, 399) for _ in range(count)]

    before, pairs = [1, *words(4)], []
    span = len(before), len(before) + persona
    shown = before + words(persona)
    for _ in range(replies):
        shown = shown + words(rng.randint(4, 9)) + HEADER
        reply = words(rng.randint(3, 8)) + END
        response = THOUGHT + reply if thought else reply
        pairs.append(
            {
                "input_ids": shown + response, "persona_span": span, "response_length": len(response),
                "personal": [False] * len(response), "conversation": number,
            }
        )  # fmt: skip
        shown = shown + reply
    return pairs


def conversations(thought: bool = False) -> list[dict]:
    """Of four, one and three replies, each pair with its number."""
    pairs = [pair for number, replies in enumerate((4, 1, 3)) for pair in conversation(replies, number, thought)]
    return [pair | {"example": index} for index, pair in enumerate(pairs)]


class Exact(TorchFunctionMode):
    """Leaves tensors of fp64 as they are where a model asks for fp32, as norms, rotations and softmax do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        exact = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if func is torch.Tensor.float and exact:
            return args[0]
        if exact and torch.float32 in (*args, *kwargs.values()):
            args = [torch.float64 if x is torch.float32 else x for x in args]
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)
