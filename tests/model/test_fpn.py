"""The pyramid against the recording, and by hand."""

import torch
from tiny import made
from torch import nn

from tailseg.model.fpn import FPN


def test_recorded_pyramids(recorded, check):
    seen = 0
    for case, inputs, state, outputs in recorded("neck_fpn"):
        neck = made(FPN, case["settings"]["build"]["in_channels"], case["settings"]["build"]["out_channels"])

        def own(name: str) -> str:
            return name.replace(".conv.", ".").replace("fpn_convs", "output_convs")

        neck.load_state_dict({own(key): value for key, value in state.items()})
        features = [inputs[f"feature{i}"].clone().requires_grad_() for i in range(4)]
        pyramid = neck(features)
        for i, out in enumerate(pyramid):
            check(case, f"out{i}", out, outputs[f"out{i}"])
        sum((out**2).sum() / 2 for out in pyramid).backward()
        for i, feature in enumerate(features):
            check(case, f"grad.feature{i}", feature.grad, outputs[f"grad.feature{i}"])
        parameters = dict(neck.named_parameters())
        norms = [parameters[own(name)].grad.double().norm() for name in case["settings"]["parameters"]]
        check(case, "param_grad_norms", torch.stack(norms), outputs["param_grad_norms"])
        seen += 1
    assert seen == 2


def test_coarse_levels_are_added_to_finer_ones():
    neck = made(FPN, (1, 1, 1, 1), channels=1)
    with torch.no_grad():
        for conv in (*neck.lateral_convs, *neck.output_convs):
            conv.weight.zero_()
            conv.weight[..., conv.weight.shape[-1] // 2, conv.weight.shape[-1] // 2] = 1
    features = [torch.full((1, 1, 16 >> i, 16 >> i), 10.0**i) for i in range(4)]
    assert [p.unique().tolist() for p in neck(features)] == [[1111], [1110], [1100], [1000], [1000]]
    assert [p.shape[-1] for p in neck(features)] == [16, 8, 4, 2, 1]


def test_no_images():
    pyramid = made(FPN, (2, 2, 2, 2), channels=3)([torch.zeros(0, 2, 16 >> i, 16 >> i) for i in range(4)])
    assert [tuple(p.shape[:2]) for p in pyramid] == [(0, 3)] * 5


def test_norm_follows_every_convolution():
    torch.manual_seed(0)
    neck = made(FPN, (3, 4, 5, 6), channels=2, norm=True).double()
    assert all(conv.bias is None for conv in (*neck.lateral_convs, *neck.output_convs))
    features = [torch.randn(2, 3 + i, 16 >> i, 16 >> i, dtype=torch.float64) for i in range(4)]

    def normed(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        maps = conv(x)
        mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
        return (maps - mean) / (var + 1e-5).sqrt()

    merged = [normed(conv, x) for conv, x in zip(neck.lateral_convs, features, strict=True)]
    for i in (3, 2, 1):
        merged[i - 1] = merged[i - 1] + merged[i].repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = [normed(conv, x) for conv, x in zip(neck.output_convs, merged, strict=True)]
    pyramid = neck.train()(features)
    for own, plain in zip(pyramid, [*expected, expected[3][:, :, ::2, ::2]], strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-9)
