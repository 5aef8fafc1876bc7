"""`python -m benchmarks.table RESULTS.json …` prints the README's tables from the results of benchmarks.

On a CPU these are written by `--benchmark-json` or `make slow`; benchmarks without numbers have no row. On a GPU they
are written by `make gpu-a` and `make gpu-b`, both files at once; tables of a missing file say "not measured".
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.tables import report

NAMES = {"perce": "**perce**", "compiled": "torch.compile(naive)", "linear_cross_entropy": "F.linear_cross_entropy"}
NOT_MEASURED = "not measured"


def times(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Loss, forward and backward: median seconds, and the ratio to the naive loss, timed alternately."""
    yield "| loss, forward and backward | N × D × V, dtype | seconds | ÷ naive |\n| --- | --- | --- | --- |"
    for entry in entries:
        if match := re.fullmatch(r"test_(perce|rival)_against_naive\[(?:(\w+)-)?(\d+x\d+x\d+)-(\w+)]", entry["name"]):
            _, rival, size, dtype = match.groups()
            seconds, ratio = entry["stats"]["median"], entry["extra_info"]["ratio_to_naive"]
            name, size = NAMES[rival or "perce"], size.replace("x", " × ")
            yield f"| {name} | {size}, {dtype} | {seconds:.2f} | {ratio:.2f} |"


