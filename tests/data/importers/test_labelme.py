import base64
import json
import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from coco_masks import full_bitmap
from foreign_files import attempt, converted, fault, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from tailseg.data.annotations.masks import Bitmap
from tailseg.data.importers.labelme import is_labelme, parse_shape, read_labelme, read_photograph
from tailseg.data.importers.shapes import OddObjectError
from tailseg.errors import UserError

SIZE = {"imageHeight": 40, "imageWidth": 80}


def write(path: Path, shapes, **changes) -> Path:
    """A labelme file; its image is not written."""
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{path.stem}.jpg", "imageData": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | SIZE | changes))
    return path


def labelme(root: Path, name: str, shapes, **changes) -> Path:
    """A labelme file and its image beside it."""
    picture(root / f"{name}.jpg")
    write(root / f"{name}.json", shapes, **changes)
    return root


def shape(label="cat", points=((10, 10), (30, 10), (10, 30)), kind="polygon", group=None, **more):
    return {"label": label, "points": [list(p) for p in points], "shape_type": kind, "group_id": group, **more}


def png(pixels) -> str:
    """Pixels as labelme writes a mask."""
    stream = BytesIO()
    Image.fromarray(np.asarray(pixels, bool)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def mask(x=15, y=15, pixels=None, label="cat", group=None, **more):
    pixels = np.ones((10, 20)) if pixels is None else np.asarray(pixels)
    height, width = pixels.shape
    points = [(x, y), (x + width - 1, y + height - 1)]
    return shape(label, points, "mask", group, mask=png(pixels), **more)


def photograph(kind="PNG", size=(80, 40), orientation=None) -> str:
    stream = BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, (1, 2, 3)).save(stream, kind, exif=exif)
    return base64.b64encode(stream.getvalue()).decode()


def rows_of(root, split="train"):
    part = read_labelme(root).parts[split]
    return [(row["bbox"], row["area"]) for row in part.annotations]


# ---------------------------------------------------------------------------------------------------------
# Shapes


def test_polygons_rectangles_and_groups(tmp_path):
    root = tmp_path / "src"
    pieces = [shape("owl", group=1), shape(kind="rectangle", points=((30, 20), (5, 8))), shape("owl", group=1)]
    labelme(root, "train/a", [*pieces, shape("owl", group=2), shape("cat", group=1)])
    labelme(root, "val/a", [shape()])
    splits, _ = converted("labelme", root, tmp_path)
    assert [c.name for c in splits.train.categories] == ["cat", "owl"]
    assert splits.train.labels.tolist() == [1, 0, 1, 0]
    assert len(splits.train.segmentation(0)) == 2
    assert splits.train.boxes[1].tolist() == [5, 8, 30, 20]
    assert len(splits.val) == 1


def test_a_mask_lies_at_its_rectangles_corner(tmp_path):
    """A mask of 31 x 31 pixels at (10, 10), of which 10 rows by 20 columns are set."""
    pixels = np.zeros((31, 31))
    pixels[5:15, 5:25] = 1
    labelme(tmp_path, "a", [mask(10, 10, pixels, "nut")])
    assert rows_of(tmp_path) == [([15, 15, 20, 10], 200)]


@pytest.mark.parametrize(
    ("value", "corners"),
    [
        (shape(kind="rectangle", points=((30, 20), (5, 8))), [[5, 8], [30, 8], [30, 20], [5, 20]]),
        (shape(kind="rectangle", points=((5, 8), (30, 8), (30, 20), (5, 20))), [[5, 8], [30, 8], [30, 20], [5, 20]]),
        ({"label": "x", "points": [[1, 2], [3.5, 4], [5, 6]]}, [[1, 2], [3.5, 4], [5, 6]]),  # says no type
        (shape(kind=None, points=((1, 2), (3, 4), (5, 6))), [[1, 2], [3, 4], [5, 6]]),
        *[
            (shape(kind=kind, points=((4, 0), (8, 4), (4, 8), (0, 4))), [[4, 0], [8, 4], [4, 8], [0, 4]])
            for kind in ("oriented_rectangle", "rotation")  # of labelme, of X-AnyLabeling
        ],
    ],
)
def test_outlines_by_hand(value, corners):
    assert parse_shape(value, (40, 80))[1].tolist() == corners


