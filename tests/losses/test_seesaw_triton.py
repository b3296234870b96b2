"""Seesaw's kernels under Triton's interpreter against the plain way, and how they are launched."""

import os
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tailseg.losses import SeesawClassification, SeesawLoss, seesaw, seesaw_kernels
from tailseg.losses.seesaw_kernels import count_labels, plain_parts, triton_means

pytest.importorskip("triton")
seesaw_triton = pytest.importorskip("tailseg.losses.seesaw_triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)
EPS = 1e-2


def batch(classes: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (rows, classes + 2), labels with background, and valid rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes + 2, generator=generator) * 4
    labels = torch.randint(0, classes + 1, (rows,), generator=generator)
    return logits, labels, torch.rand(rows, generator=generator) < 0.7


def means(
    logits: Tensor, labels: Tensor, valid: Tensor | None, counts: Tensor, p: float, q: float, eps: float
) -> list[Tensor]:
    """The definition of `triton_means`."""
    strengths = p * counts.clamp(min=1).to(logits.dtype).log()
    valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    losses, judged = plain_parts(logits, labels, strengths, q, eps)
    number = valid.sum().clamp(min=1)
    found = [(losses * (valid & (labels < len(counts)))).sum() / number]
    return found if judged is None else [*found, (judged * valid).sum() / number]


@pytest.fixture
def everywhere(monkeypatch):
    """Triton's way on the CPU too."""
    for module in (seesaw, seesaw_kernels):
        monkeypatch.setattr(module, "takes_triton", lambda logits: logits.dtype != torch.float64)


@pytest.mark.parametrize("q", [0.0, 2.0])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("classes", "rows", "masked"), [(1, 1, False), (37, 7, True), (64, 5, False), (1203, 3, True)])
def test_means_and_gradients_are_those_of_the_definition(q, pair, classes, rows, masked):
    logits, labels, valid = batch(classes, rows)
    if not pair:
        logits, labels = logits[:, :classes], labels.clamp(max=classes - 1)
    counts = torch.randint(0, 10**6, (classes,), generator=torch.Generator().manual_seed(1))
    about = (labels, valid if masked else None, counts, 0.8, q, EPS)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = triton_means(leaf, *about), means(exact, *about)
    assert (found[1] is not None) == pair
    kept = [mean for mean in found if mean is not None]
    weights = [1.5, -0.5][: len(kept)]
    for one, other in zip(kept, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    sum(w * mean for w, mean in zip(weights, kept, strict=True)).backward()
    sum(w * mean for w, mean in zip(weights, expected, strict=True)).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, labels, valid = batch(50, 6)
    about = (labels, valid, torch.arange(50), 0.8, 0.0, EPS)
    low = logits.to(dtype).requires_grad_()
    exact = logits.to(dtype).double().requires_grad_()
    found, expected = triton_means(low, *about), means(exact, *about)
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    scale = 2.0**14  # as of a gradient scaler: what is small before must not be lost by then
    (sum(found) * scale).backward()
    (sum(expected) * scale).backward()
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad.double(), exact.grad, rtol=1e-2, atol=1e-4)


def test_more_samples_than_the_last_program_adds_up_at_a_time(monkeypatch):
    monkeypatch.setattr(seesaw_triton, "LOSSES_AT_ONCE", 8)
    logits, labels, valid = batch(2, 27)
    about = (labels, valid, torch.tensor([5, 900]), 0.8, 0.0, EPS)
    found = triton_means(logits, *about)
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(means(logits.double(), *about)))
    again = triton_means(logits, *about)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_second_derivatives():
    logits, labels, valid = batch(5, 4)
    about = (labels, valid, torch.arange(5) * 9, 0.8, 0.0, EPS)

    def curvature(way, leaf: Tensor) -> Tensor:
        leaf.requires_grad_()
        total = sum(w * mean for w, mean in zip((2.0, -1.0), way(leaf, *about), strict=True))
        (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    found, exact = curvature(triton_means, logits.clone()), curvature(means, logits.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_loss_changed_in_place_still_has_its_gradient():
    logits, labels, valid = batch(5, 4)
    leaf = logits.requires_grad_()
    loss, _ = triton_means(leaf, labels, valid, torch.arange(5), 0.8, 0.0, EPS)
    (before,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    loss /= 4
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], before / 4)


@pytest.mark.parametrize("objectness", [False, True])
@pytest.mark.parametrize("q", [0.0, 2.0])
def test_a_classifier_learns_and_counts_as_on_a_cpu(everywhere, monkeypatch, objectness, q):
    ours, theirs = (SeesawClassification(12, objectness=objectness, q=q) for _ in range(2))
    for seed in range(3):
        logits, labels, valid = batch(12, 20, seed)
        wide = torch.cat([logits, logits], dim=1)[:, : ours.num_logits]  # a slice: rows lie apart
        leaf, exact = wide.detach().requires_grad_(), wide.detach().double().requires_grad_()
        found, expected = ours.loss(leaf, labels, valid), theirs.loss(exact, labels, valid)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        sum(found.values()).backward()
        sum(expected.values()).backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-5, atol=1e-7)
        assert torch.equal(ours.seesaw.counts, theirs.seesaw.counts)
    assert ours.seesaw.counts.sum() > 0


