"""Running the GPU benchmarks: child processes that crash or hang, the results' file, and the tables made of it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import table
from benchmarks.gpu import measure, run
from benchmarks.gpu.measure import Job

CHILD = """
import json, os, sys, time
job = json.loads(sys.argv[1])
def say(event, **values):
    print(json.dumps({"event": event} | values), flush=True)
say("machine", device="NVIDIA H100 80GB", driver="1", packages={"torch": "2"}, commit="abc", date="2026-01-01")
for head in job["heads"]:
    say("round", head=head, seconds={"matmul": 1.0, "copy": 1.0})
    for peer in job["peers"]:
        say("begin", head=head, peer=peer)
        if peer == "crashes" and head == "trainable":
            print("CUDA error: an illegal memory access", file=sys.stderr)
            os._exit(7)
        if peer == "hangs" and head == "frozen":
            time.sleep(60)
        say("checked", head=head, peer=peer, errors={"loss": 0.0}, peak_extra_bytes=2**30, seconds=5.0, rounds=0)
    say("round", head=head, seconds={"matmul": 1.0, "copy": 2.0} | dict.fromkeys(job["peers"], 2.0))
    say("head_done", head=head)
if job["extras"]:
    say("begin", head="sweep", peer="perce")
    sys.exit("the sweep is broken")
say("done")
"""


@pytest.fixture
def command(tmp_path):
    """A child that speaks measure.py's language without torch, and fails in every way."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return (sys.executable, "-S", str(script))


def test_a_process_that_crashes_or_hangs_is_replaced_by_one_without_the_peer(command, tmp_path):
    path = tmp_path / "results" / "h100.json"
    options = {"peers": ["perce", "crashes", "hangs"], "probe": 100, "path": path, "command": command, "patience": 1.0}
    results = run.run(((10, 4, 6), (20, 4, 6)), budget=60, **options)
    tree = json.loads(path.read_text())
    assert tree == results.tree and tree["schema"] == run.SCHEMA and tree["machine"]["device"] == "NVIDIA H100 80GB"
    assert [size["n"] for size in tree["sizes"]] == [10, 20]
    for size in tree["sizes"]:
        trainable, frozen = size["heads"]["trainable"], size["heads"]["frozen"]
        assert trainable["matmul_flops"] == measure.PROBES * 2 * 100**3
        assert trainable["bandwidth"] == measure.PROBES * 2 * 80000 / 1.5
        assert trainable["floor"] == 8 * size["n"] * 4 * 6 / trainable["matmul_flops"]
        assert trainable["floor"] * 6 == pytest.approx(frozen["floor"] * 8)
        crash, hang = trainable["peers"]["crashes"]["reason"], frozen["peers"]["hangs"]["reason"]
        before = "left out, as before: " if size is tree["sizes"][1] else ""
        assert crash == f"{before}the process ended with 7: CUDA error: an illegal memory access"
        assert hang == f"{before}nothing heard for 1 s"
        assert "illegal memory access" in frozen["peers"]["crashes"]["reason"], "it is not met again with another head"
        for peer in (trainable["peers"]["perce"], frozen["peers"]["perce"]):
            assert peer["seconds"] == 2.0 and peer["rounds"] == 1 and peer["peak_extra_bytes"] == 2**30
            assert peer["ratio_to_floor"] > 0
        assert size["failed"] == ["sweep: the process ended with 1: the sweep is broken"]
    assert not list(path.parent.glob("*.partial"))


def test_the_end_of_the_time_keeps_what_there_is(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    job, lost = Job(10, 4, 6, seconds=-4.0, peers=["perce", "hangs"], heads=["frozen"]), {}
    size = run.run_size(job, run.Results(None), command, lost=lost)
    peers = size.entry["heads"]["frozen"]["peers"]
    assert peers["perce"]["seconds"] == 5.0 and peers["hangs"]["reason"] == measure.NO_TIME
    assert not lost, "with more time it may do"
    assert (tmp_path / "nvidia_h100_80gb.json").exists()


def test_a_process_that_does_not_start_is_the_sizes_failure(tmp_path):
    broken = (sys.executable, "-S", "-c", "import sys; sys.exit('no torch here')")
    size = run.run_size(Job(10, 4, 6), run.Results(tmp_path / "x.json"), broken)
    assert size.entry["failed"] == ["start: the process ended with 1: no torch here"]
    silent = (sys.executable, "-S", "-c", "import sys; sys.exit(3)")
    size = run.run_size(Job(10, 4, 6), run.Results(tmp_path / "x.json"), silent)
    assert size.entry["failed"] == ["start: the process ended with 3: without a word"]


def test_the_commands_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit, match="expected a CUDA GPU, found none"):
        run.main()
    monkeypatch.setattr(sys, "argv", ["measure"])
    with pytest.raises(SystemExit, match=r"benchmarks\.gpu\.measure JOB"):
        measure.main()


