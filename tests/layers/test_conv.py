"""Convolutions with gradients by products against PyTorch's own in float64, and where they are taken."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tailseg.layers import conv
from tailseg.layers.conv import (
    Conv1x1,
    Conv3x3,
    ConvByProducts,
    ConvTranspose2x2,
    DepthwiseByPlaces,
    LowDepthwise,
    PixelsByProducts,
    TransposedByProducts,
    by_products,
    depthwise_gradient,
    train_fast,
    weight_gradient,
)


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "hw"),
    [(2, 3, 5, (7, 4)), (1, 1, 1, (1, 1)), (3, 4, 2, (1, 9)), (2, 2, 2, (6, 8)), (1, 3, 1, (2, 2))],
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_pytorchs(batch, inputs, outputs, hw, stride, channels_last, with_bias):
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = torch.randn(batch, inputs, *hw, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64) if with_bias else None
    wanted = [t.clone().requires_grad_() for t in (maps, weight, *([bias] if bias is not None else []))]
    expected = F.conv2d(*wanted, stride=stride, padding=1)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    expected.backward(grad)
    given = [t.clone().requires_grad_() for t in (maps, weight, *([bias] if bias is not None else []))]
    found = ConvByProducts.apply(*given, *([] if with_bias else [None]), stride)
    assert torch.equal(found, expected)
    found.backward(grad)
    for ours, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_gradients_by_differences():
    generator = torch.Generator().manual_seed(1)
    maps, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 3, 4, 5), (2, 3, 3, 3)))
    assert torch.autograd.gradcheck(
        lambda x, w: ConvByProducts.apply(x, w, None, 1), (maps.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "hw"), [(2, 3, 5, (4, 7)), (1, 1, 1, (1, 1)), (3, 4, 2, (1, 9))]
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_transposed_values_and_gradients_are_pytorchs(batch, inputs, outputs, hw, channels_last, with_bias):
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = torch.randn(batch, inputs, *hw, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(inputs, outputs, 2, 2, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64) if with_bias else None
    wanted = [t.clone().requires_grad_() for t in (maps, weight, *([bias] if bias is not None else []))]
    expected = F.conv_transpose2d(*wanted, stride=2)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    expected.backward(grad)
    given = [t.clone().requires_grad_() for t in (maps, weight, *([bias] if bias is not None else []))]
    found = TransposedByProducts.apply(*given, *([] if with_bias else [None]))
    assert torch.equal(found, expected)
    found.backward(grad)
    for ours, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_transposed_by_hand():
    # One pixel of two channels becomes four of one; each gradient is a sum over them.
    maps = torch.tensor([[[[2.0]], [[3.0]]]], requires_grad=True)
    weight = torch.tensor([[[[1.0, 2], [3, 4]]], [[[5, 6], [7, 8]]]], requires_grad=True)
    bias = torch.tensor([10.0], requires_grad=True)
    found = TransposedByProducts.apply(maps, weight, bias)
    assert found.tolist() == [[[[27, 32], [37, 42]]]]
    found.backward(torch.tensor([[[[1.0, 10], [100, 1000]]]]))
    assert maps.grad.flatten().tolist() == [4321, 8765]
    assert weight.grad.flatten(1).tolist() == [[2, 20, 200, 2000], [3, 30, 300, 3000]]
    assert bias.grad.tolist() == [1111]


def assert_same_gradients(ours, inputs, grad, **options):
    """A function of maps, weight and bias or None, and its gradients, against `F.conv2d` with these options."""
    given, wanted = ([None if t is None else t.clone().requires_grad_() for t in inputs] for _ in range(2))
    found, expected = ours.apply(*given), F.conv2d(*wanted, **options)
    assert torch.equal(found, expected)
    found.backward(grad)
    expected.backward(grad)
    for one, other in zip(given, wanted, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hw", [(1, 1), (2, 7), (7, 2), (4, 4), (9, 8)])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 7), (5, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_depthwise_values_and_gradients_are_pytorchs(hw, kernel, channels_last, with_bias):
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps, grad = (
        torch.randn(2, 3, *hw, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
        for _ in range(2)
    )
    weight = torch.randn(3, 1, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64) if with_bias else None
    padding = (kernel[0] // 2, kernel[1] // 2)
    assert_same_gradients(DepthwiseByPlaces, (maps, weight, bias), grad, padding=padding, groups=3)


@pytest.mark.parametrize("hw", [(1, 1), (4, 7)])
@pytest.mark.parametrize("channels", [(3, 5), (1, 2), (4, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_of_pixels_are_pytorchs(hw, channels, channels_last, with_bias):
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps, grad = (
        torch.randn(2, count, *hw, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
        for count in channels
    )
    weight = torch.randn(*channels[::-1], 1, 1, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels[1], generator=generator, dtype=torch.float64) if with_bias else None
    assert_same_gradients(PixelsByProducts, (maps, weight, bias), grad)


def test_pixels_are_multiplied_where_they_lie_in_rows(monkeypatch):
    """And only in training on a CPU."""
    taken = []
    monkeypatch.setattr(conv.PixelsByProducts, "apply", lambda *given: taken.append(given) or given[0])
    layer = Conv1x1(3, 3, 1)
    monkeypatch.setattr(conv, "WIDE", 9)
    maps = torch.ones(2, 3, 4, 5)
    layer(maps)
    assert taken == []
    layer(maps.contiguous(memory_format=torch.channels_last))
    assert len(taken) == 1
    with torch.no_grad():
        layer(maps.contiguous(memory_format=torch.channels_last))
    monkeypatch.setattr(conv, "WIDE", 10)
    layer(maps.contiguous(memory_format=torch.channels_last))
    assert len(taken) == 1


def test_depthwise_by_hand():
    """One channel, a row of three pixels: each weight meets the pixel beside the gradient's."""
    maps, grad = torch.tensor([[[[2.0, 3, 5]]]]), torch.tensor([[[[1.0, 10, 100]]]])
    found = depthwise_gradient(maps, grad, (3, 5))
    assert found[0, 0, 1].tolist() == [200, 20 + 300, 2 + 30 + 500, 3 + 50, 5]
    assert found[0, 0, 0].tolist() == found[0, 0, 2].tolist() == [0] * 5