@pytest.mark.parametrize("options", [{}, {"q": 2.0}, {"reduction": "sum"}, {"weight": torch.rand(9)}])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss_alone_learns_and_counts_as_on_a_cpu(everywhere, options, ignored):
    ours, theirs = SeesawLoss(9, **options), SeesawLoss(9, **options)
    for seed in range(2):
        logits, labels, _ = batch(9, 24, seed)
        logits, labels = logits[:, :9], labels.clamp(max=8)
        if ignored:
            labels[::5] = -100
        leaf, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
        found, expected = ours(leaf, labels), theirs(exact, labels)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        found.backward()
        expected.backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-5, atol=1e-6)
        assert torch.equal(ours.counts, theirs.counts)


def test_only_ignored_samples_hide_what_is_no_number(everywhere):
    logits, labels = torch.zeros(3, 4), torch.tensor([1, -100, 2])
    logits[1] = torch.nan
    assert SeesawLoss(4)(logits, labels).isfinite()
    padded, valid = torch.zeros(3, 6), torch.tensor([True, False, True])
    padded[1] = torch.nan
    losses = SeesawClassification(4).loss(padded, torch.tensor([1, 4, 2]), valid)
    assert all(loss.isnan() for loss in losses.values())


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero_with_a_gradient(everywhere, rows):
    ours, leaf = SeesawClassification(4), torch.randn(rows, 6, requires_grad=True)
    losses = ours.loss(leaf, torch.full((rows,), 4), torch.zeros(rows, dtype=torch.bool))
    sum(losses.values()).backward()
    assert all(loss.item() == 0 for loss in losses.values())
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_counts_of_other_processes_and_in_floats(everywhere, monkeypatch):
    labels, valid = torch.tensor([0, 2, 2, 1]), torch.tensor([True, True, True, False])
    floats = SeesawLoss(3, count_dtype=torch.float32)
    floats.count(labels, valid)
    assert floats.counts.tolist() == [1, 0, 2]
    assert floats.counts.dtype == torch.float32
    sums = []

    def twice(increment: Tensor, group: object) -> None:
        sums.append(increment.tolist())
        increment *= 2

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", twice)
    ours = SeesawLoss(3)
    for _ in range(2):
        ours.count(labels, valid)
    assert sums == [[1, 0, 2]] * 2
    assert ours.counts.tolist() == [4, 0, 8]


def test_labels_out_of_range_end_in_an_assertion(monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    checked = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)  # as the kernels are compiled
    monkeypatch.setattr(interpreter.interpreter_builder, "options", checked)
    counts, logits = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 5)
    for label in (-1, 4):
        labels = torch.tensor([0, label])
        with pytest.raises(Exception, match="a label that is out of range"):
            count_labels(labels, None, counts, background=True)
        with pytest.raises(Exception, match="a label that is out of range"):
            triton_means(logits, labels, None, counts, 0.8, 0.0, EPS)
    with pytest.raises(Exception, match="a label that is out of range"):  # background, where there is none
        triton_means(logits[:, :3], torch.tensor([0, 3]), None, counts, 0.8, 0.0, EPS)
    count_labels(torch.tensor([0, 3]), None, counts, background=True)
    assert counts.tolist() == [1, 0, 0]


VIEWS = {"detach", "view", "split_with_sizes", "select", "alias", "empty"}


class Work(TorchDispatchMode):
    """Names of PyTorch's own operations that launch something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in VIEWS:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_is_four_launches(everywhere, monkeypatch):
    launched = []
    for name in ("_count", "_loss", "_gradient"):
        monkeypatch.setattr(seesaw_triton, name, lambda *_, name=name, **__: launched.append(name))
    # Labels are looked at on a CPU only, by operations that a device does not see.
    monkeypatch.setattr("tailseg.losses.classification.require_labels", lambda *_, **__: None)
    ours, (logits, labels, valid), one = SeesawClassification(12), batch(12, 20), torch.tensor(1.0)
    leaf = logits.requires_grad_()
    with Work() as work:
        losses = ours.loss(leaf, labels, valid)
        torch.autograd.grad(list(losses.values()), leaf, [one, one])
    assert launched == ["_count", "_loss", "_gradient"]
    assert work.names == ["zeros"]  # the ticket that tells the last program


def test_what_was_compiled_serves_every_size_and_alignment():
    lines = lines_of(Path(__file__).with_name("launch_kernels.py"))
    steps = [lines[at : at + 4] for at in range(0, len(lines), 4)]
    assert len(steps) == 8
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert first == second  # the arguments that Triton passes the first time, and we the second time
    forms = [" ".join(step[3]) for step in steps[::2]]
    assert forms == ["kept 1 1 1 by Triton 1 1 1"] * 3 + ["kept 1 1 1 by Triton 1 2 2"]
