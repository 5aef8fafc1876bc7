"""A tiny model, rows to train it on, and runs of the commands."""

import pytest

from perce import score
from perce.report.curves import write_curves
from perce.train import main
from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.training import LIMIT, ROWS, printed_by


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """Curves of nothing."""
    path = tmp_path_factory.mktemp("picture") / "curves.png"
    write_curves(path, [])
    return path.read_bytes()


@pytest.fixture(autouse=True)
def one_picture(request, picture, monkeypatch):
    """A tiny run's curves take a third of its time. `draws` marks tests for which they are drawn."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("perce.training.summary.write_curves", lambda path, *_, **__: path.write_bytes(picture))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS))


@pytest.fixture
def train(model, data, tmp_path, capsys):
    """Run main with the tiny model and data unless told otherwise; (exit code, stdout, stderr)."""

    def run(*argv, output_dir=tmp_path / "run", **options):
        flags = {"model": model, "data": data, "output_dir": output_dir, "max_steps": 2, "precision": "fp32"} | options
        argv = [x for name, value in flags.items() if value is not None for x in (f"--{name}", str(value))] + list(argv)
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The directory of a model that is scored."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), "gemma3")


@pytest.fixture
def scored(gemma, capsys):
    """Run perce.score with it on the first few examples, unless told otherwise; what was printed."""
    return printed_by(score.main, capsys, "--model", gemma, "--limit", LIMIT)
