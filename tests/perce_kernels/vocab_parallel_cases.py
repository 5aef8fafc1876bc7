"""What each rank of a sharded head runs, one case after the other: against the whole head, and the fp64 oracle.

`python -m tests.perce_kernels.vocab_parallel_cases DIRECTORY [slow]`, with torchrun's variables, runs every case of
CASES and writes what failed. A case runs in the group of all three ranks, or of the first two.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from perce_kernels import chunked, contract, fused_perce_loss, ops, token_logprobs
from tests.helpers.device import LiveBytes
from tests.helpers.numerics import (
    IGNORE,
    TRAINABLE,
    Inputs,
    assert_as_accurate_as_torch,
    assert_matches,
    beneath,
    call,
    eager,
    max_error,
    oracle,
)
from tests.helpers.ranks import end_rank
from tests.helpers.shards import (
    CASES,
    GROUPS,
    LAYOUTS,
    SLOW,
    D,
    N,
    Shards,
    V,
    case,
    check,
    inputs_for,
)

OPTIONS = {
    "paper": {},
    "ratio": {"contrast": "ratio", "clip_min": 0.0},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "num_items": {"num_items": 91},
    "batch": {"normalize": "batch"},
    "sequence": {"normalize": "sequence", "seq_id": torch.arange(N) // 4 * 1000 - 3},
    "ignore_index": {"ignore_index": 5},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 1.7},
    "negative scale": {"logit_scale": -0.5},
}
QUICK = ("paper", "none", "softcap and scale")


def register_values() -> None:
    for backend in ("torch", "triton"):
        for i, layout in enumerate(LAYOUTS):
            quick = backend == "torch" or "empty" in layout
            case(f"{backend}: {layout}", slow=not quick)(
                lambda b=backend, y=layout, c=bool(i % 2): check(y, b, compact=c)
            )
        for name, options in OPTIONS.items():
            for source in ("hidden_cf", "logp_cf", "token_weight"):
                for compact in (True, False):
                    quick = backend == "torch" or (name in QUICK and source == "hidden_cf" and compact)
                    case(f"{backend}: {name}, {source}, {'compact' if compact else 'masked'}", slow=not quick)(
                        lambda b=backend, s=source, c=compact, o=options: check(
                            "three uneven", b, source=s, compact=c, **o
                        )
                    )


register_values()


def for_both(name: str, *, slow: tuple[str, ...] = ()):
    """A case for each backend, which is the function's argument."""

    def register(run: Callable[[str], None]):
        for backend in ("torch", "triton"):
            case(f"{backend}: {name}", slow=backend in slow)(lambda backend=backend: run(backend))
        return run

    return register


@for_both("log-probabilities and entropy")
def log_probabilities_and_entropy(backend: str) -> None:
    for layout in ("three uneven", "three, middle empty"):
        shards = Shards(layout)
        if shards.rank < 0:
            continue
        inputs = inputs_for(layout)
        outcomes = []
        for mine, arguments in ((inputs, {}), (shards.shard(inputs), shards.arguments)):
            leaves = [x.clone().requires_grad_() for x in (mine.hidden, mine.lm_head, mine.bias)]
            logp, entropy = token_logprobs(
                leaves[0], leaves[1], mine.target, bias=leaves[2], softcap=6.0, return_entropy=True, backend=backend,
                **arguments,
            )  # fmt: skip
            (logp * torch.linspace(-1, 2, N)).sum().backward()
            outcomes.append([logp.detach(), entropy, *(x.grad for x in leaves)])
        whole, actual = outcomes
        whole = [*whole[:3], *(x[shards.rows] for x in whole[3:])]
        for a, b in zip(actual, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-5, atol=5e-6)
        shards.assert_same_on_every_rank(*actual[:3])


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


@for_both("same bits twice", slow=("triton",))
def same_bits_twice(backend: str) -> None:
    shards, inputs = Shards("three"), inputs_for("three", dtype=torch.bfloat16)
    first, second = (shards.call(inputs, backend=backend) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.stats, second.stats, strict=True))
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in TRAINABLE)


@for_both("peaked bf16")
def peaked_bf16(backend: str) -> None:
    shards, inputs = Shards("three"), inputs_for("three", dtype=torch.bfloat16, spread=14.0)
    actual, in_torch, expected = shards.call(inputs, backend=backend), eager(inputs), oracle(inputs)
    assert max_error(actual.stats.pir, expected.stats.pir) <= 1e-3
    in_torch, expected = shards.of(in_torch), shards.of(expected)
    for name in TRAINABLE:
        assert actual.grads[name].dtype == torch.bfloat16
        assert_as_accurate_as_torch(name, actual.grads[name], in_torch.grads[name], expected.grads[name])


@case("triton: memory")
def memory() -> None:
    """The formula of an unsharded vocabulary, at this rank's."""
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
            slack = 600  # of what three ranks' table of shards is made of
            assert expected - 4 * V <= extra <= expected + 48 * n + slack, (n, cut, list(weights), extra - expected)
    driver.cut_of = cut_of


