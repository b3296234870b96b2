"""Seesaw Loss in the shapes and with the options of cross-entropy: against a plain statement, and against PyTorch's."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses import SeesawLoss

CLASSES, COUNTS = 5, [1000, 40, 7, 40, 0]
SHAPES = [(), (6,), (3, 4), (2, 3, 4), (2, 1, 2, 3)]  # of labels
OPTIONS = [{}, {"label_smoothing": 0.1}, {"weight": True}, {"label_smoothing": 0.3, "weight": True}]


def with_counts(**options) -> SeesawLoss:
    if options.get("weight") is True:
        options["weight"] = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    loss = SeesawLoss(CLASSES, **options).eval()
    loss.counts.copy_(torch.tensor(COUNTS))
    return loss


def case(shape: tuple[int, ...], soft: bool, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits with the classes in dimension 1 (0 of a single sample), and labels of ``shape`` or soft labels."""
    generator = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(*shape[:1], CLASSES, *shape[1:], generator=generator, dtype=torch.float64) * 3
    if soft:
        shares = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        return logits, shares / shares.sum(min(len(shape), 1), keepdim=True)
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    if ignored is not None and shape:
        labels[torch.rand(shape, generator=generator) < 0.4] = ignored
    return logits, labels


def stated(loss: SeesawLoss, z: list[float], shares: list[float]) -> float:
    """The loss of one sample, one label and one pair of classes at a time."""
    n = [max(count, 1) for count in loss.counts.tolist()]
    top = max(z)
    prob = [math.exp(z_j - top) / sum(math.exp(z_k - top) for z_k in z) for z_j in z]
    weight = [1.0] * CLASSES if loss.weight is None else loss.weight.tolist()
    total = 0.0
    for c in range(CLASSES):
        below = math.exp(z[c] - top)
        for j in range(CLASSES):
            if j != c:
                mitigation = min(1.0, n[j] / n[c]) ** loss.p
                compensation = max(1.0, prob[j] / max(prob[c], loss.eps)) ** loss.q
                below += mitigation * compensation * math.exp(z[j] - top)
        share = (1 - loss.label_smoothing) * shares[c] + loss.label_smoothing / CLASSES
        total += weight[c] * share * (math.log(below) - (z[c] - top))
    return total


