"""Convolutions with faster gradients on a CPU: 3x3 and 1x1 ones, transposed 2x2 ones, some depthwise ones.

oneDNN computes the gradient of such weights at a fifth to a half of the speed of the forward pass (AVX2); matrix
products run at nearly that speed. With y and x padded alike to rows of W + 2 pixels, all pixels in one row of memory,

    ∂L/∂w[:, :, i, j] = Σ_n ∂L/∂y[n] ⊗ x[n + i (W + 2) + j],

which is one product of two contiguous slices for each of the nine places (i, j). With a stride of 2 the same holds for
each of four images that have every second row and column of x.

A transposed 2x2 convolution with a stride of 2 makes four pixels of one, which no other reaches: with each four in a
row, both of its gradients are a single product, at twice the speed of oneDNN's. So are those of a 1x1 convolution,
where there are many channels.

For the weights of depthwise convolutions oneDNN has no fast way where maps are lower than the kernel, as at the end of
a network for small images. Written out place by place, each a product pixel by pixel, they take down to a ninth of the
time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Inputs x outputs from which on products are faster (benchmarks/convolutions.py).
WIDE = 256 * 256  # of a 1x1 kernel
WIDEST = 512 * 512  # of a 3x3 kernel, for maps of any size
NARROW, LARGE_MAP = 64 * 64, 32 * 32  # of a 3x3 kernel, for maps of so many pixels


class Conv3x3(nn.Conv2d):
    """`torch.nn.Conv2d` of 3x3 with padding 1 and stride 1 or 2; the same numbers, to rounding, and faster to train."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if by_products(input, weight):
            found: Tensor = ConvByProducts.apply(input, weight, bias, self.stride[0])
            return found
        plain: Tensor = super()._conv_forward(input, weight, bias)
        return plain


class Conv1x1(nn.Conv2d):
    """`torch.nn.Conv2d` of 1x1 with stride 1; the same numbers, to rounding, and faster to train."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = weight.shape[0] * weight.shape[1] >= WIDE
        # The rows of pixels that are multiplied lie so in memory.
        if wide and _is_trained_here(input, weight) and input.is_contiguous(memory_format=torch.channels_last):
            found: Tensor = PixelsByProducts.apply(input, weight, bias)
            return found
        plain: Tensor = super()._conv_forward(input, weight, bias)
        return plain


class ConvTranspose2x2(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` of 2x2 with stride 2; the same numbers, to rounding, and faster to train."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Upsampled maps (B, O, 2 H, 2 W) of maps (B, C, H, W)."""
        if output_size is None and _is_trained_here(input, self.weight):
            found: Tensor = TransposedByProducts.apply(input, self.weight, self.bias)
            return found
        plain: Tensor = super().forward(input, output_size)
        return plain


