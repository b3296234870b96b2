"""Boundary AP: bands by hand and by brute force, and the whole against mask AP where the two must agree."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_erosion
from tiny import score_of as score

from tailseg.evaluation import boundary as module
from tailseg.evaluation.boundary import boundary
from tailseg.evaluation.metrics import ScoreOptions

BOTH = ScoreOptions(boundary=True)


def code(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def test_band_by_hand():
    mask = np.zeros((60, 80), dtype=bool)  # diagonal 100: the band is two pixels wide
    mask[10:20, 30:50] = True
    band = coco_mask.decode(boundary(code(mask))).astype(bool)
    expected = mask.copy()
    expected[12:18, 32:48] = False
    assert (band == expected).all()


@pytest.mark.parametrize("seed", range(5))
def test_band_by_repeated_erosion(seed):
    """Also at the image's edge, which counts as outline; an empty mask has an empty band."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((6, 8)) < 0.2 * seed
    mask = np.kron(coarse, np.ones((25, 25))).astype(bool)
    inner = binary_erosion(mask, np.ones((3, 3)), iterations=5)  # diagonal 250
    assert (coco_mask.decode(boundary(code(mask))).astype(bool) == (mask & ~inner)).all()


def annotation(box, index, **changes):
    x, y, w, h = box
    mask = np.zeros((200, 200), dtype=bool)
    mask[y : y + h, x : x + w] = True
    row = {"id": index, "image_id": 1, "category_id": 1, "bbox": box, "area": w * h, "segmentation": code(mask)}
    return row | changes


def data(*annotations):
    image = {"id": 1, "height": 200, "width": 200}
    return {"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": list(annotations)}


def test_outlines_are_judged_harder():
    """A square of 100 found 4 pixels too small on each side: mask IoU 0.85; the bands, 6 wide, share 2 of 6 pixels."""
    wide, narrow = (100**2 - 88**2), (92**2 - 80**2)
    shared = 92**2 - 88**2
    iou = shared / (wide + narrow - shared)
    assert iou < 0.5
    found = annotation([54, 54, 92, 92], 2, score=0.9)
    metrics = score(data(annotation([50, 50, 100, 100], 1)), [found], options=BOTH).metrics
    assert metrics["segm"]["AP"] == pytest.approx(0.7)
    assert metrics["boundary"]["AP"] == 0
    exact = annotation([50, 50, 100, 100], 2, score=0.9)
    metrics = score(data(annotation([50, 50, 100, 100], 1)), [exact], options=BOTH).metrics
    assert metrics["boundary"]["AP"] == pytest.approx(1)


def test_none_found_and_none_there():
    assert score(data(annotation([50, 50, 100, 100], 1)), [], options=BOTH).metrics["boundary"]["AP"] == 0
    found = annotation([54, 54, 92, 92], 2, score=0.9)
    assert score(data(), [found], options=BOTH).metrics["boundary"]["AP"] is None


@pytest.mark.parametrize("mask_areas", [False, True])
def test_bands_as_wide_as_the_masks_give_mask_ap(shared, monkeypatch, mask_areas):
    """Then both overlaps are the same, so that matching and accumulation must equal hotcoco's in every number."""
    monkeypatch.setattr(module, "BAND", 2.0)
    folder = shared / "data" / "lvis-val-100"
    files = folder / "lvis_val_100.json", folder / "dets_bbox_segm.json.gz"
    metrics = score(*files, iou_types=["segm"], options=BOTH, mask_areas=mask_areas).metrics
    assert metrics["boundary"] == pytest.approx(metrics["segm"], abs=1e-12)


def test_crowds_are_ignored_as_for_masks(monkeypatch):
    monkeypatch.setattr(module, "BAND", 2.0)
    content = data(annotation([0, 0, 100, 100], 1, iscrowd=1), annotation([120, 120, 40, 40], 2))
    rows = [annotation([x, x, 30, 30], 3, score=0.9 - x / 1000) for x in (0, 20, 60)]
    rows.append(annotation([120, 120, 40, 38], 4, score=0.5))
    metrics = score(content, rows, options=BOTH).metrics
    assert metrics["boundary"] == pytest.approx(metrics["segm"])
    assert metrics["boundary"]["AP50"] == pytest.approx(1)
