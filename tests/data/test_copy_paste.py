"""Copy-Paste: which objects are drawn how often, what is cut out, and whose pixels are whose afterwards."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.annotations.masks import Bitmap
from tailseg.data.copy_paste import CopyPaste, Drawn, ObjectPool, Patch, paste, patch_of
from tailseg.data.instaboost import Objects
from tailseg.errors import UserError
from tailseg.recipes.data_section import DataRecipe

NOBODY = np.zeros(3, bool)


def rectangle(x0, y0, x1, y1):
    return Bitmap(np.ones((y1 - y0, x1 - x0), np.uint8), x0, y0)


def objects_of(*bitmaps):
    boxes = np.array([one.box for one in bitmaps], np.float32).reshape(-1, 4)
    return Objects(boxes, np.arange(10, 10 + len(bitmaps)), bitmaps)


def opaque(x0, y0, x1, y1, label=5, colour=200):
    shape = (y1 - y0, x1 - x0)
    return Patch(np.full((*shape, 3), colour, np.uint8), np.full(shape, 255, np.uint8), x0, y0, label)


def whole(one, image_hw):
    mask = np.zeros(image_hw, np.uint8)
    x0, y0, x1, y1 = one.box
    assert 0 <= x0 < x1 <= image_hw[1]
    assert 0 <= y0 < y1 <= image_hw[0]
    mask[y0:y1, x0:x1] = one.pixels
    return mask


# Pasting


def test_occlusion_by_hand():
    """Half of one object covered, nine tenths of the second, one pixel more of the third; the fourth left alone."""
    image = np.full((40, 60, 3), 7, np.uint8)
    half, most, too_much = rectangle(0, 0, 10, 10), rectangle(20, 0, 30, 10), rectangle(40, 0, 50, 10)
    alone = rectangle(0, 20, 5, 25)
    objects = objects_of(half, most, too_much, alone)
    objects.boxes[3] = [0.2, 19.7, 5.4, 25.1]  # annotated so: stays to the last digit
    hidden = Bitmap(np.pad(np.ones((9, 10), np.uint8), ((0, 1), (0, 0))), 40, 0)
    hidden.pixels[9, 0] = 1
    third = Patch(np.full((10, 10, 3), 50, np.uint8), hidden.pixels * np.uint8(255), 40, 0, 2)
    picture, pasted = paste(image, objects, [opaque(5, 0, 15, 10), opaque(20, 0, 30, 9, 8), third])
    assert pasted.labels.tolist() == [10, 11, 13, 5, 8, 2]
    boxes = [[0, 0, 5, 10], [20, 9, 30, 10], [0.2, 19.7, 5.4, 25.1], [5, 0, 15, 10], [20, 0, 30, 9], [40, 0, 50, 10]]
    np.testing.assert_array_equal(pasted.boxes, np.array(boxes, np.float32))
    assert [int(one.pixels.sum()) for one in pasted.bitmaps] == [50, 10, 25, 100, 90, 91]
    assert pasted.bitmaps[2] is alone
    assert (picture[0, 4:6, 0].tolist(), picture[9, 45, 0], picture[9, 40, 0]) == ([7, 200], 7, 50)
    assert (image == 7).all()  # the arguments stay
    assert half.pixels.all()


def test_alpha_mixes_colours_and_covers_from_one_half():
    image = np.full((4, 4, 3), 100, np.uint8)
    alpha = np.array([[0, 51, 127, 128]], np.uint8)
    patch = Patch(np.full((1, 4, 3), 200, np.uint8), alpha, 0, 1, 5)
    picture, pasted = paste(image, objects_of(rectangle(0, 0, 4, 4)), [patch])
    assert picture[1, :, 0].tolist() == [100, 120, 150, 150]
    assert pasted.boxes.tolist() == [[0, 0, 4, 4], [3, 1, 4, 2]]
    assert int(pasted.bitmaps[0].pixels.sum()) == 15


def test_later_patches_cover_earlier_ones():
    image = np.zeros((20, 20, 3), np.uint8)
    _, pasted = paste(image, objects_of(), [opaque(0, 0, 10, 10, 1), opaque(0, 0, 10, 8, 2)])
    assert pasted.labels.tolist() == [1, 2]
    assert pasted.boxes.tolist() == [[0, 8, 10, 10], [0, 0, 10, 8]]
    _, pasted = paste(image, objects_of(), [opaque(0, 0, 10, 10, 1), opaque(0, 0, 10, 10, 2)])
    assert pasted.labels.tolist() == [2]


def test_nothing_to_paste_leaves_everything():
    image = np.zeros((9, 9, 3), np.uint8)
    for objects in (objects_of(), objects_of(rectangle(1, 1, 3, 3))):
        thin = Patch(np.full((2, 2, 3), 9, np.uint8), np.full((2, 2), 100, np.uint8), 0, 0, 1)
        for patches in ([], [thin]):
            picture, pasted = paste(image, objects, patches)
            np.testing.assert_array_equal(picture, image)
            np.testing.assert_array_equal(pasted.boxes, objects.boxes)
            assert pasted.labels.tolist() == objects.labels.tolist()
            assert pasted.bitmaps == objects.bitmaps
            assert (pasted.boxes.dtype, pasted.labels.dtype) == (np.float32, np.int64)


@given(st.integers(0, 10_000), st.integers(0, 6), st.integers(1, 4))
def test_every_pixel_belongs_to_who_is_on_top(seed, count, pasted_count):
    """Against a statement on whole images."""
    rng = np.random.default_rng(seed)
    hw = (24, 31)

    def corners():
        x, y = int(rng.integers(0, 28)), int(rng.integers(0, 21))
        return x, y, int(rng.integers(x + 1, 32)), int(rng.integers(y + 1, 25))

    below = []
    for _ in range(count):
        one = rectangle(*corners())
        noise = (rng.random(one.pixels.shape) < 0.7).astype(np.uint8)
        noise.flat[0] = 1
        below.append(Bitmap(noise, one.x, one.y).tight())
    patches = []
    for label in range(pasted_count):
        x0, y0, x1, y1 = corners()
        alpha = rng.integers(0, 256, (y1 - y0, x1 - x0), dtype=np.uint8)
        patches.append(Patch(rng.integers(0, 256, (*alpha.shape, 3), dtype=np.uint8), alpha, x0, y0, label))
    image = rng.integers(0, 256, (*hw, 3), dtype=np.uint8)
    picture, pasted = paste(image, objects_of(*below), patches)

    masks = [whole(one, hw) for one in below]
    expected_picture = image.astype(float)
    labels = [10 + i for i in range(count)]
    for patch in patches:
        covers = np.zeros(hw, np.uint8)
        place = slice(patch.y, patch.y + patch.alpha.shape[0]), slice(patch.x, patch.x + patch.alpha.shape[1])
        covers[place] = patch.alpha >= 128
        if covers.any():
            share = patch.alpha[:, :, None] / 255
            mixed = expected_picture[place] * (1 - share) + patch.pixels * share
            expected_picture[place] = np.floor(mixed + 0.5 - 1e-9)
            masks = [mask & (1 - covers) for mask in masks] + [covers]
            labels.append(patch.label)
    firsts = [whole(one, hw) for one in below] + [
        whole(patch.bitmap, hw) for patch in patches if patch.bitmap.pixels.any()
    ]
    alive = [i for i, m in enumerate(masks) if m.sum() >= max(0.1 * firsts[i].sum(), 1)]
    assert np.abs(picture - expected_picture).max() <= 1
    assert pasted.labels.tolist() == [labels[i] for i in alive]
    for i, bitmap, box in zip(alive, pasted.bitmaps, pasted.boxes, strict=True):
        np.testing.assert_array_equal(whole(bitmap, hw), masks[i])
        ys, xs = np.nonzero(masks[i])
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


# Cutting out


def source_of(height, width):
    """Colours that say where a pixel is."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 40)], axis=2).astype(np.uint8)


