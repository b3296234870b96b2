"""Residual blocks in the fused form, its kernel run by Triton's interpreter, against timm's own."""

import copy
import os
from pathlib import Path

import pytest
import timm
import torch
from gpu_code import lines_of
from timm.models.resnet import BasicBlock, Bottleneck
from tiny import made
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.norm import synchronize
from tailseg.model import fused_blocks
from tailseg.model.backbone import Backbone
from tailseg.model.fused_blocks import (
    FusedBasicBlock,
    FusedBottleneck,
    fuse_blocks,
    needs_gradient,
    norm_relu,
    uses_running_statistics,
)

fused_norm_triton = pytest.importorskip("tailseg.layers.fused_norm_triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)
SMALL = {"channels": [8, 8, 8, 8], "stem_width": 8}


@pytest.fixture
def launches(monkeypatch) -> list[torch.Size]:
    """Blocks are fused on the CPU too; the shapes of what was."""
    seen: list[torch.Size] = []
    plain = fused_norm_triton.norm_relu_

    def counted(x: Tensor, *arguments: object) -> None:
        seen.append(x.shape)
        plain(x, *arguments)

    def takes(block: nn.Module, x: Tensor, norms: list[nn.Module]) -> bool:
        return not needs_gradient(block, x) and not any(norm.training for norm in norms)

    monkeypatch.setattr(fused_norm_triton, "norm_relu_", counted)
    monkeypatch.setattr(fused_norm_triton, "PLACE_BLOCK", 64)
    monkeypatch.setattr(fused_blocks, "takes_triton", takes)
    return seen


def used_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with statistics, scale and shift of every sign."""
    generator = torch.Generator().manual_seed(channels)
    norm = nn.BatchNorm2d(channels, eps=1e-3).eval()
    for values in (norm.weight, norm.bias, norm.running_mean):
        values.data = torch.randn(channels, generator=generator)
    norm.running_var = torch.rand(channels, generator=generator)
    return norm


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)]
)
@pytest.mark.parametrize("channels", [5, 8])
def test_values_equal_float64(channels, dtype, tolerance, monkeypatch):
    """In blocks of places and channels, some of which are not full."""
    monkeypatch.setattr(fused_norm_triton, "PLACE_BLOCK", 8)
    monkeypatch.setattr(fused_norm_triton, "CHANNEL_BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    x, shortcut = (torch.randn(2, channels, 3, 2, generator=generator).to(dtype) for _ in range(2))
    norm = used_norm(channels)
    exact = copy.deepcopy(norm).double()(x.double())
    with torch.no_grad():
        added = norm_relu(x.clone().contiguous(memory_format=torch.channels_last), norm, shortcut)
        alone = norm_relu(x.clone(), norm)
    assert added.dtype == alone.dtype == dtype
    torch.testing.assert_close(added.double(), F.relu(exact + shortcut.double()), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(alone.double(), F.relu(exact), rtol=tolerance, atol=tolerance)


@interpreted
def test_what_is_no_number_stays_and_no_image_is_none():
    norm = used_norm(4)
    x = torch.full((1, 4, 1, 1), float("nan"))
    with torch.no_grad():
        assert norm_relu(x, norm).isnan().all()
        assert norm_relu(torch.zeros(0, 4, 2, 2), norm).shape == (0, 4, 2, 2)


def test_which_norms_are_fused():
    norm = used_norm(4)
    assert uses_running_statistics(norm)
    synchronize(norm)  # as several processes do to all norms, the frozen ones too
    assert type(norm) is not nn.BatchNorm2d
    assert uses_running_statistics(norm)
    assert not uses_running_statistics(norm.train())
    assert not uses_running_statistics(nn.BatchNorm2d(4, affine=False).eval())
    assert not uses_running_statistics(nn.BatchNorm2d(4, track_running_stats=False).eval())
    assert not uses_running_statistics(nn.SyncBatchNorm(4).eval())


def backbone(name: str, **options: object) -> Backbone:
    torch.manual_seed(0)
    model = made(Backbone, name, options=SMALL, **options)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            used = used_norm(norm.num_features)
            norm.load_state_dict(used.state_dict())
            norm.running_var += 1
    return model


@interpreted
@pytest.mark.parametrize(("name", "kind", "norms"), [("resnet50", Bottleneck, 48), ("resnet18", BasicBlock, 16)])
def test_inference_is_the_same(name, kind, norms, launches, monkeypatch):
    model, images = backbone(name).eval(), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(images)
        assert len(launches) == norms
        monkeypatch.setattr(fused_blocks, "takes_triton", lambda *_: False)
        expected = model(images)
    assert sum(isinstance(block, kind) for block in model.modules()) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_fuses_frozen_stages_alone_and_learns_the_same(launches, monkeypatch, checkpointing):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def gradients() -> dict[str, Tensor]:
        model = backbone("resnet18", frozen_stages=1, train_norm=False, checkpointing=checkpointing).train()
        torch.stack([maps.square().mean() for maps in model(images)]).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    assert len(launches) == 4  # two blocks of two
    monkeypatch.setattr(fused_blocks, "takes_triton", lambda *_: False)
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


def test_the_state_dict_is_that_of_timm():
    net = timm.create_model("resnet18", features_only=True, **SMALL)
    keys = list(net.state_dict())
    fuse_blocks(net)
    assert list(net.state_dict()) == keys
    assert {type(block) for stage in (net.layer1, net.layer4) for block in stage} == {FusedBasicBlock}
    assert type(copy.deepcopy(net).layer1[0]) is FusedBasicBlock


@pytest.mark.parametrize("name", ["seresnet18", "resnetblur18", "resnest14d"])
def test_blocks_with_other_parts_stay_as_they_are(name):
    net = timm.create_model(name, features_only=True)
    kinds = [type(block) for block in net.modules()]
    fuse_blocks(net)
    fused = [block for block in net.modules() if isinstance(block, FusedBottleneck | FusedBasicBlock)]
    assert all(type(block.aa) is nn.Identity for block in fused)  # only where it strides does resnetblur18 blur
    assert name == "resnetblur18" or [type(block) for block in net.modules()] == kinds


def on_device(x: Tensor) -> Tensor:
    return x.as_subclass(type("OnDevice", (Tensor,), {"is_cuda": True}))


def test_maps_on_cuda_without_gradient_are_fused_and_nothing_else(monkeypatch):
    block = made(Backbone, "resnet18", options=SMALL, frozen_stages=1).net.layer1[0].eval()
    norms, x = [block.bn1, block.bn2], on_device(torch.zeros(1, 8, 4, 4))
    assert fused_blocks.takes_triton(block, x, norms)
    assert not fused_blocks.takes_triton(block, torch.zeros(1, 8, 4, 4), norms)
    assert not fused_blocks.takes_triton(block, x.double(), norms)
    assert not fused_blocks.takes_triton(block, on_device(torch.zeros(1, 8, 4, 4).requires_grad_()), norms)
    block.bn2.train()
    assert not fused_blocks.takes_triton(block, x, norms)
    block.bn2.eval()
    block.conv1.weight.requires_grad_()
    assert not fused_blocks.takes_triton(block, x, norms)
    with torch.no_grad():
        assert fused_blocks.takes_triton(block, x, norms)
        assert not fused_blocks.takes_triton(block, x, [block.bn1, nn.GroupNorm(2, 8)])
    monkeypatch.setattr(fused_blocks, "has_triton", lambda: False)
    with torch.no_grad():
        assert not fused_blocks.takes_triton(block, x, norms)


def test_the_kernel_compiles_for_an_h100():
    name, size, width = lines_of(Path(__file__).with_name("compile_kernels.py"))[2]
    assert (name, int(size) > 0, width) == ("block", True, "wide")
