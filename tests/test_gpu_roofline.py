"""The model of cost: its operations and bytes are counted in the driver's products and kernels; its known times."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import DEVICE
from tests.numerics import beneath, make_inputs

pytest.importorskip("triton")
from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import H100, H200, Gpu, Work, predict, work
from benchmarks.gpu.sizes import SIZES, Size
from perce_kernels import ops
from perce_kernels.gpu import driver, row_loss, stored_rows, tiles
from tests.driver import CHUNK, watching  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("interpreter_rounds")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks into Triton's interpreter, or at the CPU's operators")
SIZE = Size(8, 16, 1024)  # V is a multiple of the pitch: no bytes between the rows
NEEDED = {"trainable": (True, True, False), "frozen": (True, False, False)}


@pytest.fixture
def use(monkeypatch):
    """Switches the op to one of its ways, in several chunks."""
    monkeypatch.setattr(driver, "chunk_rows", lambda *_: CHUNK)

    def switch(way: str) -> None:
        monkeypatch.setattr(tiles, "TABLE", [row._replace(in_use=way == "stored") for row in tiles.TABLE])

    return switch


INPUTS = make_inputs(*SIZE, torch.bfloat16, ignored=0.0)


def run(head: str) -> None:
    driver.fused_perce_loss(*beneath(INPUTS, needed=NEEDED[head], compact=False))


def part_of(m: int, k: int, n: int) -> str:
    return {(SIZE.d, SIZE.v): "logits", (SIZE.v, SIZE.d): "dh"}.get((k, n), "dW")


@on_cpu
@pytest.mark.parametrize("head", roofline.HEADS)
@pytest.mark.parametrize("way", roofline.WAYS)
def test_products_are_those_beneath_the_op(watch, use, way, head):
    """Factors are bf16 there; here they are upcast, so that bytes come from the counted shapes."""
    use(way)
    with watch:
        run(head)
    counted: dict[str, Work] = {}
    for m, k, n, added in watch.products:
        before = counted.get(part := part_of(m, k, n), Work(0, 0))
        moved = (m * k + k * n) * 2 + m * n * 4 * (1 + added)
        counted[part] = Work(before.flop + 2 * m * k * n, before.bytes + moved)
    expected = work(SIZE, way, head, CHUNK)
    products = {name: expected[name] for name in roofline.PRODUCTS if name in expected}
    if way == "stored":
        assert watch.gemm_flop == products.pop("logits").flop, "our own GEMM, whose time is not made of bytes"
    assert counted == products
    assert sum(part.flop for part in expected.values()) == roofline.FLOOR_FLOP[head] * SIZE.n * SIZE.d * SIZE.v


@on_cpu
@pytest.mark.parametrize("way", roofline.WAYS)
def test_bytes_of_the_rows_are_those_that_the_kernels_load_and_store(monkeypatch, use, way):
    from triton.runtime.interpreter import InterpreterBuilder

    moved, counting = [0], [False]

    def counted(access):
        def count(self, pointers, *others):
            mask = others[1] if access.__name__ == "create_masked_store" else others[0]
            moved[0] += counting[0] * int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return access(self, pointers, *others)

        return count

    def counting_while(launch):
        def launched(*args, **options):
            counting[0] = True
            launch(*args, **options)
            counting[0] = False

        return launched

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, counted(getattr(InterpreterBuilder, name)))
    monkeypatch.setattr(row_loss, "row_loss", counting_while(row_loss.row_loss))
    monkeypatch.setattr(stored_rows, "stored_gradient", counting_while(stored_rows.stored_gradient))
    use(way)
    run("trainable")
    columns = tiles.find("store_gemm", tiles.INTERPRETER, torch.bfloat16, SIZE.d).block_n
    expected = work(SIZE, way, "trainable", CHUNK, stored_tile=columns)["rows"].bytes
    tokens = 60 * SIZE.n  # target, statistics and weight of each: at most so many bytes
    assert expected < moved[0] <= expected + tokens


class Scaled(TorchDispatchMode):
    """Bytes that multiplications read and write."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "mul":
            self.bytes += args[0].numel() * (args[0].itemsize + kwargs["out"].itemsize)
        return func(*args, **kwargs or {})


@on_cpu
@pytest.mark.parametrize("head", roofline.HEADS)
def test_bytes_of_the_scaling_are_those_of_the_backward(head):
    hidden, lm_head = (x.clone().requires_grad_() for x in (INPUTS.hidden, INPUTS.lm_head))
    loss = ops.fused_perce_loss(
        hidden, lm_head.requires_grad_(head == "trainable"), INPUTS.target, INPUTS.hidden_cf, None, None, None, 0.8,
        5.0, "log", -100, None, 1.0, True, *NEEDED[head],
    )[0]  # fmt: skip
    with Scaled() as scaled:
        loss.backward()
    assert scaled.bytes == work(SIZE, "fused", head, CHUNK)["scaling"].bytes


PLANNED = {  # N·D·V by hand: milliseconds of both ways on an H100, of fp32 logits on an H200
    SIZES[0]: (28.5, 30.4, 27.3),
    SIZES[1]: (45.1, 45.9, 42.7),
    SIZES[2]: (147, 147, 137),
    SIZES[3]: (416, 462, 407),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_predictions_are_those_made_by_hand(size):
    ours = [
        1000 * sum(seconds.values()) for seconds in (predict(size), predict(size, "stored"), predict(size, gpu=H200))
    ]
    assert ours == pytest.approx(PLANNED[size], rel=0.03)


def test_predictions_for_a_faster_gemm_and_larger_chunks():
    gpu = Gpu(gemm=0.93, combine=3e-5)
    ours = [1000 * sum(predict(size, "stored", gpu=gpu, budget=2**33).values()) for size in SIZES]
    assert ours == pytest.approx([25.6, 38.2, 118, 385], rel=0.03)


def test_parts_of_the_first_size():
    parts = {name: 1000 * seconds for name, seconds in predict(SIZES[0]).items()}
    assert parts == pytest.approx({"logits": 12.0, "rows": 2.8, "dh": 5.9, "dW": 6.7, "scaling": 1.2}, rel=0.03)


@pytest.mark.parametrize("head", roofline.HEADS)
def test_at_the_break_even_both_ways_take_as_long(head):
    for size in SIZES:
        rate = roofline.break_even(size, head, H100)
        stored = predict(size, "stored", head, Gpu(gemm=rate / H100.flops))
        assert sum(stored.values()) == pytest.approx(sum(predict(size, "fused", head).values()))


def test_the_command_prints_every_way_at_every_size(capsys):
    roofline.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(SIZES) * len(roofline.HEADS) * len(roofline.WAYS)
    first = "| 4096 × 4096 × 128256 | trainable | fp32 logits by cuBLAS | 2048"
    assert f"{first} | 12.0 | 2.8 | 5.9 | 6.7 | 1.2 | 28.5 | 1.32 |" in lines


def test_each_option_changes_the_prediction(capsys):
    printed = set()
    for options in ([], ["--tflops", "500"], ["--bandwidth", "4e12"], ["--rows", "0.5"], ["--gemm", "0.9"],
                    ["--combine", "0"], ["--budget", "8"]):  # fmt: skip
        roofline.main(options)
        printed.add(capsys.readouterr().out)
    assert len(printed) == 7
    with pytest.raises(SystemExit):
        roofline.main(["--tflops", "0"])
    assert "--tflops: expected a number > 0, got 0.0" in capsys.readouterr().err