@pytest.mark.parametrize("radius", [0.3, 3, 20, 400])
def test_a_circle_is_its_centre_and_a_point_on_it(radius):
    _, polygon = parse_shape(shape(kind="circle", points=((500, 500), (500, 500 - radius))), (1000, 1000))
    corners = np.hypot(*(polygon - 500).T)
    middles = np.hypot(*((polygon + np.roll(polygon, 1, axis=0)) / 2 - 500).T)
    assert corners == pytest.approx(radius)
    assert (radius - middles).max() <= 0.05


@pytest.mark.parametrize(
    ("label", "name"), [("cat", "cat"), (7, "7"), (1.5, "1.5"), (" two words ", " two words "), ("é", "é")]
)
def test_labels_are_text(label, name):
    assert parse_shape(shape(label), (40, 80))[0] == name


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *[({**shape(), "label": label}, "without a label") for label in ("", "  ", None, True, [1], {}, "\ud800")],
        ("text", "without a label"),
        *[(shape(label), f"called {label}, which labelme keeps") for label in ("__ignore__", "_background_")],
        (shape(points=((1, 2), (3, 4))), "too few points"),
        (shape(kind="rectangle", points=((1, 2),)), "too few points"),
        (shape(kind="circle", points=((1, 2),)), "too few points"),
        ({**shape(), "points": None}, "too few points"),
        ({**shape(), "points": [[1, "2"], [3, 4], [5, 6]]}, "not numbers"),
        ({**shape(), "points": [[1, 2, 3], [3, 4], [5, 6]]}, "not numbers"),
        (shape(points=((1, float("nan")), (3, 4), (5, 6))), "not numbers"),
        (shape(points=((10**400, 2), (3, 4), (5, 6))), "not numbers"),
        (shape(points=((65_536, 2), (3, 4), (5, 6))), "beyond 65,535 pixels"),
        (shape(kind="circle", points=((60_000, 2), (3, 4))), "beyond 65,535 pixels"),
        *[(shape(kind=kind), "points and lines") for kind in ("point", "points", "line", "linestrip")],
        *[(shape(kind=kind), "unknown type") for kind in ("star", ["polygon"], 3)],
        ({**mask(), "mask": None}, "no PNG"),
        ({**mask(), "mask": "%%%"}, "no PNG"),
        ({**mask(), "mask": base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()}, "no PNG"),
        ({**mask(), "points": [[15, 15], [36, 24]]}, "another size than their rectangle"),
        ({**mask(), "points": [[0, 0], [60_000, 60_000]]}, "do not fit into their image"),
    ],
)
def test_an_odd_shape_says_its_kind(value, kind):
    with pytest.raises(OddObjectError, match=kind):
        parse_shape(value, (40, 80))


@pytest.mark.parametrize("points", [((15, 15), (35, 25)), ((15.4, 14.6), (34.4, 23.6)), ((15, 15), (34, 24))])
def test_rectangles_of_masks_may_be_a_pixel_off(points):
    """Old files end a pixel behind the last one; moved masks have decimals."""
    found = parse_shape({**mask(), "points": [list(p) for p in points]}, (40, 80))[1]
    assert found.box == (15, 15, 35, 25)
    assert found.pixels.all()


def test_one_odd_shape_does_not_refuse_the_set(tmp_path):
    shapes = [shape(), shape(""), shape(kind="line"), shape(points=((1, 1),)), shape("owl"), shape("")]
    shapes.append(shape("__ignore__"))
    labelme(tmp_path, "a", shapes, flags=None)
    found = read_labelme(tmp_path)
    assert [row["category_id"] for row in found.parts["train"].annotations] == [1, 2]
    path = tmp_path / "a.json"
    assert found.notes == [
        f"2 objects without a label: left out ({path}: shape 2, {path}: shape 6)",
        f"1 points and lines, which have no area: left out ({path}: shape 3)",
        f"1 objects with too few points: left out ({path}: shape 4)",
        f"1 shapes called __ignore__, which labelme keeps for what is no object: left out ({path}: shape 7)",
    ]
    assert [row["name"] for row in found.categories] == ["cat", "owl"]


