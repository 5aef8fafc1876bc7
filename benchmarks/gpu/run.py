"""All sizes within a time budget: `python -m benchmarks.gpu.run [--budget SECONDS] [--results DIR]`.

Each size is measured in a process of its own (measure.py). A peer that crashes it, or lets nothing be heard for
PATIENCE seconds, is recorded with the reason and left out of another process that goes on; a size gets its share of the
time that is left. Such a peer is left out for good: one that hangs would else take the time of every size. The results
are written after every event, so that what was measured is never lost.

    floor = 8·N·D·V FLOP, 6 with a frozen head, ÷ the matmul rate that was timed in turn with the peers
"""

import argparse
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks.gpu.measure import HEADS, NO_TIME, PROBES, SIZES, Job, as_argument, copied_bytes
from benchmarks.gpu.peers import PEERS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
SHARES = (0.35, 0.2, 0.2, 0.25)  # of the time; the first compiles what the others find on the disk
BUDGET = 260.0
PATIENCE = 30.0
ATTEMPTS = 5
FLOP = {"trainable": 8, "frozen": 6}  # · N·D·V
SCHEMA = 1
COMMAND = (sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.measure")


class Results:
    """What has been heard so far, and its file."""

    def __init__(self, path: Path | None, directory: Path | None = None):
        self.path, self.directory = path, directory or RESULTS
        self.tree: dict[str, Any] = {"schema": SCHEMA, "machine": {}, "sizes": []}

    def start(self, job: Job) -> "SizeResult":
        size = SizeResult(job)
        self.tree["sizes"].append(size.entry)
        return size

    def take_machine(self, event: dict[str, Any]) -> None:
        self.tree["machine"] = {name: value for name, value in event.items() if name != "event"}
        if self.path is None:
            self.path = self.directory / f"{re.sub('[^a-z0-9]+', '_', event['device'].lower()).strip('_')}.json"

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.tree, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


class SizeResult:
    """One size's entry in the results, built from events."""

    def __init__(self, job: Job):
        self.job = job
        self.rounds: dict[str, list[dict[str, float]]] = {}
        self.entry: dict[str, Any] = {
            "n": job.n, "d": job.d, "v": job.v, "dtype": job.dtype, "heads": {}, "chunk_sweep": [],
        }  # fmt: skip

    def steps(self, head: str) -> dict[str, Any]:
        return self.entry["heads"].setdefault(
            head, {"matmul_flops": None, "bandwidth": None, "floor": None, "peers": {}}
        )

    def take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "round":
            self.rounds.setdefault(event["head"], []).append(event["seconds"])
            self._summarise(event["head"])
        elif kind == "sweep":
            self.entry["chunk_sweep"].append(event)
        elif "head" in event:
            head, peer = event.pop("head"), event.pop("peer")
            if head in HEADS:
                steps = self.steps(head)
                steps["peers"][peer] = event
                if "seconds" in event:
                    event["ratio_to_floor"] = event["seconds"] / steps["floor"]
            else:
                self.entry[head] = event

    def restart(self, head: str) -> None:
        """Forget the rounds of a head that was not finished: all peers are timed in turn again."""
        self.rounds.pop(head, None)

    def _summarise(self, head: str) -> None:
        """Medians over the rounds so far."""
        job, steps, rounds = self.job, self.steps(head), self.rounds[head]

        def seconds(name: str) -> list[float]:
            return [one[name] for one in rounds if name in one]

        steps["matmul_flops"] = PROBES * 2 * job.probe**3 / median(seconds("matmul"))
        steps["bandwidth"] = PROBES * 2 * copied_bytes(job) / median(seconds("copy"))
        steps["floor"] = FLOP[head] * job.n * job.d * job.v / steps["matmul_flops"]
        for name, entry in steps["peers"].items():
            if "reason" not in entry and (times := seconds(name)):
                entry |= {"seconds": median(times), "fastest": min(times), "rounds": len(times)}
            if "seconds" in entry:
                entry["ratio_to_floor"] = entry["seconds"] / steps["floor"]


def _listen(stream: IO[str], heard: "queue.Queue[str | None]") -> None:
    for line in stream:
        heard.put(line)
    heard.put(None)


def _last_line(stderr: IO[str]) -> str:
    stderr.seek(0)
    lines = [line.strip() for line in stderr.read()[-8000:].splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a word"


def run_once(job: Job, results: Results, size: SizeResult, until: float, command=COMMAND, patience=PATIENCE):
    """One process. None when it is done; else (where, reason) of what stopped it."""
    heard: queue.Queue[str | None] = queue.Queue()
    where = ("start", "start")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        child = subprocess.Popen(
            [*command, as_argument(job)], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8"
        )
        assert child.stdout is not None
        threading.Thread(target=_listen, args=(child.stdout, heard), daemon=True).start()
        try:
            while True:
                left = until - time.monotonic()
                try:
                    line = heard.get(timeout=max(0.1, min(patience, left)))
                except queue.Empty:
                    return where, NO_TIME if time.monotonic() >= until else f"nothing heard for {patience:.0f} s"
                if line is None:
                    return where, f"the process ended with {child.wait()}: {_last_line(stderr)}"
                event = json.loads(line)
                if event["event"] == "done":
                    return None
                if event["event"] == "begin":
                    where = event["head"], event["peer"]
                elif event["event"] == "machine":
                    results.take_machine(event)
                elif event["event"] == "head_done":
                    job.heads.remove(event["head"])
                    where = event["head"], "between heads"
                else:
                    if event["event"] == "round":
                        where = event["head"], "between rounds"
                    size.take(event)
                results.write()
        finally:
            child.kill()
            child.wait()


def run_size(
    job: Job, results: Results, command=COMMAND, patience=PATIENCE, lost: dict[str, str] | None = None
) -> SizeResult:
    """One size to its end, or to the end of its time, however many peers fail on the way.

    lost: peer → why it stopped a process; they are not tried (again), and this size's are added.
    """
    lost = {} if lost is None else lost
    size, until = results.start(job), time.monotonic() + job.seconds
    job = replace(job, heads=list(job.heads), peers=[peer for peer in job.peers if peer not in lost])
    for head in job.heads:
        for peer, reason in lost.items():
            size.take({"event": "failed", "head": head, "peer": peer, "reason": f"left out, as before: {reason}"})
    for _ in range(ATTEMPTS):
        job.seconds = until - time.monotonic()
        stopped = run_once(job, results, size, until + 5, command, patience)
        if stopped is None:
            break
        (head, peer), reason = stopped
        if reason == NO_TIME:  # what was measured of it stands
            if head in HEADS and peer in job.peers and "seconds" not in size.steps(head)["peers"].get(peer, {}):
                size.take({"event": "failed", "head": head, "peer": peer, "reason": NO_TIME})
            break
        print(f"  {head}, {peer}: {reason}", flush=True)
        if head not in HEADS or peer not in job.peers:
            size.entry.setdefault("failed", []).append(f"{head}: {reason}")
            if head not in ("sweep", "logprobs"):
                break
            job.extras = False
        else:
            size.restart(head)
            for left in job.heads:
                again = reason if left == head else f"left out: {reason} ({head})"
                size.take({"event": "failed", "head": left, "peer": peer, "reason": again})
            job.peers.remove(peer)
            lost[peer] = reason
        if time.monotonic() > until or not (job.heads or job.extras):
            break
    results.write()
    return size


def run(
    sizes=SIZES, *, budget=BUDGET, path: Path | None = None, directory: Path | None = None, command=COMMAND,
    patience=PATIENCE, **options,
) -> Results:  # fmt: skip
    """All sizes; `options` are those of Job. Results go to `path`, or to a file of the device's name in `directory`."""
    results, until = Results(path, directory), time.monotonic() + budget
    lost: dict[str, str] = {}
    for index, (n, d, v) in enumerate(sizes):
        share = (until - time.monotonic()) * SHARES[index] / sum(SHARES[index : len(sizes)])
        if share < 1:
            break
        print(f"N = {n}, D = {d}, V = {v}: at most {share:.0f} s", flush=True)
        run_size(Job(n, d, v, seconds=share, **options), results, command, patience, lost)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything (default {BUDGET:.0f})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for DEVICE.json (default %(default)s)")
    every = ", ".join(f"{index}: {size}" for index, size in enumerate(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", default=range(len(SIZES)), choices=range(len(SIZES)),
                        help=f"which (N, D, V); {every}")  # fmt: skip
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="default: all", metavar="PEER")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS, help="default: both")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu.run: expected a CUDA GPU, found none; nothing was measured")
    everything = (len(set(options.sizes)), len(options.peers), len(options.heads)) == (
        len(SIZES),
        len(PEERS),
        len(HEADS),
    )
    if not everything and options.results == RESULTS:
        sys.exit("benchmarks.gpu.run: a part of the measurements would replace all of them: expected --results DIR")
    results = run(
        [SIZES[index] for index in sorted(set(options.sizes))], budget=options.budget, directory=options.results,
        peers=options.peers, heads=options.heads,
    )  # fmt: skip
    from benchmarks.gpu.tables import report

    print(report(results.tree))
    print(f"\nwritten to {results.path}")
    if not any(
        "seconds" in head["peers"].get("perce", {}) for size in results.tree["sizes"] for head in size["heads"].values()
    ):
        sys.exit("perce itself was not measured: see the reasons above")


if __name__ == "__main__":
    main()
