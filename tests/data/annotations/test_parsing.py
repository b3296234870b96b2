import json
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from annotation_files import annotation, content, fault, load
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations import parsing
from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.annotations.columns import positions_of
from tailseg.data.annotations.parsing import Table, category_columns, parse, read_categories, read_tables
from tailseg.data.annotations.streaming import read_lists
from tailseg.errors import UserError


def test_annotations_are_sorted_by_image(tmp_path):
    rows = [annotation(1, 1), annotation(2, 5, 9, bbox=[1, 2, 3.5, 4]), annotation(3, 1, 4), annotation(4, 5)]
    data = load(tmp_path, content(rows))
    assert data.image_ids.tolist() == [5, 1]
    assert data.rows(0).tolist() == [0, 1]
    assert data.annotation_ids.tolist() == [2, 4, 1, 3]
    assert data.labels.tolist() == [2, 0, 0, 1]
    assert data.boxes[0].tolist() == [1, 2, 4.5, 6]
    assert data.image_sizes.tolist() == [[40, 50], [40, 50]]


def test_boxes_without_masks_can_be_read_if_asked_for(tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps(content([annotation(1, segmentation=None, area=None)])))
    with pytest.raises(UserError, match="annotation 1: segmentation is None"):
        load_annotations(tmp_path / "boxes.json", tmp_path)
    data = load_annotations(tmp_path / "boxes.json", tmp_path, masks=False)
    assert data.areas.tolist() == [np.prod(annotation(1)["bbox"][2:])]


def test_no_annotations_at_all(tmp_path):
    data = load(tmp_path, content([]))
    assert data.boxes.shape == (0, 4)
    assert data.image_counts().tolist() == [0, 0, 0]
    assert data.report.empty_images == 2


BAD = {
    "cut off": (json.dumps(content())[:150], "cut off at line 1, column"),
    "empty": ("", "the file is empty"),
    "not json": ("hello", "not valid JSON"),
    "not an object": ("[]", "expected an object"),
    "not a number": ('{"images": NaN}', "not valid JSON"),
    "no images": ({"annotations": [], "categories": []}, "'images' is missing"),
    "no annotations": ({"images": [], "categories": []}, "'annotations' is missing"),
    "wrong list": (content(images={}), "'images' is {}"),
    "wrong row": (content([3]), r"annotations\[0\] is 3"),
    "image twice": (content(images=content()["images"][:1] * 2), "image 5: this id occurs more than once"),
    "annotation twice": (content([annotation(3), annotation(3)]), "annotation 3: this id occurs more"),
    "category twice": (content(categories=[{"id": 2, "name": "a"}] * 2), "category 2: this id occurs more"),
    "no category": (
        content([annotation(3, 1, 8)]),
        "annotation 3: there is no category with the category_id 8",
    ),
    "no image": (content([annotation(3, 8)]), "annotation 3: there is no image with the image_id 8"),
    "id as string": (content([annotation("3")]), "annotation '3': id is '3'; it must be a whole number"),
    "id missing": (
        content([annotation(1), {"image_id": 1}]),
        "annotation number 2 of the list: id is missing",
    ),
    "huge id": (content([annotation(2**63)]), "is too large"),
    "image id as string": (content([annotation(3, "1")]), "annotation 3: image_id is '1'"),
    "box of three": (content([annotation(3, bbox=[1, 2, 3])]), r"annotation 3: bbox is \[1, 2, 3\]"),
    "box of words": (content([annotation(3, bbox=[1, 2, 3, "4"])]), "annotation 3: bbox is"),
    "area of words": (content([annotation(3, area="4")]), "annotation 3: area is '4'"),
    "rle size": (
        content([annotation(3, segmentation={"size": [50, 40], "counts": "0"})]),
        r"annotation 3: the RLE's size is \[50, 40\] but the image's is \[40, 50\]",
    ),
    "flat image": (
        content(images=[{"id": 1, "height": 0, "width": 5, "file_name": "a"}]),
        "image 1: it has height 0",
    ),
    "no pictures": (content([], images=[]), "the list of images is empty"),
    "category name": (content(categories=[{"id": 2}]), "category 2: name is missing; it must be a string"),
    "negatives": (
        content(images=[{"id": 1, "height": 4, "width": 5, "file_name": "a", "neg_category_ids": ["x"]}]),
        "image 1: neg_category_ids must be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(tmp_path, name):
    data, expected = BAD[name]
    message = fault(tmp_path, data)
    with pytest.raises(UserError, match=expected):
        raise UserError(message)


def test_number_beyond_floats_is_refused(tmp_path):
    text = json.dumps(content([annotation(3, segmentation=[[777, 2, 3, 4, 5, 6]])])).replace("777", "1e999")
    assert "not valid JSON" in fault(tmp_path, text)


def test_a_file_for_a_test_server_has_no_list_of_annotations(tmp_path):
    made = content()
    del made["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(made))
    found = load_annotations(tmp_path / "test.json", tmp_path)
    assert (len(found), found.report.annotations, len(found.labels)) == (len(made["images"]), 0, 0)
    assert found.report.empty_images == len(found)


def written(folder, data):
    path = folder / "a.json"
    path.write_text(json.dumps(data))
    return path


@given(
    st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), unique=True, max_size=8),
    st.lists(st.integers(-5, 5), max_size=8),
)
def test_positions_of_ids(ids, wanted):
    places, known = positions_of(np.array(wanted, np.int64), np.array(ids, np.int64))
    assert known.tolist() == [number in ids for number in wanted]
    assert [ids[place] for place in places[known]] == [number for number in wanted if number in ids]


def test_lists_may_stand_in_any_order(tmp_path):
    data = content()
    expected = parse(written(tmp_path, data))
    for keys in permutations(data):
        found = parse(written(tmp_path, {"info": {"images": [1]}} | {key: data[key] for key in keys}))
        assert (found.categories, found.report) == (expected.categories, expected.report)
        assert all(np.array_equal(found.columns[name], column) for name, column in expected.columns.items())


def test_many_batches_are_one(tmp_path, monkeypatch):
    """Five are joined at once, and a single number needs float64."""
    monkeypatch.setattr(parsing, "read_lists", partial(read_lists, block=64))
    monkeypatch.setattr(parsing, "_BATCHES", 5)
    rows = [annotation(i, (5, 1)[i % 2], segmentation=[[i, 2, 3, 4.25, 5, 6]]) for i in range(20)]
    rows[7]["segmentation"] = [[1 / 3, 2, 3, 4, 5, 6]]
    tables = list(read_tables(written(tmp_path, content(rows))))
    assert sum(table.kind == "annotation" for table in tables) > 10
    columns = parse(tmp_path / "a.json").columns
    firsts = columns["coordinates"].reshape(-1, 6)[:, 0].tolist()
    by_id = dict(zip(columns["annotation_ids"].tolist(), firsts, strict=True))
    assert by_id == {i: 1 / 3 if i == 7 else i for i in range(20)}
    assert columns["coordinates"].dtype == np.float64


def test_a_list_that_occurs_twice(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content())[:-1] + ', "images": []}')
    with pytest.raises(UserError, match=r"a\.json: 'images' occurs twice; keep one of them"):
        parse(path)


