"""The moving average against its formula in float64, and against PyTorch's class."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tailseg.training.average import MovingAverage
from tailseg.training.waits import waiting_operations


def network(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(device)


def test_is_the_formula_and_pytorchs_class():
    model, decay = network(), 0.7
    ours = MovingAverage(model, decay)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    exact: dict[str, torch.Tensor] = {}
    for step in range(4):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
        model(torch.randn(5, 3))  # moves the buffers
        ours.update()
        theirs.update_parameters(model)
        for name, value in model.named_parameters():
            now = value.detach().double()
            exact[name] = now if step == 0 else decay * exact[name] + (1 - decay) * now
    for name, value in ours.module.named_parameters():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert int(ours.n_averaged) == 4


def test_goes_on_from_its_state():
    model = network()
    one, other = MovingAverage(model, 0.9), MovingAverage(copy.deepcopy(model), 0.9)
    one.update()
    other.load_state_dict(one.state_dict())
    other.weights = one.weights
    with torch.no_grad():
        model[0].weight.mul_(2)
    one.update()
    other.update()
    assert torch.equal(one.module[0].weight, other.module[0].weight)
    torch.testing.assert_close(one.module[0].weight, model[0].weight * (0.9 / 2 + 0.1))


def test_nothing_waits_for_a_device():
    model = network("meta")
    average = MovingAverage(model, 0.9)
    with waiting_operations() as found:
        for _ in range(2):
            average.update()
    assert found == []
    with waiting_operations() as found:  # PyTorch's does, which is why there is ours
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).n_averaged.to("meta")
    assert found
