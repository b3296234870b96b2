"""Rows of a COCO file that are odd: repaired or left out, counted and said."""

import json

import pytest
from foreign_files import coco_set, converted
from PIL import Image
from pycocotools.coco import COCO

from tailseg.data.importers.coco import read_coco
from tailseg.errors import UserError

CODE = {"size": [40, 80], "counts": [805, 10, 2385]}  # ten pixels of column 20, from row 5 on
TRIANGLE = [20, 10, 60, 10, 20, 30]


def changed(tmp_path, change):
    """A set of six images with a triangle each, whose content ``change`` changes."""
    root = coco_set(tmp_path / "src", "train.json", "images", range(6))
    content = json.loads((root / "train.json").read_text())
    change(content)
    (root / "train.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("segmentation", "kind"),
    [
        ([], "annotations without a mask: left out (annotation 2: segmentation is [])"),
        (None, "annotations without a mask: left out (annotation 2: segmentation is None)"),
        ([[1, 2, 3, 4]], "annotations with a broken mask or of another size"),
        ({"size": [40, 80], "counts": "zz"}, "annotations with a broken mask or of another size"),
        ({"size": [80, 40], "counts": [3200]}, "the RLE's size is [80, 40], the image's [40, 80]"),
    ],
)
def test_an_object_without_a_mask_is_left_out_and_counted(tmp_path, segmentation, kind):
    root = changed(tmp_path, lambda data: data["annotations"][2].update(segmentation=segmentation))
    found = read_coco(root)
    assert [row["id"] for row in found.parts["train"].annotations] == [0, 1, 3, 4, 5]
    assert len(found.parts["train"].images) == 6
    note, empty = found.notes
    assert note.startswith("1 annotations")
    assert kind in note
    assert empty == "1 images without objects: kept, as images that show none of the classes (2.jpg)"


def test_a_broken_ring_beside_a_good_one_goes_alone(tmp_path):
    root = changed(tmp_path, lambda data: data["annotations"][2]["segmentation"].append([1, 2]))
    found = read_coco(root)
    assert found.parts["train"].annotations[2]["segmentation"] == [TRIANGLE]
    assert found.notes[0].startswith("1 broken polygons beside sound ones")


def test_boxes_and_areas_are_those_of_pycocotools(tmp_path):
    def change(data):
        for row in data["annotations"]:
            del row["area"], row["bbox"]
        data["annotations"][1]["segmentation"] = CODE

    splits, notes = converted("coco", changed(tmp_path, change), tmp_path)
    judge = {}
    for split in ("train", "val"):
        content = json.loads((tmp_path / "out" / f"{split}.json").read_text())
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        judge |= {row["id"]: float(coco.annToMask(row).sum()) for row in content["annotations"]}
        boxes = {row["id"]: row["bbox"] for row in content["annotations"]}
        for number, box in boxes.items():
            assert box == ([20, 5, 1, 10] if number == 1 else [20, 10, 40, 20])
        assert {row["id"]: row["area"] for row in content["annotations"]} == {i: judge[i] for i in boxes}
    assert judge[1] == 10
    assert len(splits.train.labels) + len(splits.val.labels) == 6
    assert any(note.startswith("6 annotations without a sound area: taken from the mask") for note in notes)


def test_a_set_of_boxes_becomes_rectangles(tmp_path):
    def change(data):
        for row in data["annotations"]:
            row["segmentation"] = []

    found = read_coco(changed(tmp_path, change))
    rectangle = [[20, 10, 60, 10, 60, 30, 20, 30]]
    assert [row["segmentation"] for row in found.parts["train"].annotations] == [rectangle] * 6
    assert found.notes == ["6 objects have a box only: their masks are rectangles"]


@pytest.mark.parametrize(
    ("boxes", "area", "fit"),
    [
        ([[20, 10, 60, 30]] * 6, 800, 6),  # 40 x 20 by its corners
        ([[15, 8, 60, 30]] * 6, 1800, 0),
        ([[10, 5, 40, 20]] * 6, 450, 6),  # in the image either way
        ([[10, 5, 40, 20]] * 6, 800, 0),
        ([[10, 5, 40, 20]] * 5 + [[30, 10, 60, 30]], None, 1),  # 90 of 80 pixels
        ([[10, 5, 40, 20]] * 5 + [[22, 10, 60, 30]], None, 0),  # 2 pixels beyond, as from rounding
        ([[0, 0, 80, 40]] * 6, 3200, 0),
    ],
)
def test_boxes_that_fit_only_as_corners_are_told(tmp_path, boxes, area, fit):
    """In images of 80 x 40."""

    def change(data):
        for row, box in zip(data["annotations"], boxes, strict=True):
            row |= {"segmentation": [], "bbox": box, "area": area}

    notes = [note for note in read_coco(changed(tmp_path, change)).notes if note.startswith("warning")]
    said = (
        f"warning: {fit} boxes that fit only if their numbers are x0, y0, x1, y1; write bbox as x, y, width, height ("
    )
    assert [note.startswith(said) for note in notes] == [True] * bool(fit)


