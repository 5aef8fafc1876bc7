"""What the GPU commands measure of ours, in this process and at tiny sizes: their numbers mean nothing here."""

import importlib.util
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu import command, compare, decide, parts, sanitizer, suite, training, wheels
from benchmarks.gpu import compile as compilation
from benchmarks.gpu.child import Request, machine
from benchmarks.gpu.clock import seconds_of_kernels
from benchmarks.gpu.results import Results
from benchmarks.gpu.sizes import SIZES, TINY, Size
from perce_kernels.gpu import cut, driver, tiles
from tests.helpers import ROOT
from tests.helpers.device import room
from tests.helpers.stages import lines_of

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")


# --- Ours ------------------------------------------------------------------------------------------------------------


@on_cpu
def test_every_way_is_compared_with_fp64(monkeypatch):
    found = lines_of(parts.stage, "check", what="check")
    assert {f"{size}/{way}" for size in TINY for way in ("fused", "stored")} == set(found)
    assert all(line["errors"]["pir"] < 1e-4 and "reason" not in line for line in found.values())
    # Only one of the ways rounds logits.
    assert found[f"{TINY[0]}/fused"]["errors"]["dhidden"] != found[f"{TINY[0]}/stored"]["errors"]["dhidden"]
    monkeypatch.setattr(parts, "what_is_wrong", lambda errors: "wrong result: loss off by 2")
    monkeypatch.setattr(Request, "sizes", TINY[:1])
    assert lines_of(parts.stage, "check", what="check")[f"{TINY[0]}/fused"]["reason"] == "wrong result: loss off by 2"


@on_cpu
def test_every_part_is_timed_beside_its_prediction(monkeypatch):
    monkeypatch.setattr(parts, "REPETITIONS", 1)
    monkeypatch.setattr(Request, "sizes", TINY[:1])
    found = lines_of(parts.stage, "parts", what="parts", side=16)
    size = TINY[0]
    timed = {key.removeprefix(f"{size}/"): line for key, line in found.items() if "predicted" in line}
    assert timed.keys() == {
        "mm to 16 bits", "mm to fp32", "mm of a block of columns", f"dh of {size.n}", f"dW of {size.n}",
        f"dW of {size.n}, added",
        "row_loss", "row_parts", "lse_gemm", "store_gemm", "stored_rows", "combine", "scaling of dW",
    }  # fmt: skip
    assert all(line["seconds"] > 0 and line["predicted"] > 0 for line in timed.values())
    assert found["ceilings"]["matmul_flops"] > 0
    assert found[f"{size}/token_logprobs"].keys() == {"seconds", "entropy_seconds", "matmul_seconds"}
    again = lines_of(parts.stage, "parts", what="parts", side=16, finished=[f"parts/{key}" for key in found])
    assert again.keys() == {"ceilings"}, "a process that follows one that crashed begins where that ended"


@on_cpu
def test_an_operand_that_does_not_fit_is_a_line(monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parts, "of_dz", too_large)
    monkeypatch.setattr(parts, "REPETITIONS", 0)
    monkeypatch.setattr(parts, "measured", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr(Request, "sizes", TINY[:1])
    found = lines_of(parts.stage, "parts", what="parts", side=16)
    assert found[f"{TINY[0]}/operands of dz of 2048"]["reason"] == "out of memory"
    assert found[f"{TINY[0]}/combine"] == {"seconds": 1.0}


@on_cpu
def test_every_way_is_profiled(monkeypatch):
    monkeypatch.setattr(Request, "sizes", TINY[:1])
    found = lines_of(parts.stage, "profiles", what="profiles")
    assert {key for key, line in found.items() if line == {"kernels": {}}} == {
        f"{TINY[0]}/{way}" for way in ("fused", "stored")
    }, "no device, no kernel"


def test_what_runs_on_the_device_is_counted_and_summed(monkeypatch):
    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [("gemm", 30, device), ("copy", 1, device), ("gemm", 12, device), ("aten::mm", 99, host)]
    made = [
        SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda us=us: us))
        for name, us, kind in events
    ]
    profiler = SimpleNamespace(events=lambda: made)
    monkeypatch.setattr("torch.profiler.profile", lambda **_: nullcontext(profiler))
    found = seconds_of_kernels(lambda: None)
    assert found == {"gemm": {"count": 2, "seconds": pytest.approx(42e-6)}, "copy": {"count": 1, "seconds": 1e-6}}


