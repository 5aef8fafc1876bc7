"""FSDP2 by torch's own fully_shard on two ranks, against one process.

Outside its unit's forward the head's weight is a shard: a loss that read it there would be wrong without an error.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from perce.data.batch import collate
from perce.model.auxiliary import Router
from perce.model.passes import counterfactual_hidden, factual
from perce.objectives import OBJECTIVES, HeadCall
from perce.training.balancing import StepBalance
from perce.training.parallel import keep_outputs_exact
from tests.helpers.ranks import end_rank, run_ranks
from tests.helpers.tiny import demo_pairs
from tests.helpers.trainers import model_for

RANKS, STEPS, BATCH = 2, 3, 4
PAIRS = demo_pairs(8, facts=1)
# The unit that the head is part of: the root's, its own, or one with the final norm (and the embedding it is tied to),
# as in accelerate. A tied head cannot be a unit of its own.
CASES = [
    ("llama", "full", "own"), ("llama", "full", "tail"), ("llama", "lora", "root"), ("llama-tied", "full", "root"),
    ("llama-tied", "full", "tail"), ("llama-tied", "lora", "root"), ("mixtral", "full", "tail"),
    ("mixtral", "lora", "root"),
]  # fmt: skip
KINDS = sorted({case[:2] for case in CASES})


def shard(model, unit, **options):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = [embedding] if embedding.weight is head.weight else []
    for layer in base.model.layers:
        fully_shard(layer, **options)
    if unit != "root":
        fully_shard(head if unit == "own" else [base.model.norm, *tied, head], **options)
    fully_shard(model, **options)
    assert isinstance(head.weight, DTensor) and head.weight.to_local().shape[0] < head.weight.shape[0]
    return model


def over_ranks(tensor):
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def forwards(model, pairs, rank, ranks, mixture=False):
    """Both passes over this rank's share of the pairs: (loss, statistics …); the losses of all ranks add up."""
    batch = collate(pairs[rank::ranks])
    num_items = sum(pair["response_length"] for pair in pairs)
    weighting = OBJECTIVES["perce"].weighting(clip_min=0.05)
    call = HeadCall(batch["target"], weighting, counterfactual_hidden(model, batch), num_items=num_items)
    done = factual(model, batch, call, top_k=2 * mixture)
    if not mixture:
        return done
    return done._replace(loss=done.loss + 0.3 * StepBalance(Router(2, 0.3), over_ranks).share(done.experts))


def train(model, rank=0, ranks=1, mixture=False):
    """(loss and gradient norm of each step, gradients of the first)."""
    parameters = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    history, first = [], {}
    for step in range(STEPS):
        start = step * BATCH % len(PAIRS)
        loss = forwards(model, PAIRS[start : start + BATCH], rank, ranks, mixture).loss
        (loss * ranks).backward()  # FSDP averages over ranks
        first = first or {name: whole(p.grad).clone() for name, p in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append([over_ranks(loss.detach()).item(), whole(norm).item()])
    return history, first


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def low_precision(rank, ranks):
    """Loss and log-probabilities under the bf16 policy that accelerate sets up, as PerceTrainer changes it."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    keep_outputs_exact(plugin)
    policy = plugin.mixed_precision_policy
    assert isinstance(policy, MixedPrecisionPolicy) and policy.param_dtype == torch.bfloat16
    model = shard(model_for("full"), "tail", mp_policy=policy)
    with torch.autocast("cpu", torch.bfloat16):
        done = forwards(model, PAIRS[:BATCH], rank, ranks)
    done.loss.backward()
    total = done.loss.detach()
    dist.all_reduce(total)
    return total, done.logp


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fsdp")
    run_ranks("tests.perce.training.test_parallel", str(directory))
    return torch.load(directory / "result.pt")


@pytest.fixture(scope="module")
def plain():
    return {
        (architecture, kind): train(model_for(kind, architecture=architecture), mixture=architecture == "mixtral")
        for architecture, kind in KINDS
    }


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_steps_equal_those_of_one_process(case, sharded, plain):
    history, gradients = sharded[case]
    expected_history, expected = plain[case[:2]]
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected_history), rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_bf16_policy_rounds_neither_loss_nor_statistics(sharded):
    loss, logp = sharded["bf16"]
    assert loss.dtype == logp.dtype == torch.float32
    assert not torch.equal(logp, logp.bfloat16().float()) and loss != loss.bfloat16().float()
    exact = forwards(model_for("full"), PAIRS[:BATCH], 0, 1).loss
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)


def main(directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {
        case: train(shard(model_for(case[1], architecture=case[0]), case[2]), rank, RANKS, case[0] == "mixtral")
        for case in CASES
    }
    results["bf16"] = low_precision(rank, RANKS)
    if rank == 0:
        torch.save(results, Path(directory) / "result.pt")
    end_rank()


if __name__ == "__main__":  # one rank
    main(sys.argv[1])
