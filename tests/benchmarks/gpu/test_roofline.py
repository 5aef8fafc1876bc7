"""The model of cost: its operations and bytes are counted in the driver's products and kernels; its known times."""

import heapq
import json
import random
from collections import OrderedDict
from functools import partial, partialmethod
from statistics import median

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import ROOT
from tests.helpers.device import DEVICE
from tests.helpers.numerics import beneath, make_inputs

pytest.importorskip("triton")
from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import H100, H200, Gpu, Work, measured_gpu, predict, work
from benchmarks.gpu.sizes import SIZES, Size
from perce_kernels import ops
from perce_kernels.gpu import driver, lse_gemm, row_loss, steps, stored_rows, tiles
from perce_kernels.gpu.cut import Cut
from tests.helpers.driver import watching  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("interpreter_rounds")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks into Triton's interpreter, or at the CPU's operators")
SIZE = Size(9, 16, 1024)  # V is a multiple of the pitch and of every step: no bytes between the rows
CUT = Cut(4, 2)
NEEDED = {"trainable": (True, True, False), "frozen": (True, False, False)}


@pytest.fixture
def use(monkeypatch):
    """Switches the op to one of its ways, in several blocks and chunks."""
    monkeypatch.setattr(driver, "cut_of", lambda *_: CUT)
    return lambda way: monkeypatch.setitem(tiles.WAY, tiles.architecture(DEVICE), way)


INPUTS = make_inputs(*SIZE, torch.bfloat16, ignored=0.0)


def run(head: str) -> None:
    driver.sweep(*beneath(INPUTS, needed=NEEDED[head], compact=True))


@on_cpu
@pytest.mark.parametrize(
    ("way", "head"),
    [("fused", "trainable"), ("stored", "frozen")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("fused", "frozen"), ("stored", "trainable"))],
)
def test_products_are_those_beneath_the_op(monkeypatch, watch, use, way, head):
    """Factors are bf16 there; here they are upcast, so that bytes come from the counted shapes."""
    use(way)
    counterfactual: list[bool] = []  # for each product

    def told(kind, self, *args):
        counterfactual.extend([False] * (len(watch.products) - len(counterfactual)))
        result = kind(self, *args)
        counterfactual.extend([True] * (len(watch.products) - len(counterfactual)))
        return result

    for kind in (steps.FusedRows, steps.StoredLogits):
        monkeypatch.setattr(kind, "counterfactual", partialmethod(partial(told, kind.counterfactual)))
    with watch:
        run(head)
    counterfactual += [False] * (len(watch.products) - len(counterfactual))
    counted: dict[str, Work] = {}
    for (m, k, n, added), is_cf in zip(watch.products, counterfactual, strict=True):
        part = "counterfactual" if is_cf else {SIZE.d: "logits", SIZE.v: "dh"}.get(k, "dW")
        before = counted.get(part, Work(0, 0))
        moved = (m * k + k * n) * 2 + m * n * 4 * (1 + added)
        counted[part] = Work(before.flop + 2 * m * k * n, before.bytes + moved)
    expected = work(SIZE, way, head, CUT)
    ours = [expected.pop(name) for name in roofline.OURS[way]]
    assert watch.gemm_flop == sum(part.flop for part in ours), "our own GEMM, whose time is not made of bytes"
    assert counted == {name: part for name, part in expected.items() if name in roofline.PRODUCTS}
    flop = sum(part.flop for part in (*ours, *expected.values()))
    assert flop == roofline.FLOOR_FLOP[head] * SIZE.n * SIZE.d * SIZE.v


