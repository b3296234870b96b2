import json
from pathlib import Path

import numpy as np
import pytest
from coco_masks import full_bitmap
from foreign_files import attempt, converted, fault, picture, write_files
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle
from tiny import tailseg

from tailseg.data.importers.convert import recognise
from tailseg.data.importers.shapes import OddObjectError
from tailseg.data.importers.via import class_attribute, is_via, parse_via_shape, read_via
from tailseg.data.sources import open_data
from tailseg.errors import UserError

TRIANGLE = ((10, 10), (30, 10), (10, 30))
CSV = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"
VERSION_3 = '{"project": {"pid": "__VIA_PROJECT_ID__", "pname": "x", "vid_list": ["1"]}, "config": {}, "attribute": {}}'


def polygon(points=TRIANGLE):
    xs, ys = zip(*points, strict=True)
    return {"name": "polygon", "all_points_x": list(xs), "all_points_y": list(ys)}


def region(attributes="cat", shape=None):
    """A region; a text is its attribute `class`."""
    attributes = {"class": attributes} if isinstance(attributes, str) else attributes
    return {"shape_attributes": polygon() if shape is None else shape, "region_attributes": attributes}


def entries(**images):
    """Images by their names without suffix, each with its regions, as version 2 exports them."""
    return {
        f"{name}.jpg34020": {"filename": f"{name}.jpg", "size": 34020, "regions": regions, "file_attributes": {}}
        for name, regions in images.items()
    }


