"""3x3 convolutions whose weight gradient on a CPU is nine matrix products.

oneDNN computes the gradient of such weights at a fifth to a half of the speed of the forward pass (AVX2); matrix
products run at nearly that speed. With y and x padded alike to rows of W + 2 pixels, all pixels in one row of memory,

    ∂L/∂w[:, :, i, j] = Σ_n ∂L/∂y[n] ⊗ x[n + i (W + 2) + j],

which is one product of two contiguous slices for each of the nine places (i, j). With a stride of 2 the same holds for
each of four images that have every second row and column of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WIDE = 256 * 256  # inputs x outputs from which on nine products win for maps of any size
NARROW, LARGE_MAP = 64 * 64, 32 * 32  # ... and from which on they win for maps of so many pixels


class Conv3x3(nn.Conv2d):
    """`torch.nn.Conv2d` of 3x3 with padding 1 and stride 1 or 2; the same numbers, to rounding, and faster to train."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if by_products(input, weight):
            found: Tensor = ConvByProducts.apply(input, weight, bias, self.stride[0])
            return found
        plain: Tensor = super()._conv_forward(input, weight, bias)
        return plain


def by_products(maps: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of ``weight`` (O, C, 3, 3) is better computed by products for maps (B, C, H, W)."""
    if maps.device.type != "cpu" or not weight.requires_grad or not torch.is_grad_enabled():
        return False
    if maps.dtype != weight.dtype or torch.is_autocast_enabled("cpu") or maps.dim() != 4 or maps.numel() == 0:
        return False
    width = weight.shape[0] * weight.shape[1]
    return width >= WIDE or (width >= NARROW and maps.shape[2] * maps.shape[3] >= LARGE_MAP)


def train_fast(model: nn.Module) -> None:
    """Make every 3x3 convolution of ``model`` with stride 1 or 2 and padding, dilation and groups of 1 a `Conv3x3`."""
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.stride not in ((1, 1), (2, 2)) or module.padding_mode != "zeros":
            continue
        if (module.kernel_size, module.padding, module.dilation, module.groups) == ((3, 3), (1, 1), (1, 1), 1):
            module.__class__ = Conv3x3


class ConvByProducts(torch.autograd.Function):
    """The convolution, with the gradient of its weight by nine matrix products."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        """Convolve maps (B, C, H, W) with weights (O, C, 3, 3)."""
        ctx.save_for_backward(maps, weight)
        ctx.stride = stride
        return F.conv2d(maps, weight, bias, stride, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of maps, weight and bias."""
        maps, weight = ctx.saved_tensors
        grad_maps = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:  # alone: asked for the bias's too, oneDNN would compute the weight's
            grad_maps = torch.ops.aten.convolution_backward(
                grad, maps, weight, None, [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(maps, grad, ctx.stride)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_maps, grad_weight, grad_bias, None


def weight_gradient(maps: Tensor, grad: Tensor, stride: int = 1) -> Tensor:
    """Gradient (O, C, 3, 3) of the weights, of maps (B, C, H, W) and the gradient (B, O, h, w) of what they became."""
    batch, channels, height, width = maps.shape
    outputs, rows, columns = grad.shape[1:]
    rows, columns = rows + 2 // stride, columns + 2 // stride  # with the padding
    x = maps.new_zeros(batch, stride * rows, stride * columns, channels)
    x[:, 1 : height + 1, 1 : width + 1] = maps.permute(0, 2, 3, 1)
    y = grad.new_zeros(batch, rows, columns, outputs)
    y[:, : grad.shape[2], : grad.shape[3]] = grad.permute(0, 2, 3, 1)
    y = y.flatten(0, 2)
    found = maps.new_empty(3, 3, outputs, channels)
    for first_row in range(stride):
        for first_column in range(stride):
            part = x[:, first_row::stride, first_column::stride].flatten(0, 2)
            for i in range(first_row, 3, stride):
                for j in range(first_column, 3, stride):
                    shift = i // stride * columns + j // stride
                    torch.mm(y[: len(y) - shift].T, part[shift:], out=found[i, j])
    return found.permute(2, 3, 0, 1)
