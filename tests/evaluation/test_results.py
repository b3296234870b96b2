"""Results files: what is written, merged and read back, and what is said about faulty rows."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from tailseg.errors import UserError
from tailseg.evaluation.reading import read_json
from tailseg.evaluation.results import ResultsWriter, merge_results
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


def test_detections_that_are_nowhere_are_left_out(tmp_path, caplog):
    """JSON has no NaN, and a test server refuses a file with one, or with null in its place."""
    found = detections(5)
    boxes, scores = found.boxes.clone(), found.scores.clone()
    boxes[1, 2] = float("inf")
    boxes[4] = float("nan")
    scores[2] = float("nan")
    with ResultsWriter(tmp_path / "r.json") as writer:
        writer.add(1, replace(found, boxes=boxes, scores=scores), CATEGORY_IDS)
    rows = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert [np.float32(row["score"]) for row in rows] == found.scores[[0, 3]].tolist()
    assert "left out 3 detections" in caplog.text


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
