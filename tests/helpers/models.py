"""Batches for a model with PerCE installed, and its loss of them."""

import torch

from tests.helpers.tiny import demo_pairs

PAIRS = demo_pairs(3)

CLIP = {"clip_min": 0.005, "clip_max": 5.0}  # a random model hardly listens to the persona


def perce_forward(model, batch, **loss):
    with torch.no_grad():
        hidden_cf = model(input_ids=batch["input_ids_cf"], perce={"rows": batch["rows_cf"]})
    call = {"hidden_cf": hidden_cf, **CLIP, **loss}
    return model(input_ids=batch["input_ids"], perce={"rows": batch["rows"], "target": batch["target"], "loss": call})
