import base64
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from coco_masks import full_bitmap
from foreign_files import attempt
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from supervisely_files import bitmap, bitmap_data, box, packed, png, polygon, row

from tailseg.data.annotations.masks import Bitmap
from tailseg.data.importers.foreign import LeftOut
from tailseg.data.importers.shapes import OddObjectError
from tailseg.data.importers.supervisely_objects import objects_of, parse_supervisely_object

HW = (40, 80)
RING = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 1]])
# Of Supervisely's page on its format: the text of the pixels `RING`.
DATA = (
    "eJzrDPBz5+WS4mJgYOD19HAJAtLMIMwIInOeqf8BUmwBPiGuQPr///9Lb86/C2QxlgT5BTM4PLuRBuTwebo4hlTMSa44cOHAB6DqY0yORgq8YkAZBk"
    "9XP5d1TglNANAFGzA="
)


def parsed(value, shapes=None):
    return parse_supervisely_object(value, shapes or {}, HW)


def pieces_of(value, shapes=None):
    return parsed(value, shapes)[2]


def full(piece, image_hw=HW):
    """The pixels of a piece on the whole image, by COCO's rasteriser or by copying them one by one."""
    if not isinstance(piece, Bitmap):
        return full_bitmap([piece.ravel()], image_hw)
    pixels = np.zeros(image_hw, np.uint8)
    for y, x in zip(*np.nonzero(piece.pixels), strict=True):
        if 0 <= y + piece.y < image_hw[0] and 0 <= x + piece.x < image_hw[1]:
            pixels[y + piece.y, x + piece.x] = 1
    return pixels


def read(*rows):
    found = LeftOut()
    objects = objects_of(rows, "a.json", {}, HW, found)
    masks = []
    for shape in objects.shapes():
        if isinstance(shape, bytes):
            masks.append(rle.decode({"size": list(HW), "counts": shape}))
        else:
            masks.append(full_bitmap([piece.ravel() for piece in shape], HW))
    return objects.names, masks, found.notes()


# ---------------------------------------------------------------------------------------------------------
# Pixels and places


@pytest.mark.parametrize("corners", [((2, 3), (11, 7)), ((11, 7), (2, 3)), ((2, 7), (11, 3))])
def test_a_rectangle_of_pixels_has_both_of_its_corners(corners):
    """Columns 2 to 11 and rows 3 to 7: 10 x 5 pixels, as Supervisely's own width and height say."""
    (piece,) = pieces_of(box(*corners))
    assert piece.tolist() == [[2, 3], [12, 3], [12, 8], [2, 8]]
    pixels = full(piece)
    assert pixels[3:8, 2:12].all()
    assert pixels.sum() == 50
    assert full(pieces_of(box((0, 0), (79, 39)))[0]).all()
    assert full(pieces_of(box((5, 5), (5, 5)))[0]).sum() == 1


def test_places_with_decimals_stay_as_they_are():
    assert pieces_of(box((2.5, 3), (12, 8.25)))[0].tolist() == [[2.5, 3], [12, 3], [12, 8.25], [2.5, 8.25]]
    assert pieces_of(polygon(((2, 3), (12.5, 3), (2, 8))))[0].tolist() == [[2, 3], [12.5, 3], [2, 8]]


def test_a_polygon_goes_through_the_middles_of_its_pixels():
    """Of a square from pixel 10 to 30 the area is 20 x 20, as Supervisely's own formula says."""
    (piece,) = pieces_of(polygon(((10, 10), (30, 10), (30, 30), (10, 30))))
    assert piece.tolist() == [[10.5, 10.5], [30.5, 10.5], [30.5, 30.5], [10.5, 30.5]]
    assert full(piece).sum() == 400


