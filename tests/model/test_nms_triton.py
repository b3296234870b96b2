"""The NMS kernels, run by Triton's interpreter, against torchvision and against a loop in float64."""

import os
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of
from hypothesis import given
from hypothesis import strategies as st
from tiny import made
from torch import Tensor
from torchvision.ops import nms

from tailseg.layers.triton_support import has_triton
from tailseg.model import boxes as nms_module
from tailseg.model.boxes import keep_within_levels, multiclass_nms
from tailseg.model.rpn import RPN

if not has_triton():
    pytest.skip("Triton is not installed", allow_module_level=True)

from tailseg.model import nms_triton
from tailseg.model.nms_triton import keep_sorted, largest_float32

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several blocks of rows in short lists; the interpreter takes a row at a time."""
    monkeypatch.setattr(nms_triton, "ROW_BLOCK", 64)


def keep(boxes: Tensor, valid: Tensor, sizes: list[int], iou: float, labels: Tensor | None = None) -> Tensor:
    return keep_sorted(boxes, valid, torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), sizes, iou, labels)


def kept_by_torchvision(boxes: Tensor, valid: Tensor, sizes: list[int], iou: float, labels: Tensor) -> Tensor:
    """A call for every image, list and label; equal scores keep their order there."""
    expected = torch.zeros_like(valid)
    starts = [0, *accumulate(sizes)]
    for image in range(len(boxes)):
        for start, stop in pairwise(starts):
            for label in labels[image, start:stop].unique():
                rows = (valid[image, start:stop] & (labels[image, start:stop] == label)).nonzero().squeeze(1) + start
                expected[image, rows[nms(boxes[image, rows], torch.ones(len(rows)), iou)]] = True
    return expected


def kept_by_loop(boxes: list[list[float]], iou: float) -> list[int]:
    """Greedy, a pair of Python floats (float64) at a time; the best box comes first."""
    kept: list[int] = []
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        for k in kept:
            u1, v1, u2, v2 = boxes[k]
            shared = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
            union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
            if union > 0 and shared / union > iou:
                break
        else:
            kept.append(i)
    return kept


def whole_boxes(seed: int, count: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (2, count, 4) in whole pixels, so that overlaps tie, some without extent; valid; one of three labels."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, most, (2, count, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(0, most, (2, count, 2), generator=generator)], dim=2).float()
    valid = torch.rand(2, count, generator=generator) < 0.8
    return boxes, valid, torch.randint(0, 3, (2, count), generator=generator)


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.sampled_from([0, 1, 7, 63, 64, 65, 129, 150]), min_size=1, max_size=3),
    most=st.sampled_from([3, 12, 60]),
    iou=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 1.0]),
    grouped=st.booleans(),
)
def test_kept_as_by_torchvision(seed, sizes, most, iou, grouped):
    boxes, valid, labels = whole_boxes(seed, sum(sizes), most)
    expected = kept_by_torchvision(boxes, valid, sizes, iou, labels if grouped else torch.zeros_like(labels))
    assert torch.equal(keep(boxes, valid, sizes, iou, labels if grouped else None), expected)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 140), iou=st.floats(0.05, 0.95))
def test_kept_as_by_a_loop_in_float64(seed, count, iou):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(1, count, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 1 + torch.rand(1, count, 2, generator=generator) * 30], dim=2)
    kept = keep(boxes, torch.ones(1, count, dtype=torch.bool), [count], iou)
    assert kept[0].nonzero().flatten().tolist() == kept_by_loop(boxes[0].tolist(), iou)


@pytest.mark.parametrize("iou", [0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.75, 0.9])
def test_an_overlap_of_exactly_the_threshold_is_kept(iou):
    """0.3, 0.6 and 0.9 are smaller than the nearest float32, which torchvision's CPU minds."""
    percent = round(100 * iou)
    boxes = torch.tensor([[[0.0, 0, 100, 1], [0, 0, percent, 1], [200, 0, 300, 1], [200, 0, 201 + percent, 1]]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    kept = keep(boxes, valid, [4], iou)
    assert torch.equal(kept, kept_by_torchvision(boxes, valid, [4], iou, torch.zeros(1, 4)))
    assert kept[0, 2:].tolist() == [True, False]
    if iou == largest_float32(iou):
        assert kept[0, :2].all()


def test_thresholds_are_rounded_down():
    assert largest_float32(0.5) == 0.5
    for value in (0.1, 0.3, 0.6, 0.7):
        rounded = torch.tensor(largest_float32(value))
        assert rounded.item() <= value < torch.nextafter(rounded, torch.tensor(1.0)).item()


@pytest.mark.parametrize("count", [64, 130])
def test_a_chain_of_boxes_that_each_drop_the_next(count):
    """The longest way to an answer: every other box stays, and each must know of the one before."""
    left = torch.arange(count) * 4.0
    boxes = torch.stack([left, torch.zeros(count), left + 12, torch.ones(count)], dim=1)[None]
    kept = keep(boxes, torch.ones(1, count, dtype=torch.bool), [count], 0.4)
    assert kept[0].nonzero().flatten().tolist() == list(range(0, count, 2))


def test_the_same_box_again_and_again_is_kept_once():
    boxes = torch.tensor([3.0, 4, 30, 40]).repeat(1, 200, 1)
    valid = torch.ones(1, 200, dtype=torch.bool)
    valid[0, :70] = False  # and drop nothing
    assert keep(boxes, valid, [200], 0.5)[0].nonzero().flatten().tolist() == [70]
    assert keep(boxes, valid, [65, 135], 0.5)[0].nonzero().flatten().tolist() == [70]
    assert keep(boxes, valid, [100, 100], 0.5)[0].nonzero().flatten().tolist() == [70, 100]
    assert not keep(boxes, torch.zeros_like(valid), [200], 0.5).any()


def test_boxes_without_extent_and_numbers_that_are_none_drop_nothing():
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, nan, 9], [0, 0, 9, 9], [0, 0, inf, 9], [0, 0, 9, 9]]])
    valid = torch.ones(1, 6, dtype=torch.bool)
    kept = keep(boxes, valid, [6], 0.5)
    assert kept[0].tolist() == [True, True, True, True, True, False]
    assert torch.equal(kept, kept_by_torchvision(boxes, valid, [6], 0.5, torch.zeros(1, 6)))


