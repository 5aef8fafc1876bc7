"""All kernels in the interpreter access no memory out of bounds and in no race; and either would be found.

The kernels' own tests, with other tiles, lengths and strides, are checked too: `memory_is_checked` in conftest.py.
"""

import re

import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.device import ON_GPU
from tests.helpers.memory_check import checked_memory

pytest.importorskip("triton")
import triton
import triton.language as tl

from benchmarks.gpu import sanitizer

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="kernels run without the interpreter; benchmarks/gpu has the sanitizer"),
    pytest.mark.filterwarnings("ignore:.* encountered in"),  # numpy, of rows that are ignored
]


@triton.jit
def copy_kernel(x_ptr, out_ptr, size, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at + shift, mask=at < size, other=0.0), mask=at < size)


@triton.jit
def one_element_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def twice_kernel(out_ptr, BARRIER: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 8), tl.zeros([8], tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + 3, 1.0)


@triton.jit
def atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def problems(launch, *args, **constants):
    with checked_memory() as check:
        launch(*args, **constants)
    assert check.launches.total() == 1 and check.accesses > 0
    return check.problems


def test_a_kernel_without_a_fault_computes_what_it_does_without_the_check():
    x, out = torch.randn(9), torch.empty(9)
    assert problems(copy_kernel[(2,)], x, out, 9, 0, BLOCK=8) == [] and torch.equal(x, out)


@pytest.mark.parametrize(("shift", "program", "count", "byte"), [(1, 1, 1, 36), (-2, 0, 2, -8)])
def test_loads_beyond_either_end_are_found(shift, program, count, byte):
    (problem,) = problems(copy_kernel[(2,)], torch.zeros(9), torch.zeros(9), 9, shift, BLOCK=8)
    where = f"out of bounds, the first at byte {byte} of a tensor of 36"
    assert problem == f"copy_kernel: load by program {program} of {count} elements {where}"


def test_a_store_into_what_follows_a_view_is_found_and_left_out():
    out = torch.full((3, 4), 7.0)
    (problem,) = problems(copy_kernel[(1,)], torch.zeros(9), out[1], 6, 0, BLOCK=8)
    assert problem.endswith("store by program 0 of 2 elements out of bounds, the first at byte 16 of a tensor of 16")
    assert out.tolist() == [[7.0] * 4, [0.0] * 4, [7.0] * 4]


def test_programs_that_write_one_element_race():
    assert problems(one_element_kernel[(2,)], torch.zeros(1)) == [
        "one_element_kernel: store by program 0 races with store by program 1"
    ]


def test_a_load_of_what_another_program_writes_races():
    x = torch.zeros(17)
    found = problems(copy_kernel[(2,)], x, x, 16, 1, BLOCK=8)
    assert "copy_kernel: load by program 0 races with store by program 1" in found
    assert problems(copy_kernel[(2,)], x, x, 16, 0, BLOCK=8) == []  # each element is read and written by one thread


def test_stores_of_a_program_need_a_barrier_between_them():
    assert problems(twice_kernel[(1,)], torch.zeros(8), BARRIER=True) == []
    (problem,) = problems(twice_kernel[(1,)], torch.zeros(8), BARRIER=False)
    assert problem == "twice_kernel: store by program 0 races with store by program 0"


def test_kernels_with_atomics_are_refused():
    with checked_memory(), pytest.raises(Exception, match="what atomics order is not known here"):
        atomic_kernel[(2,)](torch.zeros(1))


def test_no_kernel_accesses_memory_out_of_bounds_or_in_a_race():
    with checked_memory() as check:
        assert sanitizer.calls("cpu") == 3 * 8
    assert check.problems == []
    files = (ROOT / "perce_kernels/gpu").glob("*.py")
    assert {*check.launches} == {name for file in files for name in re.findall(r"def (\w+_kernel)\(", file.read_text())}


def test_without_their_barriers_the_gradient_kernels_race(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    with checked_memory() as check:
        monkeypatch.setattr(InterpreterBuilder, "create_barrier", lambda *_: None)
        sanitizer.calls("cpu")
    kernels = {problem.split(":")[0] for problem in check.problems}
    assert kernels == {"row_loss_kernel", "row_gradient_kernel", "stored_gradient_kernel"}
