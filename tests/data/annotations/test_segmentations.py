import numpy as np
import pytest
from annotation_files import SQUARE, annotation, content, load
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from tailseg.data.annotations.oddities import Tally
from tailseg.data.annotations.segmentations import Fault, segmentation_columns, sound_segmentation
from tailseg.wording import short


@pytest.mark.parametrize(("number", "kind"), [(12.34, np.float32), (12.345, np.float64), (1 / 3, np.float64)])
def test_coordinates_come_back_to_the_last_digit(tmp_path, number, kind):
    polygons = [[number, 1.1, 30.3, 2.2, 7.7, 33.33]]
    data = load(tmp_path, content([annotation(1), annotation(2, segmentation=polygons)]))
    assert data.segmentations.coordinates.dtype == kind
    assert [polygon.tolist() for polygon in data.segmentation(1)] == polygons


def test_polygons_and_both_kinds_of_rle(tmp_path):
    bitmap = np.asfortranarray(np.zeros((40, 50), np.uint8))
    bitmap[3:9, 4:20] = 1
    code = coco.encode(bitmap)["counts"]
    runs = [163] + [6, 34] * 15 + [6, 2000 - 163 - 40 * 15 - 6]
    rows = [
        annotation(1, segmentation=[SQUARE, [1, 2, 3, 4.25, 5, 6]]),
        annotation(2, segmentation={"size": [40, 50], "counts": code.decode()}),
        annotation(3, segmentation={"size": [40, 50], "counts": runs}),
        annotation(4, segmentation=[SQUARE]),
    ]
    data = load(tmp_path, content(rows))
    assert [p.tolist() for p in data.segmentation(0)] == [SQUARE, [1, 2, 3, 4.25, 5, 6]]
    assert data.segmentation(1) == data.segmentation(2) == code
    assert [p.tolist() for p in data.segmentation(3)] == [SQUARE]


def columns_of(values, met=None):
    """The columns and faults of segmentations, as rows of a file hold them."""
    return segmentation_columns([{"segmentation": value} for value in values], str, met or Tally())


def test_no_rows_at_all():
    columns, faults = columns_of([])
    assert faults == {}
    assert columns["rle_hws"].shape == (0, 2)
    assert all(column.size == 0 for column in columns.values())


TWO_POINTS = "a polygon has 4 coordinates, not three points or more of an x and a y each"
NO_NUMBERS = "no flat list of numbers x0, y0, x1, y1, ..."
FAULTS = [
    ("no_mask", None, "segmentation is None"),
    ("no_mask", [], "segmentation is []"),
    ("no_mask", {}, "segmentation is {}"),
    ("bad_mask", "x" * 99, f"segmentation is '{'x' * 56}..."),
    ("no_mask", [None], f"a polygon is None, {NO_NUMBERS}"),
    ("bad_mask", [5], "a polygon has 1 coordinates, not three points or more of an x and a y each"),
    ("bad_mask", [[1, 2, 3, 4, 5, None]], f"a polygon is [1, 2, 3, 4, 5, None], {NO_NUMBERS}"),
    ("bad_mask", [["a", 2, 3, 4, 5, 6]], f"a polygon is ['a', 2, 3, 4, 5, 6], {NO_NUMBERS}"),
    ("bad_mask", [["nan", 2, 3, 4, 5, 6]], f"a polygon is ['nan', 2, 3, 4, 5, 6], {NO_NUMBERS}"),
    ("bad_mask", [[[1, 2], [3, 4], [5, None]]], f"a polygon is [[1, 2], [3, 4], [5, None]], {NO_NUMBERS}"),
    ("bad_mask", [[[1, 2], [3, 4]]], f"a polygon is [[1, 2], [3, 4]], {NO_NUMBERS}"),
    ("no_mask", [[]], "a polygon has 0 coordinates, not three points or more of an x and a y each"),
    ("bad_mask", [[1, 2, 3, 4]], TWO_POINTS),
    ("bad_mask", [[1, 2, 3, 4], [1, 2]], TWO_POINTS),
    ("bad_mask", [[1, 2, 3, 4, 5, -70_000]], "a polygon has a coordinate beyond 65535 pixels"),
    ("bad_mask", [[65535.001, 2, 3, 4, 5, 6]], "a polygon has a coordinate beyond 65535 pixels"),
    ("bad_mask", [[0, 0, 65_000, 2] * 80], "a polygon's outline is longer than 10,000,000 pixels"),  # 10.4 million
    ("bad_mask", {"counts": "0"}, "the RLE's size is None, not the image's height and width"),
    ("bad_mask", {"size": [40.5, 50], "counts": "0"}, "the RLE's size is [40.5, 50], not the image's height and width"),
    ("bad_mask", {"size": [40], "counts": "0"}, "the RLE's size is [40], not the image's height and width"),
    ("bad_mask", {"size": [0, 50], "counts": []}, "the RLE's size is [0, 50], not sides of 1 to 65535 pixels"),
    (
        "bad_mask",
        {"size": [40, 10**9], "counts": []},
        "the RLE's size is [40, 1000000000], not sides of 1 to 65535 pixels",
    ),
    ("bad_mask", {"size": [4, 5]}, "the RLE's counts are None, no string and no list of run lengths"),
    ("bad_mask", {"size": [4, 5], "counts": ""}, "the RLE's counts are '', no string and no list of run lengths"),
    *(
        (
            "bad_mask",
            {"size": [4, 5], "counts": counts},
            "the RLE's counts are not whole numbers that sum to 4 x 5 pixels",
        )
        for counts in ([], [19], [21], [10.5, 9.5], [True, 19], ["20"], [-1, 21])
    ),
    ("bad_mask", {"size": [4, 5], "counts": "z"}, "not a compressed RLE"),
    ("bad_mask", {"size": [4, 5], "counts": "é"}, "not a compressed RLE"),
    ("bad_mask", {"size": [4, 5], "counts": "PPPPPPPPPP1"}, "a run of the RLE is too long"),
    ("bad_mask", {"size": [4, 5], "counts": "O"}, "a run of the RLE is negative"),
    ("bad_mask", {"size": [4, 5], "counts": "9:"}, "the RLE covers 19 pixels but its size is 4 x 5"),
]


