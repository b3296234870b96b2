import base64
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from foreign_files import attempt, converted, fault, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from tailseg.data.importers.convert import recognise
from tailseg.data.importers.foreign import rectangle
from tailseg.data.importers.labelstudio import brush_mask, is_labelstudio, parse_region, read_labelstudio
from tailseg.data.importers.shapes import OddObjectError
from tailseg.data.sources import open_data
from tailseg.errors import UserError

SIZE = (40, 80)  # of `picture`


def bits(number: int, count: int) -> str:
    return format(number, f"0{count}b")


def brush_code(values, lengths=(3, 4, 9, 16), literal_from=3):
    """Label Studio's code of bytes: runs of one value as such, others value by value."""
    values = np.asarray(values, np.uint8).ravel()
    text = bits(len(values), 32) + bits(7, 5) + "".join(bits(length - 1, 4) for length in lengths)
    place = 0
    while place < len(values):
        same = 1
        while place + same < len(values) and values[place + same] == values[place] and same < 2 ** lengths[-1]:
            same += 1
        repeated = same >= literal_from
        count = same if repeated else 1
        which = next(i for i, length in enumerate(lengths) if count <= 2**length)
        text += f"{int(repeated)}{bits(which, 2)}{bits(count - 1, lengths[which])}"
        text += "".join(bits(int(value), 8) for value in values[place : place + (1 if repeated else count)])
        place += count
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def brush_of(mask):
    """The code of a mask (H, W), drawn in the colour that Label Studio draws in."""
    return brush_code(np.asarray(mask, np.uint8)[..., None] * np.array([255, 120, 3, 255], np.uint8))


def png(mask):
    image = np.zeros((*np.shape(mask), 4), np.uint8)
    image[..., 3] = np.asarray(mask) * 255
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


POLYGON = {"points": [[12.5, 25], [37.5, 25], [37.5, 75]], "closed": True, "polygonlabels": ["cat"]}
BOX = {"x": 12.5, "y": 25, "width": 25, "height": 50, "rotation": 0, "rectanglelabels": ["owl"]}


def result(value, kind=None, number=None, size=SIZE, **more):
    """One result of an annotation."""
    kind = kind or next((key for key in value if key.endswith("labels")), "choices")
    sizes = {} if size is None else {"original_width": size[1], "original_height": size[0], "image_rotation": 0}
    return {**sizes, "value": value, "from_name": "label", "to_name": "image", "type": kind, "id": number, **more}


def annotation(*results, **more):
    return {"id": 1, "completed_by": 1, "result": list(results), "was_cancelled": False, "ground_truth": False, **more}


def task(*results, image="/data/upload/1/1234abcd-a.jpg", annotations=None, **more):
    made = [annotation(*results)] if annotations is None else annotations
    return {"id": 7, "annotations": made, "predictions": [], "data": {"image": image}, **more}


def write(path: Path, *tasks) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


def project(root: Path, *results, name="a.jpg", **more) -> Path:
    """An export of one task, with its image as it was before the upload."""
    picture(root / name)
    write(root / "export.json", task(*results, **more))
    return root


def boxes(found, split="train"):
    return [row["bbox"] for row in found.parts[split].annotations]


# ---------------------------------------------------------------------------------------------------------
# Regions


def test_regions_of_all_kinds_with_area(tmp_path):
    mask = np.zeros(SIZE, int)
    mask[15:25, 30:50] = 1
    round_one = {"x": 50, "y": 50, "radiusX": 12.5, "radiusY": 12.5, "rotation": 0, "ellipselabels": ["owl"]}
    brush = {"format": "rle", "rle": brush_of(mask), "brushlabels": ["cat"]}
    bitmask = {"imageDataURL": png(mask), "bitmasklabels": ["owl"]}
    shapes = [POLYGON, BOX, round_one, brush, bitmask]
    found = read_labelstudio(project(tmp_path, *(result(shape, number=str(i)) for i, shape in enumerate(shapes))))
    assert [row["name"] for row in found.categories] == ["cat", "owl"]
    rows = found.parts["train"].annotations
    assert [row["category_id"] for row in rows] == [1, 2, 2, 1, 2]
    assert boxes(found) == [[10, 10, 20, 20], [10, 10, 20, 20], [30, 15, 20, 10], [30, 15, 20, 10], [30, 15, 20, 10]]
    assert [rows[i]["area"] for i in (1, 3, 4)] == [400, 200, 200]
    assert rows[2]["area"] == pytest.approx(np.pi * 50, rel=0.02)
    assert found.notes == []


