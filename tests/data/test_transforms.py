import cv2
import numpy as np
import pytest
import torch
from coco_masks import full_bitmap, polygon
from hypothesis import given
from hypothesis import strategies as st
from tiny import rasterise

from tailseg.data import transforms
from tailseg.data.images import fitted_size
from tailseg.data.transforms import (
    ColourJitter,
    Compose,
    HorizontalFlip,
    RandomCrop,
    ResizeLongestEdge,
    ResizeShortestEdge,
    boxes_from_masks,
    clip_boxes,
    train_transform,
)
from tailseg.recipes.data_section import DataRecipe
from tailseg.structures import Instances

RNG = np.random.default_rng(0)


def wedge(x, y):
    """A shape of 20 x 12 pixels that is not its own mirror image."""
    return np.array([x, y, x + 20, y, x + 20, y + 3, x, y + 12], np.float32)


def scene(height=60, width=100, corners=((10, 20), (80, 48), (0, 0))):
    image = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3).astype(np.uint8)
    made = [rasterise([wedge(*corner)], (height, width), 30) for corner in corners]
    masks = torch.from_numpy(np.stack([m for m, _ in made]) if made else np.zeros((0, 32, 32), np.uint8))
    frames = torch.from_numpy(np.stack([f for _, f in made]) if made else np.zeros((0, 4), np.float32))
    boxes = boxes_from_masks(masks, frames, (0, 0, width, height))
    return image, Instances(boxes=boxes, labels=torch.arange(len(corners)), masks=masks, mask_frames=frames)


def test_flip_mirrors_image_boxes_and_masks():
    image, instances = scene()
    mirror, flipped = HorizontalFlip(1.0)(image, instances, RNG)
    np.testing.assert_array_equal(mirror, image[:, ::-1])
    assert flipped.boxes[0].tolist() == [70, 20, 90, 32]  # 100 - 30, 100 - 10
    # The masks, drawn from their grids, say the same as the boxes: frame and grid were mirrored alike.
    torch.testing.assert_close(boxes_from_masks(flipped.masks, flipped.mask_frames, (0, 0, 100, 60)), flipped.boxes)
    cell = (flipped.mask_frames[0, 2:] - flipped.mask_frames[0, :2]) / 32
    column = ((torch.tensor([89.5, 20.5]) - flipped.mask_frames[0, :2]) / cell).long()
    assert flipped.masks[0, column[1], column[0]] == 255  # the square corner, now on the right
    column = ((torch.tensor([71.5, 30.5]) - flipped.mask_frames[0, :2]) / cell).long()
    assert flipped.masks[0, column[1], column[0]] == 0


def test_flip_twice_is_nothing():
    image, instances = scene()
    flip = HorizontalFlip(1.0)
    again, back = flip(*flip(image, instances, RNG), RNG)
    np.testing.assert_array_equal(again, image)
    torch.testing.assert_close(back.mask_frames, instances.mask_frames)
    torch.testing.assert_close(back.boxes, instances.boxes)
    assert torch.equal(back.masks, instances.masks)


def test_flip_leaves_its_input_alone_and_draws_with_its_probability():
    image, instances = scene()
    before = instances.boxes.clone()
    rng = np.random.default_rng(1)
    flips = sum(HorizontalFlip(0.25)(image, instances, rng)[1] is not instances for _ in range(1000))
    assert 200 < flips < 300
    assert torch.equal(instances.boxes, before)
    assert HorizontalFlip(0.0)(image, instances, rng)[1] is instances


@pytest.mark.parametrize(
    ("image_hw", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 900), 800, 1333, (444, 1333)),  # the long side decides
        ((1, 1000), 800, 100, (1, 100)),  # never 0
        ((640, 480), 320, 320, (320, 240)),
    ],
)
def test_fitted_size(image_hw, short, long, expected):
    assert fitted_size(image_hw, short, long) == expected