@pytest.mark.parametrize(("kind", "value", "problem"), FAULTS)
def test_each_fault_is_told_and_spares_the_others(kind, value, problem):
    whole = {"size": [4, 5], "counts": [3, 17]}
    met = Tally()
    columns, faults = columns_of([[SQUARE], value, whole, [SQUARE, SQUARE]], met)
    assert faults == {1: Fault(kind, problem)}
    assert met.counts == {}
    assert columns["polygon_counts"].tolist() == [1, 0, 0, 2]
    assert columns["coordinates"].tolist() == SQUARE * 3
    assert columns["rle_hws"].tolist() == [[0, 0], [0, 0], [4, 5], [0, 0]]
    assert columns["rle_lengths"][[0, 1, 3]].tolist() == [0, 0, 0]


def test_an_outline_may_have_ten_million_pixels():
    zigzag = [0, 0, 50_000, 2] * 100  # there and back
    assert columns_of([[zigzag]])[1] == {}
    assert list(columns_of([[[*zigzag, -1, 0]]])[1]) == [0]


@pytest.mark.parametrize("ring", [5, [], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, None], "x", [9e9] * 6])
def test_a_broken_polygon_beside_a_sound_one_is_left_out_and_counted(ring):
    met = Tally()
    columns, faults = columns_of([[ring, SQUARE], [SQUARE]], met)
    assert faults == {}
    assert columns["polygon_counts"].tolist() == [1, 1]
    assert columns["coordinates"].tolist() == SQUARE * 2
    assert met.counts == {"ring": 1}
    assert met.places["ring"][0].startswith("0: a polygon ")


PAIRS = [[10, 10], [30, 10], [30, 30], [10, 30]]  # SQUARE


@pytest.mark.parametrize("value", [SQUARE, PAIRS, [PAIRS], [list(map(str, SQUARE))], [[[str(x), y] for x, y in PAIRS]]])
def test_a_polygon_in_another_form_is_taken_as_meant(value):
    met = Tally()
    columns, faults = columns_of([value, [SQUARE], SQUARE[:4]], met)
    assert columns["polygon_counts"].tolist() == [1, 1, 0]
    assert columns["coordinates"].tolist() == SQUARE * 2
    assert list(faults) == [2]
    assert (met.counts, met.places) == ({"form": 1}, {"form": ["0"]})


