"""What heads get to see: the pooled pyramid, with each image's own vector added."""

import pytest
import torch
from tiny import made
from torch import Tensor
from torchvision.ops import roi_align

from tailseg.model import roi_features
from tailseg.model.roi_features import ImageFeatures, PyramidRows, RoIPooler

CHANNELS = 6


def pyramid_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """P2..P6 of two images of 512 x 640 pixels."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, CHANNELS, 512 // s, 640 // s, generator=generator) for s in (4, 8, 16, 32, 64)]
    return [features.to(dtype).contiguous(memory_format=torch.channels_last) for features in maps]


def rois_of_every_level() -> Tensor:
    return torch.tensor(
        [
            [1.0, 10, 12, 60.5, 70],
            [0, 8, 40, 140, 150],
            [0, 3, 4, 30, 20],
            [1, 5, 5, 260, 250],
            [0, 10, 5, 600, 500],
            [1, 100, 90, 100, 90],
        ]
    )


def by_hand(pyramid: list[Tensor], rois: Tensor, size: int, samples: int) -> Tensor:
    """RoIAlign of every RoI by itself: sides of 112, 224 and 448 pixels start a level."""
    pooled = []
    for roi in rois:
        side = ((roi[3] - roi[1]) * (roi[4] - roi[2])).sqrt().item()
        level = sum(side >= bound for bound in (112, 224, 448))
        maps = pyramid[level].float().contiguous()
        pooled.append(roi_align(maps, roi[None], size, 1 / 2 ** (level + 2), samples, aligned=True))
    return torch.cat(pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 14])
def test_the_vector_of_its_own_image_is_added_to_every_cell(size, dtype):
    pyramid, rois = pyramid_of(dtype), rois_of_every_level()
    context = torch.stack([torch.arange(6.0), -10 * torch.arange(6.0) - 1])
    plain = by_hand(pyramid, rois, size, 0)
    pool = ImageFeatures(pyramid).pool(made(RoIPooler, size))
    torch.testing.assert_close(pool(rois), plain, rtol=1e-5, atol=1e-5)
    ours = ImageFeatures(pyramid, context).pool(made(RoIPooler, size))(rois)
    assert ours.dtype == torch.float32
    for roi, features, expected in zip(rois, ours, plain, strict=True):
        for channel in range(CHANNELS):
            added = channel if roi[0] == 0 else -10 * channel - 1
            torch.testing.assert_close(features[channel], expected[channel] + added, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_cells_get_it_too(dtype):
    """No shift is the RoI, at two points a cell and side; one shift of all cells is the RoI beside it."""
    pyramid, rois = pyramid_of(dtype), rois_of_every_level()[:5]
    context = torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(1))
    pool = ImageFeatures(pyramid, context).pool(made(RoIPooler, 7))
    added = context[rois[:, 0].long()][:, :, None, None]
    expected = by_hand(pyramid, rois, 7, 2) + added
    for shifts in (torch.zeros(5, 2), torch.zeros(5, 2, 7, 7)):
        torch.testing.assert_close(pool(rois, shifts), expected, rtol=1e-4, atol=1e-4)
    beside = rois.clone()
    beside[:, 1::2] += (rois[:, 3] - rois[:, 1]).unsqueeze(1) * 0.25
    beside[:, 2::2] -= (rois[:, 4] - rois[:, 2]).unsqueeze(1) * 0.125
    shifts = torch.tensor([[0.25, -0.125]]).expand(5, 2)
    expected = by_hand(pyramid, beside, 7, 2) + added
    torch.testing.assert_close(pool(rois, shifts), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_pyramid_and_the_vectors():
    pyramid = [features.requires_grad_() for features in pyramid_of()]
    context = torch.zeros(2, CHANNELS, requires_grad=True)
    features, rois = ImageFeatures(pyramid, context), rois_of_every_level()[:5]
    shifts = torch.zeros(5, 2, requires_grad=True)
    total = features.pool(made(RoIPooler, 7))(rois).sum() + features.pool(made(RoIPooler, 7))(rois, shifts).sum()
    total.backward()
    # Each cell of each RoI adds the vector of its image once: three RoIs of the first image, two of the second.
    assert torch.equal(context.grad, 2 * 49 * torch.tensor([3.0, 2.0]).unsqueeze(1).expand(2, CHANNELS))
    assert [(maps.grad is not None and bool((maps.grad != 0).any())) for maps in pyramid] == [True] * 4 + [False]
    assert (shifts.grad != 0).any()


def test_no_rois():
    context = torch.randn(2, CHANNELS, requires_grad=True)
    pool = ImageFeatures(pyramid_of(), context).pool(made(RoIPooler, 7))
    for found in (pool(torch.zeros(0, 5)), pool(torch.zeros(0, 5), torch.zeros(0, 2, 7, 7))):
        assert found.shape == (0, CHANNELS, 7, 7)
        found.sum().backward()
    assert (context.grad == 0).all()


def test_the_pyramid_is_prepared_once_for_all_heads(monkeypatch):
    """Every further copy of it would cost as much as a pooling."""
    prepared = {"planar": 0, "pyramid_rows": 0}
    for name in prepared:
        plain = getattr(roi_features, name)

        def counted(maps: list[Tensor], plain=plain, name=name) -> list[Tensor] | PyramidRows:
            prepared[name] += 1
            return plain(maps)

        monkeypatch.setattr(roi_features, name, counted)
    features, rois = ImageFeatures(pyramid_of()), rois_of_every_level()
    for size in (7, 14, 7):
        features.pool(made(RoIPooler, size))(rois)
    assert prepared == {"planar": 0, "pyramid_rows": 1}
    for _ in range(3):
        features.pool(made(RoIPooler, 7))(rois, torch.zeros(6, 2))
    assert prepared == {"planar": 0, "pyramid_rows": 1}  # TSD reads the same table