class Accesses:
    """What kernels load and store in the interpreter, while they are listened to: (is a store, its mask, pointers)."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.found: list[tuple[bool, object, object]] = []
        self.listening = False
        for name in ("create_masked_load", "create_masked_store", "create_load", "create_store"):
            access = getattr(InterpreterBuilder, name)
            monkeypatch.setattr(InterpreterBuilder, name, self.heard(access, "store" in name, "masked" in name))

    def heard(self, access, is_store: bool, masked: bool):
        def hear(builder, pointers, *others):
            if self.listening:
                self.listening = False  # one kind may be made of the other
                mask = others[is_store].data if masked else True
                self.found.append((is_store, mask, pointers))
                try:
                    return access(builder, pointers, *others)
                finally:
                    self.listening = True
            return access(builder, pointers, *others)

        return hear

    def during(self, launch):
        def launched(*args, **options):
            self.listening = True
            try:
                return launch(*args, **options)
            finally:
                self.listening = False

        return launched

    @staticmethod
    def addresses(mask, pointers) -> list[int]:
        import numpy as np

        return np.broadcast_to(pointers.data, pointers.data.shape)[np.broadcast_to(mask, pointers.data.shape)].tolist()

    @staticmethod
    def element_bytes(pointers) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8


@on_cpu
@pytest.mark.parametrize("way", tiles.WAYS)
def test_bytes_of_the_rows_are_those_that_the_kernels_load_and_store(monkeypatch, use, way):
    from perce_kernels.gpu import blocked

    accesses = Accesses(monkeypatch)
    for module, name in ((row_loss, "row_loss"), (blocked, "row_parts"), (stored_rows, "stored_gradient"),
                         (lse_gemm, "combine")):  # fmt: skip
        monkeypatch.setattr(module, name, accesses.during(getattr(module, name)))
    use(way)
    run("trainable")
    moved = sum(len(accesses.addresses(mask, pointers)) * accesses.element_bytes(pointers)
                for _, mask, pointers in accesses.found)  # fmt: skip
    expected = work(SIZE, way, "trainable", CUT)["rows"].bytes
    tokens = 80 * SIZE.n  # target, statistics and weight of each: at most so many bytes
    assert expected < moved <= expected + tokens


@on_cpu
def test_the_cache_keeps_at_least_what_the_prediction_says(monkeypatch):
    """One program's loads of its logits, in their order, by many programs at once, each as far as it happens to be.

    A cache in which the least recently used goes first, but before it what was marked as done with: the second read,
    and the gradient. Once as if what the cache has took no time, and once half as long as memory.
    """
    accesses, (rows, v) = Accesses(monkeypatch), (1, 4096)
    z, dz = torch.randn(rows, v), torch.empty(rows, v, dtype=torch.bfloat16)
    statistics = [torch.empty(rows) for _ in range(3)]
    given = torch.zeros(rows)
    accesses.during(row_loss.row_loss)(
        z, torch.zeros(rows, dtype=torch.int64), given, None, None, dz, *statistics, v=v, source="logp_cf"
    )
    order = []
    for is_store, mask, pointers in accesses.found:
        found = accesses.addresses(mask, pointers)
        if not is_store and len(found) > 1:
            order.append((min(found) - z.data_ptr()) // 4)
    assert order == [*range(0, v, 128), *range(v - 256, -1, -256)], "to the end, and back"
    steps_of_row = v // 256
    for v_real in (128256, 262144):
        for hit in (0.0, 0.5):
            kept = H100.kept(v_real)
            lines = int(H100.l2 / (v_real * 4 / steps_of_row))
            share = cached_share(steps_of_row, H100.rows_in_flight * H100.multiprocessors, lines, hit)
            assert kept <= share <= 2.2 * kept, (v_real, hit, kept, share)
    assert Gpu(l2=0).kept(128256) == 0 and Gpu(l2=1e12).kept(128256) == 1


def cached_share(steps: int, programs: int, lines: int, hit: float) -> float:
    """Of the second reads, by programs that read rows of so many steps to the end and back."""
    chance = random.Random(0)
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    turns = [(chance.random() * 2 * steps, row, row, 0) for row in range(programs)]
    heapq.heapify(turns)
    following, found, asked = programs, 0, 0
    while turns:
        time, program, row, step = heapq.heappop(turns)
        if step < steps:
            cache[row, step] = None
            if len(cache) > lines:
                cache.popitem(last=False)
            cost = 1.0
        else:
            here = (row, 2 * steps - 1 - step) in cache
            cache.pop((row, 2 * steps - 1 - step), None)
            if row >= programs:  # the first rows begin where they happen to be
                found, asked = found + here, asked + 1
            cost = (hit if here else 1.0) + 0.5  # and half as much is written
        step += 1
        if step == 2 * steps:
            row, step, following = following, 0, following + 1
            if row >= 4 * programs:
                continue
        heapq.heappush(turns, (time + cost, program, row, step))
    return found / asked


class Scaled(TorchDispatchMode):
    """Bytes that the scaling of gradients reads and writes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.perce.scaled.default:
            gradient, _, dtype, _ = args
            self.bytes += gradient.numel() * (gradient.itemsize + dtype.itemsize)
        return func(*args, **kwargs or {})


