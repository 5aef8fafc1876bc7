"""Runs a tiny version of every causal language model in transformers through PerceTrainer: right to 1e-4, or refused.

`python -m tests.helpers.sweep` writes docs/reference/architectures.md. A training step of a padded batch of two is
right if its loss and gradients are those of PerCE's formula on the model's own logits, one sequence at a time.
"""

import contextlib
import copy
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import get_args

import torch
import transformers

from perce import MemoryConfig, UserError
from perce.config.schema import ModelConfig
from perce.data.sharing import Sharing
from perce.model.loading import add_adapter, lora_config
from perce.model.memory import CHECKPOINTING
from perce.model.patch import prepare_model
from perce.model.prefill import CACHE_ARGUMENT
from tests.helpers import ROOT
from tests.helpers.architectures import CANNOT_BUILD, NAMES, VOCAB, tiny
from tests.helpers.replies import conversation
from tests.helpers.trainers import LOSS, arguments, plain_loss, plain_statistics, trainer_for

TABLE = ROOT / "docs" / "reference" / "architectures.md"
RIGHT = 1e-4  # tolerance of a loss, and of a gradient relative to its norm
CLOSE = 0.1  # tolerance of a loss in bf16, with random weights; choices of experts and of keys may flip
LEARNING_RATE = 0.0  # a step changes nothing, so all checks can use one model
TILE = 16


def _pair(length: int, persona: tuple[int, int], response: int, seed: int) -> dict:
    ids = torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "persona_span": persona, "response_length": response, "personal": [False] * response}


PAIRS = [_pair(61, (5, 32), 14, 1), _pair(45, (3, 20), 9, 2)]  # beyond every window of a tiny model
# Two replies that continue each other, and two of which only the last begins with a thought.
REPLIES = [*conversation(2, 1), *conversation(2, 2, thought=True)]
NONE = MemoryConfig(persona_grad="none")
MODES: dict[str, dict] = {
    "step": {},
    "checkpointing": {CHECKPOINTING: True},
    "persona_grad none": {"memory": NONE},
    "none and checkpointing": {"memory": NONE, CHECKPOINTING: True},
    "mlp_tile": {"memory": MemoryConfig(mlp_tile=TILE), CHECKPOINTING: True},
}


def outcomes(name: str) -> dict[str, str]:
    """The cell of each column of the table, or the paragraph that refuses the model. AssertionError if a model is
    neither right nor refused."""
    if name in CANNOT_BUILD:
        return {"step": CANNOT_BUILD[name]}
    model, found = tiny(name), {}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")
        for mode, options in MODES.items():
            found[mode] = _outcome(lambda options=options: _steps_right(copy.deepcopy(model), directory, options))
            if mode == "step" and found[mode] != "right":
                return found
        found["shared"] = _outcome(lambda: _shared(copy.deepcopy(model), directory))
        found["LoRA"] = _outcome(lambda: _steps_right(_adapted(model), directory, {}))
        found["LoRA, bf16"] = _outcome(lambda: _is_close_in_bf16(model, directory))
        found["saved"] = _outcome(lambda: _comes_back(copy.deepcopy(model), directory))
    return found


def _outcome(run: Callable[[], str | None]) -> str:
    try:
        return run() or "right"
    except UserError as error:
        assert "\n" not in str(error), f"not one paragraph: {error}"
        return str(error)


def _steps_right(model, directory, options) -> None:
    args = arguments(directory, per_device_train_batch_size=2, learning_rate=LEARNING_RATE, **options)
    _is_right(trainer_for(model, args, pairs=PAIRS), PAIRS, options)


def _shared(model, directory) -> str:
    """What replies of a conversation share, and why not everything, if a step on them is right."""
    trainer = trainer_for(model, arguments(directory, learning_rate=LEARNING_RATE), pairs=REPLIES)
    _is_right(trainer, REPLIES, {})
    return f"{trainer.sharing}: {trainer.not_all_shared}" if trainer.not_all_shared else trainer.sharing


def _is_right(trainer, pairs, options) -> None:
    model = trainer.model
    if options.get(CHECKPOINTING):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    batch = trainer.data_collator(pairs)
    loss = trainer.training_step(model, batch, torch.tensor(batch["target"].numel()))
    actual = _gradients(model)

    model.eval()
    detached = options.get("memory") == NONE
    expected_loss = _detached_loss(model) if detached else plain_loss(model, pairs, LOSS)
    expected_loss.backward()
    expected = _gradients(model)
    assert abs(loss.item() - expected_loss.item()) <= RIGHT * max(1.0, abs(expected_loss.item())), (loss, expected_loss)
    missing = expected.keys() ^ actual.keys()
    assert all((actual | expected)[name].abs().max() == 0 for name in missing), f"without a gradient: {missing}"
    wrong = torch.stack([(actual[name] - expected[name]).norm() for name in expected.keys() & actual.keys()]).norm()
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert wrong <= RIGHT * size, f"gradients are off by {wrong / size:.2g} of their norm"


