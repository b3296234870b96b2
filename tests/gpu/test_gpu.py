"""What a CUDA device must answer as the CPU does; `python benchmarks/gpu.py` runs these on a machine that has one."""

import warnings
from dataclasses import fields

import pytest
import torch
from tiny import made, noise_batch
from torch import Tensor

from tailseg.model import matching
from tailseg.model.boxes import multiclass_nms, nms_within_groups
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.roi_features import RoIPooler
from tailseg.model.rpn import RPN, RpnOutput
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import override
from tailseg.structures import Batch, Proposals

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("full_float32"),
]

CLASSES = 37
SMALL = (
    "model.backbone.name=resnet18",
    "model.neck.channels=32",
    "model.box_head.width=64",
    "model.mask_head.channels=32",
    "test.max_detections=20",
)


def detector(recipe: str = "table1/seesaw") -> Detector:
    torch.manual_seed(0)
    return build_detector(override(resolve(recipe), SMALL), CLASSES).to(memory_format=torch.channels_last)


def scene() -> Batch:
    return noise_batch((128, 160), (120, 144), objects=5, num_classes=CLASSES, seed=1)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 200
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * 120], dim=1)


@pytest.mark.parametrize("recipe", ["table1/seesaw", "table1/cross-entropy"])
@pytest.mark.usefixtures("same_lottery")
def test_training_step_equals_the_cpu(recipe):
    model, batch = detector(recipe).train(), scene()
    proposals = model.rpn.propose(
        model.rpn(model.pyramid(batch.images, batch.image_sizes)), batch.image_sizes, training=model.rpn.training
    )

    def same_proposals(output: RpnOutput, _image_sizes: Tensor, **_: object) -> Proposals:
        # Scores that differ in the last bit would change places, and sampling goes by place.
        moved = {f.name: getattr(proposals, f.name).to(output.logits.device) for f in fields(proposals)}
        return Proposals(**moved)

    model.rpn.propose = same_proposals
    expected = model(batch)
    torch.stack(list(expected.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if hasattr(model.stages[0].box_head.classification, "seesaw"):
        model.stages[0].box_head.classification.seesaw.counts.zero_()
    model.cuda()
    losses = model(batch.to("cuda"))
    torch.stack(list(losses.values())).sum().backward()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    for name, parameter in model.named_parameters():
        if name not in gradients:
            continue
        scale = gradients[name].abs().max().item() + 1e-8
        assert (parameter.grad.cpu() - gradients[name]).abs().max().item() <= 0.02 * scale, name


@pytest.mark.usefixtures("same_lottery")
def test_sampling_draws_the_same():
    matched = torch.randint(-2, 4, (2, 500), generator=torch.Generator().manual_seed(0))
    ours, theirs = matching.sample(matched.cuda(), 64, 16), matching.sample(matched, 64, 16)
    assert torch.equal(ours.index.cpu()[theirs.valid], theirs.index[theirs.valid])
    assert torch.equal(ours.positive.cpu(), theirs.positive)
    assert torch.equal(ours.valid.cpu(), theirs.valid)


def test_pooling_equals_the_cpu():
    generator = torch.Generator().manual_seed(2)
    sides = ((64, 80), (32, 40), (16, 20), (8, 10))
    pyramid = [torch.randn(2, 8, *side, generator=generator) for side in sides]
    boxes = torch.cat([random_boxes(60, 3), torch.tensor([[5.0, 5, 5, 5], [-20, -20, 500, 400]])])
    rois = torch.cat([torch.arange(62).remainder(2).unsqueeze(1), boxes], dim=1)
    pooler = made(RoIPooler, 7)
    on_device = pooler([maps.cuda() for maps in pyramid], rois.cuda())
    torch.testing.assert_close(on_device.cpu(), pooler(pyramid, rois), rtol=1e-4, atol=1e-5)
    assert pooler([maps.cuda() for maps in pyramid], rois[:0].cuda()).shape == (0, 8, 7, 7)


def test_nms_in_groups_equals_the_cpu():
    boxes, scores = random_boxes(400, 4), torch.rand(400, generator=torch.Generator().manual_seed(5))
    groups = torch.arange(400) % 7
    on_device = nms_within_groups(boxes.cuda(), scores.cuda(), groups.cuda(), 0.5)
    assert torch.equal(on_device.cpu(), nms_within_groups(boxes, scores, groups, 0.5))


def test_best_per_class_equals_the_cpu():
    boxes = random_boxes(400, 6).unsqueeze(1).expand(-1, 9, -1) + torch.arange(9.0).view(1, 9, 1)
    scores = torch.rand(400, 9, generator=torch.Generator().manual_seed(7))
    how = {"score_threshold": 0.05, "iou": 0.5, "limit": 100}
    for ours, theirs in zip(
        multiclass_nms(boxes.cuda(), scores.cuda(), **how), multiclass_nms(boxes, scores, **how), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs)


def test_rpn_gradients_equal_the_cpu():
    torch.manual_seed(0)
    rpn = made(RPN, 16)
    pyramid = [torch.randn(2, 16, side, side) for side in (16, 8, 4, 2, 1)]

    def gradients(device: str) -> list[Tensor]:
        own = rpn.to(device)
        own.zero_grad()
        output = own([maps.to(device) for maps in pyramid])
        (output.logits[:, ::17].square().sum() + output.deltas[:, ::17].square().sum()).backward()
        return [p.grad.cpu().clone() for p in own.parameters()]

    for ours, theirs in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_step_in_bfloat16_is_finite():
    model, batch = detector().cuda().train(), scene().to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(value) for value in losses.values()), losses
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_step_waits_for_nothing():
    model, batch = detector().cuda().train(), scene().to("cuda")

    def step() -> None:
        torch.stack(list(model(batch).values())).sum().backward()

    step()  # constants are copied and kernels loaded the first time
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not {(w.filename, w.lineno) for w in caught if "synchronizing CUDA operation" in str(w.message)}


def test_detections_equal_the_cpu():
    model, batch = detector().eval(), scene()
    expected = model.detect(batch)
    found = model.cuda().detect(batch.to("cuda"))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) == 20
        ours = ours.to("cpu")
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-3, atol=1e-6)
        # Nearly equal scores may change places: each detection must have its like in the other list.
        same = (ours.labels[:, None] == theirs.labels) & ((ours.boxes[:, None] - theirs.boxes).abs().amax(2) < 0.5)
        pairs = same.float().argmax(1)
        assert same.any(1).float().mean() >= 0.9
        matched = same.any(1)
        difference = (ours.masks[matched] - theirs.masks[pairs[matched]]).abs()
        assert difference.amax((1, 2)).median() < 0.01
