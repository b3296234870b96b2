"""Modulated deformable convolution in Triton: what the taps see is gathered into rows, and multiplied as a matrix.

Everything is channels_last. The backward pass gathers again, so nothing is kept for it but the arguments; where its
gradients are, what the taps saw is then written, for the gradient of the weights: one such matrix lives at a time.
"""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CELL_BLOCK = 8  # output places of a program
CHANNEL_BLOCK = 128  # channels read at a time, at most
MATRIX_ELEMENTS = 1 << 29  # most of what the taps see at a time, in whole images: 1 GiB in bfloat16

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair, Pair]  # kernel, stride, padding, dilation; rows before columns


@triton.jit
def _side(place, size):
    """The cell before a place, its weight and the next one's, 0 outside; whether each is inside."""
    before = tl.floor(place)
    part = place - before
    first = (before >= 0) & (before < size)
    second = (before >= -1) & (before < size - 1)
    # Multiplied and not selected: the weight of a place that is no number is none either.
    return before.to(tl.int32), (1 - part) * first.to(tl.float32), part * second.to(tl.float32), first, second


@triton.jit
def _places(
    offset, cell, inside, tap, height, width, out_height, out_width, kernel_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, taps: tl.constexpr,
):  # fmt: skip
    """Image (int64: what follows from it may pass 2^31), row and column at which a tap looks from output cells."""
    image = (cell // (out_height * out_width)).to(tl.int64)
    start_y = cell // out_width % out_height * stride_y - padding_y + tap // kernel_columns * dilation_y
    start_x = cell % out_width * stride_x - padding_x + tap % kernel_columns * dilation_x
    shifts = offset + cell.to(tl.int64) * (2 * taps) + 2 * tap
    y = start_y.to(tl.float32) + tl.load(shifts, inside, 0.0)
    x = start_x.to(tl.float32) + tl.load(shifts + 1, inside, 0.0)
    return image, y, x


@triton.jit
def _gather_kernel(
    features, offset, modulation, columns, cells, height, width, out_height, out_width, channels, own, kernel_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    taps: tl.constexpr, cell_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * cell_block + tl.arange(0, cell_block)
    tap = tl.program_id(1)
    inside = cell < cells
    image, y, x = _places(
        offset, cell, inside, tap, height, width, out_height, out_width, kernel_columns,
        stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, taps,
    )  # fmt: skip
    row, above, below, top, bottom = _side(y, height)
    column, before, after, left, right = _side(x, width)
    counts = tl.load(modulation + cell.to(tl.int64) * taps + tap, inside, 0.0)
    above, below = above * counts, below * counts
    corner = features + ((image * height + row) * width + column) * channels
    for start in range(0, channels, channel_block):
        channel = start + tl.arange(0, channel_block)
        wanted = inside[:, None] & (channel < channels)[None, :]
        source = corner[:, None] + channel[None, :]
        below_source = source + width * channels
        a = tl.load(source, wanted & (top & left)[:, None], 0.0).to(tl.float32)
        b = tl.load(source + channels, wanted & (top & right)[:, None], 0.0).to(tl.float32)
        c = tl.load(below_source, wanted & (bottom & left)[:, None], 0.0).to(tl.float32)
        d = tl.load(below_source + channels, wanted & (bottom & right)[:, None], 0.0).to(tl.float32)
        upper = a * before[:, None] + b * after[:, None]
        lower = c * before[:, None] + d * after[:, None]
        value = upper * above[:, None] + lower * below[:, None]
        # (groups, cells, taps, channels of a group)
        target = ((channel // own).to(tl.int64) * cells)[None, :] + cell[:, None]
        target = (target * taps + tap) * own + (channel % own)[None, :]
        tl.store(columns + target, value.to(columns.dtype.element_ty), wanted)


@triton.jit
def _scatter_kernel(
    features, offset, modulation, columns, grad_features, grad_offset, grad_modulation,
    cells, height, width, out_height, out_width, channels, own, kernel_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    taps: tl.constexpr, cell_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    """Reads from ``columns`` the gradients of what the taps saw, and leaves there what they saw."""
    cell = tl.program_id(0) * cell_block + tl.arange(0, cell_block)
    tap = tl.program_id(1)
    inside = cell < cells
    image, y, x = _places(
        offset, cell, inside, tap, height, width, out_height, out_width, kernel_columns,
        stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, taps,
    )  # fmt: skip
    row, above, below, top, bottom = _side(y, height)
    column, before, after, left, right = _side(x, width)
    counts = tl.load(modulation + cell.to(tl.int64) * taps + tap, inside, 0.0)
    corner = ((image * height + row) * width + column) * channels
    by_y = tl.zeros((cell_block,), tl.float32)
    by_x = tl.zeros((cell_block,), tl.float32)
    by_counts = tl.zeros((cell_block,), tl.float32)
    for start in range(0, channels, channel_block):
        channel = start + tl.arange(0, channel_block)
        wanted = inside[:, None] & (channel < channels)[None, :]
        place = corner[:, None] + channel[None, :]
        below_place = place + width * channels
        top_left = wanted & (top & left)[:, None]
        top_right = wanted & (top & right)[:, None]
        bottom_left = wanted & (bottom & left)[:, None]
        bottom_right = wanted & (bottom & right)[:, None]
        a = tl.load(features + place, top_left, 0.0).to(tl.float32)
        b = tl.load(features + place + channels, top_right, 0.0).to(tl.float32)
        c = tl.load(features + below_place, bottom_left, 0.0).to(tl.float32)
        d = tl.load(features + below_place + channels, bottom_right, 0.0).to(tl.float32)
        target = ((channel // own).to(tl.int64) * cells)[None, :] + cell[:, None]
        target = columns + (target * taps + tap) * own + (channel % own)[None, :]
        grad = tl.load(target, wanted, 0.0).to(tl.float32)
        upper = a * before[:, None] + b * after[:, None]
        lower = c * before[:, None] + d * after[:, None]
        seen = upper * above[:, None] + lower * below[:, None]
        tl.store(target, (seen * counts[:, None]).to(columns.dtype.element_ty), wanted)
        by_counts += tl.sum(grad * seen, 1)
        grad = grad * counts[:, None]
        # Along a side the derivatives of the two weights are -1 and 1; cells outside were read as zeros.
        by_y += tl.sum(grad * (lower - upper), 1)
        left_side = a * above[:, None] + c * below[:, None]
        right_side = b * above[:, None] + d * below[:, None]
        by_x += tl.sum(grad * (right_side - left_side), 1)
        tl.atomic_add(grad_features + place, grad * (above * before)[:, None], top_left, sem="relaxed")
        tl.atomic_add(grad_features + place + channels, grad * (above * after)[:, None], top_right, sem="relaxed")
        tl.atomic_add(grad_features + below_place, grad * (below * before)[:, None], bottom_left, sem="relaxed")
        tl.atomic_add(
            grad_features + below_place + channels, grad * (below * after)[:, None], bottom_right, sem="relaxed"
        )
    shifts = grad_offset + cell.to(tl.int64) * (2 * taps) + 2 * tap
    tl.store(shifts, by_y, inside)
    tl.store(shifts + 1, by_x, inside)
    tl.store(grad_modulation + cell.to(tl.int64) * taps + tap, by_counts, inside)


class DeformConv(torch.autograd.Function):
    """The sums without a bias, (N, D, h, w) in the dtype of ``x``; arguments of `deform_conv.triton_deform_conv2d`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """Gather what the taps see and multiply it, some images at a time."""
        x, offset, mask = (part.contiguous(memory_format=torch.channels_last) for part in (x, offset, mask))
        ctx.save_for_backward(x, offset, mask, weight)
        ctx.geometry = geometry
        kernels = _kernels_by_group(weight, x.shape[1])
        rows = []
        for images in _images_at_a_time(offset, x.shape[1], geometry):
            columns = _new_columns(x[images], offset[images], kernels)
            _run(_gather_kernel, x[images], offset[images], mask[images], (columns,), kernels, geometry)
            rows.append(torch.bmm(columns, kernels).transpose(0, 1).flatten(1))
        out = rows[0] if len(rows) == 1 else torch.cat([x.new_empty(0, len(weight)), *rows])
        return out.view(len(x), *offset.shape[2:], len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the four tensors."""
        x, offset, mask, weight = ctx.saved_tensors
        kernels = _kernels_by_group(weight, x.shape[1])
        grad_x = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.channels_last)
        grad_offset, grad_mask = torch.empty_like(offset), torch.empty_like(mask)
        grad_kernels = torch.zeros_like(kernels, dtype=torch.float32)
        upstream = grad.permute(0, 2, 3, 1).to(x.dtype)
        for images in _images_at_a_time(offset, x.shape[1], ctx.geometry):
            by_group = upstream[images].reshape(-1, len(kernels), kernels.shape[2]).transpose(0, 1)
            columns = torch.bmm(by_group, kernels.transpose(1, 2))
            outputs = (columns, grad_x[images], grad_offset[images], grad_mask[images])
            _run(_scatter_kernel, x[images], offset[images], mask[images], outputs, kernels, ctx.geometry)
            grad_kernels += torch.bmm(columns.transpose(1, 2), by_group)
        grad_weight = grad_kernels.unflatten(1, (-1, weight.shape[1])).permute(0, 3, 2, 1).reshape(weight.shape)
        return grad_x.to(x.dtype), grad_offset, grad_mask, grad_weight.to(weight.dtype), None


def _kernels_by_group(weight: Tensor, channels: int) -> Tensor:
    """(groups, k² · C / groups, D / groups) of (D, C / groups, rows, columns)."""
    by_group: Tensor = weight.flatten(2).unflatten(0, (channels // weight.shape[1], -1))
    return by_group.permute(0, 3, 2, 1).flatten(1, 2)


def _images_at_a_time(offset: Tensor, channels: int, geometry: Geometry) -> list[slice]:
    """Runs of images of which what the taps see is not too large."""
    (rows, columns), *_ = geometry
    each = rows * columns * channels * offset.shape[2] * offset.shape[3]
    step = max(1, MATRIX_ELEMENTS // max(1, each))
    return [slice(start, start + step) for start in range(0, len(offset) if each else 0, step)]


def _new_columns(x: Tensor, offset: Tensor, kernels: Tensor) -> Tensor:
    """(groups, places, k² · C / groups), not filled."""
    places = len(offset) * offset.shape[2] * offset.shape[3]
    return torch.empty(len(kernels), places, kernels.shape[1], dtype=x.dtype, device=x.device)


def _run(
    kernel: Any, x: Tensor, offset: Tensor, mask: Tensor, outputs: tuple[Tensor, ...], kernels: Tensor, how: Geometry
) -> None:
    """A kernel over output places and taps."""
    channels, taps, (out_height, out_width) = x.shape[1], mask.shape[1], mask.shape[2:]
    cells = len(x) * out_height * out_width
    (_, kernel_columns), *steps = how
    with torch.cuda.device_of(x):
        kernel[triton.cdiv(cells, CELL_BLOCK), taps](
            x,
            offset,
            mask,
            *outputs,
            cells,
            *x.shape[2:],
            out_height,
            out_width,
            channels,
            channels // len(kernels),
            kernel_columns,
            *(number for pair in steps for number in pair),
            taps=taps,
            cell_block=CELL_BLOCK,
            channel_block=min(triton.next_power_of_2(channels), CHANNEL_BLOCK),
        )