def test_boxes_turn_about_their_upper_left_corner():
    """By a quarter, clockwise: what was to the right of the corner is below it, what was below is to the left."""
    corners = parse_region(BOX | {"rotation": 90}, SIZE)
    assert corners == pytest.approx(np.array([[10, 10], [10, 30], [-10, 30], [-10, 10]]))


def test_ellipses_turn_about_their_middle():
    outline = parse_region({"x": 50, "y": 50, "radiusX": 12.5, "radiusY": 10, "rotation": 90}, SIZE)
    assert outline.min(axis=0) == pytest.approx([36, 10], abs=0.1)
    assert outline.max(axis=0) == pytest.approx([44, 30], abs=0.1)


def test_a_known_brush_code():
    """A row of two pixels by hand: the four values of the first are 0; then 9, 8, 7 and an opacity of 6."""
    text = bits(8, 32) + bits(7, 5) + bits(1, 4) + bits(2, 4) + bits(7, 4) + bits(15, 4)
    text += "1" + "00" + "11" + bits(0, 8)  # 4 times 0, the length in two bits
    text += "0" + "01" + "011" + "".join(map(bits, (9, 8, 7, 6), [8] * 4))  # 4 values, the length in three
    text += "0" * (-len(text) % 8)
    code = [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    mask = brush_mask(code, (1, 2))
    assert (mask.x, mask.y, mask.pixels.tolist()) == (1, 0, [[1]])
    with pytest.raises(OddObjectError, match="broken or cut off"):
        brush_mask(code[:-1], (1, 2))
    with pytest.raises(OddObjectError, match="another size"):
        brush_mask(code, (2, 1 + 1))


@given(
    st.lists(st.lists(st.integers(0, 255), min_size=8, max_size=8), min_size=1, max_size=9),
    st.sampled_from([1, 2, 3, 99]),
    st.sampled_from([(1, 2, 3, 5), (3, 4, 9, 16), (16, 16, 16, 16)]),
)
def test_brush_codes_give_the_pixels_that_are_not_transparent(values, literal_from, lengths):
    image = np.array(values, np.uint8).reshape(-1, 2, 4)
    mask = brush_mask(brush_code(image, lengths, literal_from), image.shape[:2])
    full = np.zeros(image.shape[:2], np.uint8)
    x, y, right, low = mask.box
    full[y:low, x:right] = mask.pixels
    assert full.tolist() == (image[..., 3] > 0).astype(int).tolist()


@given(st.lists(st.integers(0, 255), max_size=60))
def test_broken_brush_codes_are_refused_in_a_sentence(code):
    _, said = attempt(brush_mask, [0, 0, 0, 64, *code], (4, 4))
    assert said == "" or said.endswith(": left out")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"points": [[1, 2], [3, 4]]}, "objects with too few points"),
        ({"points": [[1, 2], [3, "x"], [5, 6]]}, "objects with coordinates that are not numbers"),
        ({"points": None}, "objects with too few points"),
        (BOX | {"width": "wide"}, "objects with coordinates that are not numbers"),
        (BOX | {"rotation": None}, "objects with coordinates that are not numbers"),
        (BOX | {"x": 1e300}, "objects with a coordinate beyond"),
        ({"x": 3, "y": 4, "width": 1, "keypointlabels": ["a"]}, "points, lines and tracks"),
        ({"vertices": [], "vectorlabels": ["a"]}, "points, lines and tracks"),
        ({"choices": ["good"]}, "answers about an image that are no regions"),
        ({"rle": "no", "format": "rle"}, "masks whose code is broken"),
        ({"rle": [300], "format": "rle"}, "masks whose code is broken"),
        ({"rle": [None], "format": "rle"}, "masks whose code is broken"),
        ({"imageDataURL": "data:image/png;base64,AAAA"}, "masks that are no PNG"),
        ({"imageDataURL": None}, "masks that are no PNG"),
        ({"imageDataURL": png(np.ones((8, 8), int))}, "masks of another size"),
        ({"imageDataURL": png(np.ones((900, 900), int))}, "masks that do not fit"),
    ],
)
def test_odd_regions(value, said):
    with pytest.raises(OddObjectError) as caught:
        parse_region(value, SIZE)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith(": left out")


def test_odd_regions_are_counted_and_the_others_stay(tmp_path):
    odd = [
        result(POLYGON, number="a"),
        result({"points": POLYGON["points"], "polygonlabels": []}, number="b"),
        result({"choices": ["good"]}, number="c"),
        {"from_id": "a", "to_id": "b", "type": "relation", "direction": "right"},
        result(BOX | {"rectanglelabels": ["owl", "cat"]}, number="d"),
        "text",
    ]
    found = read_labelstudio(project(tmp_path, *odd))
    assert len(boxes(found)) == 2
    where = f"{tmp_path / 'export.json'}: task 1"
    assert found.notes == [
        f"1 objects without a label: left out ({where}: region 2)",
        f"2 answers about an image that are no regions: left out ({where}: region 3, {where}: region 4)",
        f"1 objects with several labels: the first counts ({where}: region 5)",
    ]


