"""Tau-normalisation by hand and against a loop, and what it promises about background."""

import math

import pytest
import torch
from torch import Tensor

from tailseg.losses.tau_norm import tau_normalize


def classifier(rows: int, features: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(0.1, 3, rows).unsqueeze(1)
    return torch.randn(rows, features, generator=generator) * lengths, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("tau", [0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_equals_its_definition(tau, others):
    weight, bias = classifier(7 + others)
    norms = [math.sqrt(sum(w * w for w in row)) for row in weight[:7].tolist()]
    mean = sum(norm**tau for norm in norms) / 7
    expected = [[w / norm**tau * mean for w in row] for row, norm in zip(weight[:7].tolist(), norms, strict=True)]
    rebalanced, evened = tau_normalize(weight, bias, 7, tau)
    torch.testing.assert_close(rebalanced[:7], torch.tensor(expected))
    torch.testing.assert_close(evened[:7], torch.full((7,), sum(bias[:7].tolist()) / 7))
    assert torch.equal(rebalanced[7:], weight[7:])
    assert torch.equal(evened[7:], bias[7:])
    assert not torch.equal(rebalanced[:7], weight[:7])


def test_by_hand():
    # Norms 9 and 1 have the roots 3 and 1, of mean 2; the last row is background.
    weight = torch.tensor([[9.0, 0.0], [0.0, -1.0], [5.0, 5.0]])
    rebalanced, evened = tau_normalize(weight, torch.tensor([3.0, -1.0, 7.0]), 2, 0.5)
    torch.testing.assert_close(rebalanced, torch.tensor([[6.0, 0.0], [0.0, -2.0], [5.0, 5.0]]))
    torch.testing.assert_close(evened, torch.tensor([1.0, 1.0, 7.0]))


def test_tau_0_changes_nothing():
    weight, bias = classifier(5)
    rebalanced, evened = tau_normalize(weight, bias, 4, 0.0)
    assert torch.equal(rebalanced, weight)
    assert torch.equal(evened, bias)


def test_tau_1_gives_all_classes_the_mean_norm():
    weight, bias = classifier(6)
    norms = tau_normalize(weight, bias, 5, 1.0)[0][:5].norm(dim=1)
    torch.testing.assert_close(norms, weight[:5].norm(dim=1).mean().expand(5))


def test_classes_of_one_norm_and_one_bias_keep_their_scores():
    weight, bias = classifier(5)
    weight[:4] *= 3 / weight[:4].norm(dim=1, keepdim=True)
    bias[:4] = -2.0
    rebalanced, evened = tau_normalize(weight, bias, 4, 0.8)
    torch.testing.assert_close(rebalanced, weight)
    torch.testing.assert_close(evened, bias)


def test_a_constant_in_all_biases_does_not_change_the_softmax():
    weight, bias = classifier(5)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    first, second = (tau_normalize(weight, b, 4, 0.7) for b in (bias, bias + 5))
    scores = [(x @ w.T + b).softmax(1) for w, b in (first, second)]
    torch.testing.assert_close(*scores)


def test_a_row_without_length_stays_and_counts_for_nothing():
    weight, bias = classifier(5)
    without = tau_normalize(weight[1:], bias[1:], 3, 0.7)[0]
    weight[0] = 0
    rebalanced, _ = tau_normalize(weight, bias, 4, 0.7)
    assert torch.equal(rebalanced[0], torch.zeros(6))
    torch.testing.assert_close(rebalanced[1:], without)
    zeros, _ = tau_normalize(torch.zeros(3, 6), torch.zeros(3), 2, 1.0)
    assert torch.equal(zeros, torch.zeros(3, 6))


def test_a_weight_that_is_no_number_is_seen():
    weight, bias = classifier(4)
    weight[1, 2] = torch.nan
    assert tau_normalize(weight, bias, 3, 0.7)[0][:3].isnan().any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_stay_and_inputs_are_not_written_to(dtype):
    weight, bias = (part.to(dtype).requires_grad_() for part in classifier(5))
    before = weight.detach().clone(), bias.detach().clone()
    rebalanced, evened = tau_normalize(weight, bias, 4, 0.7)
    assert (rebalanced.dtype, evened.dtype) == (dtype, dtype)
    assert not rebalanced.requires_grad
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


@pytest.mark.parametrize(
    ("weight", "bias", "classes"), [((4, 2), (4,), 5), ((4, 2), (4,), 0), ((4, 2), (3,), 3), ((4,), (4,), 3)]
)
def test_impossible_shapes(weight, bias, classes):
    with pytest.raises(ValueError, match=r"expected weight \(K, F\) and bias \(K,\)"):
        tau_normalize(torch.ones(weight), torch.ones(bias), classes, 1.0)


@pytest.mark.parametrize("tau", [-0.1, math.nan, math.inf])
def test_impossible_tau(tau):
    with pytest.raises(ValueError, match="expected a finite tau >= 0"):
        tau_normalize(torch.ones(3, 2), torch.ones(3), 2, tau)
