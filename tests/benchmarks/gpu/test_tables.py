"""The tables made of the GPU commands' results."""

import json
import sys

from benchmarks import table
from benchmarks.gpu.results import NO_TIME
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.tables import entry, report

SIZE = SIZES[0]
GIB = 2**30
MACHINE = {
    "device": "NVIDIA H100", "driver": "580", "packages": {"torch": "2.11", "trl": None}, "commit": "abc",
    "date": "2026-01-01",
}  # fmt: skip
ERRORS = {"loss": 1e-6, "pir": 2e-5, "dhidden": 1e-3, "dlm_head": 2e-3}


def race(**seconds: list[float]) -> dict:
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    return {"matmul_flops": 8e14, "bandwidth": 3e12, "rounds": rounds}


FIRST = {
    "parts/ceilings": {"matmul_flops": 8e14, "bandwidth": 3e12},
    f"parts/{SIZE}/dh": {"seconds": 0.006, "fastest": 0.006, "predicted": 0.0059, "tflops": 700.0},
    f"parts/{SIZE}/operands of products": {"timed": 1},
    f"parts/{SIZE}/token_logprobs": {"seconds": 0.012, "matmul_seconds": 0.01},
    f"ways/trainable/{SIZE}/perce_fused": {
        "correct": True,
        "errors": ERRORS,
        "peak_extra_bytes": 5 * GIB,
        "seconds": 0.04,
    },
    f"ways/trainable/{SIZE}/race": race(perce_fused=[0.030, 0.031, 0.032]),
    f"tiles/row_loss/{SIZE}/2048-w8-s3": {"seconds": 0.003, "ratio": 1.0},
    f"tiles/row_loss/{SIZE}/1024-w4-s3": {"seconds": 0.002, "ratio": 0.7},
    f"tiles/row_loss/{SIZE}/4096-w8-s3": {"reason": "OutOfResources: shared memory"},
    f"budgets/{SIZE}/fused/1 GiB": {"seconds": 0.030, "rows": 1024, "shipped": False},
    f"budgets/{SIZE}/fused/2 GiB": {"seconds": 0.027, "rows": 2048, "shipped": True},
    f"budgets/{SIZE}/fused/4 GiB": {"reason": "out of memory"},
    "steps/perce/8192": {"seconds": 1.5, "tokens_per_second": 5461.3, "peak_bytes": 30 * GIB},
    "steps/perce/131072, persona_grad none": {"seconds": 41.0, "tokens_per_second": 3197.0, "peak_bytes": 40 * GIB},
    "steps/perce/8192/plan": {"planned_bytes": 31 * GIB, "planned_flop": 1e15},
    "stages/parts": {"seconds": 12.0},
}
SECOND = {
    f"peers/trainable/{SIZE}/perce": {"correct": True, "errors": ERRORS, "peak_extra_bytes": 3 * GIB, "seconds": 1.0},
    f"peers/trainable/{SIZE}/naive_bf16": {
        "correct": False, "errors": ERRORS | {"pir": 0.031}, "peak_extra_bytes": None, "seconds": 0.05,
    },
    f"peers/trainable/{SIZE}/naive": {"correct": True, "errors": ERRORS, "peak_extra_bytes": 2**30, "seconds": 0.06},
    f"peers/trainable/{SIZE}/trl": {"reason": "trl is not installed"},
    f"peers/trainable/{SIZE}/compiled": {"reason": NO_TIME},
    f"peers/trainable/{SIZE}/race": race(perce=[0.027, 0.027, 0.028], naive_bf16=[0.05, 0.04, 0.06]),
    f"quack/trainable/{SIZE}/quack_exact": {"correct": True, "errors": ERRORS, "peak_extra_bytes": 1, "seconds": 0.03},
    f"quack/trainable/{SIZE}/perce": {"correct": True, "errors": ERRORS, "peak_extra_bytes": 1, "seconds": 0.09},
    f"quack/trainable/{SIZE}/race": race(perce=[0.09], quack_exact=[0.04]),
    "tests/summary": {"status": 1, "last_words": "== 1 failed, 90 passed in 80s ==", "failures": ["tests/x.py::y"]},
}  # fmt: skip


