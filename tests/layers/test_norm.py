"""Batch norm against its plain formula in float64, PyTorch's own, and one process with the joint batch (gloo).

Run as ``python test_norm.py RANK FOLDER`` this file is one of several processes, which leave their results there.
"""

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d as TimmBatchNormAct2d
from tiny import made, run_together
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tailseg.layers import norm
from tailseg.layers.norm import BatchNorm2d, BatchNormAct2d, batch_norm
from tailseg.model.backbone import Backbone

CHANNELS, EPS, MOMENTUM, STEPS = 3, 1e-3, 0.3, 3
SHARES = {2: (5, 2), 3: (4, 0, 7)}  # rows of each process


def stated(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None = None) -> Tensor:
    """The formula, over the rows that count, for autograd to derive."""
    counted = (x if rows is None else x[rows]).transpose(0, 1).flatten(1)
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, var = counted.mean(1).view(shape), counted.var(1, correction=0).view(shape)
    return (x - mean) / (var + EPS).sqrt() * weight.view(shape) + bias.view(shape)


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """An input away from 0, a scale, a shift and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x * 2 + 3, weight, bias, upstream))


def derived(function, inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    """Output and gradients of the inputs."""
    inputs = tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def stack() -> nn.Sequential:
    """A stem, a residual block and a classifier with plain batch norm, the same in every process."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    torch.manual_seed(0)
    stem = [nn.Conv2d(CHANNELS, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def trained(net: nn.Module, processes: int, share: slice, scale: float) -> list[Tensor]:
    """Losses of the share and the learnt state after a few steps; the loss is a mean over the joint batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        images, *_, wanted = drawn(sum(SHARES[processes]), CHANNELS, 9, 9, seed=step)
        loss = F.mse_loss(net(images[share]), wanted[share, :2, 0, 0], reduction="sum") / len(images)
        optimizer.zero_grad()
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *net.state_dict().values()]


def layer_cases(processes: int) -> dict[str, tuple[tuple[Tensor, ...], Tensor | None]]:
    """By name: inputs as of `drawn` for the joint batch, and the rows that count."""
    joint = sum(SHARES[processes])
    some, none = torch.arange(joint) % 3 == 1, torch.zeros(joint).bool()
    last = torch.arange(joint) >= joint - SHARES[processes][-1]  # of the last process alone
    double, single = drawn(joint, CHANNELS, 4, 5), drawn(joint, CHANNELS, 4, 5, dtype=torch.float32)
    x, *others = single
    # Every row of a process has an offset of its own, 1000 standard deviations wide.
    far = x + 1000 * (1 + last.float()).view(-1, 1, 1, 1)
    return {
        "all": (double, None),
        "some": (double, some),
        "last": (double, last),
        "none": (double, none),
        "float32": (single, None),
        "float32-some": (single, some),
        "far": ((far, *others), None),
    }


def share_of(rank: int, processes: int) -> slice:
    start = sum(SHARES[processes][:rank])
    return slice(start, start + SHARES[processes][rank])


def one_of_several(rank: int, processes: int) -> dict[str, list[Tensor]]:
    """What a process gets from its share of every case: output, gradients and running statistics."""
    share = share_of(rank, processes)
    results = {}
    for name, ((x, weight, bias, upstream), rows) in layer_cases(processes).items():
        layer = BatchNorm2d(CHANNELS, EPS, MOMENTUM).to(x.dtype)
        layer.synchronize = True
        layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
        own = x[share].clone().requires_grad_()
        y = layer(own, None if rows is None else rows[share])
        y.backward(upstream[share])
        results[name] = [y.detach(), own.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]
    alone = BatchNorm2d(CHANNELS).double()
    alone(drawn(8, CHANNELS, 2, 2, seed=rank)[0])
    results["alone"] = [*alone.buffers()]
    net = stack()
    norm.synchronize(net)
    assert norm.count_learning(net) == 3
    results["stack"] = trained(DistributedDataParallel(net), processes, share, scale=processes)
    return results


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Three processes, which are first two and then three."""
    folder = tmp_path_factory.mktemp("processes")
    assert run_together(__file__, *((rank, folder) for rank in range(3))) == [0, 0, 0]
    return folder


@pytest.fixture(params=[2, 3])
def several(request, launched):
    return [torch.load(launched / f"{rank}-of-{request.param}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", ["all", "some", "last", "float32", "float32-some", "far"])
def test_several_processes_are_one_with_the_joint_batch(several, name):
    (x, *others), rows = layer_cases(len(several))[name]
    x, weight, bias, upstream = (t.double() for t in (x, *others))
    y, *grads = derived(lambda *inputs: stated(*inputs, rows), (x, weight, bias), upstream)
    outputs, x_grads, weight_grads, bias_grads, *_ = zip(*(process[name] for process in several), strict=True)
    # At an offset of 1000, float32 itself holds four digits behind the point.
    exact = {"rtol": 0, "atol": 1e-3 if name == "far" else 1e-5 if "float32" in name else 1e-9, "check_dtype": False}
    torch.testing.assert_close(torch.cat(outputs), y, **exact)
    torch.testing.assert_close(torch.cat(x_grads), grads[0], **exact)
    torch.testing.assert_close(sum(weight_grads), grads[1], **exact | {"atol": exact["atol"] * 10})
    torch.testing.assert_close(sum(bias_grads), grads[2], **exact)


@pytest.mark.parametrize("name", ["all", "some", "last", "float32", "float32-some", "far"])
def test_running_statistics_of_several_processes_are_equal_and_joint(several, name):
    (x, *_), rows = layer_cases(len(several))[name]
    reference = nn.BatchNorm2d(CHANNELS, EPS, MOMENTUM).double()
    reference((x if rows is None else x[rows]).double())
    for process in several:
        for ours, first, expected in zip(process[name][4:], several[0][name][4:], reference.buffers(), strict=True):
            assert torch.equal(ours, first)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9, check_dtype=False)


def test_nothing_to_count_in_any_process(several):
    (x, weight, bias, upstream), _ = layer_cases(len(several))["none"]
    for rank, process in enumerate(several):
        share = share_of(rank, len(several))
        y, x_grad, weight_grad, bias_grad, mean, var, tracked = process["none"]
        expected = derived(
            lambda a, w, b: F.batch_norm(a, torch.zeros(3).double(), torch.ones(3).double(), w, b, eps=EPS),
            (x[share], weight, bias),
            upstream[share],
        )
        torch.testing.assert_close([y, x_grad, weight_grad, bias_grad], expected, rtol=0, atol=1e-9)
        assert (mean.tolist(), var.tolist(), tracked.item()) == ([0, 0, 0], [1, 1, 1], 1)


def test_norms_that_are_not_synchronized_count_alone(several):
    for rank, process in enumerate(several):
        reference = nn.BatchNorm2d(CHANNELS).double()
        reference(drawn(8, CHANNELS, 2, 2, seed=rank)[0])
        torch.testing.assert_close(process["alone"], [*reference.buffers()], rtol=0, atol=1e-12)


def test_distributed_training_is_training_on_the_joint_batch(several):
    losses, *state = trained(stack(), len(several), slice(None), scale=1)
    torch.testing.assert_close(sum(process["stack"][0] for process in several), losses, rtol=0, atol=1e-9)
    for process in several:
        torch.testing.assert_close(process["stack"][1:], state, rtol=0, atol=1e-9)


def test_by_hand():
    x = torch.tensor([[1.0], [6.0], [3.0]], requires_grad=True)
    mean, var, rows = torch.zeros(1), torch.ones(1), torch.tensor([True, False, True])
    y = batch_norm(x, torch.tensor([2.0]), torch.tensor([10.0]), mean, var, momentum=0.5, eps=0.0, rows=rows)
    # Of 1 and 3: mean 2, variance 1, unbiased 2; the 6 lies four deviations out.
    assert y.flatten().tolist() == [8, 18, 12]
    assert (mean.item(), var.item()) == (1, 1.5)
    y.backward(torch.tensor([[0.0], [1.0], [0.0]]))
    # (6 - mean) / deviation · 2: by the mean -1 for each of the two, by the deviation -4 · (x - 2).
    assert x.grad.flatten().tolist() == [-1 + 4, 2, -1 - 4]


@pytest.mark.parametrize("shape", [(12, 3), (6, 3, 4), (7, 3, 5, 4), (5, 3, 2, 3, 2)])
@pytest.mark.parametrize("some", [False, True])
def test_the_formula_and_its_derivatives(shape, some):
    x, weight, bias, upstream = drawn(*shape)
    rows = torch.arange(shape[0]) % 3 != 1 if some else None
    ours = derived(
        lambda *inputs: batch_norm(*inputs, None, None, momentum=0.1, eps=EPS, rows=rows), (x, weight, bias), upstream
    )
    expected = derived(lambda *inputs: stated(*inputs, rows), (x, weight, bias), upstream)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", [None, [True, False, True, True], [False] * 4])
def test_gradcheck(rows):
    x, weight, bias, _ = (t.requires_grad_() for t in drawn(4, 2, 2, 3))
    rows = rows if rows is None else torch.tensor(rows)

    def norm_of(*inputs: Tensor) -> Tensor:
        return batch_norm(*inputs, None, None, momentum=0.1, eps=EPS, rows=rows)

    assert torch.autograd.gradcheck(norm_of, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda a: norm_of(a, None, None), (x,))
    assert torch.autograd.gradcheck(lambda b: norm_of(x.detach(), weight.detach(), b), (bias,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_process_is_pytorchs_batch_norm(memory_format):
    x, weight, bias, upstream = drawn(16, 8, 7, 6, dtype=torch.float32)
    x = x.to(memory_format=memory_format)
    ours, theirs = (torch.zeros(8), torch.ones(8)), (torch.zeros(8), torch.ones(8))
    got = derived(lambda *i: batch_norm(*i, *ours, momentum=MOMENTUM, eps=EPS), (x, weight, bias), upstream)
    expected = derived(lambda a, w, b: F.batch_norm(a, *theirs, w, b, True, MOMENTUM, EPS), (x, weight, bias), upstream)
    for mine, plain, atol in zip(got, expected, (1e-5, 1e-5, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=atol)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert all(t.is_contiguous(memory_format=memory_format) for t in got[:2])


def test_a_large_offset_does_not_cancel():
    x, weight, bias, upstream = drawn(16, 8, 7, 6, dtype=torch.float32)
    x += 1000
    mean, var = torch.zeros(8), torch.ones(8)
    got = derived(lambda *i: batch_norm(*i, mean, var, momentum=1.0, eps=EPS), (x, weight, bias), upstream)
    expected = derived(stated, (x.double(), weight.double(), bias.double()), upstream.double())
    for ours, exact, atol in zip(got, expected, (5e-4, 5e-5, 1e-2, 1e-4), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_low_precision_are_float32(dtype):
    x, weight, bias, upstream = drawn(32, 4, 12, 12, dtype=torch.float32)
    x, upstream = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, upstream))
    layer = BatchNorm2d(4, EPS)
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    rows = torch.arange(32) < 30
    low = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(low, rows)
    y.backward(upstream)
    expected = derived(
        lambda *inputs: stated(*inputs, rows), (x.double(), weight.double(), bias.double()), upstream.double()
    )
    assert (y.dtype, low.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert low.grad.is_contiguous(memory_format=torch.channels_last)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected[0], rtol=rounding, atol=rounding)
    torch.testing.assert_close(low.grad.double(), expected[1], rtol=rounding, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad.double(), expected[2], rtol=1e-5, atol=1e-3)
    mean = 0.1 * x[:30].double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-7)
    narrow = BatchNorm2d(4).to(dtype)  # parameters and buffers too
    assert narrow(low, rows).dtype == dtype
    narrow(low, rows).sum().backward()
    assert {t.dtype for t in (narrow.running_var, narrow.weight.grad, narrow.bias.grad)} == {dtype}


def test_empty_slots_are_as_if_they_were_not_there():
    x, _, _, upstream = drawn(9, CHANNELS, 4, 4, dtype=torch.float32)
    rows = torch.tensor([True, False, True, True, False, True, True, False, True])
    slots = x.masked_fill(~rows.view(-1, 1, 1, 1), 1e6).requires_grad_()
    chosen = x[rows].requires_grad_()
    ours, theirs = BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    ours(slots, rows).backward(upstream.masked_fill(~rows.view(-1, 1, 1, 1), 0))
    theirs(chosen).backward(upstream[rows])
    torch.testing.assert_close(slots.grad[rows], chosen.grad, rtol=1e-5, atol=1e-6)
    assert (slots.grad[~rows] == 0).all()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)
    for mine, plain in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", [0, 4])
def test_no_rows_leave_the_running_statistics(slots):
    x, _, _, upstream = drawn(slots, CHANNELS, 2, 2, dtype=torch.float32)
    x.requires_grad_()
    layer = BatchNorm2d(CHANNELS, EPS, momentum=0.7)
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y = layer(x, torch.zeros(slots, dtype=torch.bool))
    y.backward(upstream)
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, var)
    scale = (var + EPS).rsqrt().view(-1, 1, 1)
    torch.testing.assert_close(y, (x - mean.view(-1, 1, 1)) * scale)
    torch.testing.assert_close(x.grad, upstream * scale)
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 2, 3)))
    torch.testing.assert_close(
        batch_norm(x, None, None, None, None, momentum=0.1, eps=0.0, rows=torch.zeros(slots).bool()), x
    )


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1}]
)
def test_module_keeps_pytorchs_books(options):
    torch.manual_seed(0)
    plain, ours, every = (kind(CHANNELS, **options) for kind in (nn.BatchNorm2d, BatchNorm2d, BatchNorm2d))
    for step in range(3):
        x = drawn(4, CHANNELS, 3, 3, dtype=torch.float32, seed=step)[0]
        expected = plain(x)
        assert torch.equal(ours(x), expected)
        torch.testing.assert_close(every(x, torch.ones(4).bool()), expected)
    torch.testing.assert_close(every.state_dict(), plain.state_dict())
    for module in (plain, ours, every):
        module.eval()
    assert torch.equal(ours(x, torch.zeros(4).bool()), plain(x))
    torch.testing.assert_close(every(x), plain(x))