@on_cpu
@pytest.mark.slow
def test_budgets_change_the_drivers_cut_and_are_put_back(monkeypatch):
    asked = []
    largest = cut.cut_of
    monkeypatch.setattr(driver, "cut_of", lambda *args: asked.append(cut.BUDGET) or largest(*args))
    sizes = Size(2, 16, 40), Size(2, 16, 50)
    monkeypatch.setattr(Request, "sizes", sizes)
    monkeypatch.setattr(parts, "BUDGETS", {"trainable": (1, 2), "frozen": (0.5,)})
    shipped = cut.BUDGET
    found = lines_of(parts.stage, "budgets", what="budgets")
    assert {2**29, 2**30, 2**31} == set(asked) and shipped == cut.BUDGET
    assert next(iter(found)).startswith(str(sizes[1])), "the second size first: it has the largest vocabulary"
    assert found[f"{sizes[0]}/stored/2 GiB"]["shipped"] and not found[f"{sizes[0]}/stored/1 GiB"]["shipped"]
    assert "seconds" in found[f"{sizes[0]}/stored/0.5 GiB, frozen head"]


@on_cpu
def test_no_time_begins_nothing():
    found = lines_of(parts.stage, "check", seconds=-1.0, what="check")
    assert not found, "the supervisor says it of the whole stage"


