"""Batch norm over chosen rows in Triton: two launches forward and two backward, statistics first, then the values.

The values of a channel are split among programs. Each leaves the count, mean and squared deviations of its share in
float32 steps; all shares together are combined in float64 (Chan, Golub and LeVeque), always in the same order.
"""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARE = 2048  # places of a channel that a program takes at least
SHARES = 64  # programs of a channel at most
TILES = {False: (256, 4), True: (16, 64)}  # places and channels looked at together, by whether channels come last


@triton.jit
def _beside_places(values, last: tl.constexpr):
    """One value a channel, shaped to go with a tile: its last dimension is the one that lies side by side."""
    return values[None, :] if last else values[:, None]


@triton.jit
def _beside_channels(values, last: tl.constexpr):
    """One value a place, shaped to go with a tile."""
    return values[:, None] if last else values[None, :]


@triton.jit
def _tile(start, stop, first_channel, places, channels, last: tl.constexpr, tile: tl.constexpr, width: tl.constexpr):
    """Offsets of a tile of values, their rows of the batch, and which of them there are."""
    place = start + tl.arange(0, tile)
    channel = first_channel + tl.arange(0, width)
    row = place // places
    there = place < stop
    inside = _beside_channels(there, last) & _beside_places(channel < channels, last)
    base = row.to(tl.int64) * channels * places
    if last:
        offsets = (base + (place - row * places) * channels)[:, None] + channel[None, :]
    else:
        offsets = (base + (place - row * places))[None, :] + (channel * places)[:, None]
    return offsets, row, there, inside


