import json
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from annotation_files import annotation, content, fault, load
from foreign_files import attempt
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
    assert len(load_annotations(tmp_path / "boxes.json", tmp_path).labels) == 0
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
    "not a number": ('{"images": NaN}', "'images' is None"),
    "utf-16": (b"\xff\xfe{\0}\0", "the text is UTF-16; save it as UTF-8"),
    "no images": ({"annotations": [], "categories": []}, "'images' is missing"),
    "no annotations": ({"images": [], "categories": []}, "'annotations' is missing"),
    "wrong list": (content(images={}), "'images' is {}"),
    "wrong row": (content(categories=[3]), r"categories\[0\] is 3"),
    "image twice": (content(images=content()["images"][:1] * 2), "image 5: this id occurs more than once; give each"),
    "category twice": (
        content(categories=[{"id": 2, "name": "a"}, {"id": 2, "name": "b"}]),
        "category 2: this id occurs more",
    ),
    "no category": (
        content([annotation(3, 1, 8)]),
        "annotation 3: there is no category with the category_id 8; add it or remove this annotation",
    ),
    "category id missing": (
        content([annotation(1), {"id": 7, "image_id": 1}]),
        "annotation 7: its category_id is missing; add it",
    ),
    "image id as text": (
        content(images=[{"id": "a7", "height": 4, "width": 5}]),
        "image 'a7': its id is 'a7'; number them; `tailseg data convert coco` writes a copy in which this is done",
    ),
    "image without id": (content(images=[{"height": 4, "width": 5}]), "image number 1 of the list: its id is missing"),
    "image of many bits": (
        content(images=[{"id": 2**70, "height": 4, "width": 5}]),
        "its id is 1.18",
    ),
    "two kinds of ids": (
        content([], images=[{"id": i, "height": 4, "width": 5} for i in (-3, 2**64 - 1)]),
        "image -3: its id is below 0; 64 bits hold only one of them",
    ),
    "flat image": (
        content(images=[{"id": 1, "height": 0, "width": 5, "file_name": "a"}]),
        "image 1: it has height 0 and width 5; write both in pixels",
    ),
    "image without size": (
        content(images=[{"id": i, "file_name": "a"} for i in (1, 2, 3)]),
        r"image 1: it has height missing and width missing; .* \(1 of 3 such faults; `tailseg data check` lists",
    ),
    "no pictures": (content([], images=[]), "the list of images is empty"),
    "category name": (content(categories=[{"id": 2}]), "category 2: its name is missing; give each a name, a text"),
    "empty name": (content(categories=[{"id": 2, "name": ""}]), "category 2: its name is ''; give each"),
    "category id": (content(categories=[{"id": "x", "name": "a"}]), "category 'x': its id is 'x'; number them"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(tmp_path, name):
    data, expected = BAD[name]
    message = fault(tmp_path, data)
    with pytest.raises(UserError, match=expected):
        raise UserError(message)


def test_categories_listed_twice_are_taken_once(tmp_path):
    data = load(tmp_path, content(categories=[*content()["categories"], {"id": 2, "name": "cat", "frequency": "r"}]))
    assert [category.name for category in data.categories] == ["cat", "dog", "owl"]
    assert [(o.kind, o.count, o.places) for o in data.report.oddities] == [
        ("category_again", 1, ("category 2: 'cat'",))
    ]


@pytest.mark.parametrize("row", [{"id": "x", "name": "a"}, {"id": 5, "name": ""}, {"id": 5}])
def test_faulty_categories_are_refused_even_where_other_faults_are_counted(tmp_path, row):
    """Nothing can be said about classes that nobody knows."""
    made = content([annotation(1, image_id="x", category_id=77)], categories=[{"id": 2, "name": "cat"}, row])
    (tmp_path / "train.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=r"category '?[x5]'?: its (id|name) is [^(]*$"):
        load_annotations(tmp_path / "train.json", tmp_path, tolerant=True)


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


def test_what_is_left_out_is_counted_once(tmp_path):
    """No mask comes before outside, that before no area, and that before thin."""
    rows = [
        annotation(1, bbox=[60, 60, 0.5, 0.5], area=0, segmentation=[[60, 60, 61, 60, 61, 61]]),
        annotation(2, bbox=[1, 1, 0.5, 0.5], area=0),
        annotation(3, bbox=[1, 1, 0.5, 0.5], segmentation=[]),
        annotation(4, bbox=[1, 1, 0.5, 0.5]),
    ]
    report = parse(written(tmp_path, content(rows))).report
    assert [(o.kind, o.count) for o in report.oddities] == [("no_mask", 1), ("outside", 1), ("no_area", 1)]
    assert (report.thin, report.dropped, report.annotations) == (1, 3, 4)
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


@pytest.mark.parametrize(
    "ids", [(1.0, 2.0), (-7, -9), (2**63 - 1, -(2**63)), (2**63, 2**64 - 1), (1234567890123456789, 3)]
)
def test_ids_are_names_of_any_size_and_sign(tmp_path, ids):
    images = [{"id": number, "height": 40, "width": 50, "file_name": "a.jpg"} for number in ids]
    data = load(tmp_path, content([annotation(i, number) for i, number in enumerate(ids)], images=images))
    assert [data.image_id(i) for i in range(2)] == [int(number) for number in ids]
    assert data.annotation_ids.tolist() == [0, 1]
    assert np.diff(data.first_annotation).tolist() == [1, 1]


def test_ids_of_categories_and_annotations_may_be_floats_negative_or_missing(tmp_path):
    rows = [annotation(1.0, 5.0, -2), annotation(None, 1, -2.0), annotation("a", 1, 3), annotation(1, 1, 3)]
    del rows[1]["id"]
    data = load(tmp_path, content(rows, categories=[{"id": -2.0, "name": "a"}, {"id": 3, "name": "b"}]))
    assert data.label_to_category_id.tolist() == [-2, 3]
    assert data.labels.tolist() == [0, 0, 1, 1]
    oddities = {oddity.kind: (oddity.count, oddity.places) for oddity in data.report.oddities}
    assert oddities == {
        "annotation_id": (4, ("annotation number 2 of the list", "annotation 'a'", *["annotation 1"] * 2))
    }


def test_categories_of_one_name_are_told_apart(tmp_path):
    names = ["bolt", "nut", "bolt", "bolt (2)", "bolt"]
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    data = load(tmp_path, content([], categories=categories))
    assert [c.name for c in data.categories] == ["bolt", "nut", "bolt (3)", "bolt (2)", "bolt (4)"]
    (oddity,) = data.report.oddities
    assert (oddity.kind, oddity.count) == ("same_name", 2)
    assert oddity.places == ("category 3: 'bolt' is now 'bolt (3)'", "category 5: 'bolt' is now 'bolt (4)'")


@pytest.mark.parametrize("number", [3, 3.0])
def test_names_have_one_unicode_form(tmp_path, number):
    data = load(tmp_path, content([], categories=[{"id": number, "name": "cafe\u0301"}]))
    assert [c.name for c in data.categories] == ["caf\u00e9"]


def test_a_name_that_is_a_number_becomes_a_text(tmp_path):
    data = load(tmp_path, content([], categories=[{"id": 1, "name": 7}]))
    assert [c.name for c in data.categories] == ["7"]


def test_lists_of_categories_with_other_things_in_them(tmp_path):
    images = [{"id": 1, "height": 4, "width": 5, "neg_category_ids": ["x", 2, 4.0]}]
    images += [{"id": 2, "height": 4, "width": 5, "neg_category_ids": 7, "file_name": 3}]
    data = load(tmp_path, content([], images=images))
    assert [ids.tolist() for ids in data.neg_category_ids] == [[2, 4], []]
    assert list(data.file_names) == [None, None]
    (oddity,) = data.report.oddities
    assert (oddity.kind, oddity.places) == ("id_list", ("image 1: neg_category_ids", "image 2: neg_category_ids"))


def test_errors_are_counted_and_their_rows_left_out_if_asked_for(tmp_path):
    images = [{"id": 1, "height": 40, "width": 50}, {"id": 2, "width": 50}, {"id": "x"}]
    rows = [annotation(1), annotation(2, 2), annotation(3, 1, 77), annotation(4, 1, None)]
    (tmp_path / "a.json").write_text(json.dumps(content(rows, images=images)))
    with pytest.raises(UserError, match=r"a\.json: image 'x': its id is 'x'; .* \(1 of 4 such faults"):
        load_annotations(tmp_path / "a.json", tmp_path)
    data = load_annotations(tmp_path / "a.json", tmp_path, tolerant=True)
    assert (len(data), data.annotation_ids.tolist()) == (1, [1])
    counts = {oddity.kind: oddity.count for oddity in data.report.oddities}
    assert counts == {"image_id": 1, "image_size": 1, "no_category": 2, "no_image": 1}


odd = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=5)
)
keys = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation", "height", "width", "name"]
keys += ["file_name", "coco_url", "neg_category_ids", "not_exhaustive_category_ids", "frequency"]
changes = st.lists(
    st.tuples(st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 5), st.sampled_from(keys), odd)
)