def test_boxes_that_cvat_rotates_become_turned_rectangles(tmp_path):
    """It writes the box before the turn, and the degrees clockwise about its middle as an attribute."""

    def change(data):
        for row, degrees in zip(data["annotations"], [45.0, 90.0, 0.0, "30", "left", None], strict=True):
            row |= {"segmentation": [], "bbox": [30, 15, 20, 10], "area": 200, "attributes": {"rotation": degrees}}
        data["annotations"][3]["attributes"] = 7

    found = read_coco(changed(tmp_path, change))
    turned, upright, *others = found.parts["train"].annotations
    # (30, 15) lies (-10, -5) from the middle (40, 20); turned by 45 degrees that is (-10 + 5, -10 - 5) / sqrt 2.
    assert turned["segmentation"][0][:4] == [36.464, 9.393, 50.607, 23.536]
    assert (turned["bbox"], turned["area"]) == ([29.393, 9.393, 21.213, 21.213], 200)
    assert upright["segmentation"] == [[45, 10, 45, 30, 35, 30, 35, 10]]
    assert (upright["bbox"], upright["area"]) == ([35, 10, 10, 20], 200)
    assert [row["segmentation"] for row in others] == [[[30, 15, 50, 15, 50, 25, 30, 25]]] * 4
    note = "6 objects have a box only: their masks are rectangles, 2 of them turned as their attribute 'rotation' says"
    assert found.notes == [note]


def test_crowds_become_objects_if_asked_for(tmp_path):
    """CVAT writes every mask drawn with the brush as RLE with iscrowd 1."""

    def change(data):
        for row in data["annotations"][:4]:
            row |= {"iscrowd": 1, "segmentation": CODE}

    root = changed(tmp_path, change)
    assert sum(row["iscrowd"] for row in read_coco(root).parts["train"].annotations) == 4
    found = read_coco(root, crowds_are_objects=True)
    assert [row["iscrowd"] for row in found.parts["train"].annotations] == [0] * 6


def test_sizes_that_are_missing_come_from_the_files(tmp_path):
    def change(data):
        del data["images"][1]["height"]
        data["images"][2]["width"] = 0

    found = read_coco(changed(tmp_path, change))
    assert {(row["height"], row["width"]) for row in found.parts["train"].images} == {(40, 80)}
    assert found.notes == ["2 images without a sound height and width: taken from the file (image 1, image 2)"]


@pytest.mark.parametrize("number", [str, lambda i: 2**64 + i, lambda i: 2**63 + i, lambda i: float(2**60 + 2**9 * i)])
def test_ids_that_do_not_fit_are_numbered_anew(tmp_path, number):
    def change(data):
        for row in data["images"]:
            row["id"] = number(row["id"])
        for row in data["annotations"]:
            row["image_id"] = number(row["image_id"])

    root = changed(tmp_path, change)
    part = read_coco(root).parts["train"]
    names = {row["id"]: row["file_name"] for row in part.images}
    assert [names[row["image_id"]] for row in part.annotations] == [f"{i}.jpg" for i in range(6)]
    assert all(type(row["id"]) is int for row in part.images)


def test_ids_that_do_not_fit_beside_entries_that_are_no_objects(tmp_path):
    def change(data):
        data["images"][2]["id"] = 2**70
        data["annotations"][1] = [1, 2]

    part = read_coco(changed(tmp_path, change)).parts["train"]
    assert len(part.annotations) == 4  # of 6 images


def test_numbers_of_more_than_64_bits_beside_such_ids_are_written_as_texts(tmp_path):
    def change(data):
        for row in data["images"]:
            row |= {"id": 2**100 + row["id"], "video_id": 2**99, "more": [{"at": -(2**63) - 1, "frame": 2**64 - 1}]}
        for row in data["annotations"]:
            row |= {"image_id": 2**100 + row["image_id"], "track": 2**64}

    splits, _ = converted("coco", changed(tmp_path, change), tmp_path)
    assert len(splits.train.labels) + len(splits.val.labels) == 6
    content = json.loads((tmp_path / "out" / "train.json").read_text())
    row = content["images"][0]
    assert (row["video_id"], row["more"]) == (str(2**99), [{"at": str(-(2**63) - 1), "frame": 2**64 - 1}])
    assert content["annotations"][0]["track"] == str(2**64)


