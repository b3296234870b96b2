"""RoIAlign on CUDA for all poolings of a step: one launch each, and one gradient for all of them together.

PyTorch adds up what several poolings say of the same maps, a buffer of the pyramid's size each. Here they add to one
buffer, which goes back once: the poolings depend on a token, whose own backward step comes after all of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tailseg.layers.triton_support import has_triton

LEVELS = 4  # maps that the kernel takes at most: P2..P5


class Sampling(NamedTuple):
    """The settings of a `RoIPooler`."""

    output_size: int
    strides: tuple[int, ...]
    sampling_ratio: int
    aligned: bool


def takes_triton(pyramid: Sequence[Tensor]) -> bool:
    """Whether maps are pooled by the kernel: on CUDA, of one dtype up to float32, unless sums must be repeatable.

    The kernel adds gradients in any order, as torchvision's does, which has another form for
    `torch.use_deterministic_algorithms`.
    """
    first = pyramid[0]
    return bool(
        first.is_cuda
        and first.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and all(each.dtype == first.dtype for each in pyramid)
        and has_triton()
        and not torch.are_deterministic_algorithms_enabled()
    )


class SharedMaps:
    """Maps of a pyramid that several poolings read.

    Args:
        pyramid: (B, channels, h, w) each, finest first, of one dtype; a gradient flows to the first `LEVELS`.
    """

    def __init__(self, pyramid: Sequence[Tensor]) -> None:
        read = pyramid[:LEVELS]
        self._maps = [each.detach().contiguous(memory_format=torch.channels_last) for each in read]
        self._sums = _Sums([each.shape for each in read])
        self._token: Tensor = _Joined.apply(self._sums, *read)

    def pool(self, rois: Tensor, how: Sampling) -> Tensor:
        """Features (R, channels, S, S), channels_last, summed in float32.

        Under autocast they have the dtype of the maps, since what follows would round them to it; else float32.

        Args:
            rois: (R, 5): image index, x1, y1, x2, y2 in pixels; without gradient.
            how: with no more strides than there are maps.
        """
        dtype = self._maps[0].dtype if torch.is_autocast_enabled(rois.device.type) else torch.float32
        pooled: Tensor = _Pooled.apply(self._token, self._maps, self._sums, rois.detach().float(), how, dtype)
        return pooled


class _Sums:
    """Gradients of maps, one after the other in a single float32 buffer, of the poolings that came so far."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = shapes
        self.flat: Tensor | None = None

    def of_maps(self, flat: Tensor) -> list[Tensor]:
        """Views of a buffer, channels_last."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [
            part.view(b, h, w, channels).permute(0, 3, 1, 2)
            for part, (b, channels, h, w) in zip(parts, self.shapes, strict=True)
        ]

    def so_far(self, device: torch.device) -> list[Tensor]:
        """The sums to add to."""
        if self.flat is None:
            self.flat = torch.zeros(sum(shape.numel() for shape in self.shapes), device=device)
        return self.of_maps(self.flat)

    def taken(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The collected gradients in the dtype of the maps; the next backward pass begins with nothing."""
        flat, self.flat = self.flat, None
        return [None] * len(self.shapes) if flat is None else [*self.of_maps(flat.to(dtype))]


class _Joined(torch.autograd.Function):
    """The token of maps: nothing by itself."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, *maps: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.dtype = sums, maps[0].dtype
        return maps[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.sums.taken(ctx.dtype)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, maps: list[Tensor], sums: _Sums, rois: Tensor, how: Sampling, dtype: torch.dtype
    ) -> Tensor:
        from tailseg.model import roi_align_triton

        rois = rois.contiguous()
        ctx.save_for_backward(rois)
        ctx.sums, ctx.how = sums, how
        shape = (len(rois), maps[0].shape[1], how.output_size, how.output_size)
        pooled = torch.empty(shape, dtype=dtype, device=rois.device, memory_format=torch.channels_last)
        roi_align_triton.launch(maps, rois, pooled, **how._asdict(), backward=False)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from tailseg.model import roi_align_triton

        (rois,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        roi_align_triton.launch(ctx.sums.so_far(grad.device), rois, grad, **ctx.how._asdict(), backward=True)
        return (None,) * 6