def test_resize_scales_by_the_true_ratio_of_each_axis():
    image, instances = scene(61, 100)
    resized, changed = ResizeShortestEdge((30,), 1000)(image, instances, RNG)
    assert resized.shape == (30, 49, 3)  # factor 30 / 61: 49.18 becomes 49
    np.testing.assert_array_equal(resized, cv2.resize(image, (49, 30), interpolation=cv2.INTER_LINEAR))
    ratios = torch.tensor([0.49, 30 / 61, 0.49, 30 / 61])
    torch.testing.assert_close(changed.boxes, instances.boxes * ratios)
    torch.testing.assert_close(changed.mask_frames, instances.mask_frames * ratios)
    assert changed.masks is instances.masks


@pytest.mark.parametrize(
    ("image_hw", "short", "expected"),
    [
        ((3000, 4000), 640, 4),  # 750 x 1000 is larger than 640 x 853; 375 would not be
        ((3000, 4000), 800, 2),
        ((6400, 8000), 800, 8),  # just as large
        ((6400, 8008), 800, 8),
        ((6392, 8000), 800, 4),
        ((3000, 4001), 640, 1),  # an odd side
        ((3002, 4002), 640, 2),
        ((480, 640), 640, 1),
    ],
)
def test_reduction_leaves_at_least_the_size_drawn(image_hw, short, expected):
    compose = Compose((ResizeShortestEdge((short,), 1333, from_reduced=True), HorizontalFlip(0.5)))
    assert compose.reduction(image_hw, 0) == expected
    assert transforms.fit_transform(short, 1333).reduction(image_hw, 0) == 1  # evaluation reads whole images
    assert Compose(()).reduction(image_hw, 0) == 1
    assert Compose((HorizontalFlip(0.5), compose.transforms[0])).reduction(image_hw, 0) == 1


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([2, 4, 8]), st.integers(0, 100))
def test_reduction_changes_no_size(height, width, k, seed):
    """A reduced image is resized to exactly the size of the whole one, which the reduction foresaw."""
    resize = ResizeShortestEdge((100, 120, 333), 1333, from_reduced=True)
    whole = resize.size((height * k, width * k), np.random.default_rng(seed))
    assert resize.size((height, width), np.random.default_rng(seed)) == whole
    reduction = Compose((resize,)).reduction((height * k, width * k), seed)
    assert all(side * k // reduction >= needed for side, needed in zip((height, width), whole, strict=True)) or (
        reduction == 1
    )


def test_resize_draws_every_size_and_clips_boxes():
    image, instances = scene()
    rng = np.random.default_rng(0)
    sizes = {ResizeShortestEdge((20, 30, 40), 500)(image, instances, rng)[0].shape[0] for _ in range(40)}
    assert sizes == {20, 30, 40}
    beyond = Instances(
        boxes=torch.tensor([[-5.0, 10, 200, 100]]),
        labels=instances.labels[:1],
        masks=instances.masks[:1],
        mask_frames=instances.mask_frames[:1],
    )
    _, clipped = ResizeShortestEdge((30,), 500)(image, beyond, rng)
    assert clipped.boxes.tolist() == [[0, 5, 50, 30]]


@given(st.integers(20, 120), st.integers(20, 120), st.integers(0, 1000))
def test_boxes_and_masks_stay_together_through_all_transforms(short, long, seed):
    image, instances = scene()
    both = Compose((ResizeShortestEdge((short, short + 7), long), HorizontalFlip(0.5)))
    changed, after = both(image, instances, np.random.default_rng(seed))
    window = (0, 0, changed.shape[1], changed.shape[0])
    torch.testing.assert_close(boxes_from_masks(after.masks, after.mask_frames, window), after.boxes, atol=1e-3, rtol=0)