def test_norm_with_activation_drops_and_activates_after_the_norm():
    x = drawn(6, CHANNELS, 3, 3, dtype=torch.float32)[0]
    rows = torch.ones(6).bool()

    class Halve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(max=0.5)  # seen only if it comes before a negating activation

    class Negate(nn.Module):
        def __init__(self, inplace: bool = False) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return -x

    options = {"drop_layer": Halve, "act_layer": Negate}
    theirs, ours = TimmBatchNormAct2d(CHANNELS, **options), BatchNormAct2d(CHANNELS, **options)
    expected = theirs(x)
    assert torch.equal(ours(x), expected)
    torch.testing.assert_close(ours(x, rows), expected)
    assert expected.min() == -0.5
    relu = BatchNormAct2d(CHANNELS)  # in place, on what the norm returned
    leaf = x.clone().requires_grad_()
    relu(leaf, rows).sum().backward()
    reference = x.clone().requires_grad_()
    F.relu(F.batch_norm(reference, None, None, training=True)).sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18"])
def test_synchronized_networks_keep_their_parts(name):
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True, out_indices=(1, 2))
    twin = copy.deepcopy(net)
    kinds = (nn.BatchNorm2d, TimmBatchNormAct2d)
    before = {key: part for key, part in net.named_modules() if type(part) in kinds}
    first = next(iter(before.values()))
    first.requires_grad_(False).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    keys, parameters = list(net.state_dict()), list(net.parameters())

    norm.synchronize(net)
    assert norm.count_learning(net) == len(before)
    after = {key: part for key, part in net.named_modules() if isinstance(part, BatchNorm2d | BatchNormAct2d)}
    assert after.keys() == before.keys()
    assert all(part.synchronize and part is before[key] for key, part in after.items())
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())

    first.requires_grad_(True).train()
    images = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(net(images), twin(images), strict=True):
        assert torch.equal(ours, theirs)  # one process
    weight = first.weight.clone()
    net(images)[-1].square().mean().backward()
    optimizer.step()
    assert not torch.equal(first.weight, weight)
    norm.synchronize(net)
    assert norm.count_learning(net) == len(before)