def test_areas_that_are_all_0_come_from_the_masks(tmp_path):
    root = changed(tmp_path, lambda data: [row.update(area=0) for row in data["annotations"]])
    found = read_coco(root)
    assert [row["area"] for row in found.parts["train"].annotations] == [400] * 6
    assert found.notes[0].startswith("6 annotations without a sound area: taken from the mask (annotation 0,")


def test_an_id_of_thousands_of_digits(tmp_path):
    root = changed(tmp_path, lambda data: data["images"][2].update(id=2**70))
    (path,) = root.glob("*.json")
    path.write_text(path.read_text().replace(str(2**70), "9" * 5000))
    with pytest.raises(UserError, match=r"^\S+\.json: "):
        read_coco(root)


def test_annotations_of_nothing(tmp_path):
    def change(data):
        data["annotations"][0]["image_id"] = 99
        data["annotations"][1]["image_id"] = [1]
        del data["annotations"][2]["id"]
        data["annotations"][3] |= {"bbox": [200, 200, 5, 5], "segmentation": [[200, 200, 205, 200, 200, 205]]}
        data["annotations"][4]["area"] = 0

    found = read_coco(changed(tmp_path, change))
    assert [row["image_id"] for row in found.parts["train"].annotations] == [2, 5]
    assert [note.split(" (")[0] for note in found.notes] == [
        "2 annotations of an image that the file does not list: left out",
        "1 annotations without an id of their own: it is not needed",
        "1 annotations whose box does not meet the image: left out",
        "1 annotations without area: left out",
        "4 images without objects: kept, as images that show none of the classes",
    ]


def test_annotations_of_a_category_that_is_not_listed_are_left_out(tmp_path):
    """Training refuses such a file and names this command."""

    def change(data):
        data["annotations"][3]["category_id"] = 5
        data["annotations"][4]["category_id"] = None
        del data["annotations"][5]["category_id"]

    found = read_coco(changed(tmp_path, change))
    assert [row["id"] for row in found.parts["train"].annotations] == [0, 1, 2]
    assert found.notes[0] == (
        "3 annotations of a category that the file does not list: left out (annotation 3: its category_id is 5, "
        "annotation 4: its category_id is None, annotation 5: its category_id is missing)"
    )


def test_a_file_of_which_nothing_can_be_used_is_an_error(tmp_path):
    root = changed(tmp_path, lambda data: [row.update(segmentation=[[1, 2, 3]]) for row in data["annotations"]])
    with pytest.raises(
        UserError, match=r"none of its 6 annotations can be used \(6 annotations with a broken mask"
    ) as caught:
        read_coco(root)
    assert str(caught.value).endswith("); draw it again")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"category_id": "cat"}, "; write an id of the list of categories into each category_id"),
        ({"segmentation": [], "bbox": [1, 2, 3]}, "; write bbox as four numbers x, y, width, height, or draw masks"),
        (
            {"area": 0.0, "iscrowd": 7, "bbox": [99, 99, 1, 1], "segmentation": [[99, 99, 100, 99, 100, 100]]},
            "; correct ",
        ),
        (
            {"category_id": None, "segments_info": []},
            "it is a panoptic file; give the file of the instances of the same",
        ),
    ],
)
def test_the_error_of_a_file_of_which_nothing_can_be_used_names_a_fix(tmp_path, changes, sentence):
    root = changed(tmp_path, lambda data: [row.update(changes) for row in data["annotations"]])
    with pytest.raises(UserError) as caught:
        read_coco(root)
    assert sentence in str(caught.value)


def test_a_broken_box_in_a_set_of_boxes_is_one_and_texts_are_numbers(tmp_path):
    def change(data):
        for row in data["annotations"]:
            row |= {"segmentation": [], "bbox": ["20", "10.0", 40, "20"]}
        data["annotations"][1]["bbox"] = ["a", 1, 2, 3]

    found = read_coco(changed(tmp_path, change))
    assert [row["bbox"] for row in found.parts["train"].annotations] == [[20, 10, 40, 20]] * 5
    assert [note.split(" (")[0] for note in found.notes][:3] == [
        "5 objects have a box only: their masks are rectangles",
        "5 masks or boxes in another form",
        "1 annotations without a sound bbox and mask: left out",
    ]


def test_a_file_without_annotations_is_a_set_of_empty_images(tmp_path):
    root = changed(tmp_path, lambda data: data.pop("annotations"))
    part = read_coco(root).parts["train"]
    assert (len(part.images), part.annotations) == (6, [])


def test_an_image_listed_twice_counts_once(tmp_path):
    root = changed(tmp_path, lambda data: data["images"].append(data["images"][0]))
    found = read_coco(root)
    assert len(found.parts["train"].images) == 6
    assert found.notes == ["1 images that are listed more than once: taken as one (0.jpg)"]
    Image.new("RGB", (80, 40)).save(root / "images" / "7.jpg")

    root = changed(tmp_path, lambda data: data["images"].append({**data["images"][0], "file_name": "7.jpg"}))
    with pytest.raises(UserError, match="image 0: this id is that of two files"):
        read_coco(root)


