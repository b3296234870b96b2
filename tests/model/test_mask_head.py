"""Mask head, targets and loss against the recordings; targets of grids against those of whole bitmaps."""

import math

import pytest
import torch
from tiny import made, rasterise
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailseg.layers.normalized import NormalizedConv2d
from tailseg.model.mask_head import MASK_SIZE, MaskHead, mask_loss, mask_targets


def whole_bitmaps_as_grids(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmaps (M, H, W) of 0 and 1 as square grids with a cell a pixel; beyond the image its edge is repeated."""
    side = max(masks.shape[1:])
    rows, columns = (torch.arange(side).clamp(max=extent - 1) for extent in masks.shape[1:])
    grids = masks[:, rows][:, :, columns] * 255
    return grids.to(torch.uint8), torch.tensor([0.0, 0.0, side, side]).expand(len(masks), 4)


@pytest.mark.parametrize(("recording", "name"), [("head_mask", "deconv"), ("carafe", "mask_head")])
def test_recorded_head(recorded, check, recording, name):
    case, inputs, state, outputs = next(c for c in recorded(recording) if c[0]["name"] == name)
    build = case["settings"]["build"]
    classes = build["num_classes"]
    upsample = build["upsample_cfg"]["type"] if recording == "carafe" else "deconv"
    sizes = {"channels": build["conv_out_channels"], "convs": build["num_convs"]}
    head = made(MaskHead, build["in_channels"], classes, **sizes, upsample=upsample)
    names = {"conv_logits": "predictor", "channel_compressor": "compressor", "content_encoder": "encoder"}

    def own(name: str) -> str:
        return ".".join(names.get(part, part) for part in name.replace(".conv.", ".").split("."))

    head.load_state_dict({own(key): value for key, value in state.items()})
    features = inputs["features"].clone().requires_grad_()
    repeated = features.repeat_interleave(classes, dim=0)  # each RoI once for every class
    logits = head(repeated, torch.arange(classes).repeat(len(features))).unflatten(0, (-1, classes))
    check(case, "out0", logits, outputs["out0"])
    ((logits**2).sum() / 2).backward()
    check(case, "grad.features", features.grad, outputs["grad.features"])
    parameters = dict(head.named_parameters())
    norms = [parameters[own(name)].grad.double().norm() for name in case["settings"]["parameters"]]
    check(case, "param_grad_norms", torch.stack(norms), outputs["param_grad_norms"])


def test_recorded_targets_and_loss(recorded, check):
    seen = []
    for case, inputs, _, outputs in recorded("head_mask"):
        if case["kind"] != "mask_targets":
            continue
        grids, frames = whole_bitmaps_as_grids(inputs["masks"])
        own = inputs["assigned"]
        targets = mask_targets(inputs["proposals"], grids[own], frames[own])
        check(case, "targets", targets, outputs["targets"])
        rows = torch.arange(len(own))
        labels = inputs["labels"] if case["settings"]["num_classes"] > 1 else torch.zeros_like(own)
        logits = inputs["mask_logits"][rows, labels].requires_grad_()
        loss = mask_loss(logits, outputs["targets"], torch.ones(len(own), dtype=torch.bool))
        check(case, "loss", loss, outputs["loss"])
        loss.backward()
        check(case, "grad.own_class", logits.grad, outputs["grad.own_class"])
        seen.append(case["name"])
    assert seen == ["targets", "targets_all"]


def test_one_row_of_the_predictor_is_that_channel_of_the_convolution():
    torch.manual_seed(0)
    head = made(MaskHead, 5, 11, channels=6, convs=2)
    torch.nn.init.normal_(head.predictor.bias)
    features, labels = torch.randn(7, 5, 14, 14), torch.tensor([0, 10, 3, 3, 7, 1, 5])
    hidden = features
    for conv in head.convs:
        hidden = F.relu(conv(hidden))
    full = head.predictor(F.relu(head.upsample(hidden)))
    torch.testing.assert_close(head(features, labels), full[torch.arange(7), labels], rtol=1e-5, atol=1e-5)


def normalized_pair(classes: int, agnostic: bool, temperature: float) -> tuple[MaskHead, NormalizedConv2d]:
    """A normalised head, and the layer that computes all of its rows."""
    torch.manual_seed(0)
    head = made(
        MaskHead, 5, classes, channels=6, convs=2, class_agnostic=agnostic, normalized=True, temperature=temperature
    )
    torch.nn.init.normal_(head.predictor.bias)
    layer = NormalizedConv2d(6, 1 if agnostic else classes, 1, temperature=temperature)
    layer.load_state_dict(head.predictor.state_dict())
    return head, layer


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("temperature", [20.0, 3.0])
def test_a_normalized_predictor_is_the_normalized_convolution(agnostic, low_precision, temperature):
    head, layer = normalized_pair(11, agnostic, temperature)
    labels = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    features = torch.randn(7, 5, 14, 14)
    mine, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        logits = head(mine, labels)
        hidden = theirs.contiguous(memory_format=torch.channels_last)
        for conv in head.convs:
            hidden = F.relu(conv(hidden))
        full = layer(F.relu(head.upsample(hidden)))
    assert logits.dtype == full.dtype == torch.float32
    own = full[torch.arange(7), torch.zeros_like(labels) if agnostic else labels]
    torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-4)
    bias = head.predictor.bias.abs().max()
    assert logits.abs().max() <= temperature + bias
    assert logits.std() > 0.05 * temperature
    # The same gradients, of features, of the layers before and of the predictor.
    upstream = torch.randn(logits.shape)
    before = [mine, *head.parameters()]
    ours = torch.autograd.grad(logits, before, upstream)
    others = [theirs, *head.convs.parameters(), *head.upsample.parameters(), *layer.parameters()]
    bound = 0.02 if low_precision else 1e-4
    for a, b in zip(ours, torch.autograd.grad(own, others, upstream), strict=True):
        assert (a - b.view_as(a)).norm() <= bound * b.norm()


def test_length_of_a_normalized_row_does_not_matter():
    head, _ = normalized_pair(4, False, 20.0)
    features, labels = torch.randn(4, 5, 14, 14), torch.arange(4)
    before = head(features, labels)
    with torch.no_grad():
        head.predictor.weight[2] *= 50
    torch.testing.assert_close(head(features, labels), before, rtol=1e-3, atol=1e-3)


def test_no_rois_of_a_normalized_head():
    for agnostic in (False, True):
        head, _ = normalized_pair(3, agnostic, 20.0)
        logits = head(torch.zeros(0, 5, 14, 14), torch.zeros(0, dtype=torch.int64))
        assert logits.shape == (0, MASK_SIZE, MASK_SIZE)
        logits.sum().backward()
        assert all((p.grad == 0).all() for p in head.parameters())
    dark = head(torch.full((2, 5, 14, 14), -1e9), torch.zeros(2, dtype=torch.int64))  # hidden maps of zeros
    assert torch.isfinite(dark).all()


def test_no_rois():
    head = made(MaskHead, 4, 3, channels=4, convs=1)
    logits = head(torch.zeros(0, 4, 14, 14), torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0, MASK_SIZE, MASK_SIZE)
    targets = mask_targets(torch.zeros(0, 4), torch.zeros(0, 9, 9, dtype=torch.uint8), torch.zeros(0, 4))
    assert targets.shape == (0, MASK_SIZE, MASK_SIZE)
    loss = mask_loss(logits, targets, torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in head.parameters())


def test_loss_by_hand_and_empty_slots():
    logits = torch.full((3, 2, 2), 1.5, requires_grad=True)
    targets = torch.stack([torch.ones(2, 2), torch.tensor([[1.0, 0], [0, 0]]), torch.ones(2, 2)])
    loss = mask_loss(logits, targets, torch.tensor([True, True, False]))
    hit, miss = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert loss.item() == pytest.approx((4 * hit + hit + 3 * miss) / 8, rel=1e-6)
    loss.backward()
    assert (logits.grad[2] == 0).all()
    assert (logits.grad[:2] != 0).all()
    none = mask_loss(logits, targets, torch.zeros(3, dtype=torch.bool))
    none.backward()
    assert none.item() == 0


def test_targets_by_hand():
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    masks[0, :, 2:] = 255  # the right half of a frame of 40 x 80 pixels at (10, 20)
    frame = torch.tensor([[10.0, 20.0, 50.0, 100.0]])
    whole = mask_targets(frame, masks, frame, size=4)
    assert whole[0].tolist() == [[0, 0, 1, 1]] * 4
    right = mask_targets(torch.tensor([[32.0, 30.0, 48.0, 60.0]]), masks, frame, size=4)
    assert right.mean() == 1
    left = mask_targets(torch.tensor([[10.0, 30.0, 28.0, 60.0]]), masks, frame, size=4)
    assert left.mean() == 0


def test_targets_do_not_depend_on_where_the_image_is_or_how_large():
    torch.manual_seed(0)
    masks = (torch.rand(5, 16, 16) < 0.5).to(torch.uint8) * 255
    corner = torch.rand(5, 2) * 20
    frames = torch.cat([corner, corner + 64], dim=1)
    boxes = torch.cat([corner + 7, corner + torch.tensor([50.0, 40.0])], dim=1)
    plain = mask_targets(boxes, masks, frames)
    assert 0.3 < plain.mean() < 0.7
    assert torch.equal(mask_targets(boxes * 2, masks, frames * 2), plain)
    assert torch.equal(mask_targets(boxes + 128, masks, frames + 128), plain)

    def mirrored(box: Tensor) -> Tensor:
        return torch.stack([-box[:, 2], box[:, 1], -box[:, 0], box[:, 3]], dim=1)

    flipped = mask_targets(mirrored(boxes), masks.flip(2), mirrored(frames))
    assert (flipped.flip(2) != plain).float().mean() < 0.01  # rounding at 0.5


def test_targets_of_stored_grids_are_those_of_whole_bitmaps():
    height, width = 120, 90
    polygon = torch.tensor([10.0, 15.0, 70.0, 5.0, 90.0, 60.0, 45.0, 110.0, 20.0, 80.0]).numpy()
    grid, frame = rasterise([polygon], (height, width), 112)
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cell_w, cell_h = ((frame[2] - frame[0]) / grid.shape[1], (frame[3] - frame[1]) / grid.shape[0])
    columns, rows = ((xs + 0.5 - frame[0]) / cell_w).long(), ((ys + 0.5 - frame[1]) / cell_h).long()
    bitmap = torch.from_numpy(grid)[rows.clamp(0, 113), columns.clamp(0, 113)].float() / 255
    boxes = torch.tensor([[0.0, 0.0, 90.0, 120.0], [12.0, 3.0, 88.5, 61.0], [40.0, 40.0, 47.0, 52.0]])
    ours = mask_targets(boxes, torch.from_numpy(grid).expand(3, -1, -1), torch.from_numpy(frame).expand(3, -1))
    rois = torch.cat([torch.zeros(3, 1), boxes], dim=1)
    theirs = roi_align(bitmap[None, None], rois, MASK_SIZE, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5
    assert (ours.bool() != theirs).float().mean() < 0.001
    assert 0.2 < ours[0].mean() < 0.9


def test_padding_has_empty_targets():
    # What a device computes for slots without an object: frames without extent, boxes of any kind.
    boxes = torch.tensor([[0.0, 0.0, 50.0, 60.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    masks = torch.zeros(3, 12, 12, dtype=torch.uint8)
    assert (mask_targets(boxes, masks, torch.zeros(3, 4)) == 0).all()


def normed(upsample: str = "deconv", classes: int = 6) -> MaskHead:
    torch.manual_seed(0)
    head = made(MaskHead, 5, classes, channels=4, convs=2, norm=True, upsample=upsample)
    for norm in head.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    torch.nn.init.normal_(head.predictor.bias)
    return head


@pytest.mark.parametrize("upsample", ["deconv", "carafe"])
def test_batch_norm_follows_every_convolution(upsample):
    """And a ReLU the batch norm."""
    head = normed(upsample).double()
    assert all(conv.bias is None for conv in head.convs)
    features, labels = torch.randn(5, 5, 14, 14, dtype=torch.float64), torch.tensor([0, 5, 2, 2, 3])
    for training in (True, False):
        hidden = features
        for conv, norm in zip(head.convs, head.norms, strict=True):
            hidden = F.conv2d(hidden, conv.weight, padding=1)
            mean, var = norm.running_mean.clone(), norm.running_var.clone()
            if training:
                mean, var = hidden.mean(dim=(0, 2, 3)), hidden.var(dim=(0, 2, 3), unbiased=False)
            hidden = (hidden - mean.view(4, 1, 1)) / (var + 1e-5).sqrt().view(4, 1, 1)
            hidden = (hidden * norm.weight.view(4, 1, 1) + norm.bias.view(4, 1, 1)).relu()
        hidden = head.upsample(hidden)
        if upsample == "deconv":
            hidden = hidden.relu()
        full = F.conv2d(hidden, head.predictor.weight, head.predictor.bias)
        logits = head.train(training)(features, labels, torch.ones(5, dtype=torch.bool))
        torch.testing.assert_close(logits.double(), full[torch.arange(5), labels], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("upsample", ["deconv", "carafe"])
def test_rows_that_are_not_live_do_not_matter(upsample):
    """To the others, whatever is in them: logits, gradients and running statistics are those without them."""
    live = torch.tensor([True, False, True, True, False])
    torch.manual_seed(1)
    features, labels = torch.randn(5, 5, 14, 14), torch.tensor([0, 0, 5, 1, 0])
    features[~live] *= 1e3
    upstream = torch.randn(3, MASK_SIZE, MASK_SIZE)

    def step(rows: Tensor, flags: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        head = normed(upsample).train()
        logits = head(features[rows], labels[rows], flags)
        logits = logits if flags is None else logits[flags]
        gradients = torch.autograd.grad((logits * upstream).sum(), list(head.parameters()))
        return logits, [*gradients, *head.buffers()]

    ours, theirs = step(torch.arange(5), live), step(live.nonzero().squeeze(1), None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    for own, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("upsample", ["deconv", "carafe"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_live_row_leaves_the_statistics_alone(upsample, rows):
    head = normed(upsample).train()
    before = [buffer.clone() for norm in head.norms for buffer in (norm.running_mean, norm.running_var)]
    none = torch.zeros(rows, dtype=torch.bool)
    logits = head(torch.randn(rows, 5, 14, 14), torch.zeros(rows, dtype=torch.int64), none)
    assert logits.shape == (rows, MASK_SIZE, MASK_SIZE)
    loss = mask_loss(logits, torch.zeros_like(logits), none)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in head.parameters())
    after = [buffer for norm in head.norms for buffer in (norm.running_mean, norm.running_var)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_at_test_time_rows_do_not_see_each_other():
    head = normed("carafe").eval()
    features, labels = torch.randn(4, 5, 14, 14), torch.tensor([3, 0, 5, 5])
    together = head(features, labels)
    alone = torch.cat([head(features[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upsample", ["deconv", "carafe"])
def test_low_precision_gives_float32_near_the_exact_result(upsample):
    head = normed(upsample).train()
    features, labels = torch.randn(6, 5, 14, 14), torch.tensor([3, 0, 5, 5, 1, 2])
    live = torch.tensor([True] * 4 + [False] * 2)
    exact = head(features, labels, live)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features, labels, live)
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 0.03 * exact.norm()