def test_the_command_prints_its_tables(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["run", "--budget", "9", "--results", str(tmp_path), "--sizes", "3", "0"])
    for measured in (True, False):
        tree = tree_of({"perce": {"seconds": 0.03, "ratio_to_floor": 1.2}} if measured else {})

        def fake(sizes, *, budget, directory, peers, heads, tree=tree):
            assert sizes == [measure.SIZES[0], measure.SIZES[3]] and directory == tmp_path and "perce" in peers
            return SimpleNamespace(tree=tree, path=directory / "x.json")

        monkeypatch.setattr(run, "run", fake)
        if measured:
            run.main()
            assert "30.0 (1.20)" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit, match="perce itself was not measured"):
                run.main()


def test_a_part_does_not_replace_the_whole(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["run", "--peers", "perce"])
    with pytest.raises(SystemExit, match="expected --results DIR"):
        run.main()


def test_time_that_runs_out_in_a_round_takes_nothing_away(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        CHILD.replace(
            '    say("head_done"', '    say("begin", head=head, peer="perce")\n    time.sleep(60)\n    say("head_done"'
        )
    )
    job, lost = Job(10, 4, 6, seconds=-4.0, peers=["perce"], heads=["frozen"]), {}
    size = run.run_size(job, run.Results(tmp_path / "x.json"), (sys.executable, "-S", str(script)), lost=lost)
    entry = size.entry["heads"]["frozen"]["peers"]["perce"]
    assert entry["seconds"] == 2.0 and entry["rounds"] == 1 and "reason" not in entry and not lost


def test_a_job_survives_its_process(monkeypatch, capfd):
    """measure.main in this process: events on standard output, what libraries print beside them."""

    def events(job, clock):
        print("a library's chatter")
        yield {"event": "machine", "n": job.n}
        raise measure.Dead("it went away")

    monkeypatch.setattr(measure, "events", events)
    monkeypatch.setattr(sys, "argv", ["measure", measure.as_argument(Job(12, 8, 61))])
    monkeypatch.setattr(measure.os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit, match="the device is lost: it went away"):
        measure.main()
    assert '{"event": "machine", "n": 12}' in capfd.readouterr().out


# --- Tables ----------------------------------------------------------------------------------------------------------


def tree_of(trainable: dict, **size) -> dict:
    machine = {"device": "NVIDIA H100", "driver": "580", "packages": {"torch": "2.11", "trl": None}, "commit": "abc"}
    head = {"matmul_flops": 7e14, "bandwidth": 3e12, "floor": 0.025, "peers": trainable}
    return {
        "schema": 1,
        "machine": machine | {"date": "2026-01-01"},
        "sizes": [{"n": 4096, "d": 4096, "v": 128256, "heads": {"trainable": head}} | size],
    }


MEASURED = tree_of(
    {
        "perce": {
            "seconds": 0.0271, "ratio_to_floor": 1.084, "peak_extra_bytes": 3 * 2**30,
            "errors": {"loss": 1e-6, "pir": 2e-5, "dhidden": 1e-3, "dlm_head": 2e-3},
        },
        "trl": {"reason": "trl is not installed"},
        "compiled": {"reason": measure.NO_TIME},
    },
    logprobs={"seconds": 0.012, "matmul_seconds": 0.01},
    chunk_sweep=[
        {"logits_bytes": 2**30, "rows": 1024, "seconds": 0.03, "shipped": False},
        {"logits_bytes": 2**31, "rows": 2048, "seconds": 0.027, "shipped": True},
        {"logits_bytes": 2**32, "rows": 4096, "reason": "out of memory", "shipped": False},
    ],
    failed=["sweep: it broke"],
)  # fmt: skip


def test_tables_of_results(tmp_path, monkeypatch, capsys):
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(MEASURED))
    monkeypatch.setattr(sys, "argv", ["table", str(path)])
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA H100, driver 580, torch 2.11, commit abc, 2026-01-01."
    for line in (
        "| trainable head, ms (÷ floor) | 4096 × 4096 × 128256 |",
        "| **perce** | 27.1 (1.08) |",
        "| **perce** | not measured |",  # frozen
        "| **perce** | 3.00 |",
        "| **perce** | 2.0e-05 / 1.0e-03 / 2.0e-03 |",
        "| torch.compile, fp32 logits | not measured |",
        "| 4096 × 4096 × 128256 | 700 | 3.00 | 25.0 / – | 1.20 |",
        "| 4096 × 4096 × 128256 | 1024 (1 GiB): 30.0, **2048 (2 GiB): 27.0**, 4096 (4 GiB): failed |",
        "- TRL fused head: trl is not installed (N = 4096, trainable)",
        "- run: sweep: it broke (N = 4096)",
    ):
        assert line in lines
    assert not any(line.startswith("| TRL") and "failed" in line for line in lines), (
        "a row of failures is a reason below"
    )
    assert not any(measure.NO_TIME in line for line in lines)


def test_tables_without_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "none.json")])
    table.main()
    text = capsys.readouterr().out
    assert text.startswith("GPU: not measured.") and "failed" not in text
    assert "| **perce** | not measured | not measured | not measured | not measured |" in text.splitlines()