def test_longest_edge_is_drawn_from_its_range():
    image, instances = scene()  # 60 x 100
    resize, rng = ResizeLongestEdge(50, 53), np.random.default_rng(0)
    made = [resize(image, instances, rng) for _ in range(60)]
    assert {resized.shape[:2] for resized, _ in made} == {(30, 50), (31, 51), (31, 52), (32, 53)}
    resized, changed = made[0]
    ratios = torch.tensor([resized.shape[1] / 100, resized.shape[0] / 60] * 2)
    torch.testing.assert_close(changed.boxes, instances.boxes * ratios)
    torch.testing.assert_close(changed.mask_frames, instances.mask_frames * ratios)
    assert Compose((ResizeLongestEdge(50, 50, from_reduced=True),)).reduction((240, 400), 0) == 8


def test_crop_at_every_place_keeps_what_is_left_of_each_object():
    _, instances = scene()
    y, x = np.mgrid[0:60, 0:100]
    image = np.stack([y, x, y * 0], axis=2).astype(np.uint8)  # each pixel says where it was
    painted = np.zeros((3, 62, 102), bool)
    for i, (x, y) in enumerate(((10, 20), (80, 48), (0, 0))):
        bitmap, frame = rasterise([wedge(x, y)], (60, 100), 30)
        rows, columns = np.nonzero(bitmap[1:-1, 1:-1] == 255)  # cells of one pixel
        painted[i, rows + round(frame[1]) + 1, columns + round(frame[0]) + 1] = True
    painted = painted[:, :60, :100]  # masks that touch the image's edge are repeated beyond it
    places = set()
    for seed in range(300):
        crop, after = RandomCrop(40)(image, instances, np.random.default_rng(seed))
        assert crop.shape == (40, 40, 3)
        y, x, _ = crop[0, 0].tolist()
        places.add((y, x))
        np.testing.assert_array_equal(crop, image[y : y + 40, x : x + 40])
        windows = painted[:, y : y + 40, x : x + 40]
        assert after.labels.tolist() == [i for i in range(3) if windows[i].any()]
        for box, i in zip(after.boxes, after.labels.tolist(), strict=True):
            rows, columns = np.nonzero(windows[i])
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert len(places) > 150
    assert {y for y, _ in places} == set(range(21))  # both ends are reached
    assert {0, 60} <= {x for _, x in places}


@pytest.mark.parametrize("width", [1, 2])
def test_crop_keeps_a_thin_object_that_covers_no_cell_by_half(width):
    line = np.array([0, 0, width, 0, 1280, 960 - width, 1280, 960, 1280 - width, 960, 0, width], np.float32)
    bitmap, frame = rasterise([line], (960, 1280), 112)
    assert bitmap.max() < 128
    masks, frames = torch.from_numpy(bitmap)[None], torch.from_numpy(frame)[None]
    boxes = torch.tensor([[0.0, 0, 1280, 960]])
    instances = Instances(boxes=boxes, labels=torch.tensor([3]), masks=masks, mask_frames=frames)
    image = np.zeros((960, 1280, 3), np.uint8)
    kept = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y, x = int(rng.integers(321)), int(rng.integers(641))
        _, after = RandomCrop(640)(image, instances, np.random.default_rng(seed))
        # On the diagonal y = 3/4 x; a cell is 11.4 x 8.6 pixels.
        low, high = max(x, y * 4 / 3), min(x + 640, (y + 640) * 4 / 3)
        if high - low < 30:
            continue
        kept += 1
        assert len(after) == 1
        expected = [low - x, low * 3 / 4 - y, high - x, high * 3 / 4 - y]
        assert after.boxes[0].tolist() == pytest.approx(expected, abs=24)
    assert kept > 5


def test_crop_larger_than_the_image_changes_nothing():
    image, instances = scene()
    crop, after = RandomCrop(100)(image, instances, np.random.default_rng(0))
    np.testing.assert_array_equal(crop, image)
    assert torch.equal(after.boxes, instances.boxes)
    assert torch.equal(after.mask_frames, instances.mask_frames)
    nothing = scene(corners=())
    assert len(RandomCrop(40)(*nothing, np.random.default_rng(0))[1]) == 0