@given(changes)
def test_whatever_stands_in_a_row_the_file_is_read_or_refused_in_a_sentence(tmp_path_factory, changes):
    data = content([annotation(i, (1, 5)[i % 2]) for i in range(4)])
    for part, row, key, value in changes:
        data[part][row % len(data[part])][key] = value
    path = tmp_path_factory.mktemp("a") / "a.json"
    path.write_text(json.dumps(data))
    found, sentence = attempt(parse, path)
    if found is None:
        assert sentence.startswith(f"{path}: ")
        assert "\n" not in sentence
        return
    assert found.report.annotations == len(found.columns["labels"]) + found.report.dropped
    assert np.isfinite(found.columns["boxes"]).all()
    assert np.isfinite(found.columns["areas"]).all()


@pytest.mark.parametrize("key", ["image", "id", "name", "segmentation", "bbox", "category_id"])
@pytest.mark.parametrize("levels", [1015, 100_000])  # orjson takes 1,024, Python's own repr fewer
def test_deep_nesting_is_told_in_a_sentence(tmp_path, key, levels):
    image = {"id": 1, "height": 10, "width": 10, "file_name": "a.jpg"}
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "segmentation": [[1, 1, 4, 1, 4, 4]]}
    category = {"id": 1, "name": "cat"}
    {"image": image, "id": category, "name": category}.get(key, row)["height" if key == "image" else key] = "DEEP"
    content = json.dumps({"images": [image], "annotations": [row], "categories": [category]})
    path = tmp_path / "a.json"
    path.write_text(content.replace('"DEEP"', "[" * levels + "]" * levels))
    if key in ("bbox", "segmentation") and levels < 1024:
        parse(path)  # the box is that of the mask, the object without a mask is left out
        return
    with pytest.raises(UserError, match=r"a\.json: ") as caught:
        parse(path)
    assert len(str(caught.value)) < 400