def test_one_file_under_several_ids_is_one_image_and_never_in_both_splits(tmp_path):
    """As tools write that make an entry for each object."""

    def change(data):
        data["images"] += [
            {**row, "id": row["id"] + 10, "file_name": "./" + row["file_name"]} for row in data["images"]
        ]
        data["annotations"] += [row | {"id": row["id"] + 10, "image_id": row["id"] + 10} for row in data["annotations"]]

    splits, notes = converted("coco", changed(tmp_path, change), tmp_path)
    assert (len(splits.train), len(splits.val)) == (5, 1)
    assert (len(splits.train.labels), len(splits.val.labels)) == (10, 2)
    assert "6 images that are listed more than once: taken as one (0.jpg, 1.jpg, 2.jpg, ...)" in notes


@pytest.mark.parametrize(
    ("spell", "numbers"),
    [
        (lambda row: row.update(image_id=str(row["image_id"])), range(6)),  # VIA
        (lambda row: row.update(image_id=float(row["image_id"]), category_id="17"), range(6)),
    ],
)
def test_ids_are_the_same_however_they_are_written(tmp_path, spell, numbers):
    part = read_coco(changed(tmp_path, lambda data: list(map(spell, data["annotations"])))).parts["train"]
    assert [row["image_id"] for row in part.annotations] == list(numbers)
    assert {row["category_id"] for row in part.annotations} == {17}


@pytest.mark.parametrize("number", [1.5, "a", True, None, [1]])
def test_ids_may_be_any_number_or_text_and_images_without_one_are_left_out(tmp_path, number):
    def change(data):
        data["images"][0]["id"] = data["annotations"][0]["image_id"] = number

    found = read_coco(changed(tmp_path, change))
    part = found.parts["train"]
    if number in (1.5, "a"):
        assert [row["image_id"] for row in part.annotations] == [row["id"] for row in part.images] == list(range(1, 7))
        assert found.notes == []
    else:
        assert [row["image_id"] for row in part.annotations] == [1, 2, 3, 4, 5]
        assert found.notes[0] == "1 images without an id: left out with their annotations (0.jpg)"


def test_categories_of_one_name_are_told_apart_and_repeats_are_one(tmp_path):
    def change(data):
        data["categories"] += [{"id": 18, "name": "cat"}, {"id": "17", "name": "cat"}]
        data["annotations"][0]["category_id"] = 18

    found = read_coco(changed(tmp_path, change))
    assert [(row["id"], row["name"]) for row in found.categories] == [(17, "cat"), (18, "cat (2)")]
    assert [row["category_id"] for row in found.parts["train"].annotations] == [18, 17, 17, 17, 17, 17]
    assert found.notes == [
        "1 categories that are listed more than once: taken once (category 17: 'cat')",
        "1 categories with the name of another: told apart by a number (category 18: 'cat' is now 'cat (2)')",
    ]
    with pytest.raises(UserError, match="category 17: this id occurs more than once; give each its own"):
        read_coco(changed(tmp_path, lambda data: data["categories"].append({"id": 17.0, "name": "dog"})))


def test_crowds_ignored_objects_and_empty_images_are_counted(tmp_path):
    def change(data):
        data["annotations"][0]["iscrowd"] = data["annotations"][1]["ignore"] = 1
        del data["annotations"][5]

    notes = read_coco(changed(tmp_path, change)).notes
    assert notes[0].startswith("1 of 5 objects are crowds: not trained on: if these are single objects drawn as masks")
    assert "--crowds-are-objects" in notes[0]
    assert notes[1:] == [
        '1 objects with "ignore": neither objects nor background in training; found or not, they do not count '
        "(annotation 1)",
        "1 images without objects: kept, as images that show none of the classes (5.jpg)",
    ]
    few = read_coco(coco_set(tmp_path / "few", "train.json", "images", range(3)))
    assert few.notes == []


@pytest.mark.parametrize("box", [[60, 30, -40, -20], [0, 0, 0, 0], [20, 10, 40, 0], [200, 200, 5, 5]])
def test_boxes_without_sides_or_beside_the_image_are_taken_from_the_masks(tmp_path, box):
    found = read_coco(changed(tmp_path, lambda data: data["annotations"][0].update(bbox=box, area=-1)))
    row = found.parts["train"].annotations[0]
    assert (row["bbox"], row["area"]) == ([20, 10, 40, 20], 400)
    assert found.notes[0].startswith("1 annotations without a sound bbox that meets the image: taken from the mask")