def test_a_shape_and_its_label_may_stand_apart(tmp_path):
    apart = [
        result({"points": POLYGON["points"]}, "polygon", "r1"),
        result({"points": POLYGON["points"], "labels": ["fox"]}, "labels", "r1"),
        result({"choices": ["blurred"]}, "choices", "r1"),
    ]
    found = read_labelstudio(project(tmp_path, *apart))
    assert [row["name"] for row in found.categories] == ["fox"]
    assert boxes(found) == [[10, 10, 20, 20]]
    assert found.notes == []


def test_regions_without_an_id_are_apart_from_those_whose_id_is_a_number(tmp_path):
    """Predictions that were imported have ids as people chose them, or none."""
    found = read_labelstudio(project(tmp_path, result(POLYGON, number="1"), result(BOX)))
    assert [row["name"] for row in found.categories] == ["cat", "owl"]


# ---------------------------------------------------------------------------------------------------------
# Tasks and images


def test_the_ground_truth_or_the_latest_annotation_counts(tmp_path):
    def by(label, **more):
        return annotation(result(BOX | {"rectanglelabels": [label]}), **more)

    many = [
        by("early", updated_at="2024-01-01T10:00:00Z"),
        by("late", updated_at="2024-03-01T10:00:00Z"),
        by("skipped", updated_at="2024-04-01T10:00:00Z", was_cancelled=True),
    ]
    found = read_labelstudio(project(tmp_path / "a", annotations=many))
    assert [row["name"] for row in found.categories] == ["late"]
    where = f"{tmp_path / 'a' / 'export.json'}: task 1"
    assert found.notes == [
        f"1 annotations that were skipped in Label Studio: left out ({where})",
        f"1 further annotations of a task: left out, ground truth or the latest counts ({where})",
    ]
    many[0]["ground_truth"] = True
    found = read_labelstudio(project(tmp_path / "b", annotations=many))
    assert [row["name"] for row in found.categories] == ["early"]