def test_an_rle_in_another_form_is_taken_as_meant():
    bitmap = np.asfortranarray(np.zeros((40, 50), np.uint8))
    bitmap[4:9, 1:20] = 1  # a first run of 44, of which the code is a backslash and more
    code = coco.encode(bitmap)["counts"]
    assert b"\\" in code  # which str() writes twice
    runs = list(map(float, run_list(bitmap)))
    forms = [
        [{"size": [40, 50], "counts": code.decode()}],
        {"size": [40, 50], "counts": str(code)},
        {"size": [40.0, 50], "counts": code.decode()},
        {"size": [40, 50], "counts": runs},
    ]
    met = Tally()
    columns, faults = columns_of([*forms, [SQUARE]], met)
    assert faults == {}
    assert columns["rle_bytes"].tobytes() == code * 4
    assert columns["rle_hws"].tolist() == [[40, 50]] * 4 + [[0, 0]]
    assert met.places == {"form": ["0", "1"]}  # 40.0 is 40
    for form in forms:
        sound, fault = sound_segmentation(form, "", met)
        assert fault is None
        assert sound == {"size": [40, 50], "counts": run_list(bitmap) if form is forms[3] else code.decode()}


def test_a_missing_segmentation_is_told_from_an_empty_one():
    _, faults = segmentation_columns([{}, {"segmentation": None}], str, Tally())
    assert [fault.problem for fault in faults.values()] == ["segmentation is missing", "segmentation is None"]


bitmaps = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda hw: st.lists(st.booleans(), min_size=hw[0] * hw[1], max_size=hw[0] * hw[1]).map(
        lambda bits: np.array(bits, np.uint8).reshape(hw)
    )
)


def run_list(bitmap):
    """The uncompressed counts of a bitmap, column by column, zeros first."""
    flat = bitmap.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


@given(st.lists(st.tuples(bitmaps, st.booleans()), max_size=5))
def test_codes_of_both_kinds_are_those_of_pycocotools(objects):
    values, expected = [], []
    for bitmap, as_list in objects:
        code = coco.encode(np.asfortranarray(bitmap))
        expected.append((code["counts"], list(bitmap.shape)))
        values.append({"size": list(bitmap.shape), "counts": run_list(bitmap) if as_list else code["counts"].decode()})
    columns, faults = columns_of(values)
    assert faults == {}
    assert columns["rle_bytes"].tobytes() == b"".join(code for code, _ in expected)
    assert columns["rle_lengths"].tolist() == [len(code) for code, _ in expected]
    assert columns["rle_hws"].tolist() == [size for _, size in expected]


number = st.integers(-3, 50) | st.floats(-9, 60_000, allow_nan=False)
anything = st.recursive(
    st.none() | st.booleans() | number | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
    max_leaves=12,
)
codes = st.fixed_dictionaries(
    {},
    optional={
        "size": st.lists(st.integers(0, 5), min_size=2, max_size=2) | anything,
        "counts": st.text(st.characters(min_codepoint=48, max_codepoint=112), max_size=6)
        | st.lists(st.integers(0, 9), max_size=4)
        | anything,
    },
)
polygons = st.lists(st.lists(number, min_size=5, max_size=9) | anything, max_size=3)


@given(st.lists(polygons | codes | anything, max_size=5))
def test_any_value_is_read_or_refused(values):
    columns, faults = columns_of(values)
    assert columns["polygon_counts"].sum() == len(columns["polygon_lengths"])
    assert columns["polygon_lengths"].sum() == len(columns["coordinates"])
    assert columns["rle_lengths"].sum() == len(columns["rle_bytes"])
    for i, value in enumerate(values):
        if i in faults:
            assert "\n" not in faults[i].problem
            assert columns["polygon_counts"][i] == 0
        elif isinstance(value, list):
            assert 0 < columns["polygon_counts"][i] <= len(value)
        else:
            height, width = columns["rle_hws"][i].tolist()
            start = columns["rle_lengths"][:i].sum()
            code = columns["rle_bytes"][start : start + columns["rle_lengths"][i]].tobytes()
            assert (
                coco.decode({"size": [height, width], "counts": code}).shape == (height, width) == tuple(value["size"])
            )


def test_a_value_is_shown_in_sixty_letters():
    assert short([1, "a"]) == "[1, 'a']"
    assert short("x" * 58) == repr("x" * 58)
    assert (len(short("x" * 59)), short("x" * 59)[-4:]) == (60, "x...")