def test_categories_alone(tmp_path):
    table = read_categories(written(tmp_path, {"categories": content()["categories"]}))
    ids, names, groups = category_columns(table)
    assert (ids.tolist(), names, groups) == ([2, 4, 9], ["cat", "dog", "owl"], None)
    with pytest.raises(UserError, match="'categories' is missing; an LVIS or COCO file has a list of category objects"):
        read_categories(written(tmp_path, {"images": []}))
    with pytest.raises(UserError, match="'categories' is 3; an LVIS or COCO file has a list of category objects"):
        read_categories(written(tmp_path, {"categories": 3}))


@pytest.mark.parametrize("groups", ["rc", ("r", "c", None), ("r", "c", "x")])
def test_groups_count_only_if_every_category_states_one(groups):
    rows = [{"id": i, "name": "n", "frequency": group} for i, group in enumerate(groups)]
    rows += [{"id": 7, "name": "n"}] * (len(groups) == 2)
    assert category_columns(Table(Path("f"), "category", rows))[2] is None


def table(*rows, first=0):
    return Table(Path("f.json"), "image", list(rows), first)


@pytest.mark.parametrize(
    ("take", "sentence"),
    [
        (lambda: table({"id": 3, "k": "1"}).integers("k"), "image 3: k is '1'; it must be a whole number"),
        (lambda: table({"id": "a", "k": 1}, {"id": "b"}).integers("k"), "image 'b': k is missing; it must be a whole"),
        (lambda: table({"k": 1}, {"k": True}, first=7).integers("k"), "image number 9 of the list: k is True; it must"),
        (lambda: table({"id": [1], "k": None}).integers("k"), "image number 1 of the list: k is None; it must be a"),
        (
            lambda: table({"id": 3, "k": 2**63}).integers("k"),
            f"image 3: k {2**63} is too large; use a number",
        ),
        (
            lambda: table({"id": 3, "bbox": (1, 2)}).boxes(),
            "image 3: bbox is (1, 2); it must be a list of",
        ),
        (lambda: table({"id": 3, "bbox": [1, 2, 3, True]}).boxes(), "bbox is [1, 2, 3, True]; it must be four numbers"),
    ],
)
def test_columns_refuse_rows_by_name_or_number(take, sentence):
    with pytest.raises(UserError) as caught:
        take()
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("f.json: image ")


def test_columns_of_no_rows():
    assert table().integers("k").shape == (0,)
    assert table().boxes().shape == (0, 4)
    assert table().values("k", (str,), "a string") == []


def test_what_is_left_out_is_counted_once(tmp_path):
    """Outside comes before no area, and that before thin."""
    rows = [
        annotation(1, bbox=[60, 60, 0.5, 0.5], area=0),
        annotation(2, bbox=[1, 1, 0.5, 0.5], area=0),
        annotation(3, bbox=[1, 1, 0.5, 0.5], segmentation=[]),
        annotation(4, bbox=[1, 1, 0.5, 0.5]),
    ]
    report = parse(written(tmp_path, content(rows))).report
    assert (report.outside, report.no_area, report.thin, report.thin_dropped, report.dropped) == (1, 1, 2, 1, 3)
    assert report.empty_images == 2


def test_lists_of_ids_and_texts_of_images(tmp_path):
    images = [
        {"id": 1, "height": 4, "width": 5, "file_name": "é", "neg_category_ids": [], "coco_url": None},
        {"id": 2, "height": 4, "width": 5, "neg_category_ids": None, "not_exhaustive_category_ids": [9, 2]},
    ]
    data = load(tmp_path, content([], images=images))
    assert list(data.file_names) == ["é", None]
    assert list(data.coco_urls) == [None, None]
    assert data.neg_stated.tolist() == [True, False]
    assert [ids.tolist() for ids in data.not_exhaustive_category_ids] == [[], [9, 2]]
