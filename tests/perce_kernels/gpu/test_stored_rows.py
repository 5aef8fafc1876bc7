"""The logits that the GEMM stores in 16 bits, and the gradient from them, tested alone against fp64."""

import math

import pytest
import torch

from tests.helpers.device import DEVICE
from tests.helpers.subjects import TRITON

pytest.importorskip("triton")
from perce_kernels import reference
from perce_kernels.gpu import lse_gemm, stored_rows, tiles

D, V = TRITON.d, TRITON.v
pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "memory_is_checked")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ARCHITECTURE = tiles.architecture(DEVICE)
TILE = tiles.find("store_gemm", ARCHITECTURE, torch.bfloat16)
TILE_COLUMNS = TILE.statistics_columns
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
FORMS = {"shipped": TILE, "halves by descriptors": tiles.Tile(16, 256, 32, 4, 1, use_tma=True, persistent=True)}


@HALVES
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("form", FORMS)
def test_error_of_the_stored_logits_is_within_its_bound(monkeypatch, dtype, softcap, form):
    """|Δp_v| ≤ u/e · p_t, as the docstring derives, plus the rounding of dz itself; with a softcap 2/cap more."""
    row = tiles.Row("store_gemm", ARCHITECTURE, tiles.HALF, FORMS[form])
    monkeypatch.setattr(tiles, "TABLE", (row, *tiles.TABLE))
    inputs = TRITON.inputs(n=4, d=64, spread=9.0, ignored=0.0).to(dtype)
    h, w, y = inputs.hidden, inputs.lm_head, inputs.target
    stored = torch.full((4, 256), torch.nan, dtype=dtype, device=DEVICE)
    rows = lse_gemm.statistics(h, w, y, None, stored=stored, softcap=softcap)
    z = reference.logits(h.double(), w.double(), None, softcap, 1.0)
    tile_max = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in z.split(TILE_COLUMNS, 1)], 1)
    torch.testing.assert_close(stored[:, :V].double(), z - tile_max, rtol=1.01 * ROUNDING[dtype], atol=2e-5)
    assert (stored[:, V:] == -torch.inf).all()

    one = torch.ones(4, device=DEVICE)
    stored_rows.stored_gradient(stored, rows, y, rows.logp, one, None, v=V, softcap=softcap)
    p, bent = z.softmax(1), 1.0 if softcap is None else 1 - (z / softcap) ** 2
    wanted = (p - torch.nn.functional.one_hot(y, V)) * bent
    in_tile = (tile_max - z).neg().exp()  # p_v / p_t
    bound = p / in_tile * ROUNDING[dtype] / math.e * (1 if softcap is None else 1 + 2 / softcap)
    error = (stored[:, :V].double() - wanted).abs()
    assert (error <= 1.01 * bound + ROUNDING[dtype] * wanted.abs() + 1e-6).all()
    away = torch.nn.functional.one_hot(y, V) == 0
    assert (error > 2 * ROUNDING[dtype] * wanted.abs())[away & (p > 1e-4)].any(), "the stored logits do cause an error"
