"""Results files: what is written, merged and read back, and what is said about faulty rows."""

import errno
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from pycocotools import mask as coco_mask

from tailseg.errors import UserError
from tailseg.evaluation.pairs import Pairs
from tailseg.evaluation.reading import Cut, Known, read_results
from tailseg.evaluation.results import ResultsWriter, merge_results
from tailseg.structures import RawDetections

CATEGORY_IDS = [7, 9, 1000]


def detections(rows: int, seed: int = 0) -> RawDetections:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(rows, 2, generator=generator) * 20
    extent = torch.rand(rows, 2, generator=generator) * 20 + 1
    return RawDetections(
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
    tied = RawDetections(
        image_hw=found.image_hw, boxes=found.boxes, scores=close, labels=found.labels, masks=found.masks
    )
    with ResultsWriter(tmp_path / "r.json") as writer:
        writer.add(1, tied, CATEGORY_IDS)
    scores = [row["score"] for row in orjson.loads((tmp_path / "r.json").read_bytes())]
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
    assert orjson.loads((tmp_path / "a.json").read_bytes()) == orjson.loads((tmp_path / "b.json").read_bytes()) == []


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


@pytest.mark.parametrize("rows", [1, 100])
def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, rows):
    """It may be full while rows are written, or only as the last of them are."""
    path = tmp_path / "r.json"
    write(path, (1, 1))
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, mode: io.BufferedWriter(Full(path, mode)))
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
            write(path, (1, rows))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_merging_sorts_by_image_and_takes_a_repeated_image_once(tmp_path):
    write(tmp_path / "0.json", (1, 2), (30, 1), (9, 3))
    write(tmp_path / "1.json", (4, 2), (2, 0), (1, 2))
    write(tmp_path / "2.json")
    merge_results([tmp_path / f"{i}.json" for i in range(3)], tmp_path / "all.json")
    write(tmp_path / "alone.json", (1, 2), (4, 2), (9, 3), (30, 1))
    assert (tmp_path / "all.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert len(orjson.loads((tmp_path / "all.json").read_bytes())) == 8


def test_merging_nothing(tmp_path):
    write(tmp_path / "0.json")
    merge_results([tmp_path / "0.json"], tmp_path / "all.json")
    assert orjson.loads((tmp_path / "all.json").read_bytes()) == []


def test_merging_refuses_other_files(tmp_path):
    (tmp_path / "x.json").write_text('[{"score": 1, "image_id": 1}]')
    with pytest.raises(UserError, match="byte 0"):
        merge_results([tmp_path / "x.json"], tmp_path / "all.json")
    with pytest.raises(UserError, match=r"gone\.json: cannot be read"):
        merge_results([tmp_path / "gone.json"], tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()


def scored(rows: int, seed: int = 0) -> RawDetections:
    """Detections whose masks rank the other way round than their boxes."""
    found = detections(rows, seed)
    return replace(found, mask_scores=(1 - found.scores) / 3)


def write_scored(path, *images: tuple[int, int]) -> None:
    with ResultsWriter(path) as writer:
        for image_id, rows in images:
            writer.add(image_id, scored(rows, image_id), CATEGORY_IDS)


def test_masks_with_scores_of_their_own_keep_the_box_score_beside_it(tmp_path):
    """The score is the masks', as a test server of masks needs it; both are the same float32 when read back."""
    write_scored(tmp_path / "r.json", (5, 6), (8, 0), (9, 3))
    write(tmp_path / "plain.json", (5, 6), (8, 0), (9, 3))
    rows, plain = (json.loads((tmp_path / name).read_text()) for name in ("r.json", "plain.json"))
    found = [scored(6, 5), scored(3, 9)]
    assert np.float32([row["score"] for row in rows]).tolist() == torch.cat([f.mask_scores for f in found]).tolist()
    assert np.float32([row["box_score"] for row in rows]).tolist() == torch.cat([f.scores for f in found]).tolist()
    for row, other in zip(rows, plain, strict=True):
        assert "box_score" not in other
        assert row.pop("box_score") == other["score"]
        assert row | {"score": 0} == other | {"score": 0}  # boxes, masks and their order are the same
    known = Known(
        image_ids=np.array([5, 8, 9]),
        image_sizes=np.array([[32, 48]] * 3),
        category_ids=np.array(CATEGORY_IDS),
        judged=Pairs(np.zeros(0, np.int64), 3, np.ones(3, bool)),
    )
    columns = read_results(tmp_path / "r.json", "r.json", known, ["bbox", "segm"], Cut())
    assert columns.scores.astype(np.float32).tolist() == torch.cat([f.mask_scores for f in found]).tolist()
    assert columns.box_scores.astype(np.float32).tolist() == torch.cat([f.scores for f in found]).tolist()
    assert read_results(tmp_path / "plain.json", "r.json", known, ["bbox"], Cut()).box_scores is None


def test_a_mask_score_that_is_not_finite_leaves_its_row_out(tmp_path, caplog):
    found = scored(4)
    mask_scores, scores = found.mask_scores.clone(), found.scores.clone()
    mask_scores[1], scores[3] = float("nan"), float("inf")
    with ResultsWriter(tmp_path / "r.json") as writer:
        writer.add(1, replace(found, scores=scores, mask_scores=mask_scores), CATEGORY_IDS)
    rows = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert np.float32([row["box_score"] for row in rows]).tolist() == found.scores[[0, 2]].tolist()
    assert np.float32([row["score"] for row in rows]).tolist() == found.mask_scores[[0, 2]].tolist()
    assert "left out 2 detections" in caplog.text


def test_merging_keeps_both_scores(tmp_path):
    write_scored(tmp_path / "0.json", (30, 2), (9, 3))
    write_scored(tmp_path / "1.json", (4, 2), (2, 0), (9, 3))
    merge_results([tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "all.json")
    write_scored(tmp_path / "alone.json", (4, 2), (9, 3), (30, 2))
    assert (tmp_path / "all.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert all("box_score" in row for row in orjson.loads((tmp_path / "all.json").read_bytes()))