def project(metadata, attributes=None):
    """The content of a project of version 2."""
    return {
        "_via_settings": {"ui": {}, "core": {"default_filepath": ""}, "project": {"name": "x"}},
        "_via_img_metadata": metadata,
        "_via_attributes": {"region": attributes or {}, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": list(metadata),
    }


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def via(root: Path, *regions, name="a") -> Path:
    """An export of one image, and the image."""
    picture(root / f"{name}.jpg")
    write(root / "via.json", entries(**{name: list(regions)}))
    return root


def rows_of(found, split="train"):
    names = {row["id"]: row["name"] for row in found.categories}
    return [(names[row["category_id"]], row["bbox"], row["area"]) for row in found.parts[split].annotations]


def labels_of(found):
    return [name for name, *_ in rows_of(found)]


def files_of(found):
    return {split: [path.name for path in part.files] for split, part in found.parts.items()}


# ---------------------------------------------------------------------------------------------------------
# Shapes


def test_shapes_of_all_kinds_with_area(tmp_path):
    shapes = [
        polygon(((10, 10), (30, 10), (30, 20), (10, 20))),
        {"name": "rect", "x": 40, "y": 5, "width": 20, "height": 10},
        {"name": "circle", "cx": 60, "cy": 20, "r": 8},
        {"name": "ellipse", "cx": 40, "cy": 20, "rx": 10, "ry": 5},
    ]
    found = read_via(via(tmp_path, *(region(shape=shape) for shape in shapes)))
    rows = rows_of(found)
    assert [box for _, box, _ in rows[:2]] == [[10, 10, 20, 10], [40, 5, 20, 10]]
    assert rows[2][1] == pytest.approx([52, 12, 16, 16], abs=0.05)
    assert rows[3][1] == pytest.approx([30, 15, 20, 10], abs=0.05)
    assert [area for *_, area in rows[:2]] == [200, 200]
    assert [area for *_, area in rows[2:]] == pytest.approx([np.pi * 64, np.pi * 50], rel=0.03)
    assert found.notes == []


@pytest.mark.parametrize(
    ("shape", "corners"),
    [
        (polygon(((1, 2), (3.5, 4), (5, 6))), [[1, 2], [3.5, 4], [5, 6]]),
        (polygon(((1, 2), (3.5, 4), (5, 6), (1, 2))), [[1, 2], [3.5, 4], [5, 6]]),  # closed, as in version 1
        ({"name": "polygon", "all_points_x": ["1", 3, 5], "all_points_y": ["2", "4", 6]}, [[1, 2], [3, 4], [5, 6]]),
        ({"name": "rect", "x": "5", "y": 8, "width": 25, "height": "12"}, [[5, 8], [30, 8], [30, 20], [5, 20]]),
        ({"name": "rect", "x": -5, "y": -8.5, "width": 9, "height": 10}, [[-5, -8.5], [4, -8.5], [4, 1.5], [-5, 1.5]]),
    ],
)
def test_outlines_by_hand(shape, corners):
    assert parse_via_shape(shape).tolist() == corners


@pytest.mark.parametrize("radius", [0.3, 3, 20, 400])
def test_a_circle_is_a_polygon_of_many_corners(radius):
    corners = parse_via_shape({"name": "circle", "cx": 500, "cy": 500, "r": radius})
    middles = np.hypot(*((corners + np.roll(corners, 1, axis=0)) / 2 - 500).T)
    assert np.hypot(*(corners - 500).T) == pytest.approx(radius)
    assert (radius - middles).max() <= 0.05


@pytest.mark.parametrize("theta", [0, None, 0.5, -1, np.pi / 2])
def test_ellipses_turn_by_radians(theta):
    """As VIA draws and exports them: x = cx + rx cos(t) cos(theta) - ry sin(t) sin(theta)."""
    corners = parse_via_shape({"name": "ellipse", "cx": 40, "cy": 20, "rx": 10, "ry": 5, "theta": theta})
    turn = theta or 0
    along = (corners - [40, 20]) @ [np.cos(turn), np.sin(turn)]
    across = (corners - [40, 20]) @ [-np.sin(turn), np.cos(turn)]
    assert (along / 10) ** 2 + (across / 5) ** 2 == pytest.approx(1)
    assert along.max() == pytest.approx(10)


def test_an_ellipse_leans_down_to_the_right():
    """An eighth of a turn brings its right end to the lower right: y points down."""
    corners = parse_via_shape({"name": "ellipse", "cx": 40, "cy": 40, "rx": 20, "ry": 1, "theta": np.pi / 4})
    assert corners[0] == pytest.approx([40 + 20 / 2**0.5, 40 + 20 / 2**0.5])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ({"name": "point", "cx": 1, "cy": 2}, "points and lines"),
        ({**polygon(), "name": "polyline"}, "points and lines"),
        ({}, "unknown type"),
        *[({**polygon(), "name": name}, "unknown type") for name in ("star", ["polygon"], None, 3)],
        (polygon(((1, 2), (3, 4))), "too few points"),
        (polygon(((1, 2), (3, 4), (1, 2))), "too few points"),  # a line, closed
        (polygon(((1, 2),)), "too few points"),
        ({"name": "polygon", "all_points_x": [], "all_points_y": []}, "too few points"),
        ({"name": "polygon", "all_points_x": [1, 2, 3]}, "too few points"),
        ({"name": "polygon", "all_points_x": {"0": 1}, "all_points_y": {"0": 1}}, "too few points"),
        ({**polygon(), "all_points_x": [1, 2, 3, 4]}, "differ in length"),
        ({**polygon(), "all_points_x": [1, "x", 3]}, "not numbers"),
        ({**polygon(), "all_points_x": [1, None, 3]}, "not numbers"),
        ({**polygon(), "all_points_x": [1, True, 3]}, "not numbers"),
        ({**polygon(), "all_points_x": [1, float("nan"), 3]}, "not numbers"),
        ({**polygon(), "all_points_x": [1, 10**400, 3]}, "not numbers"),
        ({**polygon(), "all_points_x": [1, 65_536, 3]}, "beyond 65,535 pixels"),
        ({"name": "rect", "x": 1, "y": 2, "width": 3}, "not numbers"),
        ({"name": "rect", "x": 1, "y": 2, "width": "inf", "height": 3}, "not numbers"),
        ({"name": "circle", "cx": 1, "cy": 2}, "not numbers"),
        ({"name": "circle", "cx": 1, "cy": 2, "r": 70_000}, "beyond 65,535 pixels"),
        ({"name": "circle", "cx": 1, "cy": 2, "r": float("nan")}, "not numbers"),
        *[
            ({"name": "ellipse", "cx": 1, "cy": 2, "rx": 3, "ry": 4, "theta": theta}, "not numbers")
            for theta in ("x", float("inf"), [1])
        ],
    ],
)
def test_an_odd_shape_says_its_kind(shape, kind):
    with pytest.raises(OddObjectError, match=kind):
        parse_via_shape(shape)


