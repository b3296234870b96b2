"""Normalised layers against the recording, by hand, and at the edges of their norms."""

import math

import pytest
import torch
from torch.nn import functional as F

from tailseg.layers.normalized import NormalizedConv2d, NormalizedLinear, normalize


def test_recorded_linear(recorded, check):
    seen = 0
    for case, inputs, state, outputs in recorded("classifier"):
        about = case["settings"].get("layer", {})
        if about.get("type") != "NormedLinear":
            continue
        layer = NormalizedLinear(about["in_features"], about["out_features"], about["tempearture"], about["eps"])
        layer.load_state_dict(state)
        x = inputs["x"].clone().requires_grad_()
        out = layer(x)
        check(case, "out", out, outputs["out"])
        (out * inputs["upstream"]).sum().backward()
        check(case, "grad.x", x.grad, outputs["grad.x"])
        check(case, "grad.weight", layer.weight.grad, outputs["grad.weight"])
        check(case, "grad.bias", layer.bias.grad, outputs["grad.bias"])
        seen += 1
    assert seen == 2


def test_by_hand():
    layer = NormalizedLinear(2, 3, temperature=10.0, eps=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.1], [-5.0, 0.0]]))
        layer.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(layer(torch.tensor([[4.0, 3.0]])), torch.tensor([[10.6, 6.0, -8.0]]))


def test_eps_is_added_to_the_norm():
    x = torch.tensor([[3e-6, 4e-6]])
    torch.testing.assert_close(normalize(x, 1, 1e-6), x / 6e-6)
    assert not torch.allclose(normalize(x, 1, 1e-6), F.normalize(x, dim=1, eps=1e-6), rtol=0.1)
    torch.testing.assert_close(normalize(x.T, 0, 0.0).norm(), torch.tensor(1.0))


def test_only_directions_matter():
    torch.manual_seed(0)
    layer, x = NormalizedLinear(8, 5), torch.randn(20, 8)
    out = layer(x)
    assert out.abs().max() <= 20
    torch.testing.assert_close(layer(x * 1000), out, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(5, 1) * 100 + 1)
    torch.testing.assert_close(layer(x), out, rtol=1e-3, atol=1e-3)


def test_zero_features_and_no_rows_have_gradients():
    layer = NormalizedLinear(4, 3)
    x = torch.zeros(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))
    layer.zero_grad()
    out = layer(torch.zeros(0, 4))
    out.sum().backward()
    assert out.shape == (0, 3)
    assert (layer.weight.grad == 0).all()


def test_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = NormalizedLinear(64, 5), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        from_low = layer(x.bfloat16())
    assert (out.dtype, from_low.dtype) == (torch.float32, torch.float32)
    assert torch.equal(out, layer(x))
    assert torch.equal(from_low, layer(x.bfloat16().float()))


def test_initialisation():
    torch.manual_seed(0)
    layer = NormalizedLinear(1000, 100)
    assert math.isclose(layer.weight.std().item(), 0.01, rel_tol=0.02)
    assert (layer.bias == 0).all()


def test_recorded_convolution(recorded, check):
    seen = 0
    for case, inputs, state, outputs in recorded("classifier"):
        about = case["settings"].get("layer", {})
        if about.get("type") != "NormedConv2d":
            continue
        layer = NormalizedConv2d(
            about["in_channels"],
            about["out_channels"],
            about["kernel_size"],
            padding=about["padding"],
            temperature=about["tempearture"],
            eps=about["eps"],
            norm_over_kernel=about["norm_over_kernel"],
        )
        layer.load_state_dict(state)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            layer.zero_grad()
            x = inputs["x"].clone(memory_format=memory_format).requires_grad_()
            out = layer(x)
            check(case, "out", out, outputs["out"])
            (out * inputs["upstream"]).sum().backward()
            check(case, "grad.x", x.grad, outputs["grad.x"])
            check(case, "grad.weight", layer.weight.grad, outputs["grad.weight"])
            check(case, "grad.bias", layer.bias.grad, outputs["grad.bias"])
        seen += 1
    assert seen == 3


@pytest.mark.parametrize("over_kernel", [False, True])
def test_convolution_equals_its_definition(over_kernel):
    torch.manual_seed(0)
    layer = NormalizedConv2d(3, 2, 3, padding=1, temperature=7.0, eps=1e-2, norm_over_kernel=over_kernel).double()
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.5, -1.0]))
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    expected = torch.zeros(1, 2, 4, 5, dtype=torch.float64)
    for k, row, column in ((k, row, column) for k in range(2) for row in range(4) for column in range(5)):
        total = layer.bias[k].item()
        for a, b in ((a, b) for a in range(3) for b in range(3)):
            y, z = row + a - 1, column + b - 1
            if not (0 <= y < 4 and 0 <= z < 5):
                continue
            weight, place = layer.weight[k, :, a, b], x[0, :, y, z]
            length = (layer.weight[k] if over_kernel else weight).pow(2).sum().sqrt() + 1e-2
            total += 7 * ((weight / length) @ (place / (place.pow(2).sum().sqrt() + 1e-2))).item()
        expected[0, k, row, column] = total
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_a_convolution_of_one_place_is_a_linear_layer():
    torch.manual_seed(0)
    conv, linear = NormalizedConv2d(8, 5, 1), NormalizedLinear(8, 5)
    linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": torch.randn(5)})
    conv.bias.data.copy_(linear.bias)
    x = torch.randn(2, 8, 3, 4)
    torch.testing.assert_close(conv(x), linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_convolution_keeps_channels_last():
    layer, x = NormalizedConv2d(8, 5, 3, padding=1), torch.randn(2, 8, 6, 7)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    out = layer(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


def test_convolution_in_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = NormalizedConv2d(16, 5, 1), torch.randn(2, 16, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        from_low = layer(x.bfloat16())
    assert (out.dtype, from_low.dtype) == (torch.float32, torch.float32)
    assert torch.equal(out, layer(x))
    assert torch.equal(from_low, layer(x.bfloat16().float()))


def test_convolution_of_zeros_and_of_nothing_has_gradients():
    layer = NormalizedConv2d(4, 3, 1)
    x = torch.zeros(2, 4, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(layer.bias.grad, torch.full((3,), 50.0))
    layer.zero_grad()
    out = layer(torch.zeros(0, 4, 5, 5))
    out.sum().backward()
    assert out.shape == (0, 3, 5, 5)
    assert (layer.weight.grad == 0).all()


def test_convolution_is_initialised_like_the_linear_layer():
    torch.manual_seed(0)
    layer = NormalizedConv2d(256, 100, 1)
    assert math.isclose(layer.weight.std().item(), 0.01, rel_tol=0.02)
    assert (layer.bias == 0).all()
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (100, 256, 1, 1),
        "bias": (100,),
    }
