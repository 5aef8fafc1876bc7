"""The file that `make slow` writes: it has every outcome, also when the run is cut off, and names the commit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.commit import COMMIT, commit
from tests.helpers import ROOT

ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
"""pytest-benchmark measures nothing in a process that xdist has started."""
OF_EVERY_KIND = """
import os
import pytest

@pytest.fixture
def broken():
    raise RuntimeError("no such machine")

@pytest.fixture
def left_behind():
    yield
    raise RuntimeError("not tidied up")

def test_passes(): pass
def test_fails(): assert 1 + 1 == 3
def test_has_no_data(): pytest.skip("needs a directory")
def test_cannot_begin(broken): pass
def test_cannot_end(left_behind): pass

@pytest.mark.parametrize("size", [8])
def test_is_measured(benchmark, size):
    benchmark.pedantic(sum, args=([size],), rounds=3)
    benchmark.extra_info["ratio"] = 0.25
    benchmark.extra_info["sizes"] = {8: 1}

def test_measured_and_wrong(benchmark):
    benchmark.pedantic(sum, args=([1],), rounds=1)
    benchmark.extra_info["ratio"] = 2.0
    assert benchmark.extra_info["ratio"] < 1
"""
ENDS_THE_PROCESS = """
import os

def test_first(): pass
def test_second(): os._exit(9)
def test_third(): pass
"""


def run(directory: Path, **files: str) -> tuple[int, dict]:
    """Exit status and record of a run of these test files."""
    for name, text in files.items():
        (directory / f"test_{name}.py").write_text(text, encoding="utf-8")
    child = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.slow_record", "-p", "no:cacheprovider",
            "--record", "results/slow.json", "--continue-on-collection-errors",
        ],
        cwd=directory, env=ALONE | {"PYTHONPATH": str(ROOT), COMMIT: "0123456789ab-dirty"}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    record = directory / "results" / "slow.json"
    assert record.exists(), child.stdout + child.stderr
    assert [path.name for path in record.parent.iterdir()] == ["slow.json"]
    return child.returncode, json.loads(record.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_each_outcome_is_recorded_with_its_reason_and_numbers(tmp_path):
    status, record = run(tmp_path, kinds=OF_EVERY_KIND, unreadable="import no_such_module")
    assert status == 1
    assert record["counts"] == {"selected": 7, "passed": 2, "failed": 5, "skipped": 1}
    assert record["running"] is None and record["seconds"] >= 0
    assert record["commit"] == "0123456789ab" and record["dirty"] is True
    assert set(record["packages"]) == {"torch", "triton", "transformers"} and record["cpu"] and record["python"]
    assert str(tmp_path) not in json.dumps(record)

    tests = {name.removeprefix("test_kinds.py::"): entry for name, entry in record["tests"].items()}
    assert all(entry["seconds"] >= 0 for entry in tests.values())
    assert tests["test_passes"].keys() == {"outcome", "seconds"} and tests["test_passes"]["outcome"] == "passed"
    reasons = {
        "test_fails": ("failed", "call: test_kinds.py:15: assert (1 + 1) == 3"),
        "test_has_no_data": ("skipped", "needs a directory"),
        "test_cannot_begin": ("failed", "setup: test_kinds.py:7: RuntimeError: no such machine"),
        "test_cannot_end": ("failed", "teardown: test_kinds.py:12: RuntimeError: not tidied up"),
    }
    for name, (outcome, reason) in reasons.items():
        assert (tests[name]["outcome"], tests[name]["reason"]) == (outcome, reason)
    assert "No module named 'no_such_module'" in tests["test_unreadable.py"]["reason"]

    benchmark = tests["test_is_measured[8]"]["benchmark"]
    assert benchmark["rounds"] == 3 and benchmark["median"] > 0
    assert benchmark["extra_info"] == {"ratio": 0.25, "sizes": {"8": 1}}
    assert tests["test_measured_and_wrong"]["outcome"] == "failed"
    assert tests["test_measured_and_wrong"]["benchmark"]["extra_info"] == {"ratio": 2.0}


def test_a_run_that_is_cut_off_keeps_what_ended_and_names_what_did_not(tmp_path):
    status, record = run(tmp_path, cut_off=ENDS_THE_PROCESS)
    assert status == 9
    assert list(record["tests"]) == ["test_cut_off.py::test_first"]
    assert record["running"] == "test_cut_off.py::test_second"
    assert record["counts"] == {"selected": 3, "passed": 1, "failed": 0, "skipped": 0}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One commit of a file and of results."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (tmp_path / "code.py", results / "slow.json"):
        path.write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init"], ["add", "."], [*author, "commit", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)
    return tmp_path


def test_a_commit_is_dirty_by_its_code_and_not_by_its_results(repository, monkeypatch):
    monkeypatch.delenv(COMMIT, raising=False)
    clean = commit(repository)
    assert len(clean) == 12
    (repository / "benchmarks" / "results" / "slow.json").write_text("2")
    (repository / "notes").write_text("untracked")
    assert commit(repository) == clean
    (repository / "code.py").write_text("2")
    assert commit(repository) == f"{clean}-dirty"
    monkeypatch.setenv(COMMIT, "0123456789ab")
    assert commit(repository) == "0123456789ab", "of the tree that was copied; its repository may be older"


def test_without_a_repository_the_environment_tells_the_commit(tmp_path, monkeypatch):
    monkeypatch.delenv(COMMIT, raising=False)
    assert commit(tmp_path) is None
    monkeypatch.setenv(COMMIT, "0123456789ab")
    assert commit(tmp_path) == "0123456789ab"
