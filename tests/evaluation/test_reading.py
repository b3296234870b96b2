"""Results files read back: what columns they become, what is let go on the way, what is said about faults."""

import gzip
import json
import pickle
import tracemalloc

import numpy as np
import orjson
import pytest
from pycocotools import mask as coco_mask

from tailseg.errors import UserError
from tailseg.evaluation import reading
from tailseg.evaluation.pairs import Pairs
from tailseg.evaluation.reading import Cut, Known, read_results


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.json", b"", "empty"),
        ("blank.json", b"  \n", "empty"),
        ("cut.json", b'[{"image_id": 1,\n "sco', "line 2, byte"),
        ("cut.json.gz", gzip.compress(b"[1, 2, 3]" * 99, mtime=0)[:-12], "not a whole gzip file"),
        ("bytes.json", b'["\xff\xfe"]', "not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_results(tmp_path / name, str(tmp_path / name), known(), (), Cut())
    assert name in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        read_results(tmp_path / "gone.json", "gone.json", known(), (), Cut())
    with pytest.raises(UserError, match="cannot be read"):
        read_results(tmp_path, "folder", known(), (), Cut())


def test_gzip_is_unpacked(tmp_path):
    # Whatever its name; and a byte order mark may stand first.
    for name, pack in (("r.json", gzip.compress), ("plain.json.gz", bytes), ("marked.json", b"\xef\xbb\xbf".__add__)):
        (tmp_path / name).write_bytes(pack(orjson.dumps([row(), row(score=1)])))
        assert read_results(tmp_path / name, name, known(), ("bbox",), Cut()).scores.tolist() == [0.5, 1]


def row(**changes) -> dict:
    mask = np.zeros((32, 48), dtype=np.uint8, order="F")
    mask[3:5, 4:9] = 1
    counts = coco_mask.encode(mask)["counts"].decode()
    good = {"image_id": 1, "category_id": 7, "bbox": [4, 3, 5, 2.0], "score": 0.5}
    good["segmentation"] = {"size": [32, 48], "counts": counts}
    return {key: value for key, value in (good | changes).items() if value is not ...}


def judged(matrix: list[list[bool]]) -> Pairs:
    return Pairs.of(*np.nonzero(matrix), len(matrix[0]), np.zeros(len(matrix), bool))


def known(**changes) -> Known:
    about = {
        "image_ids": np.array([1, 2]),
        "image_sizes": np.array([[32, 48], [10, 10]]),
        "category_ids": np.array([7, 9]),
        "judged": judged([[True, True], [True, True]]),
    }
    return Known(**(about | changes))


def read(rows, need=("bbox", "segm"), cut=Cut(), about=None):  # noqa: B008
    return read_results(rows, "r.json", about or known(), need, cut)


def test_columns():
    polygon = [[4.0, 3.0, 9.0, 3.0, 9.0, 5.0, 4.0, 5.0]]
    uncompressed = {"size": [32, 48], "counts": [5, 3, 32 * 48 - 8]}
    columns = read([row(), row(score=1, segmentation=polygon), row(segmentation=uncompressed, category_id=9)])
    assert columns.scores.tolist() == [0.5, 1.0, 0.5]
    assert columns.categories.tolist() == [0, 0, 1]
    assert columns.boxes.tolist() == [[4, 3, 5, 2]] * 3
    assert columns.mask_areas.tolist() == [10, 10, 3]
    assert columns[np.array([2])].mask_areas.tolist() == [3]


def test_no_columns():
    columns = read([])
    assert len(columns) == 0
    assert columns.boxes.shape == (0, 4)
    assert columns.counts.tolist() == []


def test_boxes_are_optional_for_masks_but_for_all_rows_alike():
    assert read([row(bbox=...)], ["segm"]).boxes is None
    with pytest.raises(UserError, match="row 1 has no 'bbox'"):
        read([row(), row(bbox=...)], ["segm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": ...}, "row 1 has no 'image_id'"),
        ({"category_id": ...}, "row 1 has no 'category_id'"),
        ({"score": ...}, "row 1 has no 'score'"),
        ({"bbox": ...}, "row 1 has no 'bbox'"),
        ({"segmentation": ...}, "row 1 has no 'segmentation'"),
        ({"image_id": 3}, "row 1 names image 3"),
        ({"image_id": "1"}, "image_id of row 1 is '1', expected a whole number"),
        ({"image_id": 1.5}, "image_id of row 1 is 1.5"),
        ({"image_id": 2**70}, "image_id of row 1"),
        ({"category_id": None}, "category_id of row 1 is None"),
        ({"score": float("nan")}, "score of row 1 is nan"),
        ({"score": float("inf")}, "score of row 1 is inf"),
        ({"score": "0.5"}, "score of row 1 is '0.5'"),
        ({"score": None}, "score of row 1 is None"),
        ({"bbox": [1, 2, 3]}, "bbox of row 1"),
        ({"bbox": [1, 2, 3, None]}, "bbox of row 1"),
        ({"bbox": [1, 2, 3, 10**400]}, "bbox of row 1"),
        ({"score": 10**400}, "score of row 1"),
        ({"bbox": [1, 2, 3, float("nan")]}, "bbox of row 1"),
        ({"bbox": "1 2 3 4"}, "bbox of row 1"),
        ({"segmentation": {"size": [48, 32], "counts": "0"}}, "row 1 has the size"),
        ({"segmentation": {"counts": "0"}}, "row 1 has the size None"),
        ({"segmentation": {"size": [32, 48]}}, "row 1 has no run-length counts"),
        ({"segmentation": {"size": [32, 48], "counts": "oooo"}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": "\x00"}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": [-1, 5]}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": [0, 32 * 48 + 1]}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": "pqrs"}}, r"row 1 is malformed \(not a compressed RLE\)"),
        ({"segmentation": {"size": [32, 48], "counts": "é3"}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": "523"}}, "RLE covers 10 pixels but its size is 32 x 48"),
        ({"segmentation": {"size": [32, 48], "counts": [5, 2, 3]}}, "RLE covers 10 pixels but its size is 32 x 48"),
        ({"segmentation": [[0, 0, 9e6, 2] * 80]}, "row 1 has a polygon whose outline is longer than 10,000,000 pixels"),
        ({"segmentation": "mask"}, "neither a run-length code nor"),
        ({"segmentation": None}, "neither a run-length code nor"),
    ],
)
def test_faulty_rows_are_named(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read([row(), row(**changes)])
    assert str(caught.value).startswith("r.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "message"), [({}, "found an object"), ("x", "a string"), ([row(), 5], "row 1 is")])
def test_rows_that_are_none(rows, message):
    with pytest.raises(UserError, match=message):
        read(rows)


def test_masks_that_nobody_looked_for_are_let_go():
    about = known(judged=judged([[True, False], [True, True]]))
    columns = read([row(), row(category_id=9), row(score=0.4)], about=about)
    assert columns.scores.tolist() == [0.5, 0.4]
    assert columns.counts.tolist() == [row()["segmentation"]["counts"]] * 2
    # It takes its place among the best all the same.
    columns = read([row(score=0.3), row(category_id=9)], about=about, cut=Cut(limit=1))
    assert len(columns) == 0
    with pytest.raises(UserError, match="row 0 is malformed"):  # and its mask must be sound
        read([row(category_id=9, segmentation={"size": [32, 48], "counts": "oooo"})], about=about)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2500])
