"""From rows on disk to the first step, by stage: seconds, and bytes per row of the process and its children.

Here with 20,000 rows; `python -m benchmarks.data_scale 1000000` needs a machine without other work.
"""

import pytest

from benchmarks.data_scale import measure

ROWS = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("rows_a_user", [1, 10])
def test_from_rows_to_the_first_step(benchmark, rows_a_user):
    found = benchmark.pedantic(measure, args=(ROWS, rows_a_user), rounds=1)
    first, second = found["starts"]
    assert first["pairs"] == second["pairs"] and 0.85 * ROWS < first["pairs"] < ROWS, "a tenth of the users is held out"
    benchmark.extra_info["rows"], benchmark.extra_info["rows_a_user"] = ROWS, rows_a_user
    for name, start in (("first", first), ("cached", second)):
        benchmark.extra_info[f"{name}_seconds"] = start["seconds"]
        benchmark.extra_info[f"{name}_cpu_seconds"] = start["cpu_seconds"]
        benchmark.extra_info[f"{name}_bytes_a_row"] = {
            stage: round(size / ROWS) for stage, size in start["peak_bytes"].items()
        }
    assert second["seconds"]["pairing"] < first["seconds"]["pairing"]