def test_frozen_norms_stay_frozen():
    backbone = made(Backbone, "resnet18", frozen_stages=1, train_norm=True)
    every = sum(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    frozen = 1 + 4  # the stem's, and two in each of two blocks
    norm.synchronize(backbone)
    assert norm.count_learning(backbone) == every - frozen
    assert backbone.net["bn1"].training  # no mode has changed yet
    backbone.train()
    assert not backbone.net["bn1"].training
    stem = backbone.net["bn1"].running_mean.clone()
    inner = backbone.net["layer2"][0].bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(backbone.net["bn1"].running_mean, stem)
    assert not torch.equal(backbone.net["layer2"][0].bn1.running_mean, inner)
    assert norm.count_learning(made(Backbone, "resnet18", train_norm=False)) == 0


def test_other_norms_are_left_alone():
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net = nn.Sequential(nn.BatchNorm1d(2), Own(2), nn.GroupNorm(1, 2))
    norm.synchronize(net)
    assert not any(hasattr(part, "synchronize") for part in net)
    assert [type(part) for part in net] == [nn.BatchNorm1d, Own, nn.GroupNorm]
    single = nn.BatchNorm2d(2).eval()
    norm.synchronize(single)
    assert norm.count_learning(single) == 1  # by itself nothing keeps it from training
    assert type(single) is BatchNorm2d
    assert not single.training


def test_bad_input():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(N, C, \.\.\.\), got shape \(5,\)"):
        batch_norm(torch.zeros(5), None, None, None, None, momentum=0.1, eps=EPS)
    for rows in (torch.ones(3).bool(), torch.ones(2)):
        with pytest.raises(ValueError, match=r"rows must be bool of shape \(2,\)"):
            BatchNorm2d(3)(x, rows)
    with pytest.raises(ValueError, match="both be given, or both be None"):
        batch_norm(torch.zeros(2, 3), None, None, torch.zeros(3), None, momentum=0.1, eps=EPS)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got shape \(2, 3\)"):
        BatchNorm2d(3)(torch.zeros(2, 3), torch.ones(2).bool())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_the_same_and_is_not_waited_for(dtype):
    x, weight, bias, upstream = (t.cuda() for t in drawn(32, 16, 14, 14, dtype=torch.float32))
    x, upstream = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, upstream))
    layer = BatchNorm2d(16, EPS).cuda()
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    rows = torch.arange(32, device="cuda") % 4 != 0
    own = x.clone().requires_grad_()
    layer(own, rows).backward(upstream)  # whatever waits once, at the first call
    own.grad = layer.weight.grad = layer.bias.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(own, rows)
        y.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = derived(
        lambda *inputs: stated(*inputs, rows), (x.double(), weight.double(), bias.double()), upstream.double()
    )
    got = [y, own.grad, layer.weight.grad, layer.bias.grad]
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    for ours, exact, atol in zip(got, expected, (rounding, 1e-4, 1e-3, 1e-3), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=atol)


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for processes in (2, 3):
        if rank < processes:
            meet = f"file://{folder}/meet-{processes}"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
            torch.save(one_of_several(rank, processes), folder / f"{rank}-of-{processes}.pt")
            dist.destroy_process_group()