def test_the_recipe_chooses_the_transform():
    recipe = DataRecipe(short_edges=(40,), long_edge=90, flip=0.0)
    shortest = ResizeShortestEdge((40,), 90, from_reduced=True)
    assert train_transform(recipe) == Compose((shortest, HorizontalFlip(0.0)))
    recipe = DataRecipe(long_edges=(768, 1792), crop=1280)
    longest = ResizeLongestEdge(768, 1792, from_reduced=True)
    assert train_transform(recipe) == Compose((longest, RandomCrop(1280), HorizontalFlip(0.5)))


def test_no_objects():
    image, instances = scene(corners=())
    changed, after = Compose((ResizeShortestEdge((30,), 500), HorizontalFlip(1.0)))(image, instances, RNG)
    assert changed.shape[:2] == (30, 50)
    assert after.boxes.shape == after.mask_frames.shape == (0, 4)


def test_evaluation_draws_nothing():
    image, instances = scene()
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    resized, _ = transforms.fit_transform(30, 1000)(image, instances, rng)
    assert resized.shape == (30, 50, 3)
    assert rng.bit_generator.state == state


def test_clip_boxes():
    assert clip_boxes(torch.tensor([[-1.0, -2, 50, 30]]), (20, 40)).tolist() == [[0, 0, 40, 20]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: HorizontalFlip(1.5),
        lambda: ResizeShortestEdge((), 5),
        lambda: ResizeLongestEdge(9, 5),
        lambda: RandomCrop(0),
        lambda: DataRecipe(long_edges=(900, 800)),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ValueError, match="received"):
        make()


def test_boxes_from_masks_are_the_extent_of_the_covered_cells():
    masks = torch.zeros(3, 10, 10, dtype=torch.uint8)
    masks[0, 2:5, 3:9] = 255
    masks[1, 4, 4] = 127  # not half covered, but nothing else is
    masks[0, 8, 8] = 127
    masks[2, :, :] = 200
    frames = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [-2, -4, 18, 36]], dtype=torch.float32)
    boxes = boxes_from_masks(masks, frames)
    assert boxes.tolist() == [[3, 2, 9, 5], [4, 4, 5, 5], [-2, -4, 18, 36]]
    clipped = boxes_from_masks(masks, frames, window=(0, 0, 4.5, 4))
    assert clipped.tolist() == [[3, 2, 4.5, 4], [0, 0, 0, 0], [0, 0, 4.5, 4]]
    assert boxes_from_masks(masks[:0], frames[:0]).shape == (0, 4)


def test_boxes_from_masks_leave_out_the_margin_beyond_the_image():
    outer = np.array([0, 0, 30, 0, 30, 20, 0, 20], np.float32)  # the whole image
    mask, frame = rasterise([outer], (20, 30), 50)
    boxes = boxes_from_masks(torch.from_numpy(mask)[None], torch.from_numpy(frame)[None], window=(0, 0, 30, 20))
    assert boxes.tolist() == [[0, 0, 30, 20]]


@given(st.lists(polygon, min_size=1, max_size=2), st.integers(0, 60), st.integers(0, 60))
def test_boxes_in_a_window_are_those_of_the_cropped_bitmap(polygons, left, top):
    window = (left, top, left + 35, top + 25)
    mask, frame = rasterise([p.astype(np.float32) for p in polygons], (90, 100), 112)
    box = boxes_from_masks(torch.from_numpy(mask)[None], torch.from_numpy(frame)[None], window)[0].tolist()
    ys, xs = np.nonzero(full_bitmap(polygons, (90, 100))[top : top + 25, left : left + 35])
    expected = [xs.min() + left, ys.min() + top, xs.max() + 1 + left, ys.max() + 1 + top] if len(xs) else [0] * 4
    assert box == pytest.approx(expected, abs=1e-3)