def _gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _detached_loss(model) -> torch.Tensor:
    """plain_loss with the persona's keys and values detached, using the model's own cache."""
    total, count = torch.zeros(()), 0
    for pair in PAIRS:
        ids, n, (_, end) = torch.tensor([pair["input_ids"]]), pair["response_length"], pair["persona_span"]
        cache = transformers.DynamicCache(config=model.config)
        model(input_ids=ids[:, :end], use_cache=True, **{CACHE_ARGUMENT: cache})
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        logits = model(input_ids=ids[:, end:-1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0, -n:]
        logp = logits.log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]
        with torch.no_grad():
            _, logp_cf, _ = plain_statistics(model, pair)
        total, count = total - (LOSS.weighting.weight(logp.detach() - logp_cf) * logp).sum(), count + n
    return total / count


def _adapted(model):
    """The model with the default adapter. Both halves are random, because one would otherwise begin at zero."""
    torch.manual_seed(1)
    model = add_adapter(prepare_model(copy.deepcopy(model)), lora_config(ModelConfig(lora_r=4)))
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapters, "nothing is adapted"
    for parameter in adapters:
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def _is_close_in_bf16(model, directory) -> None:
    """With a bf16 base and an adapter, the loss of a step equals that of the model's own logits up to rounding."""
    model = _adapted(copy.deepcopy(model).bfloat16())
    args = arguments(directory, per_device_train_batch_size=2, learning_rate=LEARNING_RATE, bf16=True)
    trainer = trainer_for(model, args, pairs=PAIRS)
    batch = trainer.data_collator(PAIRS)
    loss = trainer.training_step(trainer.model, batch, torch.tensor(batch["target"].numel())).item()
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None)
    trainer.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain_loss(trainer.model, PAIRS, LOSS).item()
    assert abs(loss - expected) <= CLOSE * max(1.0, expected), (loss, expected)


def _comes_back(model, directory) -> None:
    """A model that the trainer saved computes the same after it is loaded again, and generates."""
    trainer = trainer_for(model, arguments(directory, learning_rate=LEARNING_RATE), pairs=PAIRS)
    trainer.save_model(directory)
    ids = torch.tensor([PAIRS[0]["input_ids"]])
    again = type(model).from_pretrained(directory).eval()  # the Auto classes lack some text models of larger ones
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
        reply = trainer.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert reply.shape[1] > ids.shape[1]


COLUMNS = [*MODES, "shared", "LoRA", "LoRA, bf16", "saved"]
SAID = {"right": "yes"} | {sharing: sharing for sharing in get_args(Sharing)}


def row(name: str, found: dict[str, str]) -> str:
    cells = (SAID.get(found.get(column, "").split(":")[0], "no") for column in COLUMNS)
    return f"| {name} | " + " | ".join(cells) + " |"


def page(found: dict[str, dict[str, str]]) -> str:
    """docs/reference/architectures.md"""
    reasons = defaultdict(list)
    for name, of_columns in found.items():
        for reason in dict.fromkeys(of_columns.values()):
            if reason not in SAID:
                reasons[name].append(reason)
    trained = sum(of_columns["step"] == "right" for of_columns in found.values())
    return "\n".join(
        [
            "# Architectures", "",
            f"Of the {len(found)} causal language models of transformers {transformers.__version__}, {trained} train "
            "right to 1e-4, tiny and with random weights; the others are refused with a reason. Written by `python -m "
            "tests.helpers.sweep`; a slow test compares.", "",
            "*step*: loss and gradients of a padded batch of two, all weights, in training mode, against PerCE's "
            "formula on the model's own logits of one sequence at a time. *none*: persona_grad none, against the "
            "model's own cache, detached. *shared*: what the replies of a conversation share, in a step of two "
            "conversations that is right in the same way. *LoRA*: the default adapter; in *bf16* its loss alone, to a "
            "tenth. *saved*: saved, loaded again with the same logits, and asked for a reply.", "",
            f"| model_type | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS),
            *(row(name, of_columns) for name, of_columns in found.items()), "",
            "## Why not", "",
            *(f"- **{name}**: {' / '.join(of_name)}" for name, of_name in reasons.items()), "",
        ]
    )  # fmt: skip


def main(names: list[str]) -> None:
    found = {}
    for name in names or NAMES:
        try:
            found[name] = outcomes(name)
            print(row(name, found[name]), flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    if not names:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
