"""The three ways to the Seesaw losses against each other, and what each promises about memory and derivatives."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of
from torch import Tensor
from torch.autograd import forward_ad

from tailseg.losses import seesaw_kernels
from tailseg.losses.seesaw_kernels import (
    fused_parts,
    fused_seesaw,
    plain_parts,
    plain_seesaw,
    seesaw_losses,
    soft_seesaw,
    triton_seesaw,
)

EPS = 1e-2
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)
WAYS = [fused_seesaw, pytest.param(triton_seesaw, marks=interpreted)]
if interpreted.args[0] is False:
    pytest.importorskip("triton")


def case(classes: int, rows: int = 7, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits that are a slice of a wider layer's, labels, strengths of counts from 1 to 10^6, upstream gradients."""
    generator = torch.Generator().manual_seed(classes)
    logits = (torch.randn(rows, classes + 2, generator=generator) * scale)[:, :classes]
    labels = torch.randint(0, classes, (rows,), generator=generator)
    strengths = 0.8 * torch.randint(0, 7, (classes,), generator=generator) * 2.302585
    return logits, labels, strengths, torch.linspace(-1, 2, rows)


def run(way, logits: Tensor, labels: Tensor, strengths: Tensor, upstream: Tensor, q: float) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    losses = way(leaf, labels, strengths, q, EPS)
    (grad,) = torch.autograd.grad((losses * upstream).sum(), leaf)
    return losses.detach(), grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("q", [0.0, 2.0])
@pytest.mark.parametrize("classes", [1, 2, 37, 1024, 1025, 2500])
def test_ways_agree(way, q, classes):
    logits, labels, strengths, upstream = case(classes)
    losses, grad = run(way, logits, labels, strengths, upstream, q)
    exact, exact_grad = run(plain_seesaw, logits.double(), labels, strengths.double(), upstream.double(), q)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-5, atol=1e-6)
    assert losses.dtype == grad.dtype == torch.float32


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_float32_losses_and_gradients_of_their_own(way, dtype):
    logits, labels, strengths, upstream = case(50)
    losses, grad = run(way, logits.to(dtype), labels, strengths, upstream, 2.0)
    exact, exact_grad = run(plain_seesaw, logits.to(dtype).float(), labels, strengths, upstream, 2.0)
    assert (losses.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses, exact, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(grad.float(), exact_grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("q", [0.0, 2.0])
def test_huge_logits(way, q):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 1e4]])
    z, labels = z.repeat_interleave(3, dim=0), torch.arange(3).repeat(4)
    strengths = torch.tensor([16.0, 0.9, 0.0])
    losses, grad = run(way, z, labels, strengths, torch.ones(12), q)
    exact, exact_grad = run(plain_seesaw, z.double(), labels, strengths.double(), torch.ones(12).double(), q)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-3)  # 1e4 has a spacing of 1e-3
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2, atol=2e-3)
    assert grad.isfinite().all()


@pytest.mark.parametrize("way", [plain_seesaw, *WAYS])
@pytest.mark.parametrize("q", [0.0, 2.0])
def test_one_nan_makes_its_row_nan_and_no_other(way, q):
    logits, labels, strengths, upstream = case(40)
    logits = logits.clone()
    logits[3, 11] = float("nan")
    losses, grad = run(way, logits, labels, strengths, upstream, q)
    assert losses.isnan().tolist() == [i == 3 for i in range(7)]
    assert grad.isnan().any(1).tolist() == [i == 3 for i in range(7)]


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_leaves_the_digits_of_another_row_s_huge_loss_alone(way):
    logits = torch.tensor([[float("nan"), 0.0], [-500.0, 500.0]])
    losses = way(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2), 0.0, EPS)
    assert losses[0].isnan()
    assert losses[1].item() == 1000


