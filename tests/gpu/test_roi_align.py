"""RoIAlign of all levels in one launch, on CUDA: equal to the CPU, without waiting, in one gradient buffer."""

import pytest
import torch
from tiny import made
from torch import Tensor

from tailseg.model.roi_features import ImageFeatures, RoIPooler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = ((96, 128), (48, 64), (24, 32), (12, 16), (6, 8))


def pyramid_of(dtype: torch.dtype, device: str, channels: int = 72) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in SIZES]
    return [
        each.float().to(device, dtype if device == "cuda" else torch.float32, memory_format=torch.channels_last)
        .requires_grad_()
        for each in maps
    ]  # fmt: skip


def rois_of(count: int) -> Tensor:
    """Some without extent, some outside of the image."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([560, 420]) - 30
    sides = torch.exp(torch.randn(count, 2, generator=generator) + 4)
    boxes = torch.cat([corners, corners + sides], dim=1)
    boxes[::17, 2:] = boxes[::17, :2]
    boxes[::19] += 2000
    return torch.cat([torch.arange(count)[:, None] % 2, boxes], dim=1)


def learnt(pyramid: list[Tensor], rois: Tensor, poolers: list[RoIPooler]) -> list[Tensor]:
    """Features of every pooling, and the gradients of P2..P5."""
    features = ImageFeatures(pyramid)
    found = [features.pool(pooler)(rois[:: i + 1]) for i, pooler in enumerate(poolers)]
    upstream = [torch.linspace(-1, 1, f.numel(), device=f.device).view(f.shape) for f in found]
    torch.stack([(f.float() * u).sum() for f, u in zip(found, upstream, strict=True)]).sum().backward()
    return [*(f.detach() for f in found), *(maps.grad for maps in pyramid[:4])]


@pytest.mark.parametrize("options", [{}, {"sampling_ratio": 2, "aligned": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_and_gradients_equal_the_cpu(dtype, options):
    poolers, rois = [made(RoIPooler, 7, **options), made(RoIPooler, 14, **options)], rois_of(150)
    ours = learnt(pyramid_of(dtype, "cuda"), rois.cuda(), poolers)
    exact = learnt(pyramid_of(dtype, "cpu"), rois, poolers)
    rounded = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    for i, (one, other) in enumerate(zip(ours, exact, strict=True)):
        tolerance = 1e-4 + (rounded if i >= 2 else 0)  # features are float32, gradients rounded to the maps' dtype
        assert (one.float().cpu() - other).abs().max() <= tolerance * other.abs().max(), i


def test_a_step_waits_for_nothing_and_has_one_gradient_buffer():
    pyramid, rois = pyramid_of(torch.bfloat16, "cuda", channels=256), rois_of(300).cuda()
    poolers = [made(RoIPooler, 7), made(RoIPooler, 7), made(RoIPooler, 7)]

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            learnt(pyramid, rois, poolers)
        for maps in pyramid:
            maps.grad = None

    step()  # kernels are compiled the first time
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    maps = sum(each.nbytes for each in pyramid[:4])
    features = sum(len(rois[:: i + 1]) * 256 * 49 for i in range(3))
    # The buffer in float32 and the gradients in bfloat16; of each pooling features, weights and gradients.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * 3 * maps + 32 * features