def test_what_is_compiled_is_what_is_launched():
    """Every kernel at every named tile, and the whole op by each way."""
    listed = compilation.jobs("sm_90", compilation.SHAPES)
    assert {name for name, tile, _ in listed if not tile} == {peer.name for peer in compilation.WAY_PEERS.values()}
    for kernel in compilation.SUBJECTS:
        names = {tile for name, tile, _ in listed if name == kernel}
        assert names == {compilation.named(tile) for tile in compilation.candidates(kernel, "sm_90", torch.bfloat16)}
    for n, d, v in SIZES + compilation.SHAPES:
        assert n % 16 == d % 16 == v % 16 == 0, "one specialisation of Triton's for all"
    columns = tiles.STATISTICS_COLUMNS
    assert {-(-v // columns) % 16 == 0 for _, _, v in SIZES} == {
        -(-v // columns) % 16 == 0 for _, _, v in compilation.SHAPES
    }


@on_cpu
@pytest.mark.parametrize("job", [("perce_stored", "", TINY[0]), ("row_loss", "64-w1-s1", TINY[0])], ids=str)
def test_a_job_of_the_compilation_runs(job):
    assert compilation.compile_one(job, tiles.INTERPRETER, "cpu") > 0


# --- Tests -----------------------------------------------------------------------------------------------------------


def test_outcomes_of_pytest():
    for line, expected in {
        "[gw0] [ 12%] PASSED tests/test_a.py::test_b[x y]": ("tests/test_a.py::test_b[x y]", "passed"),
        "tests/test_a.py::test_b[1-2] FAILED   [ 50%]": ("tests/test_a.py::test_b[1-2]", "failed"),
        "tests/test_a.py::test_c SKIPPED (needs a CUDA GPU)  [100%]": ("tests/test_a.py::test_c", "skipped"),
        "tests/test_a.py::test_b": None,
        "==== 3 passed in 1.0s ====": None,
        "FAILED tests/test_a.py::test_b - assert 1 == 2": None,
    }.items():
        assert suite.outcome_of(line) == expected


SLEEPY = """
import time
import pytest

@pytest.mark.parametrize("i", range(400))
def test_sleeps(i):
    time.sleep(0.05 if i < 5 else 0.3)
    assert i != 1
"""


@pytest.fixture
def ignoring_interrupts():
    """As a shell's background jobs, and what they start, do."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("ignoring_interrupts")
@pytest.mark.parametrize("workers", [0, 2])
def test_tests_are_interrupted_and_still_sum_up(tmp_path, monkeypatch, capfd, workers):
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    (tmp_path / "tests").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # which is its plugin's, elsewhere the directory it is run in
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # those of other packages take seconds to import
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p pytest_timeout" + " -p xdist.plugin" * bool(workers))
    (tmp_path / "tests/test_sleepy.py").write_text(SLEEPY)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    for seconds in (4.0, 8.0, 20.0, 60.0):  # pytest starts in one second here and in many on a busy machine
        found = lines_of(suite.stage, "tests", seconds=seconds, files=["tests/test_sleepy.py"], workers=workers)
        summary = found.pop("summary")
        if len(found) > 2:
            break
    assert summary["status"] == 2 and "passed" in summary["last_words"], summary
    assert summary["failures"] == ["tests/test_sleepy.py::test_sleeps[1]"]
    assert workers or "assert 1 != 1" in capfd.readouterr().err, "why it failed is said at once"
    assert 2 < len(found) < 400 and found["tests/test_sleepy.py::test_sleeps[0]"] == {"outcome": "passed"}


def test_test_processes_wait_for_room_on_the_gpu(tmp_path):
    """Locks are of an open file: threads stand for processes."""
    gib, held, most = 2**30, [0], [0]

    def hold(needed: int) -> None:
        with room(needed * gib, 40 * gib, tmp_path) as units:
            held[0] += units
            most[0] = max(most[0], held[0])
            time.sleep(0.03)
            held[0] -= units

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, [20, 30, 400, 8, 9, 1, 20, 30]))
    assert held == [0] and most == [4], "four units of eight GiB are nine tenths of 40"


# --- compute-sanitizer -----------------------------------------------------------------------------------------------

RULE = "========= "
RACES = f"""{RULE}Error: Race reported between Read access at nvjet_sm90_tss_32x64_64x16_4x2_h_bz_splitK_NNN+0xb30
{RULE}    and Write access at nvjet_sm90_tss_32x64_64x16_4x2_h_bz_splitK_NNN+0x2fc0 [224 hazards]
{RULE}
{RULE}Error: Race reported between Read access at lse_gemm_kernel+0xb30
{RULE}    and Write access at lse_gemm_kernel+0x2fc0 [8 hazards]
{RULE}
27 calls
{RULE}RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
INVALID = f"""{RULE}Invalid __global__ write of size 2 bytes
{RULE}    at scale_kernel+0x1f0
{RULE}    by thread (0,0,0) in block (3,0,0)
{RULE}
{RULE}ERROR SUMMARY: 1 error
"""


def test_problems_of_our_kernels_are_told_from_those_of_cublas():
    assert sanitizer.problems(RACES)["problems"] == 1 and "lse_gemm_kernel" in sanitizer.problems(RACES)["first"]
    assert "scale_kernel" in sanitizer.problems(INVALID)["first"]
    assert sanitizer.problems(f"27 calls\n{RULE}ERROR SUMMARY: 0 errors\n") == {"problems": 0, "first": None}


def test_a_sanitizer_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda _: "/nowhere/compute-sanitizer")
    assert "not installed" in lines_of(sanitizer.stage, "memcheck")["all kernels"]["reason"]


def test_a_problem_ends_the_command_with_an_error(monkeypatch, tmp_path):
    def run(rows, results, device):
        results.put("peers/x/perce", seconds=1.0)
        results.put("memcheck/all kernels", problems=1, calls=27)

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(SystemExit, match="sanitizer failed"):
        compare.main(["--device", "cpu", "--results", str(tmp_path)])


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "limit"), [(decide, 290), (compare, 1585)], ids=["gpu-a", "gpu-b"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_stages_end_in_turn_and_within_the_limit(module, limit, device):
    ends = [stage.until for row in module.stages(device, ("fake_right",)) for stage in row]
    assert ends == sorted(ends) and ends[-1] <= limit
    assert len({stage.name for row in module.stages(device) for stage in row}) == len(ends)


def test_the_wanted_stages_follow_each_other_with_the_time_they_have():
    rows = compare.stages("cuda")
    assert command.in_turn(rows, [stage.name for row in rows for stage in row]) == rows
    before, peers, tests = ([stage.until for stage in row] for row in rows[:3])
    kept = command.in_turn(rows, ["peers", "racecheck", "tests"])
    assert [[stage.name for stage in row] for row in kept] == [["peers"], ["tests", "racecheck"]]
    assert [row[0].until - command.START_UP for row in kept] == [peers[0] - before[0], tests[0] - before[0]]


def test_commands_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, name in ((decide, "gpu_a"), (compare, "gpu_b")):
        with pytest.raises(SystemExit, match=f"{name}: expected a CUDA GPU, found none"):
            module.main(["--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        decide.main(["--device", "cpu", "--only", "parts", "patrs", "--results", str(tmp_path)])
    assert "expected stages of train, compile, tests, check" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_the_command_ends_with_an_error_if_ours_was_not_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "run", lambda rows, results, device: results.put("ways/x/perce", reason="it crashed"))
    with pytest.raises(SystemExit, match="gpu_a: perce was not measured in ways"):
        decide.main(["--device", "cpu", "--results", str(tmp_path)])
    assert "it crashed" in capsys.readouterr().out


def test_stages_by_name_need_only_be_measured_themselves(monkeypatch, tmp_path):
    def run(rows, results, device):
        results.put("personas/perce/160", seconds=1.0)
        results.put("flex/process", reason="it crashed")
        results.put(f"peers/trainable/{TINY[0]}/race", rounds=[])

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "report", lambda trees: "")
    compare.main(["--device", "cpu", "--results", str(tmp_path), "--only", "personas"])
    with pytest.raises(SystemExit, match="gpu_b: perce was not measured in flex, peers"):
        compare.main(["--device", "cpu", "--results", str(tmp_path), "--only", "personas", "flex", "peers"])


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    assert command.compiler_missing() is None
    monkeypatch.setattr(command.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in command.compiler_missing()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "expected gcc, clang or $CC" in command.compiler_missing()


def test_wheels_are_unpacked_for_the_processes_that_follow(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "SITE", tmp_path / "build/site-packages")
    problems = ["part/x.whl: damaged: its SHA-256 differs"]
    monkeypatch.setattr(wheels, "unpack", lambda site, parts: site.mkdir(parents=True) or problems if parts else [])
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.delenv(training.MODEL, raising=False)
    (tmp_path / "a/model").mkdir(parents=True)
    results = Results("gpu_x", tmp_path, say=lambda _: None)
    command.install([], results)
    assert os.environ["PYTHONPATH"] == "before" and not results.lines
    command.install([tmp_path / "a"], results)
    site, _, before = os.environ["PYTHONPATH"].split(os.pathsep)
    assert site.endswith("build/site-packages") and before == "before"
    assert os.environ[training.MODEL] == str(tmp_path / "a/model")
    assert results.lines["wheels/part/x.whl"] == {"reason": "damaged: its SHA-256 differs"}
    monkeypatch.setenv("PYTHONPATH", "before")
    command.install([], results)
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == site, "the next command has them without being told"


def test_the_machine(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=1, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("benchmarks.gpu.child.commit", lambda: "0123456789ab")
    found = machine("cuda")
    assert found["device"] == "NVIDIA H100" and found["capability"] == [9, 0] and found["multiprocessors"] == 132
    assert found["commit"] == "0123456789ab"
    assert torch.__version__.startswith(found["packages"]["torch"].split("+")[0])