def test_outlines_keep_their_area():
    """Of outlines drawn on the plane, whose corners Supervisely cuts to whole numbers; cv2.fillPoly's are larger."""
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 12)), rng.uniform(4, 14, (12, 1))
        drawn = rng.uniform((30, 18), (50, 22)) + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii
        x, y = drawn.T
        cut = np.floor(drawn).astype(np.int32)
        filled = cv2.fillPoly(np.zeros(HW, np.uint8), [cut], 1)
        areas.append(
            (abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2, full(pieces_of(polygon(cut.tolist()))[0]).sum())
        )
        areas[-1] += (filled.sum(),)
    true, imported, of_opencv = np.sum(areas, axis=0)
    assert imported == pytest.approx(true, rel=0.01)
    assert of_opencv > 1.1 * true


def test_a_hole_is_taken_out():
    """A square of 20 x 20 with a hole of 5 x 5 and one that lies half outside of it."""
    holes = [((15, 15), (20, 15), (20, 20), (15, 20)), ((25, 12), (40, 12), (40, 14), (25, 14)), ((1, 1), (2, 2))]
    (piece,) = pieces_of(polygon(((10, 10), (30, 10), (30, 30), (10, 30)), holes))
    assert piece.pixels.sum() == 400 - 25 - 10
    assert piece.box[2] - piece.box[0] == piece.box[3] - piece.box[1] == 20
    pixels = full(piece)
    assert not pixels[16:21, 16:21].any()
    assert not pixels[13:15, 26:31].any()
    assert pixels[11, 11:31].all()
    assert pixels[21:31, 11:31].all()


def test_a_hole_as_large_as_the_polygon_leaves_nothing():
    square = ((10, 10), (30, 10), (30, 30), (10, 30))
    (piece,) = pieces_of(polygon(square, [square]))
    assert not piece.pixels.any()


@pytest.mark.parametrize("interior", [None, "x", 3, {}, [[]], [[[1, 2]]]])
def test_holes_that_enclose_nothing_are_none(interior):
    value = polygon()
    value["points"]["interior"] = interior
    assert pieces_of(value)[0].tolist() == [[10.5, 10.5], [30.5, 10.5], [10.5, 30.5]]


def test_parts_are_one_object():
    """An island lies in the hole of another part."""
    square = [[10, 10], [30, 10], [30, 30], [10, 30]]
    hole = [[15, 15], [25, 15], [25, 25], [15, 25]]
    island = [[18, 18], [22, 18], [22, 22], [18, 22]]
    parts = [{"exterior": island}, {"exterior": square, "interior": [hole]}, {"exterior": [[50, 5], [60, 5], [60, 9]]}]
    names, (pixels,), _ = read(row("multipolygon", parts=parts))
    assert names == ["cat"]
    assert pixels[10:31, 10:31].sum() == 400 - 100 + 16
    assert pixels[:, 50:].sum() == full_bitmap([[50.5, 5.5, 60.5, 5.5, 60.5, 9.5]], HW).sum() > 0
    _, (pixels,), _ = read(row("multipolygon", parts=parts[::2]))
    assert pixels.sum() == 16 + full_bitmap([[50.5, 5.5, 60.5, 5.5, 60.5, 9.5]], HW).sum()


def test_rectangles_turn_clockwise_by_radians():
    """Of 20 x 10 pixels about (20, 15), a quarter turn: its upper left corner comes to the upper right."""
    value = row("oriented_bbox", points=[[10, 10], [29, 19]], angle=np.pi / 2)
    assert pieces_of(value)[0] == pytest.approx(np.array([[25, 5], [25, 25], [15, 25], [15, 5]]))
    assert pieces_of({**value, "angle": 0})[0].tolist() == [[10, 10], [30, 10], [30, 20], [10, 20]]


# ---------------------------------------------------------------------------------------------------------
# Bitmaps


def test_a_bitmap_lies_at_its_origin():
    (piece,) = pieces_of(row("bitmap", bitmap={"data": DATA, "origin": [7, 9]}))
    assert piece.pixels.tolist() == RING.tolist()
    assert piece.box == (7, 9, 10, 12)
    assert pieces_of(bitmap((7, 9), RING))[0].pixels.tolist() == RING.tolist()


