"""Box arithmetic against the recording, against loops over pairs, and as properties of random boxes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailseg.model.boxes import (
    MAX_LOG_SCALE,
    anchor_grid,
    base_anchors,
    box_areas,
    clip,
    decode,
    encode,
    pairwise_iou,
)

STDS = [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2), (0.033, 0.033, 0.067, 0.067)]

coordinate = st.floats(-200, 800, width=32)
extent = st.floats(0.5, 600, width=32)
box = st.tuples(coordinate, coordinate, extent, extent).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
boxes_ = st.lists(box, min_size=1, max_size=8)


def test_recorded_coder(recorded, check):
    seen = 0
    for case, inputs, _, outputs in recorded("box_coder"):
        stds = tuple(case["settings"]["stds"])
        image_sizes = torch.tensor([case["settings"]["image_shape"]])
        boxes = inputs["decode_boxes"]
        check(case, "encoded", encode(inputs["boxes"], inputs["targets"], stds), outputs["encoded"])
        decoded = decode(boxes, inputs["deltas"], stds)
        check(case, "decoded", decoded, outputs["decoded"])
        check(case, "decoded_clipped", clip(decoded[None], image_sizes)[0], outputs["decoded_clipped"])
        per_class = decode(boxes[:, None], inputs["class_deltas"].view(len(boxes), -1, 4), stds)
        clipped = clip(per_class[None], image_sizes)[0].flatten(1)
        check(case, "decoded_per_class", clipped, outputs["decoded_per_class"])
        seen += 1
    assert seen == 4


def test_recorded_anchors(recorded, check):
    case, _, _, outputs = next(c for c in recorded("anchors_assign") if c[0]["kind"] == "anchors")
    about = case["settings"]
    for level, (stride, grid_hw) in enumerate(zip(about["strides"], about["feature_sizes"], strict=True)):
        base = base_anchors(about["scales"][0] * stride, about["ratios"])
        check(case, f"base{level}", base, outputs[f"base{level}"])
        check(case, f"anchors{level}", anchor_grid(base, (stride, stride), grid_hw), outputs[f"anchors{level}"])


def test_anchors_by_hand():
    base = base_anchors(8, (0.25, 1.0, 4.0))
    assert base.tolist() == [[-8, -2, 8, 2], [-4, -4, 4, 4], [-2, -8, 2, 8]]
    grid = anchor_grid(base[1:2], (4, 4), (2, 3))  # by row, then column
    centres = (grid[:, :2] + grid[:, 2:]) / 2
    assert centres.tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]
    assert anchor_grid(base, (4, 4), (0, 3)).shape == (0, 4)


def test_rounded_anchors_by_hand():
    # Half sides of 32 px at ratios 0.5, 1 and 2: 22.63 x 11.31, 16 x 16, 11.31 x 22.63.
    rounded = [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    assert base_anchors(32, (0.5, 1.0, 2.0), rounded=True).tolist() == rounded
    exact = torch.tensor([[-16 * 2**0.5, -16 / 2**0.5, 16 * 2**0.5, 16 / 2**0.5]])
    torch.testing.assert_close(base_anchors(32, (0.5,)), exact)


def test_anchors_of_different_distances():
    grid = anchor_grid(torch.tensor([[-1.0, -2.0, 1.0, 2.0]]), (7, 10), (2, 3))
    assert grid.tolist() == [[x - 1, y - 2, x + 1, y + 2] for y in (0, 7) for x in (0, 10, 20)]


@pytest.mark.parametrize("stds", STDS)
def test_deltas_by_hand(stds):
    boxes, targets = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[4.0, 10.0, 24.0, 20.0]])
    raw = torch.tensor([[0.9, 0.25, math.log(2), math.log(0.5)]])  # centre (14, 15) from (5, 10)
    torch.testing.assert_close(encode(boxes, targets, stds), raw / torch.tensor(stds))


@pytest.mark.parametrize("stds", STDS)
@given(boxes=boxes_, targets=boxes_)
def test_decode_inverts_encode(stds, boxes, targets):
    n = min(len(boxes), len(targets))
    boxes, targets = torch.tensor(boxes[:n]), torch.tensor(targets[:n])
    ratio = (targets[:, 2:] - targets[:, :2]) / (boxes[:, 2:] - boxes[:, :2])
    inside = (ratio.log().abs() < MAX_LOG_SCALE).all(dim=1)  # beyond, decoding clamps
    back = decode(boxes, encode(boxes, targets, stds), stds)
    torch.testing.assert_close(back[inside], targets[inside], rtol=1e-4, atol=5e-3)


def test_decode_clamps_scale():
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).repeat(2, 1)
    deltas = torch.tensor([[0.0, 0.0, 100.0, 5.0], [0.0, 0.0, -100.0, -5.0]])
    sizes = decode(boxes, deltas, STDS[0])
    torch.testing.assert_close(
        sizes[:, 2:] - sizes[:, :2], torch.tensor([[1000.0, 1000.0], [0.256, 0.256]]), rtol=1e-5, atol=1e-4
    )


@given(boxes=boxes_, hw=st.tuples(st.integers(1, 500), st.integers(1, 500)))
def test_clip_keeps_boxes_inside_and_only_moves_what_is_outside(boxes, hw):
    boxes = torch.tensor(boxes)[None]
    clipped = clip(boxes, torch.tensor([hw]))
    limits = torch.tensor([hw[1], hw[0], hw[1], hw[0]])
    assert (clipped >= 0).all()
    assert (clipped <= limits).all()
    assert (clipped[..., 2:] >= clipped[..., :2]).all()
    inside = (boxes >= 0) & (boxes <= limits)
    assert torch.equal(clipped[inside], boxes[inside])
    assert torch.equal(clip(clipped, torch.tensor([hw])), clipped)


def test_clip_uses_each_images_own_size():
    boxes = torch.full((2, 3, 5, 4), 1000.0)
    clipped = clip(boxes, torch.tensor([[10, 20], [30, 40]]))
    assert clipped[0].unique().tolist() == [10, 20]
    assert clipped[1, 0, 0].tolist() == [40, 30, 40, 30]


def plain_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


@given(boxes=boxes_, others=boxes_)
def test_iou_equals_loops_and_is_symmetric(boxes, others):
    boxes, others = torch.tensor(boxes), torch.tensor(others)
    iou = pairwise_iou(boxes, others)
    expected = [[plain_iou(a, b) for b in others.double().tolist()] for a in boxes.double().tolist()]
    torch.testing.assert_close(iou, torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-4)
    assert torch.equal(iou, pairwise_iou(others, boxes).T)
    torch.testing.assert_close(pairwise_iou(boxes, boxes).diagonal(), torch.ones(len(boxes)), rtol=1e-3, atol=0)


def test_iou_of_batches_and_of_nothing():
    boxes = torch.rand(2, 5, 4).cumsum(-1)
    others = torch.rand(2, 3, 4).cumsum(-1)
    assert torch.equal(pairwise_iou(boxes, others)[1], pairwise_iou(boxes[1], others[1]))
    assert pairwise_iou(boxes[:, :0], others).shape == (2, 0, 3)
    assert pairwise_iou(boxes, others[:, :0]).shape == (2, 5, 0)
    nothing = torch.zeros(1, 4)  # a box without extent overlaps nothing, itself included
    assert pairwise_iou(nothing, nothing).item() == 0
    assert box_areas(boxes[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("stds", STDS)
def test_coder_of_nothing(stds):
    none = torch.zeros(0, 4)
    assert encode(none, none, stds).shape == (0, 4)
    assert decode(none, none, stds).shape == (0, 4)
    assert clip(none[None], torch.tensor([[5, 5]])).shape == (1, 0, 4)
