"""Dataclasses: rows are checked, indexing and moving keep every field together, padding stays out of the way."""

import dataclasses

import pytest
import torch

from tailseg.structures import Batch, Instances, RawDetections


def make_instances(n: int) -> Instances:
    return Instances(
        boxes=torch.arange(4.0 * n).view(n, 4),
        labels=torch.arange(n),
        masks=torch.arange(n, dtype=torch.uint8).view(n, 1, 1).expand(n, 3, 3).clone(),
        mask_frames=torch.arange(4.0 * n).view(n, 4) - 1,
    )


def make_detections(n: int) -> RawDetections:
    return RawDetections(
        image_hw=(20, 30),
        boxes=torch.arange(4.0 * n).view(n, 4),
        scores=torch.linspace(1, 0, n) if n else torch.zeros(0),
        labels=torch.arange(n),
        masks=torch.arange(float(n)).view(n, 1, 1).expand(n, 2, 2).clone(),
    )


def make_scored(n: int) -> RawDetections:
    return dataclasses.replace(make_detections(n), mask_scores=torch.arange(float(n)) / 8)


@pytest.mark.parametrize("make", [make_instances, make_detections, make_scored])
@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (torch.tensor([True, False, False, True]), [0, 3]),
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.zeros(4, dtype=torch.bool), []),
    ],
)
def test_one_index_filters_every_field(make, index, expected):
    whole = make(4)
    part = whole[index]
    assert len(part) == len(expected)
    assert part.labels.tolist() == expected
    for field in dataclasses.fields(whole):
        value = getattr(whole, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(part, field.name), value[expected])
        else:
            assert getattr(part, field.name) == value


@pytest.mark.parametrize("make", [make_instances, make_detections, make_scored])
def test_no_objects_is_a_normal_case(make):
    empty = make(0)
    assert len(empty) == 0
    assert len(empty[torch.zeros(0, dtype=torch.int64)]) == 0


@pytest.mark.parametrize("make", [make_instances, make_detections])
def test_iteration_is_refused_instead_of_ending_at_once(make):
    with pytest.raises(TypeError, match="not iterable"):
        list(make(3))


@pytest.mark.parametrize("field", ["boxes", "labels", "masks", "mask_frames"])
def test_instances_refuse_unequal_rows(field):
    with pytest.raises(ValueError, match="same number of rows"):
        dataclasses.replace(make_instances(3), **{field: getattr(make_instances(2), field)})


@pytest.mark.parametrize("field", ["boxes", "labels", "masks", "scores", "mask_scores"])
def test_detections_refuse_unequal_rows(field):
    with pytest.raises(ValueError, match=rf"'{field}': 2"):
        dataclasses.replace(make_detections(3), **{field: getattr(make_scored(2), field)})


def test_fields_cannot_be_added_or_replaced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_instances(1).labels = torch.zeros(1)
    with pytest.raises((AttributeError, TypeError)):
        make_instances(1).scores = torch.zeros(1)


def test_moving_keeps_values():
    batch = Batch(
        images=torch.randint(0, 255, (2, 3, 4, 5), dtype=torch.uint8),
        image_sizes=torch.tensor([[4, 5], [3, 2]]),
        original_sizes=torch.tensor([[8, 10], [3, 2]]),
        image_ids=torch.tensor([7, 9]),
        boxes=torch.rand(2, 1, 4),
        labels=torch.tensor([[3], [0]]),
        valid=torch.tensor([[True], [False]]),
        masks=torch.ones(2, 1, 3, 3, dtype=torch.uint8),
        mask_frames=torch.rand(2, 1, 4),
        absent=torch.tensor([[True, False], [False, False]]),
        ignored=torch.zeros(2, 0, 0, dtype=torch.uint8),
    )
    moved = batch.to("cpu")
    assert len(moved) == 2
    assert all(torch.equal(getattr(moved, f.name), getattr(batch, f.name)) for f in dataclasses.fields(batch))
    assert {getattr(batch.to("meta"), f.name).device.type for f in dataclasses.fields(batch)} == {"meta"}
    found = make_detections(3)
    assert found.to("cpu").image_hw == (20, 30)
    assert torch.equal(found.to("cpu").scores, found.scores)
    assert found.to("cpu").mask_scores is None
    scored = make_scored(3)
    assert torch.equal(scored.to("cpu").mask_scores, scored.mask_scores)
    assert scored.to("meta").mask_scores.device.type == "meta"
    assert {getattr(found.to("meta"), n).device.type for n in ("boxes", "scores", "labels", "masks")} == {"meta"}