def test_a_patch_at_its_own_size_is_the_object_itself():
    bitmap = Bitmap(np.array([[1, 1, 0], [0, 1, 1]], np.uint8), 4, 7)
    patch = patch_of(Drawn(0, 1.0, False, (0.5, 0.999)), source_of(20, 30), (20, 30), bitmap, 6, (20, 30))
    assert (patch.x, patch.y, patch.label) == (14, 18, 6)  # int(0.5 · 28), int(0.999 · 19)
    np.testing.assert_array_equal(patch.alpha, bitmap.pixels * 255)
    np.testing.assert_array_equal(patch.pixels, source_of(20, 30)[7:9, 4:7])
    mirror = patch_of(Drawn(0, 1.0, True, (0.0, 0.0)), source_of(20, 30), (20, 30), bitmap, 6, (20, 30))
    assert (mirror.x, mirror.y) == (0, 0)
    np.testing.assert_array_equal(mirror.alpha, patch.alpha[:, ::-1])
    np.testing.assert_array_equal(mirror.pixels, patch.pixels[:, ::-1])


def test_objects_scale_with_the_images_and_always_fit():
    bitmap = rectangle(10, 0, 60, 40)
    drawn = Drawn(0, 1.5, False, (0.0, 0.0))
    assert drawn.scale((80, 100), (40, 50)) == 0.75
    patch = patch_of(drawn, source_of(80, 100), (80, 100), bitmap, 0, (40, 50))
    assert patch.alpha.shape == (30, 38)  # 0.75 of 40 and of 50 (37.5, to the even one)
    patch = patch_of(drawn, source_of(80, 100), (80, 100), bitmap, 0, (10, 50))
    assert patch.alpha.shape == (10, 12)  # limited by the height: a quarter


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1), (0.51, 1), (0.5, 2), (0.26, 2), (0.25, 4), (0.1, 8)])
def test_an_image_is_decoded_no_smaller_than_needed(scale, expected):
    drawn = Drawn(0, 1.0, False, (0, 0))
    assert drawn.reduction((800, 1600), (80, int(1600 * scale))) == expected
    assert drawn.reduction((801, 1600), (200, 200)) == 1
    assert drawn.reduction((804, 1600), (200, 200)) == 4


