"""Fixtures of the op's tests, hypothesis profiles, and Triton's interpreter if there is no GPU."""

import gc
import os

import pytest
import torch
from hypothesis import settings

# Set before anything imports Triton or perce_kernels, which both read it once. torch itself does not import Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("PERCE_BACKEND", None)  # a developer's own setting must not change what is tested

from perce_kernels import backends, chunked, reference, row_pass
from tests.helpers.interpreter import patch_the_language_once

patch_the_language_once()
settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available()


def pytest_runtest_setup(item):
    """Ends a process whose device died: it would take all remaining tests and fail them quickly."""
    if ONE_OF_SEVERAL:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(3)  # another process replaces it


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What the file before has left, imported modules above all, is not searched for garbage again: accelerate collects
    whenever a training begins, which otherwise takes longer than the training of a tiny model. Nor is it ever freed."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or extension modules complain of what is still there at exit


@pytest.fixture(autouse=True)
def room_on_the_gpu(request):
    """With several processes on one GPU, makes cases that fill its memory wait for each other."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if not ONE_OF_SEVERAL or not hasattr(case, "is_tiny") or case.is_tiny:
        yield
        return
    from tests.helpers.device import room

    head = 40 * case.v * case.d  # the head's fp64 gradient, the gradient compared with it, and their difference
    with room(head, torch.cuda.get_device_properties(0).total_memory):
        yield


@pytest.fixture(scope="module")
def poisoned_memory():
    """Make `empty` return NaN, so that reading memory before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")
def small_chunks():
    """Budgets so small that the usual test inputs (N = 37, V = 211) take several chunks and blocks of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "LOGITS_BYTES", 1)  # chunk_rows' minimum: 16
        patch.setattr(row_pass, "ROW_BLOCK_BYTES", 5 * 211 * 4)
        yield


@pytest.fixture(scope="module")
def interpreter_rounds():
    """Make Triton's interpreter round as GPUs do: it truncates fp32 to bf16 and, before 3.9, rounds fma twice."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, destination, mode):
        if (source, destination) != (tl.float32, tl.bfloat16):
            return convert(values, source, destination, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
        yield


@pytest.fixture
def ran(monkeypatch):
    """The backends that computed something, in order."""
    modules = {"torch": chunked, "reference": reference}
    if backends.TRITON_FOUND:
        from perce_kernels.gpu import driver

        modules["triton"] = driver
    names = []
    for backend, module in modules.items():
        for function in {"sweep", "logprobs"} & vars(module).keys():
            run = getattr(module, function)

            def spy(*args, run=run, backend=backend, **options):
                names.append(backend)
                return run(*args, **options)

            monkeypatch.setattr(module, function, spy)
    return names
