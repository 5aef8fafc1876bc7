"""PerCE in trainers that people have: trainer, of any transformers.Trainer, and trl, of TRL's SFTTrainer."""

from perce.errors import installed

with installed("train"):
    import datasets  # noqa: F401
    import transformers  # noqa: F401
