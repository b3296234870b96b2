"""RoI features against the recording and against one RoI at a time; the device's path against the CPU's."""

import pytest
import torch
from tiny import made
from torchvision.ops import MultiScaleRoIAlign, roi_align

from tailseg.model.roi_features import RoIPooler, planar, roi_levels


def pyramid_of(channels: int = 2, side: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, side >> i, side >> i, generator=generator) for i in range(5)]


def some_rois() -> torch.Tensor:
    sides = torch.tensor([3.0, 20.0, 111.9, 112.0, 130.0, 224.0, 300.0, 448.0, 600.0, 0.0, 57.0])
    image = torch.arange(len(sides)) % 2
    corner = torch.linspace(-5, 40, len(sides))
    return torch.stack([image, corner, corner / 2, corner + sides, corner / 2 + sides], dim=1)


@pytest.mark.parametrize("path", ["_by_table", "_at_every_level"])
def test_recorded_features_levels_and_gradients(recorded, check, path):
    seen = 0
    for case, inputs, _, outputs in recorded("roi_align"):
        pooler = made(RoIPooler, case["settings"]["output_size"], case["settings"]["strides"])
        pyramid = [inputs[f"feature{i}"].clone().requires_grad_() for i in range(4)]
        levels = roi_levels(inputs["rois"][:, 1:], 4)
        check(case, "level", levels, outputs["level"])
        out = getattr(pooler, path)(pyramid, inputs["rois"], levels)
        check(case, "out", out, outputs["out"])
        (out * inputs["upstream"]).sum().backward()
        for i, features in enumerate(pyramid):
            check(case, f"grad.feature{i}", features.grad, outputs[f"grad.feature{i}"])
        seen += 1
    assert seen == 2


@pytest.mark.parametrize(
    ("side", "level"),
    [(0.0, 0), (1.0, 0), (111.9, 0), (111.99, 0), (112.0, 1), (223.9, 1), (224.0, 2), (448.0, 3), (5000.0, 3)],
)
def test_level_of_a_square(side, level):
    boxes = torch.tensor([[10.0, 20.0, 10 + side, 20 + side]])
    assert roi_levels(boxes, 4).tolist() == [level]


def test_level_depends_on_area_alone():
    boxes = torch.tensor([[0.0, 0.0, 28.0, 448.0], [0.0, 0.0, 448.0, 28.0], [5.0, 5.0, 117.0, 117.0]])
    assert roi_levels(boxes, 4).tolist() == [1, 1, 1]
    assert roi_levels(boxes, 1).tolist() == [0, 0, 0]


