from itertools import groupby
from pathlib import Path
from xml.etree.ElementTree import fromstring
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from coco_masks import full_bitmap
from foreign_files import attempt, picture
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle

from tailseg.data.annotations.masks import Bitmap
from tailseg.data.importers.cvat import is_cvat, parse_cvat_shape, read_cvat
from tailseg.data.importers.shapes import OddObjectError
from tailseg.errors import UserError

SIZE = (40, 80)
KEYS = ["label", "points", "xtl", "ytl", "xbr", "ybr", "cx", "cy", "rx", "ry", "rotation"]
KEYS += ["rle", "left", "top", "width", "height"]


def tag(kind, label="cat", **attributes):
    """A shape as CVAT writes it."""
    stated = {"label": label, "source": "manual", "occluded": "0", **attributes, "z_order": "0"}
    written = " ".join(f"{key}={quoteattr(str(value))}" for key, value in stated.items())
    return f'<{kind} {written}><attribute name="colour">red</attribute></{kind}>'


def polygon(label="cat", points=((10, 10), (30, 10), (10, 30)), **more):
    return tag("polygon", label, points=";".join(f"{x:.2f},{y:.2f}" for x, y in points), **more)


def box(label="cat", corners=(10, 10, 30, 20), **more):
    xtl, ytl, xbr, ybr = corners
    return tag("box", label, xtl=xtl, ytl=ytl, xbr=xbr, ybr=ybr, **more)


def runs_of(pixels):
    """Lengths of runs, row by row, zeros first."""
    runs = [(value, len(list(group))) for value, group in groupby(np.ravel(pixels).tolist())]
    return [*([0] if runs[0][0] else []), *(length for _, length in runs)]


def mask(label="cat", left=15, top=15, pixels=None, **more):
    pixels = np.ones((10, 20), int) if pixels is None else np.asarray(pixels, int)
    text = ", ".join(map(str, runs_of(pixels)))
    return tag("mask", label, rle=text, left=left, top=top, width=pixels.shape[1], height=pixels.shape[0], **more)


def entry(name, *shapes, subset=None, size=SIZE):
    more = "" if subset is None else f' subset="{subset}" task_id="3"'
    inner = "".join(shapes)
    return f'<image id="0" name={quoteattr(name)}{more} width="{size[1]}" height="{size[0]}">{inner}</image>'


def write(path: Path, *entries, labels=(), more="") -> Path:
    named = "".join(f"<label><name>{name}</name><color>#fff</color><attributes/></label>" for name in labels)
    meta = f"<meta><task><name>t</name><mode>annotation</mode><labels>{named}</labels></task></meta>"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"<annotations><version>1.1</version>{meta}{''.join(entries)}{more}</annotations>"
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{text}')
    return path


def cvat(root: Path, *shapes, name="a.jpg", **more) -> Path:
    """A task of one image."""
    picture(root / "images" / name)
    write(root / "annotations.xml", entry(name, *shapes), **more)
    return root


def names_of(found):
    return {split: [row["file_name"] for row in part.images] for split, part in found.parts.items()}


def parsed(text):
    """Label and piece of a shape."""
    element = fromstring(text)
    return parse_cvat_shape(element.tag, element.attrib, SIZE)


# ---------------------------------------------------------------------------------------------------------
# Shapes


def test_shapes_of_all_kinds_with_area(tmp_path):
    shapes = [polygon(), box("owl"), tag("ellipse", cx=40, cy=20, rx=10, ry=5), mask("owl")]
    found = read_cvat(cvat(tmp_path, *shapes))
    assert [row["name"] for row in found.categories] == ["cat", "owl"]
    rows = found.parts["train"].annotations
    assert [row["category_id"] for row in rows] == [1, 2, 1, 2]
    assert [row["bbox"] for row in rows] == [[10, 10, 20, 20], [10, 10, 20, 10], [30, 15, 20, 10], [15, 15, 20, 10]]
    assert rows[1]["area"] == rows[3]["area"] == 200
    assert rows[2]["area"] == pytest.approx(np.pi * 50, rel=0.02)
    assert found.notes == []


def test_runs_go_along_rows_and_begin_with_zeros():
    _, found = parsed(tag("mask", rle="1, 2, 2, 1", left=7, top=9, width=3, height=2))
    assert found.pixels.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert found.box == (7, 9, 10, 11)
    _, found = parsed(tag("mask", rle="0,2,1,1,0,2", left=0, top=0, width=3, height=2))
    assert found.pixels.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_boxes_turn_clockwise():
    """A box of 20 x 10 about (20, 15), a quarter turn: its upper left corner comes to the upper right."""
    _, corners = parsed(box(rotation=90))
    assert corners == pytest.approx(np.array([[25, 5], [25, 25], [15, 25], [15, 5]]))
    _, corners = parsed(box(rotation=45))
    assert corners[0] == pytest.approx([20 - 5 * 2**0.5 / 2, 15 - 15 * 2**0.5 / 2])


