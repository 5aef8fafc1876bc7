"""What the replies of a conversation, or the requests of a persona, share in a run: whether they can share, and how
many tokens are computed."""

import bisect
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import has_length

from perce.config.schema import MemoryConfig
from perce.data.batch import Batch
from perce.data.dataset import personas, pieces_of, sequence_lengths
from perce.data.documents import DocumentBuilder
from perce.data.sharing import Path, Segment, Sharing, segmented
from perce.data.stream import PairStream
from perce.model.auxiliary import router_of
from perce.model.branches import shares_nothing, sharing_of
from perce.model.probe import unwrapped
from perce.training.parallel import found_by_first, shards_weights
from perce.training.sampler import drawn_pieces, pieces, places


def shared_by(model: Any, args: Any, *datasets: Any) -> tuple[Sharing, str]:
    """What the examples of these datasets share with a prepared model, the same on every process; and if that is not
    everything, why."""
    memory = args.memory
    if args.data.share == "none" or not any(has_shared(dataset, memory) for dataset in datasets):
        return "none", ""
    if reason := shares_nothing(unwrapped(model).config):
        return "none", reason
    if args.neftune_noise_alpha:
        return "none", "the noise of neftune_noise_alpha depends on the length of a row"
    if memory.on_trunks and router_of(model, args.loss.router_aux_loss_coef):
        return "none", "if a persona is run by itself, experts are balanced over each row's own tokens"
    chains_alone = {
        "FSDP and DeepSpeed place the weights later, so that branches cannot be tried": shards_weights(args),
        "packed sequences are told apart by where they begin (packing)": args.packing,
        "branches would be compiled anew for each batch (torch_compile)": args.torch_compile,
    }
    if reason := next((why for why, so in chains_alone.items() if so), ""):
        return _of_persona("chains", reason, memory)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):  # flash attention takes no fp32
        found = sharing_of(model)
    return found_by_first(lambda: _of_persona(*found, memory))


def _of_persona(sharing: Sharing, reason: str, memory: MemoryConfig) -> tuple[Sharing, str]:
    """Requests of a persona are not chains: without branches they share the persona only if it runs by itself."""
    if sharing == "chains" and memory.share_persona and not memory.on_trunks:
        return "none", f"{reason}; without --share_persona, replies of a conversation share what they can"
    return sharing, reason


def has_shared(dataset: Any, memory: MemoryConfig) -> bool:
    """Whether a conversation, or a persona, has several examples in this dataset that may be in one batch; for a
    stream, whether it may have."""
    if memory.share_persona == 1:
        return False
    if isinstance(dataset, Mapping):
        return any(has_shared(part, memory) for part in dataset.values())
    if isinstance(dataset, PairStream):
        return not isinstance(dataset.source.builder, DocumentBuilder)
    return has_length(dataset) and any(len(indices) > 1 for indices in whole_units(dataset, memory))


def whole_units(dataset: Any, memory: MemoryConfig, shares: bool = True) -> list[list[int]]:
    """Indices of the examples of each conversation, or of each persona, conversation after conversation; each example
    alone if none shares tokens with another."""
    if not shares:
        return [[index] for index in range(len(dataset))]
    return [[index for indices in unit for index in indices] for unit in personas(dataset, memory.unit)]


def dealt_units(dataset: Any, memory: MemoryConfig, seed: int = 0) -> list[list[int]]:
    """Indices of the examples that are put together: those of a conversation, or up to --share_persona of one persona,
    as the seed draws them."""
    most = memory.share_persona or len(dataset)
    return list(drawn_pieces(personas(dataset, memory.unit), most, random.Random(seed)))


class Unit(NamedTuple):
    """Examples that form one row, or one tree, and the number of factual tokens that are computed for them."""

    indices: list[int]
    tokens: int


def units(dataset: Any, budget: int, sharing: Sharing, memory: MemoryConfig, seed: int = 0) -> list[Unit]:
    """The units that make batches under a token budget, from dealt_units.

    chains     the sequences of one row, which is as long as the longest of them; rows are padded to the same length
    branches   all sequences, with their segments one after the other; if that exceeds the budget, consecutive pieces of
               as many as fit, at least one
    """
    inputs, found = _inputs(dataset), []
    if memory.on_trunks and sharing == "chains":  # persona and requests, one after the other
        sharing = "branches"
    for indices in dealt_units(dataset, memory, seed):
        if sharing == "chains":
            segments, paths = _segmented(inputs, indices, sharing)
            of_row = defaultdict(list)
            for index, ((row, _),) in zip(indices, paths, strict=True):
                of_row[row].append(index)
            found += [Unit(of_row[row], len(segment.ids)) for row, segment in enumerate(segments)]
        else:
            found += _within(budget, indices, lambda part: sum(_lengths(inputs, part, sharing)))
    return found