@pytest.mark.parametrize(("images", "sizes"), [(0, [5, 3]), (2, [0, 0]), (2, [0]), (1, [0, 1, 0])])
def test_nothing_to_keep(images, sizes):
    boxes = torch.zeros(images, sum(sizes), 4)
    kept = keep(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool), sizes, 0.5)
    assert (kept.shape, kept.dtype) == (boxes.shape[:2], torch.bool)
    assert kept.all()


def test_boxes_that_do_not_lie_side_by_side():
    boxes, valid, labels = whole_boxes(0, 80, 20)
    spread = torch.zeros(2, 160, 8)[:, ::2, ::2].copy_(boxes)
    rows = [part.repeat_interleave(2, dim=1)[:, ::2] for part in (valid, labels)]
    assert torch.equal(keep(spread, rows[0], [50, 30], 0.4, rows[1]), keep(boxes, valid, [50, 30], 0.4, labels))


@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(0, 70), min_size=1, max_size=3))
def test_levels_as_without_kernels(seed, sizes):
    boxes, valid, _ = whole_boxes(seed, sum(sizes), 20)
    parts = torch.rand(2, sum(sizes), generator=torch.Generator().manual_seed(seed)).split(sizes, dim=1)
    scores = torch.cat([part.sort(dim=1, descending=True).values for part in parts], dim=1)
    expected = keep_within_levels(boxes, scores, valid, sizes, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms_module, "has_kernels", lambda _: True)
        assert torch.equal(keep_within_levels(boxes, scores, valid, sizes, 0.5), expected)


@pytest.mark.parametrize("training", [True, False])
def test_proposals_as_without_kernels(training, monkeypatch):
    torch.manual_seed(0)
    rpn = made(RPN, 8, pre_nms_train=90, pre_nms_test=70, post_nms_train=60, post_nms_test=20).eval()
    output = rpn([torch.randn(2, 8, side, side) * 3 for side in (16, 8, 4, 2, 1)])
    sizes = torch.tensor([[64, 60], [50, 64]])
    expected = rpn.propose(output, sizes, training=training)
    monkeypatch.setattr(nms_module, "has_kernels", lambda _: True)
    found = rpn.propose(output, sizes, training=training)
    assert found.valid.any()
    for name in ("boxes", "scores", "valid"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@given(
    seed=st.integers(0, 10_000),
    rois=st.integers(0, 12),
    agnostic=st.booleans(),
    first=st.sampled_from([1, 7, 4096]),
    limit=st.integers(1, 60),
    threshold=st.sampled_from([0.0, 0.3, 0.97, 2.0]),
)
def test_detections_as_without_kernels(seed, rois, agnostic, first, limit, threshold):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(rois, 1 if agnostic else 6, 4, generator=generator).cumsum(2) * 20
    scores = torch.randperm(rois * 6, generator=generator).view(rois, 6) / max(rois * 6, 1)
    how = {"score_threshold": threshold, "iou": 0.3, "limit": limit}
    expected = multiclass_nms(boxes, scores, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms_module, "FIRST_CANDIDATES", first)
        patch.setattr(nms_module, "has_kernels", lambda _: True)
        found = multiclass_nms(boxes, scores, **how)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_float32_on_cuda_goes_to_the_kernels_and_nothing_else(monkeypatch):
    assert not nms_module.has_kernels(torch.zeros(1, 4))
    on_device = torch.zeros(1, 4).as_subclass(type("OnDevice", (Tensor,), {"is_cuda": True}))
    assert nms_module.has_kernels(on_device)
    assert not nms_module.has_kernels(on_device.double())
    monkeypatch.setattr(nms_module, "has_triton", lambda: False)
    assert not nms_module.has_kernels(on_device)


def test_kernels_compile_for_gpus_and_round_each_step():
    lines = lines_of(Path(__file__).with_name("compile_nms.py"))
    assert len(lines) == 6
    assert all(int(size) > 0 and how == "exact" for *_, size, how in lines)