@pytest.mark.parametrize("degrees", [0, 30, 90])
def test_ellipses_turn_too(degrees):
    _, corners = parsed(tag("ellipse", cx=40, cy=20, rx=10, ry=5, rotation=degrees))
    angle = np.deg2rad(degrees)
    along = (corners - [40, 20]) @ [np.cos(angle), np.sin(angle)]
    across = (corners - [40, 20]) @ [-np.sin(angle), np.cos(angle)]
    assert (along / 10) ** 2 + (across / 5) ** 2 == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *[
            (tag(kind, points="1,2;3,4"), "which are no areas")
            for kind in ("polyline", "points", "skeleton", "tag", "cuboid")
        ],
        (tag("star"), "unknown type"),
        (polygon(""), "without a label"),
        ('<polygon points="1,2;3,4;5,6"/>', "without a label"),
        (polygon(points=((1, 2), (3, 4))), "too few points"),
        (tag("polygon", points=""), "too few points"),
        (tag("polygon"), "too few points"),
        (tag("polygon", points="1,2;3,x;5,6"), "not numbers"),
        (tag("polygon", points="1,2;3;5,6"), "not numbers"),
        (tag("polygon", points="1,2;3,nan;5,6"), "not numbers"),
        (tag("polygon", points="1,2;3,65536;5,6"), "beyond 65,535 pixels"),
        (tag("box", xtl=1, ytl=2, xbr=3), "not numbers"),
        (box(rotation="x"), "not numbers"),
        (tag("ellipse", cx=1, cy=2, rx="inf", ry=3), "not numbers"),
        (tag("mask", left=0, top=0, width=3, height=2), "runs do not fill"),
        (tag("mask", rle="1,2,x", left=0, top=0, width=3, height=2), "runs do not fill"),
        (tag("mask", rle="1,2,4", left=0, top=0, width=3, height=2), "runs do not fill"),
        (tag("mask", rle="-1,7", left=0, top=0, width=3, height=2), "runs do not fill"),
        (tag("mask", rle=f"{2**63},7", left=0, top=0, width=3, height=2), "runs do not fill"),
        (tag("mask", rle="6", left=0.5, top=0, width=3, height=2), "not numbers"),
        (tag("mask", rle="6", top=0, width=3, height=2), "not numbers"),
        (tag("mask", rle="6", left=0, top=0, width=0, height=2), "do not fit into their image"),
        (tag("mask", rle="6", left=0, top=0, width=60_000, height=60_000), "do not fit into their image"),
    ],
)
def test_an_odd_shape_says_its_kind(text, kind):
    with pytest.raises(OddObjectError, match=kind):
        parsed(text)


def test_odd_shapes_are_counted_with_their_places(tmp_path):
    inner = '<skeleton label="cat"><points label="1" points="1,2"/></skeleton>'
    cvat(tmp_path, polygon(), inner, tag("tag"), polygon(points=()))
    where = f"{tmp_path}/annotations.xml: image 'a.jpg'"
    assert read_cvat(tmp_path).notes == [
        "2 tags, skeletons, cuboids, lines and points, which are no areas: left out "
        f"({where}: shape 2, {where}: shape 3)",
        f"1 objects with too few points: left out ({where}: shape 4)",
    ]


def test_groups_are_objects(tmp_path):
    """0 is no group; a mask of 200 pixels and a box that covers half of it and 100 pixels beside it are one object."""
    shapes = [
        polygon(group_id=0),
        polygon(group_id=0),
        polygon("owl", group_id=1),
        box(corners=(25, 15, 45, 25), group_id=1),
    ]
    found = read_cvat(
        cvat(tmp_path, *shapes, polygon("owl", ((50, 5), (60, 5), (60, 9)), group_id=1), mask(group_id=1))
    )
    rows = found.parts["train"].annotations
    assert [row["category_id"] for row in rows] == [1, 1, 2, 1]
    assert [len(row["segmentation"]) for row in rows[:3]] == [1, 1, 2]
    assert (rows[3]["bbox"], rows[3]["area"]) == ([15, 15, 30, 10], 300)


