"""Racing implementations, on a CPU at tiny sizes: what fails is recorded, what is right is timed."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import implementations
from benchmarks.gpu import clock, peers, race
from benchmarks.gpu.child import Child, Dead, Request, Unable
from benchmarks.gpu.peers import PEERS, Implementation, composed
from benchmarks.gpu.results import NO_TIME
from benchmarks.gpu.roofline import HEADS
from benchmarks.gpu.sizes import Size
from tests.helpers.fake_peers import FAKES, exact_nll

pytest.importorskip("triton")

SIZE = Size(12, 8, 61)


@pytest.fixture(autouse=True)
def one_small_size(monkeypatch):
    monkeypatch.setattr(Request, "sizes", (SIZE,))
    monkeypatch.setattr(clock.HostClock, "free", lambda _: None)  # a garbage collection for every peer


def raced(*names: str, heads=HEADS, seconds: float = 60.0, lost=None, finished=(), **options) -> dict[str, dict]:
    """Lines of the stage in this process, by what follows the stage's name; the last ones count."""
    lines: dict[str, dict] = {}

    def say(event):
        if "line" in event:
            lines[event.pop("line").removeprefix("peers/").replace(f"{SIZE}/", "")] = event

    options = {"peers": list(names), "heads": list(heads), "rounds": 2, "side": 16} | options
    race.stage(Child(Request("peers", seconds, "cpu", finished=list(finished), lost=lost or {}, options=options), say))
    return lines


def test_a_peer_that_fails_is_recorded_and_the_others_are_raced():
    names = ["fake_right", "fake_inaccurate", "fake_absent", "fake_broken", "fake_greedy", "fake_wrong", "fake_nan"]
    lines = raced(*names)
    for head in HEADS:
        found = {name: lines[f"{head}/{name}"] for name in names}
        assert found["fake_absent"]["reason"] == "it is not installed"
        assert found["fake_broken"]["reason"] == "RuntimeError: an assertion in the library"
        assert found["fake_greedy"]["reason"] == "out of memory"
        assert found["fake_wrong"]["reason"].startswith("wrong result: dhidden off by")
        assert found["fake_nan"]["reason"].startswith("wrong result: loss off by nan")
        assert found["fake_right"]["correct"] and found["fake_right"]["errors"]["pir"] < 1e-5
        assert found["fake_inaccurate"]["correct"] is False and found["fake_inaccurate"]["errors"]["pir"] > 1e-3
        assert ("dlm_head" in found["fake_right"]["errors"]) == (head == "trainable")
        rounds = lines[f"{head}/race"]["rounds"]
        assert [sorted(seconds) for seconds in rounds] == [
            ["copy", "matmul"], *[["copy", "fake_inaccurate", "fake_right", "matmul"]] * 2
        ]  # fmt: skip
        assert lines[f"{head}/race"]["partial"] is False and lines[f"{head}/race"]["matmul_flops"] > 0


def test_pir_is_asked_to_a_thousandth(monkeypatch):
    for error, correct in ((0.9e-3, True), (1.1e-3, False)):

        def off(*inputs, error=error):
            pir = composed(exact_nll).pir(*inputs)
            pir[3] += error
            return pir

        monkeypatch.setattr(FAKES["fake_right"], "load", lambda off=off: Implementation(composed(exact_nll).loss, off))
        assert raced("fake_right", heads=["frozen"])["frozen/fake_right"]["correct"] is correct


def test_no_time_means_the_first_peer_alone(monkeypatch):
    monkeypatch.setattr(race, "PREPARATION", -1e6)
    lines = raced("fake_right", "fake_inaccurate")
    assert lines["frozen/fake_right"]["seconds"] > 0 and lines["frozen/fake_inaccurate"]["reason"] == NO_TIME
    assert raced("fake_right", seconds=-1.0) == {f"{head}/race": {"reason": NO_TIME} for head in HEADS}