@pytest.mark.parametrize("group", [[1], {"a": 1}, 1.5, True, ""])
def test_odd_groups_are_none(tmp_path, group):
    labelme(tmp_path, "a", [shape(group=group), shape(group=group)])
    assert len(rows_of(tmp_path)) == 2


def test_a_group_may_have_a_name_and_masks(tmp_path):
    """A mask of 200 pixels and a polygon that covers half of it and 100 pixels beside it."""
    half = shape(kind="rectangle", points=((25, 15), (45, 25)), group="x")
    labelme(tmp_path, "a", [mask(group="x"), half, mask(30, 0, np.ones((2, 2)), group="x")])
    assert rows_of(tmp_path) == [([15, 0, 30, 25], 304)]


@pytest.mark.parametrize("colours", ["L", "P", "RGB", "I;16"])
def test_masks_of_other_colours(colours):
    stream = BytesIO()
    pixels = np.zeros((10, 20), np.uint16 if colours == "I;16" else np.uint8)
    pixels[:4] = 1
    image = Image.fromarray(pixels)
    (image if image.mode == colours else image.convert(colours)).save(stream, "PNG")
    value = {**mask(), "mask": base64.b64encode(stream.getvalue()).decode()}
    assert parse_shape(value, (40, 80))[1].pixels.sum() == 80


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)
kinds = st.sampled_from(["polygon", "rectangle", "circle", "mask", "rotation", "line"])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "label": st.just("cat") | json_values,
            "points": st.lists(st.lists(st.floats(0, 9), min_size=2, max_size=2), max_size=4) | json_values,
            "shape_type": kinds | json_values,
            "mask": st.text(max_size=8) | st.binary(max_size=20).map(lambda b: base64.b64encode(b).decode()),
        },
    )
    | json_values
)
def test_any_shape_is_read_or_refused(value):
    found, refused = attempt(parse_shape, value, (40, 80))
    if found is None:
        assert refused.endswith(": left out")
    else:
        name, piece = found
        assert isinstance(name, str)
        assert isinstance(piece, Bitmap) or (piece.shape[1] == 2 and len(piece) >= 3 and np.isfinite(piece).all())


@given(st.binary(max_size=60) | json_values.map(lambda v: json.dumps({"shapes": v, "imagePath": v}).encode()))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("any")
    (root / "a.json").write_bytes(content)
    _, refused = attempt(read_labelme, root)
    assert str(root) in refused


coordinates = st.tuples(st.integers(-10, 90), st.integers(-10, 50))
drawn = st.one_of(
    st.builds(
        lambda points, **more: shape(points=points, **more),
        points=st.lists(coordinates, min_size=3, max_size=6),
        label=st.sampled_from(["cat", "owl"]),
        group=st.sampled_from([None, None, 1, 2]),
    ),
    st.builds(
        lambda x, y, seed, **more: mask(
            x, y, np.random.default_rng(seed).random((1 + seed % 7, 1 + seed % 5)) < 0.6, **more
        ),
        x=st.integers(-3, 78),
        y=st.integers(-3, 38),
        seed=st.integers(0, 99),
        label=st.sampled_from(["cat", "owl"]),
        group=st.sampled_from([None, None, 1, 2]),
    ),
)


def expected_masks(shapes):
    """(label, bitmap of 40 x 80) of each object, by COCO's rasteriser on the whole image."""
    objects = {}
    for number, value in enumerate(shapes):
        if value["shape_type"] == "polygon":
            full = full_bitmap([np.ravel(value["points"])], (40, 80))
        else:
            full = np.zeros((60, 120), np.uint8)  # with a margin of 10 and 30 around the image
            (x, y), _ = value["points"]
            pixels = np.asarray(Image.open(BytesIO(base64.b64decode(value["mask"]))))
            full[y + 10 : y + 10 + pixels.shape[0], x + 10 : x + 10 + pixels.shape[1]] = pixels
            full = full[10:50, 10:90]
        key = number if value["group_id"] is None else ("group", value["label"], value["group_id"])
        label, before = objects.get(key, (value["label"], 0))
        objects[key] = (label, full | before)
    return [(label, full) for label, full in objects.values() if full.any()]