@interpreted
def test_classes_ruled_out_by_minus_infinity():
    logits, labels, strengths, _ = case(3000)
    logits = logits.clone()
    logits[:, :2048] = float("-inf")  # the first two blocks of the kernel hold nothing else
    labels = labels % 900 + 2100
    expected = plain_seesaw(logits, labels, strengths, 0.0, EPS)
    torch.testing.assert_close(triton_seesaw(logits, labels, strengths, 0.0, EPS), expected)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused_by_pytorch(label):
    with pytest.raises((RuntimeError, IndexError)):
        fused_seesaw(torch.zeros(1, 5), torch.tensor([label]), torch.zeros(5), 0.0, EPS)


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way):
    logits = torch.zeros(0, 5, requires_grad=True)
    losses = way(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(5), 2.0, EPS)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_pass_gives_the_same_gradient(way):
    logits, labels, strengths, upstream = case(30)
    leaf = logits.detach().requires_grad_()
    total = (way(leaf, labels, strengths, 2.0, EPS) * upstream).sum()
    first, second = (torch.autograd.grad(total, leaf, retain_graph=True)[0].clone() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_passed_in_is_left_alone(way):
    logits, labels, strengths, _ = case(30)
    leaf, upstream = logits.detach().requires_grad_(), torch.ones(7)
    way(leaf, labels, strengths, 0.0, EPS).backward(upstream)
    assert torch.equal(upstream, torch.ones(7))


@interpreted
def test_kernels_compile_for_gpus():
    lines = lines_of(Path(__file__).with_name("compile_kernels.py"))
    assert len(lines) == 16
    assert all(int(size) > 0 for *_, size, _ in lines)
    for name, *_, asserts in lines:
        assert asserts == ("no-assertion" if name == "_gradient_kernel" else "assertion")


def test_second_derivatives():
    logits, labels, strengths, _ = case(5, rows=3, scale=1.0)
    leaf, strengths = logits.detach().double().requires_grad_(), strengths.double()
    assert torch.autograd.gradgradcheck(lambda z: fused_seesaw(z, labels, strengths, 0.0, EPS), leaf)


@interpreted
def test_second_derivatives_after_triton():
    logits, labels, strengths, upstream = case(5, rows=7, scale=1.0)

    def curvature(way) -> Tensor:
        leaf = logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(
            (way(leaf, labels, strengths, 0.0, EPS) * upstream).sum(), leaf, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature(triton_seesaw), curvature(plain_seesaw), rtol=1e-4, atol=1e-6)


def test_function_transforms_take_the_plain_way():
    logits, labels, strengths, _ = case(6, rows=4, scale=1.0)

    def total(row: Tensor, label: Tensor) -> Tensor:
        return seesaw_losses(row[None], label[None], strengths, 0.0, EPS)[0]

    rows = torch.func.vmap(torch.func.grad(total))(logits, labels)
    leaf = logits.detach().requires_grad_()
    fused_seesaw(leaf, labels, strengths, 0.0, EPS).sum().backward()
    torch.testing.assert_close(rows, leaf.grad)


@pytest.mark.parametrize("way", WAYS)
def test_batched_gradients_are_those_one_by_one(way):
    logits, labels, strengths, _ = case(6, rows=4, scale=1.0)
    leaf, rows = logits.detach().requires_grad_(), torch.eye(4)
    found = torch.autograd.grad(way(leaf, labels, strengths, 0.5, EPS), leaf, rows, is_grads_batched=True)[0]
    losses = way(leaf, labels, strengths, 0.5, EPS)
    each = [torch.autograd.grad(losses, leaf, row, retain_graph=True)[0].clone() for row in rows]
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q", [0.0, 0.5])
def test_forward_derivatives_leave_the_factors_alone(q):
    logits, labels, strengths, upstream = case(6)
    losses, grad = run(fused_seesaw, logits, labels, strengths, upstream, q)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    with forward_ad.dual_level():
        dual = seesaw_losses(forward_ad.make_dual(logits, direction), labels, strengths, q, EPS)
        primal, tangent = forward_ad.unpack_dual(dual)
        torch.testing.assert_close((tangent * upstream).sum(), (grad * direction).sum())
    torch.testing.assert_close(primal, losses)


def test_forward_and_backward_make_two_buffers_of_the_size_of_the_logits():
    logits, labels, strengths, _ = case(400, rows=50)
    size, sizes = logits.numel() * 4, []
    leaf = logits.detach().contiguous().requires_grad_()

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(one, Tensor) and one.untyped_storage().nbytes() >= size:
                    sizes.append(one.untyped_storage().data_ptr())
            return result

    with Allocations():
        fused_seesaw(leaf, labels, strengths, 0.0, EPS).sum().backward()
    assert len(set(sizes) - {leaf.untyped_storage().data_ptr()}) == 2
    assert leaf.grad.untyped_storage().data_ptr() in sizes  # the second has become the gradient


def test_cuda_takes_triton_and_nothing_else_does(monkeypatch):
    taken = []
    for name in ("plain_seesaw", "fused_seesaw", "triton_seesaw"):
        monkeypatch.setattr(seesaw_kernels, name, lambda *_, name=name: taken.append(name))

    class Logits:
        def __init__(self, is_cuda: bool, dtype: torch.dtype) -> None:
            self.is_cuda, self.dtype = is_cuda, dtype

    for is_cuda, dtype in ((True, torch.bfloat16), (True, torch.float64), (False, torch.float32)):
        seesaw_losses(Logits(is_cuda, dtype), None, torch.zeros(2), 0.0, EPS)
    monkeypatch.setattr(seesaw_kernels, "has_triton", lambda: False)
    seesaw_losses(Logits(True, torch.float32), None, torch.zeros(2), 0.0, EPS)
    assert taken == ["triton_seesaw", "fused_seesaw", "fused_seesaw", "fused_seesaw"]


@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize("q", [0.0, 2.0])
@pytest.mark.parametrize("classes", [1, 2, 37, 400])
def test_soft_labels_are_sums_of_hard_ones(q, classes, steep):
    logits, _, strengths, upstream = case(classes)
    strengths, loss = strengths * (20 if steep else 1), partial(soft_seesaw, steep=steep)  # up to 221
    soft = torch.rand(7, classes, generator=torch.Generator().manual_seed(1)) * 2  # classes may be weighted

    def hard(logits: Tensor, soft: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
        labels = torch.arange(classes).unsqueeze(1).expand(-1, 7)
        each = [plain_seesaw(logits, own, strengths, q, eps) for own in labels]
        return (torch.stack(each, dim=1) * soft).sum(dim=1)

    losses, grad = run(loss, logits, soft, strengths, upstream, q)
    exact, exact_grad = run(hard, logits.double(), soft.double(), strengths.double(), upstream.double(), q)
    assert losses.dtype == grad.dtype == torch.float32
    share = soft.sum(1).max().item() * (10 if steep else 1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=2e-5 * share if steep else 1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5 * share)


@pytest.mark.parametrize("q", [0.0, 2.0])
def test_soft_labels_with_huge_logits(q):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 1e4]])
    strengths, soft = torch.tensor([16.0, 0.9, 0.0]), torch.full((4, 3), 1 / 3)
    losses, grad = run(soft_seesaw, z, soft, strengths, torch.ones(4), q)
    exact, exact_grad = run(soft_seesaw, z.double(), soft.double(), strengths.double(), torch.ones(4).double(), q)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2, atol=2e-3)
    assert grad.isfinite().all()


