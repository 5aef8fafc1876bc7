"""The cases that each rank of a sharded head runs, compared with the whole head and with the fp64 oracle.

`python -m tests.perce_kernels.vocab_parallel_cases DIRECTORY [slow]`, with torchrun's variables, runs every case of
CASES and writes what failed. A case runs in the group of all three ranks, or of the first two.
"""

import gc
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from perce_kernels import chunked, contract, fused_perce_loss, ops, token_logprobs
from tests.helpers.device import LiveBytes
from tests.helpers.interpreter import patch_the_language_once
from tests.helpers.numerics import IGNORE, TRAINABLE, Inputs, assert_matches, beneath, call, oracle
from tests.helpers.ranks import end_rank
from tests.helpers.shards import GROUPS, LAYOUTS, D, N, Sharded, Shards, V
from tests.helpers.subjects import SOURCES
from tests.perce_kernels import test_loss

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[[], None]] = {}
SLOW: set[str] = set()


def case(name: str, *, slow: bool = False):
    def register(run: Callable[[], None]):
        assert name not in CASES
        CASES[name] = run
        if slow:
            SLOW.add(name)
        return run

    return register


def for_both(name: str, *, slow: tuple[str, ...] = ()):
    """Makes a case for each backend, which the function gets as its argument."""

    def register(run: Callable[[str], None]):
        for backend in ("torch", "triton"):
            case(f"{backend}: {name}", slow=backend in slow)(partial(run, backend))
        return run

    return register


# --- The contract of an unsharded head -------------------------------------------------------------------------------

OPTIONS = (
    "paper", "ratio", "none", "sum", "num_items int", "batch", "sequence", "ignore_index", "softcap and scale",
    "negative logit_scale",
)  # fmt: skip
QUICK = ("paper", "none", "softcap and scale")  # those that also run in the interpreter


def of_the_contract(test: Callable[..., None], *arguments, layout="three uneven", dtype=FP32, slow=("triton",)) -> None:
    """A case that runs a test of test_loss.py with the head sharded in this layout."""
    values = ", ".join(map(str, (dtype, *arguments)))
    name = f"{test.__name__.removeprefix('test_')}, {layout}: {values}"
    for backend in ("torch", "triton"):
        subject = Sharded("sharded", backend, dtype, layout=layout)
        case(f"{backend}: {name}", slow=backend in slow)(partial(test, subject, *arguments))


def register_the_contract() -> None:
    for i, layout in enumerate(LAYOUTS):
        slow = () if "middle empty" in layout else ("triton",)
        of_the_contract(
            test_loss.test_option_matches_the_oracle, "hidden_cf", "paper", bool(i % 2), layout=layout, slow=slow
        )
    for source, name, compact in itertools.product(SOURCES, OPTIONS, (True, False)):
        if (source, name, compact) != ("hidden_cf", "paper", True):
            if source == "hidden_cf" and compact:
                slow = () if name in QUICK else ("triton",)
            else:
                slow = ("triton",) if name == "paper" else ("torch", "triton")
            of_the_contract(test_loss.test_option_matches_the_oracle, source, name, compact, slow=slow)
    of_the_contract(
        test_loss.test_option_matches_the_oracle, "hidden_cf", "paper", True, layout="three, middle empty",
        dtype=torch.float64, slow=(),
    )  # fmt: skip
    for dtype, slow in ((BF16, ()), (FP16, ("triton",))):
        of_the_contract(test_loss.test_gradients_are_as_accurate_as_torch, dtype, {}, 14.0, layout="three", slow=slow)
    for dtype, slow in ((FP32, ("triton",)), (BF16, ())):
        of_the_contract(
            test_loss.test_gradient_at_a_nearly_certain_target_keeps_its_digits, dtype, 14.0, layout="three", slow=slow
        )
    for options, compact, rows in (({}, True, 0), ({}, True, None), ({"reduction": "none"}, False, None)):
        of_the_contract(
            test_loss.test_nothing_to_learn_is_a_zero_loss_connected_to_every_input, FP32, options, compact, rows,
            slow=("triton",) if rows is None else (),
        )  # fmt: skip
    for compact in (True, False):
        of_the_contract(test_loss.test_nan_in_ignored_rows_reaches_nothing, FP32, "hidden_cf", compact, {}, torch.nan)
        of_the_contract(test_loss.test_same_inputs_same_bits, compact, layout="three")
    of_the_contract(test_loss.test_results_do_not_depend_on_the_default_dtype, BF16, BF16, layout="three")


register_the_contract()


# --- Properties of a sharded head only -------------------------------------------------------------------------------


def inputs_for(layout: str, dtype: torch.dtype = FP32, **options) -> Inputs:
    return Sharded("sharded", "torch", dtype, layout=layout).inputs(bias=True, **options)