def test_odd_regions_are_counted_with_their_places(tmp_path):
    regions = [
        region(),
        region(shape={"name": "point", "cx": 1, "cy": 2}),
        region(""),
        region({}),
        "no region",
        {"region_attributes": {"class": "cat"}},
        {"shape_attributes": polygon()},
        region("owl", {"name": "rect", "x": 5, "y": 5, "width": 0, "height": 9}),
        region("owl"),
    ]
    found = read_via(via(tmp_path, *regions))
    where = f"{tmp_path}/via.json: image 'a.jpg'"
    assert labels_of(found) == ["cat", "owl"]
    assert found.notes == [
        f"1 points and lines, which have no area: left out ({where}: region 2)",
        f"3 objects without a label: left out ({where}: region 3, {where}: region 4, {where}: region 7)",
        f"2 shapes of an unknown type: left out ({where}: region 5, {where}: region 6)",
        f"1 objects without extent in their image: left out ({tmp_path}/a.jpg)",
    ]


def test_numbers_that_json_does_not_have(tmp_path):
    """Scripts in Python write NaN; one such region must not cost the file."""
    via(tmp_path, region(shape=polygon(((1, float("nan")), (3, 4), (5, 6)))), region())
    assert "NaN" in (tmp_path / "via.json").read_text()
    assert labels_of(read_via(tmp_path)) == ["cat"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
numbers = st.integers(-5, 90) | st.floats() | st.just("7")
any_shape = st.fixed_dictionaries(
    {"name": st.sampled_from(["polygon", "rect", "circle", "ellipse", "point", "x"]) | json_values},
    optional={
        **{f"all_points_{axis}": st.lists(numbers, max_size=5) | json_values for axis in "xy"},
        **dict.fromkeys(("x", "y", "width", "height", "cx", "cy", "r", "rx", "ry", "theta"), numbers | json_values),
    },
)


@given(any_shape)
def test_any_shape_is_read_or_refused(shape):
    found, refused = attempt(parse_via_shape, shape)
    if found is None:
        assert refused.endswith(": left out")
    else:
        assert found.shape[1] == 2
        assert len(found) >= 3
        assert np.isfinite(found).all()


any_region = st.fixed_dictionaries(
    {}, optional={"shape_attributes": any_shape | json_values, "region_attributes": json_values}
)


@given(st.lists(any_region | json_values, max_size=3) | json_values, json_values)
def test_any_file_is_read_or_refused(tmp_path_factory, regions, name):
    root = tmp_path_factory.mktemp("any")
    picture(root / "a.jpg")
    rows = {"a.jpg1": {"filename": "a.jpg", "regions": regions}, "b": {"filename": name, "regions": []}}
    for content in (rows, project(rows, {"class": {"options": regions}})):
        write(root / "via.json", content)
        found, refused = attempt(read_via, root)
        assert found or str(root) in refused


@given(st.binary(max_size=60) | json_values.map(lambda v: json.dumps({"_via_img_metadata": v}).encode()))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("any")
    (root / "via.json").write_bytes(content)
    assert str(root) in attempt(read_via, root)[1]
    assert str(root) in attempt(read_via, root / "via.json")[1]


drawn = st.tuples(
    st.sampled_from(["cat", "owl", 'a "b" ü']),
    st.lists(st.tuples(st.integers(-10, 90), st.integers(-10, 50)), min_size=3, max_size=6),
)


@given(st.lists(drawn, max_size=6))
def test_random_sets_come_back(tmp_path_factory, regions):
    root = tmp_path_factory.mktemp("sets")
    via(root, *(region(label, polygon(points)) for label, points in regions), region("dog"))
    found = read_via(root)
    names = {row["id"]: row["name"] for row in found.categories}
    *rows, last = (row for row in found.parts["train"].annotations if row["area"])
    full = [(label, full_bitmap([np.ravel(points)], (40, 80))) for label, points in regions]
    expected = [(label, bitmap) for label, bitmap in full if bitmap.any()]
    kept = [row for row in rows if rle.decode(rle.merge(rle.frPyObjects(row["segmentation"], 40, 80))).any()]
    assert names[last["category_id"]] == "dog"
    assert [names[row["category_id"]] for row in kept] == [label for label, _ in expected]
    for row, (_, bitmap) in zip(kept, expected, strict=True):
        assert np.array_equal(rle.decode(rle.merge(rle.frPyObjects(row["segmentation"], 40, 80))), bitmap)


# ---------------------------------------------------------------------------------------------------------
# Versions, and forms of other tools


def test_version_1_and_the_balloons(tmp_path):
    """Mask R-CNN's tutorial: a file beside the images of each split, regions in an object, without any attribute."""
    for split, names in (("train", "ab"), ("val", "c")):
        rows = {}
        for name in names:
            picture(tmp_path / split / f"{name}.jpg")
            rows[f"{name}.jpg1115004"] = {
                **{"fileref": "", "size": 1115004, "filename": f"{name}.jpg", "base64_img_data": ""},
                "file_attributes": {},
                "regions": {"0": region({}, polygon((*TRIANGLE, TRIANGLE[0]))), "1": region({})},
            }
        write(tmp_path / split / "via_region_data.json", rows)
    found = read_via(tmp_path)
    assert files_of(found) == {"train": ["a.jpg", "b.jpg"], "val": ["c.jpg"]}
    assert [row["name"] for row in found.categories] == ["object"]
    assert len({area for *_, area in rows_of(found)}) == 1  # closed or not
    places = [f"{tmp_path}/train/via_region_data.json: image {name!r}: region" for name in ("a.jpg", "b.jpg")]
    assert found.notes == [
        "6 regions, none of which has an attribute with a value: all are of one class, 'object' "
        f"({places[0]} 1, {places[0]} 2, {places[1]} 1, ...)"
    ]


def test_makesense(tmp_path):
    """Keys are names of files; only images with a label are listed."""
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.jpg")
    shape = polygon(((10.5, 10.25), (30, 10), (10, 30), (10.5, 10.25)))
    row = {"fileref": "", "size": 3, "filename": "a.jpg", "base64_img_data": "", "file_attributes": {}}
    write(tmp_path / "labels_my-project.json", {"a.jpg": {**row, "regions": {"0": region({"label": "cat"}, shape)}}})
    found = read_via(tmp_path)
    assert found.parts["train"].annotations[0]["segmentation"] == [[10.5, 10.25, 30, 10, 10, 30]]
    assert labels_of(found) == ["cat"]
    assert found.notes == [f"1 images without annotation: left out ({tmp_path}/b.jpg)"]


def test_a_project_and_its_export_are_one_set(tmp_path):
    """The project comes first, whatever its name, as it has the names of numbered options."""
    via(tmp_path, region({"kind": "1"}), region({"kind": "0"}))
    attributes = {"kind": {"type": "radio", "description": "", "options": {"0": "owl", "1": "cat"}}}
    write(tmp_path / "zoo.json", project(entries(a=[region({"kind": "1"})], b=[region({"kind": "0"})]), attributes))
    picture(tmp_path / "b.jpg")
    found = read_via(tmp_path)
    assert labels_of(found) == ["cat", "owl"]
    assert found.notes == [
        f"1 image entries for an image that is used already: left out ({tmp_path}/via.json: image 'a.jpg')"
    ]


# ---------------------------------------------------------------------------------------------------------
# Attributes


@pytest.mark.parametrize(
    ("counts", "taken"),
    [
        ({"colour": 9, "class": 1}, "class"),
        ({"name": 9, "label": 1}, "label"),
        ({"type": 9, "Object_Name": 1}, "Object_Name"),
        ({"species": 1, "TYPE": 1}, "TYPE"),
        ({"category name": 1, "object": 9}, "category name"),
        ({"className": 1, "side": 9}, "className"),
        ({"class": 1, "class_name": 2}, "class_name"),
        ({"side": 1, "fruit": 2}, "fruit"),
        ({"side": 2, "fruit": 2}, "side"),
        ({"物体": 2, "side": 1}, "物体"),
        ({"subclass": 1, "side": 2}, "side"),
        ({"only": 1}, "only"),
    ],
)
def test_which_attribute_is_the_class(counts, taken):
    assert class_attribute(counts) == taken


def test_the_class_is_taken_from_one_attribute_in_the_whole_set(tmp_path):
    """`class` has no value anywhere, and counts for nothing."""
    regions = [
        region({"class": "", "fruit": "fig", "side": "left"}),
        region({"fruit": "nut"}),
        region({"side": "left"}),
    ]
    found = read_via(via(tmp_path, *regions))
    assert labels_of(found) == ["fig", "nut"]
    assert found.notes == [
        "2 attributes of regions beside 'fruit', which is the class: not used ('class', 'side')",
        f"1 objects without a label: left out ({tmp_path}/via.json: image 'a.jpg': region 3)",
    ]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("cat", "cat"),
        (" two words \n", "two words"),  # the box in VIA takes several lines
        (7, "7"),
        ({"cat": True}, "cat"),
        ({"cat": False, "owl": True}, "owl"),
        *[(value, None) for value in ("", "  ", None, True, [1], {}, {"cat": False}, {"": True}, "\ud800")],
    ],
)
def test_values_of_the_class(tmp_path, value, name):
    found = read_via(via(tmp_path, region({"class": value}), region("dog")))
    assert labels_of(found) == ([name] if name else []) + ["dog"]


