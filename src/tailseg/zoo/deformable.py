"""Deformable convolutions of other projects as our modulated ones (DCNv2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tailseg.errors import UserError

TAPS = 9  # of a 3x3 convolution
SHIFTS, SHIFTS_AND_WEIGHTS = 2 * TAPS, 3 * TAPS  # rows of the convolution that steers: DCNv1's and DCNv2's
FULL = 30.0  # a logit whose sigmoid is 1, and has no gradient, in float32


def modulate(state: dict[str, Tensor], origins: Mapping[str, str], path: Path) -> None:
    """Make DCNv1's deformable convolutions DCNv2's, in which every tap counts 1 and goes on to do so in training.

    Args:
        state: tensors under our names, changed in place.
        origins: our name -> theirs, for errors.
        path: of the file, for errors.

    Raises:
        UserError: one has several sets of shifts, each for a group of channels.
    """
    for key in [key for key in state if ".conv_offset." in key]:
        tensor = state[key]
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows not in (SHIFTS, SHIFTS_AND_WEIGHTS):
            raise UserError(
                f"{path}: '{origins.get(key, key)}' has {rows} rows; deformable convolutions with one set of shifts "
                f"for all channels are converted, of {SHIFTS} rows (DCNv1) or {SHIFTS_AND_WEIGHTS} (DCNv2)"
            )
        if rows == SHIFTS:
            more = tensor.new_zeros(TAPS, *tensor.shape[1:]) if tensor.dim() > 1 else tensor.new_full((TAPS,), FULL)
            state[key] = torch.cat([tensor, more])