@for_both("log-probabilities and entropy")
def log_probabilities_and_entropy(backend: str) -> None:
    for layout in ("three uneven", "three, middle empty"):
        shards = Shards(layout)
        inputs = inputs_for(layout)
        outcomes = []
        for mine, arguments in ((inputs, {}), (shards.shard(inputs), shards.arguments)):
            leaves = [x.clone().requires_grad_() for x in (mine.hidden, mine.lm_head, mine.bias)]
            logp, entropy, top1 = token_logprobs(
                leaves[0], leaves[1], mine.target, bias=leaves[2], softcap=6.0, return_entropy=True, return_top1=True,
                backend=backend, **arguments,
            )  # fmt: skip
            (logp * torch.linspace(-1, 2, N)).sum().backward()
            outcomes.append([logp.detach(), entropy, top1, *(x.grad for x in leaves)])
        whole, actual = outcomes
        whole = [*whole[:4], *(x[shards.rows] for x in whole[4:])]
        for a, b in zip(actual, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-5, atol=5e-6)
        shards.assert_same(*actual[:4])


@for_both("what trains", slow=("triton",))
def what_trains(backend: str) -> None:
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    for reduction in ("mean", "none"):
        complete = shards.call(inputs, reduction=reduction, backend=backend).grads
        for trainable in (("hidden",), ("lm_head",), ("lm_head", "bias"), ()):
            leaves = {
                name: x.clone().requires_grad_(name in trainable) for name, x in shards.shard(inputs).kwargs().items()
            }
            loss = fused_perce_loss(**leaves, **shards.arguments, reduction=reduction, backend=backend).sum()
            assert loss.requires_grad == bool(trainable)
            if trainable:
                loss.backward()
            for name in TRAINABLE:
                grad = leaves[name].grad
                assert torch.equal(grad, complete[name]) if name in trainable else grad is None


@case("triton: memory", slow=True)
def memory() -> None:
    """The memory formula of an unsharded vocabulary, with the size of this rank's shard."""
    from perce_kernels.gpu import driver
    from perce_kernels.gpu.cut import Cut
    from perce_kernels.vocab_parallel import Shard

    shards, cut_of = Shards("three uneven"), driver.cut_of
    for n, cut in ((22, Cut(22, 7)), (90, Cut(40, 16))):
        mine = shards.shard(inputs_for("three uneven", n=n, ignored=0.0))
        for weights in ({}, {"token_weight": torch.ones(n)}):
            inputs = Inputs(mine.hidden, mine.lm_head, mine.target, None if weights else mine.hidden_cf, mine.bias)
            call_of, weighting, needed = beneath(inputs, weights=weights)
            shard = Shard(shards.group, shards.rows.start, V)
            driver.cut_of = lambda *_, cut=cut: cut
            gc.collect()
            with LiveBytes() as live:
                out = driver.sweep(call_of._replace(shard=shard), weighting, needed)
            extra = live.peak - sum(x.untyped_storage().nbytes() for x in out)
            expected = driver.extra_bytes(
                n, D, mine.lm_head.shape[0], 4, cut=cut, way="fused", passes=1 if weights else 2, gathered=False,
                masked=False, needed=needed,
            )  # fmt: skip
            slack = 600  # bytes of the table of three ranks' shards
            assert expected - 4 * V <= extra <= expected + 48 * n + slack, (n, cut, list(weights), extra - expected)
    driver.cut_of = cut_of


@for_both("faint fp16 gradients", slow=("triton",))
def faint_fp16_gradients(backend: str) -> None:
    shards, inputs = Shards("three"), inputs_for("three", dtype=torch.float16, spread=8.0)
    for options in ({"num_items": 100, "upstream": 4096.0}, {"reduction": "none", "upstream": 64.0}):
        actual, expected = shards.whole(shards.call(inputs, backend=backend, **options)), oracle(inputs, **options)
        for name in TRAINABLE:
            wanted = expected.grads[name]
            torch.testing.assert_close(
                actual.grads[name].double(), wanted, rtol=4e-3, atol=1e-3 * float(wanted.abs().max())
            )


@for_both("a shard masked by its bias")
def a_shard_masked_by_its_bias(backend: str) -> None:
    """A vocabulary that is padded to a multiple of the ranks may have only −inf on the last one."""
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    inputs.target[inputs.target >= 130] = 7
    inputs.bias[130:] = -torch.inf
    result = shards.call(inputs, backend=backend)
    assert result.grads["lm_head"].isfinite().all()
    assert_matches(shards.whole(result), oracle(inputs), FP32)
    logp, entropy = token_logprobs(
        inputs.hidden, inputs.lm_head[shards.rows], inputs.target, bias=inputs.bias[shards.rows], return_entropy=True,
        backend=backend, **shards.arguments,
    )  # fmt: skip
    wanted = token_logprobs(
        inputs.hidden, inputs.lm_head, inputs.target, bias=inputs.bias, return_entropy=True, backend="torch"
    )
    torch.testing.assert_close((logp, entropy), wanted, rtol=3e-5, atol=5e-6)


