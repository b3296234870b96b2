"""Normalised layers against the recording, by hand, and at the edges of their norms."""

import math

import torch
from torch.nn import functional as F

from tailseg.layers.normalized import NormalizedLinear, normalize


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