@given(st.lists(drawn, max_size=6))
def test_random_sets_come_back(tmp_path_factory, shapes):
    root = tmp_path_factory.mktemp("sets")
    labelme(root, "a", [*shapes, shape("dog")])
    found = read_labelme(root)
    names = {row["id"]: row["name"] for row in found.categories}
    rows = [row for row in found.parts["train"].annotations if row["area"]]
    *expected, _ = expected_masks([*shapes, shape("dog")])
    assert [names[row["category_id"]] for row in rows] == [*(label for label, _ in expected), "dog"]
    for row, (_, full) in zip(rows, expected, strict=False):
        code = row["segmentation"]
        code = rle.merge(rle.frPyObjects(code, 40, 80)) if isinstance(code, list) else code
        assert np.array_equal(rle.decode(code), full)
        assert row["area"] == full.sum()


# ---------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize(
    "stated",
    [
        "../photos/p0.jpg",
        "..\\photos\\p0.jpg",
        "./../photos/./p0.jpg",
        "../../src/photos/p0.jpg",  # climbs out of the source and comes back
        "../photos/p0.JPG",
        "C:\\data\\p0.jpg",  # of another machine; there is only one p0.jpg
        "/home/someone/photos/p0.jpg",
    ],
)
def test_images_in_another_folder(tmp_path, stated):
    root = tmp_path / "src"
    for number in range(4):
        picture(root / "photos" / f"p{number}.jpg")
        write(root / "labels" / f"p{number}.json", [shape()], imagePath=stated.replace("p0", f"p{number}"))
    splits, _ = converted("labelme", root, tmp_path)
    assert sorted([*splits.train.file_names, *splits.val.file_names]) == [f"photos/p{n}.jpg" for n in range(4)]


@pytest.mark.parametrize("stated", ["b.jpg", "gone/b.jpg", "C:\\x\\b.jpg", "", None, 5, "../../b.jpg", ".."])
def test_the_image_beside_the_file(tmp_path, stated):
    """By the stated name, and else by the file's own."""
    own = stated in ("", None, 5, "..")
    picture(tmp_path / "x" / ("a.png" if own else "b.jpg"))
    write(tmp_path / "x" / "a.json", [shape()], imagePath=stated)
    assert read_labelme(tmp_path).parts["train"].files == [tmp_path / "x" / ("a.png" if own else "b.jpg")]


def test_names_in_another_unicode_form(tmp_path):
    name = unicodedata.normalize("NFD", "café.jpg")
    picture(tmp_path / name)
    write(tmp_path / "b.json", [shape()], imagePath=unicodedata.normalize("NFC", name))
    assert read_labelme(tmp_path).parts["train"].files == [tmp_path / name]


def test_nothing_outside_of_the_source_is_read_or_written(tmp_path):
    root = tmp_path / "cases" / "src"
    picture(tmp_path / "private.jpg")
    for name in "abcd":
        labelme(root, name, [shape()], imagePath=f"../../cases/src/{name}.jpg")
    splits, _ = converted("labelme", root, tmp_path)
    assert sorted([*splits.train.file_names, *splits.val.file_names]) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    write(tmp_path / "other" / "x.json", [shape()], imagePath="../private.jpg")
    message = fault("labelme", tmp_path / "other", tmp_path / "new")
    assert message == (
        f"{tmp_path}/other/x.json: its image '../private.jpg' is not in {tmp_path}/other; "
        "put it there, or give the folder that holds both"
    )


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "b.jpg").symlink_to(picture(tmp_path / "private.jpg"))
    write(tmp_path / "src" / "a.json", [shape()], imagePath="b.jpg")
    assert "is a link that leads out of" in fault("labelme", tmp_path / "src", tmp_path)


