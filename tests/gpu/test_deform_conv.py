"""Deformable convolution on CUDA: equal to the CPU, in low precision too, without waiting, in little memory."""

import pytest
import torch
from torch import Tensor, nn

from tailseg.layers.deform_conv import ModulatedDeformConv2d, gathered_deform_conv2d, triton_deform_conv2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("full_float32"),
]

SETTINGS = [(256, 256, 1, 1), (128, 64, 2, 2), (96, 96, 1, 32)]  # in and out channels, stride, groups


def layer_of(in_channels: int, out_channels: int, stride: int, groups: int) -> ModulatedDeformConv2d:
    torch.manual_seed(0)
    layer = ModulatedDeformConv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups)
    nn.init.normal_(layer.conv_offset.weight, std=0.02)
    nn.init.normal_(layer.conv_offset.bias)
    return layer


def image(channels: int) -> Tensor:
    x = torch.randn(2, channels, 25, 38, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_triton_equals_the_cpu(setting, dtype):
    in_channels, out_channels, stride, groups = setting
    generator = torch.Generator().manual_seed(2)
    x, side = image(in_channels).to(dtype), (-(-25 // stride), -(-38 // stride))
    shifts = 2 * torch.randn(2, 18, *side, generator=generator)
    counts = torch.rand(2, 9, *side, generator=generator)
    weight = torch.randn(out_channels, in_channels // groups, 3, 3, generator=generator).to(dtype)
    upstream = torch.randn(2, out_channels, *side, generator=generator).to(dtype)

    def results(way, device: str, exact: bool) -> list[Tensor]:
        parts = (part.double() if exact else part for part in (x, shifts, weight, counts))
        leaves = [part.detach().to(device).requires_grad_() for part in parts]
        out = way(*leaves[:3], None, (stride, stride), (1, 1), (1, 1), leaves[3])
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out))]

    # Rounded once: what the taps see, and its gradients.
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    ours, expected = results(triton_deform_conv2d, "cuda", False), results(gathered_deform_conv2d, "cpu", True)
    for one, other in zip(ours, expected, strict=True):
        assert (one.cpu().double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_layer_equals_the_cpu_and_waits_for_nothing(setting):
    theirs, ours, x = layer_of(*setting), layer_of(*setting).cuda(), image(setting[0])
    leaf, reference = x.cuda().requires_grad_(), x.clone().requires_grad_()

    def step() -> Tensor:
        out = ours(leaf)
        out.sum().backward()
        return out

    step()  # kernels are compiled the first time
    leaf.grad = None
    ours.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = theirs(reference)
    expected.sum().backward()
    pairs = [(out, expected), (leaf.grad, reference.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    for one, other in pairs:
        assert (one.cpu() - other).abs().max() <= 1e-4 * other.abs().max()
    with torch.autocast("cuda", torch.bfloat16):
        low = ours(leaf.bfloat16())
    assert low.dtype == torch.bfloat16
    assert low.is_contiguous(memory_format=torch.channels_last)
    assert (low.float().cpu() - expected).abs().max() <= 0.03 * expected.abs().max()
    low.float().sum().backward()


def test_one_matrix_at_a_time():
    """What the taps see is nine times the features; it is there once, also in the backward pass."""
    x = torch.randn(2, 256, 100, 152, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    shifts, counts = (torch.randn(2, channels, 100, 152, device="cuda") for channels in (18, 9))
    weight = torch.randn(256, 256, 3, 3, device="cuda", dtype=torch.bfloat16)
    leaves = [part.requires_grad_() for part in (x, shifts, weight, counts)]

    def step() -> None:
        out = triton_deform_conv2d(*leaves[:3], None, (1, 1), (1, 1), (1, 1), leaves[3])
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    step()  # kernels are compiled the first time
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    # Beside it the sums, their gradient, that of the features in float32 and in their own dtype, small things, and up
    # to 3 for the workspace of cuBLAS; a second matrix would make it 23 at least.
    taken = (torch.cuda.max_memory_allocated() - before) / x.nbytes
    assert taken < 9 + 12, taken
