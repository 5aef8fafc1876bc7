"""PerCE in other trainers: `trainer` for any transformers.Trainer, `trl` for TRL's SFTTrainer."""

from perce.errors import installed

with installed("train"):
    import datasets  # noqa: F401
    import transformers  # noqa: F401
