"""A pytest plugin that records a run as JSON: `python -m pytest -p benchmarks.slow_record --record FILE`.

The file is rewritten when a test begins and when it ends. After an interruption it has every test that had ended, and
"running" names the one that had not.
"""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.commit import commit, versions
from perce.doctor import cpu_name

PACKAGES = ("torch", "triton", "transformers")
REASON = 2000  # characters of a reason that are kept: its last ones, because a traceback ends with the error


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write the outcome of each test to FILE, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--record"):
        config.pluginmanager.register(Recorder(path, config.rootpath))


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
    }


class Recorder:
    """Writes the record of one run; pytest calls the methods whose names begin with `pytest_`."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root, self.started = path, root, time.perf_counter()
        measured = commit(root)
        self.head = {
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "commit": measured and measured.removesuffix("-dirty"),
            "dirty": measured and measured.endswith("-dirty"),
            **machine(),
        }
        self.selected: int | None = None
        self.running: str | None = None
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported counts as a failed test."""
        if report.failed:
            self._take(report.nodeid, "failed", f"collection: {report.longreprtext}", 0.0)
            self._write()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected = len(session.items)
        self._write()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self._write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[Any]:
        """pytest calls this after a test's setup, call and teardown. The worst of the three is the test's outcome."""
        report: pytest.TestReport = yield
        self._take(report.nodeid, report.outcome, _reason(report), report.duration)
        fixture = getattr(item, "funcargs", {}).get("benchmark")
        if report.when == "call" and fixture is not None and fixture.stats:
            benchmark = {"median": fixture.stats["median"], "rounds": fixture.stats["rounds"]}
            self.tests[report.nodeid]["benchmark"] = benchmark | {"extra_info": dict(fixture.extra_info)}
        if report.when == "teardown":
            self.running = None
            self._write()
        return report

    def _take(self, name: str, outcome: str, reason: str | None, seconds: float) -> None:
        entry = self.tests.setdefault(name, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        if outcome != "passed" and entry["outcome"] != "failed":
            entry["outcome"] = outcome
        if reason:
            reason = reason.replace(f"{self.root}{os.sep}", "")[-REASON:]
            entry["reason"] = f"{entry['reason']}\n{reason}" if "reason" in entry else reason

    def _write(self) -> None:
        counts = Counter(entry["outcome"] for entry in self.tests.values())
        record = self.head | {
            "seconds": round(time.perf_counter() - self.started, 1),
            "counts": {"selected": self.selected} | {name: counts[name] for name in ("passed", "failed", "skipped")},
            "running": self.running,
            "tests": self.tests,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def _reason(report: pytest.TestReport) -> str | None:
    """Why a phase failed (file, line and message) or was skipped."""
    if report.passed:
        return None
    if isinstance(report.longrepr, tuple):  # a skipped test has (file, line, reason)
        return report.longrepr[2].removeprefix("Skipped: ")
    if crash := getattr(report.longrepr, "reprcrash", None):
        return f"{report.when}: {crash.path}:{crash.lineno}: {crash.message}"
    return f"{report.when}: {report.longreprtext}"
