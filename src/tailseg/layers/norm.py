"""Batch norm over all processes and over chosen rows.

`torch.nn.SyncBatchNorm` runs on CUDA alone and cannot leave rows out. Shape letters: N rows, C channels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d as TimmBatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tailseg.errors import UserError
from tailseg.layers.triton_support import has_triton

Norm = bool | Literal["group"]  # none, batch norm, group norm
GROUPS = 32


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    rows: Tensor | None = None,
    over_processes: bool = False,
) -> Tensor:
    """(x - mean) / √(var + eps) · weight + bias with the statistics of this batch, in float32 or x's wider type.

    Updates the running statistics in place, the variance as its unbiased estimate. Where there is no row to count, in
    no process, the running statistics (0 and 1 without them) normalise and stay as they are.

    Over several processes the call takes one sum over them, and its backward pass another one. Every process must
    join both: also one with no rows needs its output in its loss.

    Args:
        x: (N, C, ...), any floating type and memory format; N may be 0.
        weight: (C,), or None for 1. The gradient is this process's own part.
        bias: (C,), or None for 0. Likewise.
        running_mean: (C,), or None to keep none.
        running_var: (C,), or None with ``running_mean``.
        momentum: share of this batch in the running statistics.
        eps: added to the variance.
        rows: (N,) bool, the rows that count; the others are normalised with the statistics of those. None: all count.
        over_processes: take the statistics over all processes of the default `torch.distributed` group.

    Returns:
        Like x, in its shape, type and memory format.

    Raises:
        ValueError: x has no channels, ``rows`` is not one bool a row, or one running statistic is None alone.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or both be None")
    if x.ndim < 2:
        raise ValueError(f"x must be (N, C, ...), got shape {tuple(x.shape)}")
    if rows is not None and (rows.dtype != torch.bool or rows.shape != x.shape[:1]):
        raise ValueError(f"rows must be bool of shape ({x.shape[0]},), got {rows.dtype} of {tuple(rows.shape)}")
    joined = over_processes and several_processes()
    way = _TritonBatchNorm if takes_triton(x) else _BatchNorm
    y: Tensor = way.apply(x, weight, bias, running_mean, running_var, momentum, eps, rows, joined)
    return y


def takes_triton(x: Tensor) -> bool:
    """Return whether Triton's kernels are the way for x."""
    return bool(x.is_cuda and x.ndim == 4 and x.numel() and x.dtype != torch.float64 and has_triton())


def several_processes() -> bool:
    """Return whether `torch.distributed` is initialised with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        rows: Tensor | None,
        joined: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        count, mean, var = _statistics(x, rows, joined)
        channels = x.shape[1]
        mean = torch.where(count > 0, mean, mean.new_zeros(channels) if running_mean is None else running_mean)
        var = torch.where(count > 0, var, var.new_ones(channels) if running_var is None else running_var)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            # No row at all: var is the running one and must come through unchanged.
            unbiased = var * torch.where(count > 0, count / (count - 1).clamp(min=1), 1.0)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        mean, var = mean.to(dtype), var.to(dtype)
        scale, shift = (None if p is None else p.to(dtype) for p in (weight, bias))
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count.to(dtype), rows)
        ctx.joined = joined
        return F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count, rows = ctx.saved_tensors
        dims, shape = _reduced(x)
        normalized = (x - mean.view(shape)).mul_(invstd.view(shape))
        sums = torch.stack([grad.sum(dims, dtype=mean.dtype), (grad * normalized).sum(dims)])
        # All rows feel the statistics, so all are in the sums; only those that made them get something back.
        total = sums.clone()
        if ctx.joined:  # as _TritonBatchNorm does, which another process may run
            total = total.double()
            dist.all_reduce(total)
            total = total.to(sums.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            from_mean, from_var = total / count.clamp(min=1)
            grad_x = normalized.mul_(from_var.view(shape)).add_(from_mean.view(shape)).neg_()
            if rows is not None:
                grad_x.masked_fill_(~_per_row(rows, x), 0)
            scale = invstd if weight is None else invstd * weight.to(mean.dtype)
            grad_x = grad_x.add_(grad).mul_(scale.view(shape)).to(x.dtype)
        grad_weight = sums[1] if ctx.needs_input_grad[1] else None
        grad_bias = sums[0] if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


class _TritonBatchNorm(torch.autograd.Function):
    """The same in four launches; over processes a few more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        rows: Tensor | None,
        joined: bool,
    ) -> Tensor:
        from tailseg.layers import norm_triton

        x = _dense(x)
        shares = norm_triton.statistics(x, rows)
        if joined:
            count, mean, squares = shares.unbind(1)
            totals = torch.cat([count.sum(0), (count * mean).sum(0), (squares + count * mean.square()).sum(0)])
            dist.all_reduce(totals)
            count, total, square = totals.chunk(3)
            mean = total / count.clamp(min=1)
            shares = torch.stack([count, mean, (square - count * mean.square()).clamp(min=0)]).unsqueeze(0)
        y, kept = norm_triton.values(x, shares, weight, bias, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, weight, kept, rows)
        ctx.joined = joined
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from tailseg.layers import norm_triton

        x, weight, kept, rows = ctx.saved_tensors
        last = norm_triton.is_channels_last(x)
        grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        shares = norm_triton.sums(grad, x, kept)
        own = None
        if ctx.joined:
            own = shares.sum(0)
            shares = own.clone().unsqueeze(0)
            dist.all_reduce(shares)
        grad_x, total = norm_triton.gradient(grad, x, rows, kept, weight, shares)
        of_bias, of_weight = (total if own is None else own.to(total.dtype)).unbind(0)
        wanted = ctx.needs_input_grad
        return grad_x, of_weight if wanted[1] else None, of_bias if wanted[2] else None, *[None] * 6


