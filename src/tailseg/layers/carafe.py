"""CARAFE: resampling by weighted sums over k x k neighbourhoods, with weights predicted from the content.

Upsampling is that of CARAFE (arXiv:1905.02188), downsampling that of CARAFE++ (arXiv:2012.04733). One operator serves
both: with A = `up`, B = `down` (one of them is 1) and r = k div 2,

    out(n, c, Y, X) = Σ_ab K(n, g·k² + a·k + b, Y, X) · x(n, c, Y div A · B + a - r, X div A · B + b - r)

for c in group g, zero outside of x. There are four ways to it: plain, convolved (for traced programs), gathered
and Triton (CUDA). None of them copies the features k² times, and the last two save nothing for the backward pass but
x and K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers import carafe_gather
from tailseg.layers.carafe_gather import Window, sum_dtype
from tailseg.layers.triton_support import has_triton
from tailseg.layers.watched import is_watched


def carafe(x: Tensor, kernels: Tensor, *, kernel_size: int = 5, groups: int = 1, scale: int = 2) -> Tensor:
    """Upsample by weighted sums: each output cell looks around the input cell that it lies in.

    Args:
        x: (N, C, h, w), zero outside; channels_last is read without a copy.
        kernels: (N, groups · k², s · h, s · w), channel g · k² + a · k + b for row a and column b of the neighbourhood;
            used as they are, so whoever wants an average takes their softmax. float32 also where ``x`` is not.
        kernel_size: k, odd.
        groups: runs of C / groups channels, each with kernels of its own.
        scale: s.

    Returns:
        (N, C, s · h, s · w) in the dtype of ``x``, summed in float32 at least.

    Raises:
        ValueError: the sizes do not fit together.
    """
    height, width = x.shape[2:]
    return _resample(x, kernels, Window(kernel_size, groups, scale, 1), (height * scale, width * scale))


def carafe_down(x: Tensor, kernels: Tensor, *, kernel_size: int = 5, scale: int = 2) -> Tensor:
    """Downsample by weighted sums: output cell (Y, X) looks around input cell (s · Y, s · X).

    Args:
        x: (N, C, H, W), zero outside; channels_last is read without a copy.
        kernels: (N, k², ceil(H / s), ceil(W / s)), channel a · k + b for row a and column b of the neighbourhood.
        kernel_size: k, odd.
        scale: s.

    Returns:
        (N, C, ceil(H / s), ceil(W / s)) in the dtype of ``x``, summed in float32 at least.

    Raises:
        ValueError: the sizes do not fit together.
    """
    height, width = x.shape[2:]
    out_hw = (height - 1) // scale + 1, (width - 1) // scale + 1
    return _resample(x, kernels, Window(kernel_size, 1, 1, scale), out_hw)


def plain_carafe(x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """The sum tap by tap in ordinary operations: for compilers, ONNX and function transforms, and to test against.

    The factors of its products are views of the padded ``x`` and of ``kernels``, so autograd keeps nothing that is as
    large as the output. Shapes: (N, C, h, w) and (N, groups · k², H, W) -> (N, C, H, W), in the dtype of ``x``.
    """
    k, radius = window.kernel_size, window.kernel_size // 2
    dtype = sum_dtype(x, kernels)
    # (N, groups, k², cells, up, cells, up) and, tap by tap, (N, groups, C / groups, cells, 1, cells, 1).
    taps = kernels.to(dtype).unflatten(1, (window.groups, k * k))
    taps = taps.unflatten(4, (-1, window.up)).unflatten(3, (-1, window.up))
    padded = F.pad(x.to(dtype), (radius,) * 4).unflatten(1, (window.groups, -1))
    height, width = (window.down * (taps.shape[side] - 1) + 1 for side in (3, 5))
    total = torch.zeros((), dtype=dtype, device=x.device)
    for tap in range(k * k):
        a, b = divmod(tap, k)
        seen = padded[..., a : a + height : window.down, b : b + width : window.down]
        total = total + seen[..., :, None, :, None] * taps[:, :, tap].unsqueeze(2)
    return total.flatten(5, 6).flatten(3, 4).flatten(1, 2).to(x.dtype)


def convolved_carafe(x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """`plain_carafe` for downsampling by one group, a row of taps at a time, which convolutions with 0 and 1 pick.

    A sixth of the operations, for programs that are traced. The features are copied k times for each row.
    """
    k, (count, channels) = window.kernel_size, x.shape[:2]
    dtype = sum_dtype(x, kernels)
    maps = x.to(dtype).flatten(0, 1).unsqueeze(1)
    total = torch.zeros((), dtype=dtype, device=x.device)
    for row, taps in enumerate(kernels.to(dtype).split(k, dim=1)):
        picks = F.pad(torch.eye(k, dtype=dtype, device=x.device).view(k, 1, 1, k), (0, 0, row, k - 1 - row))
        seen = F.conv2d(maps, picks, stride=window.down, padding=k // 2).unflatten(0, (count, channels))
        total = total + (seen * taps.unsqueeze(1)).sum(dim=2)
    return total.to(x.dtype)


def gathered_carafe(x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """The sum as a weighted bag of rows of x, (cells, channels); any device."""
    out: Tensor = _Carafe.apply(x, kernels, window, carafe_gather)
    return out


def triton_carafe(x: Tensor, kernels: Tensor, window: Window) -> Tensor:
    """The sum by Triton kernels: CUDA, or any device under ``TRITON_INTERPRET=1``; not for float64."""
    from tailseg.layers import carafe_triton

    out: Tensor = _Carafe.apply(x, kernels, window, carafe_triton)
    return out


def _resample(x: Tensor, kernels: Tensor, window: Window, out_hw: tuple[int, int]) -> Tensor:
    """The fastest of the three ways that will do."""
    _require_fit(x, kernels, window, out_hw)
    if torch.compiler.is_exporting() and window.up == 1 and window.groups == 1:
        return convolved_carafe(x, kernels, window)
    if is_watched():
        return plain_carafe(x, kernels, window)
    if x.is_cuda and sum_dtype(x, kernels) == torch.float32 and has_triton():
        return triton_carafe(x, kernels, window)
    return gathered_carafe(x, kernels, window)


def _require_fit(x: Tensor, kernels: Tensor, window: Window, out_hw: tuple[int, int]) -> None:
    if window.kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {window.kernel_size}")
    if x.shape[1] % window.groups:
        raise ValueError(f"the channels must fall into {window.groups} groups of one size, got {x.shape[1]} channels")
    expected = (x.shape[0], window.groups * window.kernel_size**2, *out_hw)
    if kernels.shape != expected:
        raise ValueError(f"kernels must have shape {tuple(expected)}, got {tuple(kernels.shape)}")


Grads = tuple[Tensor | None, Tensor | None, None, None]


def _differentiable_grads(ctx: Any, grad: Tensor) -> Grads:
    """Gradients that can be differentiated once more."""
    x, kernels = ctx.saved_tensors
    need_x, need_kernels, *_ = ctx.needs_input_grad
    wanted = [tensor for tensor, needed in ((x, need_x), (kernels, need_kernels)) if needed]
    out = plain_carafe(x, kernels, ctx.window)
    grads = list(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return grads.pop(0) if need_x else None, grads.pop(0) if need_kernels else None, None, None


class _Carafe(torch.autograd.Function):
    """Saves its two inputs; ``way`` is a module with `forward`, `grad_x` and `grad_kernels`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, window: Window, way: Any) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.window, ctx.way = window, way
        out: Tensor = way.forward(x, kernels, window)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        (grad,) = grads
        if torch.is_grad_enabled():
            return _differentiable_grads(ctx, grad)
        x, kernels = ctx.saved_tensors
        need_x, need_kernels, *_ = ctx.needs_input_grad
        return (
            ctx.way.grad_x(grad, x, kernels, ctx.window) if need_x else None,
            ctx.way.grad_kernels(grad, x, kernels, ctx.window) if need_kernels else None,
            None,
            None,
        )


