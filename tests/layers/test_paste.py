"""Pasting inside the box against the recording, against full-image painting, and at the edges."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tailseg.layers.paste import encode_masks, mask_crop


def paint_full(probs: torch.Tensor, boxes: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
    """(N, H, W) sampled probabilities of the whole image, in float64."""
    height, width = image_hw
    x1, y1, x2, y2 = (side[:, None] for side in boxes.double().unbind(1))
    x = (torch.arange(width) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(height) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(probs[:, None].double(), grid, align_corners=False)[:, 0]


def decode(codes: list[dict]) -> torch.Tensor:
    return torch.from_numpy(coco_mask.decode(codes)).permute(2, 0, 1).bool()


def test_recorded_paste(recorded, check):
    (case, inputs, _, outputs) = next(c for c in recorded("head_mask") if c[0]["name"] == "paste")
    boxes = outputs["boxes_in_original"]
    probs = inputs["mask_logits"].sigmoid()
    masks = decode(encode_masks(probs, boxes, tuple(case["settings"]["original_shape"])))
    check(case, "masks", masks, outputs["masks"])
    check(case, "areas", masks.sum((1, 2)), outputs["areas"])


coordinate = st.floats(-30, 60, width=32)
extent = st.floats(0.25, 70, width=32)


@given(
    boxes=st.lists(st.tuples(coordinate, coordinate, extent, extent), min_size=1, max_size=5),
    image_hw=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_equals_full_image_painting(boxes, image_hw, side, seed):
    xywh = torch.tensor(boxes)
    xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
    probs = torch.rand(len(boxes), side, side, generator=torch.Generator().manual_seed(seed))
    probs = probs.where(torch.rand(probs.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.7, 1.0)
    sampled = paint_full(probs, xyxy, image_hw)
    ours = decode(encode_masks(probs, xyxy, image_hw))
    assert ours.shape == sampled.shape
    wrong = (ours != (sampled >= 0.5)) & ((sampled - 0.5).abs() > 1e-6)
    assert not wrong.any()
    for mask, prob, box in zip(ours, probs, xyxy, strict=True):
        crop, (y0, x0) = mask_crop(prob, box, image_hw)
        full = np.zeros(image_hw, dtype=bool)
        full[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
        assert (full == mask.numpy()).all()


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((2.0, 1.0, 5.0, 3.0), (slice(1, 3), slice(2, 5))),
        ((0.0, 0.0, 8.0, 6.0), (slice(0, 6), slice(0, 8))),  # the whole image
        ((2.0, -50.0, 5.0, 50.0), (slice(0, 6), slice(2, 5))),  # whole columns: runs join
        ((6.0, 4.0, 8.0, 6.0), (slice(4, 6), slice(6, 8))),  # down to the last pixel
        ((-1e9, -1e9, 1e9, 1e9), (slice(0, 6), slice(0, 8))),
        ((2.4, 1.0, 4.6, 3.0), (slice(1, 3), slice(2, 5))),  # centres 2.5 and 4.5 are inside
        ((2.6, 1.0, 4.4, 3.0), (slice(1, 3), slice(3, 4))),
    ],
)
def test_full_grid_gives_the_code_of_the_official_encoder(box, pixels):
    probs = torch.ones(1, 4, 4)
    expected = np.zeros((6, 8), dtype=np.uint8, order="F")
    expected[pixels] = 1
    (code,) = encode_masks(probs, torch.tensor([box]), (6, 8))
    assert code == {"size": [6, 8], "counts": coco_mask.encode(expected)["counts"].decode()}


@pytest.mark.parametrize(
    "box",
    [
        (3.0, 3.0, 3.0, 5.0),
        (5.0, 5.0, 2.0, 2.0),
        (50.0, 2.0, 60.0, 4.0),
        (-9.0, -9.0, -2.0, -2.0),
        (2.6, 1.0, 3.4, 3.0),  # no pixel centre inside
        (float("nan"), 0.0, 5.0, 5.0),
        (0.0, 0.0, float("inf"), 5.0),
    ],
)
def test_boxes_without_pixels_give_empty_masks(box):
    (code,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([box]), (6, 8))
    assert code["counts"] == coco_mask.encode(np.zeros((6, 8), dtype=np.uint8, order="F"))["counts"].decode()
    crop, _ = mask_crop(torch.ones(28, 28), torch.tensor(box), (6, 8))
    assert crop.sum() == 0


def test_nothing_to_encode():
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (6, 8)) == []


def test_codes_equal_the_official_encoder_on_random_masks():
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(40, 2, generator=generator) * torch.tensor([64.0, 48.0])
    sizes = torch.rand(40, 2, generator=generator) * 60 + 1
    boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
    probs = torch.rand(40, 14, 14, generator=generator)
    masks = (paint_full(probs, boxes, (48, 64)) >= 0.5).permute(1, 2, 0).to(torch.uint8).numpy()
    official = [code["counts"].decode() for code in coco_mask.encode(np.asfortranarray(masks))]
    assert [code["counts"] for code in encode_masks(probs, boxes, (48, 64))] == official


@given(
    boxes=st.lists(st.tuples(coordinate, coordinate, extent, extent), min_size=1, max_size=6),
    image_hw=st.tuples(st.integers(1, 90), st.integers(1, 40)),
    side=st.integers(1, 12),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 3.0]),
    group=st.sampled_from([1, 50, 8192]),
)
def test_codes_are_those_of_every_sampled_pixel(boxes, image_hw, side, seed, scale, group):
    xywh = torch.tensor(boxes) * scale
    xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
    generator = torch.Generator().manual_seed(seed)
    # Values around the threshold, of which some differ from it by the least that float32 can tell.
    edge = torch.tensor([0.0, 0.5, 0.5, torch.tensor(0.5).nextafter(torch.tensor(0.0)).item(), 0.50000006, 0.25, 1.0])
    probs = edge[torch.randint(0, len(edge), (len(boxes), side, side), generator=generator)]
    probs = probs.where(
        torch.rand(probs.shape, generator=generator) < 0.8, torch.rand(probs.shape, generator=generator)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailseg.layers.paste.GROUP", group)
        codes = encode_masks(probs, xyxy, image_hw)
    for code, prob, box in zip(codes, probs, xyxy, strict=True):
        crop, (y0, x0) = mask_crop(prob, box, image_hw)
        full = np.zeros(image_hw, dtype=np.uint8, order="F")
        full[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
        assert code == {"size": list(image_hw), "counts": coco_mask.encode(full)["counts"].decode()}


def test_runs_of_many_digits():
    """Of an image with more pixels than fit into five digits; what is told of a run may be far below zero."""
    image_hw = (1 << 13, 1 << 12)
    boxes = [(0, 0, 4096, 8192), (4000, 8000, 4090, 8190), (0, 0, 1, 1), (17, 0, 18, 9000), (9, 9, 9, 9)]
    probs = torch.ones(len(boxes), 2, 2)
    probs[3] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    codes = encode_masks(probs, torch.tensor(boxes, dtype=torch.float32), image_hw)
    for code in codes:
        assert coco_mask.encode(coco_mask.decode(code))["counts"].decode() == code["counts"]
    areas = coco_mask.area(codes).tolist()
    assert areas[0] > 1 << 24
    assert [area > 0 for area in areas] == [True] * 4 + [False]
    assert max(len(code["counts"]) for code in codes) > 100


def test_probabilities_that_are_no_numbers_are_below_the_threshold():
    probs = torch.full((1, 5, 5), 0.9)
    probs[0, 2, 2] = float("nan")
    box, image_hw = torch.tensor([[1.0, 2.0, 31.0, 62.0]]), (64, 40)
    crop, (y0, x0) = mask_crop(probs[0], box[0], image_hw)
    full = np.zeros(image_hw, dtype=np.uint8, order="F")
    full[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = crop
    assert not crop[30, 15]
    assert encode_masks(probs, box, image_hw)[0]["counts"] == coco_mask.encode(full)["counts"].decode()


def test_arrays_give_what_tensors_give():
    probs = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1.5, 2, 30, 20], [0, 0, 5, 5], [3, 3, 3, 9]])
    expected = encode_masks(probs, boxes, (24, 32))
    assert encode_masks(probs.numpy(), boxes.numpy(), (24, 32)) == expected
    assert encode_masks(probs.numpy()[:0], boxes.numpy()[:0], (24, 32)) == []
