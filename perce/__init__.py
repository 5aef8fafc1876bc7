"""PerCE: fine-tuning of causal language models on the tokens that are personal.

The commands are `perce train`, `score`, `evaluate`, `compare`, `plan`, `preview` and `doctor`, or `python -m
perce.train` and so on. Names of this module are loaded when they are first used (PEP 562): `import perce` itself
imports neither torch nor transformers. Training needs the packages that `pip install 'perce[train]'` installs.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from perce.errors import what_to_install

if TYPE_CHECKING:
    from perce.config.schema import DataConfig, LossConfig, MemoryConfig
    from perce.data.marked import PersonaCollator, labelled
    from perce.data.pairs import prompt_ids, prompt_text
    from perce.data.retrieval import pick_passages
    from perce.data.rows import load_examples
    from perce.demo import default_model_path
    from perce.errors import UserError
    from perce.model.noise import disable_dropout
    from perce.training.arguments import PerceArguments
    from perce.training.trainer import PerceTrainer

__all__ = [
    "DataConfig", "LossConfig", "MemoryConfig", "PerceArguments", "PerceTrainer", "PersonaCollator", "UserError",
    "default_model_path", "disable_dropout", "labelled", "load_examples", "pick_passages", "prompt_ids", "prompt_text",
]  # fmt: skip
_HOMES = {
    **dict.fromkeys(("DataConfig", "LossConfig", "MemoryConfig"), "config.schema"), "UserError": "errors",
    **dict.fromkeys(("prompt_ids", "prompt_text"), "data.pairs"), "default_model_path": "demo",
    **dict.fromkeys(("PersonaCollator", "labelled"), "data.marked"),
    "load_examples": "data.rows", "pick_passages": "data.retrieval", "disable_dropout": "model.noise",
    "PerceArguments": "training.arguments", "PerceTrainer": "training.trainer",
}  # fmt: skip
_OF_THE_OP = ("DataConfig", "LossConfig", "MemoryConfig", "UserError")  # names for which torch alone is enough


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer to import than this module

        return version("perce")
    if name not in _HOMES:
        raise AttributeError(f"module 'perce' has no attribute {name!r}")
    try:
        for library in () if name in _OF_THE_OP else ("transformers", "datasets"):  # some import them late
            if importlib.util.find_spec(library) is None:
                raise ModuleNotFoundError(name=library)
        return getattr(importlib.import_module(f"perce.{_HOMES[name]}"), name)
    except ImportError as error:
        if (advice := what_to_install(error)) is None:
            raise
        raise ImportError(f"perce.{name}: {advice}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