def test_an_image_too_large_to_be_read_is_refused_before_its_masks(tmp_path):
    path = tmp_path / "huge.json"
    whole = [0, 0, 65535, 0, 65535, 65535, 0, 65535]
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 65535, 65535], "segmentation": [whole]}
    content = {"images": [{"id": 1, "height": 65535, "width": 65535}], "annotations": [row]}
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(UserError, match="image 1: it has height 65535 and width 65535, more than 178,956,970 pixels"):
        parse(path)
    assert [odd.kind for odd in parse(path, tolerant=True).report.oddities] == ["image_size", "no_image"]
    content["images"][0] |= {"height": 2730, "width": 65535}  # fewer
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cat"}]}))
    assert parse(path).columns["image_sizes"].tolist() == [[2730, 65535]]


def test_thousands_of_categories_of_one_name_are_told_apart(tmp_path):
    """In steps as many as there are categories: this hung."""
    path = tmp_path / "a.json"
    names = ["a", "a (3)"] + ["a"] * 20_000 + ["b", "a (2)", "b"]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    path.write_text(
        json.dumps({"images": [{"id": 1, "height": 9, "width": 9}], "annotations": []} | {"categories": categories})
    )
    found = [category.name for category in parse(path).categories]
    assert len(set(found)) == len(found)
    assert found[:5] == ["a", "a (3)", "a (4)", "a (5)", "a (6)"]
    assert found[-4:] == ["a (20003)", "b", "a (2)", "b (2)"]
