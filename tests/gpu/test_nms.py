"""NMS by Triton on CUDA: what torchvision keeps on the CPU, ties included, without waiting for the device."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tailseg.model.boxes import keep_within_levels, multiclass_nms

pytest.importorskip("triton")

from tailseg.model.nms_triton import keep_sorted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = [2000, 2000, 1999, 64, 1, 0, 300]


def case(seed: int, *, whole: bool, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (2, N, 4) of sides up to ``most``, scores that fall within each level, and valid ones, on the CPU.

    ``whole`` pixels make overlaps tie with thresholds, and boxes without extent.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(2, sum(SIZES), 4, generator=generator) * most
    numbers = numbers.round() if whole else numbers
    boxes = torch.cat([numbers[..., :2] * 8, numbers[..., :2] * 8 + numbers[..., 2:]], dim=2)
    scores = torch.rand(2, sum(SIZES), generator=generator)
    scores = torch.cat([part.sort(dim=1, descending=True).values for part in scores.split(SIZES, dim=1)], dim=1)
    return boxes, scores, torch.rand(2, sum(SIZES), generator=generator) < 0.9


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("most", [6, 30, 150])
@pytest.mark.parametrize("whole", [True, False])
def test_levels_equal_the_cpu_and_repeat(whole, most, iou):
    boxes, scores, valid = case(most, whole=whole, most=most)
    expected = keep_within_levels(boxes, scores, valid, SIZES, iou)
    on_device = [part.cuda() for part in (boxes, scores, valid)]
    for _ in range(5):
        assert torch.equal(keep_within_levels(*on_device, SIZES, iou).cpu(), expected)


def test_one_long_list_and_one_chain():
    count = 10_000
    left = torch.arange(count) * 4.0
    boxes = torch.stack([left, torch.zeros(count), left + 12, torch.ones(count)], dim=1)[None].cuda()
    starts = torch.tensor([0, count], dtype=torch.int32, device="cuda")
    kept = keep_sorted(boxes, torch.ones(1, count, dtype=torch.bool, device="cuda"), starts, [count], 0.4)
    assert torch.equal(kept[0].nonzero().flatten().cpu(), torch.arange(0, count, 2))


def test_labels_are_lists_of_their_own():
    boxes, _, valid = case(3, whole=True, most=30)
    labels = torch.randint(0, 9, valid.shape, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, *accumulate(SIZES)], dtype=torch.int32, device="cuda")
    kept = keep_sorted(boxes.cuda(), valid.cuda(), starts, SIZES, 0.5, labels.cuda()).cpu()
    falling = torch.arange(sum(SIZES), 0, -1).float().expand(2, -1)
    for label in range(9):
        own = valid & (labels == label)
        assert torch.equal(kept & own, keep_within_levels(boxes, falling, own, SIZES, 0.5))


@pytest.mark.parametrize("limit", [100, 3000])
@pytest.mark.parametrize("threshold", [0.0, 0.9, 2.0])
def test_detections_equal_the_cpu(threshold, limit):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 1, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 20 + torch.rand(300, 1, 2, generator=generator) * 60], dim=2)
    scores = torch.randperm(300 * 40, generator=generator).view(300, 40) / (300 * 40)
    how = {"score_threshold": threshold, "iou": 0.5, "limit": limit}
    found, expected = multiclass_nms(boxes.cuda(), scores.cuda(), **how), multiclass_nms(boxes, scores, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_levels_wait_for_nothing():
    on_device = [part.cuda() for part in case(0, whole=False, most=60)]
    keep_within_levels(*on_device, SIZES, 0.7)  # kernels are compiled and sizes copied the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep_within_levels(*on_device, SIZES, 0.7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