@triton.jit
def _statistics_kernel(
    x, rows, shares, total, places, channels, share, masked: tl.constexpr, last: tl.constexpr, tile: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    first_channel = tl.program_id(0) * width
    begin = tl.program_id(1) * share
    stop = tl.minimum(begin + share, total)
    amount = tl.zeros((tile,), tl.float32)
    sums = tl.zeros((tile, width) if last else (width, tile), tl.float32)
    for start in range(begin, stop, tile):
        offsets, row, there, inside = _tile(start, stop, first_channel, places, channels, last, tile, width)
        if masked:
            there = there & (tl.load(rows + row, there, 0) != 0)
            inside = inside & _beside_channels(there, last)
        amount += there.to(tl.float32)
        sums += tl.load(x + offsets, inside, 0.0).to(tl.float32)
    count = tl.sum(amount, 0)
    mean = tl.sum(sums, 0 if last else 1) / tl.maximum(count, 1.0)
    mean_ = _beside_places(mean, last)
    rests = tl.zeros((tile, width) if last else (width, tile), tl.float32)
    squares = tl.zeros((tile, width) if last else (width, tile), tl.float32)
    for start in range(begin, stop, tile):
        offsets, row, there, inside = _tile(start, stop, first_channel, places, channels, last, tile, width)
        if masked:
            inside = inside & _beside_channels(tl.load(rows + row, there, 0) != 0, last)
        deviation = tl.where(inside, tl.load(x + offsets, inside, 0.0).to(tl.float32) - mean_, 0.0)
        rests += deviation
        squares += deviation * deviation
    # What float32 has rounded off the mean is what the deviations from it leave.
    rest = tl.sum(rests, 0 if last else 1).to(tl.float64) / tl.maximum(count, 1.0).to(tl.float64)
    spread = tl.sum(squares, 0 if last else 1).to(tl.float64) - rest * rest * count.to(tl.float64)
    channel = first_channel + tl.arange(0, width)
    here = channel < channels
    out = shares + tl.program_id(1) * 3 * channels + channel
    tl.store(out, tl.zeros((width,), tl.float64) + count.to(tl.float64), here)
    tl.store(out + channels, mean.to(tl.float64) + rest, here)
    tl.store(out + 2 * channels, tl.where(spread < 0, 0.0, spread), here)  # NaN stays


@triton.jit
def _values_kernel(
    x, y, shares, parts, weight, bias, running_mean, running_var, kept, total, places, channels, share, momentum, eps,
    scaled: tl.constexpr, shifted: tl.constexpr, tracked: tl.constexpr, last: tl.constexpr, tile: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    first_channel = tl.program_id(0) * width
    begin = tl.program_id(1) * share
    stop = tl.minimum(begin + share, total)
    channel = first_channel + tl.arange(0, width)
    here = channel < channels
    count = tl.zeros((width,), tl.float64)
    mean = tl.zeros((width,), tl.float64)
    squares = tl.zeros((width,), tl.float64)
    for part in range(0, parts):
        source = shares + part * 3 * channels + channel
        more = tl.load(source, here, 0.0)
        apart = tl.load(source + channels, here, 0.0) - mean
        joint = count + more
        one = tl.where(joint > 0, joint, 1.0)
        squares += tl.load(source + 2 * channels, here, 0.0) + apart * apart * (count * more / one)
        mean += apart * (more / one)
        count = joint
    variance = squares / tl.where(count > 0, count, 1.0)
    # No row at all: what is known already normalises, and stays as it is.
    if tracked:
        old_mean = tl.load(running_mean + channel, here, 0.0).to(tl.float64)
        old_var = tl.load(running_var + channel, here, 1.0).to(tl.float64)
        mean = tl.where(count > 0, mean, old_mean)
        variance = tl.where(count > 0, variance, old_var)
    else:
        variance = tl.where(count > 0, variance, 1.0)
    center = mean.to(tl.float32)
    scale = 1.0 / tl.sqrt(variance.to(tl.float32) + eps)
    if tl.program_id(1) == 0:
        tl.store(kept + channel, center, here)
        tl.store(kept + channels + channel, scale, here)
        tl.store(kept + 2 * channels + channel, count.to(tl.float32), here)
        if tracked:
            unbiased = tl.where(count > 0, variance * (count / tl.where(count > 1, count - 1, 1.0)), variance)
            new_mean = old_mean + momentum * (mean - old_mean)
            new_var = old_var + momentum * (unbiased - old_var)
            # Other programs may read them still, but only where no row counts, and there they do not change.
            tl.store(running_mean + channel, new_mean.to(running_mean.dtype.element_ty), here)
            tl.store(running_var + channel, new_var.to(running_var.dtype.element_ty), here)
    if scaled:
        scale = scale * tl.load(weight + channel, here, 0.0).to(tl.float32)
    center_, scale_ = _beside_places(center, last), _beside_places(scale, last)
    for start in range(begin, stop, tile):
        offsets, _, _, inside = _tile(start, stop, first_channel, places, channels, last, tile, width)
        value = (tl.load(x + offsets, inside, 0.0).to(tl.float32) - center_) * scale_
        if shifted:
            value += _beside_places(tl.load(bias + channel, here, 0.0).to(tl.float32), last)
        tl.store(y + offsets, value.to(y.dtype.element_ty), inside)


@triton.jit
def _sums_kernel(
    grad, x, kept, shares, total, places, channels, share, last: tl.constexpr, tile: tl.constexpr, width: tl.constexpr
):
    """Sums of the gradient, and of its products with the normalised values, of a share."""
    first_channel = tl.program_id(0) * width
    begin = tl.program_id(1) * share
    stop = tl.minimum(begin + share, total)
    channel = first_channel + tl.arange(0, width)
    here = channel < channels
    center = tl.load(kept + channel, here, 0.0)
    scale = tl.load(kept + channels + channel, here, 0.0)
    center_, scale_ = _beside_places(center, last), _beside_places(scale, last)
    plain = tl.zeros((tile, width) if last else (width, tile), tl.float32)
    product = tl.zeros((tile, width) if last else (width, tile), tl.float32)
    for start in range(begin, stop, tile):
        offsets, _, _, inside = _tile(start, stop, first_channel, places, channels, last, tile, width)
        upstream = tl.load(grad + offsets, inside, 0.0).to(tl.float32)
        plain += upstream
        normalized = (tl.load(x + offsets, inside, 0.0).to(tl.float32) - center_) * scale_
        product += tl.where(inside, upstream * normalized, 0.0)
    out = shares + tl.program_id(1) * 2 * channels + channel
    tl.store(out, tl.sum(plain, 0 if last else 1).to(tl.float64), here)
    tl.store(out + channels, tl.sum(product, 0 if last else 1).to(tl.float64), here)


@triton.jit
def _gradient_kernel(
    grad, x, rows, kept, weight, shares, parts, result, sums, total, places, channels, share, scaled: tl.constexpr,
    masked: tl.constexpr, last: tl.constexpr, tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    first_channel = tl.program_id(0) * width
    begin = tl.program_id(1) * share
    stop = tl.minimum(begin + share, total)
    channel = first_channel + tl.arange(0, width)
    here = channel < channels
    plain = tl.zeros((width,), tl.float64)
    product = tl.zeros((width,), tl.float64)
    for part in range(0, parts):
        plain += tl.load(shares + part * 2 * channels + channel, here, 0.0)
        product += tl.load(shares + (part * 2 + 1) * channels + channel, here, 0.0)
    if tl.program_id(1) == 0:
        tl.store(sums + channel, plain.to(tl.float32), here)
        tl.store(sums + channels + channel, product.to(tl.float32), here)
    count = tl.maximum(tl.load(kept + 2 * channels + channel, here, 1.0), 1.0)
    from_mean = plain.to(tl.float32) / count
    from_var = product.to(tl.float32) / count
    center = tl.load(kept + channel, here, 0.0)
    scale = tl.load(kept + channels + channel, here, 0.0)
    factor = scale
    if scaled:
        factor = scale * tl.load(weight + channel, here, 0.0).to(tl.float32)
    center_, scale_, factor_ = _beside_places(center, last), _beside_places(scale, last), _beside_places(factor, last)
    from_mean_, from_var_ = _beside_places(from_mean, last), _beside_places(from_var, last)
    for start in range(begin, stop, tile):
        offsets, row, there, inside = _tile(start, stop, first_channel, places, channels, last, tile, width)
        normalized = (tl.load(x + offsets, inside, 0.0).to(tl.float32) - center_) * scale_
        # All rows feel the statistics; only those that made them get something back.
        back = from_mean_ + normalized * from_var_
        if masked:
            back = tl.where(_beside_channels(tl.load(rows + row, there, 0) != 0, last), back, 0.0)
        value = (tl.load(grad + offsets, inside, 0.0).to(tl.float32) - back) * factor_
        tl.store(result + offsets, value.to(result.dtype.element_ty), inside)


class _Work(NamedTuple):
    """How the values of x are divided among programs."""

    grid: tuple[int, int]
    sizes: tuple[int, int, int, int]  # places of all rows, of a row, channels, places of a share
    layout: dict[str, int | bool]


def _work(x: Tensor) -> _Work:
    last = is_channels_last(x)
    tile, width = TILES[last]
    places, channels = x.shape[2:].numel(), x.shape[1]
    total = len(x) * places
    shares = min(max(total // SHARE, 1), SHARES)
    share = triton.cdiv(triton.cdiv(total, shares), tile) * tile
    grid = (triton.cdiv(channels, width), triton.cdiv(total, share))
    return _Work(grid, (total, places, channels, share), {"last": last, "tile": tile, "width": width})


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of x (N, C, H, W) lie side by side, and not the places of a channel."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def statistics(x: Tensor, rows: Tensor | None) -> Tensor:
    """Count, mean and squared deviations of x's shares, (S, 3, C) float64.

    Args:
        x: (N, C, H, W), not empty, dense in either memory format.
        rows: (N,) bool, the rows that count; None: all.
    """
    work = _work(x)
    shares = torch.empty(work.grid[1], 3, x.shape[1], dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        _statistics_kernel[work.grid](x, _flags(rows, x), shares, *work.sizes, masked=rows is not None, **work.layout)
    return shares


def values(
    x: Tensor,
    shares: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalised x, and its mean, 1 / √(var + eps) and count, (3, C) float32.

    Updates the running statistics in place.
    """
    work = _work(x)
    y = torch.empty_like(x)
    kept = torch.empty(3, x.shape[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _values_kernel[work.grid](
            x,
            y,
            shares,
            len(shares),
            kept if weight is None else weight,
            kept if bias is None else bias,
            kept if running_mean is None else running_mean,
            kept if running_var is None else running_var,
            kept,
            *work.sizes,
            momentum,
            eps,
            scaled=weight is not None,
            shifted=bias is not None,
            tracked=running_mean is not None,
            **work.layout,
        )
    return y, kept


def sums(grad: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """Sums of the gradient and of its products with the normalised x, of x's shares, (S, 2, C) float64."""
    work = _work(x)
    shares = torch.empty(work.grid[1], 2, x.shape[1], dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        _sums_kernel[work.grid](grad, x, kept, shares, *work.sizes, **work.layout)
    return shares


def gradient(
    grad: Tensor, x: Tensor, rows: Tensor | None, kept: Tensor, weight: Tensor | None, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of x, in its dtype and memory format, and the total of the shares' sums, (2, C) float32."""
    work = _work(x)
    result = torch.empty_like(x)
    total = torch.empty(2, x.shape[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _gradient_kernel[work.grid](
            grad,
            x,
            _flags(rows, x),
            kept,
            kept if weight is None else weight,
            shares,
            len(shares),
            result,
            total,
            *work.sizes,
            scaled=weight is not None,
            masked=rows is not None,
            **work.layout,
        )
    return result, total


def _flags(rows: Tensor | None, other: Tensor) -> Tensor:
    """The rows as Triton reads them; something in their place where all count, which is not read."""
    return other if rows is None else rows.contiguous().view(torch.uint8)
