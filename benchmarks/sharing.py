"""Peak memory of a step on eight replies of one conversation: `python -m benchmarks.sharing WAY` prints it as JSON.

    shared       up to 32 replies of whole conversations; tokens that they share are computed once
    sequences    eight sequences per batch, padded to the longest, in random order
    tokens       sequences whose lengths differ by a tenth at most, as a token budget batches them if there are many:
                 hardly any padding

Conversations are of real data, or of random ids with the lengths of personachat-convai2. The model has
SmolLM2-135M's shape and random weights, all of which train.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import measured_step, return_freed_blocks

WAYS = ("shared", "sequences", "tokens")
REPLIES, BUDGET = 8, 4096  # replies and tokens per batch: the defaults of a run on a CPU
REPLIES_TOGETHER = 32  # per batch of whole conversations, which do not compute more tokens
LENGTHS = {"persona": 60, "query": 16, "reply": 14}  # about the means of personachat-convai2
Pairs = list[dict[str, Any]]


def conversation(replies: int = REPLIES) -> Pairs:
    """Pairs of random ids; each continues the one before."""
    rng, shown, pairs = random.Random(0), [], []

    def tokens(count: int) -> list[int]:
        return [rng.randrange(49152) for _ in range(count)]

    shown = tokens(8 + LENGTHS["persona"])
    for _ in range(replies):
        shown = shown + tokens(LENGTHS["query"] + LENGTHS["reply"])
        pairs.append(
            {
                "input_ids": shown, "persona_span": (8, 8 + LENGTHS["persona"]), "response_length": LENGTHS["reply"],
                "personal": [False] * LENGTHS["reply"], "conversation": 0,
            }
        )  # fmt: skip
    return pairs


def pairs_of(directory: Path, template: str | None, at_least: int) -> Pairs:
    """The pairs of the first whole conversations of a test split, until there are `at_least` replies."""
    from perce import load_examples
    from perce.data.dataset import conversations
    from perce.data.pairs import PairBuilder
    from perce.demo import default_model_path
    from perce.hub import load_tokenizer

    tokenizer = load_tokenizer(str(default_model_path()))
    tokenizer.chat_template = template or tokenizer.chat_template
    builder = PairBuilder(tokenizer, max_length=5000)
    examples = load_examples(directory, "test", limit=at_least + 100).all
    pairs = [vars(builder.build(example)) for example in examples]
    taken: Pairs = []
    for indices in conversations(pairs):
        if len(taken) < at_least:
            taken += [pairs[index] for index in indices]
    return taken


def batches(way: str, pairs: Pairs) -> list[dict[str, Any]]:
    """The batches of a step's forwards."""
    from perce.data.batch import collate
    from perce.data.dataset import personas
    from perce.training.sampler import ReplyBatches

    if way == "shared":
        whole = ReplyBatches(personas(pairs, "conversation"), REPLIES_TOGETHER, seed=0)
        return [collate([pairs[i] for i in indices], sharing="branches") for indices in whole]
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    dealt: Sequence[Sequence[int]] = [order[start : start + REPLIES] for start in range(0, len(order), REPLIES)]
    if way == "tokens":
        dealt = _of_similar_length([len(pair["input_ids"]) for pair in pairs])
    return [collate([pairs[i] for i in indices]) for indices in dealt]


def _of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Batches of sequences of similar length. TokenBatches would pad these few sequences, which leave its buckets half
    full; with many it would not."""
    from perce.training.sampler import BUCKET_RATIO

    dealt: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        similar = dealt and lengths[index] <= BUCKET_RATIO * lengths[dealt[-1][0]]
        if not similar or (len(dealt[-1]) + 1) * lengths[index] > BUDGET:
            dealt.append([])
        dealt[-1].append(index)
    return dealt


def step(model: Any, dealt: Sequence[Mapping[str, Any]]) -> float:
    """The PerCE loss of all replies, after its backward."""
    import torch

    from perce.model.passes import counterfactual_hidden, factual
    from perce.objectives import OBJECTIVES, HeadCall

    weighting, items = OBJECTIVES["perce"].weighting(), sum(len(batch["target"]) for batch in dealt)
    total = 0.0
    for batch in dealt:
        given = dict(batch)
        call = HeadCall(given["target"], weighting, counterfactual_hidden(model, given), num_items=torch.tensor(items))
        loss = factual(model, given, call).loss
        loss.backward()
        total += loss.item()
    return total


def flops(
    config: Any, weights: int, pairs: Pairs, shared: bool, unit: Any = "conversation", detached: bool = False
) -> int:  # fmt: skip
    """Floating-point operations of a step, without padding. weights: the number of weights in the layers; detached:
    personas, which all begin at the same position, have no backward."""
    from perce.data.dataset import personas
    from perce.data.pairs import counterfactual_pieces
    from perce.data.sharing import segmented
    from perce.objectives import OBJECTIVES
    from perce.planning.flops import attention_flops

    units = [0] * len(pairs)
    for number, of_unit in enumerate(personas(pairs, unit)):
        for index in (index for indices in of_unit for index in indices):
            units[index] = number
    total, behind = 0, pairs[0]["persona_span"][1] if detached else 0
    for passes, sequences in (
        (3, [pair["input_ids"][:-1] for pair in pairs]),  # a forward, and a backward of twice that
        (1, [counterfactual_pieces(pair)[0][0][:-1] for pair in pairs]),
    ):
        for segment in segmented(sequences, units, "branches" if shared else "none")[0]:
            before, length = segment.position, len(segment.ids)
            attention = attention_flops(config, before + length) - attention_flops(config, before)
            total += passes * (2 * weights * length + attention)
            if passes == 3 and (without := max(behind - before, 0)):  # tokens of it that have only a forward
                total -= 2 * (2 * weights * without + attention_flops(config, behind) - attention_flops(config, before))
    rows = sum(pair["response_length"] for pair in pairs)
    products = 3 + OBJECTIVES["perce"].products
    return total + products * 2 * rows * config.hidden_size * config.vocab_size


def measure(way: str) -> dict[str, float]:
    """Measured in this process; to be called once in a fresh one."""
    return_freed_blocks()

    from benchmarks.test_step import smollm2_135m
    from perce.model.branches import teach_branches

    model = smollm2_135m().train()
    teach_branches(model)
    step(model, batches(way, conversation(1)))  # thread pools, GEMM primitives, the gradients
    dealt = batches(way, conversation())
    return measured_step(lambda: step(model, dealt))


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in WAYS:
        sys.exit(f"{__doc__}\nWAY is one of: {', '.join(WAYS)}.")
    print(json.dumps(measure(sys.argv[1])))


if __name__ == "__main__":
    main()