texts = st.text(alphabet="0123456789.,;-ex ", max_size=12)


@given(
    st.sampled_from(["polygon", "box", "ellipse", "mask", "points", "x"]),
    st.dictionaries(
        st.sampled_from(
            [
                "label",
                "points",
                "xtl",
                "ytl",
                "xbr",
                "ybr",
                "cx",
                "cy",
                "rx",
                "ry",
                "rotation",
                "rle",
                "left",
                "top",
                "width",
                "height",
            ]
        ),
        texts | st.integers(-5, 90).map(str),
    ),
)
def test_any_shape_is_read_or_refused(kind, attributes):
    found, refused = attempt(parse_cvat_shape, kind, attributes, SIZE)
    if found is None:
        assert refused.endswith(": left out")
    else:
        _, piece = found
        assert isinstance(piece, Bitmap) or (piece.shape[1] == 2 and len(piece) >= 3 and np.isfinite(piece).all())


shapes = st.tuples(
    st.sampled_from(["polygon", "mask"]),
    st.sampled_from(["cat", "owl", 'a "b" & <c>']),
    st.sampled_from([0, 0, 1, 2]),
    st.lists(st.tuples(st.integers(-10, 90), st.integers(-10, 50)), min_size=3, max_size=6),
    st.integers(0, 99),
)


