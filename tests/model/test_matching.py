"""Assignment against the recording and a plain loop; sampling by its promises; both at their edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailseg.model import matching
from tailseg.model.boxes import pairwise_iou
from tailseg.model.detector import rows_to_compute
from tailseg.model.matching import IGNORED, NEGATIVE, Matcher, sample


def matcher_of(assigner: dict) -> Matcher:
    return Matcher(
        positive_iou=assigner["pos_iou_thr"],
        negative_iou=assigner["neg_iou_thr"],
        low_quality_iou=assigner["min_pos_iou"] if assigner["match_low_quality"] else None,
    )


def mostly_in(priors: torch.Tensor, regions: torch.Tensor, share: float) -> torch.Tensor:
    """(N,) bool: more than ``share`` of a prior's area lies in one of the regions."""
    corner = torch.minimum(priors[:, None, 2:], regions[None, :, 2:])
    size = (corner - torch.maximum(priors[:, None, :2], regions[None, :, :2])).clamp(min=0)
    area = (priors[:, 2] - priors[:, 0]) * (priors[:, 3] - priors[:, 1])
    return ((size.prod(dim=2) / area[:, None]) > share).any(dim=1)


def test_recorded_assignments(recorded, check):
    seen = set()
    for case, inputs, _, outputs in recorded("anchors_assign"):
        if case["kind"] != "assign":
            continue
        assigner = case["settings"]["assigner"]
        priors, objects, labels = inputs["priors"], inputs["boxes"], inputs["labels"]
        usable = torch.ones(1, len(priors), dtype=torch.bool)
        if "ignored" in inputs:
            usable &= ~mostly_in(priors, inputs["ignored"], assigner["ignore_iof_thr"])
        padding = torch.tensor([[0.0, 0.0, 400.0, 400.0]])  # a padded object may hold anything
        matched = matcher_of(assigner)(
            priors[None],
            usable,
            torch.cat([objects, padding])[None],
            torch.tensor([[True] * len(objects) + [False]]),
        )[0]
        theirs = torch.where(matched == IGNORED, -1, matched + 1)
        check(case, "assigned", theirs, outputs["assigned"])
        own = torch.cat([labels, torch.tensor([-1])])[matched.clamp(min=-1)]
        check(case, "labels", torch.where(matched >= 0, own, -1), outputs["labels"])
        if len(objects) and "ignored" not in inputs:
            check(case, "best_iou", pairwise_iou(priors, objects).amax(dim=1), outputs["best_iou"])
        seen.add(case["name"])
    assert seen == {"rpn", "mask_rcnn", "cascade1", "cascade2", "cascade3", "rpn_ignored", "no_boxes"}


def plain_assignment(iou: list[list[float]], usable: list[bool], valid: list[bool], m: Matcher) -> list[int]:
    """The assignment of one image, a prior and an object at a time."""
    result = []
    for prior, row in enumerate(iou):
        if not usable[prior]:
            result.append(IGNORED)
            continue
        best, best_object = -1.0, NEGATIVE
        for number, overlap in enumerate(row):
            if valid[number] and overlap > best:
                best, best_object = overlap, number
        if best >= m.positive_iou:
            result.append(best_object)
        else:
            result.append(NEGATIVE if best < m.negative_iou else IGNORED)
    if m.low_quality_iou is None:
        return result
    for number in range(len(valid)):
        overlaps = [row[number] for prior, row in enumerate(iou) if usable[prior]]
        if not valid[number] or not overlaps or max(overlaps) < m.low_quality_iou:
            continue
        for prior, row in enumerate(iou):
            if usable[prior] and row[number] == max(overlaps):
                result[prior] = number
    return result


@pytest.mark.parametrize(
    "matcher",
    [
        Matcher(positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.3),
        Matcher(positive_iou=0.5, negative_iou=0.5, low_quality_iou=0.5),
        Matcher(positive_iou=0.6, negative_iou=0.4),
    ],
)
@given(seed=st.integers(0, 10_000), objects=st.integers(0, 12), shared=st.booleans(), at_once=st.integers(1, 5))
def test_equals_plain_loops(matcher, seed, objects, shared, at_once):
    generator = torch.Generator().manual_seed(seed)

    def random_boxes(*shape: int) -> torch.Tensor:  # whole corners in a small square: many equal overlaps
        corner = torch.randint(0, 6, (*shape, 2), generator=generator)
        return torch.cat([corner, corner + torch.randint(1, 7, (*shape, 2), generator=generator)], -1).float()

    priors, found = random_boxes(1 if shared else 2, 30), random_boxes(2, objects)
    usable = torch.rand(2, 30, generator=generator) < 0.8
    valid = torch.rand(2, objects, generator=generator) < 0.8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "OBJECTS_AT_ONCE", at_once)
        matched = matcher(priors, usable, found, valid)
    iou = pairwise_iou(priors, found)
    for image in range(2):
        expected = plain_assignment(iou[image].tolist(), usable[image].tolist(), valid[image].tolist(), matcher)
        assert matched[image].tolist() == expected


