from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tailseg.predict.arrays import array_to_picture, tensor_to_picture


def test_channels(picture: np.ndarray) -> None:
    grey = picture[:, :, 0]
    assert array_to_picture(picture) is picture
    assert np.array_equal(array_to_picture(picture, bgr=True), picture[:, :, ::-1])
    for array in (grey, grey[:, :, None]):
        assert np.array_equal(array_to_picture(array, bgr=True), np.stack([grey] * 3, axis=2))
    alpha = np.full((60, 80, 1), 255, np.uint8)
    alpha[:, :40] = 0
    rgba = np.concatenate([picture, alpha], axis=2)
    shown = array_to_picture(rgba)
    assert np.array_equal(shown[:, 40:], picture[:, 40:])
    assert (shown[:, :40] == 255).all()
    assert np.array_equal(array_to_picture(rgba[:, :, [2, 1, 0, 3]], bgr=True), shown)
    assert np.array_equal(array_to_picture(rgba[::-1, ::2]), shown[::-1, ::2])
    half = np.concatenate([picture, np.full((60, 80, 1), 100, np.uint8)], axis=2)
    as_image = Image.alpha_composite(Image.new("RGBA", (80, 60), "white"), Image.fromarray(half)).convert("RGB")
    assert np.array_equal(array_to_picture(half), np.asarray(as_image))


def test_types(picture: np.ndarray) -> None:
    assert np.array_equal(array_to_picture((picture.astype(np.uint16) << 8) + 255), picture)
    for kind in (np.float32, np.float64):
        assert np.array_equal(array_to_picture(picture.astype(kind) / 255), picture)
    rounded = np.array([[0.0, -1e-7, 0.5, 1 + 1e-7]], np.float32)
    assert array_to_picture(rounded)[0, :, 0].tolist() == [0, 0, 128, 255]


def test_tensors(picture: np.ndarray) -> None:
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    grey = np.stack([picture[:, :, 0]] * 3, axis=2)
    assert np.array_equal(tensor_to_picture(tensor), picture)
    assert np.array_equal(tensor_to_picture(tensor, bgr=True), picture[:, :, ::-1])
    assert np.array_equal(tensor_to_picture(tensor[0]), grey)
    assert np.array_equal(tensor_to_picture(tensor[:1]), grey)
    assert np.array_equal(tensor_to_picture((tensor / 255).requires_grad_()), picture)
    opaque = torch.cat([tensor, torch.full((1, 60, 80), 255, dtype=torch.uint8)])
    assert np.array_equal(tensor_to_picture(opaque), picture)
    near = tensor_to_picture((tensor / 255).bfloat16()).astype(int) - picture
    assert np.abs(near).max() <= 1


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (
            np.zeros((2, 5, 6, 3), np.uint8),
            "received (2, 5, 6, 3); predict on the pictures of a batch with list(batch)",
        ),
        (np.zeros((3, 5, 6), np.uint8), "received (3, 5, 6); put the channels last with array.transpose(1, 2, 0)"),
        (np.zeros((5, 6, 2), np.uint8), "received (5, 6, 2); give one picture of at least one pixel"),
        (np.zeros((0, 4, 3), np.uint8), "received (0, 4, 3); give one picture of at least one pixel"),
        (np.zeros(5, np.uint8), "received (5,); give one picture of at least one pixel"),
        (np.zeros((4, 4), np.int64), "received int64; convert with .astype(np.uint8)"),
        (np.zeros((4, 4), bool), "received bool; convert with .astype(np.uint8)"),
        (np.full((4, 4), 254.0), "received 254 to 254; give 0 to 255 with .astype(np.uint8)"),
        (np.full((4, 4), -1.0), "received -1 to -1; give 0 to 255 with .astype(np.uint8)"),
        (np.full((4, 4), np.nan), "received nan to nan; give 0 to 255 with .astype(np.uint8)"),
        (torch.zeros(1, 3, 4, 4), "received (1, 3, 4, 4); predict on the pictures of a batch with list(batch)"),
        (torch.zeros(5, 6, 3), "received (5, 6, 3); put the channels first with tensor.permute(2, 0, 1)"),
        (torch.zeros(3, 4, 0), "received (3, 4, 0); give one picture of at least one pixel"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "received int32; convert with .astype(np.uint8)"),
    ],
)
def test_other_shapes_and_types(array: Any, sentence: str) -> None:
    read = tensor_to_picture if isinstance(array, torch.Tensor) else array_to_picture
    with pytest.raises(ValueError, match="expected") as error:
        read(array)
    assert str(error.value).endswith(sentence)
