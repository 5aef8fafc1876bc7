"""PerCE in trainers that people have: trainer, of any transformers.Trainer, and trl, of TRL's SFTTrainer."""
