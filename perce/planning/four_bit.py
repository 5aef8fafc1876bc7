"""Linear layers in 4 bits, as bitsandbytes stores and runs them, for counting and for rehearsals: no data, no GPU.

    weight    n / 2 bytes, nf4 in blocks of 64; per block a scale in 8 bits, per 256 scales another in fp32, an offset
              and two tables (double quantisation, arXiv 2305.14314): 4.127 bits per weight
    product   dequantises the weight to 16 bits while it runs, in forward and again in backward; keeps no input
    the rest  embeddings, norms and the head, in fp32, as peft.prepare_model_for_kbit_training leaves them

Sizes are those of bitsandbytes 0.50.2, counted on a CPU; its kernels on a GPU have not been measured.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from perce.errors import UserError

BLOCK, NESTED_BLOCK = 64, 256
TABLES = 16 + 256 + 1  # fp32: the values of nf4 and of the 8-bit scales, and their offset


class FourBitLinear(nn.Linear):
    """Replaces a linear layer; its numbers mean nothing. `stored`: the type that weights are dequantised to."""

    def __init__(self, layer: nn.Linear, stored: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.stored = layer.in_features, layer.out_features, stored
        size, device = layer.weight.numel(), layer.weight.device

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        scales = math.ceil(size / BLOCK)
        self.weight = nn.Parameter(empty(math.ceil(size / 2), torch.uint8)[:, None], requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scales", empty(scales, torch.uint8))
        self.register_buffer("nested", empty(math.ceil(scales / NESTED_BLOCK) + TABLES, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        size = self.out_features, self.in_features
        product: Any = _Product.apply(x.to(torch.bfloat16), self.weight, size, self.stored)
        # bitsandbytes returns the input's type; PEFT makes a copy.
        return (product if self.bias is None else product + self.bias.to(product.dtype)).to(x.dtype).clone()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, size: tuple[int, int], stored: torch.dtype) -> Tensor:
        ctx.size, ctx.stored = size, stored
        return F.linear(x, _dequantised(x, size, stored))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        return grad[0] @ _dequantised(grad[0], ctx.size, ctx.stored), None, None, None


def _dequantised(x: Tensor, size: tuple[int, int], stored: torch.dtype) -> Tensor:
    scales = x.new_empty(math.ceil(size[0] * size[1] / BLOCK), dtype=torch.float32)
    weight = x.new_empty(size, dtype=stored).to(x.dtype)
    del scales  # freed once the weight exists
    return weight


def quantised(model: Any, stored: torch.dtype) -> Any:
    """The model with all linear layers except the head in 4 bits and the rest in fp32, as load_model makes it."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            raise UserError(
                f"--load_in_4bit: {type(model).__name__} has layers of transformers' own class Conv1D ({name}), which "
                "cannot be planned in 4 bits. Plan without --load_in_4bit: bf16 weights are an upper bound."
            )
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, FourBitLinear(module, stored))
    return model.float()