@given(st.lists(shapes, max_size=6))
def test_random_sets_come_back(tmp_path_factory, drawn):
    root = tmp_path_factory.mktemp("sets")
    written, objects = [], {}
    for number, (kind, label, group, points, seed) in enumerate(drawn):
        if kind == "polygon":
            written.append(polygon(label, points, group_id=group))
            full = full_bitmap([np.ravel(points)], SIZE)
        else:
            pixels = np.random.default_rng(seed).random((1 + seed % 7, 1 + seed % 5)) < 0.6
            left, top = 1 + seed % 71, 1 + seed % 31
            written.append(mask(label, left, top, pixels, group_id=group))
            full = np.zeros(SIZE, np.uint8)
            full[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        key = (label, group) if group else number
        objects[key] = (label, full | objects.get(key, (label, 0))[1])
    cvat(root, *written, polygon("dog"), name="a b/ü.jpg")
    found = read_cvat(root)
    names = {row["id"]: row["name"] for row in found.categories}
    *rows, last = (row for row in found.parts["train"].annotations if row["area"])
    expected = [(label, full) for label, full in objects.values() if full.any()]
    assert names[last["category_id"]] == "dog"
    assert [names[row["category_id"]] for row in rows] == [label for label, _ in expected]
    for row, (_, full) in zip(rows, expected, strict=True):
        code = row["segmentation"]
        code = rle.merge(rle.frPyObjects(code, *SIZE)) if isinstance(code, list) else code
        assert np.array_equal(rle.decode(code), full)


# ---------------------------------------------------------------------------------------------------------
# Files, images and splits


@pytest.mark.parametrize(
    ("name", "subset", "image"),
    [
        ("a.jpg", None, "images/a.jpg"),
        ("a.jpg", None, "a.jpg"),
        ("cam/a.jpg", None, "images/cam/a.jpg"),
        ("cam/a.jpg", None, "images/a.jpg"),
        ("cam\\a.jpg", None, "images/cam/a.jpg"),
        ("a.jpg", "Train", "images/Train/a.jpg"),
        ("a.jpg", "Train", "Train/a.jpg"),
        ("a.jpg", "Train", "images/a.jpg"),
        ("a.jpg", "../..", "images/a.jpg"),
        ("a.jpg", None, "images/a.JPG"),
        ("frame_000000", None, "images/frame_000000.PNG"),
        ("a.jpg", None, "elsewhere/a.jpg"),  # the only one of this name
        ("../../a.jpg", None, "a.jpg"),
    ],
)
def test_where_images_are_found(tmp_path, name, subset, image):
    write(tmp_path / "annotations.xml", entry(name, polygon(), subset=subset))
    picture(tmp_path / image)
    for source in (tmp_path, tmp_path / "annotations.xml"):
        assert read_cvat(source).parts["train"].files == [tmp_path / image]


def test_a_project_with_subsets(tmp_path):
    for subset in ("Train", "Validation", "default"):
        picture(tmp_path / "images" / subset / "a.jpg")
    subsets = [entry("a.jpg", polygon(), subset=subset) for subset in ("Validation", "Train", "default")]
    found = read_cvat(write(tmp_path / "annotations.xml", *subsets).parent)
    assert names_of(found) == {"train": ["Train/a.jpg"], "val": ["Validation/a.jpg"]}
    where = f"{tmp_path}/annotations.xml: image 'a.jpg'"
    assert found.notes == [f"1 image entries in neither the training nor the validation split: left out ({where})"]


@pytest.mark.parametrize("files", [("train.xml", "val.xml"), ("train/annotations.xml", "valid/annotations.xml")])
def test_a_file_for_each_split(tmp_path, files):
    for file in files:
        picture((tmp_path / file).parent / "images" / f"{file[0]}.jpg")
        write(tmp_path / file, entry(f"{file[0]}.jpg", polygon()))
    (tmp_path / "labels.xml").write_text("<labels/>")
    found = read_cvat(tmp_path)
    assert {split: [path.name for path in part.files] for split, part in found.parts.items()} == {
        "train": ["t.jpg"],
        "val": ["v.jpg"],
    }
    assert found.notes == [f"1 XML files that are not CVAT's: left out ({tmp_path}/labels.xml)"]


def test_tasks_without_split_are_one_set(tmp_path):
    for task in ("one", "two"):
        cvat(tmp_path / task, polygon())
    assert names_of(read_cvat(tmp_path)) == {"train": ["one/a.jpg", "two/a.jpg"]}


def test_images_and_entries_without_each_other_are_counted(tmp_path):
    root = cvat(tmp_path, polygon())
    for name in ("b.jpg", "unlabelled.png", "small.jpg"):
        picture(root / "images" / name)
    entries = [
        entry("a.jpg", polygon()),
        entry("b.jpg"),
        entry("gone.jpg"),
        entry("a.jpg"),
        entry("small.jpg", size=(40, 81)),
    ]
    write(root / "annotations.xml", *entries, labels=["cat", "owl", "dog"])
    found = read_cvat(root)
    assert names_of(found) == {"train": ["a.jpg", "b.jpg"]}
    file = f"{root}/annotations.xml"
    assert found.notes == [
        f"1 image entries without image: left out ({file}: image 'gone.jpg' is not in {root})",
        f"1 image entries for an image that is used already: left out ({file}: image 'a.jpg')",
        f"1 image entries that state another size than their image has: left out "
        f"({file}: image 'small.jpg': it says 81 x 40 pixels but {root}/images/small.jpg has 80 x 40)",
        f"1 images without an object: kept, as images that show none of the classes ({root}/images/b.jpg)",
        f"1 images without annotation: left out ({root}/images/unlabelled.png)",
        "2 labels without an object: left out (owl, dog)",
    ]


def test_an_export_without_images(tmp_path):
    write(tmp_path / "annotations.xml", entry("a.jpg", polygon()), entry("b.jpg", polygon()))
    with pytest.raises(UserError) as caught:
        read_cvat(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/annotations.xml: image 'a.jpg' is not in {tmp_path}; put it into the folder images beside the "
        "file, or export again with 'Save images' (2 of 2 image entries are at fault)"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<annotations><track id="0" label="x"><box frame="0"/></track></annotations>', "it is 'CVAT for video'"),
        ("<annotation/>", "it begins with <annotation>, not <annotations>; check the file"),
        ("<annotations><image>", "not valid XML"),
        ("<!DOCTYPE a><annotations/>", "it declares a document type"),
        ("", "not valid XML"),
        ("<annotations/>", "there is no image in it|no file in it has an object"),
    ],
)
def test_files_at_fault_are_named(tmp_path, text, problem):
    path = tmp_path / "annotations.xml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path}.*({problem})"):
        read_cvat(path)


def test_a_folder_without_a_file_of_cvat(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: there is no annotations.xml of CVAT in it; give the folder"):
        read_cvat(tmp_path)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("<annotations><version>1.1</version>", True),
        ("<?xml version='1.0'?>\n<annotations>\n  <image id='0'/>", True),
        ("<annotations><track id='0'>", True),  # for video: answered with the way out
        ("<annotations><other/></annotations>", False),
        ("<annotation><version>1.1</version>", False),
        ("", False),
    ],
)
def test_files_of_cvat_are_told_by_their_beginning(tmp_path, text, own):
    path = tmp_path / "a.xml"
    path.write_text(text)
    assert is_cvat(path) is own


@given(st.binary(max_size=60) | st.text(alphabet="<>/a&;!x= '", max_size=40).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("any")
    for text in (content, b"<annotations><image name='a'>" + content + b"</image></annotations>"):
        (root / "annotations.xml").write_bytes(text)
        _, refused = attempt(read_cvat, root / "annotations.xml")
        assert str(root) in refused
