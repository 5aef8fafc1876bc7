"""A transformers.Trainer whose step is two forward passes and one fused loss. docs/reference/where.md says what each
module does; trainer.py has the step."""