def test_tasks_without_annotation_are_no_images_without_objects(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(tmp_path / name)
    tasks = [task(result(BOX)), task(image="b.jpg"), task(image="c.jpg", annotations=[])]
    found = read_labelstudio(write(tmp_path / "export.json", *tasks))
    assert [row["file_name"] for row in found.parts["train"].images] == ["a.jpg", "b.jpg"]
    assert [note.partition(" (")[0] for note in found.notes] == [
        "1 images without an object: kept, as images that show none of the classes",
        "1 images without annotation: left out",
    ]


@pytest.mark.parametrize(
    ("stated", "file"),
    [
        ("/data/upload/3/1234abcd-a.jpg", "1234abcd-a.jpg"),
        ("/data/upload/3/1234abcd-a.jpg", "deep/er/a.jpg"),
        ("/data/upload/3/1234abcd-IMG_2_1.jpg", "IMG 2 (1).jpg"),
        ("/data/local-files/?d=photos/day%201/a.jpg", "photos/day 1/a.jpg"),
        ("s3://bucket/photos/a.jpg", "a.jpg"),
        ("https://example.org/photos/a.jpg?sign=x%2Fy", "photos/a.jpg"),
        ("C:\\photos\\a.jpg", "photos/a.jpg"),
        ("a.jpg", "images/a.jpg"),
    ],
)
def test_images_are_found_however_they_are_stated(tmp_path, stated, file):
    picture(tmp_path / file)
    found = read_labelstudio(write(tmp_path / "export.json", task(result(BOX), image=stated)))
    assert found.parts["train"].files == [tmp_path / file]
    assert found.notes == []


def test_an_upload_that_may_be_any_of_two_files_is_none_of_them(tmp_path):
    for folder in ("x", "y"):
        picture(tmp_path / folder / "a.jpg")
    write(tmp_path / "export.json", task(result(BOX)))
    with pytest.raises(
        UserError, match=r"task 1: its image '/data/upload/1/1234abcd-a.jpg' is not in .*; put the images"
    ):
        read_labelstudio(tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    project(tmp_path, result(BOX, size=(30, 60)))
    with pytest.raises(UserError, match=r"it says 60 x 30 pixels but .* has 80 x 40; correct one of them"):
        read_labelstudio(tmp_path)


def test_sizes_need_not_be_stated(tmp_path):
    assert boxes(read_labelstudio(project(tmp_path, result(BOX, size=None)))) == [[10, 10, 20, 20]]


def test_nothing_outside_of_the_source_is_found(tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "in" / "export.json", task(result(BOX), image="../a.jpg"))
    with pytest.raises(UserError, match="put the images into the folder of the file"):
        read_labelstudio(tmp_path / "in")


def test_json_min(tmp_path):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    size = {"original_width": 80, "original_height": 40}
    tasks = [
        {"image": "/data/upload/1/1234abcd-a.jpg", "id": 1, "label": [BOX | size], "tag": [POLYGON | size]},
        {"image": "/data/upload/1/1234abcd-b.jpg", "id": 2},
    ]
    write(tmp_path / "min.json", *({**one, "annotator": 1, "annotation_id": 4, "lead_time": 3.5} for one in tasks))
    assert is_labelstudio(tmp_path / "min.json")
    found = read_labelstudio(tmp_path)
    assert [row["name"] for row in found.categories] == ["cat", "owl"]
    assert len(found.parts["train"].images) == 2
    assert [row["category_id"] for row in found.parts["train"].annotations] == [2, 1]


def test_splits_by_the_names_of_files(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "images" / name)
    write(tmp_path / "train.json", task(result(BOX), image="a.jpg"))
    write(tmp_path / "val" / "export.json", task(result(BOX), image="b.jpg"))
    found = read_labelstudio(tmp_path)
    assert {split: [row["file_name"] for row in part.images] for split, part in found.parts.items()} == {
        "train": ["a.jpg"],
        "val": ["b.jpg"],
    }


def test_the_same_image_counts_once(tmp_path):
    project(tmp_path, result(BOX))
    write(tmp_path / "more.json", task(result(POLYGON)))
    found = read_labelstudio(tmp_path)
    assert len(boxes(found)) == 1
    assert found.notes == [f"1 tasks for an image that is used already: left out ({tmp_path / 'more.json'}: task 1)"]


# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (json.dumps([task(result(BOX))]), True),
        ("\ufeff " + json.dumps([task(result(BOX))], indent=2), True),
        (json.dumps(task(result(BOX))), False),
        (json.dumps([{"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1], "score": 0.5}]), False),
        ("[]", False),
        ("", False),
    ],
)
def test_files_are_told_by_their_words(tmp_path, content, told):
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    assert is_labelstudio(path) is told
    assert recognise(path) == recognise(tmp_path) == ("labelstudio" if told else None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"was_cancelled": 1},', "not valid JSON: .* at line 1, column 23; write it again"),
        ('{"images": []}', "there is no JSON export of Label Studio in it; give the file or its folder"),
        ('[{"was_cancelled": ' + "[" * 5000, "not valid JSON: .*; write it again"),
        ('[3, {"annotations": [{"was_cancelled": 0}], "data": {}}]', "task 2: it names no image file; put the images"),
        ('[{"annotations": {"completed_by": 1}, "data": 4}]', "no file in it has an object"),
        ('[{"annotations": [7, {"completed_by": 1, "result": 5}], "data": {"image": 4}}]', "task 1: it names no image"),
    ],
)
def test_broken_files(tmp_path, content, said):
    picture(tmp_path / "a.jpg")
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_labelstudio(tmp_path)


def test_converted_and_opened_in_place(tmp_path):
    source = tmp_path / "source"
    mask = np.zeros(SIZE, int)
    mask[10:20, 5:25] = mask[30, 70] = 1
    for name in "abcde":
        picture(source / f"{name}.jpg")
    shapes = [result({"format": "rle", "rle": brush_of(mask), "brushlabels": ["cat"]}), result(BOX)]
    write(source / "export.json", *(task(*shapes, image=f"/data/upload/1/1234abcd-{name}.jpg") for name in "abcde"))
    splits, notes = converted("labelstudio", source, tmp_path)
    assert (len(splits.train), len(splits.val)) == (4, 1)
    assert len(notes) == 2  # a fifth was set aside; images are links
    truth = json.loads((tmp_path / "out" / "train.json").read_text(encoding="utf-8"))
    assert rle.decode(truth["annotations"][0]["segmentation"]).tolist() == mask.tolist()
    opened = open_data(str(source / "export.json"), show=False)
    assert len(opened.train) == 4
    (source / "export.json").write_text("[", encoding="utf-8")
    assert "no JSON export of Label Studio" in fault("labelstudio", source, tmp_path / "new")


def test_polygons_are_percent_of_each_side():
    corners = parse_region({"points": [[0, 0], [100, 0], [100, 100], [0, 100]]}, SIZE)
    assert corners.tolist() == rectangle(0, 0, 80, 40).tolist()
