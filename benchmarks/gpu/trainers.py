"""Training steps of a large model by our trainer and by others: see benchmarks/trainers.py for the ways.

Each trainer takes a few steps, with LoRA and bf16, on sequences of the same tokens. The model is created again for each
kind of trainer, because some change its code; the ways of one kind share it, and each adapter is removed afterwards.
Ours are compared with each other, so at the shortest length they take turns, twice.
"""

from contextlib import suppress
from importlib import import_module
from itertools import groupby
from typing import Any

from benchmarks import trainers
from benchmarks.gpu import child as children
from benchmarks.gpu.child import Child, Unable

WAYS = (
    "perce", "perce-ce", "perce-waits", "trl-ce", "trl-perce", "naive-ce", "naive-kept", "naive", "perce-liger",
)  # fmt: skip
"""By importance; Liger's kernels come last, because they patch the module that all such models use."""
IN_TURN = ("perce", "perce-ce", "perce-waits")
STEPS = {"cuda": {8192: 6, 32768: 3}, "cpu": {300: 3}}
"""By device and tokens per sequence: the number of steps. On a GPU the first two are not timed."""
SHAPE = {"cuda": "qwen3-8b", "cpu": "tiny"}


def kind(way: str) -> str:
    return way.partition("-")[0]


def keys(ways: tuple[str, ...], device: str) -> dict[str, tuple[str, int]]:
    """What is measured of these ways, by the key's last parts: each length, those in turn once more at the shortest."""
    shortest, *longer = STEPS[device]
    again = {f"{way}/{shortest}, again": (way, shortest) for way in ways if way in IN_TURN}
    rest = {f"{way}/{tokens}": (way, tokens) for tokens in longer for way in ways if way != "perce-waits"}
    return {f"{way}/{shortest}": (way, shortest) for way in ways} | again | rest


def measured(model: Any, way: str, tokens: int, device: str) -> dict[str, Any]:
    """Runs a few steps for one line; afterwards the model has no adapter."""
    persona = tokens - trainers.QUERY - trainers.RESPONSE
    try:
        return trainers.train(model, way, persona, SHAPE[device], STEPS[device][tokens])
    except ImportError as error:
        raise Unable(f"{error.name} is not installed, or lacks something: {error}") from error
    finally:
        remove_adapter(model)


def remove_adapter(model: Any) -> None:
    """Removes PEFT's layers from a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            model.set_submodule(name, layer.get_base_layer())
    with suppress(AttributeError):
        del model.peft_config


def stage(child: Child) -> None:
    """Measures every way at every length."""
    name, device = child.request.stage, child.request.device
    for _, ways in groupby(WAYS, kind):
        wanted = {f"{name}/{key}": what for key, what in keys(tuple(ways), device).items()}
        if not any(child.wants(key) for key in wanted):
            continue
        model = child.prepared(f"{name}/model", lambda: trainers.make_model(SHAPE[device]))
        if model is None:
            return
        for key, (way, tokens) in wanted.items():
            child.measured(key, lambda way=way, tokens=tokens, model=model: measured(model, way, tokens, device))
            child.clock.free()
        del model
        child.clock.free()


def prepare() -> None:
    """Slow imports."""
    for module in ("perce.training.trainer", "trl.trainer.sft_trainer"):
        with suppress(ImportError):  # a missing one is reported when it is needed
            import_module(module)


if __name__ == "__main__":
    children.main(stage, __doc__, prepare)
