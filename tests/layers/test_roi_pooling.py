"""RoI features against the recording and against one RoI at a time; the device's path against the CPU's."""

import pytest
import torch
from torchvision.ops import roi_align

from tailseg.layers.roi_pooling import RoIPooler, planar, roi_levels


def pyramid_of(channels: int = 2, side: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, side >> i, side >> i, generator=generator) for i in range(5)]


def some_rois() -> torch.Tensor:
    sides = torch.tensor([3.0, 20.0, 111.9, 112.0, 130.0, 224.0, 300.0, 448.0, 600.0, 0.0, 57.0])
    image = torch.arange(len(sides)) % 2
    corner = torch.linspace(-5, 40, len(sides))
    return torch.stack([image, corner, corner / 2, corner + sides, corner / 2 + sides], dim=1)


@pytest.mark.parametrize("path", ["_level_by_level", "_at_every_level"])
def test_recorded_features_levels_and_gradients(recorded, check, path):
    seen = 0
    for case, inputs, _, outputs in recorded("roi_align"):
        pooler = RoIPooler(case["settings"]["output_size"], case["settings"]["strides"])
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
    pyramid, rois, pooler = pyramid_of(), some_rois(), RoIPooler(3)
    levels = roi_levels(rois[:, 1:], 4)
    assert sorted(set(levels.tolist())) == [0, 1, 2, 3]
    out = pooler(pyramid, rois)
    for row, (roi, level) in enumerate(zip(rois, levels.tolist(), strict=True)):
        alone = roi_align(pyramid[level], roi[None], 3, 1 / (4 << level), sampling_ratio=0, aligned=True)
        torch.testing.assert_close(out[row], alone[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(pooler._at_every_level(pyramid, rois, levels), out, rtol=0, atol=1e-6)


def test_constant_features_stay_constant_and_a_box_without_extent_gives_zero():
    pyramid = [torch.full_like(features, 7.0) for features in pyramid_of()]
    rois = torch.tensor([[0.0, 8, 8, 60, 70], [1, 5, 5, 5, 5]])
    for out in (RoIPooler(7)(pyramid, rois), RoIPooler(7)._at_every_level(pyramid, rois, roi_levels(rois[:, 1:], 4))):
        torch.testing.assert_close(out[0], torch.full_like(out[0], 7.0))
        assert (out[1] == 0).all()


@pytest.mark.parametrize("path", ["_level_by_level", "_at_every_level"])
def test_no_rois(path):
    pyramid = [features.requires_grad_() for features in pyramid_of()]
    rois = torch.zeros(0, 5)
    out = getattr(RoIPooler(7), path)(pyramid, rois, roi_levels(rois[:, 1:], 4))
    assert out.shape == (0, 2, 7, 7)
    out.sum().backward()
    assert all((features.grad == 0).all() for features in pyramid[:4])


def test_features_of_low_precision_are_pooled_in_float32():
    out = RoIPooler(7)([f.bfloat16() for f in pyramid_of()], some_rois())
    assert out.dtype == torch.float32
    expected = RoIPooler(7)([f.bfloat16().float() for f in pyramid_of()], some_rois())
    assert torch.equal(out, expected)


def test_planar_maps_hold_the_same_values():
    maps = [f.bfloat16().contiguous(memory_format=torch.channels_last) for f in pyramid_of()]
    for ours, theirs in zip(planar(maps), maps, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs.float())
