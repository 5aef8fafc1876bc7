"""`python -m benchmarks.table RESULTS.json`: the README's table from what `--benchmark-json` wrote."""

import json
import sys
from collections.abc import Iterator
from typing import Any

HEADER = "| what | measured |\n| --- | --- |"


def lines(results: dict[str, Any]) -> Iterator[str]:
    """One table row a benchmark, in the order they ran."""
    for entry in results["benchmarks"]:
        seconds, extra = entry["stats"]["median"], entry["extra_info"]
        name = entry["name"].removeprefix("test_").replace("_", " ")
        facts = [f"{key.replace('_', ' ')} {value}" for key, value in extra.items() if key not in ("torch", "threads")]
        if any(key.startswith("ratio") for key in extra):
            facts.insert(0, f"{seconds:.2f} s")
        yield f"| {name} | {', '.join(facts)} |"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        results = json.load(file)
    cpu = results["machine_info"]["cpu"]
    extra = results["benchmarks"][0]["extra_info"]
    print(f"{cpu.get('brand_raw', 'unknown CPU')}, {extra['threads']} threads, torch {extra['torch']}\n")
    print(HEADER, *lines(results), sep="\n")


if __name__ == "__main__":
    main()
