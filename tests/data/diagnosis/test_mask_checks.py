import numpy as np
import pytest
from checked_data import HEIGHT, SOUND, SOUND_VAL, WIDTH, finding, polygon_of, report, row, write
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.diagnosis.mask_checks import check_masks, image_of_rows, iou, mask_boxes


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
    found = report(write(tmp_path, [*SOUND[1:], *rows, row(20, 1, (2, 2, 9, 9))], SOUND_VAL))
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
    found = report(write(tmp_path, [*SOUND[1:], row(10, 1, box)], SOUND_VAL))
    assert finding(found, "turned by 90 degrees").examples == ("image 1 (1.png)",)


def test_boxes_given_by_their_corners_are_told_from_others_that_do_not_fit(tmp_path):
    boxes = [(10, 5, 20, 15), (20, 12, 9, 9)]
    rows = [row(i, 1, box, bbox=[box[0], box[1], box[0] + box[2], box[1] + box[3]]) for i, box in enumerate(boxes, 10)]
    rows.append(row(20, 1, (30, 20, 9, 9), bbox=[1, 1, 4, 4]))
    found = report(write(tmp_path, [*SOUND[1:], *rows], SOUND_VAL))
    assert finding(found, "only if their numbers are x0, y0, x1, y1").examples == ("annotation 10", "annotation 11")
    assert finding(found, "boxes that do not fit their masks").examples == ("annotation 20",)


boxes = st.tuples(*[st.integers(0, 28)] * 2, *[st.integers(1, 12)] * 2)


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
    found = report(write(tmp_path, [*SOUND, row(5, 1, segmentation=code)], SOUND_VAL))
    assert finding(found, "without a pixel").examples == ("annotation 5",)


def test_overlap_by_hand():
    a = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 0, 0], [np.nan] * 4])
    b = np.array([[1, 1, 3, 3], [5, 5, 6, 6], [0, 0, 0, 0], [0, 0, 1, 1]])
    assert iou(a, b).tolist() == [1 / 7, 0, 0, 0]
    assert iou(np.empty((0, 4)), np.empty((0, 4))).shape == (0,)


def annotations_of(folder, rows):
    write(folder, rows)
    return load_annotations(folder / "train.json", folder / "images")


def coded(x, y, w, h):
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    bitmap[y : y + h, x : x + w] = 1
    code = coco.encode(bitmap)
    return {"size": code["size"], "counts": code["counts"].decode()}


def test_boxes_of_polygons_and_codes_by_hand(tmp_path):
    rows = [
        row(1, 2, segmentation=[[1.5, 2, 9, 2, 9, 30.25], [20, 0, 21, 0, 21, 3]]),
        row(2, 1, segmentation=coded(3, 4, 5, 6)),
        row(3, 2, segmentation=coded(0, 0, 0, 0)),
        row(4, 4, segmentation=[[-5, -6, 70, 1, 2, 3]]),
    ]
    annotations = annotations_of(tmp_path, rows)
    assert annotations.annotation_ids.tolist() == [2, 1, 3, 4]
    assert image_of_rows(annotations).tolist() == [0, 1, 1, 3]
    expected = [[3, 4, 8, 10], [1.5, 0, 21, 30.25], [np.nan] * 4, [-5, -6, 70, 3]]
    np.testing.assert_array_equal(mask_boxes(annotations), expected)


def test_no_annotations_at_all(tmp_path):
    annotations = annotations_of(tmp_path, [])
    assert mask_boxes(annotations).shape == (0, 4)
    facts = check_masks(annotations)
    assert [flags.shape for flags in (facts.empty, facts.disagreeing, facts.duplicate, facts.beyond)] == [(0,)] * 4
    assert facts.turned.tolist() == [False] * 4


def test_crowds_and_thin_objects_count_nowhere(tmp_path):
    far, out = [polygon_of((30, 20, 9, 9))], [polygon_of((70, 20, 9, 9))]
    for changes in ({"iscrowd": 1}, {"bbox": [1, 1, 0.5, 9]}):
        rows = [row(1, 1), row(2, 1, **changes), row(3, 2, (1, 1, 90, 9), segmentation=far, **changes)]
        rows.append(row(4, 3, (1, 1, 9, 9), segmentation=out, **changes))
        facts = check_masks(annotations_of(tmp_path / str(len(changes)), rows))
        assert not np.concatenate([facts.empty, facts.disagreeing, facts.duplicate, facts.beyond, facts.turned]).any()


@pytest.mark.parametrize(
    ("box", "mask", "disagrees"),
    [
        ((10, 10, 20, 20), (12, 10, 20, 20), False),  # two pixels are allowed
        ((10, 10, 2, 2), (12, 12, 2, 2), False),  # also where nothing overlaps
        ((10, 10, 20, 20), (13, 10, 20, 20), True),  # overlap of 17 / 23
        ((10, 5, 40, 30), (10, 5, 37, 30), False),  # three pixels, but an overlap of 37 / 40
        ((10, 10, 20, 20), (10, 10, 20, 14), True),
        ((50, 10, 30, 20), (50, 10, 10, 20), False),  # compared within the image
    ],
)
def test_when_a_box_fits_its_mask(tmp_path, box, mask, disagrees):
    rows = [row(1, 1, box, segmentation=[polygon_of(mask)]), row(2, 1), row(3, 1, (1, 1, 9, 9))]
    facts = check_masks(annotations_of(tmp_path, rows))
    assert facts.disagreeing.tolist() == [disagrees, False, False]


def test_boxes_beyond_the_image(tmp_path):
    boxes = [(-2, 0, 9, 9), (-3, 0, 9, 9), (0, -3, 9, 9), (53, 0, 9, 9), (54, 0, 9, 9), (0, 34, 9, 9)]
    facts = check_masks(annotations_of(tmp_path, [row(i, 1, box) for i, box in enumerate(boxes)]))
    assert facts.beyond.tolist() == [False, True, True, False, True, True]


def test_repetitions_are_of_one_image_class_and_box(tmp_path):
    rows = [
        row(1, 1, (1, 1, 9, 9)),
        row(2, 2, (1, 1, 9, 9)),  # another image
        row(3, 2, (1, 1, 9, 9), category=2),  # another class
        row(4, 2, (1.3, 1, 9, 9.4)),  # the same in whole pixels
        row(5, 2, (1, 1, 9, 9)),
        row(6, 2, (2, 1, 9, 9)),
    ]
    annotations = annotations_of(tmp_path, rows)
    repeated = annotations.annotation_ids[check_masks(annotations).duplicate]
    assert repeated.tolist() == [4, 5]


quads = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(0, 9)] * 2).map(
    lambda q: (q[0], q[1], q[0] + q[2], q[1] + q[3])
)


@given(quads, quads)
def test_overlap_is_that_of_pixels(one, other):
    def pixels(quad):
        return {(x, y) for x in range(quad[0], quad[2]) for y in range(quad[1], quad[3])}

    union = len(pixels(one) | pixels(other))
    expected = len(pixels(one) & pixels(other)) / union if union else 0
    assert iou(np.array([one], np.float64), np.array([other], np.float64))[0] == pytest.approx(expected)