def trees() -> list[dict]:
    return [{"schema": 2, "command": f"gpu_{name}", "machine": MACHINE, "lines": lines}
            for name, lines in (("a", FIRST), ("b", SECOND))]  # fmt: skip


def test_tables_of_both_commands(tmp_path, monkeypatch, capsys):
    paths = []
    for tree in trees():
        paths.append(tmp_path / f"{tree['command']}.json")
        paths[-1].write_text(json.dumps(tree))
    monkeypatch.setattr(sys, "argv", ["table", *map(str, paths)])
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA H100, driver 580, torch 2.11, commit abc, 2026-01-01."
    for line in (
        "| 4096 × 4096 × 128256 | fp32 logits of both passes by cuBLAS | 31.0 (1.44) | 26.3 (1.22) |",
        "| 4096 × 4096 × 128256 | no counterfactual logits, factual ones in 16 bits, by our GEMM | not measured | "
        "24.3 (1.13) |",
        "| trainable head, ms (÷ floor), * of a single step | 4096 × 4096 × 128256 |",
        "| **perce** | 27.0 (1.25) |",
        "| PyTorch, bf16 logits | 50.0, PIR off by 0.03 |",  # no ratio: it is compared with nothing
        "| PyTorch, fp32 logits | 60.0* (2.79) |",  # its first step: it did not come to the rounds
        "| quack, all logits, exact weights | 40.0 (1.86) |",
        "| **perce** | not measured |",  # frozen
        "| **perce** | 3.00 |",
        "| **perce** | 2.0e-05 / 1.0e-03 / 2.0e-03 |",
        "| torch.compile, fp32 logits | not measured |",
        "| 4096 × 4096 × 128256 | 800 | 3.00 | 21.5 / 16.1 | 1.20 |",
        "| 4096 × 4096 × 128256 | dh | 6.000 | 5.900 | 1.02 | 700 |",
        "| 4096 × 4096 × 128256 | fp32 logits of both passes by cuBLAS | "
        "1024 (1 GiB): 30.0, **2048 (2 GiB): 27.0**, ? (4 GiB): failed |",
        "| row_loss | 4096 × 4096 × 128256 | 1024-w4-s3 0.70, 2048-w8-s3 1.00 |",
        "| perce, 8192 tokens | 1.50 | 5461 | 30.0 | 31.0 |",
        "| perce, 131072 tokens, persona_grad none | 41.00 | 3197 | 40.0 | not measured |",
        "GPU tests: 1 failed, 90 passed in 80s.",
        "- failed: tests/x.py::y",
        f"- TRL fused head: trl is not installed (peers/trainable/{SIZE})",
        f"- 4096-w8-s3: OutOfResources: shared memory (tiles/row_loss/{SIZE})",
    ):
        assert line in lines, line
    assert not any(line.startswith("| TRL") and "failed" in line for line in lines), "its reason is below"
    assert not any(NO_TIME in line for line in lines)


def test_our_own_entry_is_that_of_the_race_with_the_peers():
    lines = FIRST | SECOND
    assert entry(lines, "trainable", SIZE, "perce").seconds == 0.027
    assert entry(lines, "trainable", SIZE, "perce_fused").seconds == 0.031
    without = lines | {f"peers/trainable/{SIZE}/race": race(naive=[0.1])}
    assert entry(without, "trainable", SIZE, "perce").seconds == 0.09, "rounds elsewhere rather than a single step"
    assert entry(lines, "trainable", SIZE, "trl").seconds is None and entry(lines, "frozen", SIZE, "perce") is None


def test_tables_without_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "none.json")])
    table.main()
    text = capsys.readouterr().out
    assert text.startswith("GPU: not measured.") and "failed" not in text
    assert "| **perce** | not measured | not measured | not measured | not measured |" in text.splitlines()


def test_a_race_without_rounds_has_a_reason_only():
    lines = SECOND | {f"peers/trainable/{SIZE}/race": {"reason": NO_TIME}}
    tree = {"schema": 2, "command": "gpu_b", "machine": MACHINE, "lines": lines}
    assert entry(lines, "trainable", SIZE, "naive").seconds is None and "not measured" in report([tree])


def test_a_command_that_was_cut_off_at_once():
    tree = {"schema": 2, "command": "gpu_a", "machine": {}, "lines": {}}
    assert report([tree]).startswith("gpu_a: no process of it started.")
