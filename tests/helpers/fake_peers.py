"""Made-up peers that fail in every way a library can, to test the harness of the GPU benchmarks."""

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.child import Unable
from benchmarks.gpu.peers import Implementation, Peer, composed

HANG = 90.0  # seconds


def exact_nll(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden.float() @ lm_head.float().T, target, reduction="none")


def inaccurate_nll(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
    """From 16-bit logits: gradients are accurate enough, PIR is not."""
    return F.cross_entropy((hidden @ lm_head.T).bfloat16().float(), target, reduction="none")


def scaled_by_the_first(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
    """A fault of a real library: losses are right, but all gradients are scaled by the first upstream gradient."""
    nll = exact_nll(hidden, lm_head, target)
    return (nll.sum() - nll.sum().detach()) / len(nll) + nll.detach()


def raises(error: BaseException) -> Callable[[], Implementation]:
    def load() -> Implementation:
        raise error

    return load


def crashes() -> Implementation:
    print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
    os._exit(7)


def hangs() -> Implementation:
    time.sleep(HANG)
    return composed(exact_nll)


LOADS: dict[str, Callable[[], Implementation]] = {
    "fake_right": lambda: composed(exact_nll),
    "fake_inaccurate": lambda: composed(inaccurate_nll),
    "fake_wrong": lambda: composed(scaled_by_the_first),
    "fake_nan": lambda: composed(lambda *inputs: exact_nll(*inputs) * torch.nan),
    "fake_absent": raises(Unable("it is not installed")),
    "fake_broken": raises(RuntimeError("an assertion\n  in the library")),
    "fake_greedy": raises(torch.OutOfMemoryError("CUDA out of memory")),
    "fake_crashes": crashes,
    "fake_hangs": hangs,
}
FAKES = {name: Peer(name, name, load) for name, load in LOADS.items()}
