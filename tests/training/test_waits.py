"""Nothing in a training step waits for the device: steps on the meta device, whose tensors have no values to ask."""

import contextlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from tiny import meta_without_values, noise_batch

from tailseg.losses import CLASSIFICATIONS
from tailseg.model import boxes
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch
from tailseg.training.waits import waiting_operations

META = torch.device("meta")
SMALL = (
    "model.backbone.name=resnet18",
    "model.neck.channels=16",
    "model.box_head={width: 32, rois: 32}",
    "model.mask_head.channels=16",
    "model.tsd.shift_width=16",
    "model.mask_iou={channels: 16, width: 16}",
)


def scene() -> Batch:
    return noise_batch((64, 96), (60, 90), objects=5, num_classes=7, seed=1)


def waits_of(name: str, *settings: str, batch: Batch | None = None) -> list[str]:
    """What a step waits for on a device that is not a CPU. NMS, which CUDA has kernels for, is left out."""
    with meta_without_values(), META:
        detector = build_detector(resolve(name, [*SMALL, *settings]), 7).train()
    batch = (scene() if batch is None else batch).to(META)
    with (
        patch.object(boxes, "has_kernels", lambda _boxes: True),
        patch.object(boxes, "_keep_by_kernels", lambda _boxes, valid, *_: torch.empty_like(valid)),
        patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # which meta does not have
        waiting_operations() as found,
    ):
        losses = detector(batch)
        torch.stack(list(losses.values())).sum().backward()
    return [wait for wait in found if "model/boxes.py" not in wait]  # constants, kept after the first step


def test_a_step_with_seesaw_and_regions_to_be_ignored_waits_for_nothing():
    cells = torch.zeros(2, 16, 24, dtype=torch.uint8)
    assert waits_of("table1/seesaw", batch=replace(scene(), ignored=cells)) == []


def test_a_step_of_the_entry_waits_for_nothing():
    assert waits_of("table2/10-seesaw", "model.neck.pathways=1") == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["table2/06-mask-scoring", "htc", "own/accurate"])
def test_a_step_of_other_models_waits_for_nothing(name):
    assert waits_of(name) == []


@pytest.mark.parametrize("name", sorted(CLASSIFICATIONS))
def test_a_loss_waits_for_nothing(name):
    with META:
        loss = CLASSIFICATIONS[name](7).train()
        logits = torch.rand(9, loss.num_logits, requires_grad=True)
        labels, valid = torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.bool)
    loss.statistics_known = True  # one made without them looks once whether they have been loaded
    with waiting_operations() as found:
        torch.stack(list(loss.loss(logits, labels, valid).values())).sum().backward()
    assert found == []


def test_what_waits_is_found():
    maps, host = torch.empty(4, device=META), torch.tensor([1, 0])
    with waiting_operations() as found:
        maps[host]
        maps.new_tensor([1.0, 2.0])
        torch.tensor([1.0], device=META)
        maps[:2].copy_(host)
        maps.index_put_((torch.zeros(1, dtype=torch.int64, device=META),), torch.tensor(1.0))
        for refused in (maps.nonzero, maps.sum().item, lambda: maps[maps > 0], maps.cpu):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                refused()
    assert found == [
        *("index", "new_tensor", "tensor", "copy_", "index_put_"),
        *("nonzero", "_local_scalar_dense", "index", "_to_copy"),
    ]


def test_what_does_not_wait_is_not_found():
    maps = torch.rand(4, device=META)
    with waiting_operations() as found:
        maps[torch.arange(2, device=META)]
        torch.where(maps > 0.5, maps, 0.0).sum().to(torch.float64)
        maps.masked_fill_(maps > 0.5, 1.0)
        maps[torch.arange(2, device=META)] = 1.0
        torch.rand(3).nonzero()  # the host's own numbers
        torch.tensor([1.0]).item()
    assert found == []


def test_the_place_is_that_of_the_package():
    priors = torch.rand(1, 4, device=META)
    with waiting_operations() as found, contextlib.suppress(NotImplementedError, RuntimeError):
        boxes.nms_within_groups(priors, priors[:, 0], priors[:, 0].long(), 0.5)
    assert [wait.rpartition(":")[0] for wait in found] == ["torchvision::nms at model/boxes.py"]
