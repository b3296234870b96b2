"""What is computed again gives the same outputs, gradients and statistics, in one process and in two (gloo).

Run as ``python test_activation_checkpointing.py RANK FOLDER`` this file is one of two processes.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from tiny import run_together
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tailseg.layers import norm
from tailseg.layers.activation_checkpointing import recompute

CHANNELS, PROCESSES = 6, 2


class Block(nn.Module):
    """A residual block with the kinds of norm that backbones have, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), BatchNormAct2d(CHANNELS)
        self.conv3, self.bn3 = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS, momentum=None)
        self.frozen = nn.BatchNorm2d(CHANNELS)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        return F.relu_(x + self.frozen(self.bn3(self.conv3(self.dropout(out)))))


def stack(*, recomputed: bool, synchronized: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), Block(), Block(), Block()).double()
    for buffer in net.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1)
    if recomputed:
        for block in net[1:]:
            recompute(block)
    if synchronized:
        norm.synchronize(net)
    net.train()
    for block in net[1:]:
        block.frozen.eval()
    return net


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(net: nn.Module, *, seed: int = 0, steps: int = 3) -> list[Tensor]:
    """Losses and state after a few steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # for dropout
        loss = net(images(seed + step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(p.grad for p in net.parameters()), *net.state_dict().values()]


@pytest.mark.parametrize("synchronized", [False, True])
def test_training_is_the_same(synchronized):
    plain, recomputed = (stack(recomputed=again, synchronized=synchronized) for again in (False, True))
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    torch.testing.assert_close(trained(recomputed), trained(plain), rtol=0, atol=1e-12)
    assert recomputed[1].bn1.num_batches_tracked.item() == 3  # one a step
    assert recomputed[1].frozen.num_batches_tracked.item() == plain[1].frozen.num_batches_tracked.item() == 0


def test_statistics_move_in_the_forward_pass_alone():
    net = stack(recomputed=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    loss = net(images()).square().mean()
    after = {key: value.clone() for key, value in net.state_dict().items()}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"{i}.{bn}.{kind}" for i in (1, 2, 3) for bn in ("bn1", "bn2", "bn3") for kind in kinds}
    buffers = [id(buffer) for buffer in net.buffers()]
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, list(net.parameters())), first, rtol=0, atol=0)
    assert [id(buffer) for buffer in net.buffers()] == buffers
    torch.testing.assert_close(dict(net.state_dict()), after, rtol=0, atol=0)


def held(net: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its place may be taken
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(images())
    return sum(sizes.values())


def test_only_the_inputs_of_blocks_are_kept():
    a_map = 4 * CHANNELS * 7 * 6 * 8
    assert held(stack(recomputed=True)) == images().nbytes + 3 * a_map
    assert held(stack(recomputed=False)) > 15 * a_map


def test_a_failing_second_time_leaves_the_buffers_alone():
    block = stack(recomputed=True)[1]
    buffers = [id(buffer) for buffer in block.buffers()]
    out = block(torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64))
    block.conv3 = None
    with pytest.raises(TypeError):
        out.sum().backward()
    assert [id(buffer) for buffer in block.buffers()] == buffers


def test_it_is_the_same_object_of_the_same_kind():
    net = stack(recomputed=True)
    kinds = {type(block) for block in net[1:]}
    assert len(kinds) == 1
    recompute(net[1])
    assert {type(net[1])} == kinds
    assert isinstance(net[1], Block)
    twin = copy.deepcopy(net)  # as a moving average of the weights makes one
    torch.testing.assert_close(trained(twin), trained(net), rtol=0, atol=0)
    assert twin[1].bn1.running_mean is not net[1].bn1.running_mean


def test_without_gradients_nothing_is_different():
    plain, recomputed = stack(recomputed=False).eval(), stack(recomputed=True).eval()
    with torch.no_grad():
        assert torch.equal(recomputed(images()), plain(images()))
        assert not recomputed(images()).requires_grad
    recomputed.requires_grad_(False)
    assert not recomputed(images()).requires_grad


@pytest.mark.parametrize("train", [False, True])
def test_no_images(train):
    net = stack(recomputed=True, synchronized=True).train(train)
    out = net(images()[:0])
    assert out.shape == (0, CHANNELS, 7, 6)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_bfloat16():
    plain, recomputed = stack(recomputed=False).float(), stack(recomputed=True).float()
    for net in (plain, recomputed):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(images().float())
        out.float().square().mean().backward()
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES)
    results = [
        trained(DistributedDataParallel(stack(recomputed=again, synchronized=True)), seed=10 * rank)
        for again in (False, True)
    ]
    dist.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


def test_synchronized_norm_in_two_processes(tmp_path):
    assert run_together(__file__, *((rank, tmp_path) for rank in range(PROCESSES))) == [0] * PROCESSES
    states = []
    for rank in range(PROCESSES):
        plain, recomputed = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-12)
        states.append(recomputed[1:])
    torch.testing.assert_close(*states, rtol=0, atol=0)  # gradients, parameters and statistics are joint
    alone = trained(stack(recomputed=True))[1:]
    assert (alone[0] - states[0][0]).abs().max() > 1e-3


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]))
