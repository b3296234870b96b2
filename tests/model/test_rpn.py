"""The RPN against the recordings, its losses against loops over the sampled anchors, and its limits."""

import math

import pytest
import torch
from tiny import made
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from tailseg.model import rpn as rpn_module
from tailseg.model.boxes import anchor_grid, encode, smooth_l1
from tailseg.model.matching import Sampled
from tailseg.model.rpn import NO_STDS, RPN, STRIDES, RpnOutput


def output_of(rpn: RPN, logits: list[Tensor], deltas: list[Tensor]) -> RpnOutput:
    """What `forward` returns if its convolutions say these maps (B, 3, h, w) and (B, 12, h, w)."""
    anchors = [
        anchor_grid(base, (stride, stride), tuple(level.shape[2:]))
        for base, stride, level in zip(rpn.base_anchors, STRIDES, logits, strict=True)
    ]
    batch = len(logits[0])
    return RpnOutput(
        logits=torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1) for level in logits], 1),
        deltas=torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in deltas], 1),
        anchors=torch.cat(anchors),
        level_sizes=[len(a) for a in anchors],
        grid_hws=[tuple(level.shape[2:]) for level in logits],
        stride_hws=[(stride, stride) for stride in STRIDES],
    )


def test_recorded_proposals(recorded, check):
    case, inputs, _, outputs = next(c for c in recorded("proposals_nms") if c[0]["kind"] == "rpn_proposals")
    about = case["settings"]
    rpn = made(
        RPN, 4, pre_nms_test=about["nms_pre"], post_nms_test=about["max_per_img"], nms_iou=about["nms_iou"]
    ).eval()
    output = output_of(rpn, [inputs[f"logits{i}"] for i in range(5)], [inputs[f"deltas{i}"] for i in range(5)])
    proposals = rpn.propose(output, torch.tensor(about["image_shapes"]), training=rpn.training)
    assert proposals.valid.all()
    check(case, "image0.bboxes", proposals.boxes[0], outputs["image0.bboxes"])
    check(case, "image0.scores", proposals.scores[0], outputs["image0.scores"])


def test_recorded_anchors_inside_the_padded_image(recorded, check):
    case, _, _, outputs = next(c for c in recorded("anchors_assign") if c[0]["kind"] == "anchors")
    rpn = made(RPN, 4, size_divisor=1)
    maps = [torch.zeros(1, 12, *grid_hw) for grid_hw in case["settings"]["feature_sizes"]]
    output = output_of(rpn, [m[:, :3] for m in maps], maps)
    inside = rpn.trained_anchors(output, torch.tensor([case["settings"]["pad_shape"]]))[0]
    for level, part in enumerate(inside.split(output.level_sizes)):
        check(case, f"valid{level}", part, outputs[f"valid{level}"])


