"""CARAFE as weighted bags of rows, (cells, channels): PyTorch's embedding bag sums them without copying a row.

Where a neighbour lies outside, another row is read with weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Window:
    """The window of inputs that an output is summed from; ``up`` or ``down`` is 1."""

    kernel_size: int
    groups: int
    up: int
    down: int


def forward(x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """The sums (N, C, H, W) in the dtype of ``x``, channels_last; arguments of `carafe.plain_carafe`."""
    k, groups, dtype = window.kernel_size, window.groups, sum_dtype(x, kernels)
    cells, valid = _sources(x, kernels, window)
    weights = kernels.permute(0, 2, 3, 1).to(dtype).unflatten(3, (groups, k, k)) * valid.unsqueeze(2)
    bags = _bags(cells, x, groups)
    out = F.embedding_bag(bags, _rows(x, groups, dtype), mode="sum", per_sample_weights=weights.reshape(bags.shape))
    return _maps(out, x, *kernels.shape[2:])


def grad_x(grad: Tensor, x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """Gradient (N, C, h, w) in the dtype of ``x``: a sum of the same kind, over the outputs that see an input."""
    k, groups, dtype = window.kernel_size, window.groups, sum_dtype(x, kernels)
    (height, width), (out_height, out_width) = x.shape[2:], kernels.shape[2:]
    rows, row_taps, row_valid = _targets_along(window, height, out_height, x.device)
    columns, column_taps, column_valid = _targets_along(window, width, out_width, x.device)
    row, column = _outer(rows, columns)
    row_tap, column_tap = _outer(row_taps, column_taps)
    valid_row, valid_column = _outer(row_valid, column_valid)
    cells = row * out_width + column
    taps = torch.arange(groups, device=x.device).view(-1, 1, 1) * (k * k) + (row_tap * k + column_tap).unsqueeze(2)
    places = cells.unsqueeze(2) * (groups * k * k) + taps  # (h, w, groups, A, B), in one image's (H, W, groups · k²)
    weights = kernels.permute(0, 2, 3, 1).to(dtype).flatten(1).index_select(1, places.flatten())
    weights = weights.view(-1, *places.shape).mul_((valid_row & valid_column).unsqueeze(2))
    bags = _bags(cells, grad, groups)
    out = F.embedding_bag(bags, _rows(grad, groups, dtype), mode="sum", per_sample_weights=weights.reshape(bags.shape))
    return _maps(out, x, height, width)


def grad_kernels(grad: Tensor, x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """Gradient (N, groups · k², H, W) in the dtype of ``kernels``, given that of the sums."""
    k, groups, dtype = window.kernel_size, window.groups, sum_dtype(x, kernels)
    cells, valid = _sources(x, kernels, window)
    bags = _bags(cells, x, groups)
    count = len(bags)
    starts = torch.arange(0, count * k * k, k * k, dtype=bags.dtype, device=x.device)
    bag = torch.arange(count, dtype=bags.dtype, device=x.device).repeat_interleave(k * k, output_size=count * k * k)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        _rows(grad, groups, dtype), _rows(x, groups, dtype), bags.flatten(), starts, bag, 0
    )
    inside = products.view(len(x), *kernels.shape[2:], groups, k, k) * valid.unsqueeze(2)
    return _maps(inside, kernels, *kernels.shape[2:])


def sum_dtype(x: Tensor, kernels: Tensor) -> torch.dtype:
    """Data type in which products of the two are summed: float32 at least."""
    return torch.promote_types(torch.promote_types(x.dtype, kernels.dtype), torch.float32)


def _sources_along(window: Window, outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one side: the input (outputs, k) under each tap of each output, and whether there is one."""
    output = torch.arange(outputs, device=device).unsqueeze(1)
    taps = torch.arange(window.kernel_size, device=device)
    source = output // window.up * window.down + taps - window.kernel_size // 2
    return source.clamp(0, inputs - 1), (source >= 0) & (source < inputs)


def _targets_along(window: Window, inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Along one side: every output (inputs, T) that sees an input, by which tap, and whether there is one."""
    last = window.kernel_size - 1
    reach = torch.arange(inputs, device=device).unsqueeze(1) + window.kernel_size // 2
    cell = (reach - last + window.down - 1) // window.down + torch.arange(last // window.down + 1, device=device)
    tap = reach - cell * window.down
    valid = (tap >= 0) & (tap <= last) & (cell >= 0) & (cell < outputs // window.up)
    cell, tap = torch.where(valid, cell, 0), torch.where(valid, tap, 0)
    output = cell.unsqueeze(2) * window.up + torch.arange(window.up, device=device)
    return output.flatten(1), tap.repeat_interleave(window.up, 1), valid.repeat_interleave(window.up, 1)


def _rows(maps: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Maps (N, C, h, w) as (N · h · w · groups, C / groups), without a copy if they are channels_last."""
    return maps.permute(0, 2, 3, 1).to(dtype).reshape(-1, maps.shape[1] // groups)


def _maps(rows: Tensor, like: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_rows`, channels_last, with the channels and dtype of ``like``."""
    return rows.reshape(len(like), height, width, like.shape[1]).permute(0, 3, 1, 2).to(like.dtype)


def _outer(vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
    """Values along each side, (h, A) and (w, B), with shapes that broadcast to (h, w, A, B)."""
    return vertical[:, None, :, None], horizontal[None, :, None, :]


def _bags(cells: Tensor, maps: Tensor, groups: int) -> Tensor:
    """Indices (N · h · w · groups, A · B) of rows of `_rows` of ``maps``, given cells (h, w, A, B) of one map."""
    count, _, height, width = maps.shape
    most = max(maps.numel(), count * groups * cells.numel())
    dtype = torch.int32 if most < 2**31 else torch.int64  # the smaller is an eighth faster
    group = torch.arange(groups, dtype=dtype, device=maps.device).unsqueeze(1)
    one = cells.to(dtype).flatten(2).unsqueeze(2) * groups + group
    image = torch.arange(count, dtype=dtype, device=maps.device).view(-1, 1, 1, 1, 1) * (height * width * groups)
    return (image + one).flatten(0, 3)  # the one pass over all


def _sources(x: Tensor, kernels: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Input cells (H, W, k, k) that each output is summed from, and whether they are inside."""
    (height, width), (out_height, out_width) = x.shape[2:], kernels.shape[2:]
    rows, row_valid = _sources_along(window, out_height, height, x.device)
    columns, column_valid = _sources_along(window, out_width, width, x.device)
    row, column = _outer(rows, columns)
    valid_row, valid_column = _outer(row_valid, column_valid)
    return row * width + column, valid_row & valid_column
