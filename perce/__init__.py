"""The training layer of PerCE: fine-tune a causal language model on the tokens that are personal."""
