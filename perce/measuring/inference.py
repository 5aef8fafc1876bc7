"""What perce.score and perce.evaluate share: a model, the examples to measure it on, and how they are batched."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device

from perce.config.commands import InferenceOptions
from perce.config.questions import InferenceConfig
from perce.data.batch import Batch, collate
from perce.data.dataset import personas
from perce.data.pairing import PairSource, make_persona_builder
from perce.data.pairs import Pair, PairBuilder
from perce.data.rows import Examples, not_read
from perce.data.sharing import Sharing, segmented
from perce.data.splits import load_split
from perce.files.runs import run_directory
from perce.hub import from_anywhere
from perce.model.branches import sharing_of
from perce.model.loading import load_to_measure
from perce.model.probe import check_ids, vocabulary_of
from perce.visible import say

TOKENS_A_FORWARD = {"cpu": 8192, "cuda": 65536}  # longest sequence × sequences; there is no backward to keep memory for
ROOM = 1.5  # pairs of one persona may always compute this many times their longest sequence in one forward
SAMPLED_VALUES = 1024  # per parameter, in the fingerprint of a model


@dataclass(frozen=True)
class Subject:
    """A model and the examples to measure it on."""

    model: Any
    """In eval mode, with PerCE installed."""
    tokenizer: Any
    device: torch.device
    builder: PairBuilder
    source: PairSource
    """Builds the pairs of examples, and counts what is left out."""
    sharing: Sharing
    """Which tokens the pairs of a persona share in a batch; see data/sharing.py."""
    examples: Examples
    split: str
    facts: dict[str, Any]
    """What its records depend on, in every command."""

    def built(self, example: Any) -> list[Pair]:
        """The example's pairs, none if it may be left out."""
        return [self.checked(pair, example) for pair in self.source.built(example)]

    def checked(self, pair: Pair, example: Any) -> Pair:
        """The pair, with text of the example. UserError for a token that the model lacks."""
        check_ids(max(pair.input_ids), vocabulary_of(self.model), example.source)
        return pair

    @property
    def left_out(self) -> list[str]:
        """Notes on what is left out of the data. Of a stream, what is known when it has been read."""
        return [*not_read(self.examples.unread), *self.source.notes()]


def load_subject(options: InferenceOptions, command: str, *, unanswered: bool = False) -> Subject:
    """UserError for a model or data that cannot be read, and for documents, which have no persona.

    unanswered: also take rows without a response as examples.
    """
    run = run_directory(options.model.model)
    examples, split, in_words = load_split(options.data, options.examples, run, unanswered=unanswered)
    say(f"examples  {options.data.data or 'built-in examples'}, {in_words}")
    next(iter(examples), None)  # the format of a stream is known only after its first row
    model, tokenizer, device = load_to_measure(options.model)
    builder = make_persona_builder(tokenizer, options.data, examples.format)
    sharing = _sharing(options, model, examples)
    facts = {"command": command, **model_facts(options.model, model), "split": split}
    facts |= {"split_seed": options.examples.seed}
    facts |= asdict(options.data)
    # Records must not depend on the working directory, recipe or run from which data, model and prompt were named.
    for name in ("data", "retriever_model"):
        facts[name] = facts[name] and from_anywhere(facts[name])
    facts["prompt"] = asdict(builder.chat_format.style)
    source = PairSource(examples, builder, options.data.skip_bad_rows, prefix="")
    return Subject(model, tokenizer, device, builder, source, sharing, examples, split, facts)


def _sharing(options: InferenceOptions, model: Any, examples: Examples) -> Sharing:
    """What is shared, if the data has several examples of a persona. Prints a note if less is shared than possible."""
    rows: Any = () if options.data.streaming else examples.all
    several = options.data.streaming or len({example.persona for example in rows}) < len(rows)
    if options.data.share == "none" or not several:
        return "none"
    sharing, why = sharing_of(model)
    if why:
        shared = {"none": "share no tokens", "chains": "share tokens only if one begins with all of the other"}[sharing]
        say(f"replies for the same persona {shared}: {why}")
    return sharing


def model_facts(config: InferenceConfig, model: Any) -> dict[str, Any]:
    """What a model's numbers depend on; a run resumes records only if these facts are equal."""
    weight = model.get_output_embeddings().weight
    return {
        "model": config.model and from_anywhere(config.model), "weights": model_fingerprint(model),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type, "attention": model.config.get_text_config()._attn_implementation,
        "batch_size": config.batch_size,
    }  # fmt: skip


def model_fingerprint(model: Any) -> str:
    """A checksum of a few values of each parameter: enough to tell models of two training runs apart."""
    crc = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:SAMPLED_VALUES].float().cpu().numpy().tobytes()
        crc = zlib.crc32(values, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def batches_by_length(lengths: Sequence[int], batch_size: int, tokens: int) -> list[list[int]]:
    """Indices in batches of similar length: at most batch_size each, and longest × sequences at most `tokens`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else None
        if last is None or len(last) == batch_size or (len(last) + 1) * lengths[index] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def batches_that_share(pairs: Sequence[Pair], sharing: Sharing, batch_size: int, tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, like batches_by_length. Pairs that share tokens are in one batch; together
    they count as one sequence of all tokens that they compute."""
    if sharing == "none":
        return batches_by_length([len(pair.input_ids) for pair in pairs], batch_size, tokens)
    of_persona = [[row for rows in persona for row in rows] for persona in personas([vars(pair) for pair in pairs])]
    families = [family for rows in of_persona for family in _families(rows, pairs, sharing, tokens)]
    batches = batches_by_length([computed for _, computed in families], batch_size, tokens)
    return [[row for family in batch for row in families[family][0]] for batch in batches]


def _families(
    rows: Sequence[int], pairs: Sequence[Pair], sharing: Sharing, tokens: int
) -> Iterator[tuple[Sequence[int], int]]:
    """Groups of a persona's pairs that share tokens, in order, and how many tokens each group computes. A group that
    computes more than `tokens` and more than ROOM × its longest sequence is halved."""
    segments, paths = segmented([pairs[row].input_ids[:-1] for row in rows], [0] * len(rows), sharing)
    members: defaultdict[int, list[int]] = defaultdict(list)  # by the segment that they begin with
    for row, ((first, _), *_) in zip(rows, paths, strict=True):
        members[first].append(row)
    computed: Counter[int] = Counter()
    for number, segment in enumerate(segments):
        computed[segment.path[0][0] if segment.path else number] += len(segment.ids)
    for first, kin in members.items():
        if computed[first] > max(tokens, ROOM * max(len(pairs[row].input_ids) for row in kin)):
            half = len(kin) // 2
            yield from _families(kin[:half], pairs, sharing, tokens)
            yield from _families(kin[half:], pairs, sharing, tokens)
        else:
            yield kin, computed[first]


def collated(pairs: Sequence[Pair], sharing: Sharing, pad_id: int, device: torch.device) -> Batch:
    return send_to_device(collate([vars(pair) for pair in pairs], pad_id, sharing=sharing, unit="persona"), device)
