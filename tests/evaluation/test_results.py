"""Results files: what is written, merged and read back, and what is said about faulty rows."""

import gzip
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from tailseg.errors import UserError
from tailseg.evaluation.results import ResultsWriter, merge_results, read_json, read_results
from tailseg.structures import Detections

CATEGORY_IDS = [7, 9, 1000]


def detections(rows: int, seed: int = 0) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(rows, 2, generator=generator) * 20
    extent = torch.rand(rows, 2, generator=generator) * 20 + 1
    return Detections(
        image_hw=(32, 48),
        boxes=torch.cat([corner, corner + extent], dim=1),
        scores=torch.rand(rows, generator=generator),
        labels=torch.randint(3, (rows,), generator=generator),
        masks=torch.rand(rows, 7, 7, generator=generator),
    )


def write(path, *images: tuple[int, int]) -> None:
    with ResultsWriter(path) as writer:
        for image_id, rows in images:
            writer.add(image_id, detections(rows, image_id), CATEGORY_IDS)


def test_rows_hold_what_was_detected(tmp_path):
    path = tmp_path / "new" / "results.json"
    write(path, (5, 3), (2, 0), (8, 2))
    rows = json.loads(path.read_text())
    assert [row["image_id"] for row in rows] == [5, 5, 5, 8, 8]
    assert not list(path.parent.glob("*.partial"))
    found = detections(3, 5)
    for row, box, score, label in zip(rows, found.boxes, found.scores, found.labels, strict=False):
        assert row["category_id"] == CATEGORY_IDS[label]
        assert np.float32(row["score"]) == score.numpy()  # the same float32, not a rounded one
        assert np.array_equal(np.float32(row["bbox"]), torch.cat([box[:2], box[2:] - box[:2]]).numpy())
        mask = coco_mask.decode(row["segmentation"])
        assert mask.shape == (32, 48)
        assert 0 < mask.sum() < box[2:].sub(box[:2]).add(1).prod()


def test_tied_and_close_scores_stay_apart_and_in_order(tmp_path):
    close = torch.tensor([0.3, 0.3, float(np.nextafter(np.float32(0.3), np.float32(0)))])
    found = detections(3)
    tied = Detections(image_hw=found.image_hw, boxes=found.boxes, scores=close, labels=found.labels, masks=found.masks)
    with ResultsWriter(tmp_path / "r.json") as writer:
        writer.add(1, tied, CATEGORY_IDS)
    scores = [row["score"] for row in read_json(tmp_path / "r.json")]
    assert scores[0] == scores[1] > scores[2]


def test_no_rows_are_an_empty_list(tmp_path):
    write(tmp_path / "a.json", (1, 0))
    write(tmp_path / "b.json")
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "b.json") == []


def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail():
        with ResultsWriter(path) as writer:
            writer.add(1, detections(1), CATEGORY_IDS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_merging_sorts_by_image_and_takes_a_repeated_image_once(tmp_path):
    write(tmp_path / "0.json", (1, 2), (30, 1), (9, 3))
    write(tmp_path / "1.json", (4, 2), (2, 0), (1, 2))
    write(tmp_path / "2.json")
    merge_results([tmp_path / f"{i}.json" for i in range(3)], tmp_path / "all.json")
    write(tmp_path / "alone.json", (1, 2), (4, 2), (9, 3), (30, 1))
    assert (tmp_path / "all.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert len(read_json(tmp_path / "all.json")) == 8


def test_merging_nothing(tmp_path):
    write(tmp_path / "0.json")
    merge_results([tmp_path / "0.json"], tmp_path / "all.json")
    assert read_json(tmp_path / "all.json") == []


def test_merging_refuses_other_files(tmp_path):
    (tmp_path / "x.json").write_text('[{"score": 1, "image_id": 1}]')
    with pytest.raises(UserError, match="byte 0"):
        merge_results([tmp_path / "x.json"], tmp_path / "all.json")
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        merge_results([tmp_path / "gone.json"], tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.json", b"", "empty"),
        ("blank.json", b"  \n", "empty"),
        ("cut.json", b'[{"image_id": 1,\n "sco', "line 2, column"),
        ("cut.json.gz", gzip.compress(b"[1, 2, 3]" * 99)[:-12], "not a whole gzip file"),
        ("plain.json.gz", b"[]", "not a whole gzip file"),
        ("bytes.json", b'["\xff\xfe"]', "not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def test_gzip_is_unpacked(tmp_path):
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(b'[{"a": 1}]'))
    assert read_json(tmp_path / "r.json.gz") == [{"a": 1}]


def row(**changes) -> dict:
    mask = np.zeros((32, 48), dtype=np.uint8, order="F")
    mask[3:5, 4:9] = 1
    counts = coco_mask.encode(mask)["counts"].decode()
    good = {"image_id": 1, "category_id": 7, "bbox": [4, 3, 5, 2.0], "score": 0.5}
    good["segmentation"] = {"size": [32, 48], "counts": counts}
    return {key: value for key, value in (good | changes).items() if value is not ...}


def read(rows, need=("bbox", "segm")):
    return read_results(rows, "r.json", {1: (32, 48), 2: (10, 10)}, {7, 9}, need)


def test_columns():
    polygon = [[4.0, 3.0, 9.0, 3.0, 9.0, 5.0, 4.0, 5.0]]
    uncompressed = {"size": [32, 48], "counts": [5, 3, 32 * 48 - 8]}
    columns = read([row(), row(score=1, segmentation=polygon), row(segmentation=uncompressed, category_id=9)])
    assert columns.scores.tolist() == [0.5, 1.0, 0.5]
    assert columns.category_ids.tolist() == [7, 7, 9]
    assert columns.boxes.tolist() == [[4, 3, 5, 2]] * 3
    assert columns.mask_areas.tolist() == [10, 10, 3]
    assert columns[np.array([2])].mask_areas.tolist() == [3]


def test_no_columns():
    columns = read([])
    assert len(columns) == 0
    assert columns.boxes.shape == (0, 4)
    assert columns.masks == []


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
        ({"category_id": 8}, "row 1 names category 8"),
        ({"category_id": None}, "category_id of row 1 is None"),
        ({"score": float("nan")}, "score of row 1 is nan"),
        ({"score": float("inf")}, "score of row 1 is inf"),
        ({"score": "0.5"}, "score of row 1 is '0.5'"),
        ({"score": None}, "score of row 1 is None"),
        ({"bbox": [1, 2, 3]}, "bbox of row 1"),
        ({"bbox": [1, 2, 3, None]}, "bbox of row 1"),
        ({"bbox": [1, 2, 3, float("nan")]}, "bbox of row 1"),
        ({"bbox": "1 2 3 4"}, "bbox of row 1"),
        ({"segmentation": {"size": [48, 32], "counts": "0"}}, "row 1 has the size"),
        ({"segmentation": {"counts": "0"}}, "row 1 has the size None"),
        ({"segmentation": {"size": [32, 48]}}, "row 1 has no run-length counts"),
        ({"segmentation": {"size": [32, 48], "counts": "oooo"}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": "\x00"}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": [-1, 5]}}, "row 1 is malformed"),
        ({"segmentation": {"size": [32, 48], "counts": [0, 32 * 48 + 1]}}, "row 1 is malformed"),
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