@pytest.mark.parametrize("reduced", [2, 4, 8])
def test_a_reduced_source_gives_nearly_the_same_patch(reduced):
    rng = np.random.default_rng(reduced)
    smooth = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (256, 192), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[0:192, 0:256]
    disc = Bitmap((((x - 131) ** 2 + (y - 77) ** 2) < 45**2).astype(np.uint8), 0, 0).tight()
    drawn = Drawn(0, 1.0, False, (0.3, 0.6))
    image_hw = (192 // reduced, 256 // reduced)
    small = cv2.resize(smooth, image_hw[::-1], interpolation=cv2.INTER_AREA)
    one = patch_of(drawn, smooth, (192, 256), disc, 1, image_hw)
    other = patch_of(drawn, small, (192, 256), disc, 1, image_hw)
    area = int(np.count_nonzero(one.alpha >= 128)), int(np.count_nonzero(other.alpha >= 128))
    exact = np.pi * (45 / reduced) ** 2
    assert area == pytest.approx((exact, exact), rel=0.06)
    # Laid over each other at the object's own centre, the pixels agree.
    centres = []
    for patch in (one, other):
        ys, xs = np.nonzero(patch.alpha >= 128)
        centres.append(patch.pixels[round(ys.mean()), round(xs.mean())].astype(int))
    assert np.abs(centres[0] - centres[1]).max() <= 16


# Who is drawn


def annotation_file(folder, held, negatives=None):
    """Image i holds a square object of each class in ``held[i]``; files of plain pictures of 40 x 50 pixels."""
    (folder / "images").mkdir(exist_ok=True)
    images, rows = [], []
    for i, own in enumerate(held):
        Image.fromarray(np.full((40, 50, 3), 20 * i, np.uint8)).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "height": 40, "width": 50, "file_name": f"{i}.png"})
        if negatives is not None:
            images[-1]["neg_category_ids"] = negatives[i]
        square = {"bbox": [4, 4, 20, 20], "area": 400, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
        rows += [{"image_id": i, "category_id": c, "iscrowd": 0} | square for c in own]
    rows = [row | {"id": n} for n, row in enumerate(rows)]
    content = {"images": images, "annotations": rows, "categories": [{"id": c, "name": f"class {c}"} for c in range(3)]}
    (folder / "train.json").write_text(json.dumps(content))
    return load_annotations(folder / "train.json", folder / "images")


HELD = [[0], [0], [0, 1, 1], [0, 0], [0, 2], []]  # class 0: 6 objects in 5 images; 1: two in one; 2: one in one


def shares_of(pool, barred=NOBODY, times=6000):
    rng = np.random.default_rng(0)
    counts = Counter(pool.draw(barred, rng) for _ in range(times))
    return {row: count / times for row, count in counts.items()}


def test_rare_classes_come_first(tmp_path):
    """With a threshold of 1, classes 1 and 2 (in one image of five) have a repeat factor of the root of 5."""
    annotations = annotation_file(tmp_path, HELD)
    pool = ObjectPool.of(annotations, np.arange(5), DataRecipe(copy_paste=1, repeat_threshold=1.0))
    np.testing.assert_allclose(pool.weights, [1, np.sqrt(5), np.sqrt(5)])
    shares, total = shares_of(pool), 1 + 2 * np.sqrt(5)
    rows_of = [np.flatnonzero(annotations.labels == label).tolist() for label in range(3)]
    for label, expected in enumerate([1, np.sqrt(5), np.sqrt(5)]):
        for row in rows_of[label]:
            assert shares[row] == pytest.approx(expected / total / len(rows_of[label]), abs=0.02)


def test_uniformly_every_object_comes_equally_often(tmp_path):
    annotations = annotation_file(tmp_path, HELD)
    pool = ObjectPool.of(annotations, np.arange(5), DataRecipe(copy_paste=1, copy_paste_draw="uniform"))
    assert pool.weights.tolist() == [6, 2, 1]
    shares = shares_of(pool)
    assert sorted(shares) == list(range(9))
    assert all(share == pytest.approx(1 / 9, abs=0.02) for share in shares.values())


def test_barred_classes_are_not_drawn(tmp_path):
    annotations = annotation_file(tmp_path, HELD)
    pool = ObjectPool.of(annotations, np.arange(5), DataRecipe(copy_paste=1, repeat_threshold=1.0))
    shares = shares_of(pool, np.array([True, False, False]), 500)
    assert {int(annotations.labels[row]) for row in shares} == {1, 2}
    assert shares_of(pool, np.ones(3, bool), 5) == {None: 1.0}
    # Images that are not trained on, and classes without objects there, are not in the pool.
    pool = ObjectPool.of(annotations, np.array([0, 1, 4]), DataRecipe(copy_paste=1))
    assert pool.weights.tolist() == [1, 0, 1]
    assert {annotations.image_of(row) for row in shares_of(pool, times=300)} == {0, 1, 4}


def test_the_largest_random_number_is_still_of_a_class(tmp_path):
    """Just below 1, times a sum of weights, it may be rounded up to the sum."""

    class Most:
        def random(self, count):
            return np.full(count, np.nextafter(1, 0))

    annotations = annotation_file(tmp_path, HELD)
    pool = ObjectPool(annotations, np.arange(5), np.array([1.0, 2.0, 0.0]))
    assert pool.draw(NOBODY, Most()) == pool.rows[7]  # the last object of class 1
    assert pool.draw(np.array([False, True, False]), Most()) == pool.rows[5]


def test_what_is_drawn_is_within_its_bounds(tmp_path):
    annotations = annotation_file(tmp_path, HELD)
    pool = ObjectPool.of(annotations, np.arange(5), DataRecipe(copy_paste=1))
    counts, drawn = Counter(), []
    for seed in range(300):
        rng = CopyPaste(1.0, pool, 0.5).chance(seed)
        again = CopyPaste(1.0, pool, 0.5).draw(NOBODY, CopyPaste(1.0, pool, 0.5).chance(seed))
        found = CopyPaste(1.0, pool, 0.5).draw(NOBODY, rng)
        assert found == again
        counts[len(found)] += 1
        drawn += found
    assert counts.keys() == {1, 2, 3}
    assert min(counts.values()) > 70
    sizes = [one.size for one in drawn]
    assert 0.5 <= min(sizes) < 0.52
    assert 1.48 < max(sizes) <= 1.5
    assert 0.4 < np.mean([one.mirrored for one in drawn]) < 0.6
    assert all(0 <= share < 1 for one in drawn for share in one.place)
    never = CopyPaste(1.0, pool, 0.0)
    assert not any(one.mirrored for seed in range(30) for one in never.draw(NOBODY, never.chance(seed)))
    assert never.draw(np.ones(3, bool), never.chance(0)) == []


def test_how_often(tmp_path):
    annotations = annotation_file(tmp_path, HELD)
    pool = ObjectPool.of(annotations, np.arange(5), DataRecipe(copy_paste=1))
    assert not any(CopyPaste(0.0, pool, 0.5).chance(seed) for seed in range(50))
    assert all(CopyPaste(1.0, pool, 0.5).chance(seed) for seed in range(50))
    assert 60 < sum(CopyPaste(0.4, pool, 0.5).chance(seed) is not None for seed in range(200)) < 100
    with pytest.raises(ValueError, match=r"expected probabilities, received 1\.5 and 0"):
        CopyPaste(1.5, pool, 0)


def test_one_image_has_nowhere_to_paste_from(tmp_path):
    annotations = annotation_file(tmp_path, [[0], []])
    assert CopyPaste.of(annotations, np.array([0]), DataRecipe()) is None
    with pytest.raises(UserError, match=r"train\.json: data\.copy_paste pastes objects of other images, and there is"):
        CopyPaste.of(annotations, np.array([0]), DataRecipe(copy_paste=0.5))