def test_images_count_as_padded_to_the_divisor():
    rpn = made(RPN, 4, size_divisor=32)
    maps = [torch.zeros(2, 12, 128 // s, 128 // s) for s in STRIDES]
    output = output_of(rpn, [m[:, :3] for m in maps], maps)
    inside = rpn.trained_anchors(output, torch.tensor([[33, 128], [1, 90]]))
    counts = [[part.sum().item() // 3 for part in image.split(output.level_sizes)] for image in inside]
    assert counts == [[16 * 32, 8 * 16, 4 * 8, 2 * 4, 1 * 2], [8 * 24, 4 * 12, 2 * 6, 1 * 3, 1 * 2]]


def pyramid_of(hw: tuple[int, int], channels: int = 4) -> list[Tensor]:
    """Maps as the neck gives them for a padded image: P6 holds every second place of P5."""
    maps = [torch.zeros(1, channels, hw[0] // s, hw[1] // s) for s in STRIDES[:4]]
    return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]


@pytest.mark.parametrize("hw", [(800, 1088), (96, 160), (128, 128), (32, 32), (1344, 800)])
def test_anchors_of_torchvision(hw):
    pyramid = pyramid_of(hw)
    theirs = AnchorGenerator(tuple((8 * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * 5)
    (expected,) = theirs(ImageList(torch.zeros(1, 3, *hw), [hw]), pyramid)
    rpn = made(RPN, 4, rounded_anchors=True, fitted_strides=True)
    with torch.no_grad():
        output = rpn(pyramid)
    assert torch.equal(output.anchors, expected)
    # Where a level's grid is not the image divided by its stride, distances differ.
    with torch.no_grad():
        plain = made(RPN, 4, rounded_anchors=True)(pyramid)
    assert plain.stride_hws == [(s, s) for s in STRIDES]
    assert torch.equal(plain.anchors, expected) == (hw in [(128, 128), (32, 32)])


def test_fitted_strides_by_hand():
    rpn = made(RPN, 4, fitted_strides=True)
    with torch.no_grad():
        output = rpn(pyramid_of((96, 160)))
    assert output.grid_hws == [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    assert output.stride_hws == [(4, 4), (8, 8), (16, 16), (32, 32), (48, 53)]
    # The image counts as 64 x 128: rows 0, 48 and columns 0, 53, 106 lie in it; of stride 64 only row 0 and 0, 64.
    last = rpn.trained_anchors(output, torch.tensor([[40, 100]]))[0, -18:]
    assert last.all()
    rpn.size_divisor = 1  # 100 px hold 0 and 53 of the columns; 40 px row 0 alone
    last = rpn.trained_anchors(output, torch.tensor([[40, 100]]))[0, -18:].view(2, 3, 3)
    assert last.all(2).tolist() == last.any(2).tolist() == [[True, True, False], [False, False, False]]
    plain = made(RPN, 4)
    with torch.no_grad():
        output = plain(pyramid_of((96, 160)))
    last = plain.trained_anchors(output, torch.tensor([[40, 100]]))[0, -18:].view(2, 3, 3)
    assert last.all(2).tolist() == [[True, True, False], [False, False, False]]


def test_anchors_inside_the_image_by_hand():
    """Squares of 32 px every 32 px, reaching 16 px each way; an edge on the image's right or lower one is outside."""
    rpn = made(RPN, 4, anchor_scale=1.0, inside_image=True)
    with torch.no_grad():
        output = rpn(pyramid_of((64, 96)))
    sizes = [(64, 96), (49, 81), (49, 80), (48, 81), (40, 40)]
    trained = rpn.trained_anchors(output, torch.tensor(sizes))
    squares = {}
    for image, hw in zip(trained, sizes, strict=True):
        level = image.split(output.level_sizes)[3].view(2, 3, 3)  # rows, columns, ratios
        squares[hw] = [(32 * row, 32 * column) for row, column in level[:, :, 1].nonzero().tolist()]
    assert squares == {
        (64, 96): [(32, 32), (32, 64)],
        (49, 81): [(32, 32), (32, 64)],
        (49, 80): [(32, 32)],
        (48, 81): [],
        (40, 40): [],
    }
    # At ratio 0.5 they reach 22.6 px to the sides and 11.3 up and down.
    wide = trained[0].split(output.level_sizes)[3].view(2, 3, 3)[:, :, 0]
    assert wide.nonzero().tolist() == [[1, 1], [1, 2]]
    assert trained[0].split(output.level_sizes)[4].sum() == 0  # all centred on the upper edge


@pytest.mark.parametrize("options", [{}, {"rounded_anchors": True}, {"fitted_strides": True}])
def test_anchors_inside_the_image_equal_loops(options):
    rpn = made(RPN, 4, anchor_scale=2.0, inside_image=True, **options)
    with torch.no_grad():
        output = rpn(pyramid_of((96, 160)))
    sizes = torch.tensor([[96, 160], [70, 97], [5, 160]])
    trained = rpn.trained_anchors(output, sizes)
    for image, (height, width) in enumerate(sizes.tolist()):
        expected = [
            x1 >= 0 and y1 >= 0 and x2 < width and y2 < height for x1, y1, x2, y2 in output.anchors.double().tolist()
        ]
        assert trained[image].tolist() == expected
    assert [row.any().item() for row in trained] == [True, True, False]


def test_recorded_anchors_inside_the_image_itself(recorded):
    """Those of the recording in the padded image, less every one that reaches over an edge."""
    case, _, _, outputs = next(c for c in recorded("anchors_assign") if c[0]["kind"] == "anchors")
    rpn = made(RPN, 4, size_divisor=1, inside_image=True)
    maps = [torch.zeros(1, 12, *grid_hw) for grid_hw in case["settings"]["feature_sizes"]]
    output = output_of(rpn, [m[:, :3] for m in maps], maps)
    height, width = case["settings"]["pad_shape"]
    trained = rpn.trained_anchors(output, torch.tensor([[height, width]]))[0]
    for level, part in enumerate(trained.split(output.level_sizes)):
        anchors, valid = outputs[f"anchors{level}"].double(), outputs[f"valid{level}"].bool()
        # Area of the part in the image: that of the whole for those inside.
        cut = torch.stack([anchors[:, d].clamp(0, (width, height)[d % 2]) for d in range(4)], dim=1)
        whole, part_area = (((b[:, 2:] - b[:, :2]).clamp(min=0)).prod(1) for b in (anchors, cut))
        touches = (anchors[:, 2] == width) | (anchors[:, 3] == height)
        assert torch.equal(part, valid & (part_area == whole) & ~touches)
    assert 0 < trained.sum() < len(trained)


def test_only_anchors_inside_the_image_are_trained():
    torch.manual_seed(0)
    rpn = made(RPN, 4, anchor_scale=1.0, inside_image=True)
    output = rpn([torch.randn(2, 4, 64 // s, 96 // s + (s == 64)) for s in STRIDES])
    output.logits.retain_grad()
    output.deltas.retain_grad()
    sizes = torch.tensor([[64, 96], [30, 40]])
    boxes = torch.tensor([[[17.0, 17, 47, 49]], [[12.0, 12, 20, 21]]])
    losses = rpn.loss(output, sizes, boxes, torch.ones(2, 1, dtype=torch.bool))
    sum(losses.values()).backward()
    for image in range(2):
        for anchor in output.logits.grad[image].nonzero().squeeze(1).tolist():
            x1, y1, x2, y2 = output.anchors[anchor].tolist()
            assert min(x1, y1) >= 0
            assert x2 < sizes[image, 1]
            assert y2 < sizes[image, 0]
        assert (output.logits.grad[image] != 0).sum() > 50
        assert (output.deltas.grad[image] != 0).any()


def test_an_image_without_anchors_inside_has_no_loss():
    rpn = made(RPN, 4, inside_image=True)
    output = rpn([torch.randn(1, 4, max(1, 32 // s), max(1, 32 // s)) for s in STRIDES])
    losses = rpn.loss(output, torch.tensor([[20, 20]]), torch.tensor([[[2.0, 2, 18, 18]]]), torch.ones(1, 1).bool())
    sum(losses.values()).backward()
    assert [losses[name].item() for name in ("rpn_objectness", "rpn_box")] == [0, 0]
    assert all((p.grad == 0).all() for p in rpn.parameters())


def small_rpn(seed: int = 0) -> tuple[RPN, RpnOutput]:
    torch.manual_seed(seed)
    rpn = made(RPN, 4)
    for layer in (rpn.conv, rpn.objectness, rpn.deltas):
        nn.init.normal_(layer.weight, std=0.3)
    output = rpn([torch.randn(2, 4, 64 // s, 96 // s + (s == 64)) for s in STRIDES])
    return rpn, output


def test_forward_lays_out_rows_columns_and_ratios():
    torch.manual_seed(0)
    rpn = made(RPN, 4)
    maps = [torch.randn(1, 4, 2, 3) for _ in STRIDES]
    output = rpn(maps)
    hidden = F.relu(rpn.conv(maps[1]))
    logits, deltas = rpn.objectness(hidden)[0], rpn.deltas(hidden)[0]
    row, column, ratio = 1, 2, 1
    position = 18 + (row * 3 + column) * 3 + ratio
    assert output.logits[0, position] == logits[ratio, row, column]
    assert torch.equal(output.deltas[0, position], deltas[4 * ratio : 4 * ratio + 4, row, column])
    centre = (output.anchors[position, :2] + output.anchors[position, 2:]) / 2
    assert centre.tolist() == [column * 8, row * 8]


def fixed_sampling(monkeypatch) -> Sampled:
    drawn = Sampled(
        index=torch.tensor([[5, 900, 30, 7, 8], [40, 3, 2, 1, 0]]),
        matched=torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
        positive=torch.tensor([[True, True, False, False, False], [False] * 5]),
        valid=torch.tensor([[True, True, True, False, False], [True, True, False, False, False]]),
    )
    monkeypatch.setattr(rpn_module, "sample", lambda matched, num_samples, most: drawn)
    return drawn


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
def test_losses_equal_loops(monkeypatch, beta):
    rpn, output = small_rpn()
    rpn.box_beta = beta
    drawn = fixed_sampling(monkeypatch)
    boxes = torch.tensor([[[3.0, 4, 30, 40], [10, 10, 60, 50]], [[0.0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [False, False]])
    losses = rpn.loss(output, torch.tensor([[64, 96], [60, 90]]), boxes, valid)
    objectness = box = 0.0
    for image in range(2):
        for slot in range(5):
            if not drawn.valid[image, slot]:
                continue
            anchor = int(drawn.index[image, slot])
            positive = bool(drawn.positive[image, slot])
            logit = output.logits[image, anchor].item()
            objectness += math.log1p(math.exp(-logit if positive else logit))
            if positive:
                own = boxes[image, drawn.matched[image, slot]]
                target = encode(output.anchors[anchor], own, NO_STDS)
                for distance in (output.deltas[image, anchor] - target).abs().tolist():
                    box += distance - beta / 2 if distance >= beta else distance**2 / (2 * beta)
    total = (2 + 1) + (1 + 2)  # of each image: positives or 1, and negatives or 1
    assert losses["rpn_objectness"].item() == pytest.approx(objectness / total, rel=1e-5)
    assert losses["rpn_box"].item() == pytest.approx(box / total, rel=1e-5)


def test_losses_without_objects():
    rpn, output = small_rpn()
    losses = rpn.loss(
        output, torch.tensor([[64, 96], [60, 90]]), torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.bool)
    )
    sum(losses.values()).backward()
    assert losses["rpn_box"].item() == 0
    assert losses["rpn_objectness"].item() > 0
    assert all(torch.isfinite(p.grad).all() for p in rpn.parameters())
    assert (rpn.deltas.weight.grad == 0).all()


def test_the_sampler_gets_the_anchors_of_an_object(monkeypatch):
    rpn, output = small_rpn()
    seen = {}

    def remember(matched: Tensor, num_samples: int, most: int) -> Sampled:
        seen.update(matched=matched, num_samples=num_samples, most=most)
        return real(matched, num_samples, most)

    real = rpn_module.sample
    monkeypatch.setattr(rpn_module, "sample", remember)
    own = output.anchors[700]  # an object that equals an anchor
    rpn.loss(output, torch.tensor([[64, 96], [64, 96]]), own.expand(2, 1, 4), torch.ones(2, 1, dtype=torch.bool))
    assert (seen["num_samples"], seen["most"]) == (256, 128)
    assert seen["matched"][:, 700].tolist() == [0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_limits_of_proposals(training):
    rpn, output = small_rpn()
    rpn.pre_nms, rpn.post_nms = {True: 50, False: 20}, {True: 90, False: 30}
    rpn.train(training)
    image_sizes = torch.tensor([[64, 96], [40, 90]])
    proposals = rpn.propose(output, image_sizes, training=rpn.training)
    assert proposals.boxes.shape == (2, 90 if training else 30, 4)
    assert not proposals.boxes.requires_grad
    for image in range(2):
        valid = proposals.valid[image]
        boxes, scores = proposals.boxes[image][valid], proposals.scores[image][valid]
        assert valid.any()
        assert torch.equal(valid, torch.arange(len(valid)) < valid.sum())  # best first, unused slots last
        assert (scores.diff() <= 0).all()
        limits = torch.tensor([*image_sizes[image].flip(0), *image_sizes[image].flip(0)])
        assert (boxes >= 0).all()
        assert (boxes <= limits).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_boxes_outside_the_image_are_dropped():
    rpn = made(RPN, 4).eval()
    maps = [torch.zeros(1, 12, 2, 2) for _ in STRIDES]
    for level in maps:
        level[:, 0::4] = 100.0  # a hundred widths to the right
    output = output_of(rpn, [torch.zeros(1, 3, 2, 2)] * 5, maps)
    assert not rpn.propose(output, torch.tensor([[64, 64]]), training=rpn.training).valid.any()


def test_smooth_l1():
    x = torch.tensor([-2.0, -0.05, 0.0, 0.05, 2.0])
    assert torch.equal(smooth_l1(x, torch.zeros(5), 0.0), x.abs())
    expected = [1.95, 0.0125, 0, 0.0125, 1.95]
    torch.testing.assert_close(smooth_l1(x, torch.zeros(5), 0.1), torch.tensor(expected))


@pytest.mark.parametrize("cells", ["none", "corners", "some", "all"])
@pytest.mark.parametrize("hw", [(1, 1), (1, 5), (6, 7)])
def test_sparse_backward_equals_that_of_the_convolutions(cells, hw):
    torch.manual_seed(0)
    rpn = made(RPN, 4).double()
    for layer in (rpn.conv, rpn.objectness, rpn.deltas):
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.normal_(layer.bias, std=0.3)
    features = torch.randn(3, 4, *hw, dtype=torch.float64, requires_grad=True)
    chosen = torch.zeros(3, 1, *hw, dtype=torch.bool)
    if cells == "corners":
        chosen[0, :, 0, 0] = chosen[0, :, -1, -1] = chosen[2, :, 0, -1] = True
    elif cells != "none":
        chosen = torch.rand(chosen.shape) < (0.3 if cells == "some" else 2.0)
    upstream = [torch.randn(3, c, *hw, dtype=torch.float64) * chosen for c in (3, 12)]
    inputs = [features, *rpn.parameters()]
    hidden = F.relu(rpn.conv(features))
    plain = [rpn.objectness(hidden), rpn.deltas(hidden)]
    fast = list(rpn._head(features))
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(plain, inputs, upstream)
    for ours, theirs in zip(torch.autograd.grad(fast, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(rpn._head(features)[0], plain[0])