def test_a_reference_that_fails_is_a_line_and_the_next_race_begins(monkeypatch):
    def broken(size, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(race, "reference_of", broken)
    expected = {f"{head}/reference": {"reason": "out of memory"} for head in HEADS}
    assert raced("fake_right") == expected
    monkeypatch.undo()
    monkeypatch.setattr(Request, "sizes", (SIZE,))
    lost = {f"peers/trainable/{SIZE}/reference": "it crashed"}
    assert {key.partition("/")[0] for key in raced("fake_right", lost=lost)} == {"frozen"}


def test_fewer_rows_may_be_compared(monkeypatch):
    sizes = []
    monkeypatch.setattr(race, "reference_of", lambda size, device: sizes.append(size) or race.Reference.of(
        implementations.make_inputs(*size, torch.bfloat16)
    ))  # fmt: skip
    lines = raced("fake_right", heads=["frozen"], checked_rows=5)
    assert sizes == [SIZE._replace(n=5)] and lines["frozen/fake_right"]["correct"]
    assert "fake_right" in lines["frozen/race"]["rounds"][-1]


def test_what_was_lost_or_finished_before_is_left_out():
    lost = {f"peers/trainable/{SIZE}/fake_right": "it crashed"}
    lines = raced("fake_inaccurate", "fake_right", lost=lost)
    assert "trainable/fake_right" not in lines, "its reason is there already"
    assert lines["frozen/fake_right"]["reason"] == "left out, as before: it crashed"
    assert "seconds" in lines["trainable/fake_inaccurate"]
    assert set(raced("fake_right", finished=[f"peers/{head}/{SIZE}/race" for head in HEADS])) == set()


def test_a_lost_device_ends_the_process(monkeypatch):
    monkeypatch.setattr(clock.HostClock, "is_alive", lambda _: False)
    with pytest.raises(Dead, match="an assertion"):
        raced("fake_right", "fake_broken")


def test_a_peer_that_fails_later_loses_its_rounds_only(monkeypatch):
    calls = []

    def failing(*inputs):
        calls.append(inputs)
        if len(calls) > 3:
            raise RuntimeError("only once")
        return implementations.naive(*inputs)

    monkeypatch.setattr(FAKES["fake_nan"], "load", lambda: Implementation(failing, composed(exact_nll).pir))
    lines = raced("fake_right", "fake_nan", heads=["frozen"])
    assert lines["frozen/fake_nan"]["reason"] == "RuntimeError: only once"
    assert [("fake_right" in seconds) for seconds in lines["frozen/race"]["rounds"]] == [False, True, True]


# --- Peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PEERS if name != "compiled"])
def test_each_peer_loads_or_says_why_not_and_is_right(name):
    """Libraries that are not here are Unable; Triton's own do not run on a CPU."""
    inputs = implementations.make_inputs(*SIZE, torch.bfloat16)
    try:
        implementation = PEERS[name].load()
    except Unable as reason:
        assert len(str(reason)) > 20
        return
    if name.startswith(("liger", "cce", "quack")):
        pytest.skip("installed, but its kernels need a GPU")
    loss = implementations.step(implementation.loss, inputs)
    errors = race.Reference.of(inputs).errors(implementation, loss, inputs)
    assert race.what_is_wrong(errors) is None
    assert (errors["pir"] <= race.PIR_ERROR) == (name not in ("naive_bf16", "trl")), "logits in bf16 are too coarse"


def test_a_library_on_the_path_is_composed(monkeypatch):
    """The calls that each composition makes, as the libraries' signatures have them."""

    def linear_cross_entropy(hidden, lm_head, target, **options):
        seen.append(options)
        return exact_nll(hidden, lm_head, target)

    def quack(hidden, lm_head, bias, target, **options):
        return linear_cross_entropy(hidden, lm_head, target, **options)

    def lse_target_epi(hidden, weight, *, store_d, target, tuned):
        assert not store_d and not tuned
        z = hidden @ weight
        return {"lse": z.logsumexp(1), "target_logit": z.gather(1, target[:, None])[:, 0]}

    def add_fused_lm_head(model):
        def forward(hidden, *, shift_labels, fused_lm_head):
            assert fused_lm_head
            state = model.base_model(hidden, use_cache=False).last_hidden_state
            weight = model.get_output_embeddings().weight
            return SimpleNamespace(log_probs=-exact_nll(state[0], weight, shift_labels[0])[None])

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
        "quack.epilogue.library": SimpleNamespace(lse_target_epi=lse_target_epi),
        "trl.trainer.utils": SimpleNamespace(add_fused_lm_head=add_fused_lm_head),
    }
    monkeypatch.setattr(peers, "imported", lambda module, package: modules[module])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "1")
    inputs = implementations.make_inputs(*SIZE, torch.float32)
    reference = race.Reference.of(inputs)
    for name in ("liger", "liger_large", "liger_cutedsl", "cce_exact", "cce_filtered", "quack", "quack_exact", "trl"):
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
        with race.tf32(allowed):
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

    def _sleep(self, cycles):
        self.asked.append("sleep")

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
    assert cuda.asked.count("sleep") == 1, "before the events of a timing alone"
    assert watch.is_alive()
    cuda.dead = True
    watch.free()
    assert not watch.is_alive()
