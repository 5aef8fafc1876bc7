"""A tiny model, rows to train it on, and runs of the commands."""

import os
import sys
from functools import cache, partial

import jinja2
import pytest

from perce import score
from perce.report.curves import write_curves
from perce.train import main
from tests.helpers.tiny import save_tiny_model, write_jsonl
from tests.helpers.training import LIMIT, ROWS, printed_by


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """A save waits until the disk has each of its files, milliseconds every time. No test loses its power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def cards_are_compiled_once():
    """PEFT and TRL write a card beside every save, and compile its template anew each time, which takes longer than to
    save a tiny adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", cache(jinja2.Template))
        yield


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Curves of nothing, and the first plan that was made, with the counts that it was made from."""
    path = tmp_path_factory.mktemp("picture") / "curves.png"
    write_curves(path, [])
    return path.read_bytes(), {}


@pytest.fixture(autouse=True)
def quick_runs(request, kept, monkeypatch):
    """A tiny run's curves and plan take half of its time: no curves are drawn, and one plan stands for all.
    `whole` marks tests whose runs leave nothing out."""
    if "perce.running.fits" not in sys.modules or request.node.get_closest_marker("whole"):
        return  # tests that never train need not import what trains
    from perce.planning.memory import count, peak_memory

    picture, plans = kept  # whichever test plans first decides for all: a test of a plan's numbers is `whole`

    def once(made, *args):
        if made not in plans:
            plans[made] = made(*args)
        return plans[made]

    for made in (count, peak_memory):
        monkeypatch.setattr(f"perce.running.fits.{made.__name__}", partial(once, made))
    monkeypatch.setattr("perce.running.summary.write_curves", lambda path, *_, **__: path.write_bytes(picture))


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
