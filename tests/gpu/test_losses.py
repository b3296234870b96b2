"""The losses on CUDA: equal to the CPU, in every precision, and without waiting for the device."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tailseg.losses import CLASSIFICATIONS, ClassStatistics, SeesawClassification, SeesawLoss
from tailseg.losses.seesaw_kernels import plain_seesaw, triton_seesaw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLASSES = 1203


def case(rows: int = 256, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator) * 4
    return logits.to(dtype), torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("q", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_the_plain_cpu(q, dtype):
    logits, labels = case(dtype=dtype)
    strengths = torch.linspace(0, 9, CLASSES)[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))]
    upstream = torch.linspace(-1, 2, len(labels))
    ours, theirs = logits.cuda().requires_grad_(), logits.float().requires_grad_()
    losses = triton_seesaw(ours, labels.cuda(), strengths.cuda(), q, 1e-2)
    expected = plain_seesaw(theirs, labels, strengths, q, 1e-2)
    (losses * upstream.cuda()).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-5, atol=1e-5)
    loose = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(ours.grad.cpu().float(), theirs.grad, **loose)


def test_seesaw_takes_no_buffers_but_the_gradient():
    logits, labels = (part.cuda() for part in case(1024))
    loss, leaf = SeesawLoss(CLASSES).cuda(), logits.requires_grad_()
    loss(leaf, labels).backward()  # kernels are compiled the first time
    leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(leaf, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * logits.numel() * 4


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_every_loss_equals_the_cpu_and_waits_for_nothing(name):
    classes = 40
    counts = torch.arange(1, classes + 1) * 30
    kind = CLASSIFICATIONS[name]
    known = {"statistics": ClassStatistics(num_images=5000, images=counts, instances=counts)}
    options = known if kind.needs_statistics else {}
    # What is drawn by lot differs between devices: let every class and every RoI take part.
    options |= {"federated": {"sampled": classes + 1}, "group-softmax": {"others_ratio": 1e9}}.get(name, {})
    ours, theirs = kind(classes, **options).cuda(), kind(classes, **options)
    logits = torch.randn(64, ours.num_logits, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes + 1, (64,), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(64) < 60
    leaf, reference = logits.cuda().requires_grad_(), logits.clone().requires_grad_()
    on_device = labels.cuda(), valid.cuda()

    def step() -> Tensor:
        return torch.stack(list(ours.loss(leaf, *on_device).values())).sum()

    ours.eval()
    step().backward()  # kernels are loaded, and compiled, the first time
    ours.train()
    leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = step()
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.stack(list(theirs.loss(reference, labels, valid).values())).sum()
    expected.backward()
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(leaf.grad.cpu(), reference.grad, rtol=1e-3, atol=1e-6)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"q": 2.0}])
@pytest.mark.parametrize("soft", [False, True])
def test_pixels_ignored_and_soft_labels_equal_the_cpu(soft, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 12, 9, generator=generator) * 4
    labels = torch.randint(0, 12, (4, 9), generator=generator).masked_fill(torch.arange(9) % 3 == 0, -100)
    if soft:
        labels = torch.rand(4, 12, 9, generator=generator)
    ours, theirs = SeesawLoss(12, **options).cuda(), SeesawLoss(12, **options)
    on_device, leaf = logits.cuda().requires_grad_(), logits.clone().requires_grad_()
    for _ in range(2):
        value, expected = ours(on_device, labels.cuda()), theirs(leaf, labels)
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)
        value.backward()
        expected.backward()
    torch.testing.assert_close(on_device.grad.cpu(), leaf.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours.counts.cpu(), theirs.counts)


def test_seesaw_gives_the_same_loss_and_gradient_every_time():
    ours = SeesawClassification(CLASSES).cuda().eval()
    logits, labels = (part.cuda() for part in case(512, CLASSES + 2))
    leaf, labels, valid = logits.requires_grad_(), labels.clamp(max=CLASSES), torch.arange(512).cuda() % 7 > 0

    def step() -> Tensor:
        total = torch.stack(list(ours.loss(leaf, labels, valid).values())).sum()
        (grad,) = torch.autograd.grad(total, leaf)
        return torch.cat([total.detach().view(1), grad.flatten()])

    first = step()
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(10_000):
        same &= (step() == first).all()
    assert same


BAD_LABEL = """
import torch
from tailseg import SeesawLoss
loss = SeesawLoss(5).cuda()
logits = torch.zeros(2, 5, device="cuda", requires_grad=True)
loss(logits, torch.tensor([0, {label}], device="cuda")).backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_ends_in_an_assertion_on_the_device(label):
    done = subprocess.run([sys.executable, "-c", BAD_LABEL.format(label=label)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "a label that is out of range" in done.stdout + done.stderr