class _KernelPredictor(nn.Module):
    """1x1 compression and a content encoder: features (N, C, H, W) to unnormalised kernels (N, channels, h, w)."""

    def __init__(self, channels: int, compressed: int, kernel_channels: int, encoder_kernel: int, stride: int) -> None:
        super().__init__()
        self.compressor = nn.Conv2d(channels, compressed, 1)
        padding = (encoder_kernel - 1) // 2
        self.encoder = nn.Conv2d(compressed, kernel_channels, encoder_kernel, stride=stride, padding=padding)
        nn.init.xavier_uniform_(self.compressor.weight)
        nn.init.normal_(self.encoder.weight, std=0.001)
        for bias in (self.compressor.bias, self.encoder.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def encode(self, x: Tensor) -> Tensor:
        logits: Tensor = self.encoder(self.compressor(x))
        return logits


def normalized_kernels(logits: Tensor, groups: int, scale: int) -> Tensor:
    """Softmax over the k² taps of each group, in float32 at least.

    Args:
        logits: (N, groups · k² · s², h, w), channel (g · k² + tap) · s² + dy · s + dx for cell (dy, dx) of s x s.
        groups: number of them.
        scale: s.

    Returns:
        (N, groups · k², s · h, s · w), channels_last.
    """
    taps = logits.permute(0, 2, 3, 1).unflatten(3, (groups, -1, scale, scale)).permute(0, 1, 5, 2, 6, 3, 4)
    taps = taps.softmax(dim=6, dtype=torch.promote_types(logits.dtype, torch.float32))
    kernels: Tensor = taps.flatten(5, 6).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return kernels


class CarafeUpsample(_KernelPredictor):
    """CARAFE: upsampling whose kernels a small network reads off the features (arXiv:1905.02188, section 3).

    At the start it is nearly an average over k x k: the encoder begins near zero, so the kernels near 1 / k². An
    initialiser run over all convolutions of a model afterwards would undo that.

    Args:
        channels: C.
        scale: s.
        kernel_size: k of the sums.
        groups: runs of channels with kernels of their own.
        encoder_kernel: side of the encoder's convolution, odd.
        compressed_channels: channels that the encoder sees.

    Shapes: (N, C, h, w) -> (N, C, s · h, s · w), in the dtype of the input; channels_last.
    """

    def __init__(
        self,
        channels: int,
        *,
        scale: int = 2,
        kernel_size: int = 5,
        groups: int = 1,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
    ) -> None:
        kernel_channels = groups * kernel_size**2 * scale**2
        super().__init__(channels, compressed_channels, kernel_channels, encoder_kernel, stride=1)
        self.scale = scale
        self.kernel_size = kernel_size
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, s · h, s · w) from (N, C, h, w)."""
        kernels = normalized_kernels(self.encode(x), self.groups, self.scale)
        return carafe(x, kernels, kernel_size=self.kernel_size, groups=self.groups, scale=self.scale)


class CarafeDownsample(_KernelPredictor):
    """Downsampling as above, the encoder stepping by the scale (CARAFE++, arXiv:2012.04733); arguments as above.

    Shapes: (N, C, H, W) -> (N, C, ceil(H / s), ceil(W / s)), in the dtype of the input; channels_last.
    """

    def __init__(
        self,
        channels: int,
        *,
        scale: int = 2,
        kernel_size: int = 5,
        encoder_kernel: int = 3,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__(channels, compressed_channels, kernel_size**2, encoder_kernel, stride=scale)
        self.scale = scale
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ceil(H / s), ceil(W / s)) from (N, C, H, W)."""
        kernels = normalized_kernels(self.encode(x), groups=1, scale=1)
        return carafe_down(x, kernels, kernel_size=self.kernel_size, scale=self.scale)
