import numpy as np
import pytest
from checked_data import HEIGHT, SOUND, SOUND_VAL, WIDTH, checkup, finding, polygon_of, row, write
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.diagnosis.mask_checks import check_masks, iou, mask_boxes


@pytest.mark.parametrize("turn", ["transposed", "clockwise", "counter-clockwise", "stretched"])
def test_masks_turned_by_90_degrees(tmp_path, turn):
    """Boxes are right, masks belong to the image turned; image 2 is upright."""

    def turned(box):
        x, y, w, h = box
        if turn == "stretched":  # clockwise, then width and height fitted to the image again
            return ((HEIGHT - y - h) * WIDTH / HEIGHT, x * HEIGHT / WIDTH, h * WIDTH / HEIGHT, w * HEIGHT / WIDTH)
        if turn == "transposed":
            return (y, x, h, w)
        return (HEIGHT - y - h, x, h, w) if turn == "clockwise" else (y, WIDTH - x - w, h, w)

    boxes = [(4, 6, 25, 8), (35, 20, 20, 11), (10, 25, 6, 14)]
    rows = [row(i, 1, box, segmentation=[polygon_of(turned(box))]) for i, box in enumerate(boxes, start=10)]
    found = checkup(write(tmp_path, [*SOUND[1:], *rows, row(20, 1, (2, 2, 9, 9))], SOUND_VAL))
    assert finding(found, "turned by 90 degrees").examples == ("image 1 (1.png)",)
    assert len(found.findings) == 1 or all("masks" not in f.what or "turned" in f.what for f in found.findings)


def test_the_turned_masks_of_real_lvis_images(shared, tmp_path):
    annotations = load_annotations(shared / "data" / "lvis-val-100" / "lvis_val_100.json", tmp_path)
    facts = check_masks(annotations)
    assert annotations.image_ids[facts.turned].tolist() == [464824, 179898, 443426]
    assert not np.concatenate([facts.empty, facts.duplicate, facts.beyond]).any()


def test_masks_and_boxes_of_an_image_with_swapped_sides(tmp_path):
    """Boxes follow the masks, and both fit only an image of 40 x 60."""
    box = (5, 30, 20, 28)
    found = checkup(write(tmp_path, [*SOUND[1:], row(10, 1, box)], SOUND_VAL))
    assert finding(found, "turned by 90 degrees").examples == ("image 1 (1.png)",)


boxes = st.tuples(*[st.integers(0, 28)] * 2, *[st.integers(1, 12)] * 2)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(boxes, st.booleans(), st.integers(1, 4)), max_size=8))
def test_boxes_of_masks_are_those_of_their_pixels(tmp_path_factory, objects):
    folder = tmp_path_factory.mktemp("masks")
    rows = []
    for number, (box, as_rle, image) in enumerate(objects, start=1):
        x, y, w, h = box
        bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        bitmap[y : y + h, x : x + w] = 1
        code = coco.encode(bitmap)
        compressed = {"size": code["size"], "counts": code["counts"].decode()}
        rows.append(row(number, image, box, **({"segmentation": compressed} if as_rle else {})))
    write(folder, rows)
    annotations = load_annotations(folder / "train.json", folder / "images")
    assert np.array_equal(mask_boxes(annotations), annotations.boxes)
    facts = check_masks(annotations)
    assert not np.concatenate([facts.empty, facts.disagreeing, facts.turned]).any()
    keys = [(r["image_id"], tuple(r["bbox"])) for r in rows]
    assert facts.duplicate.sum() == len(keys) - len(set(keys))


def test_an_rle_without_pixels(tmp_path):
    empty = coco.encode(np.zeros((HEIGHT, WIDTH), np.uint8, order="F"))
    code = {"size": empty["size"], "counts": empty["counts"].decode()}
    found = checkup(write(tmp_path, [*SOUND, row(5, 1, segmentation=code)], SOUND_VAL))
    assert finding(found, "without a pixel").examples == ("annotation 5",)


def test_overlap_by_hand():
    a = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 0, 0], [np.nan] * 4])
    b = np.array([[1, 1, 3, 3], [5, 5, 6, 6], [0, 0, 0, 0], [0, 0, 1, 1]])
    assert iou(a, b).tolist() == [1 / 7, 0, 0, 0]
    assert iou(np.empty((0, 4)), np.empty((0, 4))).shape == (0,)