@for_both("faint fp16 gradients")
def faint_fp16_gradients(backend: str) -> None:
    shards, inputs = Shards("three"), inputs_for("three", dtype=torch.float16, spread=8.0)
    for options in ({"num_items": 100, "upstream": 4096.0}, {"reduction": "none", "upstream": 64.0}):
        actual, expected = shards.call(inputs, backend=backend, **options), shards.of(oracle(inputs, **options))
        for name in TRAINABLE:
            wanted = expected.grads[name]
            torch.testing.assert_close(
                actual.grads[name].double(), wanted, rtol=4e-3, atol=1e-3 * float(wanted.abs().max())
            )


@for_both("fp64")
def fp64(backend: str) -> None:
    shards, inputs = Shards("three, middle empty"), inputs_for("three, middle empty", dtype=torch.float64)
    assert_matches(shards.call(inputs, backend=backend), shards.of(oracle(inputs)), torch.float64)


@for_both("nothing to learn")
def nothing_to_learn(backend: str) -> None:
    for n, compact in ((0, True), (6, True), (6, False)):
        shards, inputs = Shards("three uneven"), inputs_for("three uneven", n=6)
        inputs.target.fill_(IGNORE)
        inputs = Inputs(inputs.hidden[:n], inputs.lm_head, inputs.target[:n], inputs.hidden_cf[:n], inputs.bias)
        for reduction in ("mean", "none"):
            result = shards.call(inputs, compact=compact, reduction=reduction, backend=backend)
            assert not result.loss.any() and not any(x.any() for x in (*result.stats, *result.grads.values()))


@for_both("NaN in ignored rows", slow=("triton",))
def nan_in_ignored_rows(backend: str) -> None:
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    ignored = inputs.target == IGNORE
    assert ignored.any()
    for compact in (True, False):
        clean = shards.call(inputs, compact=compact, backend=backend)
        bad = Inputs(inputs.hidden.clone(), inputs.lm_head, inputs.target, inputs.hidden_cf.clone(), inputs.bias)
        bad.hidden[ignored] = bad.hidden_cf[ignored] = torch.nan
        result = shards.call(bad, compact=compact, backend=backend)
        assert all(torch.equal(result.grads[name], clean.grads[name]) for name in TRAINABLE)
        assert all(torch.equal(a, b) and not a[ignored].any() for a, b in zip(result.stats, clean.stats, strict=True))


@for_both("a shard masked by its bias")
def a_shard_masked_by_its_bias(backend: str) -> None:
    """As a vocabulary is padded to a multiple of the ranks: nothing but −inf on the last one."""
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    inputs.target[inputs.target >= 130] = 7
    inputs.bias[130:] = -torch.inf
    result = shards.call(inputs, backend=backend)
    assert result.grads["lm_head"].isfinite().all()
    assert_matches(result, shards.of(oracle(inputs)), torch.float32)
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
    expected = shards.of(oracle(inputs))
    inputs.bias.add_(65536)
    assert_matches(shards.call(inputs, backend=backend), expected, torch.float32)


@for_both("a nearly certain target")
def a_nearly_certain_target(backend: str) -> None:
    """p = 0.9999: its gradient is expm1(logp) on the rank that holds it, and the rest lies with the others."""
    lm_head, hidden = torch.zeros(V, 2), torch.tensor([[1.0, 0.0]])
    lm_head[60, 0] = 14.0
    inputs = Inputs(hidden, lm_head, torch.tensor([60]), None, torch.zeros(V))
    shards, weight = Shards("three"), {"token_weight": torch.ones(1)}
    expected = shards.of(oracle(inputs, **weight))
    for dtype in (torch.float32, torch.bfloat16):
        actual = shards.call(inputs.to(dtype), **weight, backend=backend).grads["bias"]
        torch.testing.assert_close(actual.double(), expected.grads["bias"], rtol=1e-2, atol=0)


@for_both("collectives")
def collectives(backend: str) -> None:
    """Two a chunk, with the kernels two a block besides, for the other pass; one for dhidden, if that trains."""
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
    """On a GPU an id outside the vocabulary is seen by an assertion that nobody waits for: NaN, not a number."""
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
        ops.logprobs_op,
        (leaves[0], leaves[1], mine.target, leaves[2], IGNORE, 9.0, 0.5, False, True, *placement),
    )


@for_both("torch.compile without a graph break", slow=("triton",))
def torch_compile_without_a_graph_break(backend: str) -> None:
    torch.compiler.reset()
    shards, inputs = Shards("three uneven"), inputs_for("three uneven")
    compiled = torch.compile(fused_perce_loss, fullgraph=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        result = call(shards.shard(inputs), op=compiled, **shards.arguments, reduction=reduction, backend=backend)
        assert_matches(result, shards.of(oracle(inputs, reduction=reduction)), torch.float32)


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
    """One rank: every case, in the same order everywhere, to the first that fails: ranks may be out of step then."""
    from perce_kernels.gpu import driver
    from perce_kernels.gpu.cut import Cut

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    GROUPS["three"], GROUPS["two"] = dist.group.WORLD, dist.new_group([0, 1])
    # 16 rows a chunk by the whole vocabulary; by a shard's own size it would be more, and other on each rank.
    chunked.LOGITS_BYTES, driver.cut_of = 16 * V * 4, lambda n, d, v, *_: Cut(16 * V // v, 7 * V // v)
    results = {}
    for name, run in CASES.items():
        if (name in SLOW) != slow or (dist.get_rank() == 2 and ": two" in name):
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
