"""CARAFE in Triton: a program a block of cells and channels; everything channels_last, nothing copied."""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailseg.layers.carafe_gather import Window

CELL_BLOCK = 16  # cells of a program that sums over neighbours
CHANNEL_BLOCK = 128  # and its channels at most
TAP_CELL_BLOCK = 4  # cells of a program that sums over channels, for all taps at once
TAP_CHANNEL_BLOCK = 32


@triton.jit
def _place(cell, height, width):
    """Image (int64: what follows from it may pass 2^31), row and column of a cell."""
    return (cell // (height * width)).to(tl.int64), cell // width % height, cell % width


@triton.jit
def _forward_kernel(
    x, kernels, out, cells, height, width, out_height, out_width, channels,
    k: tl.constexpr, groups: tl.constexpr, up: tl.constexpr, down: tl.constexpr,
    cell_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * cell_block + tl.arange(0, cell_block)
    inside = cell < cells
    image, out_row, out_column = _place(cell, out_height, out_width)
    own = channels // groups
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    group = tl.program_id(2)
    total = tl.zeros((cell_block, channel_block), tl.float32)
    for tap in range(k * k):
        row = out_row // up * down + tap // k - k // 2
        column = out_column // up * down + tap % k - k // 2
        seen = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = tl.load(kernels + (cell.to(tl.int64) * groups + group) * (k * k) + tap, seen, 0.0).to(tl.float32)
        start = ((image * height + row) * width + column) * channels + group * own
        mask = seen[:, None] & (channel < own)[None, :]
        total += weight[:, None] * tl.load(x + start[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
    start = cell.to(tl.int64) * channels + group * own
    mask = inside[:, None] & (channel < own)[None, :]
    tl.store(out + start[:, None] + channel[None, :], total.to(out.dtype.element_ty), mask)


@triton.jit
def _grad_x_kernel(
    grad, kernels, result, cells, height, width, out_height, out_width, channels,
    k: tl.constexpr, groups: tl.constexpr, up: tl.constexpr, down: tl.constexpr,
    cell_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    """For every input, the sum over the outputs that see it: those of `Window.targets`."""
    cell = tl.program_id(0) * cell_block + tl.arange(0, cell_block)
    inside = cell < cells
    image, in_row, in_column = _place(cell, height, width)
    own = channels // groups
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    group = tl.program_id(2)
    last: tl.constexpr = k - 1
    side: tl.constexpr = (last // down + 1) * up
    # Rounded up; the numerator is kept from being negative, as Triton divides towards zero.
    first_row = (in_row + k // 2 - last + down - 1 + last * down) // down - last
    first_column = (in_column + k // 2 - last + down - 1 + last * down) // down - last
    total = tl.zeros((cell_block, channel_block), tl.float32)
    for target in range(side * side):
        i = target // side
        j = target % side
        a = in_row + k // 2 - (first_row + i // up) * down
        b = in_column + k // 2 - (first_column + j // up) * down
        row = (first_row + i // up) * up + i % up
        column = (first_column + j // up) * up + j % up
        seen = inside & (a >= 0) & (a < k) & (b >= 0) & (b < k)
        seen = seen & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        out_cell = (image * out_height + row) * out_width + column
        weight = tl.load(kernels + (out_cell * groups + group) * (k * k) + a * k + b, seen, 0.0).to(tl.float32)
        start = out_cell * channels + group * own
        mask = seen[:, None] & (channel < own)[None, :]
        total += weight[:, None] * tl.load(grad + start[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
    start = cell.to(tl.int64) * channels + group * own
    mask = inside[:, None] & (channel < own)[None, :]
    tl.store(result + start[:, None] + channel[None, :], total.to(result.dtype.element_ty), mask)


@triton.jit
def _grad_kernels_kernel(
    grad, x, result, cells, height, width, out_height, out_width, channels,
    k: tl.constexpr, groups: tl.constexpr, up: tl.constexpr, down: tl.constexpr,
    cell_block: tl.constexpr, tap_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * cell_block + tl.arange(0, cell_block)
    inside = cell < cells
    image, out_row, out_column = _place(cell, out_height, out_width)
    own = channels // groups
    group = tl.program_id(1)
    tap = tl.arange(0, tap_block)
    row = (out_row // up * down - k // 2)[:, None] + (tap // k)[None, :]
    column = (out_column // up * down - k // 2)[:, None] + (tap % k)[None, :]
    wanted = inside[:, None] & (tap < k * k)[None, :]
    seen = wanted & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = ((image[:, None] * height + row) * width + column) * channels + group * own
    target = cell.to(tl.int64) * channels + group * own
    total = tl.zeros((cell_block, tap_block), tl.float32)
    for start in range(0, own, channel_block):
        channel = start + tl.arange(0, channel_block)
        mask = inside[:, None] & (channel < own)[None, :]
        upstream = tl.load(grad + target[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
        mask = seen[:, :, None] & (channel < own)[None, None, :]
        value = tl.load(x + source[:, :, None] + channel[None, None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(upstream[:, None, :] * value, 2)
    place = (cell.to(tl.int64) * groups + group) * (k * k)
    tl.store(result + place[:, None] + tap[None, :], total.to(result.dtype.element_ty), wanted)


def _last(maps: Tensor) -> Tensor:
    return maps.detach().contiguous(memory_format=torch.channels_last)


def _sizes(x: Tensor, kernels: Tensor, window: Window) -> tuple[tuple[int, ...], dict[str, int]]:
    """Arguments of every kernel: heights, widths, channels; and the window."""
    about = {"k": window.kernel_size, "groups": window.groups, "up": window.up, "down": window.down}
    return (*x.shape[2:], *kernels.shape[2:], x.shape[1]), about


def _channel_blocks(channels: int, groups: int) -> tuple[int, int]:
    """Channels of a program, and programs a group."""
    block = min(triton.next_power_of_2(channels // groups), CHANNEL_BLOCK)
    return block, triton.cdiv(channels // groups, block)


def forward(x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """The sums (N, C, H, W) in the dtype of ``x``, channels_last; arguments of `carafe.plain_carafe`."""
    x, kernels = _last(x), _last(kernels)
    shape = (len(x), x.shape[1], *kernels.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sizes, about = _sizes(x, kernels, window)
    cells = shape[0] * shape[2] * shape[3]
    if out.numel():
        block, blocks = _channel_blocks(shape[1], window.groups)
        grid = (triton.cdiv(cells, CELL_BLOCK), blocks, window.groups)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, kernels, out, cells, *sizes, **about, cell_block=CELL_BLOCK, channel_block=block)
    return out


def grad_x(grad: Tensor, x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """Gradient (N, C, h, w) in the dtype of ``x``, channels_last, given that of the sums (N, C, H, W)."""
    grad, kernels = _last(grad), _last(kernels)
    result = torch.empty_like(x, memory_format=torch.channels_last)
    sizes, about = _sizes(x, kernels, window)
    cells = len(x) * x.shape[2] * x.shape[3]
    if result.numel():
        block, blocks = _channel_blocks(x.shape[1], window.groups)
        grid = (triton.cdiv(cells, CELL_BLOCK), blocks, window.groups)
        with torch.cuda.device_of(x):
            _grad_x_kernel[grid](
                grad, kernels, result, cells, *sizes, **about, cell_block=CELL_BLOCK, channel_block=block
            )
    return result


def grad_kernels(grad: Tensor, x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """Gradient (N, groups · k², H, W) in the dtype of ``kernels``, channels_last, given that of the sums."""
    grad, x = _last(grad), _last(x)
    result = torch.empty_like(kernels, memory_format=torch.channels_last)
    sizes, about = _sizes(x, kernels, window)
    cells = len(x) * kernels.shape[2] * kernels.shape[3]
    if result.numel():
        taps = triton.next_power_of_2(window.kernel_size**2)
        blocks = {"cell_block": TAP_CELL_BLOCK, "tap_block": taps, "channel_block": TAP_CHANNEL_BLOCK}
        grid = (triton.cdiv(cells, TAP_CELL_BLOCK), window.groups)
        with torch.cuda.device_of(x):
            _grad_kernels_kernel[grid](grad, x, result, cells, *sizes, **about, **blocks)
    return result