@for_both("a large common offset")
def a_large_common_offset(backend: str) -> None:
    shards, inputs = Shards("three"), inputs_for("three", ignored=0.0)
    inputs.hidden.zero_()
    inputs.hidden_cf.zero_()
    inputs.bias.copy_(torch.randint(-3, 3, inputs.bias.shape, generator=torch.Generator().manual_seed(0)))
    expected = oracle(inputs)
    inputs.bias.add_(65536)
    assert_matches(shards.whole(shards.call(inputs, backend=backend)), expected, FP32)


@for_both("collectives")
def collectives(backend: str) -> None:
    """Two per chunk; with the kernels also two per block, for the other pass; one for dhidden, if that trains."""
    run, shapes = dist.all_reduce, []
    dist.all_reduce = lambda x, *args, **kwargs: shapes.append(tuple(x.shape)) or run(x, *args, **kwargs)
    try:
        shards, inputs = Shards("three uneven"), inputs_for("three uneven", ignored=0.0)
        shards.call(inputs, backend=backend)
        chunks = [(32,), (2, 32), (12,), (2, 12)]
        if backend == "triton":
            chunks = [shape for rows in (16, 7, 7, 2, 6, 6) for shape in ((rows,), (2, rows))]
        assert shapes == [*chunks, (N, D)], shapes
        shapes.clear()
        with torch.no_grad():
            fused_perce_loss(**shards.shard(inputs).kwargs(), **shards.arguments, backend=backend)
        assert shapes == chunks, shapes
    finally:
        dist.all_reduce = run


@case("triton: a target that no check saw")
def a_target_that_no_check_saw() -> None:
    """On a GPU only an asynchronous assertion sees an id outside the vocabulary; the loss must be NaN, not a number."""
    check_target, contract.check_target = contract.check_target, lambda *_: None
    try:
        shards, inputs = Shards("three"), inputs_for("three", n=3, ignored=0.0)
        for token in (V, -1):
            inputs.target[1] = token
            stats = shards.call(inputs, backend="triton").stats
            assert stats.logp.isnan().tolist() == stats.token_weight.isnan().tolist() == [False, True, False]
    finally:
        contract.check_target = check_target


@for_both("opcheck", slow=("torch", "triton"))
def opcheck(backend: str) -> None:
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    mine = shards.shard(inputs)
    leaves = [x.clone().requires_grad_() for x in (mine.hidden, mine.lm_head, mine.bias)]
    placement = (backend, shards.group.group_name, shards.rows.start, V)
    torch.library.opcheck(
        ops.loss_op,
        (leaves[0], leaves[1], mine.target, mine.hidden_cf, None, None, leaves[2], 0.8, 5.0, "log", IGNORE, 9.0, 0.5,
         True, True, True, True, *placement),
    )  # fmt: skip
    torch.library.opcheck(
        ops.logprobs_op, (leaves[0], leaves[1], mine.target, leaves[2], IGNORE, 9.0, 0.5, False, True, *placement)
    )


@for_both("forward-mode AD and transforms", slow=("triton",))
def forward_mode_ad_and_transforms(backend: str) -> None:
    """Refused on every rank before ranks communicate; a batch of targets is a loop, which is the same on all ranks."""
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    mine = shards.shard(inputs).kwargs() | shards.arguments | {"backend": backend}

    def run(**changed) -> torch.Tensor:
        return fused_perce_loss(**mine | changed)

    hidden = inputs.hidden
    for ask in (
        lambda: torch.func.jvp(lambda x: run(hidden=x), (hidden,), (hidden,)),
        lambda: torch.func.grad(lambda x: run(hidden=x))(hidden),
        lambda: torch.vmap(lambda x: run(hidden=x))(hidden[None]),
    ):
        with pytest.raises(
            RuntimeError, match=r"not supported by the fused op; use backend='reference' \(which takes no"
        ):
            ask()
    targets = torch.stack([inputs.target, inputs.target.roll(1)])
    expected = torch.stack([run(target=target) for target in targets])
    torch.testing.assert_close(torch.vmap(lambda target: run(target=target))(targets), expected)


