import cv2
import numpy as np
import pytest
from coco_masks import full_bitmap, polygon
from foreign_files import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from tailseg.data.annotations.masks import Bitmap, encode_bitmap
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    image_size,
    mask_columns,
    read_bytes,
    read_json,
    read_object,
    read_text,
    rectangle,
    source_by_names,
    source_of,
)
from tailseg.errors import UserError

# ---------------------------------------------------------------------------------------------------------
# Sizes of images


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_size_is_that_of_the_image_as_shown(tmp_path, orientation):
    path = picture(tmp_path / "a.jpg", (80, 40), orientation)
    shown, stored = ((80, 40), (40, 80)) if orientation > 4 else ((40, 80), (40, 80))
    assert image_size(path, "w") == shown
    assert image_size(path, "w", shown) == shown
    assert image_size(path, "w", stored) == stored  # annotated without looking at the camera's orientation


def test_an_image_that_is_cut_off_has_none(tmp_path):
    path = picture(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"^w: {path}: the image is broken or cut off"):
        image_size(path, "w")


def test_a_size_that_is_neither_shown_nor_stored(tmp_path):
    path = picture(tmp_path / "a.jpg", (80, 40), 6)
    with pytest.raises(UserError) as caught:
        image_size(path, "a.xml", (41, 80))
    assert str(caught.value) == f"a.xml: it says 80 x 41 pixels but {path} has 40 x 80; correct one of them"
    upright = picture(tmp_path / "b.png", (80, 40))
    with pytest.raises(UserError, match=r"it says 40 x 80 pixels but .*b\.png has 80 x 40; correct one of them"):
        image_size(upright, "w", (80, 40))


def test_images_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"^w: .*gone\.jpg does not exist; put the image there"):
        image_size(tmp_path / "gone.jpg", "w")
    for name, content in (("empty.jpg", b""), ("text.jpg", b"hello"), ("cut.png", b"\x89PNG\r\n\x1a\n" + bytes(9))):
        (tmp_path / name).write_bytes(content)
        problem = "the file is empty" if name == "empty.jpg" else "not an image that can be read"
        with pytest.raises(UserError, match=rf"^w: .*{name}: {problem}; replace it by a JPEG or PNG file$"):
            image_size(tmp_path / name, "w")
    with pytest.raises(UserError, match=f"^w: {tmp_path}: it is a folder; give an image file"):
        image_size(tmp_path, "w")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_has_one_size(tmp_path, orientation):
    """Pillow turns it on decoding, and states the turned size: a file as labelled in a viewer gives no other."""
    path = tmp_path / "a.tif"
    Image.new("RGB", (80, 40)).save(path, tiffinfo={0x0112: orientation})
    shown, stored = ((80, 40), (40, 80)) if orientation > 4 else ((40, 80), (80, 40))
    assert image_size(path, "w") == image_size(path, "w", shown) == shown
    with pytest.raises(UserError, match="correct one of them"):
        image_size(path, "w", stored)


# ---------------------------------------------------------------------------------------------------------
# Files


def test_bytes_text_and_objects_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes('\ufeff{"é": [1]}'.encode())
    assert read_text(path) == '{"é": [1]}'
    assert read_json(path) == read_object(path) == {"é": [1]}
    assert read_bytes(path)[:3] == b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("read", "content", "sentence"),
    [
        (read_bytes, None, "no such file; check the path"),
        (read_text, b"\xff", "it is not a UTF-8 text; save it as one"),
        (read_json, b"\xff", "it is not a UTF-8 text; save it as one"),
        (read_json, b'{"a":\n x}', "not valid JSON: .* at line 2, column 2; write it again"),
        (read_json, b"[" * 100_000, "not valid JSON: .* at line 1, column .*; write it again"),
        (read_object, b"", "not valid JSON: .* at line 1, column 1; write it again"),
        (read_object, b'{"a":\n x}', "not valid JSON: .* at line 2, column 2; write it again"),
        (read_object, b"[1]", "expected a JSON object, found a list; check the file"),
        (read_object, b"null", "expected a JSON object, found a NoneType; check the file"),
    ],
)
def test_files_at_fault_are_named(tmp_path, read, content, sentence):
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {sentence}"):
        read(path)