class LowDepthwise(nn.Conv2d):
    """`torch.nn.Conv2d`, depthwise, with stride 1 and maps that stay as large; faster to train where they are low."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() == 4 and input.shape[2] < weight.shape[2] and _is_trained_here(input, weight):
            found: Tensor = DepthwiseByPlaces.apply(input, weight, bias)
            return found
        plain: Tensor = super()._conv_forward(input, weight, bias)
        return plain


def by_products(maps: Tensor, weight: Tensor) -> bool:
    """Whether the gradient of ``weight`` (O, C, 3, 3) is better computed by products for maps (B, C, H, W)."""
    if not _is_trained_here(maps, weight):
        return False
    width = weight.shape[0] * weight.shape[1]
    return width >= WIDEST or (width >= NARROW and maps.shape[2] * maps.shape[3] >= LARGE_MAP)


def _is_trained_here(maps: Tensor, weight: Tensor) -> bool:
    """Whether weights learn on a CPU, and products take these maps."""
    if maps.device.type != "cpu" or not weight.requires_grad or not torch.is_grad_enabled():
        return False
    return maps.dtype == weight.dtype and not torch.is_autocast_enabled("cpu") and maps.dim() == 4 and maps.numel() > 0


def train_fast(model: nn.Module) -> None:
    """Give convolutions of ``model`` their gradients by products, where there are any.

    They are those of 3x3 with stride 1 or 2 and padding, dilation and groups of 1, those of 1x1 with stride 1, without
    padding and groups, transposed ones of 2x2 with stride 2, no padding, and dilation and groups of 1, and depthwise
    ones with stride 1 that keep the size of maps.
    """
    for module in model.modules():
        if type(module) is nn.ConvTranspose2d:
            shape = (module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation)
            if shape == ((2, 2), (2, 2), (0, 0), (0, 0), (1, 1)) and module.groups == 1:
                module.__class__ = ConvTranspose2x2
        if type(module) is not nn.Conv2d or module.stride not in ((1, 1), (2, 2)) or module.padding_mode != "zeros":
            continue
        same_size = module.padding == tuple((side - 1) / 2 for side in module.kernel_size)
        depthwise = module.groups == module.in_channels == module.out_channels > 1
        if depthwise and same_size and module.stride == module.dilation == (1, 1):
            module.__class__ = LowDepthwise
        if (module.kernel_size, module.padding, module.stride, module.groups) == ((1, 1), (0, 0), (1, 1), 1):
            module.__class__ = Conv1x1
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


class PixelsByProducts(torch.autograd.Function):
    """The 1x1 convolution, with a product for each of its gradients."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve maps (B, C, H, W) with weights (O, C, 1, 1)."""
        ctx.save_for_backward(maps, weight)
        return F.conv2d(maps, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of maps, weight and bias."""
        maps, weight = ctx.saved_tensors
        (outputs, channels), (batch, _, height, width) = weight.shape[:2], maps.shape
        pixels = grad.permute(0, 2, 3, 1).reshape(-1, outputs)
        grad_maps = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            found = pixels @ weight.view(outputs, channels)
            grad_maps = found.view(batch, height, width, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            found = pixels.T @ maps.permute(0, 2, 3, 1).reshape(-1, channels)
            grad_weight = found.view(outputs, channels, 1, 1)
        if ctx.needs_input_grad[2]:
            grad_bias = pixels.sum(0)
        return grad_maps, grad_weight, grad_bias


class DepthwiseByPlaces(torch.autograd.Function):
    """The depthwise convolution, with the gradient of its weight place by place."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve maps (B, C, H, W) with weights (C, 1, K, L) of odd sides; the maps that come out are as large."""
        ctx.save_for_backward(maps, weight)
        ctx.padding = [side // 2 for side in weight.shape[2:]]
        return F.conv2d(maps, weight, bias, 1, ctx.padding, groups=weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of maps, weight and bias."""
        maps, weight = ctx.saved_tensors
        grad_maps = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_maps = torch.ops.aten.convolution_backward(
                grad, maps, weight, None, [1, 1], ctx.padding, [1, 1], False, [0, 0], len(weight), [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = depthwise_gradient(maps, grad, (weight.shape[2], weight.shape[3]))
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_maps, grad_weight, grad_bias


class TransposedByProducts(torch.autograd.Function):
    """The transposed 2x2 convolution with stride 2, with a product for each of its gradients."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Upsample maps (B, C, H, W) with weights (C, O, 2, 2)."""
        ctx.save_for_backward(maps, weight)
        return F.conv_transpose2d(maps, weight, bias, stride=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of maps, weight and bias."""
        maps, weight = ctx.saved_tensors
        batch, channels, height, width = maps.shape
        outputs = weight.shape[1]
        pixels = grad.permute(0, 2, 3, 1).view(batch, height, 2, width, 2, outputs)
        fours = pixels.transpose(2, 3).reshape(-1, 4 * outputs)  # a row for each pixel of the maps
        grad_maps = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            found = fours @ weight.permute(2, 3, 1, 0).reshape(4 * outputs, channels)
            grad_maps = found.view(batch, height, width, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            found = maps.permute(0, 2, 3, 1).reshape(-1, channels).T @ fours
            grad_weight = found.view(channels, 2, 2, outputs).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[2]:
            grad_bias = fours.view(-1, outputs).sum(0)
        return grad_maps, grad_weight, grad_bias


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


def depthwise_gradient(maps: Tensor, grad: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Gradient (C, 1, K, L) of weights of odd sides, of maps (B, C, H, W) and the gradient of what became of them."""
    x, y = maps.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    found = x.new_zeros(*kernel, x.shape[3])
    for i in range(kernel[0]):
        rows, moved_rows = _overlap(x.shape[1], i - kernel[0] // 2)
        for j in range(kernel[1]):
            columns, moved_columns = _overlap(x.shape[2], j - kernel[1] // 2)
            torch.sum(y[:, rows, columns] * x[:, moved_rows, moved_columns], (0, 1, 2), out=found[i, j])
    return found.permute(2, 0, 1).unsqueeze(1)


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    """The places of ``size`` that stay inside when they move by ``shift``, and where they move to."""
    first, last = max(0, -shift), max(0, min(size, size - shift))
    return slice(first, max(first, last)), slice(first + shift, max(first, last) + shift)
