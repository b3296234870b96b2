"""Weighted sums of rows of a table on a CPU, whose gradient is again weighted sums.

RoIAlign, its shifted twin and deformable convolution read pixels of a map at places between them: each result is a sum
of rows of a table, (pixels, channels), with weights. PyTorch's embedding bag makes such sums without copying a row, but
its gradient of the table adds up one product after the other. Here the places are sorted instead, then the gradient of
a row is the sum of what follows for all results that the row is part of: an embedding bag again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tailseg.layers.watched import is_transformed

_SMALL = 2**31  # numbers below fit int32, which sort in half the time


def weighted_sums(table: Tensor, *parts: Tensor) -> Tensor:
    """Sums (Σ K, channels) of rows of ``table``, differentiable once in the table and in the weights.

    Args:
        table: (N, channels) float32 or float64.
        parts: pairs of positions (K, n) int32 or int64 in the table and their weights (K, n) in its dtype; n may differ
            from pair to pair.
    """
    if not table.is_cpu or is_transformed():  # elsewhere, to count waits for the device
        return _sums(table, parts)
    out: Tensor = _WeightedSums.apply(table, *parts)
    return out


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, *parts: Tensor) -> Tensor:
        weighs = any(ctx.needs_input_grad[2::2])
        ctx.save_for_backward(*parts, *([table] if weighs else []))
        ctx.rows = len(table)
        return _sums(table, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weighs = any(ctx.needs_input_grad[2::2])
        saved = ctx.saved_tensors  # once: activation checkpointing lets it be asked for only once
        parts = saved[:-1] if weighs else saved
        grad = grad.contiguous()
        found: list[Tensor | None] = [None] * len(parts)
        if weighs:
            table, first = saved[-1], 0
            for pair in range(0, len(parts), 2):
                places = parts[pair]
                if ctx.needs_input_grad[2 + pair]:
                    found[pair + 1] = _grad_weights(grad[first : first + len(places)], table, places)
                first += len(places)
        return _grad_table(grad, ctx.rows, parts) if ctx.needs_input_grad[0] else None, *found


def _sums(table: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    pairs = zip(parts[::2], parts[1::2], strict=True)
    sums = [F.embedding_bag(places, table, per_sample_weights=weights, mode="sum") for places, weights in pairs]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _grad_table(grad: Tensor, rows: int, parts: tuple[Tensor, ...]) -> Tensor:
    """(N, channels), given that of the sums."""
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    entries = sum(places.numel() for places, _ in pairs)
    dtype = torch.int32 if max(rows, entries) < _SMALL else torch.int64
    places = torch.cat([places.flatten().to(dtype) for places, _ in pairs])
    weights = torch.cat([weights.flatten() for _, weights in pairs])
    results, first = [], 0
    for own, _ in pairs:
        numbers = torch.arange(first, first + len(own), dtype=dtype, device=own.device)
        results.append(numbers.repeat_interleave(own.shape[1], output_size=own.numel()))
        first += len(own)
    order = places.sort(stable=True).indices
    ends = torch.bincount(places, minlength=rows).cumsum(0)
    return F.embedding_bag(
        torch.cat(results).index_select(0, order),
        grad,
        F.pad(ends, (1, 0)).to(dtype),
        per_sample_weights=weights.index_select(0, order),
        mode="sum",
        include_last_offset=True,
    )


def _grad_weights(grad: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """(K, n) products of the gradients of the sums with the rows that they are made of."""
    count, taps = places.shape
    starts = torch.arange(0, count * taps, taps, dtype=places.dtype, device=places.device)
    numbers = torch.arange(count, dtype=places.dtype, device=places.device)
    result = numbers.repeat_interleave(taps, output_size=count * taps)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, places.flatten(), starts, result, 0
    )
    return products.view(count, taps)
