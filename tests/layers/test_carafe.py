"""CARAFE against its definition in loops, the recording and other operators; its ways, its memory and its export."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers import carafe as carafe_module
from tailseg.layers.carafe import (
    CarafeDownsample,
    CarafeUpsample,
    Window,
    carafe,
    carafe_down,
    convolved_carafe,
    gathered_carafe,
    normalized_kernels,
    plain_carafe,
    triton_carafe,
)

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)
if interpreted.args[0] is False:
    pytest.importorskip("triton")
TRITON = pytest.param(triton_carafe, marks=interpreted)
WINDOWS = [  # and the input's height and width
    (Window(kernel_size=5, groups=1, up=2, down=1), (4, 3)),
    (Window(kernel_size=3, groups=3, up=3, down=1), (1, 2)),
    (Window(kernel_size=5, groups=2, up=1, down=1), (3, 2)),
    (Window(kernel_size=5, groups=1, up=1, down=2), (7, 6)),
    (Window(kernel_size=3, groups=1, up=1, down=3), (5, 7)),
    (Window(kernel_size=1, groups=1, up=1, down=2), (3, 4)),
]


def case(window: Window, size: tuple[int, int], count: int = 2, channels: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Features, kernels that are no averages, and the gradient of the sums, in float64."""
    generator = torch.Generator().manual_seed(window.kernel_size)
    out = [-(-side // window.down) * window.up for side in size]
    shapes = (channels, *size), (window.groups * window.kernel_size**2, *out), (channels, *out)
    x, kernels, upstream = (torch.randn(count, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, kernels, upstream


def in_loops(x: Tensor, kernels: Tensor, upstream: Tensor, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """The sums and both gradients, product by product."""
    k, channels = window.kernel_size, x.shape[1] // window.groups
    out, grad_x, grad_kernels = torch.zeros_like(upstream), torch.zeros_like(x), torch.zeros_like(kernels)
    taps = itertools.product(range(window.groups), range(out.shape[2]), range(out.shape[3]), range(k), range(k))
    for group, row, column, a, b in taps:
        y, z = row // window.up * window.down + a - k // 2, column // window.up * window.down + b - k // 2
        if not (0 <= y < x.shape[2] and 0 <= z < x.shape[3]):
            continue
        tap, own = group * k * k + a * k + b, slice(group * channels, (group + 1) * channels)
        weight = kernels[:, tap, row, column, None]
        out[:, own, row, column] += weight * x[:, own, y, z]
        grad_x[:, own, y, z] += weight * upstream[:, own, row, column]
        grad_kernels[:, tap, row, column] += (x[:, own, y, z] * upstream[:, own, row, column]).sum(1)
    return out, grad_x, grad_kernels


def run(way, x: Tensor, kernels: Tensor, upstream: Tensor, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    leaves = x.detach().requires_grad_(), kernels.detach().requires_grad_()
    out = way(*leaves, window)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def recorded_layer(case, state) -> nn.Module:
    about = case["settings"]["build"]
    if case["kind"] == "carafe_down":
        sizes = {"scale": about["scale"], "kernel_size": about["size"]}
        layer = CarafeDownsample(about["channels"], **sizes, encoder_kernel=about["encoder_kernel"])
    else:
        sizes = {"scale": about["scale_factor"], "kernel_size": about["up_kernel"], "groups": about["up_group"]}
        layer = CarafeUpsample(about["channels"], **sizes, encoder_kernel=about["encoder_kernel"])
    names = {"channel_compressor": "compressor", "content_encoder": "encoder"}
    layer.load_state_dict({f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in state.items()})
    return layer


def test_recorded(recorded, check):
    seen = []
    for about, inputs, state, outputs in recorded("carafe"):
        if about["name"] == "mask_head":
            continue
        inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        if about["kind"] == "carafe_op":
            sizes = about["settings"]
            size, groups, scale = sizes["up_kernel"], sizes["group"], sizes["scale"]
            out = carafe(inputs["x"], inputs["kernels"], kernel_size=size, groups=groups, scale=scale)
        else:
            layer = recorded_layer(about, state)
            out = layer(inputs["x"])
        check(about, *next((name, out, outputs[name]) for name in ("out", "out0") if name in outputs))
        (out.square().sum() / 2).backward()
        for name, value in inputs.items():
            check(about, f"grad.{name}", value.grad, outputs[f"grad.{name}"])
        if "param_grad_norms" in outputs:
            norms = torch.stack([parameter.grad.norm() for parameter in layer.parameters()])
            check(about, "param_grad_norms", norms, outputs["param_grad_norms"])
        seen.append(about["name"])
    assert seen == ["op", "pack", "down"]


@pytest.mark.parametrize(("window", "size"), WINDOWS)
@pytest.mark.parametrize("way", [plain_carafe, gathered_carafe])
def test_definition(way, window, size):
    x, kernels, upstream = case(window, size)
    expected = in_loops(x, kernels, upstream, window)
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = (tensor.contiguous(memory_format=layout) for tensor in (x, kernels, upstream))
        for ours, exact in zip(run(way, *inputs, window), expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@interpreted
@pytest.mark.parametrize(("window", "size"), WINDOWS)
def test_triton_equals_the_definition(monkeypatch, window, size):
    from tailseg.layers import carafe_triton

    # So that some programs are the second or the last. An interpreted program takes as long whatever its block.
    monkeypatch.setattr(carafe_triton, "CHANNEL_BLOCK", 4)
    monkeypatch.setattr(carafe_triton, "CELL_BLOCK", 32)
    monkeypatch.setattr(carafe_triton, "TAP_CHANNEL_BLOCK", 4)
    monkeypatch.setattr(carafe_triton, "TAP_CELL_BLOCK", 16)
    x, kernels, upstream = case(window, size)
    expected = in_loops(x, kernels, upstream, window)
    results = run(triton_carafe, x.float(), kernels.float(), upstream.float(), window)
    for ours, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-5)
        assert ours.dtype == torch.float32


@pytest.mark.parametrize("way", [plain_carafe, gathered_carafe, TRITON])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_summed_in_float32(way, dtype):
    window, size = WINDOWS[3]
    x, kernels, upstream = case(window, size, channels=3)
    x, kernels, upstream = x.to(dtype), kernels.float(), upstream.to(dtype)
    expected = in_loops(x.double(), kernels.double(), upstream.double(), window)
    results = run(way, x, kernels, upstream, window)
    assert [ours.dtype for ours in results] == [dtype, dtype, torch.float32]
    rounded = torch.finfo(dtype).eps  # one rounding, of the sum
    for ours, exact, tolerance in zip(results, expected, (rounded, rounded, 1e-5), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("way", [plain_carafe, gathered_carafe, TRITON])
@pytest.mark.parametrize(("window", "size"), [WINDOWS[1], WINDOWS[3]])
def test_no_rows(way, window, size):
    x, kernels, upstream = (tensor.float() for tensor in case(window, size, count=0))
    out, grad_x, grad_kernels = run(way, x, kernels, upstream, window)
    assert (out.shape, grad_x.shape, grad_kernels.shape) == (upstream.shape, x.shape, kernels.shape)


@pytest.mark.parametrize("layer", [CarafeUpsample(4), CarafeDownsample(4)])
def test_layers_without_rows_have_gradients(layer):
    layer(torch.zeros(0, 4, 5, 7)).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


def test_first_and_second_derivatives():
    window = Window(kernel_size=3, groups=2, up=2, down=1)
    inputs = [tensor.requires_grad_() for tensor in case(window, (2, 3), count=1, channels=4)[:2]]
    assert torch.autograd.gradcheck(lambda *pair: gathered_carafe(*pair, window), inputs)
    assert torch.autograd.gradgradcheck(lambda *pair: gathered_carafe(*pair, window), inputs, fast_mode=True)


@pytest.mark.parametrize("layer", [CarafeUpsample(2, kernel_size=3), CarafeDownsample(2, kernel_size=3)])
def test_derivatives_of_the_layers(layer):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.double(), x)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted):
    window, size = WINDOWS[0]
    x, kernels, upstream = case(window, size)
    inputs = [x, kernels]
    inputs[wanted].requires_grad_()
    gathered_carafe(*inputs, window).backward(upstream)
    torch.testing.assert_close(inputs[wanted].grad, in_loops(x, kernels, upstream, window)[1 + wanted].detach())
    assert inputs[1 - wanted].grad is None


def test_kernels_of_one_tap():
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    centre = torch.zeros(2, 25, 10, 8)
    centre[:, 12] = 1
    assert torch.equal(carafe(x, centre), F.interpolate(x, scale_factor=2, mode="nearest"))
    assert torch.equal(carafe_down(x, centre[..., :3, :2]), x[..., ::2, ::2])
    right = centre.roll(1, 1)  # looks one column to the right, at zero behind the last
    assert torch.equal(carafe(x, right), F.interpolate(F.pad(x, (0, 1))[..., 1:], scale_factor=2))


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
def test_a_zero_encoder_averages_with_zeros_outside(size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    up, down = CarafeUpsample(3), CarafeDownsample(3)
    nn.init.zeros_(up.encoder.weight)
    nn.init.zeros_(down.encoder.weight)
    average = F.avg_pool2d(x, 5, stride=1, padding=2, divisor_override=25)
    torch.testing.assert_close(up(x), F.interpolate(average, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(down(x), average[..., ::2, ::2])


def test_kernels_of_each_group_sum_to_one():
    logits = torch.randn(2, 3 * 9 * 4, 4, 5, generator=torch.Generator().manual_seed(0)) * 5
    parts = F.pixel_shuffle(logits.double(), 2).split(9, dim=1)
    expected = torch.cat([part.softmax(1) for part in parts], dim=1)
    torch.testing.assert_close(normalized_kernels(logits, 3, 2).double(), expected, rtol=1e-5, atol=1e-7)


def test_softmax_in_float32_under_autocast():
    torch.manual_seed(0)
    layer, ones = CarafeUpsample(8), torch.ones(2, 8, 9, 9)
    nn.init.normal_(layer.encoder.weight, std=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, low = layer(ones), layer(ones.bfloat16())
    assert (out.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(out[..., 4:-4, 4:-4], torch.ones(2, 8, 10, 10), rtol=0, atol=1e-6)
    out.sum().backward()
    assert layer.encoder.weight.grad.dtype == torch.float32


def test_channels_last_stays():
    x, kernels, upstream = (tensor.contiguous(memory_format=torch.channels_last) for tensor in case(*WINDOWS[0]))
    for result in run(gathered_carafe, x, kernels, upstream, WINDOWS[0][0]):
        assert result.is_contiguous(memory_format=torch.channels_last)
    for layer in (CarafeUpsample(6), CarafeDownsample(6)):
        assert layer(x.float()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nothing_but_the_output_is_of_its_size(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 256, 7, 7).contiguous(memory_format=layout).requires_grad_()
    kernels = torch.randn(2, 25, 14, 14).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(2, 256, 14, 14).contiguous(memory_format=torch.channels_last)
    large, saved = set(), []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(one, Tensor) and one.untyped_storage().nbytes() >= upstream.nbytes:
                    large.add(one.untyped_storage().data_ptr())
            return result

    with Allocations(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = carafe(x, kernels)
        torch.autograd.grad(out, (x, kernels), upstream)
    assert large - {upstream.untyped_storage().data_ptr()} == {out.untyped_storage().data_ptr()}
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), kernels.data_ptr()}


def test_plain_saves_views_alone():
    window, (height, width) = WINDOWS[0]
    x, kernels, _ = case(window, (height, width), channels=16)
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plain_carafe(x.requires_grad_(), kernels.requires_grad_(), window)
    padded = 2 * 16 * (height + 4) * (width + 4) * 8
    assert sum(storages.values()) <= padded + kernels.nbytes


def test_sizes_that_do_not_fit():
    x = torch.zeros(2, 6, 3, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 25, 6, 10\), got \(2, 25, 6, 6\)"):
        carafe(x, torch.zeros(2, 25, 6, 6))
    with pytest.raises(ValueError, match=r"shape \(2, 25, 2, 3\), got \(2, 25, 1, 2\)"):
        carafe_down(x, torch.zeros(2, 25, 1, 2))
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        carafe(x, torch.zeros(2, 16, 6, 10), kernel_size=4)
    with pytest.raises(ValueError, match="4 groups of one size, got 6 channels"):
        carafe(x, torch.zeros(2, 100, 6, 10), groups=4)


def test_initialisation():
    torch.manual_seed(0)
    layer = CarafeUpsample(256)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "compressor.weight": (64, 256, 1, 1),
        "compressor.bias": (64,),
        "encoder.weight": (100, 64, 3, 3),
        "encoder.bias": (100,),
    }
    assert sum(parameter.numel() for parameter in layer.parameters()) == 74_148
    assert layer.encoder.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert layer.compressor.weight.abs().max().item() == pytest.approx((6 / (256 + 64)) ** 0.5, rel=0.01)
    assert CarafeDownsample(256).encoder.weight.shape == (25, 64, 3, 3)
    assert not torch.cat([layer.compressor.bias, layer.encoder.bias]).any()


def test_cuda_takes_triton_and_nothing_else_does(monkeypatch):
    taken = []
    for name in ("plain_carafe", "gathered_carafe", "triton_carafe"):
        monkeypatch.setattr(carafe_module, name, lambda *_, name=name: taken.append(name))

    class OnDevice(torch.Tensor):
        is_cuda = True

    x, kernels = torch.zeros(1, 2, 3, 3), torch.zeros(1, 25, 6, 6)
    on_device = x.as_subclass(OnDevice)
    for features in (on_device, on_device.bfloat16().as_subclass(OnDevice), on_device.double(), x):
        carafe(features, kernels)
    monkeypatch.setattr(carafe_module, "has_triton", lambda: False)
    carafe(on_device, kernels)
    assert taken == ["triton_carafe", "triton_carafe", "gathered_carafe", "gathered_carafe", "gathered_carafe"]


def test_function_transforms_and_compilers_take_the_plain_way():
    window, size = WINDOWS[0]
    x, kernels, upstream = case(window, size)
    out, grad_x, _ = in_loops(x, kernels, upstream, window)

    def total(features: Tensor, own: Tensor, weights: Tensor) -> Tensor:
        return (carafe(features[None], own[None])[0] * weights).sum()

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x, kernels, upstream), grad_x)
    torch.testing.assert_close(torch.compile(carafe, backend="eager", fullgraph=True)(x, kernels), out)


@interpreted
def test_kernels_compile_for_gpus():
    lines = lines_of(Path(__file__).with_name("compile_carafe.py"))
    assert len(lines) == 6
    assert all(int(size) > 0 for *_, size in lines)


@pytest.mark.parametrize(("scale", "kernel_size"), [(2, 5), (3, 3), (1, 5)])
def test_convolved(scale, kernel_size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 12)
    kernels = torch.randn(2, kernel_size**2, -(-9 // scale), -(-12 // scale))
    window = Window(kernel_size, 1, 1, scale)
    torch.testing.assert_close(convolved_carafe(x, kernels, window), plain_carafe(x, kernels, window))


def test_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.Sequential(
        CarafeUpsample(4, kernel_size=3, groups=2), CarafeDownsample(4, kernel_size=3, scale=3)
    ).eval()
    for layer in model:
        nn.init.normal_(layer.encoder.weight)
    rows = {0: torch.export.Dim("rows")}
    program = torch.onnx.export(model, (torch.randn(2, 4, 5, 7),), dynamo=True, dynamic_shapes=(rows,), verbose=False)
    exported = program.model_proto
    assert {node.domain for node in exported.graph.node} == {""}  # ONNX's own operators
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = torch.randn(count, 4, 5, 7)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)
