"""CSV files of a few rows, and what is read from them."""

from pathlib import Path

from perce import load_examples

HEADER = "persona,query,response"


def csv_file(path: Path, *lines: str, header: str = HEADER) -> Path:
    path.write_bytes("\n".join([header, *lines, ""]).encode())
    return path


def replies(path, **options):
    return [(example.source.partition(":")[2], example.response) for example in load_examples(path, "train", **options)]