def test_several_ticked_classes(tmp_path):
    found = read_via(via(tmp_path, region({"type": {"owl": True, "cat": True}}), region({"type": {"cat": True}})))
    assert labels_of(found) == ["owl", "cat"]
    place = f"{tmp_path}/via.json: image 'a.jpg': region 1"
    assert found.notes == [f"1 regions with several classes ticked: the first is taken ({place})"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"1": "Cat", "2": "Barn owl"}, ["Barn owl", "Cat"]),
        ({"1": "", "2": "Barn owl"}, ["1", "Barn owl"]),
        ({"1": "", "2": None}, ["1", "2"]),
        ({"1": "Cat", "2": "Barn owl", "dog": "Dog"}, ["1", "2"]),  # ids that are names
        ({}, ["1", "2"]),
        (None, ["1", "2"]),
        ([1], ["1", "2"]),
    ],
)
@pytest.mark.parametrize("ticked", [False, True])
def test_numbered_options_are_called_by_their_descriptions(tmp_path, options, names, ticked):
    regions = [region({"class": {key: True} if ticked else key}) for key in ("1", "2")]
    picture(tmp_path / "a.jpg")
    attributes = {"class": {"type": "checkbox" if ticked else "dropdown", "options": options}}
    write(tmp_path / "p.json", project(entries(a=regions), attributes))
    assert [row["name"] for row in read_via(tmp_path).categories] == names