@pytest.mark.parametrize("q", [0.0, 2.0])
def test_objectness_beside_the_classes_is_that_of_separate_losses(q):
    logits, labels, strengths, upstream = case(40, rows=9)
    generator = torch.Generator().manual_seed(5)
    logits = torch.cat([logits, torch.randn(9, 2, generator=generator) * 4], dim=1)
    labels[::3] = 40  # background
    both = torch.stack([upstream, upstream.flip(0)])
    both[0, ::3] = 0  # background has no loss among the classes

    def parts(way, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        losses, judged = way(leaf, labels, strengths.to(dtype), q, EPS)
        (grad,) = torch.autograd.grad((losses * both[0]).sum() + (judged * both[1]).sum(), leaf)
        return losses.detach(), judged.detach(), grad

    found, exact = parts(fused_parts, torch.float32), parts(plain_parts, torch.float64)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)


def test_second_derivatives_with_objectness():
    logits, labels, strengths, _ = case(5, rows=4, scale=1.0)
    leaf = torch.cat([logits, logits[:, :2].flip(0)], dim=1).double().requires_grad_()
    labels[1] = 5
    assert torch.autograd.gradgradcheck(lambda z: fused_parts(z, labels, strengths.double(), 0.0, EPS), leaf)
    assert torch.autograd.gradcheck(lambda z: fused_parts(z, labels, strengths.double(), 0.0, EPS), leaf)
