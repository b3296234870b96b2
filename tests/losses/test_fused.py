"""Losses that make their gradient themselves on a CPU against their definitions, and when the definition takes over."""

import math

import pytest
import torch
from torch import Tensor

from tailseg.losses import CLASSIFICATIONS, Classification, ClassStatistics
from tailseg.losses.fused import LARGEST_LOGIT, may_fuse, with_gradient

CLASSES = 60
NAMES = ["eql", "eql-v2", "group-softmax", "federated", "focal"]


def made(name: str) -> Classification:
    kind = CLASSIFICATIONS[name]
    counts = (20_000 / torch.arange(1, CLASSES + 1) ** 2).ceil().long()
    known = {"statistics": ClassStatistics(num_images=10**5, images=counts, instances=counts)}
    return kind(CLASSES, **(known if kind.needs_statistics else {}))


def case(ours: Classification, rows: int = 50, scale: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, of which some are large, labels with every class and background, and valid RoIs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, ours.num_logits, generator=generator) * scale
    logits[::7, ::5] = torch.tensor([-200.0, 30.0]).repeat(math.ceil(rows / 7), 99)[:, : logits[::7, ::5].shape[1]]
    labels = torch.randint(0, CLASSES + 1, (rows,), generator=generator)
    labels[:2] = torch.tensor([CLASSES, 0])
    return logits, labels, torch.rand(rows, generator=generator) < 0.8


def step(ours: Classification, logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)  # of what a loss draws
    leaf = logits.detach().requires_grad_()
    loss = ours.loss(leaf, labels, valid)["classes"]
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.fixture
def defined(monkeypatch):
    """A function that makes every loss take its definition."""

    def define() -> None:
        for module in ("equalization", "federated", "focal", "group_softmax"):
            monkeypatch.setattr(f"tailseg.losses.{module}.may_fuse", lambda _: False)

    return define


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradient_and_state_are_those_of_the_definition(name, defined):
    ours, exact = made(name), made(name)
    batches = [case(ours, seed=seed) for seed in range(3)]
    found = [step(ours, *batch) for batch in batches]
    defined()
    for (loss, grad), (logits, labels, valid) in zip(found, batches, strict=True):
        exact_loss, exact_grad = step(exact, logits.double(), labels, valid)
        assert loss.dtype == grad.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=2e-8)
    for one, other in zip(ours.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_small_gradients_keep_their_digits(name, defined):
    ours, exact = made(name), made(name)
    logits, labels, valid = case(ours)
    logits = logits.clamp(max=-20)
    _, grad = step(ours, logits, labels, valid)
    defined()
    _, exact_grad = step(exact, logits.double(), labels, valid)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-5, atol=1e-30)
    for one, other in zip(ours.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_taken_on_a_cpu_and_its_gradient_serves_twice(name, monkeypatch):
    ours = made(name)
    logits, labels, valid = case(ours)
    monkeypatch.setattr(type(ours), "_losses", None)
    leaf = logits.requires_grad_()
    loss = ours.loss(leaf, labels, valid)["classes"]
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert not ours.loss(leaf, labels, valid)["classes"].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name):
    ours = made(name).eval()
    logits, labels, valid = case(ours, rows=3, scale=1.0)

    def loss(some: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ours.loss(torch.cat([some, logits[:, 4:].double()], dim=1), labels, valid)["classes"]

    leaf = logits[:, :4].double().clamp(-2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(loss, leaf)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [LARGEST_LOGIT + 1, 1e4, math.inf, math.nan])
def test_logits_too_large_or_no_numbers_take_the_definition(name, value, defined):
    ours, exact = made(name), made(name)
    logits, labels, valid = case(ours)
    logits[5, 3] = value
    assert not may_fuse(logits)
    loss, grad = step(ours, logits, labels, valid)
    defined()
    exact_loss, exact_grad = step(exact, logits, labels, valid)
    torch.testing.assert_close(loss, exact_loss, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, exact_grad, rtol=0, atol=0, equal_nan=True)


def test_a_group_far_below_the_others_takes_the_definition(defined):
    ours, exact = made("group-softmax"), made("group-softmax")
    logits, labels, valid = case(ours)
    logits[0] = torch.where(torch.arange(ours.num_logits) == 0, 60.0, -80.0)  # e^-80 has lost digits
    assert may_fuse(logits)
    loss, grad = step(ours, logits, labels, valid)
    defined()
    exact_loss, exact_grad = step(exact, logits.double(), labels, valid)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=2e-8)


def test_no_rows_take_the_definition():
    assert not may_fuse(torch.zeros(0, 4))


def test_a_gradient_that_is_known_is_weighed_by_what_comes_in():
    leaf = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    losses = with_gradient(
        leaf, leaf.detach().square().sum(1) / 2, leaf.detach().clone(), lambda z: z.square().sum(1) / 2
    )
    assert losses.tolist() == [2.5, 12.5]
    (grad,) = torch.autograd.grad(losses @ torch.tensor([2.0, -1.0]), leaf)
    assert grad.tolist() == [[2.0, 4.0], [-3.0, -4.0]]
