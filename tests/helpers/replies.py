"""Pairs of conversations with random ids, as templates like ChatML or Qwen3 arrange them; and arithmetic in fp64."""

import contextlib
import random
from unittest import mock

import torch

HEADER, THOUGHT, END = [3], [7, 8], [0]  # of the ids below, 10 … 399 are words


def conversation(replies: int, number: int = 0, thought: bool = False, persona: int = 12) -> list[dict]:
    """Pairs of one conversation; with `thought`, the last reply of each has one, which later pairs leave out."""
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
                "personal": [False] * len(response), "conversation": number, "persona": number,
            }
        )  # fmt: skip
        shown = shown + reply
    return pairs


def conversations(thought: bool = False) -> list[dict]:
    """Pairs of three conversations with four, one and three replies; each pair has its conversation's number."""
    pairs = [pair for number, replies in enumerate((4, 1, 3)) for pair in conversation(replies, number, thought)]
    return [pair | {"example": index} for index, pair in enumerate(pairs)]


def requests(count: int, persona: int = 40, number: int = 0) -> list[dict]:
    """Pairs of one persona. The first two are one conversation, whose template shows a thought only before the last
    reply; each other pair is a conversation of its own."""
    rng = random.Random(number)
    before = [1, 5, 6]
    shown = before + [rng.randint(10, 399) for _ in range(persona)]
    pairs = []
    for index in range(max(count - 1, 1)):
        for pair in conversation(2 if index == 0 and count > 1 else 1, 100 * number + index, thought=True):
            ids = shown + pair["input_ids"][pair["persona_span"][1] :]
            span = (len(before), len(shown))
            pairs.append(pair | {"input_ids": ids, "persona_span": span, "persona": number, "example": len(pairs)})
    return pairs


class Exact(contextlib.ExitStack):
    """While this context is open, fp64 tensors stay fp64 when a model asks for fp32, as norms, rotations and softmax
    do. It is not a torch mode, because that would be off while a checkpoint recomputes."""

    def __enter__(self):
        for owner, name in ((torch.Tensor, "to"), (torch.Tensor, "float"), (torch.nn.functional, "softmax")):
            self.enter_context(mock.patch.object(owner, name, _exact(getattr(owner, name))))
        return super().__enter__()


def _exact(own):
    def called(tensor, *args, **kwargs):
        if own.__name__ == "float" and tensor.dtype in (torch.float64, torch.int64):  # positions meet fp64 tensors
            return tensor.double()
        if tensor.dtype != torch.float64:
            return own(tensor, *args, **kwargs)
        args = [torch.float64 if x is torch.float32 else x for x in args]
        return own(tensor, *args, **{name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()})

    return called