@pytest.mark.parametrize(
    ("stated", "kind", "name"),
    [
        ("x\\y.png", "PNG", "y.png"),
        ("y.JPG", "JPEG", "y.JPG"),
        ("y.tif", "PNG", "a.png"),  # labelme keeps a TIFF as PNG or JPEG
        ("y.tif", "JPEG", "a.jpg"),
        (None, "PNG", "a.png"),
        ("..", "JPEG", "a.jpg"),
        ("y\0.png", "PNG", "a.png"),
        ("y" * 300 + ".png", "PNG", "a.png"),
    ],
)
def test_the_image_inside_of_the_file(tmp_path, stated, kind, name):
    write(tmp_path / "src" / "f" / "a.json", [shape()], imagePath=stated, imageData=photograph(kind))
    labelme(tmp_path / "src", "b", [shape()], imageData=photograph(size=(9, 9)))  # the one beside it comes first
    splits, _ = converted("labelme", tmp_path / "src", tmp_path)
    names = [*splits.train.file_names, *splits.val.file_names]
    assert sorted(names) == ["b.jpg", f"f/{name}"]
    written = (tmp_path / "out" / "images" / "f" / name).read_bytes()
    assert written == base64.b64decode(photograph(kind))
    assert read_photograph(tmp_path / "src" / "f" / "a.json") == written


def test_images_inside_of_files_that_state_one_name(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.json", [shape()], imagePath="image.png", imageData=photograph())
    names = [row["file_name"] for row in read_labelme(tmp_path).parts["train"].images]
    assert names == ["image.png", "b.png"]


def test_an_image_inside_of_a_file_is_measured(tmp_path):
    for name, changes in (
        ("a", {"imageData": photograph("JPEG", (40, 80), 6)}),  # turned by the camera
        ("b", {"imageData": "data:image/png;base64," + photograph()}),
        ("c", {"imageData": photograph(size=(41, 80))}),
        ("d", {"imageData": "no image"}),
    ):
        write(tmp_path / f"{name}.json", [shape()], **changes)
    found = read_labelme(tmp_path)
    assert [row["file_name"] for row in found.parts["train"].images] == ["a.jpg", "b.png"]
    assert [note for note in found.notes if note.startswith("1 annotation")] == [
        "1 annotation files that state another size than their image has: left out "
        f"({tmp_path}/c.json: it says 80 x 40 pixels but {tmp_path}/c.png has 41 x 80)",
        f"1 annotation files without image: left out ({tmp_path}/d.json: its image 'd.jpg' is not in {tmp_path})",
    ]


def test_a_photograph_inside_of_a_file_that_is_cut_off_is_left_out(tmp_path):
    """The import took it by its header, and training stopped at it."""
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.json", [shape()], imageData=photograph("PNG"))
    stream = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)).save(stream, "JPEG")
    cut = base64.b64encode(stream.getvalue()[: len(stream.getvalue()) // 2]).decode()
    write(tmp_path / "d.json", [shape()], imageData=cut)
    found = read_labelme(tmp_path)
    assert [row["file_name"] for row in found.parts["train"].images] == ["a.png", "b.png", "c.png"]
    (note,) = found.notes
    assert note.startswith(
        f"1 annotation files whose image cannot be read: left out ({tmp_path}/d.json: {tmp_path}/d.jpg"
    )


def test_photographs_that_are_gone_when_they_are_written(tmp_path):
    path = write(tmp_path / "a.json", [shape()])
    with pytest.raises(UserError, match=r"a\.json: its 'imageData' is no image; write it again"):
        read_photograph(path)


def test_images_and_files_without_each_other_are_counted(tmp_path):
    for name in ("a", "b", "c"):
        labelme(tmp_path, name, [shape()])
    labelme(tmp_path, "empty", [])
    write(tmp_path / "lost.json", [shape()])
    write(tmp_path / "again.json", [shape()], imagePath="a.jpg")
    labelme(tmp_path, "other", [shape()], imageWidth=81)
    (tmp_path / "broken.jpg").write_text("hello")
    write(tmp_path / "broken.json", [shape()])
    picture(tmp_path / "unlabelled.png")
    (tmp_path / "._a.json").write_text("{")  # what archives leave
    (tmp_path / "cut.json").write_text('{"version": "5.5.0", "shapes": [')
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    found = read_labelme(tmp_path)
    assert [path.name for path in found.parts["train"].files] == ["a.jpg", "b.jpg", "c.jpg", "empty.jpg"]
    assert found.notes == [
        f"1 JSON files that are not labelme's: left out ({tmp_path}/coco.json)",
        "1 annotation files whose image cannot be read: left out "
        f"({tmp_path}/broken.json: {tmp_path}/broken.jpg: not an image that can be read)",
        "1 annotation files that state another size than their image has: left out "
        f"({tmp_path}/other.json: it says 81 x 40 pixels but {tmp_path}/other.jpg has 80 x 40)",
        f"1 annotation files for an image that is used already: left out ({tmp_path}/again.json)",
        "1 JSON files that cannot be read: left out "
        f"({tmp_path}/cut.json: not valid JSON: unexpected end of data at line 1, column 33)",
        f"1 annotation files without image: left out ({tmp_path}/lost.json: its image 'lost.jpg' is not in {tmp_path})",
        f"1 images without an object: kept, as images that show none of the classes ({tmp_path}/empty.jpg)",
        f"1 images without annotation: left out ({tmp_path}/unlabelled.png)",
    ]


def test_most_files_without_image_refuse_the_set(tmp_path):
    labelme(tmp_path / "src", "a", [shape()])
    for name in ("b", "c"):
        write(tmp_path / "src" / f"{name}.json", [shape()])
    message = fault("labelme", tmp_path / "src", tmp_path)
    assert message == (
        f"{tmp_path}/src/b.json: its image 'b.jpg' is not in {tmp_path}/src; put it there, or give the folder that "
        "holds both (2 of 3 annotation files are at fault)"
    )
    (tmp_path / "src" / "c.json").unlink()
    assert len(read_labelme(tmp_path / "src").parts["train"].images) == 1  # half of them is not most


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"imageHeight": 41}, "a.json: it says 80 x 41 pixels but"),
        ({"shapes": []}, "no file in it has an object; check the folder"),
        ({"shapes": [shape(kind="line")]}, "no file in it has an object (1 points and lines, which have no area"),
    ],
)
def test_a_set_of_one_file_at_fault(tmp_path, changes, problem):
    assert problem in fault("labelme", labelme(tmp_path / "src", "a", **{"shapes": [shape()], **changes}), tmp_path)


