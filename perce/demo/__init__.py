"""The built-in example set and the small default model, which `python -m perce.train` uses without arguments."""

from pathlib import Path

from perce.demo.model import default_model_path

__all__ = ["DATA_DIR", "default_model_path"]

# train.jsonl, validation.jsonl, test.jsonl; see README.md in this directory.
DATA_DIR: Path = Path(__file__).parent / "data"
