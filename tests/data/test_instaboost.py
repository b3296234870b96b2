"""InstaBoost against the specification (section 19) worked by hand and stated pixel by pixel."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data import instaboost as module
from tailseg.data.annotations.masks import Bitmap, bitmap_of
from tailseg.data.images import read_image
from tailseg.data.instaboost import (
    InstaBoost,
    Objects,
    change_colours,
    draw_colour_factors,
    guided,
    heat_map,
    inpaint,
)
from tailseg.data.placement import Placement, near_sides
from tailseg.data.sources import open_splits

ALWAYS, GUIDED = InstaBoost(1.0), InstaBoost(1.0, heatmap=True)


def picture(height, width, seed=0):
    """A smooth picture with some texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).astype(int)
    return (smooth + rng.integers(-9, 10, (height, width, 3))).clip(0, 255).astype(np.uint8)


def bitmap(mask):
    """The bitmap of a mask (H, W), empty or not."""
    return Bitmap(np.ascontiguousarray(mask, dtype=np.uint8), 0, 0).tight()


def whole(one, image_hw):
    """A bitmap as a mask of the image."""
    mask = np.zeros(image_hw, np.uint8)
    x0, y0, x1, y1 = one.box
    assert 0 <= x0 < x1 <= image_hw[1]
    assert 0 <= y0 < y1 <= image_hw[0]
    mask[y0:y1, x0:x1] = one.pixels
    return mask


def objects_of(masks, boxes=None):
    """Objects with these masks (N, H, W), labels 10, 11, ..., and the boxes around the masks unless given."""
    bitmaps = tuple(bitmap(mask) for mask in masks)
    boxes = np.array([one.box for one in bitmaps] if boxes is None else boxes, np.float32).reshape(-1, 4)
    return Objects(boxes, np.arange(10, 10 + len(bitmaps)), bitmaps)


