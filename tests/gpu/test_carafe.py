"""CARAFE on CUDA: equal to the CPU, in every precision, without waiting for the device and without copies."""

import pytest
import torch
from torch import Tensor

from tailseg.layers.carafe import CarafeDownsample, CarafeUpsample, Window, gathered_carafe, plain_carafe, triton_carafe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

UP, DOWN = Window(kernel_size=5, groups=1, up=2, down=1), Window(kernel_size=5, groups=1, up=1, down=2)
GROUPED = Window(kernel_size=3, groups=4, up=3, down=1)


def case(window: Window, count: int = 6, channels: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Features of 13 x 14, averaging kernels and the gradient of the sums, float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    height, width = (-(-side // window.down) * window.up for side in (13, 14))
    x = torch.randn(count, channels, 13, 14, generator=generator)
    logits = torch.randn(count, window.groups, window.kernel_size**2, height, width, generator=generator)
    upstream = torch.randn(count, channels, height, width, generator=generator)
    return x, logits.softmax(2).flatten(1, 2), upstream


def run(way, x: Tensor, kernels: Tensor, upstream: Tensor, window: Window) -> tuple[Tensor, ...]:
    leaves = x.detach().requires_grad_(), kernels.detach().requires_grad_()
    out = way(*leaves, window)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("window", [UP, DOWN, GROUPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_the_plain_cpu(window, dtype):
    x, kernels, upstream = case(window)
    x, upstream = x.to(dtype), upstream.to(dtype)
    results = run(triton_carafe, x.cuda(), kernels.cuda(), upstream.cuda(), window)
    expected = run(plain_carafe, x.double(), kernels.double(), upstream.double(), window)
    rounded = torch.finfo(dtype).eps  # one rounding, of the sum
    assert [ours.dtype for ours in results] == [dtype, dtype, torch.float32]
    for ours, exact, tolerance in zip(results, expected, (rounded, rounded, 1e-5), strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=max(tolerance, 1e-5), atol=1e-4)


def test_float64_and_no_rows():
    inputs = [part.double() for part in case(UP, channels=8)]
    on_device = [part.cuda() for part in inputs]
    for ours, exact in zip(run(gathered_carafe, *on_device, UP), run(gathered_carafe, *inputs, UP), strict=True):
        torch.testing.assert_close(ours.cpu(), exact, rtol=1e-9, atol=1e-9)
    nothing = [part[:0].float() for part in on_device]
    assert [len(part) for part in run(triton_carafe, *nothing, UP)] == [0, 0, 0]


def test_no_buffers_but_the_output_and_the_gradients():
    x, kernels, upstream = (part.cuda().contiguous(memory_format=torch.channels_last) for part in case(UP, count=64))
    run(triton_carafe, x, kernels, upstream, UP)  # kernels are compiled the first time
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(triton_carafe, x, kernels, upstream, UP)
    needed = upstream.nbytes + x.nbytes + kernels.nbytes
    assert torch.cuda.max_memory_allocated() - before < 1.05 * needed


@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("kind", [CarafeUpsample, CarafeDownsample])
def test_layers_equal_the_cpu_and_wait_for_nothing(kind):
    torch.manual_seed(0)
    theirs = kind(32)
    torch.nn.init.normal_(theirs.encoder.weight, std=0.1)
    ours = kind(32).cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 32, 9, 14).contiguous(memory_format=torch.channels_last)
    leaf, reference = x.cuda().requires_grad_(), x.clone().requires_grad_()

    def step() -> Tensor:
        out = ours(leaf)
        out.sum().backward()
        return out

    step()  # kernels are compiled the first time
    leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = theirs(reference)
    expected.sum().backward()
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaf.grad.cpu(), reference.grad, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        low = ours(leaf.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float().cpu(), expected, rtol=0.1, atol=0.1)