def test_more_objects_than_are_compared_at_once():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(1, 150, 2, generator=generator) * 60
    objects = torch.cat([corner, corner + 4 + torch.rand(1, 150, 2, generator=generator) * 30], dim=-1)
    objects = torch.cat([objects, objects[:, :10]], dim=1)  # equal objects on both sides of a boundary
    priors = objects[:, ::3] + torch.rand(1, 54, 4, generator=generator)
    usable, valid = torch.ones(1, 54, dtype=torch.bool), torch.rand(1, 160, generator=generator) < 0.9
    matcher = Matcher(positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.3)
    expected = plain_assignment(
        pairwise_iou(priors[0], objects[0]).tolist(), usable[0].tolist(), valid[0].tolist(), matcher
    )
    assert matcher(priors, usable, objects, valid)[0].tolist() == expected
    assert max(expected) > 2 * matching.OBJECTS_AT_ONCE


def test_nothing_to_match():
    matcher = Matcher(positive_iou=0.5, negative_iou=0.5, low_quality_iou=0.5)
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])
    usable = torch.tensor([[True]])
    assert matcher(boxes, usable, boxes[:, :0], usable[:, :0]).tolist() == [[NEGATIVE]]
    assert matcher(boxes, usable, boxes, ~usable).tolist() == [[NEGATIVE]]  # only padding
    assert matcher(boxes, ~usable, boxes, usable).tolist() == [[IGNORED]]
    assert matcher(boxes[:, :0], usable[:, :0], boxes, usable[:, :0].new_ones(1, 1)).shape == (1, 0)


def random_matches(seed: int, n: int, positive: float, ignored: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(2, n, generator=generator)
    matched = torch.where(kind < positive, torch.randint(0, 9, (2, n), generator=generator), NEGATIVE)
    return torch.where(kind > 1 - ignored, IGNORED, matched)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 60),
    positive=st.floats(0, 1),
    ignored=st.floats(0, 0.5),
    num_samples=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_sample_keeps_its_promises(seed, n, positive, ignored, num_samples, share):
    matched = random_matches(seed, n, positive, ignored)
    most = int(num_samples * share)
    torch.manual_seed(seed)
    drawn = sample(matched, num_samples, most)
    assert drawn.index.shape == (2, min(num_samples, n))
    for image in range(2):
        positives, negatives = (matched[image] >= 0).sum().item(), (matched[image] == NEGATIVE).sum().item()
        kept = min(positives, most, num_samples)
        filled = min(negatives, num_samples - kept)
        flags = drawn.positive[image].tolist()
        assert flags == [True] * kept + [False] * (len(flags) - kept)
        valid = drawn.valid[image].tolist()
        assert valid == [True] * (kept + filled) + [False] * (len(flags) - kept - filled)
        chosen = drawn.index[image][drawn.valid[image]]
        assert len(chosen.unique()) == len(chosen)  # without replacement
        assert torch.equal(matched[image][drawn.index[image][:kept]], drawn.matched[image][:kept])
        assert (matched[image][chosen[kept:]] == NEGATIVE).all()
        assert (drawn.matched[image][kept:] == 0).all()


def test_sample_is_uniform():
    matched = torch.tensor([[0] * 20 + [NEGATIVE] * 40 + [IGNORED] * 5]).repeat(3000, 1)
    torch.manual_seed(0)
    drawn = sample(matched, 24, 8)
    often = torch.zeros(65).index_add_(0, drawn.index.flatten(), torch.ones(3000 * 24))
    # Five standard deviations of a binomial around the expected 8 / 20 and 16 / 40 of the draws.
    assert (often[:60] - 1200).abs().max() < 5 * (3000 * 0.4 * 0.6) ** 0.5
    assert often[60:].sum() == 0
    assert not torch.equal(drawn.index[0].sort()[0], drawn.index[1].sort()[0])


def test_live_rows():
    valid = torch.tensor([[True, False, True], [False, False, True]])
    assert rows_to_compute(valid).tolist() == [0, 2, 5]
    assert rows_to_compute(valid[:0]).tolist() == []
    # A device is not asked for the number of rows: all are live there.
    elsewhere = rows_to_compute(valid.to("meta"))
    assert (elsewhere.shape, elsewhere.device.type) == ((6,), "meta")