@on_cpu
@pytest.mark.parametrize("head", roofline.HEADS)
def test_bytes_of_the_scaling_are_those_of_the_backward(head):
    hidden, lm_head = (x.clone().requires_grad_() for x in (INPUTS.hidden, INPUTS.lm_head))
    loss = ops.loss_op(
        hidden, lm_head.requires_grad_(head == "trainable"), INPUTS.target, INPUTS.hidden_cf, None, None, None, 0.8,
        5.0, "log", -100, None, 1.0, True, *NEEDED[head],
    )[0]  # fmt: skip
    with Scaled() as scaled:
        loss.backward()
    assert scaled.bytes == work(SIZE, "fused", head, CUT)["scaling"].bytes


def measured(name):
    return json.loads((ROOT / f"benchmarks/results/gpu/{name}.json").read_text(encoding="utf-8"))["lines"]


MEASURED = measured("h100_tuned")


@pytest.mark.parametrize("way", tiles.WAYS)
@pytest.mark.parametrize("head", roofline.HEADS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_prediction_is_near_what_an_h100_took(size, head, way):
    """At the rates that it is made with: those of the same minute differ by 5 %, as the GPU's clock does."""
    rounds = MEASURED[f"ways/{head}/{size}/race"]["rounds"]
    seconds = [found[f"perce_{way}"] for found in rounds if f"perce_{way}" in found]
    if not seconds:
        pytest.skip("not measured")
    assert sum(predict(size, way, head).values()) == pytest.approx(median(seconds), rel=0.1)


@pytest.mark.parametrize("name", ["h200_peers", "h200_peers_pytorch"])
def test_the_prediction_is_near_what_an_h200_took(name):
    """At the rates of the same rounds; its other guesses are those of an H100, and one of 15 is 11 % off."""
    for key, race in measured(name).items():
        if key.endswith("/race") and any("perce" in seconds for seconds in race["rounds"]):
            _, head, size, _ = key.split("/")
            gpu = measured_gpu(race["matmul_flops"], race["bandwidth"], "NVIDIA H200")
            took = median(seconds["perce"] for seconds in race["rounds"] if "perce" in seconds)
            assert sum(predict(Size.parse(size), "stored", head, gpu).values()) == pytest.approx(took, rel=0.12), key


def test_more_bandwidth_is_less_time():
    for size in SIZES:
        assert sum(predict(size, gpu=H200).values()) < sum(predict(size).values())


def test_parts_of_the_first_size():
    """By hand: cuBLAS's products at their shares of 740 TFLOP/s, 3 TB/s for the rest."""
    parts = {name: 1000 * seconds for name, seconds in predict(SIZES[0], gpu=Gpu(l2=0)).items()}
    by_hand = {"counterfactual": 6.1, "logits": 6.2, "rows": 2.7, "dh": 5.8, "dW": 6.3, "scaling": 1.2}
    assert parts == pytest.approx(by_hand, rel=0.02)
    stored = {name: 1000 * seconds for name, seconds in predict(SIZES[0], "stored").items()}
    assert stored == pytest.approx(by_hand | {"counterfactual": 6.0, "logits": 6.0, "rows": 0.8}, rel=0.04)


@pytest.mark.parametrize("head", roofline.HEADS)
def test_at_the_break_even_both_ways_take_as_long(head):
    for size in SIZES:
        rate = roofline.break_even(size, "stored", head, H100)
        other = predict(size, "stored", head, Gpu(gemm=rate / H100.flops))
        assert sum(other.values()) == pytest.approx(sum(predict(size, "fused", head).values()))


def test_the_command_prints_every_way_at_every_size(capsys):
    roofline.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(SIZES) * len(roofline.HEADS) * len(roofline.WAYS)
    first = "| 4096 × 4096 × 128256 | trainable | fused | 4096, 2048"
    assert f"{first} | 6.1 | 6.2 | 2.4 | 5.8 | 6.3 | 1.2 | 28.0 | 1.20 |" in lines


def test_each_option_changes_the_prediction(capsys):
    printed = set()
    for options in ([], ["--tflops", "500"], ["--bandwidth", "4e12"], ["--rows", "0.5"], ["--gemm", "0.9"],
                    ["--l2", "0"], ["--budget", "8"]):  # fmt: skip
        roofline.main(options)
        printed.add(capsys.readouterr().out)
    assert len(printed) == 7
    with pytest.raises(SystemExit):
        roofline.main(["--tflops", "0"])
    assert "--tflops: expected a number > 0, got 0.0" in capsys.readouterr().err
