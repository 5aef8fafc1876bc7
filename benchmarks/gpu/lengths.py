"""What a length that attention has not seen before costs: PyTorch may choose cuDNN, which makes a plan for each shape.

A run on real data has other lengths in each batch, and the other stages repeat one. With every kernel allowed, and
without cuDNN's:

    attention   PyTorch's own by itself, forward and backward, causal or with a mask: the first and the second call at
                each length
    steps       a training step at each length, and the same steps again: seconds of all
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child
from benchmarks.gpu.steps import Case, Steps

LENGTHS = {"cuda": tuple(range(2000, 2400, 37)), "cpu": (96, 101, 107)}
HEADS, WIDTH = {"cuda": 32, "cpu": 2}, 128
KERNELS = {"all kernels": True, "without cuDNN": False}
"""Whether cuDNN's attention is allowed."""


@contextmanager
def cudnn_allowed(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attention(child: Child, masked: bool) -> dict[str, Any]:
    """Median seconds of the first call at a length, and of the second."""
    device, first, second = child.request.device, [], []
    for tokens in LENGTHS[device]:
        shape = (1, HEADS[device], tokens, WIDTH)
        inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        mask = torch.ones(tokens, tokens, device=device, dtype=torch.bool).tril() if masked else None

        def run(inputs: Any = inputs, mask: Any = mask) -> None:
            output = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=mask is None)
            torch.autograd.grad(output.sum(), inputs)

        first.append(child.clock.seconds(run))
        second.append(child.clock.seconds(run))
    return {"first_seconds": median(first), "seconds": median(second), "each": first}


def of_steps(child: Child, steps: Steps, cases: list[Case]) -> dict[str, Any]:
    """Seconds of steps one after the other, and of the same steps once more."""
    first, second = (child.clock.seconds(lambda: [steps.run(case) for case in cases]) for _ in range(2))
    return {"first_seconds": first, "seconds": second, "steps": len(cases)}


def stage(child: Child) -> None:
    name, device = child.request.stage, child.request.device
    for kernels, allowed in KERNELS.items():
        for masked in (False, True):
            key = f"{name}/attention/{'mask' if masked else 'causal'}/{kernels}"
            with cudnn_allowed(allowed):
                child.measured(key, lambda masked=masked: attention(child, masked))
    cases = [Case("perce", tokens) for tokens in LENGTHS[device]]
    with tempfile.TemporaryDirectory() as directory:
        steps = child.prepared(f"{name}/model", lambda: Steps(device, directory, tuple(cases)))
        if steps is None:
            return
        steps.prepare(cases[0])
        # First without cuDNN's: what else a first step costs is in these.
        for kernels, allowed in reversed(KERNELS.items()):
            with cudnn_allowed(allowed):
                child.measured(f"{name}/steps/{kernels}", lambda: of_steps(child, steps, cases))


def prepare() -> None:
    """Slow imports."""
    with suppress(ImportError):  # a missing one is reported when it is needed
        import perce.training.trainer  # noqa: F401


if __name__ == "__main__":
    children.main(stage, __doc__, prepare)