# ---------------------------------------------------------------------------------------------------------
# Files, images and splits


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.jpg", "a.jpg"),
        ("a.jpg", "images/a.jpg"),
        ("a.jpg", "a.JPG"),
        ("a.jpg", "elsewhere/a.jpg"),  # the only one of this name
        ("cam/a.jpg", "cam/a.jpg"),
        ("cam\\a.jpg", "images/cam/a.jpg"),
        ("C:\\data\\a.jpg", "a.jpg"),
        ("/home/someone/a.jpg", "photos/a.jpg"),
        ("../../a.jpg", "a.jpg"),
        ("https://example.org/x/a%20b.jpg?width=3", "a b.jpg"),
        ("https://example.org/x/a.jpg", "images/x/a.jpg"),
        ("a%20b.jpg", "a b.jpg"),
    ],
)
def test_images_are_found(tmp_path, name, image):
    write(tmp_path / "via.json", {f"{name}-1": {"filename": name, "size": -1, "regions": [region()]}})
    picture(tmp_path / image)
    for source in (tmp_path, tmp_path / "via.json"):
        assert read_via(source).parts["train"].files == [tmp_path / image]


def test_a_url_with_a_query_among_images_of_one_name(tmp_path):
    for folder in ("x", "y"):
        picture(tmp_path / "images" / folder / "a.jpg")
    write(tmp_path / "via.json", {"k": {"filename": "http://h/y/a.jpg?size=9", "regions": [region()]}})
    assert read_via(tmp_path).parts["train"].files == [tmp_path / "images" / "y" / "a.jpg"]