GREY = Image.fromarray((RING * 50).astype(np.uint8))
ALPHA = Image.merge("RGBA", [*[Image.new("L", (3, 3), 255)] * 3, GREY])
BLUE = Image.merge("RGB", [*[Image.new("L", (3, 3), 0)] * 2, GREY])
PALETTE = Image.fromarray(1 - RING.astype(np.uint8))
PALETTE.putpalette([0, 0, 9, 0, 0, 0])


@pytest.mark.parametrize(
    "content",
    [
        png(GREY),
        png(GREY, transparency=0),  # as the SDK writes an alpha mask
        png(Image.fromarray(RING != 0)),
        png(ALPHA),
        png(BLUE),
        png(PALETTE),  # whose first colour is not black, and covers
        png(Image.fromarray((RING * 300).astype(np.uint16))),
        png(Image.merge("LA", [Image.new("L", (3, 3), 0), GREY])),
    ],
)
@pytest.mark.parametrize("kind", ["bitmap", "alpha_mask"])
def test_any_grey_level_covers(content, kind):
    for data in (packed(content), base64.b64encode(content).decode()):  # old files are not packed
        (piece,) = pieces_of(row(kind, bitmap={"data": data, "origin": [0, 0]}))
        assert piece.pixels.tolist() == RING.tolist()


@pytest.mark.parametrize(("origin", "count"), [((-5, -4), 15 * 6), ((70, 35), 10 * 5), ((80, 0), 0), ((-500, 9), 0)])
def test_what_lies_outside_of_the_image_is_cut_off(origin, count):
    _, (pixels,), _ = read(bitmap(origin))
    assert pixels.sum() == count