def losses_stated(loss: SeesawLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """Losses in the shape of hard labels, by `stated`."""
    last = logits.movedim(min(logits.dim() - 1, 1), -1)
    if labels.is_floating_point():
        shares = labels.movedim(min(labels.dim() - 1, 1), -1)
    else:
        shares = F.one_hot(labels.clamp(min=0), CLASSES).double()
    rows = zip(last.reshape(-1, CLASSES).tolist(), shares.reshape(-1, CLASSES).tolist(), strict=True)
    result = torch.tensor([stated(loss, z, t) for z, t in rows], dtype=torch.float64).reshape(last.shape[:-1])
    return result if labels.is_floating_point() else result.where(labels != loss.ignore_index, 0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [0.0, 1.5])
def test_equals_its_plain_statement(q, shape, soft, options):
    loss = with_counts(q=q, reduction="none", **options)
    logits, labels = case(shape, soft, ignored=-100)
    losses = loss(logits, labels)
    assert losses.shape == shape
    torch.testing.assert_close(losses, losses_stated(loss, logits, labels), rtol=1e-10, atol=1e-12)
    assert torch.equal(loss.per_sample(logits, labels), losses)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_exponents_it_is_cross_entropy_with_the_same_options(reduction, shape, soft, options):
    loss = with_counts(p=0.0, reduction=reduction, ignore_index=255, **options)
    logits, labels = case(shape, soft, ignored=255)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = loss(ours, labels)
    expected = F.cross_entropy(
        theirs,
        labels,
        loss.weight,
        reduction=reduction,
        label_smoothing=loss.label_smoothing,
        **({} if soft else {"ignore_index": 255}),
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
    (value * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(soft, options):
    loss = with_counts(**options)  # q = 0: the compensation carries no gradient
    logits, labels = case((2, 3), soft, ignored=-100)
    if soft:
        labels[labels < 0.2] = 0  # as mixup leaves most of them
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z: loss(z, labels), logits)


def test_the_compensation_of_soft_labels_carries_no_gradient():
    logits, soft = case((6,), soft=True)
    loss = with_counts(q=1.5, reduction="none")
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(ours, soft).sum().backward()
    total = sum((loss(theirs, torch.full((6,), c)) * soft[:, c]).sum() for c in range(CLASSES))
    total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_pixels_are_samples(shape):
    logits, labels = case(shape, soft=False, ignored=-100)
    ours, flat = SeesawLoss(CLASSES), SeesawLoss(CLASSES)
    valid = labels != -100
    rows = logits.movedim(1, -1)[valid]
    torch.testing.assert_close(ours(logits, labels), flat(rows, labels[valid]), rtol=1e-12, atol=0)
    assert torch.equal(ours.counts, flat.counts)
    assert ours.counts.tolist() == torch.bincount(labels[valid], minlength=CLASSES).tolist()
    ours.count(labels)
    ours.count(labels, torch.zeros_like(valid))
    assert torch.equal(ours.counts, 2 * flat.counts)


def test_ignored_samples_have_neither_loss_nor_gradient_whatever_their_logits():
    logits, labels = torch.randn(4, 3), torch.tensor([0, -100, 2, -100])
    logits[1, 2] = float("nan")
    logits.requires_grad_()
    loss = SeesawLoss(3)
    value = loss(logits, labels)
    value.backward()
    assert value.item() == pytest.approx(SeesawLoss(3)(logits[::2], labels[::2]).item(), rel=1e-6)
    assert (logits.grad[3] == 0).all()
    assert loss.counts.tolist() == [1, 0, 1]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_but_ignored_samples_gives_zero_with_a_gradient(reduction):
    logits, loss = torch.randn(2, 3, 4, requires_grad=True), SeesawLoss(3, reduction=reduction)
    value = loss(logits, torch.full((2, 4), -100))
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()
    assert loss.counts.tolist() == [0, 0, 0]


def test_a_class_can_be_the_ignored_one():
    logits, labels = case((6,), soft=False)
    loss, expected = SeesawLoss(CLASSES, ignore_index=2), SeesawLoss(CLASSES)
    kept = labels != 2
    assert 0 < kept.sum() < 6
    torch.testing.assert_close(loss(logits, labels), expected(logits[kept], labels[kept]))
    assert loss.counts[2] == 0


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0, 3)])
def test_no_samples_give_zero_with_a_gradient(shape, soft):
    logits, labels = case(shape, soft)
    loss = with_counts(label_smoothing=0.1).train()
    value = loss(logits.requires_grad_(), labels)
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == logits.shape
    assert loss.counts.tolist() == COUNTS


def test_a_soft_label_counts_for_its_largest_share_and_one_of_zeros_for_nothing():
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.4, 0.5], [0.0, 0.0, 0.0], [0.0, 0.6, 0.4]])
    loss = SeesawLoss(3, label_smoothing=0.2)
    loss(torch.zeros(4, 3), soft)
    assert loss.counts.tolist() == [1, 1, 1]
    assert loss.counts.dtype == torch.int64
    loss(torch.zeros(4, 3), soft, torch.tensor([1.0, 0.0, 1.0, 0.5]))  # weight 0 is not counted
    assert loss.counts.tolist() == [2, 2, 1]


def test_one_hot_soft_labels_are_hard_labels():
    logits, labels = case((2, 4), soft=False)
    hard, soft = SeesawLoss(CLASSES), SeesawLoss(CLASSES)
    shares = F.one_hot(labels, CLASSES).movedim(-1, 1).double()
    torch.testing.assert_close(soft(logits, shares), hard(logits, labels), rtol=1e-12, atol=0)
    assert torch.equal(soft.counts, hard.counts)


