"""Statistics of rows from parts of their columns: from tiles, and from the blocks that cuBLAS computes."""

import pytest
import torch

from tests.helpers.device import DEVICE
from tests.helpers.numerics import IGNORE, max_error
from tests.helpers.subjects import TRITON

pytest.importorskip("triton")
from perce_kernels import reference
from perce_kernels.gpu import blocked, combine, cut

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter_rounds", "memory_is_checked")
COLUMNS = 8


def parts_of(z: torch.Tensor, target: torch.Tensor) -> combine.TileStatistics:
    """Statistics of tiles of COLUMNS columns of logits (n, V); −∞ and 0 for a tile without a finite entry."""
    tiles = z.double().unflatten(1, (-1, COLUMNS))
    row_max = tiles.amax(2)
    relative = tiles - row_max.clamp(min=-1e300)[..., None]
    p = relative.exp()
    moment = torch.where(p > 0, p * relative, 0).sum(2)
    z_target = z.gather(1, target.clamp(min=0)[:, None])[:, 0]
    per_tile = [x.T.float().contiguous().to(DEVICE) for x in (row_max, p.sum(2), moment)]
    return combine.TileStatistics(*per_tile, z_target.float().to(DEVICE), COLUMNS)


@pytest.mark.parametrize("tiles", [1, 64, 65, 200])
@pytest.mark.parametrize("n", [1, 45])
@pytest.mark.parametrize("offset", [0.0, 65536.0])
def test_tiles_are_combined(tiles, n, offset):
    g = torch.Generator().manual_seed(tiles + n)
    z = torch.randint(-60, 60, (n, tiles * COLUMNS), generator=g) / 4
    z[: n // 2, : tiles // 2 * COLUMNS] = -torch.inf  # half of the tiles in half of the rows, including whole lanes
    target = torch.randint(tiles // 2 * COLUMNS, tiles * COLUMNS, (n,), generator=g)
    target[n // 3] = IGNORE
    found = combine.combine(parts_of(z + offset, target), target.to(DEVICE), IGNORE)
    rows = found._replace(**{name: x.cpu() for name, x in found._asdict().items() if isinstance(x, torch.Tensor)})
    logp = z.double().log_softmax(1)
    valid = target != IGNORE
    expected = torch.where(valid, logp.gather(1, target.clamp(min=0)[:, None])[:, 0], 0)
    entropy = torch.where(valid, -(logp.exp() * logp.clamp(min=-1e300)).sum(1), 0)
    assert max_error(rows.logp, expected) <= 5e-6 and max_error(rows.entropy, entropy) <= 2e-5
    assert torch.equal(rows.row_max, z.amax(1) + offset)
    assert max_error(rows.total, (z - z.amax(1, keepdim=True)).double().exp().sum(1)) <= 1e-3


def test_no_tiles_are_an_empty_sum():
    parts = combine.TileStatistics.empty(0, COLUMNS, 3, DEVICE)
    rows = combine.combine(parts, torch.zeros(3, dtype=torch.int64, device=DEVICE), IGNORE)
    assert not rows.total.any() and (rows.row_max <= -(2**30)).all() and rows.logp.isnan().all()
    assert combine.combine(combine.TileStatistics.empty(9, 4, 0, DEVICE), parts.z_target[:0], IGNORE).logp.shape == (0,)


@pytest.mark.parametrize(
    ("columns", "elements"),
    [
        (64, 256), (128, 640), (64, 2000), (128, 13 * 256),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((128, 256), (64, 640), (128, 2000), (64, 13 * 256))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": -1.7}], ids=["plain", "capped"])
def test_blocks_of_columns(monkeypatch, columns, elements, options):
    """A buffer of one row, and one that holds everything."""
    monkeypatch.setattr(cut, "COLUMNS", columns)
    inputs = TRITON.inputs(bias=True)
    logits = torch.full((elements,), torch.nan, device=DEVICE)
    given = inputs.hidden, inputs.lm_head, inputs.target, inputs.bias
    rows = blocked.statistics(*given, logits, **options)
    doubled = inputs.to(torch.float64)
    expected = reference.logprobs(doubled.hidden, doubled.lm_head, doubled.target, bias=doubled.bias, **options)
    assert max_error(rows.logp, expected[0]) <= 1e-5
    again = blocked.statistics(*given, logits, **options)
    assert torch.equal(rows.logp, again.logp)
