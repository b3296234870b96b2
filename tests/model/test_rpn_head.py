"""The backward pass over sampled cells against the plain one of autograd."""

import pytest
import torch
from tiny import made
from torch import Tensor
from torch.nn import functional as F

from tailseg.model.rpn import RPN

SIDES = ((9, 12), (5, 6), (3, 3), (2, 1), (1, 1))


def plain_head(rpn: RPN, features: Tensor) -> tuple[Tensor, Tensor]:
    for conv in rpn.first_convs:
        features = F.relu(conv(features))
    hidden = F.relu(rpn.conv(features))
    return rpn.objectness(hidden), rpn.deltas(hidden)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("sampled", "convs"), [(0, 1), (1, 1), (40, 1), (2000, 1), (40, 3)])
def test_gradients_are_those_of_autograd(sampled, convs, memory_format, monkeypatch):
    torch.manual_seed(sampled)
    rpn = made(RPN, 8, convs=convs).double()
    assert len(list(rpn.parameters())) == 2 * (convs + 2)
    for parameter in rpn.parameters():  # as initialised, some gradients would be too small to compare
        torch.nn.init.normal_(parameter)
    pyramid = [
        torch.randn(2, 8, *side, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
        for side in SIDES
    ]
    anchors = 3 * sum(h * w for h, w in SIDES)
    drawn = torch.randint(0, anchors, (2, sampled))

    def gradients() -> list[Tensor]:
        output = rpn(pyramid)
        picked = output.deltas.gather(1, drawn.unsqueeze(2).expand(-1, -1, 4))
        loss = output.logits.gather(1, drawn).square().sum() + picked.pow(3).sum()
        return list(torch.autograd.grad(loss, [*pyramid, *rpn.parameters()]))

    ours = gradients()
    monkeypatch.setattr(rpn, "_head", lambda features: plain_head(rpn, features))
    for own, plain in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max() + 1e-9))


def test_outputs_are_those_without_gradients():
    torch.manual_seed(0)
    rpn = made(RPN, 8)
    features = torch.randn(2, 8, 9, 12)
    for trained, plain in zip(rpn._head(features), plain_head(rpn, features), strict=True):
        assert torch.equal(trained, plain)