def _dense(x: Tensor) -> Tensor:
    """X without gaps, as it is where it is so in either memory format."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _statistics(x: Tensor, rows: Tensor | None, joined: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (C,) and biased variance (C,) of the rows that count, float64; any finite values for none."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dims, shape = _reduced(x)
    places = x.shape[2:].numel()
    if rows is None:
        count = torch.full((), x.shape[0] * places, dtype=torch.float64, device=x.device)
        counted = x
    else:
        count = rows.sum(dtype=torch.float64) * places
        counted = x.masked_fill(~_per_row(rows, x), 0)
    mean = counted.sum(dims, dtype=dtype) / count.to(dtype).clamp(min=1)
    deviation = x - mean.view(shape)
    if rows is not None:
        deviation.masked_fill_(~_per_row(rows, x), 0)
    spread = deviation.square_().sum(dims).double()
    mean = mean.double()
    if joined:
        # Sums about 0 for one exchange: in float64 they keep what float32 deviations from each own mean have won. The
        # count stands there for every channel, as _TritonBatchNorm sends it, which another process may run.
        totals = torch.cat([count.expand_as(mean), count * mean, spread + count * mean.square()])
        dist.all_reduce(totals)
        count = totals[0]
        mean, square = (totals[len(mean) :] / count.clamp(min=1)).chunk(2)
        return count, mean, (square - mean.square()).clamp(min=0)
    return count, mean, spread / count.clamp(min=1)


def _reduced(x: Tensor) -> tuple[list[int], list[int]]:
    """Dimensions that statistics run over, and the shape that lays one number a channel beside x."""
    return [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]


def _per_row(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (x.ndim - 1))


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that may leave rows out and, with ``synchronize``, counts over all processes.

    Where neither is asked for, and in evaluation mode, it is PyTorch's own. The state dict is the same.
    """

    synchronize: bool = False

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normalised x (N, C, H, W); of ``rows`` (N,) bool, only the True ones count in training mode.

        Raises:
            ValueError: see `batch_norm`.
        """
        return _train(self, x, rows) if _is_special(self, x, rows) else super().forward(x)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` of 32 groups, which every row has for itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normalised x (N, C, H, W); ``rows`` makes no difference."""
        return super().forward(x)


def build_norm(norm: Norm, channels: int) -> BatchNorm2d | GroupNorm | nn.Identity:
    """Batch norm, group norm, or nothing.

    Raises:
        UserError: channels that do not fall into 32 groups.
    """
    if norm == "group" and channels % GROUPS:
        raise UserError(f"group norm needs a multiple of {GROUPS} channels, got {channels}; choose batch norm (true)")
    if norm == "group":
        return GroupNorm(channels)
    return BatchNorm2d(channels) if norm else nn.Identity()


class BatchNormAct2d(TimmBatchNormAct2d):  # type: ignore[misc]
    """`timm.layers.BatchNormAct2d` (norm, drop, activation) with the additions of `BatchNorm2d`."""

    synchronize: bool = False

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normalised, dropped and activated x (N, C, H, W); of ``rows`` (N,) bool, only the True ones count.

        Raises:
            ValueError: see `batch_norm`.
        """
        y: Tensor = self.act(self.drop(_train(self, x, rows))) if _is_special(self, x, rows) else super().forward(x)
        return y


def _is_special(norm: BatchNorm2d | BatchNormAct2d, x: Tensor, rows: Tensor | None) -> bool:
    """Return whether PyTorch's own batch norm is not enough."""
    if not norm.training:
        return False
    if norm.synchronize and several_processes():
        return True
    if rows is None or not rows.is_cpu:
        return rows is not None
    # On CPU it is free to see that all rows count. Of no value at all PyTorch's would make NaN, one value it refuses.
    sound = x.ndim == 4 and rows.dtype == torch.bool and rows.shape == x.shape[:1]
    return not sound or x[:, :1].numel() <= 1 or not bool(rows.all())


def _train(norm: BatchNorm2d | BatchNormAct2d, x: Tensor, rows: Tensor | None) -> Tensor:
    """`batch_norm` with the parameters and buffers of a norm; momentum None averages all batches, as in PyTorch."""
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), got shape {tuple(x.shape)}")
    tracked = norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if tracked and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    return batch_norm(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        momentum=momentum,
        eps=norm.eps,
        rows=rows,
        over_processes=norm.synchronize,
    )


def synchronize(module: nn.Module) -> None:
    """Let every batch norm of images inside ``module`` count over all processes when it trains.

    `nn.BatchNorm2d` and timm's `BatchNormAct2d` become those of this file. They stay the same objects, so whoever
    holds one (a list of frozen modules, an optimiser, a hook) still does; parameters, buffers, flags and state-dict
    keys are untouched. Other kinds of norm, and subclasses of other projects, stay as they are.

    Args:
        module: anything, also a norm itself; changed in place.
    """
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = BatchNorm2d
        elif type(part) is TimmBatchNormAct2d:
            part.__class__ = BatchNormAct2d
        if isinstance(part, BatchNorm2d | BatchNormAct2d):
            part.synchronize = True


def count_learning(module: nn.Module) -> int:
    """Count the batch norms of images that ``module.train()`` leaves in training mode; frozen ones are not.

    Every mode is put back.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    kinds = (nn.BatchNorm2d, TimmBatchNormAct2d)
    count = sum(bool(isinstance(part, kinds) and part.training) for part, _ in modes)
    for part, mode in modes:
        part.training = mode
    return count