def _within(budget: int, indices: list[int], tokens_of: Callable[[list[int]], int]) -> Iterator[Unit]:
    while indices:
        tokens, count = tokens_of(indices), len(indices)
        if tokens > budget and count > 1:
            fitting = bisect.bisect_right(range(1, count), budget, key=lambda n: tokens_of(indices[:n]))
            count = max(fitting, 1)
            tokens = tokens_of(indices[:count])
        yield Unit(indices[:count], tokens)
        indices = indices[count:]


def largest_batch(dataset: Any, replies: int, sharing: Sharing, memory: MemoryConfig) -> int:
    """The most factual tokens, including padding, in a batch of so many examples. If examples share tokens, it is for
    ReplyBatches, from the most that pieces of each size have. For requests of a persona it is not a bound, but the
    number of one draw."""
    if memory.on_trunks and sharing == "chains":
        sharing = "branches"
    if sharing == "none":
        return replies * max(sequence_lengths(dataset))
    inputs, longest = _inputs(dataset), 0
    most: dict[int, int] = defaultdict(int)  # rows of chains, or tokens, by the number of replies of a piece
    counts: Counter[int] = Counter()
    for piece in pieces(dealt_units(dataset, memory), replies):
        lengths = _lengths(inputs, piece, sharing)
        counts[len(piece)] += 1
        most[len(piece)] = max(most[len(piece)], len(lengths) if sharing == "chains" else sum(lengths))
        longest = max(longest, *lengths)
    batches = places(counts, replies)
    largest = max(sum(most[part.size] for part in batch) for batch in batches)
    return largest * longest if sharing == "chains" else largest


def _inputs(dataset: Any) -> list[Any]:
    """The factual inputs of each example: all its ids but the last."""
    if not isinstance(dataset, Dataset):
        return [np.asarray(pair["input_ids"][:-1]) for pair in dataset]
    columns = (column.to_numpy(zero_copy_only=False) for column in pieces_of(dataset, "input_ids"))
    return [ids[:-1] for column in columns for ids in column]


def _segmented(
    inputs: Sequence[Any], indices: Sequence[int], sharing: Sharing
) -> tuple[list[Segment], list[Path]]:  # fmt: skip
    """The segments and paths of examples of one unit."""
    return segmented([inputs[index] for index in indices], [0] * len(indices), sharing)


def _lengths(inputs: Sequence[Any], indices: Sequence[int], sharing: Sharing) -> list[int]:
    """The lengths of the segments of examples of one unit."""
    if len(indices) == 1:
        return [len(inputs[indices[0]])]
    return [len(segment.ids) for segment in _segmented(inputs, indices, sharing)[0]]


def tokens_of(batch: Batch, counterfactual: bool) -> Tensor:
    """(2,) numbers of input tokens in the passes that an objective makes: computed ones, and those of its examples."""
    uses = batch["uses"]
    return batch["tokens"] if counterfactual else torch.stack([(uses > 0).sum(), uses.sum()])


class Counted(NamedTuple):
    """Tokens of some batches, the number of their replies, and how many of these share no tokens with another."""

    computed: int
    needed: int
    replies: int
    alone: int

    def __str__(self) -> str:
        return f"{self.computed:,} tokens computed for {self.needed:,} tokens of examples"


def counted(
    batches: Iterable[Sequence[int]], dataset: Any, collate: Callable[..., Batch], counterfactual: bool
) -> Counted:  # fmt: skip
    """Count the tokens that are computed for batches, which are collated to find out."""
    computed, replies, alone = torch.zeros(2, dtype=torch.int64), 0, 0
    for batch in batches:
        made = collate([dataset[index] for index in batch])
        computed += tokens_of(made, counterfactual)
        replies, alone = replies + len(batch), alone + int(made["alone"])
    return Counted(int(computed[0]), int(computed[1]), replies, alone)
