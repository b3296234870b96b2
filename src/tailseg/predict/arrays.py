"""Arrays and tensors as pictures, (H, W, 3) uint8 RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
_SLACK = 1e-3  # by which floats may leave [0, 1], for rounding


def array_to_picture(array: NDArray[Any], *, bgr: bool = False) -> Picture:
    """An array as a picture.

    Args:
        array: (H, W) or (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGBA, which is shown on white. uint8; uint16, of
            which the upper 8 bits count, as of image files; or floats from 0 to 1.
        bgr: the channels are BGR or BGRA.

    Raises:
        ValueError: it has another shape or type, or values beyond these.
    """
    shape = array.shape
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        if array.ndim == 4:
            fix = "predict on the pictures of a batch with list(batch)"
        elif array.ndim == 3 and shape[0] in (1, 3, 4):
            fix = "put the channels last with array.transpose(1, 2, 0)"
        else:
            fix = "give one picture of at least one pixel"
        raise ValueError(f"expected an array (H, W), (H, W, 3) or (H, W, 4), received {shape}; {fix}")
    pixels = _of_8_bits(array)
    if pixels.ndim == 2 or shape[2] == 1:
        return np.repeat(pixels.reshape(*shape[:2], 1), 3, axis=2)
    if bgr:
        pixels = pixels[:, :, [2, 1, 0, *range(3, shape[2])]]
    if shape[2] == 4:
        image = Image.fromarray(np.ascontiguousarray(pixels), "RGBA")
        pixels = np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    return pixels


def tensor_to_picture(tensor: Tensor, *, bgr: bool = False) -> Picture:
    """A tensor (H, W), (1, H, W), (3, H, W) or (4, H, W) as a picture; otherwise as `array_to_picture`.

    Raises:
        ValueError: it has another shape or type, or values beyond these.
    """
    shape = tuple(tensor.shape)
    if tensor.dim() not in (2, 3) or tensor.numel() == 0 or (tensor.dim() == 3 and shape[0] not in (1, 3, 4)):
        if tensor.dim() == 4:
            fix = "predict on the pictures of a batch with list(batch)"
        elif tensor.dim() == 3 and shape[2] in (1, 3, 4):
            fix = "put the channels first with tensor.permute(2, 0, 1)"
        else:
            fix = "give one picture of at least one pixel"
        raise ValueError(f"expected a tensor (H, W), (3, H, W) or (4, H, W), received {shape}; {fix}")
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    array = tensor.detach().cpu().numpy()
    return array_to_picture(array if array.ndim == 2 else array.transpose(1, 2, 0), bgr=bgr)


def _of_8_bits(array: NDArray[Any]) -> Picture:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype.kind != "f":
        raise ValueError(
            f"expected uint8, uint16, or floats from 0 to 1, received {array.dtype}; convert with .astype(np.uint8)"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN too
        raise ValueError(
            f"expected floats from 0 to 1, received {low:g} to {high:g}; give 0 to 255 with .astype(np.uint8)"
        )
    return np.asarray(array.clip(0, 1) * 255 + 0.5, dtype=np.uint8)
