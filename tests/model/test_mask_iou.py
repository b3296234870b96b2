"""The mask-IoU head, its targets and loss against the recordings and their words."""

import math

import numpy as np
import pytest
import torch
from hotcoco import mask as rle
from tiny import made, rasterise
from torch import Tensor
from torch.nn import functional as F

from tailseg.model.mask_head import mask_targets
from tailseg.model.mask_iou import MaskIouHead, mask_iou_loss, mask_iou_targets, share_inside


def stored(bitmaps: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Grids and frames, as a data set stores them, of bitmaps (N, H, W) of 0 and 1."""
    codes = [rle.encode(np.asfortranarray(bitmap.numpy()))["counts"] for bitmap in bitmaps.to(torch.uint8)]
    pairs = [rasterise(code, tuple(bitmaps.shape[1:]), grid) for code in codes]
    grids, frames = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return grids, frames


def share_of_bitmap(bitmap: Tensor, roi: list[float]) -> float:
    """Pixels of a bitmap (H, W) within the truncated corners, at least one pixel, out of all its pixels."""
    x1, y1, x2, y2 = (int(corner) for corner in roi)
    inside = bitmap[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    return inside.sum().item() / bitmap.sum().item()


def random_rois(count: int, height: int, width: int) -> Tensor:
    """RoIs (count, 4) within an image, some narrower than a pixel."""
    corners = torch.rand(count, 2, 2).sort(dim=1).values
    corners[::7, 1] = corners[::7, 0] + 0.001
    return (corners * torch.tensor([width, height])).flatten(1)


def own_name(name: str) -> str:
    return name.replace("fcs.0", "fc1").replace("fcs.1", "fc2").replace("fc_mask_iou", "predictor")


def test_recorded_head(recorded, check):
    case, inputs, state, outputs = next(c for c in recorded("head_mask_scoring") if c[0]["name"] == "forward")
    build = case["settings"]["build"]
    classes = build["num_classes"]
    head = made(
        MaskIouHead, build["in_channels"], classes, channels=build["conv_out_channels"], width=build["fc_out_channels"]
    )
    head.load_state_dict({own_name(key): value for key, value in state.items()})
    features, mask_logits = (inputs[key].clone().requires_grad_() for key in ("features", "mask_logits"))
    rois = len(features)
    everyone = [part.repeat_interleave(classes, dim=0) for part in (features, mask_logits.sigmoid())]
    iou = head(*everyone, torch.arange(classes).repeat(rois)).unflatten(0, (rois, classes))
    check(case, "iou", iou, outputs["iou"])
    rescored = inputs["scores"] * head(features, mask_logits.sigmoid(), inputs["labels"])
    check(case, "rescored", rescored, outputs["rescored"])
    ((iou**2).sum() / 2).backward()
    check(case, "grad.features", features.grad, outputs["grad.features"])
    check(case, "grad.mask_logits", mask_logits.grad, outputs["grad.mask_logits"])
    parameters = dict(head.named_parameters())
    norms = [parameters[own_name(key)].grad.double().norm() for key in case["settings"]["parameters"]]
    check(case, "param_grad_norms", torch.stack(norms), outputs["param_grad_norms"])


def test_recorded_targets_and_loss(recorded, check):
    case, inputs, _, outputs = next(c for c in recorded("head_mask_scoring") if c[0]["name"] == "targets")
    bitmaps, own, rois = inputs["masks"], inputs["assigned"], inputs["proposals"]
    grids, frames = stored(bitmaps, max(bitmaps.shape[1:]))  # a cell is a pixel
    image_sizes = torch.tensor([bitmaps.shape[1:]]).expand(len(own), 2)
    probabilities, wanted = inputs["mask_logits"].sigmoid(), inputs["mask_targets"]
    targets = mask_iou_targets(probabilities, wanted, rois, grids[own], frames[own], image_sizes)
    check(case, "iou_targets", targets, outputs["iou_targets"])
    predicted = inputs["predicted_iou"].clone().requires_grad_()
    loss = 0.5 * mask_iou_loss(predicted, targets, torch.ones(len(own), dtype=torch.bool))
    check(case, "loss", loss, outputs["loss"])
    loss.backward()
    check(case, "grad.predicted_iou", predicted.grad, outputs["grad.predicted_iou"])


@pytest.mark.parametrize("agnostic", [False, True])
def test_the_head_is_its_layers_in_order(agnostic):
    torch.manual_seed(0)
    head = made(MaskIouHead, 3, 7, channels=4, width=10, class_agnostic=agnostic).double()
    torch.nn.init.normal_(head.predictor.bias)
    features = torch.randn(5, 3, 14, 14, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(5, 28, 28, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([6, 0, 3, 3, 2])
    largest = masks.view(5, 14, 2, 14, 2).amax(dim=(2, 4))
    hidden = torch.cat([features, largest.unsqueeze(1)], dim=1)
    for conv, stride in zip(head.convs, (1, 1, 1, 2), strict=True):
        hidden = F.conv2d(hidden, conv.weight, conv.bias, stride=stride, padding=1).relu()
    hidden = head.fc2(head.fc1(hidden.reshape(5, -1)).relu()).relu()
    full = head.predictor(hidden)
    assert full.shape[1] == (1 if agnostic else 7)
    expected = full[:, 0] if agnostic else full[torch.arange(5), labels]
    ours = head(features, masks, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    before = [features, masks, *head.parameters()]
    theirs = torch.autograd.grad(expected.sin().sum(), before)
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), before), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_mask_gets_a_gradient_of_one_cell_in_four():
    torch.manual_seed(0)
    masks = torch.rand(4, 28, 28, requires_grad=True)
    made(MaskIouHead, 3, 7, channels=8, width=16)(torch.randn(4, 3, 14, 14), masks, torch.arange(4)).sum().backward()
    reached = (masks.grad != 0).view(4, 14, 2, 14, 2).sum(dim=(2, 4))
    assert reached.max() == 1
    assert reached.float().mean() > 0.9


def test_initial_weights():
    torch.manual_seed(0)
    head = made(MaskIouHead, 31, 50, channels=32, width=128)
    assert [tuple(conv.weight.shape[:2]) for conv in head.convs] == [(32, 32)] * 4
    for conv in head.convs:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.03)
    for layer, fan_in in ((head.fc1, 32 * 49), (head.fc2, 128)):
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(3 / fan_in), rel=0.01)
    assert head.predictor.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert all((p == 0).all() for name, p in head.named_parameters() if name.endswith("bias"))


def test_low_precision_gives_float32_near_the_exact_result():
    torch.manual_seed(0)
    head = made(MaskIouHead, 15, 7, channels=16, width=64)
    torch.nn.init.normal_(head.predictor.weight, std=0.2)
    features, masks, labels = torch.randn(9, 15, 14, 14), torch.rand(9, 28, 28), torch.randint(7, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        low = head(features.bfloat16(), masks, labels)
        wanted, one = torch.rand(9).sub(0.2).clamp(min=0), torch.ones(9, dtype=torch.bool)
        assert mask_iou_loss(low, wanted, one).dtype == torch.float32
    assert low.dtype == torch.float32
    exact = head.double()(features.double(), masks.double(), labels)
    assert (low - exact).norm() < 0.02 * exact.norm()


def test_targets_by_hand():
    grids = torch.zeros(4, 6, 6, dtype=torch.uint8)
    grids[:, 1:5, 1:5] = 255  # a square of 40 x 40 pixels at (20, 20); cells of 10 pixels
    frames = torch.tensor([[10.0, 10.0, 70.0, 70.0]]).repeat(4, 1)
    # The whole square; its left half; the same half of which nothing was predicted; a place beside it.
    rois = torch.tensor([[20.0, 20, 60, 60], [20.0, 20, 40, 60], [20.0, 20, 40, 60], [62.0, 20, 68, 60]])
    wanted = torch.ones(4, 4, 4)
    wanted[3] = 0
    masks = torch.full((4, 4, 4), 0.4)
    masks[:2, :, :2] = 0.6  # half of the cells
    masks[3] = 0.9
    targets = mask_iou_targets(masks, wanted, rois, grids, frames, torch.tensor([[100, 100]]).expand(4, 2))
    # All cells are of the object, and half as many again lie outside of the second RoI.
    torch.testing.assert_close(targets, torch.tensor([8 / 16, 8 / 32, 0, 0]), rtol=1e-5, atol=0)


def test_the_threshold_is_a_probability():
    grid, frame = torch.full((2, 5, 5), 255, dtype=torch.uint8), torch.tensor([[0.0, 0.0, 10.0, 10.0]]).expand(2, 4)
    masks = torch.tensor([0.5, 0.501]).view(2, 1, 1).expand(2, 28, 28)  # logits 0 and 0.004
    image_sizes = torch.tensor([[10, 10]]).expand(2, 2)
    targets = mask_iou_targets(masks, torch.ones(2, 28, 28), frame, grid, frame, image_sizes)
    torch.testing.assert_close(targets, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=0)


def bitmaps_at_all_edges(height: int, width: int) -> Tensor:
    """Blobs (9, height, width) in the middle, at each edge and in each corner of an image."""
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = [(y, x) for y in (0.1, 0.5, 0.9) for x in (0.1, 0.5, 0.9)]
    radii = [((xs / width - x) / 0.3) ** 2 + ((ys / height - y) / 0.35) ** 2 for y, x in places]
    return (torch.stack(radii) + torch.rand(9, height, width) < 1.3).to(torch.uint8)


@pytest.mark.parametrize("mirrored", [False, True])
def test_shares_are_those_of_whole_bitmaps(mirrored):
    # Nor does the grid's margin count, in which masks at the image's edge are repeated beyond it.
    torch.manual_seed(0)
    height, width = 40, 56
    bitmaps = bitmaps_at_all_edges(height, width)
    grids, frames = stored(bitmaps, 64)
    assert (grids[:, 0].any(dim=1) | grids[:, :, 0].any(dim=1)).sum() == 5  # at the top or the left
    if mirrored:
        bitmaps, grids = bitmaps.flip(2), grids.flip(2)
        frames = torch.stack([width - frames[:, 2], frames[:, 1], width - frames[:, 0], frames[:, 3]], dim=1)
    rois = random_rois(300, height, width)
    own = torch.arange(300) % 9
    ours = share_inside(rois, grids[own], frames[own], torch.tensor([[height, width]]).expand(300, 2))
    theirs = torch.tensor([share_of_bitmap(bitmaps[i], roi) for i, roi in zip(own, rois.tolist(), strict=True)])
    assert ((theirs > 0) & (theirs < 1)).float().mean() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = share_inside(rois, grids[own], frames[own], torch.tensor([[height, width]]).expand(300, 2))
    assert torch.equal(low, ours)


def test_what_a_crop_cuts_off_does_not_count():
    torch.manual_seed(0)
    bitmaps = bitmaps_at_all_edges(60, 80)
    grids, frames = stored(bitmaps, 80)
    left, top, width, height = 12, 9, 50, 40
    window = bitmaps[:, top : top + height, left : left + width]
    rois = random_rois(90, height, width)
    own = torch.arange(90) % 9
    frames = frames - torch.tensor([left, top, left, top])
    ours = share_inside(rois, grids[own], frames[own], torch.tensor([[height, width]]).expand(90, 2))
    theirs = torch.tensor([share_of_bitmap(window[i], roi) for i, roi in zip(own, rois.tolist(), strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_shares_of_objects_larger_than_the_grid():
    torch.manual_seed(0)
    bitmaps = torch.zeros(1, 90, 130, dtype=torch.uint8)
    bitmaps[0, 10:90, 30:130] = torch.rand(80, 100) < 0.6  # at the right and at the bottom; 20 cells of 4 x 5 pixels
    bitmaps[0, [10, 89], 30] = bitmaps[0, 10, 129] = 1
    grids, frames = stored(bitmaps, 20)
    image_sizes = torch.tensor([[90, 130]])
    on_cells = torch.tensor([[40.0, 18.0, 85.0, 50.0]])
    share = share_inside(on_cells, grids, frames, image_sizes)
    assert share.item() == pytest.approx(share_of_bitmap(bitmaps[0], on_cells[0].tolist()), rel=2e-3)  # 1/255 a cell
    across = torch.tensor([[42.0, 19.0, 87.0, 53.0]])
    share = share_inside(across, grids, frames, image_sizes)
    assert share.item() == pytest.approx(share_of_bitmap(bitmaps[0], across[0].tolist()), rel=0.03)
    scaled = [part * 2 for part in (across, frames, image_sizes)]
    torch.testing.assert_close(share_inside(scaled[0], grids, *scaled[1:]), share)


def test_targets_are_overlaps_of_whole_masks():
    # A RoI that sees a part of the object, and a predicted mask that fills it: the IoU within the whole image.
    bitmap = torch.zeros(1, 64, 96, dtype=torch.uint8)
    bitmap[0, 20:48, 4:60] = 1
    grids, frames = stored(bitmap, 112)
    rois = torch.tensor([[18.0, 13.0, 46.0, 41.0]])  # 28 x 28 pixels, so that cells are pixels
    wanted = mask_targets(rois, grids, frames)
    image_sizes = torch.tensor([[64, 96]])
    ours = mask_iou_targets(torch.ones(1, 28, 28), wanted, rois, grids, frames, image_sizes)
    overlap = 28 * (41 - 20)
    assert ours.item() == pytest.approx(overlap / (28 * 28 + 28 * 56 - overlap), rel=1e-5)
    masks = torch.rand(1, 28, 28, requires_grad=True)
    assert not mask_iou_targets(masks, wanted, rois, grids, frames, image_sizes).requires_grad


def test_empty_slots_have_finite_targets():
    # What a device computes for slots without an object: frames without extent, RoIs and masks of any kind.
    rois = torch.tensor([[0.0, 0.0, 50.0, 60.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    grids = torch.zeros(3, 12, 12, dtype=torch.uint8)
    frames, image_sizes = torch.zeros(3, 4), torch.tensor([[60, 80], [60, 80], [0, 0]])
    wanted = torch.zeros(3, 28, 28)
    for filled in (0.0, 1.0):
        masks = torch.full((3, 28, 28), filled)
        assert (mask_iou_targets(masks, wanted, rois, grids, frames, image_sizes) == 0).all()
    odd = mask_iou_targets(torch.ones(3, 28, 28), torch.ones(3, 28, 28), rois, grids + 255, frames, image_sizes)
    assert torch.isfinite(odd).all()


def test_loss_by_hand():
    predicted = torch.tensor([0.5, -0.25, 3.0, 1.5], requires_grad=True)
    targets, weights = torch.tensor([1.0, 0.25, 0.0, 0.5]), torch.tensor([True, True, True, False])
    loss = mask_iou_loss(predicted, targets, weights)  # the third row's mask meets no object, the fourth is empty
    assert loss.item() == pytest.approx((0.25 + 0.25) / 2)
    loss.backward()
    assert predicted.grad.tolist() == [-0.5, -0.5, 0, 0]
    none = mask_iou_loss(predicted, targets, torch.zeros(4, dtype=torch.bool))
    none.backward()
    assert none.item() == 0
    exact = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: mask_iou_loss(p, targets.double(), weights), exact)


@pytest.mark.parametrize("agnostic", [False, True])
def test_no_rois(agnostic):
    head = made(MaskIouHead, 4, 3, channels=4, width=8, class_agnostic=agnostic)
    masks, labels = torch.zeros(0, 28, 28), torch.zeros(0, dtype=torch.int64)
    predicted = head(torch.zeros(0, 4, 14, 14), masks, labels)
    boxes, grids = torch.zeros(0, 4), torch.zeros(0, 9, 9, dtype=torch.uint8)
    targets = mask_iou_targets(masks, masks, boxes, grids, boxes, torch.zeros(0, 2, dtype=torch.int64))
    assert predicted.shape == targets.shape == (0,)
    loss = mask_iou_loss(predicted, targets, torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in head.parameters())
