"""perce's own DataLoaders: batches under a token budget, batches of conversations, streams, evaluations and E-steps.

They hold only this process's share, so accelerate must not divide them again. In all other cases the Trainer's loader
is used.
"""

from collections.abc import Sequence
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from perce.data.dataset import personas, sequence_lengths
from perce.data.sharing import Sharing
from perce.data.stream import PairStream
from perce.errors import UserError
from perce.training.arguments import PerceArguments
from perce.training.sampler import ReplyBatches, TokenBatches, dealt, in_order
from perce.training.shared import units, whole_units


def own_train_loader(dataset: Any, collate: Any, args: PerceArguments, sharing: Sharing) -> DataLoader | None:
    """A loader of this process's batches for a stream, a token budget or shared conversations; None if the Trainer's
    loader will do. In a stream, only replies that happen to be in one batch share tokens."""
    if isinstance(dataset, PairStream):
        share = dataset.of_process(args.process_index, args.world_size)
        return undivided_loader(share, collate, args, batch_size=args.train_batch_size)
    budget, known = args.tokens_per_batch, has_length(dataset)
    if dataset is None or (budget is None and (sharing == "none" or not known)):
        return None
    if not known:
        raise UserError("tokens_per_batch: a streamed train_dataset has no lengths to group by. Read it whole.")
    seed = args.seed if args.data_seed is None else args.data_seed
    order = {"seed": seed, "rank": args.process_index, "ranks": args.world_size}
    batches: ReplyBatches | TokenBatches
    if budget is None:
        together = args.memory.share_persona or None
        batches = ReplyBatches(personas(dataset, args.memory.unit), args.train_batch_size, together, **order)
    elif sharing == "none":
        batches = TokenBatches(sequence_lengths(dataset), budget, **order)
    else:
        indices, lengths = zip(*units(dataset, budget, sharing, args.memory, seed), strict=True)
        batches = TokenBatches(lengths, budget, indices, **order)
    return undivided_loader(dataset, collate, args, batch_sampler=batches)


def own_eval_loader(dataset: Any, collate: Any, args: PerceArguments) -> DataLoader:
    """Example after example or, if they may share tokens, conversation after conversation or persona after persona,
    each in one batch if it fits; processes take turns."""
    shares = args.data.share != "none" and args.memory.share_persona != 1
    batches = _in_turn(whole_units(dataset, args.memory, shares), args)
    return undivided_loader(dataset, collate, args, batch_sampler=batches)


def estimation_batches(dataset: Any, args: PerceArguments, shares: bool) -> list[list[int]]:
    """Rows of the dataset, batch by batch, that this process estimates: from short sequences to long ones. Every
    process has as many, because with sharded weights they wait for each other."""
    lengths = sequence_lengths(dataset)
    together = whole_units(dataset, args.memory, shares)
    return _in_turn(sorted(together, key=lambda indices: max(lengths[index] for index in indices)), args)


def _in_turn(together: Sequence[Sequence[int]], args: PerceArguments) -> list[list[int]]:
    return dealt(in_order(together, args.eval_batch_size), args.process_index, args.world_size)


def undivided_loader(dataset: Any, collate: Any, args: TrainingArguments, **how: Any) -> DataLoader:
    """A DataLoader with the Trainer's options for what is already this process's share: nothing divides it again.

    `how`: batch_size or batch_sampler.
    """
    loader = DataLoader(
        dataset, collate_fn=collate, num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers, prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context, in_order=args.dataloader_in_order, **how,
    )  # fmt: skip
    loaders: Any = args.accelerator_config
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False,
        non_blocking=loaders.non_blocking,
    )  # fmt: skip
