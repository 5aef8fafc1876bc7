"""A model that is scored, and a run of the command on it."""

import json

import pytest

from perce import score
from tests.helpers.tiny import save_tiny_model

LIMIT = 9


@pytest.fixture(name="model", scope="module")
def scored_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "gemma3")


@pytest.fixture(name="run")
def scoring(model, capsys):
    def run(*argv, code=0):
        assert score.main(["--model", str(model), "--limit", str(LIMIT), *map(str, argv)]) == code
        return capsys.readouterr()

    return run


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
