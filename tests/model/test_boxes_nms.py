"""NMS against the recording and against greedy loops; the device's path against the CPU's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import nms

from tailseg.model import boxes as nms_module
from tailseg.model.boxes import keep_within_levels, multiclass_nms, nms_within_groups, pairwise_iou, with_float64


def random_boxes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    corner = torch.rand(*shape, 2, generator=generator) * 40
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2, generator=generator) * 30], dim=-1)


def greedy(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, threshold: float) -> list[int]:
    """Greedy NMS, a box at a time, best first."""
    iou = pairwise_iou(boxes, boxes)
    kept: list[int] = []
    for candidate in scores.argsort(descending=True).tolist():
        if all(groups[k] != groups[candidate] or iou[k, candidate] <= threshold for k in kept):
            kept.append(candidate)
    return kept


def test_recorded_detections(recorded, check):
    seen = []
    for case, inputs, _, outputs in recorded("proposals_nms"):
        if case["kind"] != "class_nms":
            continue
        about = case["settings"]
        scores = inputs["scores"][:, :-1]
        boxes, best, labels, rows = multiclass_nms(
            inputs["boxes"].view(len(scores), -1, 4),
            scores,
            score_threshold=about["score_thr"],
            iou=about["iou_thr"],
            limit=about["max_per_img"],
        )
        check(case, "bboxes", boxes, outputs["bboxes"])
        check(case, "scores", best, outputs["scores"])
        check(case, "labels", labels, outputs["labels"])
        check(case, "roi", rows, outputs["roi"])
        seen.append(case["name"])
    assert seen == ["agnostic", "per_class"]


@given(seed=st.integers(0, 10_000), n=st.integers(0, 40), count=st.integers(1, 5), iou=st.floats(0.2, 0.8))
def test_groups_equal_loops(seed, n, count, iou):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, n) - 30
    scores = torch.randperm(n, generator=generator) / max(n, 1)  # without ties
    groups = torch.randint(0, count, (n,), generator=generator)
    assert nms_within_groups(boxes, scores, groups, iou).tolist() == greedy(boxes, scores, groups, iou)


def test_a_high_group_number_does_not_blur_boxes():
    # An overlap of 0.5 + 1e-3 must be told from one of 0.5 - 1e-3 in group 1202 of an image of 4000 pixels.
    for shift, kept in ((1.332, 1), (1.335, 2)):
        boxes = torch.tensor([[0.0, 0.0, 4.0, 4000.0], [shift, 0.0, 4.0 + shift, 4000.0]])
        groups = torch.full((2,), 1202)
        assert len(nms_within_groups(boxes, torch.tensor([0.9, 0.8]), groups, 0.5)) == kept


def random_levels(seed: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, 3, sum(sizes))
    scores = torch.randperm(3 * sum(sizes), generator=generator).view(3, -1) / (3 * max(sum(sizes), 1))
    return boxes, scores, torch.rand(3, sum(sizes), generator=generator) < 0.8


@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(0, 15), min_size=1, max_size=4))
def test_levels_equal_one_nms_each_on_both_paths(seed, sizes):
    boxes, scores, valid = random_levels(seed, sizes)
    expected = torch.zeros_like(valid)
    for image in range(3):
        for level, size in enumerate(sizes):
            rows = [r + sum(sizes[:level]) for r in range(size) if valid[image, r + sum(sizes[:level])]]
            expected[image, [rows[k] for k in nms(boxes[image, rows], scores[image, rows], 0.5)]] = True
    assert torch.equal(keep_within_levels(boxes, scores, valid, sizes, 0.5), expected)
    assert torch.equal(nms_module._keep_in_few_calls(boxes, scores, valid, sizes, 0.5), expected)


@pytest.mark.parametrize(("most", "calls"), [(1, 5), (10, 5), (20, 3), (49, 2), (50, 1)])
def test_calls_hold_whole_images_and_few_boxes(most, calls, monkeypatch):
    """NMS of a whole batch at once would need memory by the square of its size."""
    sizes, seen = [6, 4], []
    generator = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(generator, 5, 10), torch.rand(5, 10, generator=generator)
    valid = torch.ones(5, 10, dtype=torch.bool)

    def counted(boxes: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(len(boxes))
        return nms_within_groups(boxes, *others)

    monkeypatch.setattr(nms_module, "CALL_BOXES", most)
    monkeypatch.setattr(nms_module, "nms_within_groups", counted)
    kept = nms_module._keep_in_few_calls(boxes, scores, valid, sizes, 0.5)
    assert torch.equal(kept, keep_within_levels(boxes, scores, valid, sizes, 0.5))
    assert (len(seen), sum(seen)) == (calls, 50)
    assert max(seen) <= max(most, 10)


def every_pair(boxes, scores, threshold, iou, limit):
    """Brute force: NMS of each class over all its pairs, then the best of all."""
    found = []
    for label in range(scores.shape[1]):
        own = boxes[:, label if boxes.shape[1] > 1 else 0]
        rows = (scores[:, label] > threshold).nonzero().squeeze(1)
        keep = greedy(own[rows], scores[rows, label], torch.zeros(len(rows)), iou)
        found += [(scores[row, label].item(), label, row.item()) for row in rows[keep]]
    return sorted(found, reverse=True)[:limit]


@pytest.mark.parametrize("first", [1, 7, 4096])
@given(
    seed=st.integers(0, 10_000),
    rois=st.integers(0, 12),
    agnostic=st.booleans(),
    limit=st.integers(1, 60),
    threshold=st.sampled_from([0.0, 0.3, 0.97, 2.0]),
)
def test_prefixes_give_the_detections_of_all_pairs(first, seed, rois, agnostic, limit, threshold):
    generator = torch.Generator().manual_seed(seed)
    classes = 6
    boxes = random_boxes(generator, rois, 1 if agnostic else classes)
    scores = torch.randperm(rois * classes, generator=generator).view(rois, classes) / max(rois * classes, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms_module, "FIRST_CANDIDATES", first)
        found, best, labels, rows = multiclass_nms(boxes, scores, score_threshold=threshold, iou=0.4, limit=limit)
    assert list(zip(best.tolist(), labels.tolist(), rows.tolist(), strict=True)) == every_pair(
        boxes, scores, threshold, 0.4, limit
    )
    assert torch.equal(found, boxes[rows, torch.zeros_like(labels) if agnostic else labels])


@pytest.mark.parametrize(("min_size", "kept"), [(None, {0, 1, 2, 3, 4}), (0, {1, 2, 3, 4}), (0.01, {3, 4})])
@pytest.mark.parametrize("agnostic", [True, False])
def test_small_boxes_are_dropped(min_size, kept, agnostic):
    """Sides of exactly the limit are dropped too, whichever of the two it is."""
    sides = [(0.0, 9.0), (0.005, 9.0), (9.0, 0.01), (0.0101, 9.0), (9.0, 9.0)]
    boxes = torch.tensor([[0.0, 100.0 * i, w, 100.0 * i + h] for i, (w, h) in enumerate(sides)])
    boxes[2] = torch.tensor([0.0, 0.0, 9.0, 0.01])  # beside larger coordinates 0.01 would be rounded
    boxes = boxes[:, None] if agnostic else boxes[:, None].repeat(1, 2, 1)
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.55, 0.45]])
    _, best, labels, rows = multiclass_nms(boxes, scores, score_threshold=0.0, iou=0.5, limit=50, min_size=min_size)
    assert set(rows.tolist()) == kept
    assert sorted(zip(rows.tolist(), labels.tolist(), strict=True)) == [(r, c) for r in sorted(kept) for c in (0, 1)]
    assert torch.equal(best, scores[rows, labels])


def test_a_small_box_is_dropped_before_it_suppresses_and_for_its_class_alone():
    boxes = torch.tensor([[[0.0, 0, 2, 30], [0, 0, 20, 30]], [[0.0, 0, 2.1, 30], [0, 0, 20, 29]]])
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.6]])
    find = {"score_threshold": 0.1, "iou": 0.5, "limit": 9}
    _, _, labels, rows = multiclass_nms(boxes, scores, **find)
    assert list(zip(rows.tolist(), labels.tolist(), strict=True)) == [(0, 0), (0, 1)]
    found, _, labels, rows = multiclass_nms(boxes, scores, **find, min_size=2)
    assert list(zip(rows.tolist(), labels.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert torch.equal(found, boxes[rows, labels])
    none = multiclass_nms(boxes, scores, **find, min_size=1000)
    assert [len(part) for part in none] == [0, 0, 0, 0]


def test_nothing_survives():
    none = torch.zeros(0, dtype=torch.int64)
    assert nms_within_groups(torch.zeros(0, 4), torch.zeros(0), none, 0.5).tolist() == []
    parts = multiclass_nms(torch.zeros(0, 3, 4), torch.zeros(0, 3), score_threshold=0.1, iou=0.5, limit=5)
    assert [p.shape for p in parts] == [(0, 4), (0,), (0,), (0,)]
    low = multiclass_nms(torch.zeros(2, 1, 4), torch.zeros(2, 3), score_threshold=0.1, iou=0.5, limit=5)
    assert [len(p) for p in low] == [0, 0, 0, 0]
    empty = torch.zeros(2, 0)
    assert keep_within_levels(torch.zeros(2, 0, 4), empty, empty.bool(), [0, 0], 0.5).shape == (2, 0)


def test_apples_gpu_leaves_float64_to_the_cpu():
    assert with_float64(torch.device("mps")) == torch.device("cpu")
    for name in ("cpu", "cuda", "cuda:1"):
        assert with_float64(torch.device(name)) == torch.device(name)
