"""Compiles all kernels that the other stages launch, in parallel processes, into Triton's cache on disk.

These are each kernel at each named tile, and the whole op by each way. The inputs are so small that running them costs
nothing. They have the same divisibility by 16 as the real ones, by which Triton specialises kernels.

`python -m benchmarks.gpu.compile [--jobs N]` without a GPU compiles the same for sm_90 ahead of time, from an empty
cache, and prints what each costs, to predict the time of this stage on a GPU.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, die_with_parent
from benchmarks.gpu.peers import WAY_PEERS, find_peer
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.tiles import FP32_ROWS, SUBJECTS, TABLED, candidates, named, shipping

SHAPES = (Size(256, 256, 2064), Size(256, 256, 4096))
"""The number of tiles per row is not a multiple of 16, as with 128256 and 151936 entries, or is one, as with 262144."""
TINY_SHAPES = (Size(12, 16, 61),)
WORKERS = 12


def jobs(arch: str, shapes: tuple[Size, ...]) -> list[tuple[str, str, Size]]:
    """(kernel or way, tile's name or "", size)."""
    found = [(peer.name, "", size) for size in shapes for peer in WAY_PEERS.values()]
    for kernel in SUBJECTS:
        found += [(kernel, named(tile), shapes[0]) for tile in candidates(kernel, arch, torch.bfloat16)]
    return found


def compile_one(job: tuple[str, str, Size], arch: str, device: str) -> float:
    """Compiles one job in this process; the seconds that it took."""
    from benchmarks.implementations import make_inputs, step
    from perce_kernels import token_logprobs

    name, tile_name, size = job
    started = time.perf_counter()
    if not tile_name:
        inputs, implementation = make_inputs(*size, torch.bfloat16, device), find_peer(name).load()
        step(implementation.loss, inputs)
        with torch.no_grad():
            implementation.pir(*inputs)
        for return_entropy in (False, True):
            token_logprobs(*inputs[:3], backend="triton", return_entropy=return_entropy)
    else:
        tile = next(tile for tile in candidates(name, arch, torch.bfloat16) if named(tile) == tile_name)
        subject = SUBJECTS[name](*size, torch.bfloat16, device)
        if subject.setup is not None:
            subject.setup()
        with shipping(TABLED.get(name, name), arch, torch.float32 if name in FP32_ROWS else torch.bfloat16, tile):
            subject.run()
    return time.perf_counter() - started


def compile_all(child: Child) -> None:
    """Prints a line for each job as soon as it is done."""
    from perce_kernels.gpu import tiles

    device = child.request.device
    arch = tiles.architecture(torch.device(device))
    on_gpu = device == "cuda"
    workers = min(WORKERS, os.cpu_count() or 1)
    pending = jobs(arch, SHAPES if on_gpu else TINY_SHAPES)
    for _ in range(2):  # a compiler that crashes ends its pool: the remaining jobs get another one
        with ProcessPoolExecutor(workers, get_context("spawn"), _only_compile, (on_gpu,)) as pool:
            tasks = {pool.submit(compile_one, job, arch, device): job for job in pending}
            pending = []
            for task in as_completed(tasks):
                if isinstance(task.exception(), BrokenProcessPool):
                    pending.append(tasks[task])
                name, tile, size = tasks[task]
                key = f"{child.request.stage}/{name}/{tile or 'op'}/{size}"
                child.line(key, **child.attempt(lambda task=task: {"seconds": task.result()}))


def _only_compile(on_gpu: bool) -> None:
    """Makes launchers compile without launching, because a kernel that faults would end its process."""
    die_with_parent()
    if on_gpu:
        from tests.helpers.aot import compile_only

        compile_only(load=True)


def ahead(arch: str, workers: int) -> None:
    """Compiles all jobs for a GPU that this machine does not have."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ.pop("TRITON_INTERPRET", None)
        started, total, failed = time.perf_counter(), 0.0, 0
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_pretend, initargs=(arch,)
        ) as pool:
            tasks = {pool.submit(compile_one, job, arch, "cpu"): job for job in jobs(arch, SHAPES)}
            for task in as_completed(tasks):
                name, tile, size = tasks[task]
                try:
                    seconds = task.result()
                except Exception as error:  # raised by the compiler
                    failed += 1
                    print(
                        f"{name} {tile} {size}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                        flush=True,
                    )
                    continue
                total += seconds
                print(f"{name} {tile} {size}: {seconds:.1f} s", flush=True)
    print(f"{len(tasks)} jobs, {failed} failed: {total:.0f} s of one core, {total / WORKERS:.0f} s of {WORKERS} cores; "
          f"{time.perf_counter() - started:.0f} s here, on {workers}")  # fmt: skip


def _pretend(arch: str) -> None:
    from perce_kernels import backends
    from tests.helpers.aot import without_device

    backends.BACKENDS["triton"] = backends.Backend(backends.BACKENDS["triton"].module)
    without_device(arch)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args(arguments)
    ahead(options.arch, options.jobs)


if __name__ == "__main__":
    if children.is_asked():
        children.main(compile_all, __doc__)
    else:
        main(sys.argv[1:])
