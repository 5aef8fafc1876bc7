"""Measuring one size of the GPU benchmarks, on a CPU at tiny sizes: what fails is recorded, what is right is timed."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import implementations
from benchmarks.gpu import clock, measure, peers, run
from benchmarks.gpu.measure import HEADS, Job
from benchmarks.gpu.peers import PEERS, Implementation, Peer, Unable, composed

pytest.importorskip("triton")
from perce_kernels.gpu import driver

TINY = {"device": "cpu", "dtype": "float32", "probe": 16, "rounds": 2}


def job(*names: str, **options) -> Job:
    return Job(12, 8, 61, peers=list(names), **TINY | options)


def naive_nll(hidden, lm_head, target):
    return torch.nn.functional.cross_entropy(hidden @ lm_head.T, target, reduction="none")


def raises(error: BaseException):
    def load() -> Implementation:
        raise error

    return load


def scaled_by_the_first(hidden, lm_head, target):
    """A known fault: the right losses, all gradients scaled by the first token's upstream gradient."""
    nll = naive_nll(hidden, lm_head, target)
    return (nll.sum() - nll.sum().detach()) / len(nll) + nll.detach()


FAKES = {
    "right": lambda: composed(naive_nll),
    "no pir": lambda: Implementation(implementations.naive),
    "absent": raises(Unable("it is not installed")),
    "broken": raises(RuntimeError("an assertion\n  in the library")),
    "greedy": raises(torch.OutOfMemoryError("CUDA out of memory")),
    "wrong gradients": lambda: composed(scaled_by_the_first),
    "NaN": lambda: composed(lambda *x: naive_nll(*x) * torch.nan),
}


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(measure, "PEERS", {name: Peer(name, name, load) for name, load in FAKES.items()})
    monkeypatch.setattr(clock.HostClock, "free", lambda _: None)  # a garbage collection for every peer


def all_of(job: Job) -> run.SizeResult:
    """The events of a job in this process, collected as run.py does."""
    size = run.SizeResult(job)
    for event in measure.events(job, clock.HostClock()):
        if event["event"] not in ("machine", "begin", "head_done", "done"):
            size.take(event)
    return size


def test_a_peer_that_fails_is_recorded_and_the_others_are_measured(fakes):
    entry = all_of(job(*FAKES, extras=False)).entry
    for head in HEADS:
        found = entry["heads"][head]["peers"]
        assert found["absent"]["reason"] == "it is not installed"
        assert found["broken"]["reason"] == "RuntimeError: an assertion in the library"
        assert found["greedy"]["reason"] == "out of memory"
        assert found["wrong gradients"]["reason"].startswith("wrong result: dhidden off by")
        assert found["NaN"]["reason"].startswith("wrong result: loss off by nan")
        for name in ("right", "no pir"):
            assert found[name]["seconds"] > 0 and found[name]["rounds"] == 2
            assert ("pir" in found[name]["errors"]) == (name == "right")
            assert ("dlm_head" in found[name]["errors"]) == (head == "trainable")
            assert max(found[name]["errors"].values()) < 1e-4


def test_no_time_means_ours_alone(fakes):
    entry = all_of(job("right", "no pir", seconds=0.0, extras=False)).entry
    for head in HEADS:
        found = entry["heads"][head]["peers"]
        assert found["right"]["seconds"] > 0 and found["right"]["rounds"] == 0
        assert found["no pir"]["reason"] == measure.NO_TIME


def test_a_lost_device_ends_the_process(monkeypatch, fakes):
    monkeypatch.setattr(clock.HostClock, "is_alive", lambda _: False)
    with pytest.raises(measure.Dead, match="an assertion"):
        all_of(job("right", "broken"))


