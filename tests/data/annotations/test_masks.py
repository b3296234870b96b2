import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from coco_masks import full_bitmap, polygon
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco
from tiny import rasterise
from torchvision.ops import roi_align

from tailseg.data.annotations.masks import Bitmap, encode_bitmap, rle_pixels, rle_runs
from tailseg.data.sources import open_splits

GRID = 112


def pooled(values, box):
    """RoIAlign of one map (H, W) in [0, 1] to 28 x 28."""
    rois = torch.cat([torch.zeros(1), torch.as_tensor(box, dtype=torch.float32)])[None]
    maps = torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32)[None, None]
    return roi_align(maps, rois, (28, 28), aligned=True, sampling_ratio=0)[0, 0]


def grid_pooled(mask, frame, box):
    side = mask.shape[0]
    cell = (frame[2:] - frame[:2]) / side
    mapped = (np.asarray(box, np.float32) - np.tile(frame[:2], 2)) / np.tile(cell, 2)
    return pooled(mask / 255.0, mapped)


def both_pooled(polygons, image_hw, box=None):
    """RoIAlign over the full bitmap and over the grid, in the object's own box unless another is given."""
    bitmap = full_bitmap(polygons, image_hw)
    mask, frame = rasterise([np.asarray(p, np.float32) for p in polygons], image_hw, GRID)
    if box is None:
        ys, xs = np.nonzero(bitmap)
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    return pooled(bitmap, box), grid_pooled(mask, frame, box)


def share_wrong(polygons, image_hw, box=None):
    """The share of the 28 x 28 target's cells that differ."""
    full, ours = both_pooled(polygons, image_hw, box)
    return ((full >= 0.5) != (ours >= 0.5)).float().mean().item()


def small_cells(mask, frame, image_hw):
    """What a grid whose cells are single pixels says of the image: (H, W) bitmap."""
    bitmap = np.zeros(image_hw, np.uint8)
    x, y = frame[:2].astype(int)
    for row, column in zip(*np.nonzero(mask), strict=True):
        if 0 <= y + row < image_hw[0] and 0 <= x + column < image_hw[1]:
            bitmap[y + row, x + column] = 1
    return bitmap