@pytest.mark.parametrize("size", [{}, {"imageHeight": None}, {"imageHeight": 0, "imageWidth": 0}, {"imageWidth": 80.0}])
def test_a_size_may_be_unknown(tmp_path, size):
    labelme(tmp_path, "a", [shape()], **size)
    assert read_labelme(tmp_path).parts["train"].images[0]["height"] == 40


def test_numbers_that_json_does_not_have(tmp_path):
    """Python writes NaN; one such shape must not cost the file."""
    labelme(tmp_path, "a", [shape(points=((1, float("nan")), (3, 4), (5, 6))), shape()])
    assert "NaN" in (tmp_path / "a.json").read_text()
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no JSON file in it; give the folder that holds labelme's files"),
        ('{"images": []}', "none of its 1 JSON files is labelme's; give the folder"),
        ('{"shapes": [', r"a\.json: not valid JSON: .* at line 1, column 13; write it again"),
        ('{"imagePath": "a.jpg"}', r"a\.json: it has no list 'shapes'; check the file"),
    ],
)
def test_folders_without_files_of_labelme(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}.*{problem}"):
        read_labelme(tmp_path)


def test_a_single_file_is_answered_with_the_fix(tmp_path):
    labelme(tmp_path, "a", [shape()])
    with pytest.raises(UserError, match=r"a\.json: labelme writes one file for each image; give the folder"):
        read_labelme(tmp_path / "a.json")


# ---------------------------------------------------------------------------------------------------------
# Splits, and whose file it is


@pytest.mark.parametrize(
    ("names", "train", "val", "left"),
    [
        (("a", "b"), ["a", "b"], None, 0),
        (("train/a", "valid/b", "test/c", "d"), ["a"], ["b"], 2),
        (("labels/train2017/a", "labels/val2017/b"), ["a"], ["b"], 0),
        (("batch_train_1/a", "batch_train_2/b"), ["a", "b"], None, 0),
        (("x/a", "latest_val/b"), ["a"], ["b"], 0),
        (("carnival/train_01", "blood_test/b"), ["b", "train_01"], None, 0),  # the names of files tell nothing
        (("val/a",), ["a"], None, 0),
    ],
)
def test_folders_tell_splits(tmp_path, names, train, val, left):
    for name in names:
        labelme(tmp_path, name, [shape()])
    found = read_labelme(tmp_path)
    stems = {split: sorted(path.stem for path in part.files) for split, part in found.parts.items()}
    assert stems == {"train": train} | ({"val": val} if val else {})
    phrase = f"{left} annotation files in neither the training nor the validation split: left out"
    assert [note.startswith(phrase) for note in found.notes] == [True] * bool(left)