def test_a_peer_that_fails_later_loses_its_rounds_only(monkeypatch, fakes):
    calls = []

    def failing(*inputs):
        calls.append(inputs)
        if len(calls) > 3:
            raise RuntimeError("only once")
        return implementations.naive(*inputs)

    measure.PEERS["no pir"].load = lambda: Implementation(failing)
    entry = all_of(job("right", "no pir", heads=["frozen"], extras=False)).entry["heads"]["frozen"]
    assert entry["peers"]["no pir"]["reason"] == "RuntimeError: only once"
    assert entry["peers"]["right"]["rounds"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
def test_our_own_extras(monkeypatch):
    monkeypatch.setattr(measure, "CHUNK_BUDGETS", (2 * 64 * 4, driver.LOGITS_BYTES, 2**33))
    monkeypatch.setattr(driver, "chunk_rows", lambda d, v, passes, sms, budget=None: (budget or 2**31) // (2 * 64 * 4))
    entry = all_of(Job(2, 8, 61, peers=["perce"], heads=[], **TINY)).entry
    assert [sweep["rows"] for sweep in entry["chunk_sweep"]] == [1, 2] and all(
        sweep["seconds"] > 0 for sweep in entry["chunk_sweep"]
    )
    assert [sweep["shipped"] for sweep in entry["chunk_sweep"]] == [False, True]
    assert driver.LOGITS_BYTES == 2**31
    assert {"seconds", "entropy_seconds", "matmul_seconds"} <= entry["logprobs"].keys()


# --- Peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PEERS if name != "compiled"])
def test_each_peer_loads_or_says_why_not_and_is_right(name):
    """Libraries that are not here are Unable; Triton's own do not run on a CPU."""
    inputs = implementations.make_inputs(12, 8, 61, torch.float32)
    try:
        implementation = PEERS[name].load()
    except Unable as reason:
        assert len(str(reason)) > 20
        return
    if name.startswith(("liger", "cce", "quack")):
        pytest.skip("installed, but its kernels need a GPU")
    loss = implementations.step(implementation.loss, inputs)
    assert measure.verdict(measure.Reference.of(inputs).errors(implementation, loss, inputs)) is None


def test_a_library_on_the_path_is_composed(monkeypatch):
    """The calls that each composition makes, as the libraries' signatures have them."""

    def linear_cross_entropy(hidden, lm_head, target, **options):
        seen.append(options)
        return naive_nll(hidden, lm_head, target)

    def quack(hidden, lm_head, bias, target, **options):
        return linear_cross_entropy(hidden, lm_head, target, **options)

    def add_fused_lm_head(model):
        def forward(hidden, *, shift_labels, fused_lm_head):
            assert fused_lm_head
            state = model.base_model(hidden, use_cache=False).last_hidden_state
            weight = model.get_output_embeddings().weight
            return SimpleNamespace(log_probs=-naive_nll(state[0], weight, shift_labels[0])[None])

        assert model.config.get_text_config() == SimpleNamespace()
        model.forward = forward

    seen: list[dict] = []
    per_token = SimpleNamespace(apply=linear_cross_entropy)
    modules = {
        "liger_kernel.transformers.functional": SimpleNamespace(liger_fused_linear_cross_entropy=linear_cross_entropy),
        "liger_kernel.ops.fused_linear_scaled_cross_entropy": SimpleNamespace(
            LigerFusedLinearScaledCrossEntropyFunction=per_token
        ),
        "cutlass": SimpleNamespace(),
        "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=linear_cross_entropy),
        "quack.linear_cross_entropy": SimpleNamespace(linear_cross_entropy_func=quack),
        "trl.trainer.utils": SimpleNamespace(add_fused_lm_head=add_fused_lm_head),
    }
    monkeypatch.setattr(peers, "imported", lambda module, package: modules[module])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "1")
    inputs = implementations.make_inputs(12, 8, 61, torch.float32)
    reference = measure.Reference.of(inputs)
    for name in ("liger", "liger_large", "liger_cutedsl", "cce_exact", "cce_filtered", "quack", "trl"):
        implementation = PEERS[name].load()
        errors = reference.errors(implementation, implementations.step(implementation.loss, inputs), inputs)
        assert max(errors.values()) < 1e-4, name
    assert all(options["reduction"] == "none" for options in seen if options)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(Unable, match=r"9\.0"):
        PEERS["liger_cutedsl"].load()
    modules["trl.trainer.utils"] = SimpleNamespace()
    with pytest.raises(Unable, match="add_fused_lm_head"):
        PEERS["trl"].load()


def test_a_missing_library_is_named():
    with pytest.raises(Unable, match=r"no-such-thing is not installed.*no_such_module"):
        peers.imported("no_such_module", "no-such-thing")


def test_tf32_is_for_the_peers_that_ask_and_put_back():
    before = torch.get_float32_matmul_precision()
    for allowed in (True, False):
        with measure.tf32(allowed):
            assert (torch.get_float32_matmul_precision() == "high") == allowed
        assert torch.get_float32_matmul_precision() == before


# --- Clock and machine -----------------------------------------------------------------------------------------------


class FakeCuda:
    """As much of torch.cuda as the clock asks; a millisecond passes at each look."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self):
        self.now, self.dead, self.peak, self.asked = 0.0, False, 7, []

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def synchronize(self):
        self.asked.append("synchronize")
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache(self):
        self.synchronize()

    def memory_allocated(self):
        return 5

    def reset_peak_memory_stats(self):
        self.asked.append("reset")

    def max_memory_allocated(self):
        return self.peak


def test_the_cuda_clock(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(clock.torch, "cuda", cuda)
    monkeypatch.setattr(clock.torch, "zeros", lambda *_, **__: torch.ones(1))
    watch = clock.clock_of("cuda")

    def run():
        cuda.now += 3.0

    assert watch.seconds(run, lambda: setattr(cuda, "now", 40.0)) == pytest.approx(0.003)
    assert watch.peak_extra_bytes(run) == 2 and "reset" in cuda.asked
    assert watch.is_alive()
    cuda.dead = True
    watch.free()
    assert not watch.is_alive()


def test_the_machine(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=1, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = measure.machine("cuda")
    assert found["device"] == "NVIDIA H100" and found["capability"] == [9, 0] and found["multiprocessors"] == 132
    assert torch.__version__.startswith(found["packages"]["torch"].split("+")[0])
