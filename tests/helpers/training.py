"""What the tests of `python -m perce.train` share: a tiny model and data, a run of the command, and a mistake told."""

import pytest

from perce.train import main
from tests.helpers.tiny import save_tiny_model, write_jsonl

ROWS = [
    {
        "user_id": f"u{i % 4}", "persona": [f"I live in town {i}.", "I keep bees."],
        "query": f"Where are you, number {i}?", "response": f"In town {i}, with the bees.",
    }
    for i in range(12)
]  # fmt: skip


@pytest.fixture(name="model", scope="module")
def model_directory(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(name="data", scope="module")
def rows_file(tmp_path_factory):
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS))


@pytest.fixture(name="train")
def training(model, data, tmp_path, capsys):
    """Run main with the tiny model and data unless told otherwise; (exit code, stdout, stderr)."""

    def run(*argv, output_dir=tmp_path / "run", **options):
        flags = {"model": model, "data": data, "output_dir": output_dir, "max_steps": 2, "precision": "fp32"} | options
        argv = [x for name, value in flags.items() if value is not None for x in (f"--{name}", str(value))] + list(argv)
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def fails(result, *fragments):
    """Exit code 2 and one paragraph that holds every fragment."""
    code, _, err = result
    assert code == 2, err
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "Traceback" not in err and err.rstrip().endswith(message[0])
    for fragment in fragments:
        assert fragment in message[0], f"{fragment!r} not in {message[0]!r}"