def blob(centre, radii, rng, points=14):
    """A wobbly ellipse with two decimals, as annotators draw."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    wobble = rng.uniform(0.7, 1.0, points)
    xy = np.stack([np.cos(angles) * radii[0], np.sin(angles) * radii[1]], 1) * wobble[:, None]
    return np.round(xy + centre, 2).ravel()


@given(st.lists(polygon, min_size=1, max_size=3))
def test_small_objects_keep_every_pixel_of_the_full_bitmap(polygons):
    image_hw = (90, 100)
    mask, frame = rasterise([p.astype(np.float32) for p in polygons], image_hw, GRID)
    np.testing.assert_array_equal(small_cells(mask, frame, image_hw), full_bitmap(polygons, image_hw))


def test_decimals_on_the_edge_of_rounding_survive_float32_and_the_shift():
    polygon = np.array([100.1, 50.3, 130.7, 50.9, 131.1, 80.1, 100.3, 79.9])  # 5x + 0.5 is whole for these
    mask, frame = rasterise([polygon.astype(np.float32)], (200, 300), GRID)
    np.testing.assert_array_equal(small_cells(mask, frame, (200, 300)), full_bitmap([polygon], (200, 300)))


@given(
    seed=st.integers(0, 10_000),
    centre=st.tuples(st.integers(0, 300), st.integers(0, 200)),
    radii=st.tuples(st.integers(3, 55), st.integers(3, 55)),
)
def test_targets_of_small_objects_equal_those_of_the_full_bitmap(seed, centre, radii):
    shape = blob(np.array(centre), radii, np.random.default_rng(seed))
    full, ours = both_pooled([shape], (200, 300))  # many of these touch an edge of the image
    # A cell may lie at 0.5 exactly; apart from the last digits nothing differs.
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=0)


@given(
    seed=st.integers(0, 10_000),
    centre=st.tuples(st.integers(0, 640), st.integers(0, 480)),
    radii=st.tuples(st.integers(57, 400), st.integers(57, 400)),
)
def test_targets_of_large_objects_differ_in_less_than_one_per_cent(seed, centre, radii):
    shape = blob(np.array(centre), radii, np.random.default_rng(seed))
    assert share_wrong([shape], (480, 640)) <= 0.01


@pytest.mark.parametrize("box", [(0, 0, 60, 50), (5.5, 3.25, 70.75, 55.5), (0, 0, 12, 12)])
def test_other_boxes_than_the_object_s_own_give_the_same_targets(box):
    shape = np.array([0, 0, 55.4, 0, 50.2, 44.4, 0, 48.8])
    full, ours = both_pooled([shape], (60, 80), box)
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=0)


def test_margin_repeats_the_mask_only_where_the_object_touches_the_image_s_edge():
    corner = np.array([6, 4, 10, 4, 10, 8, 6, 8], np.float32)  # the bottom right corner of 8 x 10 pixels
    mask, frame = rasterise([corner], (8, 10), 6)
    assert mask.shape == (8, 8)
    expected = np.zeros((8, 8), np.uint8)
    expected[1:6, 1:6] = 255  # 4 x 4 pixels, and the margin right and below, but not left and above
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(frame, [5, 3, 13, 11])


def test_a_long_side_is_averaged_and_a_short_one_is_kept():
    bar = np.array([10, 20, 34, 20, 34, 23, 10, 23], np.float32)  # 24 x 3 pixels
    mask, frame = rasterise([bar], (100, 100), 8)
    assert mask[1:4, 1:9].min() == 255
    assert mask.sum() == 255 * 3 * 8
    np.testing.assert_allclose(frame, [7, 19, 37, 29])  # cells are 3 wide and 1 high, S = 10


def test_union_of_polygons_and_rle_agree():
    polygons = [np.array([2, 2, 30, 3, 20, 25.0]), np.array([10, 10, 40, 12, 38, 28, 9, 26.0])]
    code = coco.merge(coco.frPyObjects([p.tolist() for p in polygons], 50, 60))
    from_polygons = rasterise([p.astype(np.float32) for p in polygons], (50, 60), GRID)
    from_rle = rasterise(code["counts"], (50, 60), GRID)
    np.testing.assert_array_equal(from_polygons[0], from_rle[0])
    np.testing.assert_array_equal(from_polygons[1], from_rle[1])


@pytest.mark.parametrize("shape", [[[-50, -50, -20, -50, -20, -20]], [[5, 5, 5, 5, 5, 5]], []])
def test_an_object_without_pixels_is_an_empty_grid(shape):
    mask, frame = rasterise([np.array(p, np.float32) for p in shape], (30, 40), 10)
    assert mask.shape == (12, 12)
    assert not mask.any()
    assert (frame[2:] > frame[:2]).all()


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=400), max_size=4))
def test_runs_of_compressed_rles(objects):
    bitmaps = [np.asfortranarray(np.array(bits[: len(bits) // 3 * 3], np.uint8).reshape(3, -1)) for bits in objects]
    codes = [coco.encode(bitmap)["counts"] for bitmap in bitmaps]
    codes.insert(1, b"")  # an object with polygons instead
    runs, first = rle_runs(codes)
    of_codes = [runs[a:b] for a, b in pairwise(first)]
    assert of_codes.pop(min(1, len(bitmaps))).size == 0
    for bitmap, lengths in zip(bitmaps, of_codes, strict=True):
        values = np.repeat(np.arange(len(lengths)) % 2, lengths)
        np.testing.assert_array_equal(values.reshape(bitmap.shape, order="F"), bitmap)
    cut = [code[:-1] if code and code[-2:-1].isdigit() else code for code in codes]  # without a last number of one sign
    runs, first = rle_runs(cut)
    assert rle_pixels(cut).tolist() == [runs[a:b].sum() for a, b in pairwise(first)]


@pytest.mark.parametrize("code", [b"zzzz", b"\xff\x01", b"0P", b"02\xc3\xa9", b"PPPPPPPPPPPPPPPP1"])
def test_broken_rle_is_refused(code):
    with pytest.raises(ValueError, match="RLE"):
        rle_runs([b"02", code, b"02"])
    with pytest.raises(ValueError, match="RLE"):
        rle_pixels([b"02", code, b"02"])


def test_pixels_of_run_lengths():
    """By hand: 3; 5 and 2; 1, 2, 3 and 2 + 4, written as the difference; 40 in two groups."""
    assert rle_pixels([b"3", b"52", b"", b"1234", b"X1"]).tolist() == [3, 7, 0, 12, 40]
    assert rle_pixels([]).tolist() == rle_runs([])[0].tolist() == []


def test_photographs_targets_agree_with_full_bitmaps(shared):
    data = open_splits(shared / "data" / "coco128-lvis", need=("val",)).val
    rows = json.loads((shared / "data" / "coco128-lvis" / "val.json").read_text())["annotations"]
    polygons = {row["id"]: row["segmentation"] for row in rows}  # the decimals as they stand in the file
    wrong, apart = [], []
    for image in range(len(data)):
        image_hw = tuple(data.image_sizes[image].tolist())
        for row in data.rows(image):
            box = data.boxes[row]
            if (box[2:] - box[:2]).max() < GRID - 2:
                full, ours = both_pooled(polygons[data.annotation_ids[row]], image_hw, box)
                apart.append((full - ours).abs().max().item())
            else:
                wrong.append(share_wrong(polygons[data.annotation_ids[row]], image_hw, box))
    assert len(apart) > 100
    assert len(wrong) > 30
    assert max(apart) <= 1e-4
    assert np.mean(wrong) <= 0.003
    assert max(wrong) <= 0.01


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(-10, 14), st.integers(-10, 14)),
    st.sampled_from([0, 0.3, 0.7, 1]),
    st.integers(0, 99),
)
def test_a_bitmap_is_encoded_as_by_coco_wherever_it_lies(image_hw, mask_hw, place, share, seed):
    pixels = (np.random.default_rng(seed).random(mask_hw) < share).astype(np.uint8)
    x, y = place
    wide = np.zeros((50, 50), np.uint8)
    wide[y + 20 : y + 20 + mask_hw[0], x + 20 : x + 20 + mask_hw[1]] = pixels
    full = np.asfortranarray(wide[20 : 20 + image_hw[0], 20 : 20 + image_hw[1]])
    assert encode_bitmap(Bitmap(pixels, x, y), image_hw) == coco.encode(full)["counts"]