def test_run_lengths_of_half_an_image_are_named_wherever_they_stand(place):
    """A mask of 16 x 24 pixels, whose code says 32 x 48: `pycocotools` scores it as some other mask."""
    half = coco_mask.encode(np.ones((16, 24), np.uint8, order="F"))["counts"].decode()
    rows = [row() for _ in range(2501)]
    rows[place] = row(segmentation={"size": [32, 48], "counts": half})
    with pytest.raises(UserError) as caught:
        read(rows)
    sentence = f"r.json: segmentation of row {place} is malformed (the RLE covers 384 pixels but its size is 32 x 48)"
    assert str(caught.value) == sentence


def test_ties_at_the_limit_go_to_the_earlier_row():
    rows = [row(bbox=[i, 0, 1, 1], score=0.5) for i in range(4)] + [row(bbox=[9, 0, 1, 1], score=0.6)]
    assert read(rows, cut=Cut(limit=3)).boxes[:, 0].tolist() == [0, 1, 9]


def test_the_best_of_each_class_over_all_images():
    small = {"size": [10, 10], "counts": [0, 3, 97]}
    rows = [row(score=s, image_id=1 + i % 2, category_id=7 + i % 3 // 2 * 2) for i, s in enumerate((3, 5, 4, 1, 2, 6))]
    for entry in rows[1::2]:
        entry["segmentation"] = small
    columns = read(rows, cut=Cut(limit=2, per_class=True))
    assert columns.scores.tolist() == [3, 5, 4, 6]
    assert columns.categories.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_a_file_read_in_pieces_is_the_same(tmp_path, monkeypatch, chunk, indent):
    """Whatever the size of the pieces, and however early the best are picked."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        size = [32, 48] if i % 3 else [10, 10]
        mask = {"size": size, "counts": [int(rng.integers(9)), 3, size[0] * size[1]]}
        mask["counts"][2] -= sum(mask["counts"][:2])
        rows.append(row(image_id=1 if i % 3 else 2, score=int(rng.integers(9)) / 8, segmentation=mask))
    (tmp_path / "r.json").write_text(json.dumps(rows, indent=indent))
    (tmp_path / "r.json.gz").write_bytes(gzip.compress((tmp_path / "r.json").read_bytes()))
    whole = read(rows, cut=Cut(limit=7))
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    monkeypatch.setattr(reading, "_SETTLE", 5)
    for name in ("r.json", "r.json.gz"):
        pieces = read(tmp_path / name, cut=Cut(limit=7))
        assert len(pieces) == 14
        for column in ("images", "categories", "scores", "boxes", "mask_areas", "counts"):
            assert getattr(pieces, column).tolist() == getattr(whole, column).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace(b'"score": 0.25', b'"score": NaN'), "line 26, byte .*NaN is no JSON number"),
        (lambda t: t.replace(b'"score": 0.25', b'"score": -Infinity'), "line 26, byte .*Infinity is no JSON number"),
        (lambda t: t.replace(b'"score": 0.25', b'"score": "0.25"'), "score of row 25 is '0.25'"),
        (lambda t: t.replace(b'"score": 0.25', b'"image_id": "1"'), "image_id of row 25 is '1', expected a whole"),
        (lambda t: t[:-9], "not valid JSON at line 40"),
        (lambda t: b"", "the file is empty"),
        (lambda t: b" " * 500, "the file is empty"),
        (lambda t: b'{"images": ' + t + b"}", "expected a list of results rows, found an object"),
        (lambda t: b"null", "expected a list of results rows, found null"),
    ],
)
def test_faults_in_a_file_read_in_pieces(tmp_path, monkeypatch, change, message):
    lines = [json.dumps(row(score=0.25 if i == 25 else 0.5)) for i in range(40)]
    text = change(("[" + ",\n".join(lines) + "]").encode())
    (tmp_path / "r.json").write_bytes(text)
    for chunk in (200, 1 << 20):
        monkeypatch.setattr(reading, "_CHUNK", chunk)
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / "r.json")
        assert str(caught.value).startswith("r.json: ")
        assert "\n" not in str(caught.value)


def test_objects_within_rows_and_brackets_in_strings_are_no_seams(tmp_path, monkeypatch):
    rows = [row(note="}, {", parts=[{"a": 1}, {"b": {}}], score=i / 8) for i in range(8)]
    rows[3]["note"] = "}"
    (tmp_path / "r.json").write_text(json.dumps(rows))
    monkeypatch.setattr(reading, "_CHUNK", 50)
    assert read(tmp_path / "r.json").scores.tolist() == [i / 8 for i in range(8)]


def test_many_detections_of_one_image_take_little_memory(tmp_path, monkeypatch):
    """Far less than all rows would take as Python objects: what does not count is dropped on the way."""
    line = json.dumps(row()).encode()
    (tmp_path / "r.json").write_bytes(b"[" + b",\n".join([line] * 60_000) + b"]")
    monkeypatch.setattr(reading, "_CHUNK", 1 << 17)
    monkeypatch.setattr(reading, "_SETTLE", 1000)
    tracemalloc.start()
    columns = read(tmp_path / "r.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(columns) == 300
    assert peak < 60_000 * len(line) / 2


def two_rankings(*pairs: tuple[float, float]) -> list[dict]:
    """Rows with a score of the box and one of the mask, numbered by the x of their boxes."""
    return [row(bbox=[i, 0, 1, 1], box_score=box, score=mask) for i, (box, mask) in enumerate(pairs)]


def places(columns) -> list[int]:
    return columns.boxes[:, 0].astype(int).tolist()


def test_each_ranking_keeps_its_own_best():
    rows = two_rankings((0.9, 0.1), (0.1, 0.9), (0.8, 0.3), (0.2, 0.8), (0.3, 0.2), (0.4, 0.85))
    for limit, boxes, masks in (
        (1, [0], [1]),
        (2, [0, 2], [1, 5]),
        (3, [0, 2, 5], [1, 3, 5]),
        (6, [*range(6)], [*range(6)]),
    ):
        cut = Cut(limit=limit)
        columns = read(rows, cut=cut)
        assert places(columns) == sorted({*boxes, *masks})
        of_boxes, of_masks = (columns.ranked(kind, cut) for kind in ("bbox", "segm"))
        assert (places(of_boxes), places(of_masks)) == (boxes, masks)
        assert of_boxes.scores.tolist() == [rows[i]["box_score"] for i in boxes]
        assert of_masks.scores.tolist() == [rows[i]["score"] for i in masks]


def test_without_box_scores_both_rankings_are_one():
    columns = read([row(score=s) for s in (0.1, 0.7, 0.4)], cut=Cut(limit=2))
    assert columns.box_scores is None
    for kind in ("bbox", "segm"):
        assert columns.ranked(kind, Cut(limit=2)).scores.tolist() == [0.7, 0.4]


def test_what_nobody_looked_for_takes_its_place_in_either_ranking():
    about = known(judged=judged([[True, False], [True, True]]))
    rows = two_rankings((0.9, 0.1), (0.5, 0.9), (0.4, 0.5))
    rows[0]["category_id"] = 9  # not judged in this image
    for limit, boxes, masks in ((1, [], [1]), (2, [1], [1, 2]), (3, [1, 2], [1, 2])):
        cut = Cut(limit=limit)
        columns = read(rows, about=about, cut=cut)
        assert (places(columns.ranked("bbox", cut)), places(columns.ranked("segm", cut))) == (boxes, masks)


def test_the_best_of_each_class_in_either_ranking():
    rows = two_rankings((0.9, 0.1), (0.1, 0.9), (0.2, 0.3), (0.3, 0.2))
    for entry in rows[2:]:
        entry["category_id"] = 9
    cut = Cut(limit=1, per_class=True)
    columns = read(rows, cut=cut)
    assert (places(columns.ranked("bbox", cut)), places(columns.ranked("segm", cut))) == ([0, 3], [1, 2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (..., "r.json: row 2 has no 'box_score'; every row needs one here"),
        (float("nan"), "r.json: box_score of row 2 is nan, expected a finite number"),
        (None, "r.json: box_score of row 2 is None, expected a finite number"),
        ("0.5", "r.json: box_score of row 2 is '0.5', expected a finite number"),
    ],
)
def test_a_faulty_box_score_is_named(tmp_path, monkeypatch, value, message):
    rows = [row(box_score=0.5), row(box_score=0.25), row(box_score=value), row(box_score=0.5)]
    with pytest.raises(UserError) as caught:
        read(rows)
    assert str(caught.value) == message
    if value is ...:  # the same sentence where the row comes with a later piece of the file
        monkeypatch.setattr(reading, "_CHUNK", 120)
        (tmp_path / "r.json").write_text(json.dumps(rows))
        with pytest.raises(UserError) as caught:
            read(tmp_path / "r.json")
        assert str(caught.value) == message


@pytest.mark.parametrize("chunk", [100, 700])
def test_two_rankings_of_a_file_read_in_pieces(tmp_path, monkeypatch, chunk):
    rng = np.random.default_rng(1)
    rows = two_rankings(*(rng.integers(0, 9, (80, 2)) / 8).tolist())
    (tmp_path / "r.json").write_text(json.dumps(rows))
    cut = Cut(limit=7)
    whole = read(rows, cut=cut)
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    monkeypatch.setattr(reading, "_SETTLE", 5)
    pieces = read(tmp_path / "r.json", cut=cut)
    for kind, key in (("bbox", "box_score"), ("segm", "score")):
        best = sorted(sorted(range(80), key=lambda i, key=key: -rows[i][key])[:7])  # ties to the earlier row
        assert places(pieces.ranked(kind, cut)) == places(whole.ranked(kind, cut)) == best


@pytest.mark.parametrize("key", ["image_id", "score", "bbox", "segmentation"])
@pytest.mark.parametrize("levels", [1015, 100_000])  # orjson takes 1,024, Python's own repr fewer
def test_deep_nesting_is_told_in_a_sentence(tmp_path, key, levels):
    content = orjson.dumps([row(**{key: "DEEP"})]).replace(b'"DEEP"', b"[" * levels + b"]" * levels)
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.json: ") as caught:
        read_results(tmp_path / "r.json", str(tmp_path / "r.json"), known(), ("bbox", "segm"), Cut())
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_a_category_that_is_not_listed_takes_its_place_and_finds_nothing(tmp_path, monkeypatch, caplog, chunk):
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    rows = [row(score=0.4), row(category_id=8, score=0.9), row(score=0.8), row(score=0.7), row(category_id=99)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    columns = read(tmp_path / "r.json", cut=Cut(limit=2))
    assert (columns.scores.tolist(), columns.categories.tolist()) == ([0.8], [0])
    assert caplog.messages == [
        "r.json: 2 of 5 rows have an unknown category (row 1 names category 8, which the annotation file does not"
        " have); they take their places among the best of an image, no more."
    ]
    # Of the best of each class over all images it takes none.
    columns = read(tmp_path / "r.json", cut=Cut(limit=2, per_class=True))
    assert (columns.scores.tolist(), columns.categories.tolist()) == ([0.8, 0.7], [0, 0])
    assert caplog.messages[1].endswith("; they are left out.")
    # In either ranking of masks with scores of their own.
    both = [one | {"box_score": 1 - one["score"]} for one in rows]
    for cut, boxes, masks in ((Cut(limit=2), [0.6], [0.8]), (Cut(limit=3), [0.6, 0.3], [0.8, 0.7])):
        columns = read(both, cut=cut)
        assert columns.ranked("bbox", cut).scores.tolist() == pytest.approx(boxes)
        assert columns.ranked("segm", cut).scores.tolist() == masks
        assert set(columns.categories.tolist()) == {0}


def test_rows_of_no_category_that_is_listed_are_of_other_data():
    with pytest.raises(UserError) as caught:
        read([row(category_id=8), row(category_id=10)])
    assert str(caught.value) == (
        "r.json: row 0 names category 8, which the annotation file does not have; score against the split that the"
        " results were made on"
    )


def test_rows_without_a_mask_are_counted(caplog):
    triangle = [4.0, 3.0, 9.0, 3.0, 9.0, 9.0]
    nothing = [[], [[4, 3, 9, 5]], [[4, 3, 9, 3, 9]], [[*triangle[:5], float("nan")]], [[0, 0], [1, 1, 5, 5]]]
    nothing += [{"size": [32, 48], "counts": counts} for counts in ("", [])]
    fine = [[triangle], [triangle, []], [[*triangle, 7]], {"size": [32, 48], "counts": [32 * 48]}]
    columns = read([row(segmentation=one) for one in fine + nothing])
    assert columns.mask_areas.tolist() == [*[columns.mask_areas[0]] * 3, *[0] * (1 + len(nothing))]
    assert columns.mask_areas[0] > 0
    assert caplog.messages == ["r.json: 7 of 11 rows have no mask (first: row 4); they find nothing in segm."]
    caplog.clear()
    read([row(), row(segmentation={"size": [32, 48], "counts": [32 * 48]})])
    read([row(segmentation=[])], ["bbox"])
    read([])
    assert caplog.messages == []
    empty = coco_mask.encode(np.zeros((32, 48), np.uint8, order="F"))["counts"].decode()
    read([row(segmentation={"size": [32, 48], "counts": counts}) for counts in (empty, "")])
    assert caplog.messages == ["r.json: 1 of 2 rows have no mask (first: row 1); they find nothing in segm."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([row()]), "a Python pickle, expected JSON; have mmdetection write that, with `outfile_prefix`"),
        (json.dumps([row()]).encode("utf-16"), "text in UTF-16, expected UTF-8; save it as UTF-8"),
        (json.dumps([row()]).encode("utf-16-be"), "text in UTF-16, expected UTF-8; save it as UTF-8"),
        (b"\n".join(json.dumps(row()).encode() for _ in "ab"), "a row on each line (JSON lines), expected a list; put"),
        (
            json.dumps({"annotations": [row()]}).encode(),
            'found an object; give the list in it, often under "annotations',
        ),
        (json.dumps({"annotations": [row()]}, indent=1).encode(), "expected a list of results rows, found an object"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, content, message):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "r.json")
    assert str(caught.value).startswith("r.json: ")
    assert message in str(caught.value)
