"""normalize="batch": token weights of mean 1 over a whole step, however it is divided into passes and processes.

The mean is known once all of the step has been seen. It is one scalar, so the accumulated gradient is scaled instead of
the loss; the loss that is logged is corrected in its last part.
"""

import torch
from torch import Tensor, nn


class StepNormalizer:
    """Sums over one step: begin, then add_weights and add_loss for each forward pass; finish replaces the last one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin()

    def begin(self) -> None:
        """Forget a step, also one that was given up midway."""
        self.weight, self._loss = torch.zeros(2, device=self._device)

    def add_weights(self, token_weight: Tensor) -> None:
        self.weight += token_weight.sum()

    def add_loss(self, loss: Tensor) -> Tensor:
        """Add the loss of one forward pass, and return it unchanged."""
        self._loss += loss
        return loss

    def finish(self, model: nn.Module, loss: Tensor, weight: Tensor, tokens: Tensor | int) -> Tensor:
        """Scale the gradients by tokens ÷ weight, both of the whole step. Returns the last loss, corrected for all."""
        scale = torch.where(weight == 0, 0.0, tokens / weight)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.device))
        self.add_loss(loss)
        return loss + (scale - 1) * self._loss