def memory(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Peak extra memory of the same implementations, each in a process of its own."""
    yield "| peak extra memory | MiB | ÷ naive |\n| --- | --- | --- |"
    for entry in entries:
        extra = entry["extra_info"]
        if match := re.fullmatch(r"test_peak_memory_is_a_quarter_of_naive\[(\w+)]", entry["name"]):
            yield f"| **perce**, {match[1]} | {extra['peak_extra_mib']} | {extra['memory_ratio_to_naive']:.2f} |"
            yield f"| naive, {match[1]} | {extra['naive_peak_extra_mib']} | 1 |"
        if match := re.fullmatch(r"test_peak_memory_of_rival\[(\w+)]", entry["name"]):
            yield f"| {NAMES[match[1]]}, float32 | {extra['peak_extra_mib']} | |"
        if entry["name"] == "test_peak_memory_is_flat_in_n":
            sizes = extra["peak_extra_mib"]
            yield f"| **perce**, D = 64, N = {', '.join(sizes)} | {', '.join(map(str, sizes.values()))} | |"


def steps(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Whole training steps of a model of SmolLM2-135M's shape."""
    yield "| training step, 2 × (persona + 128) tokens | PerCE, seconds | ÷ cross-entropy |\n| --- | --- | --- |"
    for entry in entries:
        if entry["name"].startswith("test_perce_step"):
            extra = entry["extra_info"]
            seconds = extra["ce_seconds"] * extra["ratio_to_ce"]
            yield f"| persona of {extra['persona_tokens']} tokens | {seconds:.2f} | {extra['ratio_to_ce']:.2f} |"


def over_personas(what: str, columns: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| {what}, persona of | {' | '.join(str(c['persona_tokens']) for c in columns)} |"
    yield "| --- |" + " --- |" * len(columns)


def contexts(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Peak extra memory of one step for several persona lengths, by memory option."""
    columns = [e["extra_info"] for e in entries if e["name"].startswith("test_memory_of_a_step")]
    if columns:
        yield from over_personas("MiB of a step", columns)
        for way in dict.fromkeys(way for c in columns for way in c["peak_extra_mib"]):
            yield f"| {way} | {' | '.join(str(c['peak_extra_mib'].get(way, NOT_MEASURED)) for c in columns)} |"


def trainers(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Steps of whole trainers for several persona lengths: peak extra memory, and factual tokens per second."""
    columns = [e["extra_info"] for e in entries if e["name"].startswith("test_a_step_by_trainer")]
    if columns:
        yield from over_personas("MiB (tokens/s) of a step", columns)
        for way in dict.fromkeys(way for c in columns for way in [*c["peak_extra_mib"], *c["out_of_memory"]]):
            cells = [
                f"{c['peak_extra_mib'][way]} ({c['tokens_per_second'][way]})"
                if way in c["peak_extra_mib"]
                else "out of memory"
                if way in c["out_of_memory"]
                else NOT_MEASURED
                for c in columns
            ]
            yield f"| {way} | {' | '.join(cells)} |"


def overheads(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Time of the counterfactual pass as a share of the rest of a step: measured / expected line / planned."""
    rows = [e for e in entries if e["name"].startswith("test_overhead")]
    if rows:
        personas = list(rows[0]["extra_info"]["line"])
        yield f"| measured / line / planned, persona of | {' | '.join(personas)} |"
        yield "| --- |" + " --- |" * len(personas)
    for entry in rows:
        extra, way = entry["extra_info"], entry["name"].partition("[")[2].rstrip("]")
        shares = [" / ".join(f"{extra[kind][p]:.1%}" for kind in ("measured", "line", "planned")) for p in personas]
        yield f"| {way.replace('-', ', ')} | {' | '.join(shares)} |"


def plans(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Predictions of plans compared with real steps of random models; time compared with the lower bound."""
    yield "| step | planned, MiB | measured, MiB | difference | time ÷ bound |\n| --- | --- | --- | --- | --- |"
    for entry in entries:
        if match := re.fullmatch(r"test_plan_against_real_steps\[(.+)]", entry["name"]):
            extra = entry["extra_info"]
            sizes = f"{extra['predicted_mib']} | {extra['measured_mib']} | {extra['difference']:+.1%}"
            yield f"| {match[1]} | {sizes} | {extra['step_seconds'] / extra['least_seconds']:.1f} |"


def scale(entries: list[dict[str, Any]]) -> Iterator[str]:
    """From rows on disk to the first step, by stage, for a first start and one that finds the pairs in the cache."""
    yield "| rows to first step | stage | µs per row | CPU µs | bytes per row | cached, µs |\n" + "| --- " * 6 + "|"
    for entry in entries:
        if entry["name"].startswith("test_from_rows_to_the_first_step"):
            extra = entry["extra_info"]
            for stage, seconds in extra["first_seconds"].items():
                one, cpu, again = (
                    x / extra["rows"] * 1e6
                    for x in (seconds, extra["first_cpu_seconds"][stage], extra["cached_seconds"][stage])
                )
                yield (
                    f"| {extra['rows']:,}, {extra['rows_a_user']} per user | {stage} | {one:.0f} | {cpu:.0f} | "
                    f"{extra['first_bytes_a_row'][stage]:,} | {again:.0f} |"
                )


def measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The benchmarks that have their numbers, each as {"name", "stats", "extra_info"}."""
    if "tests" in results:  # written by make slow
        passed = {name: test for name, test in results["tests"].items() if test["outcome"] == "passed"}
        return [
            {"name": name.partition("::")[2], "stats": test["benchmark"], "extra_info": test["benchmark"]["extra_info"]}
            for name, test in passed.items()
            if "benchmark" in test
        ]
    return [entry for entry in results["benchmarks"] if entry["extra_info"].keys() - {"torch", "threads"}]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in map(Path, sys.argv[1:]) if path.exists()]
    if all("schema" in tree for tree in files):
        print(report(files))
        return
    results = files[0]
    entries = measured(results)
    if not entries:
        sys.exit(f"{sys.argv[1]}: expected results of benchmarks, found none with numbers")
    if "tests" in results:
        cpu, date = results["cpu"], results["date"]
    else:
        cpu, date = results["machine_info"]["cpu"].get("brand_raw", "unknown CPU"), results["datetime"]
    extra = entries[0]["extra_info"]
    print(f"{cpu}, {extra['threads']} threads, torch {extra['torch']}, {date[:10]}.")
    for table in (times, memory, steps, contexts, trainers, overheads, plans, scale):
        if len(rows := list(table(entries))) > 1:
            print("", *rows, sep="\n")


if __name__ == "__main__":
    main()
