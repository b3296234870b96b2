"""A trained detector traced by `torch.export`, for pictures of one size or of any."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import Conv2dSame
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from tailseg.export.detector import ExportedDetector
from tailseg.model.detector import Detector

INPUTS = ("image", "image_size")
MOST_CELLS = 256  # of a side, each as long as the divisor
EXAMPLE_CELLS = (3, 4)  # of the picture that a program for any size is traced with


class _SameConv(Conv2dSame):  # type: ignore[misc]
    """timm's convolution with TensorFlow's padding of sides that are multiples of the stride, as all of ours are.

    Then the padding is the same for every size.
    """

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for axis in (1, 0):
            missing = max((self.kernel_size[axis] - 1) * self.dilation[axis] + 1 - self.stride[axis], 0)
            sides += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def output_names(detector: Detector) -> tuple[str, ...]:
    """Names of what an `ExportedDetector` returns."""
    names = ("boxes", "scores", "labels", "masks")
    return names if detector.mask_iou is None else (*names, "mask_scores")


@torch.no_grad()
def trace(detector: Detector, size: tuple[int, int] | None) -> ExportedProgram:
    """The program of an `ExportedDetector` on the CPU; the detector stays as it is.

    Args:
        detector: trained.
        size: (height, width) in pixels of all pictures, padding included, multiples of its divisor; None takes
            pictures of any such size.
    """
    copied = copy.deepcopy(detector).to("cpu").eval()
    for module in copied.modules():
        if type(module) is Conv2dSame:
            module.__class__ = _SameConv
    dims = None
    if size is None:
        sides = [detector.divisor * Dim(name, min=1, max=MOST_CELLS) for name in ("rows", "columns")]
        dims = ({1: sides[0], 2: sides[1]}, None)
    height, width = size or tuple(detector.divisor * cells for cells in EXAMPLE_CELLS)
    example = torch.zeros(3, height, width, dtype=torch.uint8), torch.tensor([height, width])
    with _quiet():
        return torch.export.export(ExportedDetector(copied), example, dynamic_shapes=dims, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the tracer says to its own developers stays unsaid."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
