"""Shares of boxes in regions against counted pixels; who is spared, and that a detector learns nothing there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import made

from tailseg.model.box_head import RoISampler
from tailseg.model.ignored_regions import NOWHERE, IgnoredRegions
from tailseg.model.matching import IGNORED, NEGATIVE, Matcher
from tailseg.model.rpn import RPN
from tailseg.structures import Proposals


def plain_share(cells: torch.Tensor, box: list[float]) -> float:
    """Area of a box in cells of 4 x 4 pixels that are 1, one cell at a time, as a share of the box."""
    x1, y1, x2, y2 = box
    covered = 0.0
    for row, column in cells.nonzero().tolist():
        width = min(x2, 4 * column + 4) - max(x1, 4 * column)
        height = min(y2, 4 * row + 4) - max(y1, 4 * row)
        covered += max(width, 0) * max(height, 0)
    return covered / ((x2 - x1) * (y2 - y1))


@given(st.integers(0, 2**32 - 1))
def test_shares_equal_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(2, 8, 12, generator=generator) < 0.5).to(torch.uint8)
    corners = torch.rand(2, 6, 2, 2, generator=generator) * 70 - 10  # some beyond the image
    boxes = torch.cat([corners.amin(2), corners.amax(2) + 0.5], dim=2)
    found = IgnoredRegions(cells).share(boxes)
    for image in range(2):
        for box, share in zip(boxes[image].tolist(), found[image].tolist(), strict=True):
            assert share == pytest.approx(plain_share(cells[image], box), abs=2e-4)


def test_negatives_with_half_their_area_inside_are_spared():
    cells = torch.zeros(1, 8, 8, dtype=torch.uint8)
    cells[:, :, 4:] = 1  # x from 16 on
    boxes = torch.tensor([[[8.0, 0, 24, 8], [7, 0, 24, 8], [20, 20, 28, 28], [20, 20, 28, 28], [9, 9, 9, 20]]])
    matched = torch.tensor([[NEGATIVE, NEGATIVE, NEGATIVE, 3, NEGATIVE]])
    spared = IgnoredRegions(cells).spare(matched, boxes)
    assert spared.tolist() == [[IGNORED, NEGATIVE, IGNORED, 3, NEGATIVE]]


def test_nothing_to_ignore_leaves_the_assignment():
    matched = torch.tensor([[NEGATIVE, 1]])
    assert NOWHERE.spare(matched, torch.zeros(1, 2, 4)) is matched
    assert IgnoredRegions(torch.zeros(3, 0, 0)).sums is None
    cells = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert IgnoredRegions(cells).share(torch.zeros(1, 0, 4)).shape == (1, 0)


def everywhere(height: int, width: int) -> IgnoredRegions:
    return IgnoredRegions(torch.ones(1, height // 4, width // 4, dtype=torch.uint8))


def test_no_anchor_in_a_region_is_trained_but_positives():
    rpn = made(RPN, 8)
    output = rpn([torch.zeros(1, 8, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)])
    sizes, box = torch.tensor([[65, 65]]), torch.tensor([[[8.0, 8, 40, 40]]])
    nobody = torch.tensor([[False]])
    inside = everywhere(64, 64)
    usable = torch.ones(1, len(output.anchors), dtype=torch.bool)
    drawn = inside.spare(rpn.matcher(output.anchors[None], usable, box, nobody), output.anchors[None])
    x1, y1, x2, y2 = output.anchors.unbind(1)
    seen = (x2.clamp(0, 64) - x1.clamp(0, 64)) * (y2.clamp(0, 64) - y1.clamp(0, 64)) / ((x2 - x1) * (y2 - y1))
    sure = (seen - 0.5).abs() > 1e-4  # rounding decides at one half
    assert torch.equal((drawn[0] == NEGATIVE)[sure], seen[sure] < 0.5)
    assert (drawn[0] == IGNORED).sum() > 20
    with torch.no_grad():
        rpn.objectness.weight.zero_()
        output = rpn([torch.ones(1, 8, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)])
    rpn.inside_image = True  # none of these is left
    assert rpn.loss(output, sizes, box, nobody)["rpn_objectness"] > 0.68  # log 2
    assert rpn.loss(output, sizes, box, nobody, inside)["rpn_objectness"] == 0


def test_roi_sampler_takes_no_negatives_from_a_region():
    half = Matcher(positive_iou=0.5, negative_iou=0.5)
    sampler = made(RoISampler, half, num_classes=7, num_samples=6, max_positive=2)
    boxes = torch.tensor([[[4.0, 4, 24, 24]]])
    places = torch.tensor([[[4.0, 4, 24, 25], [32, 32, 60, 60], [40, 8, 60, 20]]])
    proposals = Proposals(boxes=places, scores=torch.ones(1, 3), valid=torch.ones(1, 3, dtype=torch.bool))
    arguments = proposals, boxes, torch.tensor([[2]]), torch.tensor([[True]])
    assert sampler(*arguments).labels[:4].tolist() == [2, 2, 7, 7]
    cells = torch.zeros(1, 16, 16, dtype=torch.uint8)
    cells[:, 8:, 8:] = 1  # the lower right quarter, where the second proposal lies
    targets = sampler(*arguments, IgnoredRegions(cells))
    assert targets.valid.tolist() == [True, True, True, False]
    assert targets.rois[2, 1:].tolist() == [40, 8, 60, 20]