@pytest.mark.parametrize("name", ["../private.jpg", "/etc/passwd", "..", "", "a\0.jpg", "\ud800.jpg", "x" * 5000, 5])
def test_names_that_lead_nowhere(tmp_path, name):
    root = tmp_path / "src"
    picture(tmp_path / "private.jpg")
    via(root, region())
    content = json.loads((root / "via.json").read_text())
    write(root / "via.json", {**content, "k": {"filename": name, "regions": [region()]}})
    found = read_via(root)
    assert files_of(found) == {"train": ["a.jpg"]}
    assert sum(note.startswith("1 image entries without image: left out") for note in found.notes) == 1


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jpg").symlink_to(picture(tmp_path / "private.jpg"))
    write(tmp_path / "src" / "via.json", entries(a=[region()]))
    assert "is a link that leads out of" in fault("via", tmp_path / "src", tmp_path)


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        ({"train/via.json": "a", "valid/via.json": "b", "test/via.json": "c", "via.json": "d"}, ["a"], ["b"]),
        ({"via_train.json": "a", "via_val.json": "b"}, ["a"], ["b"]),
        ({"annotations/train.json": "ab", "annotations/val2017.json": "c"}, ["a", "b"], ["c"]),
        ({"one.json": "a", "two.json": "b"}, ["a", "b"], None),
        ({"val.json": "a"}, ["a"], None),
    ],
)
def test_splits(tmp_path, files, train, val):
    for file, names in files.items():
        for name in names:
            picture((tmp_path / file).parent / f"{name}.jpg")
        write(tmp_path / file, entries(**{name: [region()] for name in names}))
    expected = {"train": train} | ({"val": val} if val else {})
    found = read_via(tmp_path)
    assert files_of(found) == {split: [f"{name}.jpg" for name in names] for split, names in expected.items()}
    left = [note for note in found.notes if "in neither the training nor the validation split: left out" in note]
    assert len(left) == ("test/via.json" in files)


def test_files_for_each_split_beside_folders_of_images(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "1.jpg")
        write(tmp_path / f"via_{split}.json", entries(**{"1": [region()]}))
    found = read_via(tmp_path)
    assert {split: part.files for split, part in found.parts.items()} == {
        split: [tmp_path / split / "1.jpg"] for split in ("train", "val")
    }