def rectangle(image_hw, x0, y0, x1, y1):
    mask = np.zeros(image_hw, np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


@pytest.fixture
def place(monkeypatch):
    """A function that decides where groups go instead of chance: (scale, degrees, shift) by box."""
    monkeypatch.setattr(module, "COLOUR_PROBABILITY", 0.0)

    def decide(by_box):
        monkeypatch.setattr(module, "draw_placement", lambda box, _hw, _rng: Placement(box, *by_box(box)))

    return decide


# Geometry


def nearest(mask, placement):
    """The specification's statement of a mask's transform, and where rounding may go either way."""
    (height, width), (x0, y0, x1, y1) = mask.shape, placement.box
    cos, sin = math.cos(math.radians(placement.degrees)), math.sin(math.radians(placement.degrees))
    x = np.arange(width) - (x0 + x1) / 2 - placement.shift[0]
    y = np.arange(height)[:, None] - (y0 + y1) / 2 - placement.shift[1]
    u = (cos * x + sin * y) / placement.scale + (x1 - x0) / 2
    v = (-sin * x + cos * y) / placement.scale + (y1 - y0) / 2
    column, row = np.floor(u + 0.5).astype(int), np.floor(v + 0.5).astype(int)
    inside = (column >= 0) & (column < x1 - x0) & (row >= 0) & (row < y1 - y0)
    patch = mask[y0:y1, x0:x1]
    moved = inside & (patch[row.clip(0, y1 - y0 - 1), column.clip(0, x1 - x0 - 1)] > 0)
    doubtful = [np.abs(value - np.floor(value) - 0.5) < 2e-3 for value in (u, v)]
    return moved, doubtful[0] | doubtful[1]


@pytest.mark.parametrize("seed", range(12))
def test_masks_are_moved_as_specified(seed, place):
    """Every pixel of noise in boxes of every size, which cut their masks; also under transforms never drawn."""
    rng = np.random.default_rng(seed)
    image_hw = tuple(rng.integers(30, 130, 2).tolist())
    low = [int(rng.integers(0, side - 8)) for side in image_hw[::-1]]
    high = [int(rng.integers(a + 6, side + 1)) for a, side in zip(low, image_hw[::-1], strict=True)]
    masks = [(rng.random(image_hw) < share).astype(np.uint8) for share in (0.5, 0.2, 0.9)]
    how = (rng.uniform(0.7, 1.4), int(rng.choice([-1, 1, 40, 180])), tuple(rng.integers(-5, 6, 2).tolist()))
    placement = Placement((*low, *high), *how)
    place(lambda _box: how)
    _, jittered = ALWAYS(picture(*image_hw), objects_of(masks, [placement.box] * 3), np.random.default_rng(0))
    assert jittered.labels.tolist() == [10, 11, 12]
    for mask, moved in zip(masks, jittered.bitmaps, strict=True):
        expected, doubtful = nearest(mask, placement)
        assert (whole(moved, image_hw) == expected)[~doubtful].all()
        assert doubtful.mean() < 0.1


def test_pasted_pixels_come_from_where_the_inverse_says(place):
    """Of a picture whose colours are linear in x and y, which cubic interpolation keeps."""
    y, x = np.mgrid[0:80, 0:120]
    image = np.stack([40 + x, 30 + 2 * y, 250 - x - y // 2 * 1], axis=2).astype(np.uint8)
    disc = ((x - 60) ** 2 + (y - 40) ** 2 <= 400).astype(np.uint8)
    objects = objects_of([disc])
    placed = Placement(tuple(objects.bitmaps[0].box), 1.17, 1, (2, -1))
    place(lambda _box: (1.17, 1, (2, -1)))
    jittered, moved = ALWAYS(image, objects, np.random.default_rng(0))
    core = cv2.erode(whole(moved.bitmaps[0], (80, 120)), np.ones((5, 5), np.uint8)) > 0
    assert core.sum() > 1000
    read = placed.inverse() @ np.stack([x[core], y[core], np.ones(core.sum())])
    np.testing.assert_allclose(jittered[core, 0], 40 + read[0], atol=1)
    np.testing.assert_allclose(jittered[core, 1], 30 + 2 * read[1], atol=1.1)


def cubic(values, u):
    """Cubic convolution (a = -0.75) of a row, of which what lies outside is zero."""
    total = 0.0
    for i in range(math.floor(u) - 1, math.floor(u) + 3):
        d = abs(u - i)
        weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d < 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        total += weight * (values[i] if 0 <= i < len(values) else 0)
    return min(max(total, 0), 255)


def test_edges_are_blended_by_a_cubic_opacity(place):
    """A white bar on black, a little enlarged: pixels and opacity are interpolated alike, then one weighs the other."""
    image = np.zeros((60, 60, 3), np.uint8)
    image[20:40, 20:40] = 255
    objects = objects_of([rectangle((60, 60), 20, 20, 40, 40)])
    place(lambda _box: (1.05, 0, (0, 0)))
    jittered, moved = ALWAYS(image, objects, np.random.default_rng(0))
    read = [(x - 30) / 1.05 + 10 for x in range(60)]  # in the patch; the pixel x = 19 reads -0.476
    expected = [cubic(image[30, :, 0], 20 + u) * cubic([255] * 20, u) / 255 for u in read]
    assert 50 < expected[19] < 100
    np.testing.assert_allclose(jittered[30, :, 0], expected, atol=8)  # OpenCV reads at whole 32nds of a pixel
    assert moved.boxes.tolist() == [[19, 19, 40, 40]]  # x = 40 reads 19.52, whose nearest pixel is outside


def test_identity_gives_the_image_back(place):
    """Except for what is in-painted and not pasted: the mask outside of the annotated box."""
    place(lambda _box: (1.0, 0, (0, 0)))
    image, image_hw = picture(70, 90), (70, 90)
    masks = [rectangle(image_hw, 10, 10, 40, 50), rectangle(image_hw, 60, 5, 80, 60)]
    objects = objects_of(masks, [(10, 10, 30, 50), (60, 5, 80, 60)])
    jittered, moved = ALWAYS(image, objects, np.random.default_rng(0))
    hole = (masks[0] | masks[1]) > 0
    background = cv2.inpaint(image, hole.astype(np.uint8), 5, cv2.INPAINT_NS)
    painted = rectangle(image_hw, 30, 10, 40, 50) > 0
    np.testing.assert_array_equal(jittered[~painted], image[~painted])
    np.testing.assert_array_equal(jittered[painted], background[painted])
    assert (jittered[painted] != image[painted]).any()
    assert [whole(one, image_hw).tolist() for one in moved.bitmaps] == [
        rectangle(image_hw, 10, 10, 30, 50).tolist(),
        masks[1].tolist(),
    ]
    assert moved.boxes.tolist() == [[10, 10, 30, 50], [60, 5, 80, 60]]


def test_later_groups_cover_earlier_ones_but_not_their_masks(place):
    image, image_hw = picture(60, 120), (60, 120)
    image[20:40, 10:40], image[20:40, 70:100] = (255, 0, 0), (0, 0, 255)
    masks = [rectangle(image_hw, 10, 20, 40, 40), rectangle(image_hw, 70, 20, 100, 40)]
    place(lambda box: (1.0, 0, (15 if box[0] == 10 else -30, 0)))
    for order in ((0, 1), (1, 0)):
        objects = objects_of([masks[i] for i in order])
        jittered, moved = ALWAYS(image, objects, np.random.default_rng(0))
        colours = [(255, 0, 0), (0, 0, 255)]
        np.testing.assert_array_equal(jittered[20:40, 40:55], np.full((20, 15, 3), colours[order[1]]))
        np.testing.assert_array_equal(jittered[20:40, 25:40], np.full((20, 15, 3), colours[0]))
        np.testing.assert_array_equal(jittered[20:40, 55:70], np.full((20, 15, 3), colours[1]))
        by_object = dict(zip(order, moved.boxes.tolist(), strict=True))
        assert by_object == {0: [25, 20, 55, 40], 1: [40, 20, 70, 40]}
        assert [int(one.pixels.sum()) for one in moved.bitmaps] == [600, 600]


# In-painting


def blobs(image_hw, seed, count):
    """The union of ellipses of all sizes."""
    rng, hole = np.random.default_rng(seed), np.zeros(image_hw, np.uint8)
    for _ in range(count):
        centre = tuple(int(rng.integers(0, side)) for side in image_hw[::-1])
        axes = tuple(int(rng.integers(1, max(side // 3, 2))) for side in image_hw[::-1])
        cv2.ellipse(hole, centre, axes, int(rng.integers(180)), 0, 360, 1, -1)
    return hole


@pytest.mark.parametrize("seed", range(12))
def test_inpainting_what_is_seen_equals_inpainting_the_image(seed):
    rng = np.random.default_rng(seed)
    image_hw = (150, 200) if seed % 2 else (230, 120)
    image, hole = picture(*image_hw, seed=seed), blobs(image_hw, seed, 1 + seed % 4)
    expected = cv2.inpaint(image, hole, 5, cv2.INPAINT_NS)
    depth = cv2.distanceTransform(hole, cv2.DIST_L2, 5)
    rim = (hole > 0) & (depth <= rng.integers(1, 12))
    for seen in (hole > 0, rim, rim & (blobs(image_hw, seed + 100, 2) > 0), np.zeros(image_hw, bool)):
        before = image.copy(), hole.copy(), seen.copy()
        filled = inpaint(image, hole, seen)
        np.testing.assert_array_equal(filled[seen], expected[seen])
        np.testing.assert_array_equal(filled[hole == 0], image[hole == 0])
        for array, copy in zip((image, hole, seen), before, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_inpainting_a_photograph(shared):
    train = open_splits(shared / "data" / "coco128-lvis").train
    checked = 0
    for index in (5, 13, 40):
        image = read_image(train.image_path(index))
        hole = np.zeros(image.shape[:2], np.uint8)
        for row in train.rows(index):
            hole |= whole(bitmap_of(train.segmentation(int(row)), image.shape[:2]), image.shape[:2])
        expected = cv2.inpaint(image, hole, 5, cv2.INPAINT_NS)
        seen = (hole > 0) & (cv2.distanceTransform(hole, cv2.DIST_L2, 5) < 9)
        np.testing.assert_array_equal(inpaint(image, hole, seen)[seen], expected[seen])
        checked += int(seen.sum())
    assert checked > 1000


def test_only_what_is_seen_costs_time(monkeypatch):
    """One of two parts of the hole is seen, and of that only a rim."""
    image, image_hw = picture(200, 300), (200, 300)
    hole = rectangle(image_hw, 20, 20, 150, 180) | rectangle(image_hw, 200, 20, 290, 180)
    seen = rectangle(image_hw, 20, 20, 24, 180) > 0
    filled = []
    monkeypatch.setattr(
        module.cv2, "inpaint", lambda i, m, *_: filled.append((i.shape[:2], int(m.sum()))) or np.zeros_like(i)
    )
    inpaint(image, hole, seen)
    ((size, pixels),) = filled
    assert size == (176, 146)
    assert pixels < 130 * 160 - 80 * 110


# All of it


def scene(draw_size, count, seed):
    """An image with objects of every kind, some without a pixel, some larger than their box."""
    rng = np.random.default_rng(seed)
    height, width = draw_size
    masks, boxes = [], []
    for _ in range(count):
        x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
        x1, y1 = int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))
        if rng.random() < 0.5:
            x1, y1 = min(x1, x0 + int(rng.integers(1, 9))), min(y1, y0 + int(rng.integers(1, 9)))
        mask = np.zeros(draw_size, np.uint8)
        kind = rng.integers(4)
        if kind == 0:
            mask[y0:y1, x0:x1] = 1
        elif kind == 1:
            mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.4
        elif kind == 2:
            cv2.ellipse(mask, ((x0 + x1) // 2, (y0 + y1) // 2), (x1 - x0, y1 - y0), 0, 0, 360, 1, -1)
        masks.append(mask)
        noise = rng.random(4) * 0.4
        box = np.array([x0, y0, x1, y1]) + noise - 0.2
        boxes.append(np.clip(box, 0, [width, height, width, height]))
    return picture(height, width, seed), objects_of(masks, boxes)


def test_a_single_row_is_filled_alike_every_time():
    """OpenCV reads beyond it: called directly, three in four random ones differed between two calls."""
    rng = np.random.default_rng(0)
    for width in range(2, 60):
        image = rng.integers(0, 255, (1, width, 3), dtype=np.uint8)
        hole = (rng.random((1, width)) < 0.5).astype(np.uint8)
        once = inpaint(image, hole, hole > 0)
        _ = np.full(4096, width, np.uint8).copy()  # other values where memory is used again
        np.testing.assert_array_equal(inpaint(image, hole, hole > 0), once)
        np.testing.assert_array_equal(once[hole == 0], image[hole == 0])


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(0, 9),
    st.integers(0, 2**62),
    st.booleans(),
)
def test_what_always_holds(size, count, seed, heatmap):
    image, objects = scene(size, count, seed)
    boost = InstaBoost(1.0, heatmap)
    given_image = image.copy()
    given_boxes, given_masks = objects.boxes.copy(), [whole(one, size).tolist() for one in objects.bitmaps]
    jittered, moved = boost(image, objects, boost.chance(seed))
    # The arguments are as they were.
    np.testing.assert_array_equal(image, given_image)
    np.testing.assert_array_equal(objects.boxes, given_boxes)
    assert [whole(one, size).tolist() for one in objects.bitmaps] == given_masks
    # The image keeps its form; objects keep their order.
    assert jittered.shape == image.shape
    assert jittered.dtype == np.uint8
    assert len(moved) == len(moved.labels) == len(moved.boxes)
    assert moved.labels.tolist() == sorted(moved.labels.tolist())
    assert set(moved.labels.tolist()) <= set(objects.labels.tolist())
    assert moved.boxes.dtype == np.float32
    assert moved.labels.dtype == np.int64
    # Never none where there were some, and then nothing has changed.
    assert len(moved) > 0 or count == 0
    if moved is objects:
        np.testing.assert_array_equal(jittered, image)
    else:
        for box, one in zip(moved.boxes.tolist(), moved.bitmaps, strict=True):
            ys, xs = np.nonzero(whole(one, size))
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    # All chance comes from the seed.
    again, moved_again = boost(image, objects, boost.chance(seed))
    np.testing.assert_array_equal(again, jittered)
    np.testing.assert_array_equal(moved_again.boxes, moved.boxes)


def test_no_objects():
    image = picture(40, 50)
    objects = objects_of([])
    for boost in (ALWAYS, GUIDED):
        jittered, moved = boost(image, objects, np.random.default_rng(0))
        np.testing.assert_array_equal(jittered, image)
        assert len(moved) == 0
        assert moved.boxes.shape == (0, 4)


@pytest.mark.parametrize("boost", [ALWAYS, GUIDED])
def test_an_object_of_one_pixel_stays_one_pixel(boost):
    for corner in ((0, 0), (25, 20), (49, 39)):
        objects = objects_of([rectangle((40, 50), *corner, corner[0] + 1, corner[1] + 1)])
        for seed in range(30):
            _, moved = boost(picture(40, 50), objects, np.random.default_rng(seed))
            assert [int(one.pixels.sum()) for one in moved.bitmaps] == [1]
            if boost is ALWAYS:
                assert moved.boxes.tolist() == objects.boxes.tolist()


@pytest.mark.parametrize("boost", [ALWAYS, GUIDED])
def test_an_object_as_large_as_the_image(boost):
    """It can only grow around its middle, so its mask still covers everything, and there is nothing to in-paint."""
    image = picture(48, 64)
    objects = objects_of([np.ones((48, 64), np.uint8)])
    for seed in range(10):
        jittered, moved = boost(image, objects, np.random.default_rng(seed))
        assert moved.boxes.tolist() == [[0, 0, 64, 48]]
        assert moved.bitmaps[0].pixels.all()
        assert jittered.shape == image.shape


def test_more_objects_than_a_byte_counts(place):
    """Each is in-painted: of 320 white objects on black only the left halves, which the boxes hold, come back."""
    image_hw = (165, 165)
    image, masks, boxes = np.zeros((*image_hw, 3), np.uint8), [], []
    for i in range(320):
        x, y = 9 * (i % 18), 9 * (i // 18)
        masks.append(rectangle(image_hw, x, y, x + 4, y + 4))
        boxes.append((x, y, x + 2, y + 4))
        image[y : y + 4, x : x + 4] = 255
    place(lambda _box: (1.0, 0, (0, 0)))
    jittered, moved = ALWAYS(image, objects_of(masks, boxes), np.random.default_rng(0))
    assert moved.labels.tolist() == list(range(10, 330))
    for x, y, *_ in boxes:
        assert jittered[y : y + 4, x : x + 2].min() == 255
        assert jittered[y : y + 4, x + 2 : x + 4].max() <= 128
        # Far from its own half nothing of the object is left.
        assert jittered[y : y + 4, x + 4 : x + 9].max() == 0


def test_objects_without_pixels_are_dropped(place):
    image_hw = (50, 60)
    place(lambda _box: (1.0, 0, (1, 0)))
    nothing, square = np.zeros(image_hw, np.uint8), rectangle(image_hw, 10, 10, 30, 30)
    # The second lies wholly outside of its box, as a broken annotation might.
    objects = objects_of([nothing, square, square], [(1, 1, 5, 5), (40, 40, 50, 45), (10, 10, 30, 30)])
    _, moved = ALWAYS(picture(*image_hw), objects, np.random.default_rng(0))
    assert moved.labels.tolist() == [12]
    assert moved.boxes.tolist() == [[11, 10, 31, 30]]


def test_an_image_is_left_alone_where_all_objects_would_vanish(monkeypatch):
    monkeypatch.setattr(module, "COLOUR_PROBABILITY", 1.0)
    image, image_hw = picture(50, 60), (50, 60)
    masks = [np.zeros(image_hw, np.uint8), rectangle(image_hw, 10, 10, 30, 30)]
    objects = objects_of(masks, [(1, 1, 5, 5), (40, 40, 50, 45)])
    jittered, moved = ALWAYS(image, objects, np.random.default_rng(0))
    np.testing.assert_array_equal(jittered, image)
    assert moved.labels.tolist() == [10, 11]
    np.testing.assert_array_equal(moved.boxes, objects.boxes)


def test_probability():
    half = InstaBoost(0.5)
    drawn = [half.chance(seed) is not None for seed in range(1000)]
    assert 450 < sum(drawn) < 550
    assert InstaBoost(0.0).chance(3) is None
    assert all(ALWAYS.chance(seed) is not None for seed in range(50))
    # What it draws from is not what the transforms draw from, nor what those of another seed do.
    numbers = {ALWAYS.chance(seed).random() for seed in range(100)}
    numbers |= {float(x) for seed in range(100) for x in np.random.default_rng(seed).random(3)}
    assert len(numbers) == 400
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a probability"):
            InstaBoost(wrong)


# Colours


def blend(towards, image, factor):
    """Pillow's interpolation: beyond 1 it goes on in the same direction."""
    return np.floor((towards + (image.astype(float) - towards) * factor).clip(0, 255) + 1e-6)


def grey_of(image):
    return np.round(image @ np.array([0.299, 0.587, 0.114]))


def smoothed(image):
    """The mean of 3 x 3 pixels, the middle one counting five times; the outermost pixels as they are."""
    result = image.astype(float)
    total = 4 * result[1:-1, 1:-1]
    height, width = image.shape[:2]
    for dy in range(3):
        for dx in range(3):
            total = total + image[dy : dy + height - 2, dx : dx + width - 2]
    result[1:-1, 1:-1] = total / 13
    return result


@pytest.mark.parametrize(
    "factors",
    [
        (1, 1, 1, 1),
        (0, 1, 1, 1),
        (3, 1, 1, 1),
        (1, 1.7, 1, 1),
        (1, 1, 1.6, 1),
        (1, 1, 1, 0),
        (1, 1, 1, 3),
        (0.4, 1.3, 1.2, 2.2),
    ],
)
def test_colours_against_their_definition(factors):
    """Saturation from grey, brightness from black, contrast from the mean grey, sharpness from a smoothed image."""
    image = picture(30, 40) // 3 + 40
    saturation, brightness, contrast, sharpness = factors
    expected = blend(grey_of(image)[:, :, None], image, saturation)
    expected = blend(0, expected, brightness)
    expected = blend(np.floor(grey_of(expected).mean() + 0.5), expected, contrast)
    expected = blend(smoothed(expected), expected, sharpness)
    # Pillow rounds between the steps, which later steps enlarge.
    changed = change_colours(image, factors)
    assert changed.dtype == np.uint8
    np.testing.assert_allclose(changed, expected, atol=1.01 if sum(f != 1 for f in factors) < 2 else 8)
    if factors == (1, 1, 1, 1):
        np.testing.assert_array_equal(changed, image)


def test_colour_factors_and_how_often(place):
    rng = np.random.default_rng(0)
    drawn = np.array([draw_colour_factors(rng) for _ in range(1500)])
    for column, (low, high) in zip(drawn.T, ((0, 30), (10, 20), (10, 20), (0, 30)), strict=True):
        assert sorted(set(column.tolist())) == [tenth / 10 for tenth in range(low, high + 1)]
    place(lambda _box: (1.0, 0, (0, 0)))  # with which nothing but the colours can change
    module.COLOUR_PROBABILITY = 0.5  # the fixture puts it back
    image, objects = picture(40, 50), objects_of([rectangle((40, 50), 12, 12, 30, 30)])
    changed = [(ALWAYS(image, objects, np.random.default_rng(seed))[0] != image).any() for seed in range(200)]
    assert 70 < sum(changed) < 130


# The heat map


def brute_heat(background, own, others, centre, fixed):
    """The heat of every shift (dy, dx), stated with loops."""
    height, width = own.shape
    rings, inside = [], own.copy()
    for weight in (0.4, 0.35, 0.25):
        grown = inside.copy()
        for y in range(height):
            for x in range(width):
                grown[y, x] = inside[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].any()
        rings += [(y, x, weight) for y in range(height) for x in range(width) if grown[y, x] and not inside[y, x]]
        inside = grown
    distances = {}
    for dy in range(-height, height):
        for dx in range(-width, width):
            cells = [(y + dy, x + dx) for y, x, _ in rings]
            y, x = centre[0] + dy, centre[1] + dx
            if not rings or any(not (0 <= a < height and 0 <= b < width) for a, b in cells):
                continue
            if not (0 <= y < height and 0 <= x < width) or others[y, x] or (fixed[0] and dy) or (fixed[1] and dx):
                continue
            distances[dy, dx] = sum(
                weight * math.dist(background[a, b].tolist(), background[y, x].tolist())
                for (a, b), (y, x, weight) in zip(cells, rings, strict=True)
            )
    if not distances:
        return {}
    least, most = min(distances.values()), max(distances.values())
    if least == most:
        return dict.fromkeys(distances, 1.0)
    shares = {shift: (d - least) / (most - least) for shift, d in distances.items()}
    return {shift: -math.log(max(share, 1 / len(distances))) for shift, share in shares.items()}


@pytest.mark.parametrize("fixed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("corner", [(4, 5, 7, 8), (0, 3, 2, 6), (8, 9, 11, 12), (2, 2, 9, 11), (0, 0, 11, 13)], ids=str)
def test_heat_map_against_loops(corner, fixed):
    rng = np.random.default_rng(1)
    background = rng.integers(0, 256, (11, 13, 3)).astype(np.float32)
    y0, x0, y1, x1 = corner
    own, others = np.zeros((11, 13), bool), np.zeros((11, 13), bool)
    own[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.8 if y1 - y0 < 11 else True
    others[0:3, 9:12] = others[9, 1] = True
    others &= ~own
    centre = ((y0 + y1) // 2, (x0 + x1) // 2)
    expected = brute_heat(background, own, others, centre, fixed)
    heat, (first_dy, first_dx) = heat_map(background, own, others, centre, fixed)
    ours = {(first_dy + i, first_dx + j): heat[i, j] for i in range(heat.shape[0]) for j in range(heat.shape[1])}
    assert {shift for shift, h in ours.items() if h > 0} == {shift for shift, h in expected.items() if h > 0}
    for shift, h in expected.items():
        assert ours[shift] == pytest.approx(h, rel=1e-4, abs=1e-4)
    if expected:
        assert ours[0, 0] == max(ours.values())  # nowhere is more like it than where it is


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_cells_hold_a_pixel_of_the_group(size):
    rng = np.random.default_rng(size)
    masks = [(rng.random((33, 45)) < share).astype(np.uint8) for share in (0.002, 0.01)]
    masks.append(np.zeros((33, 45), np.uint8))
    expected = np.zeros((-(-33 // size), -(-45 // size)), bool)
    for y, x in zip(*np.nonzero(masks[0] | masks[1]), strict=True):
        expected[y // size, x // size] = True
    np.testing.assert_array_equal(module._cells([bitmap(mask) for mask in masks], (33, 45), size), expected)


def test_heat_map_of_a_uniform_picture_is_even():
    own = np.zeros((12, 12), bool)
    own[5, 5] = True
    heat, first = heat_map(np.full((12, 12, 3), 90, np.float32), own, np.zeros_like(own), (5, 5), (False, False))
    assert first == (-2, -2)
    np.testing.assert_array_equal(heat, np.ones((6, 6)))


def test_groups_go_where_it_looks_like_where_they_were():
    """A disc on a patch of grass in a desert; there is one more such patch."""
    image_hw = (320, 640)  # cells of ten pixels
    image = np.full((*image_hw, 3), (210, 180, 120), np.uint8)
    image[60:200, 60:200] = image[120:260, 400:540] = (40, 140, 30)
    mask = np.zeros(image_hw, np.uint8)
    cv2.circle(mask, (130, 130), 25, 1, -1)
    one = bitmap(mask)
    start = Placement(one.box, 1.1, 1, (1, 1))
    rng = np.random.default_rng(0)
    shifts = []
    for _ in range(150):
        (placed,) = guided(image, [[one]], [start], rng)
        assert (placed.box, placed.scale, placed.degrees) == (start.box, 1.1, 1)
        shifts.append(placed.shift)
    near_home = sum(math.dist(shift, (0, 0)) < 25 for shift in shifts)
    near_twin = sum(math.dist(shift, (340, 60)) < 25 for shift in shifts)
    # By chance alone, that would be 25² π of 200 x 520 pixels, 2 % of the draws, for each.
    assert near_home > 10
    assert near_twin > 10
    assert len({shift[0] % 10 for shift in shifts}) == 10  # to the pixel, not to the cell


def test_guided_groups_stay_inside_and_at_their_side():
    image_hw = (200, 320)
    image = picture(*image_hw)
    boxes = [(0, 60, 30, 90), (100, 80, 140, 120), (200, 5, 230, 40), (280, 165, 320, 200)]
    ones = [bitmap(rectangle(image_hw, *box)) for box in boxes]
    start = [Placement(box, 1.0, 0, (3 * i, -i)) for i, box in enumerate(boxes)]
    seen: list[set[tuple[int, int]]] = [set() for _ in boxes]
    for seed in range(40):
        for i, placed in enumerate(guided(image, [[one] for one in ones], start, np.random.default_rng(seed))):
            dx, dy = placed.shift
            x0, y0, x1, y1 = boxes[i]
            near_x, near_y = near_sides(boxes[i], image_hw)
            assert dx == start[i].shift[0] if any(near_x) else 0 <= x0 + dx <= x1 + dx <= 320
            assert dy == start[i].shift[1] if any(near_y) else 0 <= y0 + dy <= y1 + dy <= 200
            seen[i].add((dx, dy))
    assert [len(shifts) > 5 for shifts in seen] == [True, True, True, False]
    assert seen[3] == {start[3].shift}


def test_a_group_without_surroundings_keeps_its_shift():
    image_hw = (64, 64)
    one = bitmap(np.ones(image_hw, np.uint8))
    start = Placement((12, 12, 52, 52), 0.9, 1, (2, -1))
    assert guided(picture(*image_hw), [[one]], [start], np.random.default_rng(0)) == [start]
    assert guided(picture(*image_hw), [], [], np.random.default_rng(0)) == []


def test_guided_jitter_differs_from_the_plain_one_in_nothing_but_places():
    image_hw = (120, 160)
    objects = objects_of([rectangle(image_hw, 40, 40, 60, 70)])
    moved = [boost(picture(*image_hw), objects, np.random.default_rng(4))[1] for boost in (ALWAYS, GUIDED)]
    assert moved[0].boxes.tolist() != moved[1].boxes.tolist()
    sizes = [one.boxes[0, 2:] - one.boxes[0, :2] for one in moved]
    np.testing.assert_allclose(*sizes, atol=1)