def plain_jitter(image, brightness, contrast, saturation):
    """The definition, step by step: saturation, contrast about the mean grey value, brightness."""
    grey = image.astype(float) @ np.array([0.299, 0.587, 0.114])
    coloured = saturation * image + (1 - saturation) * grey[..., None]
    contrasted = contrast * coloured + (1 - contrast) * grey.mean()
    return (brightness * contrasted).clip(0, 255)


@pytest.mark.parametrize("seed", range(6))
def test_colour_jitter_against_its_definition(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (int(rng.integers(1, 40)), int(rng.integers(1, 40)), 3), dtype=np.uint8)
    _, instances = scene()
    before = image.copy()
    factors = np.random.default_rng(seed).uniform(0.4, 1.6, 3)
    changed, same = ColourJitter(0.6)(image, instances, np.random.default_rng(seed))
    assert changed.dtype == np.uint8
    assert changed.shape == image.shape
    assert np.abs(changed - plain_jitter(image, *factors)).max() < 0.75  # fixed point, then rounded
    assert same is instances
    np.testing.assert_array_equal(image, before)


def test_colour_jitter_by_hand(monkeypatch):
    """Twice as bright; half the contrast, about 100; no saturation at all."""
    image = np.array([[[50, 50, 50], [150, 150, 150]]], np.uint8)
    _, nothing = scene(corners=())

    class Chosen:
        def __init__(self, *factors):
            self.factors = factors

        def uniform(self, *_):
            return self.factors

    def change(pixels, *factors):
        return ColourJitter(0.9)(pixels, nothing, Chosen(*factors))[0][0].tolist()

    assert change(image, 2, 1, 1) == [[100] * 3, [255] * 3]
    assert change(image, 1, 0.5, 1) == [[75] * 3, [125] * 3]
    assert change(np.array([[[100, 200, 0]]], np.uint8), 1, 1, 0) == [[147] * 3]  # 29.9 + 117.4


def test_no_strength_is_no_change_and_too_much_is_refused():
    image, instances = scene()
    np.testing.assert_array_equal(ColourJitter(0.0)(image, instances, np.random.default_rng(0))[0], image)
    with pytest.raises(ValueError, match="below 1, received 1"):
        ColourJitter(1.0)


def test_colours_come_last_and_take_no_chance_from_the_rest():
    image, instances = scene(height=60, width=100)
    plain = train_transform(DataRecipe(long_edges=(40, 200), crop=50))
    coloured = train_transform(DataRecipe(long_edges=(40, 200), crop=50, colour_jitter=0.4))
    for seed in range(8):
        one, before = plain(image, instances, np.random.default_rng(seed))
        other, after = coloured(image, instances, np.random.default_rng(seed))
        assert one.shape == other.shape
        assert not np.array_equal(one, other)
        torch.testing.assert_close(before.boxes, after.boxes)
    assert train_transform(DataRecipe()).transforms == train_transform(DataRecipe(colour_jitter=0.0)).transforms


def test_large_scale_jitter_is_a_range_of_long_edges_and_a_crop():
    """Simple Copy-Paste's: the image fitted into a square of s · 320, s from 0.1 to 2 alike, then cut to 320."""
    image, instances = scene(height=240, width=320, corners=((10, 20), (280, 200)))
    jitter = train_transform(DataRecipe(long_edges=(32, 640), crop=320, flip=0))
    for seed in range(20):
        edge = int(np.random.default_rng(seed).integers(32, 641))  # the first number drawn
        pixels, kept = jitter(image, instances, np.random.default_rng(seed))
        size = fitted_size((240, 320), edge, edge)
        assert pixels.shape[:2] == (min(size[0], 320), min(size[1], 320))
        if edge <= 320:
            torch.testing.assert_close(kept.boxes, instances.boxes * edge / 320, atol=0.6, rtol=0.02)