def test_order_of_rows_and_both_paths():
    pyramid, rois, pooler = pyramid_of(), some_rois(), made(RoIPooler, 3)
    levels = roi_levels(rois[:, 1:], 4)
    assert sorted(set(levels.tolist())) == [0, 1, 2, 3]
    out = pooler(pyramid, rois)
    for row, (roi, level) in enumerate(zip(rois, levels.tolist(), strict=True)):
        alone = roi_align(pyramid[level], roi[None], 3, 1 / (4 << level), sampling_ratio=0, aligned=True)
        torch.testing.assert_close(out[row], alone[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(pooler._at_every_level(pyramid, rois, levels), out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["_by_table", "_at_every_level"])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
def test_unaligned_features_and_gradients_equal_torchvisions(path, sampling_ratio):
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 5, sampling_ratio)  # its points stand at upper left corners
    pooler, rois = made(RoIPooler, 5, sampling_ratio=sampling_ratio, aligned=False), some_rois()
    rois = torch.cat([rois, torch.tensor([[0.0, 30, 30, 30, 90], [1.0, 3, 200, 60, 230]])])  # flat; outside
    levels = roi_levels(rois[:, 1:], 4)
    assert sorted(set(levels.tolist())) == [0, 1, 2, 3]
    mine, others = ([f.clone().requires_grad_() for f in pyramid_of()[:4]] for _ in range(2))
    out = getattr(pooler, path)(mine, rois, levels)
    order = torch.cat([(rois[:, 0] == image).nonzero().squeeze(1) for image in range(2)])
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(2)]
    expected = theirs({str(i): f for i, f in enumerate(others)}, boxes, [(128, 128)] * 2)
    torch.testing.assert_close(out[order], expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * upstream).sum().backward()
    (expected * upstream[order]).sum().backward()
    for a, b in zip(mine, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def value_at(plane: torch.Tensor, y: float, x: float) -> float:
    """Bilinear value at a point in feature pixels, nearest edge outside and 0 beyond a pixel from it, in float64."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    upper = plane[top, left].item() * (1 - fx) + plane[top, right].item() * fx
    lower = plane[bottom, left].item() * (1 - fx) + plane[bottom, right].item() * fx
    return upper * (1 - fy) + lower * fy


@pytest.mark.parametrize("path", ["_by_table", "_at_every_level"])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(2, True), (3, True), (2, False)])
def test_sampling_points_by_hand(path, sampling_ratio, aligned):
    """The mean of n x n points evenly inside each cell; aligned pixels have their value at their centre."""
    pyramid, size = pyramid_of(channels=1), 3
    rois = torch.tensor([[0.0, 8, 13, 61, 40], [1.0, 5, 2, 130, 126], [1.0, -9, -3, 50, 61]])
    levels = [0, 1, 0]
    pooler = made(RoIPooler, size, sampling_ratio=sampling_ratio, aligned=aligned)
    out = getattr(pooler, path)(pyramid, rois, torch.tensor(levels))
    for row, level in enumerate(levels):
        image, x1, y1, x2, y2 = (value / (4 << level) if i else value for i, value in enumerate(rois[row].tolist()))
        offset = 0.5 if aligned else 0.0
        plane = pyramid[level][int(image), 0].double()
        for i in range(size):
            for j in range(size):
                places = [(k + 0.5) / sampling_ratio for k in range(sampling_ratio)]
                points = [
                    (y1 + (i + a) * (y2 - y1) / size - offset, x1 + (j + b) * (x2 - x1) / size - offset)
                    for a in places
                    for b in places
                ]
                expected = sum(value_at(plane, y, x) for y, x in points) / len(points)
                assert out[row, 0, i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(2, True), (0, False), (2, False)])
def test_other_levels_add_nothing(sampling_ratio, aligned):
    """On a device a RoI meets the maps of all levels: what the others hold must not matter, infinities included."""
    pyramid, rois = pyramid_of(), some_rois()
    levels = roi_levels(rois[:, 1:], 4)
    pooler = made(RoIPooler, 4, sampling_ratio=sampling_ratio, aligned=aligned)
    plain = pooler._at_every_level(pyramid, rois, levels)
    torch.testing.assert_close(plain, pooler._by_table(pyramid, rois, levels), rtol=1e-5, atol=1e-6)
    for level in range(4):
        spoilt = [f if i == level else torch.full_like(f, torch.inf) for i, f in enumerate(pyramid)]
        own = levels == level
        assert torch.equal(pooler._at_every_level(spoilt, rois, levels)[own], plain[own])


def test_constant_features_stay_constant_and_a_box_without_extent_gives_zero():
    pyramid = [torch.full_like(features, 7.0) for features in pyramid_of()]
    rois = torch.tensor([[0.0, 8, 8, 60, 70], [1, 5, 5, 5, 5]])
    for out in (
        made(RoIPooler, 7)(pyramid, rois),
        made(RoIPooler, 7)._at_every_level(pyramid, rois, roi_levels(rois[:, 1:], 4)),
    ):
        torch.testing.assert_close(out[0], torch.full_like(out[0], 7.0))
        assert (out[1] == 0).all()


@pytest.mark.parametrize("options", [{}, {"sampling_ratio": 2, "aligned": False}])
@pytest.mark.parametrize("path", ["_by_table", "_at_every_level"])
def test_no_rois(path, options):
    pyramid = [features.requires_grad_() for features in pyramid_of()]
    rois = torch.zeros(0, 5)
    out = getattr(made(RoIPooler, 7, **options), path)(pyramid, rois, roi_levels(rois[:, 1:], 4))
    assert out.shape == (0, 2, 7, 7)
    out.sum().backward()
    assert all((features.grad == 0).all() for features in pyramid[:4])


def test_features_of_low_precision_are_pooled_in_float32():
    out = made(RoIPooler, 7)([f.bfloat16() for f in pyramid_of()], some_rois())
    assert out.dtype == torch.float32
    expected = made(RoIPooler, 7)([f.bfloat16().float() for f in pyramid_of()], some_rois())
    assert torch.equal(out, expected)


def test_planar_maps_hold_the_same_values():
    maps = [f.bfloat16().contiguous(memory_format=torch.channels_last) for f in pyramid_of()]
    for ours, theirs in zip(planar(maps), maps, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs.float())