def test_a_bitmap_that_unpacks_without_end_takes_little_memory():
    packer = zlib.compressobj()
    bomb = b"".join(packer.compress(bytes(1 << 22)) for _ in range(16)) + packer.flush()  # 64 MB of zeros
    value = row("bitmap", bitmap={"data": base64.b64encode(bomb).decode(), "origin": [0, 0]})
    tracemalloc.start()
    with pytest.raises(OddObjectError, match="unpack to more than their image has pixels for"):
        parsed(value)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_large_bitmap_of_noise_is_within_bounds():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 600, 4), np.uint8)
    data = packed(png(Image.fromarray(pixels), compress_level=0))
    value = row("bitmap", bitmap={"data": data, "origin": [0, 0]})
    assert parse_supervisely_object(value, {}, (500, 600))[2][0].pixels.mean() == pytest.approx(255 / 256, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------
# Types, and what is odd


@pytest.mark.parametrize(
    ("value", "shape", "kind"),
    [
        (polygon(), "bitmap", "polygon"),
        ({**polygon(), "geometryType": None}, "polygon", "polygon"),
        ({**polygon(), "geometryType": None, "shape": "polygon"}, "any", "polygon"),
        ({**box(), "geometryType": "any"}, "rectangle", "rectangle"),
        ({**bitmap(), "geometryType": None}, "polygon", "bitmap"),
        ({**polygon(), "geometryType": None, "bitmap": None}, "polygon", "polygon"),
    ],
)
def test_old_files_leave_the_type_to_the_class(value, shape, kind):
    assert parsed(value, {"cat": shape})[1] == kind
    removed = {key: entry for key, entry in value.items() if entry not in (None, "any")}
    assert parsed(removed, {"cat": shape})[1] == kind


@pytest.mark.parametrize(
    ("title", "name"), [("cat", "cat"), (7, "7"), (" two words ", " two words "), ("e\u0301", "\u00e9")]
)
def test_titles_are_text(title, name):
    assert parsed(polygon(title=title))[0] == name


BROKEN = packed(b"\x89PNG\r\n\x1a\n" + bytes(20))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *[({**polygon(), "classTitle": title}, "without a label") for title in ("", "  ", None, True, [1], {})],
        *[(value, "without a label") for value in ("text", None, [])],
        ({**polygon(), "geometryType": None}, "whose type neither they nor meta.json state"),
        ({**polygon(), "geometryType": ["polygon"]}, "whose type neither they nor meta.json state"),
        *[
            (row(kind, points={"exterior": [[1, 2]]}), "which are no areas")
            for kind in ("point", "line", "polyline", "graph", "cuboid", "cuboid_2d")
        ],
        (row("mask_3d"), "of an unknown type"),
        (polygon(((1, 2), (3, 4))), "too few points"),
        (row("polygon"), "too few points"),
        (row("polygon", points=[[1, 2], [3, 4], [5, 6]]), "too few points"),
        (row("multipolygon", parts=[]), "too few points"),
        (row("multipolygon", parts=[3]), "too few points"),
        (row("multipolygon"), "too few points"),
        (polygon(((1, "2"), (3, 4), (5, 6))), "not numbers"),
        (polygon(((1, 2, 3), (3, 4), (5, 6))), "not numbers"),
        (polygon(((1, 10**400), (3, 4), (5, 6))), "not numbers"),
        (polygon(interior=[((1, "2"), (3, 4), (5, 6))]), "not numbers"),
        (polygon(((1, 2), (65_536, 4), (5, 6))), "beyond 65,535 pixels"),
        (row("rectangle", points={"exterior": [[1, 2]]}), "too few points"),
        (row("rectangle"), "too few points"),
        (row("oriented_bbox", points=[[1, 2], [3, 4]], angle="x"), "not numbers"),
        (row("oriented_bbox", points=[[1, 2], [3, 4]], angle=float("inf")), "not numbers"),
        *[(row("bitmap", bitmap=value), "no PNG") for value in (None, "x", [])],
        (row("bitmap", bitmap={"data": DATA}), "not numbers"),
        (row("bitmap", bitmap={"data": DATA, "origin": [1]}), "not numbers"),
        (row("bitmap", bitmap={"data": DATA, "origin": [1, 10**6]}), "beyond 65,535 pixels"),
        *[
            (row("bitmap", bitmap={"data": data, "origin": [0, 0]}), "no PNG")
            for data in (None, 3, "", "%%%", "\u00e9", "abc", DATA[:80], DATA[::-1], BROKEN, packed(b""))
        ],
        (bitmap(pixels=np.ones((42, 3))), "do not fit into their image"),
        (bitmap(pixels=np.ones((3, 82))), "do not fit into their image"),
    ],
)
def test_an_odd_object_says_its_kind(value, kind):
    with pytest.raises(OddObjectError, match=kind):
        parsed(value)


def test_odd_objects_are_counted_with_their_places():
    names, _, notes = read(polygon(), row("point"), "x", polygon(title="owl"), row("graph"))
    assert names == ["cat", "owl"]
    assert notes == [
        "2 points, lines, keypoints and cuboids, which are no areas: left out (a.json: object 2, a.json: object 5)",
        "1 objects without a label: left out (a.json: object 3)",
    ]
    assert read() == ([], [], [])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)
points = st.lists(st.lists(st.floats(-9, 90), min_size=2, max_size=2), max_size=5) | json_values
outline = st.fixed_dictionaries({}, optional={"exterior": points, "interior": st.lists(points, max_size=2)})
kinds = st.sampled_from(["polygon", "multipolygon", "rectangle", "oriented_bbox", "bitmap", "alpha_mask", "line"])
data = st.just(DATA) | st.binary(max_size=30).map(packed) | json_values


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "classTitle": st.just("cat") | json_values,
            "geometryType": kinds | json_values,
            "points": outline | points,
            "parts": st.lists(outline, max_size=3) | json_values,
            "angle": st.floats() | json_values,
            "bitmap": st.fixed_dictionaries({}, optional={"data": data, "origin": points}) | json_values,
        },
    )
    | json_values
)
def test_any_object_is_read_or_refused(value):
    found, refused = attempt(parsed, value)
    if found is None:
        assert refused.endswith(": left out")
    else:
        for piece in found[2]:
            assert isinstance(piece, Bitmap) or (piece.shape[1] == 2 and len(piece) >= 3 and np.isfinite(piece).all())


