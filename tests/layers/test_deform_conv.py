"""Deformable convolution against its definition in float64, the recording, and the convolution it stands in for."""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from tailseg.layers import deform_conv
from tailseg.layers.deform_conv import ModulatedDeformConv2d, gathered_deform_conv2d, triton_deform_conv2d

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)
if interpreted.args[0] is False:
    pytest.importorskip("triton")

# In and out channels, kernel, stride, padding, dilation, groups, bias; the last two are those of backbones.
SETTINGS = [
    (4, 6, 3, 1, 1, 1, 1, True),
    (4, 4, 3, 2, 1, 1, 2, False),
    (2, 3, (3, 2), (1, 2), (2, 0), (2, 1), 1, True),
    (3, 2, 1, 1, 0, 1, 1, True),
    (4, 4, 5, 2, "same", 1, 4, False),
    (4, 8, 3, 1, 1, 1, 2, False),
]
NAMES = ("stride", "padding", "dilation", "groups", "bias")


def layer_of(setting, *, scale: float = 0.5) -> ModulatedDeformConv2d:
    """A layer whose taps look elsewhere, by shifts of about a cell."""
    torch.manual_seed(0)
    layer = ModulatedDeformConv2d(*setting[:3], **dict(zip(NAMES, setting[3:], strict=True))).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=scale)
    return layer


