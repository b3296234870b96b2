"""Shapes, types and labels that losses refuse, and all ten called as cross-entropy is."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from tailseg.losses import CLASSIFICATIONS, ClassStatistics, CrossEntropyClassification, SeesawLoss
from tailseg.losses.inputs import flat_logits, flat_targets, require_labels, require_shapes

SHAPES = [(4,), (), (2, 3), (2, 3, 2), (0,), (2, 0, 3)]  # of labels


def made(name: str, num_classes: int = 4):
    kind = CLASSIFICATIONS[name]
    # No random choice among classes and samples: two calls are to agree.
    options = {"federated": {"sampled": num_classes + 1}, "group-softmax": {"others_ratio": 1e9}}.get(name, {})
    if not kind.needs_statistics:
        return kind(num_classes, **options)
    counts = torch.arange(1, num_classes + 1)
    known = ClassStatistics(num_images=9, images=counts, instances=30 * counts)
    return kind(num_classes, statistics=known, **options)


def case(width: int, shape: tuple[int, ...], num_labels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape[:1], width, *shape[1:], generator=generator)
    return logits, torch.randint(0, num_labels, shape, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_in_the_order_of_flattened_labels(shape):
    logits, labels = case(5, shape, 5)
    rows, flat = flat_logits(logits), labels.flatten()
    assert rows.shape == (labels.numel(), 5)
    expected = F.cross_entropy(logits, labels, reduction="none").flatten()
    torch.testing.assert_close(F.cross_entropy(rows, flat, reduction="none"), expected)
    assert flat_logits(rows) is rows


def test_ignored_labels_become_class_0_and_are_marked():
    logits, _ = case(3, (2, 2), 3)
    found = flat_targets("Loss", logits, torch.tensor([[2, 7], [0, 1]]), 3, ignore_index=7)
    assert found.labels.tolist() == [2, 0, 0, 1]
    assert found.counted.tolist() == [True, False, True, True]
    assert found.soft is None
    assert found.shape == (2, 2)
    assert flat_targets("Loss", logits, torch.tensor([[2, 1], [0, 1]]), 3, ignore_index=7).counted is None


def test_soft_labels_name_their_largest_share():
    logits, _ = case(3, (1, 2), 3)
    soft = torch.tensor([[[0.2, 0.0], [0.5, 0.0], [0.3, 0.0]]])
    found = flat_targets("Loss", logits, soft, 3, ignore_index=-100)
    assert found.labels[0] == 1
    assert found.counted.tolist() == [True, False]
    assert torch.equal(found.soft, torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0, 1], [3, 0]]), r"labels in \[0, 3\) or -100 \(ignored\), received 3 at position \(1, 0\)$"),
        (
            torch.tensor([[0, -100], [2, -1]]),
            r"labels in \[0, 3\) or -100 \(ignored\), received -1 at position \(1, 1\)$",
        ),
        (torch.tensor([[0, 1], [2, 0]]).float(), r"int64 labels, received torch.float32; pass labels\.long\(\)$"),
        (
            torch.tensor([0, 1]),
            r"logits \(N, 3\) or \(N, 3, ...\) and labels \(N,\) or \(N, ...\), received \(2, 3, 2\) and \(2,\)$",
        ),
    ],
)
def test_wrong_labels_of_pixels_are_named_before_they_are_counted(labels, message):
    loss = SeesawLoss(3)
    with pytest.raises(ValueError, match=f"^SeesawLoss expected {message}"):
        loss(torch.zeros(2, 3, 2), labels)
    assert loss.counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.25, "-0.25"), (1.5, "1.5"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_soft_labels_that_are_no_shares_are_named(value, shown):
    soft, loss = torch.full((2, 3, 2), 0.5), SeesawLoss(3)
    soft[1, 2, 0] = value
    with pytest.raises(ValueError, match=rf"soft labels in \[0, 1\], received {shown} at position \(1, 2, 0\)"):
        loss(torch.zeros(2, 3, 2), soft)
    assert loss.counts.tolist() == [0, 0, 0]


def test_logits_without_classes_or_of_another_type():
    with pytest.raises(ValueError, match=r"received \(\) and \(\)"):
        require_shapes("Loss", torch.tensor(1.0), torch.tensor(0), 1)
    with pytest.raises(ValueError, match=r"expected floating logits, received torch.int64"):
        SeesawLoss(3)(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"received \(2, 4\) and \(2, 4\)"):
        SeesawLoss(3)(torch.zeros(2, 4), torch.full((2, 4), 0.25))


def test_whether_labels_are_known_not_to_be_ignored():
    labels = torch.tensor([0, 2, 1])
    assert require_labels("Loss", labels, 3)
    assert require_labels("Loss", labels, 3, ignore_index=-100)
    assert not require_labels("Loss", labels, 3, ignore_index=1)
    assert not require_labels("Loss", torch.tensor([0, -100]), 3, ignore_index=-100)
    assert require_labels("Loss", torch.tensor([3]), 3, background=True)
    on_a_device = torch.zeros(2, dtype=torch.int64, device="meta")  # not looked at
    assert require_labels("Loss", on_a_device, 3)
    assert not require_labels("Loss", on_a_device, 3, ignore_index=-100)


# ---------------------------------------------------------------------------------------------------------
# All ten as criteria


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_all_ten_take_any_rank_and_ignored_labels(name, shape):
    whole, part = made(name), made(name)
    logits, labels = case(whole.num_logits, shape, 5)  # background among them
    ignored = torch.arange(labels.numel()).reshape(shape) % 3 == 1
    labels = labels.masked_fill(ignored, 255)
    ours = logits.clone().requires_grad_()
    value = whole(ours, labels, ignore_index=255)
    rows, flat = flat_logits(logits).requires_grad_(), labels.flatten()
    kept = flat != 255
    losses = part.loss(rows[kept], flat[kept], torch.ones_like(flat[kept], dtype=torch.bool))
    torch.testing.assert_close(value, sum(losses.values()))
    value.backward()
    sum(losses.values()).backward()
    torch.testing.assert_close(flat_logits(ours.grad), rows.grad)
    for one, other in zip(whole.buffers(), part.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_all_ten_take_images_of_labels(name):
    ours, same = made(name), made(name)
    logits, labels = case(ours.num_logits, (2, 3, 2), 5)
    labels[0, 1] = 255
    value = ours(logits, labels.byte(), ignore_index=255)
    assert torch.equal(value, same(logits, labels, ignore_index=255))
    for one, other in zip(ours.buffers(), same.buffers(), strict=True):
        assert torch.equal(one, other)


def test_the_module_takes_images_of_labels():
    ours, same = SeesawLoss(4), SeesawLoss(4)
    logits, labels = case(4, (2, 3), 4)
    assert torch.equal(ours(logits, labels.byte()), same(logits, labels))
    assert torch.equal(ours.per_sample(logits, labels.byte()), same.per_sample(logits, labels))
    ours.count(labels.byte())
    same.count(labels)
    assert torch.equal(ours.counts, same.counts)


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_all_ten_have_batched_and_forward_derivatives(name):
    ours = made(name)
    logits, labels = case(ours.num_logits, (6,), 5)
    leaf, direction = logits.clone().requires_grad_(), torch.randn(logits.shape, generator=torch.manual_seed(1))
    value = made(name)(leaf, labels)
    (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
    factors = torch.tensor([1.0, -2.0])
    (batched,) = torch.autograd.grad(made(name)(leaf, labels), leaf, factors, is_grads_batched=True)
    torch.testing.assert_close(batched, grad * factors.view(2, 1, 1))
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(ours(forward_ad.make_dual(logits, direction), labels))
        assert all(forward_ad.unpack_dual(buffer).tangent is None for buffer in ours.buffers())
        torch.testing.assert_close(moved.tangent, (grad * direction).sum())
    torch.testing.assert_close(moved.primal, value.detach())


def test_cross_entropy_of_ours_is_pytorchs():
    ours = CrossEntropyClassification(3)
    logits, labels = case(4, (2, 3), 4)
    labels[0, 1] = -100
    torch.testing.assert_close(ours(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_all_ten_refuse_the_same(name):
    ours = made(name)
    before = {key: buffer.clone() for key, buffer in ours.named_buffers()}
    logits, labels = case(ours.num_logits, (2, 3), 5)
    with pytest.raises(ValueError, match=rf"^{type(ours).__name__} expected logits \(N, {ours.num_logits}\) or"):
        ours(logits[:, 1:], labels)
    with pytest.raises(ValueError, match=rf"^{type(ours).__name__} expected logits"):
        ours(logits, labels.flatten())
    with pytest.raises(ValueError, match=r"expected int64 labels, received torch.float32"):
        ours(logits, labels.float())
    labels[1, 2] = 255
    message = r"\[0, 4\] \(4 is background\) or -100 \(ignored\), received 255 at position \(1, 2\)$"
    with pytest.raises(ValueError, match=message):
        ours(logits, labels)
    assert all(torch.equal(buffer, before[key]) for key, buffer in ours.named_buffers())