corner = st.tuples(st.integers(-10, 90), st.integers(-10, 50))
ring = st.lists(corner, min_size=3, max_size=6)


@given(st.lists(st.tuples(ring, st.lists(ring, max_size=2), corner, st.integers(0, 99), st.booleans()), max_size=4))
def test_random_objects_come_back(drawn):
    """Polygons less the pixels of their holes, by COCO's rasteriser on the whole image, and bitmaps pixel by pixel."""
    rows, expected = [], []
    for exterior, interior, origin, seed, is_bitmap in drawn:
        if is_bitmap:
            pixels = (np.random.default_rng(seed).random((1 + seed % 7, 1 + seed % 5)) < 0.6).astype(np.uint8)
            rows.append(bitmap(origin, pixels))
            expected.append(full(Bitmap(pixels, *origin)))
        else:
            rows.append(polygon(exterior, interior))
            mask = full_bitmap([np.ravel(exterior) + 0.5], HW)
            for hole in interior:
                mask &= 1 - full_bitmap([np.ravel(hole) + 0.5], HW)
            expected.append(mask)
    _, masks, _ = read(*rows)
    assert len(masks) == len(expected)
    for mask, wanted in zip(masks, expected, strict=True):
        assert np.array_equal(mask, wanted)


# ---------------------------------------------------------------------------------------------------------
# Objects of several entries


def test_what_is_bound_together_is_one_object():
    """A bitmap of 10 x 20 pixels and a polygon beside it; one of another class keeps its own."""
    far = ((50, 5), (60, 5), (60, 9))
    names, masks, notes = read(
        bitmap(instance="k"),
        polygon(far, instance="k"),
        polygon(far, title="owl", instance="k"),
        polygon(far, instance=""),
        polygon(far, instance=3),
    )
    assert names == ["cat", "owl", "cat", "cat"]
    beside = full_bitmap([np.ravel(far) + 0.5], HW).sum()
    assert [mask.sum() for mask in masks] == [200 + beside, beside, beside, beside]
    assert notes == []


def test_a_rectangle_around_an_outline_of_its_class_is_no_object():
    """Dataset Ninja writes a polygon and its box as two objects of one class, also cut to whole pixels."""
    rows = [box((9, 11), (31, 29)), polygon(), box(title="owl"), box((10, 10), (20, 30)), bitmap((50, 12), title="owl")]
    names, masks, notes = read(*rows, box((50, 12), (69, 21), title="owl"))
    assert names == ["cat", "owl", "owl", "cat"]
    assert [mask.sum() for mask in masks[1:]] == [200, 200, 11 * 21]
    assert notes == ["2 rectangles around an outline of the same object: left out (a.json: object 1, a.json: object 6)"]


def test_a_rectangle_around_what_it_is_bound_to_is_no_object():
    """Supervisely's import of COCO makes a class `cat bbox`; a plate that is bound to a car stays an object."""
    parts = polygon(instance="k"), polygon(((40, 5), (60, 5), (60, 9)), instance="k")
    around = box((10, 5), (60, 30), title="cat bbox", instance="k")
    plate = box((12, 12), (15, 13), title="plate", instance="k")
    names, _, notes = read(*parts, around, plate)
    assert names == ["cat", "plate"]
    assert notes == ["1 rectangles around an outline of the same object: left out (a.json: object 3)"]
    assert read(box(instance="k"), box((40, 5), (50, 9), instance="k"))[0] == ["cat", "cat"]


def test_the_text_of_a_bitmap_is_that_of_the_sdk():
    assert zlib.decompress(base64.b64decode(bitmap_data(RING)))[:8] == zlib.decompress(base64.b64decode(DATA))[:8]
