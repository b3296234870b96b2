"""Batch norm with known statistics, a shortcut added and ReLU, in one launch and in place; maps are channels_last."""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tailseg.layers.triton_support import Launcher

PLACE_BLOCK = 16  # places of a program
CHANNEL_BLOCK = 256  # and its channels at most
TENSORS = ("x", "shortcut", "weight", "bias", "mean", "variance")


@triton.jit(do_not_specialize=["places", "eps"], do_not_specialize_on_alignment=TENSORS)
def _norm_relu_kernel(
    x, shortcut, weight, bias, mean, variance, places, eps, channels: tl.constexpr, added: tl.constexpr,
    vectors: tl.constexpr, place_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    """``vectors`` says that channels can be read and written by eight."""
    channel_blocks: tl.constexpr = (channels + channel_block - 1) // channel_block
    channel = tl.program_id(0) % channel_blocks * channel_block + tl.arange(0, channel_block)
    here = channel < channels
    spread = tl.sqrt(tl.load(variance + channel, here, 1.0).to(tl.float32) + eps)
    scale = tl.load(weight + channel, here, 0.0).to(tl.float32) / spread
    center = tl.load(mean + channel, here, 0.0).to(tl.float32)
    shift = tl.load(bias + channel, here, 0.0).to(tl.float32)
    place = tl.program_id(0) // channel_blocks * place_block + tl.arange(0, place_block)
    inside = (place < places)[:, None] & here[None, :]
    offsets = place.to(tl.int64)[:, None] * channels + channel[None, :]
    own = x + offsets
    if vectors:
        own = tl.multiple_of(own, (1, 16))
    value = (tl.load(own, inside, 0.0).to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
    if added:
        other = shortcut + offsets
        if vectors:
            other = tl.multiple_of(other, (1, 16))
        value += tl.load(other, inside, 0.0).to(tl.float32)
    tl.store(own, tl.where(value < 0, 0.0, value).to(x.dtype.element_ty), inside)  # NaN stays


_norm_relu = Launcher(_norm_relu_kernel)


def norm_relu_(x: Tensor, values: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, shortcut: Tensor | None) -> None:
    """Normalise, add and cut off in place, in float32 steps and rounded once.

    Args:
        x: (B, C, h, w), channels_last.
        values: weight, bias, mean and variance, (C,) each.
        eps: added to the variance.
        shortcut: like x in shape, type and layout, or None.
    """
    if not x.numel():
        return
    channels = x.shape[1]
    places = x.numel() // channels
    block = min(triton.next_power_of_2(channels), CHANNEL_BLOCK)
    other = x if shortcut is None else shortcut  # not read without one
    vectors = channels % 8 == 0 and x.data_ptr() % 16 == 0 and other.data_ptr() % 16 == 0
    programs = triton.cdiv(places, PLACE_BLOCK) * triton.cdiv(channels, block)
    constants = (channels, shortcut is not None, vectors, PLACE_BLOCK, block)
    _norm_relu((programs,), (x, other, *values, places, float(eps)), constants, 4)
