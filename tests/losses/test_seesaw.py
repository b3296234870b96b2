"""Seesaw Loss by hand, against the recording and against its C x C definition, and what its counts promise."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.losses import SeesawLoss
from tailseg.losses.seesaw import log_seesaw_factors

RATES = [(0.8, 0.0), (0.8, 2.0), (0.0, 0.0), (0.3, 1.0), (2.0, 0.5)]


def with_counts(counts: list[int], **options: float) -> SeesawLoss:
    loss = SeesawLoss(len(counts), **options).eval()
    loss.counts.copy_(torch.tensor(counts))
    return loss


def by_definition(logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float, eps: float = 1e-2) -> Tensor:
    """-ln of e^{z_i} / (Σ_{j≠i} S_ij e^{z_j} + e^{z_i}) in float64, with the whole matrix of S."""
    z, n = logits.double(), counts.clamp(min=1).double()
    ratio = n[None, :] / n[:, None]
    mitigation = torch.where(ratio < 1, ratio**p, torch.ones_like(ratio))  # (C, C)
    factor = mitigation[labels]
    if q > 0:
        prob = z.detach().softmax(dim=1)
        excess = prob / prob.gather(1, labels[:, None]).clamp(min=eps)
        factor = factor * torch.where(excess > 1, excess**q, torch.ones_like(excess))
    own = F.one_hot(labels, len(counts)).bool()
    factor = torch.where(own, 1.0, factor)
    top = z.detach().amax(dim=1, keepdim=True)
    terms = (z - top).exp()
    return ((factor * terms).sum(1) / terms.gather(1, labels[:, None])[:, 0]).log()


def case(seed: int, n: int = 40, classes: int = 9, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, classes, (n,), generator=generator)
    counts = (10 ** (torch.rand(classes, generator=generator) * 5)).long() - 1  # 0 among them
    return logits, labels, counts


def test_weights_by_hand():
    counts = torch.tensor([1000, 10, 1])
    factors = log_seesaw_factors(torch.zeros(3, 3), torch.arange(3), counts, p=0.8).exp()
    expected = torch.tensor([[1, 0.0251189, 0.0039811], [1, 1, 0.1584893], [1, 1, 1]])
    torch.testing.assert_close(factors, expected, rtol=0, atol=1e-6)


def test_losses_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, -1)
    loss = with_counts([1000, 10, 1], p=0.8, reduction="none")
    expected = torch.tensor([0.009732, 1.328821, 2.407606])
    torch.testing.assert_close(loss(logits, torch.arange(3)), expected, rtol=0, atol=1e-6)


def test_compensation_by_hand():
    # Two equally frequent classes with probabilities 0.8 and 0.2: the ratio 4, squared, weighs the wrong one.
    loss = with_counts([5, 5], p=0.8, q=2.0, reduction="none")
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    expected = torch.tensor([1 + 0.2 / 0.8, 1 + 16 * 0.8 / 0.2]).log()
    torch.testing.assert_close(loss(logits, torch.tensor([0, 1])), expected)


@pytest.mark.parametrize(("p", "q"), RATES)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_equals_its_definition(p, q, scale):
    logits, labels, counts = case(1, scale=scale)
    loss = with_counts(counts.tolist(), p=p, q=q, reduction="none")
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses, expected = loss(ours, labels), by_definition(theirs, labels, counts, p, q)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_a_shifted_softmax():
    logits, labels, counts = case(2)
    loss = with_counts(counts.tolist(), reduction="sum")
    logits.requires_grad_()
    loss(logits, labels).backward()
    factors = log_seesaw_factors(logits.detach(), labels, counts, 0.8)
    expected = (logits.detach() + factors).softmax(1) - F.one_hot(labels, 9)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("p", "q"), [(0.8, 0.0), (1.5, 0.0), (0.0, 0.0)])
def test_gradcheck(p, q):
    # With q > 0 the factors depend on the logits but carry no gradient, so differences would not agree.
    logits, labels, counts = case(3, n=6, classes=5, scale=1.0)
    loss = with_counts(counts.tolist(), p=p, q=q)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_exponents_it_is_cross_entropy(reduction):
    logits, labels, counts = case(4, scale=20.0)
    loss = with_counts(counts.tolist(), p=0.0, q=0.0, reduction=reduction)
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-12, atol=1e-12)


def test_equal_counts_are_cross_entropy_and_unseen_classes_count_as_one():
    logits, labels, _ = case(5)
    for counts in ([7] * 9, [0] * 9, [0, 1, 0, 1, 1, 1, 0, 0, 1]):
        loss = with_counts(counts, p=0.8)
        torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels), rtol=1e-12, atol=1e-12)
    unseen = with_counts([0, 1000, 1], p=0.8, reduction="none")(logits[:, :3], labels % 3)
    seen = with_counts([1, 1000, 1], p=0.8, reduction="none")(logits[:, :3], labels % 3)
    assert torch.equal(unseen, seen)


@pytest.mark.parametrize(("p", "q"), RATES)
def test_extreme_logits_stay_finite(p, q):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 1e4]])
    logits = logits.repeat_interleave(3, dim=0).requires_grad_()
    labels = torch.arange(3).repeat(4)
    loss = with_counts([10**9, 3, 0], p=p, q=q, reduction="none")
    losses = loss(logits, labels)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()
    assert (losses >= 0).all()
    log_factors = log_seesaw_factors(logits.detach().double(), labels, loss.counts, p, q)
    exact = F.cross_entropy(logits.detach().double() + log_factors, labels, reduction="none")
    torch.testing.assert_close(losses, exact.float(), rtol=1e-6, atol=1e-3)  # 1e4 has a spacing of 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_gives_zero_with_a_gradient(reduction):
    loss = SeesawLoss(4, q=2.0, reduction=reduction)
    logits = torch.zeros(0, 4, requires_grad=True)
    value = loss(logits, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == (0, 4)
    assert loss.counts.tolist() == [0, 0, 0, 0]


def test_reductions_agree():
    logits, labels, counts = case(6)
    none, total, mean = (with_counts(counts.tolist(), reduction=r)(logits, labels) for r in ("none", "sum", "mean"))
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(none.mean(), mean)


def test_counts_grow_before_the_loss_and_in_training_only():
    loss = SeesawLoss(3, reduction="none")
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 2])
    first = loss(logits, labels)
    assert loss.counts.tolist() == [3, 0, 1]
    assert loss.counts.dtype == torch.int64
    expected = by_definition(logits, labels, torch.tensor([3, 0, 1]), 0.8, 0.0).float()
    torch.testing.assert_close(first, expected)
    loss.eval()
    loss(logits, labels)
    loss.per_sample(logits, labels)
    assert loss.counts.tolist() == [3, 0, 1]
    loss.train()
    loss(logits, labels)
    assert loss.counts.tolist() == [6, 0, 2]


def test_counts_are_exact_beyond_float32():
    loss = SeesawLoss(2)
    loss.counts.copy_(torch.tensor([2**40, 2**24]))
    loss.count(torch.tensor([0, 1, 1]))
    assert loss.counts.tolist() == [2**40 + 1, 2**24 + 2]


def test_invalid_samples_are_not_counted():
    loss = SeesawLoss(3)
    loss.count(torch.tensor([0, 1, 1, 2]), torch.tensor([True, False, True, False]))
    assert loss.counts.tolist() == [1, 1, 0]


def test_counts_are_summed_over_processes(monkeypatch):
    def another_process(increment: Tensor, group: object) -> None:
        assert group is None  # all processes
        increment += torch.tensor([10, 0, 5])

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", another_process)
    together, alone = SeesawLoss(3), SeesawLoss(3, sync_counts=False)
    for loss in (together, alone):
        loss.count(torch.tensor([0, 1]))
        loss.count(torch.tensor([0]))
    assert together.counts.tolist() == [22, 1, 10]
    assert alone.counts.tolist() == [2, 1, 0]


def test_a_copy_counts_for_itself_in_the_same_group():
    class Group:  # as a real one
        def __reduce__(self):
            raise TypeError("cannot pickle")

    loss = SeesawLoss(3, process_group=Group())
    loss.counts += 4
    parts = nn.ModuleList([loss, loss])
    one, other = copy.deepcopy(parts)
    assert one is other
    assert one is not loss
    assert one.process_group is loss.process_group
    one.count(torch.tensor([1]))
    assert one.counts.tolist() == [4, 5, 4]
    assert loss.counts.tolist() == [4, 4, 4]
    assert list(one.state_dict()) == ["counts"]


def test_counts_are_part_of_the_state():
    loss = SeesawLoss(3)
    loss.count(torch.tensor([0, 0, 2]))
    other = SeesawLoss(3)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert other.counts.tolist() == [2, 0, 1]
    assert list(loss.state_dict()) == ["counts"]
    assert list(loss.parameters()) == []


def test_low_precision_logits_are_computed_in_float32():
    logits, labels, counts = case(7)
    loss = with_counts(counts.tolist(), q=2.0)
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(low, labels)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(low.float(), labels))


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 0}, {"p": -0.1}, {"q": -1.0}, {"eps": 0.0}, {"eps": 1.5}, {"reduction": "max"}],
)
def test_impossible_arguments(options):
    with pytest.raises(ValueError, match="expected"):
        SeesawLoss(**({"num_classes": 3} | options))


@pytest.mark.parametrize(("logits", "labels"), [((4, 2), (4,)), ((3,), (3,)), ((4, 3), (5,)), ((4, 3), (4, 1))])
def test_impossible_shapes(logits, labels):
    with pytest.raises(ValueError, match=r"expected logits \(N, 3\)"):
        SeesawLoss(3)(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize(("label", "place"), [(3, 1), (-1, 2), (255, 0)])
def test_a_label_out_of_range_is_named_and_counts_stay(label, place):
    loss, labels = SeesawLoss(3), torch.tensor([0, 1, 2])
    labels[place] = label
    for call in (lambda: loss(torch.zeros(3, 3), labels), lambda: loss.per_sample(torch.zeros(3, 3), labels)):
        with pytest.raises(
            ValueError, match=rf"labels in \[0, 3\) or -100 \(ignored\), received {label} at position {place}"
        ):
            call()
    assert loss.counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_labels_of_another_type_are_refused_before_they_are_counted(dtype):
    loss, labels = SeesawLoss(3), torch.tensor([0, 1]).to(dtype)
    for call in (lambda: loss(torch.zeros(2, 3), labels), lambda: loss.count(labels)):
        with pytest.raises(ValueError, match=f"SeesawLoss expected int64 labels, received {dtype}"):
            call()
    assert loss.counts.tolist() == [0, 0, 0]


def test_nan_logits_make_the_loss_nan():
    logits = torch.zeros(4, 3)
    logits[2, 1] = float("nan")
    labels = torch.tensor([0, 1, 2, 0])
    for reduction in ("mean", "sum"):
        assert SeesawLoss(3, reduction=reduction)(logits, labels).isnan()
    assert SeesawLoss(3)(logits, labels, torch.tensor([1.0, 1, 0, 1])).isnan()


def test_weights():
    logits, labels, _ = case(8, n=6, classes=4)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    counted = SeesawLoss(4)
    mean = counted(logits, labels, weights)
    assert counted.counts.tolist() == torch.bincount(labels[weights > 0], minlength=4).tolist()
    each = with_counts(counted.counts.tolist(), reduction="none")(logits, labels)
    torch.testing.assert_close(mean, (each * weights).sum() / 4.5)
    for reduction, expected in (("none", each * weights), ("sum", (each * weights).sum())):
        loss = with_counts(counted.counts.tolist(), reduction=reduction)
        torch.testing.assert_close(loss(logits, labels, weights), expected)
    logits.requires_grad_()
    nothing = SeesawLoss(4)(logits, labels, torch.zeros(6))
    nothing.backward()
    assert nothing.item() == 0
    assert (logits.grad == 0).all()
    with pytest.raises(ValueError, match=r"expected weights \(6,\), received \(5,\)"):
        SeesawLoss(4)(logits, labels, torch.zeros(5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    logits, labels, _ = case(9, n=12, classes=5)
    plain, checkpointed = SeesawLoss(5, q=1.0), SeesawLoss(5, q=1.0)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for _ in range(2):
        torch.utils.checkpoint.checkpoint(checkpointed, ours * 2, labels, use_reentrant=reentrant).backward()
        plain(theirs * 2, labels).backward()
    assert torch.equal(checkpointed.counts, plain.counts)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_compiled_it_counts_and_learns_the_same():
    logits, labels, _ = case(10, n=12, classes=5)
    eager, compiled = SeesawLoss(5, q=1.0), SeesawLoss(5, q=1.0)
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for _ in range(3):
        loss, expected = step(ours, labels), eager(theirs, labels)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(compiled.counts, eager.counts)


def test_per_sample_gradients_by_function_transforms():
    logits, labels, counts = case(11, n=5, classes=4)
    loss = with_counts(counts.tolist(), reduction="sum")
    rows = torch.func.vmap(torch.func.grad(lambda z, i: loss(z[None], i[None])))(logits, labels)
    logits.requires_grad_()
    loss(logits, labels).backward()
    torch.testing.assert_close(rows, logits.grad)


def test_used_twice_in_a_step_each_use_keeps_its_own_counts():
    logits, labels, _ = case(12, n=10, classes=4)
    loss, logits = SeesawLoss(4), logits.requires_grad_()
    first, second = loss(logits[:5], labels[:5]), loss(logits[5:], labels[5:])
    (first + second).backward()
    other, expected = SeesawLoss(4), []
    for half in (slice(5), slice(5, 10)):
        leaf = logits.detach()[half].clone().requires_grad_()
        other(leaf, labels[half]).backward()  # done before the next batch is counted
        expected.append(leaf.grad)
    torch.testing.assert_close(logits.grad, torch.cat(expected))


def test_accumulated_batches_count_like_one():
    logits, labels, _ = case(13, n=12, classes=4)
    whole, parts = SeesawLoss(4), SeesawLoss(4)
    whole(logits, labels)
    for part in range(3):
        parts(logits[part::3], labels[part::3])
    assert torch.equal(whole.counts, parts.counts)


def test_float_counts_of_the_public_implementation_stand_still():
    loss = SeesawLoss(2, sync_counts=False, count_dtype=torch.float32)
    loss.counts.copy_(torch.tensor([2.0**24, 5.0]))
    loss.count(torch.tensor([0, 1]))
    assert loss.counts.dtype == torch.float32
    assert loss.counts.tolist() == [2.0**24, 6.0]
    assert SeesawLoss(2).half().counts.dtype == torch.int64  # what conversion of a model leaves alone


def test_it_prints_its_settings():
    assert repr(SeesawLoss(1203, p=0.5)) == "SeesawLoss(1203, p=0.5, q=0, reduction='mean')"
