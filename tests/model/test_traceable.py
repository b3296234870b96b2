"""The forms for `torch.export` beside the fast ones."""

from unittest.mock import patch

import pytest
import torch
from tiny import SMALL_RECIPE, noise_batch

from tailseg.export.detector import ExportedDetector
from tailseg.model.boxes import keep_within_levels, nms_within_groups
from tailseg.model.build import build_detector
from tailseg.model.roi_features import RoIPooler, pyramid_rows, roi_levels, shifted_roi_align
from tailseg.model.traceable import (
    keep_within_classes,
    roi_align_by_level,
    shifted_roi_align_by_level,
)
from tailseg.recipes import names
from tailseg.recipes.resolve import resolve

STRIDES = (4, 8, 16, 32)


def pyramid(height: int = 256, width: int = 320) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 6, height // s, width // s, generator=generator) for s in STRIDES]


def boxes(count: int, largest: float = 600) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(count, 2, generator=generator) * 200
    sides = torch.rand(count, 2, generator=generator) ** 2 * largest + 1
    return torch.cat([corners, corners + sides], dim=1)


def rois(found: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(len(found), 1), found], dim=1)


@pytest.mark.parametrize(("sampling", "aligned"), [(0, True), (2, True), (2, False)])
@pytest.mark.parametrize("count", [40, 1, 0])
def test_roi_align_by_level(count, sampling, aligned):
    maps, own = pyramid(), rois(boxes(count))
    levels = roi_levels(own[:, 1:], len(STRIDES))
    assert count < 40 or len(levels.unique()) == 4
    pooler = RoIPooler(7, sampling_ratio=sampling, aligned=aligned)
    found = roi_align_by_level(maps, own, levels, STRIDES, 7, sampling, aligned=aligned)
    torch.testing.assert_close(found, pooler(maps, own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [40, 0])
def test_shifted_roi_align_by_level(count):
    maps, own = pyramid(), rois(boxes(count))
    shifts = torch.randn(count, 2, 7, 7, generator=torch.Generator().manual_seed(2)) * 0.6  # also out of the picture
    levels = roi_levels(own[:, 1:], len(STRIDES))
    found = shifted_roi_align_by_level(maps, own, shifts, levels, STRIDES, 7)
    expected = shifted_roi_align(pyramid_rows(maps), own, shifts, 7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_keep_within_classes():
    generator = torch.Generator().manual_seed(3)
    candidates, labels = boxes(300, largest=150), torch.randint(0, 5, (300,), generator=generator)
    scores = torch.rand(300, generator=generator).sort(descending=True).values
    scores[-40:] = 0.0
    keep = keep_within_classes(candidates, scores, labels, 5, 0.5)
    expected = nms_within_groups(candidates[:-40], scores[:-40], labels[:-40], 0.5)
    assert keep.nonzero().squeeze(1).tolist() == sorted(expected.tolist())
    assert 20 < len(expected) < 260


def test_keep_within_classes_of_nothing():
    keep = keep_within_classes(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64), 2, 0.5)
    assert keep.tolist() == [False] * 3


def test_proposals_kept_within_levels():
    candidates = boxes(60, largest=400)[None]
    scores = torch.cat([torch.linspace(0.9, 0.1, size) for size in (40, 15, 5)])[None]
    valid = torch.ones(1, 60, dtype=torch.bool)
    valid[0, [3, 41]] = False
    expected = keep_within_levels(candidates, scores, valid, [40, 15, 5], 0.2)
    with patch("torch.compiler.is_exporting", return_value=True):
        found = keep_within_levels(candidates, scores, valid, [40, 15, 5], 0.2)
    assert found.tolist() == expected.tolist()
    assert 5 < int(found.sum()) < 55


ROWS = [(name, ()) for name in names() if name.startswith(("demo-table2/", "small/"))]
HTC = ("model.semantic.enabled=true", "model.mask_head={flow: true, interleaved: true, channels: 16}")
FORKS = ("model.rpn.convs=2", "model.rpn.fitted_strides=true", "test.min_size=1", "test.stage_average=scores")


@pytest.mark.parametrize(
    ("name", "settings"),
    [*ROWS, ("table2/cascade-mask-rcnn", HTC), ("table2/cascade-mask-rcnn", FORKS), ("table1/eql", ())],
)
def test_every_row_finds_what_it_finds_untraced(name, settings):
    """The traced forms of all parts together, run as they are."""
    torch.manual_seed(0)
    recipe = resolve(name, [*SMALL_RECIPE, "model.backbone.name=resnet10t", "test.tta=false", *settings])
    detector = build_detector(recipe, 7).eval()
    batch = noise_batch((128, 128), (120, 100), objects=2, num_classes=7, seed=1)
    expected = detector.detect(batch)[1]
    factor = batch.original_sizes[1] / batch.image_sizes[1]
    with torch.no_grad(), patch("torch.compiler.is_exporting", return_value=True):
        found = ExportedDetector(detector)(batch.images[1], batch.image_sizes[1])
    assert len(expected) == 20
    torch.testing.assert_close(found[0] * factor.flip(0).repeat(2), expected.boxes, rtol=0, atol=0.02)
    torch.testing.assert_close(found[1], expected.scores, rtol=0, atol=1e-5)
    assert found[2].tolist() == expected.labels.tolist()
    torch.testing.assert_close(found[3], expected.masks, rtol=0, atol=1e-4)
    assert len(found) == (4 if expected.mask_scores is None else 5)
    if expected.mask_scores is not None:
        torch.testing.assert_close(found[4], expected.mask_scores, rtol=0, atol=1e-5)
