"""Rows 2 to 12 of Table 2 on CUDA: equal to the CPU, in bfloat16, and without waiting for the device."""

import warnings
from dataclasses import fields

import pytest
import torch
from tiny import noise_batch
from torch import Tensor

from tailseg.evaluation.tta import detect_views, views_of
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.rpn import RpnOutput
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import override
from tailseg.structures import Batch, Proposals
from tailseg.training.finetune import Branches, Frozen, join

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("full_float32"),
]

ROWS = (
    *("02-sync-bn", "03-carafe", "04-htc-lite", "05-tsd", "06-mask-scoring"),
    *("08-neck", "09-backbone", "10-seesaw"),  # row 7 changes the data alone
)
CLASSES = 37
SMALL = (
    "model.backbone.name=resnet18",
    "model.neck.channels=32",
    "model.box_head.width=64",
    "model.box_head.rois=64",
    "model.rpn.post_nms_train=200",
    "model.rpn.post_nms_test=200",
    "model.mask_head.channels=32",
    "model.tsd.shift_width=32",
    "model.mask_iou.channels=32",
    "model.mask_iou.width=64",
    "test.max_detections=20",
    "test.tta_long_edges=[160, 256]",
)
SEESAW = ("classifier.loss=seesaw", "classifier.normalized=true", "model.tsd.constrain_classes=false")


def detector(row: str, *settings: str) -> Detector:
    torch.manual_seed(0)
    recipe = override(resolve(f"table2/{row}"), (*SMALL, *settings))
    return build_detector(recipe, CLASSES).to(memory_format=torch.channels_last)


def scene() -> Batch:
    return noise_batch((192, 224), (184, 208), objects=5, num_classes=CLASSES, seed=1, sides=(16, 62))


def step(model: Detector, batch: Batch) -> dict[str, Tensor]:
    losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    return losses


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.usefixtures("same_lottery")
def test_training_step_equals_the_cpu(row):
    """Losses and batch statistics, on the proposals of the CPU.

    Later stages get the boxes of the stages before, of which one near a threshold may be a positive on one device only;
    and the ReLUs of a network with batch norm turn on and off by the last digit. Hence the bounds on gradients.
    """
    theirs, ours, batch = detector(row).train(), detector(row).cuda().train(), scene()
    with torch.no_grad():
        theirs.eval()
        proposals = theirs.rpn.propose(
            theirs.rpn(theirs.pyramid(batch.images, batch.image_sizes)), batch.image_sizes, training=theirs.rpn.training
        )
        theirs.train()

    def same_proposals(output: RpnOutput, _image_sizes: Tensor, **_: object) -> Proposals:
        moved = {f.name: getattr(proposals, f.name).to(output.logits.device) for f in fields(proposals)}
        return Proposals(**moved)

    theirs.rpn.propose = ours.rpn.propose = same_proposals
    expected, losses = step(theirs, batch), step(ours, batch.to("cuda"))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=5e-3, abs=1e-4), name
    state = ours.state_dict()
    statistics = [(k, v) for k, v in theirs.state_dict().items() if k.endswith(("running_mean", "running_var"))]
    assert any("mask_head" in name for name, _ in statistics)
    for name, value in statistics:
        torch.testing.assert_close(state[name].cpu(), value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    gradients = {name: parameter.grad.cpu() for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert (gradients[name] - parameter.grad).norm() <= 0.05 * parameter.grad.norm() + 1e-5, name


@pytest.mark.parametrize("row", ROWS)
def test_detections_equal_the_cpu(row):
    model, batch = detector(row).eval(), scene()
    expected = model.detect(batch)
    found = model.cuda().detect(batch.to("cuda"))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) == 20
        ours = ours.to("cpu")
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-3, atol=1e-6)
        # Nearly equal scores may change places: each detection must have its like in the other list.
        same = (ours.labels[:, None] == theirs.labels) & ((ours.boxes[:, None] - theirs.boxes).abs().amax(2) < 0.5)
        assert same.any(1).float().mean() >= 0.9
        matched, pairs = same.any(1), same.float().argmax(1)
        difference = (ours.masks[matched] - theirs.masks[pairs[matched]]).abs()
        assert difference.amax((1, 2)).median() < 0.01
        assert (ours.mask_scores is None) == (theirs.mask_scores is None) == (row < "06")
        if theirs.mask_scores is not None:
            gaps = (ours.mask_scores[matched] - theirs.mask_scores[pairs[matched]]).abs()
            assert gaps.median() < 1e-3


@pytest.mark.parametrize("settings", [(), SEESAW], ids=["cross-entropy", "seesaw"])
@pytest.mark.parametrize("row", ROWS)
def test_step_in_bfloat16_is_finite_and_near_float32(row, settings):
    batch = scene().to("cuda")
    plain = detector(row, *settings).cuda().train()(batch)
    model = detector(row, *settings).cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values()), losses
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # What does not depend on chance.
    for name in {"context"} & losses.keys():
        assert losses[name].item() == pytest.approx(plain[name].item(), rel=0.05), name


@pytest.mark.parametrize("settings", [(), SEESAW], ids=["cross-entropy", "seesaw"])
@pytest.mark.parametrize("row", ROWS)
def test_step_waits_for_nothing_but_nms(row, settings):
    model, batch = detector(row, *settings).cuda().train(), scene().to("cuda")
    step(model, batch)  # constants are copied and kernels loaded the first time
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = {w.filename for w in caught if "synchronizing CUDA operation" in str(w.message)}
    # torchvision's NMS gives a list whose length only the device knows.
    assert all(name.endswith(("tailseg/model/boxes.py", "torchvision/ops/boxes.py", "_ops.py")) for name in waits), (
        waits
    )


@pytest.mark.parametrize("row", ROWS)
def test_step_with_empty_images(row):
    """Without an object the losses are finite and the statistics of the mask head, of which no row counts, stay."""
    model, batch = detector(row).cuda().train(), scene().to("cuda")
    batch.valid.fill_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = step(model, batch)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    own = [name for name in before if "mask_head" in name and name.endswith(("running_mean", "running_var"))]
    assert own
    assert [name for name in own if not torch.equal(before[name], model.state_dict()[name])] == []


def test_finetuning_step_learns_in_the_branches_alone():
    model, batch = detector("11-finetune").cuda(), scene().to("cuda")
    frozen, branches = Frozen(model, bf16=False), Branches(model).requires_grad_(True).train()
    images = [Batch(**{f.name: getattr(batch, f.name)[i : i + 1] for f in fields(batch)}) for i in range(2)]
    inputs = join([frozen(image, seed) for seed, image in enumerate(images)])
    again = join([frozen(image, seed) for seed, image in enumerate(images)])
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(inputs.stages, again.stages, strict=True))
    losses = branches(inputs)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(value) for value in losses.values()), losses
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all(".second_branch." in name for name in with_gradient)


def test_views_give_what_they_give_on_the_cpu():
    recipe = override(resolve("table2/12-tta"), SMALL)
    model, picture = detector("12-tta").eval(), scene().images[0].permute(1, 2, 0).contiguous().numpy()
    expected = detect_views(model, picture, views_of(recipe))
    found = detect_views(model.cuda(), picture, views_of(recipe)).to("cpu")
    assert len(found) == len(expected) == 20
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-6)
    same = (found.labels[:, None] == expected.labels) & ((found.boxes[:, None] - expected.boxes).abs().amax(2) < 0.5)
    assert same.any(1).float().mean() >= 0.9
