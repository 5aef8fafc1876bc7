"""A plan in the terminal."""

from types import SimpleNamespace

import pytest

from perce.planning.device import GIB
from perce.planning.tables import PHASE_NAMES, _phases
from perce.report.terminal import show


@pytest.mark.parametrize(("size", "told"), [(0.125, "0.12"), (99, "99.00"), (139.5, "139.5"), (1000, "1,000")])
def test_all_phases_fit_into_80_columns(size, told, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    parts = {"optimiser states": int(size * GIB)}
    memory = SimpleNamespace(phases=dict.fromkeys(PHASE_NAMES, parts), parts=parts)
    show(_phases(SimpleNamespace(cost=SimpleNamespace(memory=memory))))
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    assert out.splitlines()[-1].split() == ["sum", *[told] * len(PHASE_NAMES)]