def test_images_and_entries_without_each_other_are_counted(tmp_path):
    for name in ("a", "b", "unlabelled"):
        picture(tmp_path / f"{name}.jpg")
    (tmp_path / "broken.jpg").write_text("hello")
    rows = entries(a=[region()], b=[], gone=[region()], broken=[region()])
    rows |= {"a.jpg-1": {"filename": "a.jpg", "size": -1, "regions": [region()]}, "c": {"filename": "c.jpg"}, "d": 3}
    write(tmp_path / "via.json", rows)
    write(tmp_path / "package.json", {})
    write(tmp_path / "template.json", project({}, {"class": {"type": "text"}}))
    (tmp_path / "via.csv").write_text(CSV)
    (tmp_path / "other.csv").write_text("a,b\n")
    (tmp_path / "new.json").write_text(VERSION_3)
    (tmp_path / "more").mkdir()
    for number in range(3):
        via(tmp_path / "more", region(), name=str(number))
        (tmp_path / "more" / "via.json").rename(tmp_path / "more" / f"{number}.json")
    found = read_via(tmp_path)
    file = f"{tmp_path}/via.json"
    assert files_of(found) == {"train": ["0.jpg", "1.jpg", "2.jpg", "a.jpg", "b.jpg"]}
    assert found.notes == [
        f"1 JSON files that are not VIA's: left out ({tmp_path}/package.json)",
        f"2 CSV files of VIA and projects of VIA 3: left out ({tmp_path}/new.json, {tmp_path}/via.csv)",
        f"1 files in which VIA has listed no image: left out ({tmp_path}/template.json)",
        f"1 image entries without image: left out ({file}: image 'gone.jpg' is not in {tmp_path})",
        "1 image entries whose image cannot be read: left out "
        f"({file}: image 'broken.jpg': {tmp_path}/broken.jpg: not an image that can be read)",
        f"1 image entries for an image that is used already: left out ({file}: image 'a.jpg')",
        f"2 image entries without a list of regions: left out ({file}: image 'c.jpg' has none, {file}: image 'd' "
        "has none)",
        f"1 images without an object: kept, as images that show none of the classes ({tmp_path}/b.jpg)",
        f"1 images without annotation: left out ({tmp_path}/unlabelled.jpg)",
    ]


def test_an_export_without_its_images(tmp_path):
    write(tmp_path / "via.json", entries(a=[region()], b=[region()]))
    with pytest.raises(UserError) as caught:
        read_via(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/via.json: image 'a.jpg' is not in {tmp_path}; put it beside the file, or give the folder that "
        "holds both (2 of 2 image entries are at fault)"
    )


def test_an_image_that_could_be_several(tmp_path):
    for folder in ("one", "two"):
        picture(tmp_path / folder / "a.jpg")
    write(tmp_path / "json" / "via.json", entries(a=[region()]))
    assert f"image 'a.jpg' may be any of 2 files in {tmp_path}; put it beside" in attempt(read_via, tmp_path)[1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (CSV, r"it is VIA's CSV, .* export JSON instead, in VIA by Annotation > Export Annotations \(as json\)"),
        (f"#{CSV}", "it is VIA's CSV"),  # of version 1
        (VERSION_3, "it is of VIA 3, which is not read; export COCO from VIA 3 instead and give that"),
        ("# Exported using VGG Image Annotator (http://x)\n", "it is of VIA 3"),
        ('{"a.jpg1": {"regions": [', "not valid JSON: .* at line 1, column 25; write it again"),
        ('{"_via_settings": ' + "[" * 100_000, "not valid JSON"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "no file in it has an object .1 files in which VIA has listed no image: left out"),
        ('{"_via_settings": {}, "_via_img_metadata": []}', "VIA has listed no image"),
        ('{"images": [], "annotations": []}', "VIA has listed no image"),
        ('{"a.jpg1": {"filename": "a.jpg", "regions": []}}', "no file in it has an object; check the folder"),
        ('{"a.jpg1": {"filename": "a.jpg", "regions": 3}}', "image 'a.jpg' has none; export it again"),
    ],
)
def test_files_at_fault_are_named(tmp_path, text, problem):
    path = tmp_path / "via.json"
    path.write_text(text)
    picture(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=f"^{tmp_path}.*{problem}"):
        read_via(path)