def test_mixup_is_one_call_with_soft_labels_or_two_with_hard_ones():
    logits, a = case((6,), soft=False)
    b, lam = a.roll(1), 0.7
    soft, hard = SeesawLoss(CLASSES), SeesawLoss(CLASSES, reduction="none")
    whole = soft(logits, lam * F.one_hot(a, CLASSES).double() + (1 - lam) * F.one_hot(b, CLASSES).double())
    hard.count(a)
    parts = lam * hard.per_sample(logits, a) + (1 - lam) * hard.per_sample(logits, b)
    torch.testing.assert_close(whole, parts.mean(), rtol=1e-12, atol=0)
    assert torch.equal(soft.counts, hard.counts)


def test_sample_weights_multiply_class_weights_in_the_mean():
    logits, labels = case((2, 3), soft=False, ignored=-100)
    weights = torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    losses = with_counts(weight=True, reduction="none")(logits, labels)
    loss = with_counts(weight=True)
    own = loss.weight[labels.clamp(min=0)] * weights * (labels != -100)
    torch.testing.assert_close(loss(logits, labels, weights), (losses * weights).sum() / own.sum())
    soft = case((2, 3), soft=True)[1]
    losses = with_counts(weight=True, reduction="none")(logits, soft)
    torch.testing.assert_close(loss(logits, soft, weights), (losses * weights).sum() / weights.sum())
    with pytest.raises(ValueError, match=r"expected weights \(2, 3\), received \(6,\)"):
        loss(logits, labels, weights.flatten())


def test_a_state_dict_holds_the_counts_alone_with_any_option():
    loss = SeesawLoss(3, weight=torch.ones(3), label_smoothing=0.1, ignore_index=255)
    assert list(loss.state_dict()) == ["counts"]
    loss.load_state_dict({"counts": torch.tensor([1, 2, 3])})
    assert loss.counts.tolist() == [1, 2, 3]


def test_low_precision_soft_labels_are_computed_in_float32():
    logits, soft = case((6,), soft=True)
    logits, soft = logits.bfloat16(), soft.bfloat16()
    for q in (0.0, 2.0):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = with_counts(q=q, label_smoothing=0.1)(logits, soft)
        assert value.dtype == torch.float32
        exact = with_counts(q=q, label_smoothing=0.1)(logits.double(), soft.double())
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{"ignore_index": 2}, {"label_smoothing": 0.1}])
def test_compiled_it_counts_and_learns_the_same(options):
    logits, labels = case((2, 4), soft=False)
    eager, compiled = SeesawLoss(CLASSES, **options), SeesawLoss(CLASSES, **options)
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for _ in range(2):
        loss, expected = step(ours, labels), eager(theirs, labels)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(compiled.counts, eager.counts)


def test_an_exponent_beyond_the_range_of_float32():
    logits, soft = case((6,), soft=True)
    loss = SeesawLoss(CLASSES, p=10, reduction="none").eval()
    loss.counts.copy_(torch.tensor([10**9, 1, 1000, 10**9, 0]))
    ours = logits.float().requires_grad_()
    losses = loss(ours, soft.float())
    torch.testing.assert_close(losses.double(), losses_stated(loss, logits, soft), rtol=1e-5, atol=1e-4)
    losses.sum().backward()
    theirs = logits.clone().requires_grad_()  # e^207 has its place in float64
    loss(theirs, soft).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, soft).sum(), logits.requires_grad_())


def test_per_sample_gradients_of_soft_labels_by_function_transforms():
    logits, soft = case((6,), soft=True)
    loss = with_counts(reduction="sum", label_smoothing=0.1)
    rows = torch.func.vmap(torch.func.grad(lambda z, t: loss(z[None], t[None])))(logits, soft)
    logits.requires_grad_()
    loss(logits, soft).backward()
    torch.testing.assert_close(rows, logits.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.1}, r"label_smoothing in \[0, 1\], received 1.1"),
        ({"weight": torch.ones(4)}, r"weight \(3,\) of floats, received \(4,\) torch.float32"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, r"weight \(3,\) of floats, received \(3,\) torch.int64"),
        ({"weight": torch.tensor([1.0, -1.0, 1.0])}, r"class weights of at least 0, received \[1.0, -1.0, 1.0\]"),
        ({"weight": torch.tensor([1.0, math.nan, 1.0])}, "finite class weights"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=f"^SeesawLoss expected .*{message}"):
        SeesawLoss(3, **options)
