from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailseg.layers.weighted_sums import weighted_sums


def scene(*sizes: tuple[int, int], rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, 3, generator=generator, dtype=dtype)
    parts = []
    for count, taps in sizes:
        parts += [
            torch.randint(rows, (count, taps), generator=generator),
            torch.randn(count, taps, generator=generator, dtype=dtype),
        ]
    return table, parts


def stated(table: Tensor, parts: list[Tensor]) -> Tensor:
    """The sums, a row at a time."""
    sums = []
    for places, weights in zip(parts[::2], parts[1::2], strict=True):
        for own, weight in zip(places.tolist(), weights, strict=True):
            sums.append(sum((w * table[p] for p, w in zip(own, weight, strict=True)), torch.zeros_like(table[0])))
    return torch.stack(sums) if sums else table[:0]


@pytest.mark.parametrize("sizes", [((5, 4),), ((5, 4), (1, 9), (3, 1)), ((0, 4), (2, 3))])
def test_sums_and_gradients_are_those_of_rows_added_one_by_one(sizes: tuple[tuple[int, int], ...]) -> None:
    table, parts = scene(*sizes)
    inputs = [table, *parts[1::2]]
    outs, grads = [], []
    for function in (lambda t, p: weighted_sums(t, *p), stated):
        own = [x.clone().requires_grad_() for x in inputs]
        out = function(own[0], [part for pair in zip(parts[::2], own[1:], strict=True) for part in pair])
        (out * torch.arange(1, 4) * torch.arange(1, len(out) + 1).unsqueeze(1)).sum().backward()
        outs.append(out)
        grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in own])
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    table, (places, weights) = scene((4, 3))
    weights.requires_grad_()
    weighted_sums(table, places, weights).sum().backward()
    torch.testing.assert_close(weights.grad, table.sum(1)[places])
    table, (places, weights), (_, more) = *scene((4, 3)), scene((2, 2))[1]
    table.requires_grad_()
    more.requires_grad_()
    weighted_sums(table, places, weights, places[:2, :2], more).sum().backward()
    assert table.grad is not None
    assert weights.grad is None
    assert more.grad is not None
    torch.testing.assert_close(more.grad, table.detach().sum(1)[places[:2, :2]])


def test_nothing_to_sum_gives_a_gradient_of_zero() -> None:
    table, parts = scene((0, 4))
    table.requires_grad_()
    out = weighted_sums(table, *parts)
    out.sum().backward()
    assert out.shape == (0, 3)
    torch.testing.assert_close(table.grad, torch.zeros_like(table))


def test_positions_in_32_bits_and_float32_do_as_well() -> None:
    table, (places, weights) = scene((50, 4), rows=100, dtype=torch.float32)
    found = []
    for positions in (places, places.int()):
        own = table.clone().requires_grad_()
        out = weighted_sums(own, positions, weights)
        out.square().sum().backward()
        found.append((out, own.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_gradient_of_strides_is_read_as_it_is_meant() -> None:
    table, (places, weights) = scene((5, 4))
    table.requires_grad_()
    (seen,) = torch.autograd.grad(weighted_sums(table, places, weights), table, torch.ones(1, 1).double().expand(5, 3))
    counts = torch.zeros(7, dtype=torch.float64).index_add_(0, places.flatten(), weights.flatten())
    torch.testing.assert_close(seen, counts.unsqueeze(1).expand(-1, 3))


def test_function_transforms_take_the_plain_way() -> None:
    table, (places, weights) = scene((5, 4))
    grad = torch.func.grad(lambda t: weighted_sums(t, places, weights).square().sum())(table)
    own = table.clone().requires_grad_()
    weighted_sums(own, places, weights).square().sum().backward()
    torch.testing.assert_close(grad, own.grad)