def images(channels: int, size: tuple[int, int] = (7, 6), count: int = 2) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sampled(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(C,) of x (C, H, W) at a place between cells, zero outside."""
    total = x.new_zeros(len(x))
    top, left = math.floor(row.item()), math.floor(column.item())
    for y, z in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
            total = total + x[:, y, z] * (1 - (row - y).abs()) * (1 - (column - z).abs())
    return total


def pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def in_loops(x: Tensor, layer: ModulatedDeformConv2d, setting) -> Tensor:
    """Output place by output place and tap by tap, for autograd to derive."""
    _, out_channels, kernel, stride, padding, dilation, groups, _ = setting
    kernel, stride, dilation = pair(kernel), pair(stride), pair(dilation)
    if padding == "same":  # as TensorFlow: as few zeros as ceil(size / stride) outputs need, an odd one at the end
        spans = [
            (-(-n // s) - 1) * s + (k - 1) * d + 1
            for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
        ]
        missing = [max(span - n, 0) for span, n in zip(spans, x.shape[2:], strict=True)]
        x = F.pad(x, (missing[1] // 2, -(-missing[1] // 2), missing[0] // 2, -(-missing[0] // 2)))
        padding = 0
    padding = pair(padding)
    told = F.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, stride, padding, dilation)
    out = x.new_zeros(len(x), out_channels, *told.shape[2:])
    places = itertools.product(range(len(x)), range(out.shape[2]), range(out.shape[3]))
    columns = {}
    for n, row, column in places:
        seen = []
        for tap, (a, b) in enumerate(itertools.product(range(kernel[0]), range(kernel[1]))):
            down, right, logit = told[n, [2 * tap, 2 * tap + 1, 2 * math.prod(kernel) + tap], row, column]
            y = row * stride[0] - padding[0] + a * dilation[0] + down
            z = column * stride[1] - padding[1] + b * dilation[1] + right
            seen.append(sampled(x[n], y, z) / (1 + (-logit).exp()))
        by_group = torch.stack(seen, dim=1).unflatten(0, (groups, -1))  # (groups, C / groups, taps)
        weight = layer.weight.flatten(2).unflatten(0, (groups, -1))  # (groups, D / groups, C / groups, taps)
        columns[n, row, column] = torch.einsum("gct,gdct->gd", by_group, weight).flatten()
    out = torch.stack([columns[place] for place in sorted(columns)]).view(len(x), *out.shape[2:], out_channels)
    out = out.permute(0, 3, 1, 2)
    return out if layer.bias is None else out + layer.bias.view(1, -1, 1, 1)


@pytest.fixture(params=[gathered_deform_conv2d, deform_conv2d])
def way(request, monkeypatch):
    """Each of the two ways, on the CPU."""
    monkeypatch.setattr(deform_conv, "gathered_deform_conv2d", request.param)
    return request.param


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.usefixtures("way")
def test_definition(setting):
    layer, x = layer_of(setting), images(setting[0], (5, 4))
    leaves = [x.requires_grad_(), *layer.parameters()]
    ours, exact = layer(x), in_loops(x, layer, setting)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(exact, leaves, upstream)
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
        assert exact.abs().max() > 1e-3


@pytest.mark.usefixtures("way")
def test_recorded(recorded, check):
    seen = []
    for case, inputs, state, outputs in recorded("dcnv2"):
        build = case["settings"]["build"]
        sizes = {key: build[key] for key in ("stride", "padding", "groups", "bias") if key in build}
        layer = ModulatedDeformConv2d(build["in_channels"], build["out_channels"], build["kernel_size"], **sizes)
        layer.load_state_dict(state)
        x = inputs["x"].clone().requires_grad_()
        out = layer(x)
        check(case, "out0", out, outputs["out0"])
        (out.square().sum() / 2).backward()
        check(case, "grad.x", x.grad, outputs["grad.x"])
        parameters = dict(layer.named_parameters())
        norms = torch.stack([parameters[name].grad.double().norm() for name in case["settings"]["parameters"]])
        check(case, "param_grad_norms", norms, outputs["param_grad_norms"])
        assert len(parameters) == len(norms)
        seen.append(case["name"])
    assert seen == ["plain", "stride2", "groups2"]


@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[4]])
@pytest.mark.usefixtures("way")
def test_gradcheck(setting):
    layer, x = layer_of(setting), images(setting[0], (4, 3), count=1)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=False),
    nn.Conv2d(6, 6, (1, 5), padding="same", dilation=2),
    Conv2dSame(8, 8, 5, stride=2, groups=8, bias=False),
    Conv2dSame(4, 4, 3, stride=2),
    nn.Conv2d(4, 4, 2),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("size", [(9, 8), (10, 13)])
def test_it_starts_as_the_convolution_it_replaces(conv, size):
    conv = conv.double()
    layer = ModulatedDeformConv2d.from_conv(conv)
    x = images(conv.in_channels, size)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-13)
    assert torch.equal(layer.weight, 2 * conv.weight)  # no bit is lost
    assert not layer.conv_offset.weight.any()
    assert not layer.conv_offset.bias.any()
    layer(x).square().sum().backward()
    assert layer.conv_offset.weight.grad.any()  # and learns to be another
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("conv", "kind"),
    [
        (type("Own", (nn.Conv2d,), {})(2, 2, 3), "a Own"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "reflect"),
    ],
)
def test_other_convolutions_have_no_deformable_form(conv, kind):
    with pytest.raises(ValueError, match=f"{kind}.*has no deformable form"):
        ModulatedDeformConv2d.from_conv(conv)


def test_the_start_of_a_fresh_layer():
    layer = ModulatedDeformConv2d(16, 8, 3, padding=1, groups=2)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": (8, 8, 3, 3),
        "bias": (8,),
        "conv_offset.weight": (27, 16, 3, 3),
        "conv_offset.bias": (27,),
    }
    assert 0.9 / 12 < layer.weight.abs().max() <= 1 / 12  # uniform up to 1 / sqrt(16 · 9)
    assert not any(p.any() for p in (layer.bias, *layer.conv_offset.parameters()))
    x = images(16).float()
    plain = F.conv2d(x, layer.weight, padding=1, groups=2)
    torch.testing.assert_close(layer(x), plain / 2, rtol=1e-5, atol=1e-6)
    assert "stride=(1, 1)" in repr(layer)


@pytest.mark.parametrize("setting", SETTINGS)
def test_both_ways_are_one_where_nothing_is_between_cells(setting):
    """At the start, taps lie on cells, where the derivative by a shift jumps, and beside the border."""
    results = []
    for convolve in (gathered_deform_conv2d, deform_conv2d):
        layer, x = layer_of(setting), images(setting[0]).requires_grad_()
        layer.start_as_plain()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deform_conv, "gathered_deform_conv2d", convolve)
            out = layer(x)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], upstream)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_shifts_far_away_and_shifts_that_are_no_numbers():
    layer = layer_of(SETTINGS[3])
    x = images(3)
    with torch.no_grad():
        layer.conv_offset.bias[:2] = 1e30
        assert torch.equal(layer(x), layer.bias.view(1, -1, 1, 1).expand(2, 2, 7, 6))
        layer.conv_offset.bias[1] = torch.nan
        assert layer(x).isnan().all()


@pytest.mark.usefixtures("way")
def test_a_shift_by_hand():
    """All taps look one cell further right and half a cell up, and count sigmoid(log 3) = 3/4."""
    layer = ModulatedDeformConv2d(1, 1, 1)
    with torch.no_grad():
        layer.weight.fill_(8)
        layer.conv_offset.bias.copy_(torch.tensor([-0.5, 1.0, math.log(3)]))
    x = torch.tensor([[1.0, 2, 3], [5, 6, 7]]).view(1, 1, 2, 3)
    # Up from row 0 half of it is missing; right of column 2 there is nothing.
    torch.testing.assert_close(layer(x)[0, 0], 6 * torch.tensor([[1.0, 1.5, 0], [4, 5, 0]]))


@pytest.mark.usefixtures("way")
def test_layout_and_precision_are_those_of_the_input():
    layer = layer_of(SETTINGS[1]).float()
    x = images(4).float()
    exact = layer(x)
    assert exact.is_contiguous()
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, exact, rtol=1e-5, atol=1e-5)
    low = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(low)
        assert torch.equal(layer(x), exact)  # float32 also under autocast
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, layer(low.float()).bfloat16(), rtol=0, atol=0)
    out.float().sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert layer.conv_offset.weight.grad.dtype == torch.float32
    narrow = layer_of(SETTINGS[1]).bfloat16()
    assert narrow(low).dtype == torch.bfloat16


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.usefixtures("way")
def test_no_images(setting):
    layer = layer_of(setting)
    x = images(setting[0], count=0).requires_grad_()
    out = layer(x)
    assert out.shape == (0, *layer(images(setting[0])).shape[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def parts_of(setting) -> tuple[list[Tensor], Tensor]:
    """Features, shifts, weight, bias and what taps count, in float64, and the gradient of the sums: bfloat16's numbers,
    places those of float32."""
    in_channels, out_channels, kernel, stride, padding, dilation, groups, _ = setting
    generator = torch.Generator().manual_seed(3)
    kernel, stride, dilation = pair(kernel), pair(stride), pair(dilation)
    padding = (0, 0) if padding == "same" else pair(padding)
    size, taps = (6, 5), math.prod(kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    out = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().double()

    shifts = (3 * torch.randn(3, 2 * taps, *out, generator=generator)).double()
    shifts[0, :, 0] = shifts[0, :, 0].round()  # on a cell; others are far outside
    counts = torch.rand(3, taps, *out, generator=generator).double()
    weight = draw(out_channels, in_channels // groups, *kernel)
    parts = [draw(3, in_channels, *size), shifts, weight, draw(out_channels), counts]
    return parts, draw(3, out_channels, *out)


def results_of(way, setting, dtype: torch.dtype) -> list[Tensor]:
    """The sums and the gradients of all parts; places in float32 at least."""
    parts, upstream = parts_of(setting)
    _, _, _, stride, padding, dilation, _, _ = setting
    places = torch.promote_types(dtype, torch.float32)
    kinds = (dtype, places, dtype, dtype, places)
    leaves = [part.to(kind).requires_grad_() for part, kind in zip(parts, kinds, strict=True)]
    steps = (pair(stride), (0, 0) if padding == "same" else pair(padding), pair(dilation))
    out = way(*leaves[:4], *steps, leaves[4])
    results = [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]
    assert [result.dtype for result in results] == [dtype, *kinds]
    return results


# Converting to and from a dtype does not depend on the setting: for the low ones two are enough, which together have
# groups, strides, a dilation, a kernel that is not square, and a second block of channels.
TRITON_CASES = [
    *((torch.float32, setting) for setting in SETTINGS),
    *((dtype, setting) for dtype in (torch.bfloat16, torch.float16) for setting in (SETTINGS[1], SETTINGS[2])),
]


@interpreted
@pytest.mark.parametrize(("dtype", "setting"), TRITON_CASES)
def test_triton_equals_the_other_ways(monkeypatch, setting, dtype):
    """Some images at a time, the last ones fewer; all at once in `test_the_layer_by_triton`."""
    from tailseg.layers import deform_conv_triton

    expected = results_of(gathered_deform_conv2d, setting, torch.float64)
    # So that some blocks are the second or the last. An interpreted program takes as long whatever its block.
    monkeypatch.setattr(deform_conv_triton, "CHANNEL_BLOCK", 2)
    monkeypatch.setattr(deform_conv_triton, "CELL_BLOCK", 32)
    two_images = 2 * math.prod(pair(setting[2])) * setting[0] * expected[0][0, 0].numel()
    monkeypatch.setattr(deform_conv_triton, "MATRIX_ELEMENTS", two_images)
    # Sums of what was rounded once: what taps see, and their gradients.
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, exact in zip(results_of(triton_deform_conv2d, setting, dtype), expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


@interpreted
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_layer_by_triton(monkeypatch, setting):
    layer = layer_of(setting).float()
    monkeypatch.setattr(deform_conv, "_way", lambda *_: triton_deform_conv2d)
    results = []
    for kind, dtype in ((layer, torch.float32), (layer_of(setting), torch.float64)):
        if dtype == torch.float64:
            monkeypatch.undo()
        x = images(setting[0], (5, 3)).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = kind(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        results.append([out, *torch.autograd.grad(out, [x, *kind.parameters()], upstream.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@interpreted
def test_triton_without_images_and_without_numbers():
    setting = SETTINGS[3]
    parts, _ = parts_of(setting)
    x, shifts, weight, bias, counts = (part.float() for part in parts)
    steps = (1, 1), (0, 0), (1, 1)
    assert triton_deform_conv2d(x[:0], shifts[:0], weight, bias, *steps, counts[:0]).shape == (0, 2, 6, 5)
    far = triton_deform_conv2d(x, shifts + 1e30, weight, bias, *steps, counts)
    assert torch.equal(far, bias.view(1, -1, 1, 1).expand(3, 2, 6, 5))
    assert triton_deform_conv2d(x, shifts * torch.nan, weight, bias, *steps, counts).isnan().all()


@interpreted
def test_kernels_compile_for_gpus():
    lines = lines_of(Path(__file__).with_name("compile_deform_conv.py"))
    assert len(lines) == 8
    assert all(int(size) > 0 for *_, size in lines)


def test_cuda_takes_triton_and_nothing_else_does(monkeypatch):
    assert deform_conv._way(torch.device("cpu"), torch.float32) is gathered_deform_conv2d
    assert deform_conv._way(torch.device("cuda"), torch.float32) is triton_deform_conv2d
    assert deform_conv._way(torch.device("cuda"), torch.float64) is deform_conv2d
    assert deform_conv._way(torch.device("mps"), torch.float32) is deform_conv2d
    monkeypatch.setattr(deform_conv, "has_triton", lambda: False)
    assert deform_conv._way(torch.device("cuda"), torch.float32) is deform_conv2d


@pytest.mark.parametrize("setting", SETTINGS)
def test_converted_features_are_not_kept(setting):
    """Features of low precision are kept as they are for the network that tells the shifts, not in float32."""
    layer, low = layer_of(setting).float(), images(setting[0], (16, 16)).bfloat16()

    def results_of(x: Tensor) -> list[Tensor]:
        leaf, kept = x.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            out = layer._told(leaf)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad(out, [leaf, *layer.conv_offset.parameters()], upstream)
        assert [tensor.dtype for tensor in kept if tensor.shape == x.shape] == [x.dtype]
        assert gradients[0].dtype == x.dtype
        return [out, gradients[0].bfloat16(), *gradients[1:]]

    torch.testing.assert_close(results_of(low), results_of(low.float()), rtol=1e-6, atol=1e-6)


def test_impossible_arguments():
    with pytest.raises(ValueError, match="'same', got 'valid'"):
        ModulatedDeformConv2d(2, 2, 3, padding="valid")
    with pytest.raises(ValueError, match="4 and 6 channels do not fall into 4 groups"):
        ModulatedDeformConv2d(4, 6, 3, groups=4)
