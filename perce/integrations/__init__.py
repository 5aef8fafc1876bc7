"""PerCE in trainers that people have: they read rows, collate, optimise and save as they do; the loss is ours.

trainer   any transformers.Trainer: a mixin, and a collator that makes the batch of both passes
trl       TRL's SFTTrainer and SFTConfig, with a `persona` beside any of its formats
"""