def test_float32_is_as_exact_as_pytorchs():
    """Against float64, on a map of a real pyramid."""
    generator = torch.Generator().manual_seed(2)
    maps, grad = (torch.randn(2, 64, 40, 60, generator=generator) for _ in range(2))
    exact = weight_gradient(maps.double(), grad.double())
    weight = torch.zeros(64, 64, 3, 3, requires_grad=True)
    F.conv2d(maps, weight, padding=1).backward(grad)
    assert weight.grad is not None
    ours, theirs = ((g - exact).abs().max() for g in (weight_gradient(maps, grad), weight.grad))
    assert ours < 2 * theirs + 1e-4


def test_maps_that_need_no_gradient():
    weight = torch.ones(2, 1, 3, 3, requires_grad=True)
    ConvByProducts.apply(torch.ones(1, 1, 4, 4), weight, None, 1).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0, 0].tolist() == [[9, 12, 9], [12, 16, 12], [9, 12, 9]]


def test_where_products_are_taken():
    wide, narrow = torch.zeros(512, 512, 3, 3, requires_grad=True), torch.zeros(64, 64, 3, 3, requires_grad=True)
    small, large = torch.zeros(2, 64, 14, 14), torch.zeros(2, 64, 32, 32)
    assert by_products(torch.zeros(2, 512, 4, 4), wide)
    assert not by_products(torch.zeros(30, 256, 14, 14), torch.zeros(256, 256, 3, 3, requires_grad=True))
    assert by_products(large, narrow)
    assert not by_products(small, narrow)
    assert not by_products(large, torch.zeros(16, 64, 3, 3, requires_grad=True))
    assert not by_products(large[:0], narrow)
    assert not by_products(large, narrow.detach())
    assert not by_products(large.bfloat16(), narrow)
    assert not by_products(large.to("meta"), narrow)
    with torch.no_grad():
        assert not by_products(large, narrow)
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_products(large, narrow)


def test_a_model_is_changed_where_it_fits_and_nowhere_else(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.ConvTranspose2d(4, 4, 2, stride=2, output_padding=1),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        nn.ConvTranspose2d(4, 4, 3, stride=2),
        nn.MaxPool2d(5),
        nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False),
        nn.Conv2d(4, 4, 5, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, stride=2),
        nn.Conv2d(8, 8, 4, padding="same", groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1, padding=1),
    ).to(memory_format=torch.channels_last)
    before, state = copy.deepcopy(model), model.state_dict()
    train_fast(model)
    assert [type(part) is Conv3x3 for part in model] == [True, True, *[False] * 4, True, *[False] * 14]
    assert [type(part) is ConvTranspose2x2 for part in model] == [*[False] * 7, True, *[False] * 13]
    assert [type(part) is LowDepthwise for part in model] == [*[False] * 12, True, *[False] * 8]
    assert [type(part) is Conv1x1 for part in model] == [*[False] * 5, True, *[False] * 15]
    assert model.state_dict().keys() == state.keys()
    for name in ("WIDE", "NARROW", "LARGE_MAP"):
        monkeypatch.setattr(conv, name, 1)
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for part in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        before.zero_grad()
        assert torch.equal(part(images), before(images))
        part.zero_grad()
        part(images).square().sum().backward()
        before(images).square().sum().backward()
        for ours, theirs in zip(part.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