def test_folders_without_a_file_to_read(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: there is no JSON file of VIA in it; give the folder that holds"):
        read_via(tmp_path)
    (tmp_path / "via.csv").write_text(CSV)
    with pytest.raises(UserError, match=f"^{tmp_path}/via.csv: it is VIA's CSV"):
        read_via(tmp_path)
    (tmp_path / "other.json").write_text(VERSION_3)
    with pytest.raises(UserError, match=f"^{tmp_path}/other.json: it is of VIA 3"):
        read_via(tmp_path)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        (json.dumps(entries(a=[region()])), True),
        (json.dumps(entries(a=[])), True),  # nothing is drawn in the first images, nor in the last
        (json.dumps(project({})), True),
        ('\ufeff\n {"_via_img_metadata" : {}}', True),
        ('{"a.jpg1": {"base64_img_data": "' + "A" * 9000 + '", "regions": {"0": {"region_attributes": {}}}}}', True),
        ('{"images": [{"file_attributes": {}}], "annotations": []}', False),
        ('{"shapes": [{"region_attributes": {}}], "imagePath": "a.jpg"}', False),
        ('[{"shape_attributes": {}}]', False),
        ('{"project": {"name": "x"}}', False),
        ("a,b,filename,file_size,file_attributes,region_count,", False),
        (CSV, True),  # with the two below, answered with the way out
        (VERSION_3, True),
        ("# Exported using VGG Image Annotator", True),
        ("{}", False),
        ("", False),
        ("shape_attributes", False),
    ],
)
def test_files_of_via_are_told_by_their_ends(tmp_path, text, own):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert is_via(tmp_path / "a.json") is own


def test_what_is_no_file_is_not_vias(tmp_path):
    assert not is_via(tmp_path)
    assert not is_via(tmp_path / "gone.json")


# ---------------------------------------------------------------------------------------------------------
# The commands


def six(root: Path) -> Path:
    for number in range(6):
        picture(root / f"{number}.jpg")
    write(root / "via.json", entries(**{str(number): [region()] for number in range(6)}))
    return root


def test_the_command_converts(tmp_path):
    done = tailseg("data", "convert", "via", six(tmp_path / "src"), tmp_path / "out")
    assert done.returncode == 0
    splits, notes = converted("via", tmp_path / "src", tmp_path / "again")
    assert (len(splits.train), len(splits.val)) == (5, 1)
    assert notes[0] == "the source has no validation split: a fifth of the images was set aside, rare classes first"
    assert (tmp_path / "out" / "train.json").read_bytes() == (tmp_path / "again" / "out" / "train.json").read_bytes()


@pytest.mark.parametrize(("file", "text"), [("via.csv", CSV), ("project.json", VERSION_3)])
def test_data_says_what_to_do_with_other_forms(tmp_path, monkeypatch, file, text):
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    root = write_files(tmp_path / "src", {"a.jpg": None, file: text})
    for source in (root, root / file):
        with pytest.raises(UserError, match=f"^{root / file}: it is .*which is not read; export"):
            open_data(str(source), show=False)


def test_other_formats_come_first(tmp_path):
    root = six(tmp_path)
    assert recognise(root) == recognise(root / "via.json") == "via"
    (root / "z.json").write_text('{"shapes": [], "imagePath": "0.jpg"}')
    assert recognise(root) == "labelme"
    (root / "z.json").write_text('{"images": [], "annotations": []}')
    assert recognise(root) == "coco"
    (root / "z.xml").write_text("<annotation/>")
    assert recognise(root) == "voc"
