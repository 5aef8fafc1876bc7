"""Our kernels under NVIDIA's compute-sanitizer: memcheck (accesses out of bounds) and racecheck (shared memory).

It checks every way of the loss and token_logprobs, forward and backward, and both kernels of a sharded vocabulary, at
sizes that end inside a tile. PyTorch's caching allocator is off, because its blocks are larger than requested.
`python -m benchmarks.gpu.sanitizer` runs the calls without the sanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, Unable, die_with_parent
from benchmarks.gpu.peers import WAY_PEERS

TOOLS = {"memcheck": "ERROR SUMMARY: ", "racecheck": "RACECHECK SUMMARY: "}
"""The beginning of the last line that a tool prints."""
PROBLEM = r"^=+ (?:Error: )?(?:Invalid|Misaligned|Race reported|Uninitialized|Program hit).*$"
CUBLAS = "nvjet"  # cuBLAS kernels, whose use of shared memory for split sums racecheck reports as a race
SIZES = {"cuda": (150, 72, 9000), "cpu": (5, 16, 150)}  # tokens, hidden size, vocabulary
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def calls(device: str) -> int:
    """Runs all calls; returns their number."""
    from benchmarks.implementations import make_inputs, step
    from perce_kernels import fused_perce_loss, token_logprobs
    from perce_kernels.gpu import row_halves

    count = 0
    for dtype in DTYPES:
        inputs = make_inputs(*SIZES[device], dtype, device)
        hidden, lm_head, target, hidden_cf = inputs
        bias = torch.zeros(len(lm_head), dtype=dtype, device=device, requires_grad=True)
        options: dict[str, Any] = {"softcap": 20.0, "bias": bias, "backend": "triton"}
        target[::7] = -100
        for peer in WAY_PEERS.values():
            loss = peer.load().loss
            step(loss, inputs)
            loss(hidden, lm_head, target, hidden_cf, bias=bias, softcap=20.0, contrast="ratio").backward()
            count += 2
        fused_perce_loss(hidden, lm_head, target, hidden_cf, compact=False, **options).backward()
        logp, entropy = token_logprobs(hidden, lm_head, target, return_entropy=True, **options)
        logp.sum().backward()
        z = hidden.detach().float() @ lm_head.detach().float().T
        row_max, total, z_target = (torch.zeros_like(z[:, 0]) for _ in range(3))
        row_halves.row_parts(z, target, bias.detach(), row_max, total, z_target, v=len(lm_head), softcap=20.0)
        statistics = row_max, total, z_target - row_max - total.log(), torch.ones_like(total)
        dz = torch.empty_like(z, dtype=dtype)
        row_halves.row_gradient(z, target.clamp(min=-1), *statistics, bias.detach(), None, dz, softcap=20.0)
        assert entropy.isfinite().all() and dz.isfinite().all()
        count += 4
    if device == "cuda":
        torch.cuda.synchronize()
    return count


def checked(tool: str, seconds: float) -> dict[str, Any]:
    """What the tool reports for `calls`."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Unable("compute-sanitizer is not installed")
    started = time.monotonic()
    try:
        run = subprocess.run(
            [program, "--tool", tool, sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.sanitizer"],
            capture_output=True, text=True, timeout=seconds, preexec_fn=die_with_parent,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Unable(f"it took more than {seconds:.0f} s") from error
    print(run.stdout[-20000:], run.stderr[-5000:], file=sys.stderr)
    made = re.search(r"^(\d+) calls$", run.stdout, re.M)
    if TOOLS[tool] not in run.stdout or made is None:
        raise Unable(f"the calls ended with {run.returncode}: {(run.stderr or run.stdout).strip()[-200:]}")
    return {"calls": int(made[1]), "seconds": round(time.monotonic() - started, 1), **problems(run.stdout)}


def problems(text: str) -> dict[str, Any]:
    """The number of problems and the first of them, without those in cuBLAS's kernels."""
    blocks = [re.split(r"^=+\s*$", text[found.start() :], maxsplit=1, flags=re.M)[0]
              for found in re.finditer(PROBLEM, text, re.M)]  # fmt: skip
    ours = [block for block in blocks if CUBLAS not in block]
    return {"problems": len(ours), "first": ours[0][:500] if ours else None}


def stage(child: Child) -> None:
    """Runs the tool that the stage is named after."""
    name = child.request.stage
    child.measured(f"{name}/all kernels", lambda: checked(name, child.until - time.monotonic()))


if __name__ == "__main__":
    if children.is_asked():
        children.main(stage, __doc__)
    else:
        print(f"{calls('cuda' if torch.cuda.is_available() else 'cpu')} calls")