def test_json_may_have_numbers_that_python_writes(tmp_path):
    (tmp_path / "a").write_text("[1, NaN, -Infinity, 1e999]")
    assert str(read_json(tmp_path / "a")) == "[1, nan, -inf, inf]"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be read \(.*\); check the path and its rights"):
        read_bytes(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# From objects to rows


def objects_of(path, *objects, image_hw=(40, 80)):
    return AnnotatedImage(path, image_hw, [name for name, _ in objects], [polygons for _, polygons in objects])


def test_rows_are_numbered_through_all_splits(tmp_path):
    square, wide = rectangle(10, 5, 20, 15), rectangle(60, 30, 99, 39)
    objects = {
        "train": [objects_of(tmp_path / "t" / "a.jpg", ("owl", [square]), ("cat", [square, wide]))],
        "val": [objects_of(tmp_path / "v" / "a.jpg", ("owl", [wide])), objects_of(tmp_path / "v" / "b.jpg")],
    }
    found = source_of(objects, tmp_path, ["cat", "owl", "hen"], LeftOut())
    assert found.categories == [{"id": 1, "name": "cat"}, {"id": 2, "name": "owl"}, {"id": 3, "name": "hen"}]
    assert found.notes == []
    train, val = found.parts["train"], found.parts["val"]
    assert train.images == [{"id": 1, "file_name": "t/a.jpg", "height": 40, "width": 80}]
    assert [row["id"] for row in val.images] == [2, 3]
    assert val.files == [tmp_path / "v" / "a.jpg", tmp_path / "v" / "b.jpg"]
    rows = [*train.annotations, *val.annotations]
    assert [(row["id"], row["image_id"], row["category_id"], row["iscrowd"]) for row in rows] == [
        (1, 1, 2, 0),
        (2, 1, 1, 0),
        (3, 2, 2, 0),
    ]
    assert (rows[0]["bbox"], rows[0]["area"]) == ([10, 5, 10, 10], 100)
    assert (rows[1]["bbox"], rows[1]["area"]) == ([10, 5, 70, 34], 100 + 20 * 9)  # cut at the image's edge
    assert rows[2]["segmentation"] == [[60, 30, 99, 30, 99, 39, 60, 39]]  # as drawn


def test_categories_that_occur_in_the_order_of_names(tmp_path):
    square = [rectangle(1, 1, 5, 5)]
    objects = {"train": [objects_of(tmp_path / "a.jpg", ("b", square), ("a", square), ("b", square))]}
    found = source_by_names(objects, tmp_path, LeftOut())
    assert [row["name"] for row in found.categories] == ["a", "b"]
    with pytest.raises(UserError, match=f"^{tmp_path}: no file in it has an object; check the folder"):
        source_by_names({"train": [objects_of(tmp_path / "a.jpg")]}, tmp_path, LeftOut())
    with pytest.raises(UserError, match=f"^{tmp_path}: there is no image in it; check the folder"):
        source_of({"train": []}, tmp_path, ["a"], LeftOut())


@given(st.lists(polygon, min_size=1, max_size=3))
def test_areas_are_pixels_and_boxes_are_cut(tmp_path_factory, polygons):
    """The area is that of COCO's own bitmap, or of the polygons where they cover no pixel of it.

    The box is that of the corners within the image.
    """
    path = tmp_path_factory.getbasetemp() / "a.jpg"
    objects = {"train": [objects_of(path, ("a", [p.reshape(-1, 2) for p in polygons]), image_hw=(90, 100))]}
    rows = source_of(objects, path.parent, ["a"], LeftOut()).parts["train"].annotations
    corners = np.concatenate(polygons).reshape(-1, 2).clip(0, (100, 90))
    area = full_bitmap(polygons, (90, 100)).sum()
    if area == 0:
        inside = [p.reshape(-1, 2).clip(0, (100, 90)).astype(np.float32) for p in polygons]
        area = sum(cv2.contourArea(p) for p in inside)
    assert len(rows) == ((corners.max(axis=0) > corners.min(axis=0)).all() and area > 0)
    if not rows:
        return
    (row,) = rows
    assert row["segmentation"] == [p.tolist() for p in polygons]
    assert row["area"] == pytest.approx(area)
    x, y, width, height = row["bbox"]
    assert [x, y] == pytest.approx(corners.min(axis=0))
    assert [x + width, y + height] == pytest.approx(corners.max(axis=0))


def test_coordinates_are_written_with_three_decimals(tmp_path):
    objects = {"train": [objects_of(tmp_path / "a.jpg", ("a", [np.array([[1 / 3, 2], [9, 2.00049], [9, 9]])]))]}
    (row,) = source_of(objects, tmp_path, ["a"], LeftOut()).parts["train"].annotations
    assert row["segmentation"] == [[0.333, 2, 9, 2, 9, 9]]
    assert row["bbox"] == [0.333, 2, 8.667, 7]


def test_odd_things_are_counted_by_kind_with_the_first_places():
    found = LeftOut()
    assert found.notes() == []
    for number in range(5):
        found.add("lines without a class: left out", f"a.txt: line {number}")
    found.add("empty files", "b.txt")
    assert found.notes() == [
        "5 lines without a class: left out (a.txt: line 0, a.txt: line 1, a.txt: line 2, ...)",
        "1 empty files (b.txt)",
    ]


def test_an_object_outside_of_its_image_is_left_out_and_said(tmp_path):
    objects = {
        "train": [objects_of(tmp_path / "a.jpg", ("a", [rectangle(90, 5, 99, 15)]), ("a", [rectangle(1, 1, 5, 5)]))]
    }
    left_out = LeftOut()
    found = source_of(objects, tmp_path, ["a"], left_out)
    assert [row["bbox"] for row in found.parts["train"].annotations] == [[1, 1, 4, 4]]
    assert found.notes == [f"1 objects without extent in their image: left out ({tmp_path / 'a.jpg'})"]


@pytest.mark.parametrize(
    ("x", "y", "box", "area"),
    [(15, 15, [15, 15, 20, 10], 200), (-5, -4, [0, 0, 15, 6], 90), (70, 35, [70, 35, 10, 5], 50), (80, 0, None, 0)],
)
def test_columns_of_a_mask(x, y, box, area):
    """A mask of 20 x 10 pixels in an image of 80 x 40."""
    columns = mask_columns(encode_bitmap(Bitmap(np.ones((10, 20), np.uint8), x, y), (40, 80)), (40, 80))
    if box is None:
        assert columns is None
        return
    assert (columns["bbox"], columns["area"]) == (box, area)
    assert columns["segmentation"]["size"] == [40, 80]
    expected = np.zeros((40, 80), np.uint8)
    expected[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 1
    assert np.array_equal(rle.decode(columns["segmentation"]), expected)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ([rectangle(10, 10, 12, 13)], 6),
        ([rectangle(10.1, 10.1, 10.3, 10.4)], 0.06),  # covers no pixel
        ([rectangle(10.1, 10.1, 10.3, 10.4), rectangle(1.1, 1.1, 1.2, 1.2)], 0.07),
        ([rectangle(79.9, 10.1, 90, 10.4)], 0.03),  # of which a tenth of a pixel is in the image
        ([np.array([[10, 10], [20, 20], [30, 30]])], None),  # a line
    ],
)
def test_the_area_of_objects_smaller_than_a_pixel(shape, area):
    columns = mask_columns(shape, (40, 80))
    assert columns is None if area is None else columns["area"] == pytest.approx(area)


def test_an_image_without_file_is_its_reader(tmp_path):
    image = AnnotatedImage(tmp_path / "a.png", (9, 9), ["cat"], [[rectangle(1, 1, 5, 5)]], lambda: b"pixels")
    part = source_of({"train": [image]}, tmp_path, ["cat"], LeftOut()).parts["train"]
    assert part.images[0]["file_name"] == "a.png"
    assert part.files[0]() == b"pixels"


def test_a_set_without_objects_says_what_was_left_out(tmp_path):
    left_out = LeftOut()
    left_out.add("lines: left out", *[])
    left_out.add("images without an object: kept", "a.jpg")
    left_out.add("points: left out", "a.json: shape 1")
    with pytest.raises(UserError) as caught:
        source_by_names({"train": [objects_of(tmp_path / "a.jpg")]}, tmp_path, left_out)
    reason = "1 points: left out (a.json: shape 1)"
    assert str(caught.value) == f"{tmp_path}: no file in it has an object ({reason}); check the folder"
