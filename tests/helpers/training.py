"""Shared by the tests of `python -m perce.train`: rows, and checks of error messages."""

import yaml

from perce.config.commands import TRAIN

LIMIT = 9  # examples that are scored
ROWS = [
    {
        "user_id": f"u{i % 4}", "persona": [f"I live in town {i}.", "I keep bees."],
        "query": f"Where are you, number {i}?", "response": f"In town {i}, with the bees.",
    }
    for i in range(12)
]  # fmt: skip


def fails(result, *fragments):
    """Asserts exit code 2 and an error message of one paragraph that has every fragment."""
    code, _, err = result
    assert code == 2, err
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "Traceback" not in err and err.rstrip().endswith(message[0])
    for fragment in fragments:
        assert fragment in message[0], f"{fragment!r} not in {message[0]!r}"


def printed_by(main, capsys, *fixed):
    """Runs a command with these and further arguments, expects this exit code, and returns what it printed."""

    def run(*argv, code=0):
        assert main([*map(str, (*fixed, *argv))]) == code
        return capsys.readouterr()

    return run


def a_run(path, **options):
    """The directory of a run of perce.train with these options, as far as other commands read it."""
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(TRAIN.build({"data": "own.jsonl", **options}).to_dict()))
    (path / "run.json").write_text("{}")
    return path
