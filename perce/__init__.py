"""PerCE: fine-tuning of causal language models on the tokens that are personal.

Commands are `python -m perce.train`, `score`, `evaluate` and `plan`. What is imported from here is loaded when it is
first asked for (PEP 562): `import perce` itself imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perce.config.schema import DataConfig, LossConfig, MemoryConfig
    from perce.data.pairs import prompt_ids, prompt_text
    from perce.data.rows import load_examples
    from perce.demo import default_model_path
    from perce.errors import UserError
    from perce.model.noise import disable_dropout
    from perce.training.arguments import PerceArguments
    from perce.training.trainer import PerceTrainer

__all__ = [
    "DataConfig", "LossConfig", "MemoryConfig", "PerceArguments", "PerceTrainer", "UserError", "default_model_path",
    "disable_dropout", "load_examples", "prompt_ids", "prompt_text",
]  # fmt: skip
_HOMES = {
    **dict.fromkeys(("DataConfig", "LossConfig", "MemoryConfig"), "config.schema"), "UserError": "errors",
    **dict.fromkeys(("prompt_ids", "prompt_text"), "data.pairs"), "default_model_path": "demo",
    "load_examples": "data.rows", "disable_dropout": "model.noise",
    "PerceArguments": "training.arguments", "PerceTrainer": "training.trainer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'perce' has no attribute {name!r}")
    return getattr(importlib.import_module(f"perce.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