def test_one_image_is_never_in_both_splits(tmp_path):
    labelme(tmp_path, "train/a", [shape()])
    labelme(tmp_path, "val/b", [shape()])
    write(tmp_path / "val" / "a.json", [shape()], imagePath="../train/a.jpg")
    (tmp_path / "val" / "c.jpg").symlink_to("../train/a.jpg")
    write(tmp_path / "val" / "c.json", [shape()])
    found = read_labelme(tmp_path)
    assert {split: [p.name for p in part.files] for split, part in found.parts.items()} == {
        "train": ["a.jpg"],
        "val": ["b.jpg"],
    }
    assert any(note.startswith("2 annotation files for an image that is used already") for note in found.notes)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ('{"version": "5.5.0", "flags": {}, "shapes": [], "imagePath": "a.jpg"}', True),
        ('\ufeff\n {"shapes" : [{"label": "x"}]}', True),
        ('{"flags": {}, "imageData": "' + "A" * 9000 + '", "shapes": [' + "1," * 5000 + '1], "version": "5"}', True),
        ('{"text": "' + "A" * 9000 + '", "imageHeight": 3, "imagePath": "a.jpg"}', True),  # at the end
        ('{"images": [], "annotations": [], "categories": [], "shapes": []}', False),
        ('{"info": {"shapes": 3}, "images": []}', False),
        ('[{"shapes": []}]', False),
        ("", False),
        ("{}", False),
        ("shapes", False),
    ],
)
def test_files_of_labelme_are_told_by_their_ends(tmp_path, text, own):
    (tmp_path / "a.json").write_text(text)
    assert is_labelme(tmp_path / "a.json") is own


def test_what_is_no_file_is_not_labelmes(tmp_path):
    assert not is_labelme(tmp_path)
    assert not is_labelme(tmp_path / "gone.json")


def test_of_two_files_for_one_image_that_of_its_name_counts(tmp_path):
    labelme(tmp_path, "b", [shape(label="right")])
    write(tmp_path / "a copy of b.json", [shape(label="wrong")], imagePath="b.jpg")
    found = read_labelme(tmp_path)
    assert [row["name"] for row in found.categories] == ["right"]
    assert found.notes == [
        f"1 annotation files for an image that is used already: left out ({tmp_path}/a copy of b.json)"
    ]


def test_folders_of_files_that_mirror_those_of_images(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "1.jpg")
        write(tmp_path / "json" / split / "1.json", [shape(label=split)], imagePath="1.jpg")
    found = read_labelme(tmp_path)
    assert {split: part.files for split, part in found.parts.items()} == {
        split: [tmp_path / "images" / split / "1.jpg"] for split in ("train", "val")
    }


def test_an_image_that_could_be_several(tmp_path):
    for folder in ("one", "two"):
        picture(tmp_path / folder / "1.jpg")
    write(tmp_path / "json" / "1.json", [shape()])
    message = fault("labelme", tmp_path, tmp_path)
    assert message == (
        f"{tmp_path}/json/1.json: its image '1.jpg' may be any of 2 files in {tmp_path}; "
        "put it there, or give the folder that holds both"
    )


def test_a_file_in_another_encoding(tmp_path):
    """labelme on Chinese Windows wrote GBK."""
    labelme(tmp_path, "a", [shape()])
    labelme(tmp_path, "b", [shape()])
    path = tmp_path / "b.json"
    path.write_bytes(path.read_text().replace("cat", "行人").encode("gbk"))
    notes = read_labelme(tmp_path).notes
    assert f"1 JSON files that cannot be read: left out ({path}: it is not a UTF-8 text)" in notes