@for_both("torch.compile without a graph break", slow=("torch", "triton"))
def torch_compile_without_a_graph_break(backend: str) -> None:
    torch.compiler.reset()
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    compiled = torch.compile(fused_perce_loss, fullgraph=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        result = call(shards.shard(inputs), op=compiled, **shards.arguments, reduction=reduction, backend=backend)
        assert_matches(shards.whole(result), oracle(inputs, reduction=reduction), FP32)


@case("shards that do not tile the vocabulary")
def shards_that_do_not_tile_the_vocabulary() -> None:
    inputs = inputs_for("three")
    group, rank = GROUPS["three"], dist.get_rank()
    wrong = {
        "all at 0": [(0, 60)] * 3,
        "a gap": [(0, 58), (59, 116), (116, V)],
        "an overlap": [(0, 58), (57, 116), (116, V)],
        "the end missing": [(0, 58), (58, 116), (116, V - 1)],
        "as many rows as ids": [(1, 87), (1, 87), (1, 2)],
    }
    for name, layout in wrong.items():
        start, end = layout[rank]
        with pytest.raises(ValueError, match=r"vocab_start, vocab_size: expected the shards .* on ranks 0 to 2"):
            fused_perce_loss(
                inputs.hidden, inputs.lm_head[start:end], inputs.target, inputs.hidden_cf, group=group,
                vocab_start=start, vocab_size=V,
            )  # fmt: skip
            pytest.fail(name)
    order = [(58, 116), (116, V), (0, 58)][rank]  # ranks need not be in the order of their ids
    loss = fused_perce_loss(
        inputs.hidden, inputs.lm_head[slice(*order)], inputs.target, inputs.hidden_cf, group=group,
        vocab_start=order[0], vocab_size=V,
    )  # fmt: skip
    torch.testing.assert_close(
        loss, fused_perce_loss(inputs.hidden, inputs.lm_head, inputs.target, inputs.hidden_cf), rtol=3e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="vocab_start, vocab_size: expected the shards"):
        size = V if rank else V + 1
        token_logprobs(
            inputs.hidden, inputs.lm_head[slice(*order)], inputs.target, group=group, vocab_start=order[0],
            vocab_size=size,
        )  # fmt: skip


@case("arguments")
def arguments() -> None:
    shards, inputs = Shards("three"), inputs_for("three")
    mine = shards.shard(inputs).kwargs()
    for change, message in {
        (("vocab_start", None),): "vocab_start: expected group, vocab_start and vocab_size together",
        (("group", None),): "group: expected group, vocab_start and vocab_size together",
        (("vocab_size", None), ("group", None)): "group, vocab_size: expected",
        (("group", "0"),): "group: expected a torch.distributed.ProcessGroup .* got '0'",
        (("vocab_start", 0.0),): "vocab_start: expected an int, got 0.0",
        (("vocab_start", -1),): rf"vocab_start: .* inside \[0, {V}\), got \[-1, ",
        (("vocab_start", V),): rf"vocab_start: .* inside \[0, {V}\), got \[{V}, ",
        (("vocab_size", 3),): r"vocab_start: .* inside \[0, 3\)",
        (("vocab_size", 0),): "vocab_size: expected .* >= 1, got 0",
        (("backend", "reference"),): 'backend: expected "triton", "torch" or "auto" with a group',
    }.items():
        with pytest.raises(ValueError, match=message):
            fused_perce_loss(**mine, **(shards.arguments | dict(change)))
        with pytest.raises(ValueError, match=message):
            token_logprobs(mine["hidden"], mine["lm_head"], mine["target"], **(shards.arguments | dict(change)))
    inputs.target[2] = V
    with pytest.raises(ValueError, match=rf"target: expected ids in \[0, {V}\) .* got {V} at row 2"):
        fused_perce_loss(**shards.shard(inputs).kwargs(), **shards.arguments)


def rank_main(directory: Path, slow: bool) -> None:
    """Runs all cases on one rank, in the same order on all, up to the first failure, after which ranks may differ."""
    from perce_kernels.gpu import driver
    from perce_kernels.gpu.cut import Cut

    patch_the_language_once()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    GROUPS["three"], GROUPS["two"] = dist.group.WORLD, dist.new_group([0, 1])
    # The whole vocabulary gives 16 rows per chunk; a shard's size would give more, and differ between ranks.
    chunked.LOGITS_BYTES, driver.cut_of = 16 * V * 4, lambda n, d, v, *_: Cut(16 * V // v, 7 * V // v)
    results = {}
    for name, run in CASES.items():
        if (name in SLOW) != slow or (dist.get_rank() == 2 and ", two" in name):
            continue
        try:
            run()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
            break
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    end_rank()


if __name__ == "__main__":  # one rank of run_ranks
    rank_main(Path(sys.argv[1]), "slow" in sys.argv[2:])
