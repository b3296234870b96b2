"""Modulated deformable convolution: DCNv2 (arXiv:1811.11168).

A small convolution reads two numbers and a weight for each of the k² taps off the features, at every output place:
where the tap looks, as a shift (down, right) in cells of the input, and how much it counts. Between cells the input
is interpolated, beyond its border it is zero.

There are three ways to it: weighted bags of rows (CPU), Triton (CUDA) and torchvision's operator (everything else),
which is slow on the CPU and knows neither low precision nor channels_last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from tailseg.layers.triton_support import has_triton
from tailseg.layers.watched import is_watched
from tailseg.layers.weighted_sums import weighted_sums

Pair = tuple[int, int]


class ModulatedDeformConv2d(nn.Module):
    """Stands in for `nn.Conv2d` of the same arguments, with one set of shifts for all channels.

    Shifts and sums are float32 at least, also under autocast: shifts are places, and bfloat16 knows a place four cells
    away to 1/64 of a cell only. Features and weights are float32 at least on the CPU; on CUDA autocast rounds them as
    those of any convolution.

    At the start shifts are 0 and every tap counts half (a sigmoid of 0), so the layer gives half of what the plain
    convolution of its weights gives. An initialiser run over all convolutions of a model afterwards would undo that.
    `start_as_plain` makes up for the half; where a batch norm follows there is no need.

    Args:
        in_channels: C.
        out_channels: D.
        kernel_size: k, or rows and columns.
        stride: likewise.
        padding: likewise; "same" pads as TensorFlow does, to ceil(size / stride) outputs, an odd zero at the end.
        dilation: likewise.
        groups: of channels that see only each other.
        bias: whether there is one; it is not modulated.

    Shapes: (N, C, H, W) -> (N, D, h, w), in the dtype of the input, channels_last if the input is.

    Raises:
        ValueError: the padding is another word, or the channels do not fall into ``groups``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | Literal["same"] = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f"padding must be a number, two of them or 'same', got '{padding}'")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels do not fall into {groups} groups of one size")
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.same = padding == "same"
        self.padding = (0, 0) if isinstance(padding, str) else _pair(padding)
        self.taps = self.kernel_size[0] * self.kernel_size[1]
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        # Channel 2t is how far tap t shifts down, 2t + 1 how far right, 2k² + t what it counts before the sigmoid.
        self.conv_offset = nn.Conv2d(
            in_channels,
            3 * self.taps,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        bound = 1 / math.sqrt(in_channels * self.taps)
        nn.init.uniform_(self.weight, -bound, bound)
        self._forget_shifts()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> ModulatedDeformConv2d:
        """A layer on the device and in the dtype of a convolution that at first computes exactly what that does.

        Raises:
            ValueError: it is another kind of convolution than PyTorch's or timm's `Conv2dSame`, or pads with other
                values than 0.
        """
        if type(conv) not in (nn.Conv2d, Conv2dSame) or conv.padding_mode != "zeros":
            raise ValueError(f"a {type(conv).__name__} padded with {conv.padding_mode} has no deformable form")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            cast(Pair, conv.kernel_size),
            stride=cast(Pair, conv.stride),
            padding="same" if isinstance(conv, Conv2dSame) else cast(Any, conv.padding),
            dilation=cast(Pair, conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
        ).to(conv.weight)
        with torch.no_grad():
            layer.weight.copy_(conv.weight)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        layer.start_as_plain()
        return layer

    @torch.no_grad()
    def start_as_plain(self) -> None:
        """Compute what the plain convolution of the present weight and bias does.

        The shifts become 0. Then every tap counts 1/2, hence the weight is doubled: a power of two, so nothing is
        rounded, and the products and their sum are those of the convolution.
        """
        self._forget_shifts()
        self.weight.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, h, w) of (N, C, H, W)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        convolve = _way(x.device, dtype)
        places = dtype
        if convolve is triton_deform_conv2d and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            if self.same:
                x = F.pad(x, self._same_padding((x.shape[2], x.shape[3])))
            shifts, logits = self._told(x).to(places).split((2 * self.taps, self.taps), dim=1)
            out = convolve(
                x.to(dtype),
                shifts,
                self.weight.to(dtype),
                None if self.bias is None else self.bias.to(dtype),
                self.stride,
                self.padding,
                self.dilation,
                logits.sigmoid(),
            )
        last = x.is_contiguous(memory_format=torch.channels_last)
        return out.to(x.dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _told(self, x: Tensor) -> Tensor:
        """Shifts and logits (N, 3k², h, w) in the dtype of the weights.

        Of features of another dtype it is they that are kept for the backward pass, not the converted copy.
        """
        conv = self.conv_offset
        if x.dtype == conv.weight.dtype:
            return cast(Tensor, conv(x))
        out: Tensor = _ConvertingConv.apply(x, conv.weight, conv.bias, self.stride, self.padding, self.dilation)
        return out

    def extra_repr(self) -> str:
        """Settings that `repr` shows beside the parts."""
        out_channels, in_channels = self.weight.shape[:2]
        padding = "same" if self.same else self.padding
        return f"{in_channels} a group, {out_channels}, {self.kernel_size}, stride={self.stride}, padding={padding}"

    def _forget_shifts(self) -> None:
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def _same_padding(self, image_hw: tuple[int, int]) -> list[int]:
        """Zeros left, right, above and below."""
        sides = []
        for axis in (1, 0):
            size, stride = image_hw[axis], self.stride[axis]
            reach = (-(-size // stride) - 1) * stride + (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            missing = max(reach - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return sides


class _ConvertingConv(torch.autograd.Function):
    """A convolution in the dtype of its weights that keeps the features as they were for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(x.to(weight.dtype), weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sizes, none = [len(weight)], [0, 0]
        grads = torch.ops.aten.convolution_backward(
            grad, x.to(weight.dtype), weight, sizes, *ctx.geometry, False, none, 1, ctx.needs_input_grad[:3]
        )
        grad_x, grad_weight, grad_bias = grads
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None


def triton_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor,
) -> Tensor:
    """The same by Triton kernels: CUDA, or any device under ``TRITON_INTERPRET=1``; differentiable once.

    Arguments of `gathered_deform_conv2d`, ``x`` and ``weight`` in float32 or narrower, the dtype in which what the taps
    see is gathered and multiplied (sums are float32); ``offset`` and ``mask`` in float32.
    """
    from tailseg.layers.deform_conv_triton import DeformConv

    geometry = ((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    out: Tensor = DeformConv.apply(x, offset, mask, weight, geometry)
    return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)


def _way(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The fastest of the three ways that will do."""
    if device.type == "cpu" and not torch.compiler.is_exporting():
        return gathered_deform_conv2d
    if device.type == "cuda" and dtype == torch.float32 and has_triton() and not is_watched():
        return triton_deform_conv2d
    return cast("Callable[..., Tensor]", deform_conv2d)


def gathered_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor,
) -> Tensor:
    """`torchvision.ops.deform_conv2d` as weighted bags of rows, (cells, channels), and one matrix product a group.

    On the CPU it is several times faster, forward and above all backward. For the backward pass it keeps what every
    tap saw, k² times the input, which torchvision computes again.

    Args:
        x: (N, C, H, W) float32 or float64; channels_last is read without a copy.
        offset: (N, 2k², h, w), for each tap, row by row, how far down and how far right it shifts.
        weight: (D, C / groups, rows, columns).
        bias: (D,), if any.
        stride: of rows and of columns, as the next two.
        padding: likewise.
        dilation: likewise.
        mask: (N, k², h, w), what each tap counts.

    Returns:
        (N, D, h, w), channels_last.
    """
    count, channels, height, width = x.shape
    out_hw, taps = offset.shape[2:], mask.shape[1]
    groups = channels // weight.shape[1]
    shifts = offset.permute(0, 2, 3, 1).unflatten(3, (taps, 2))
    tap = torch.arange(taps, device=x.device)
    sides = []
    for axis, numbers in enumerate((tap // weight.shape[3], tap % weight.shape[3])):
        starts = torch.arange(out_hw[axis], device=x.device) * stride[axis] - padding[axis]
        places = starts.view((-1, 1, 1) if axis == 0 else (-1, 1)) + numbers * dilation[axis] + shifts[..., axis]
        sides.append(_neighbours(places, x.shape[2 + axis]))
    (rows, row_weights), (columns, column_weights) = sides  # (N, h, w, k², 2)
    large = max(x.numel(), 4 * mask.numel()) >= 2**31
    image = torch.arange(count, device=x.device).view(-1, 1, 1, 1, 1, 1) * (height * width)
    cells = image + rows.unsqueeze(5) * width + columns.unsqueeze(4)
    weights = row_weights.unsqueeze(5) * column_weights.unsqueeze(4) * mask.permute(0, 2, 3, 1)[..., None, None]
    seen = weighted_sums(
        x.permute(0, 2, 3, 1).reshape(-1, channels),
        cells.view(-1, 4).to(torch.int64 if large else torch.int32),
        weights.reshape(-1, 4),
    )
    seen = seen.view(-1, taps, groups, channels // groups)
    kernels = weight.flatten(2).view(groups, -1, channels // groups, taps)
    out = torch.einsum("pkgc,gdck->pgd", seen, kernels).reshape(count, *out_hw, len(weight))
    if bias is not None:
        out = out + bias
    return out.permute(0, 3, 1, 2)


def _neighbours(places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two cells (..., 2) int64 beside each place (...) along a side, and their weights, 0 for cells outside."""
    before = places.detach().floor()
    part = places - before
    pair = torch.stack([before, before + 1], dim=-1)
    weights = torch.stack([1 - part, part], dim=-1) * ((pair >= 0) & (pair < size))
    # What is no number gets a cell that exists, and a weight that is no number either.
    return pair.nan_to_num().clamp(0, size - 1).long(), weights


def _pair(value: int | Pair) -> Pair:
    return value if isinstance(value, tuple) else (value, value)
