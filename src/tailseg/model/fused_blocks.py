"""Residual blocks of timm's ResNets whose batch norm, shortcut and ReLU are one launch where no gradient is wanted.

That is the case in frozen stages and in inference. Blocks keep their class's name for all who ask with `isinstance`,
their parameters, and the keys of their state dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from tailseg.layers.norm import BatchNorm2d
from tailseg.layers.triton_support import has_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fuse_blocks(net: nn.Module) -> None:
    """Let the residual blocks of a network use the fused form; those with parts that it does not know stay as they are.

    Args:
        net: of timm; changed in place.
    """
    block: Any
    for block in net.modules():
        if type(block) is Bottleneck and _is_plain(block, [block.act1, block.act2, block.act3]):
            block.__class__ = FusedBottleneck
        elif type(block) is BasicBlock and _is_plain(block, [block.act1, block.act2]):
            block.__class__ = FusedBasicBlock


def _is_plain(block: Any, activations: Sequence[nn.Module]) -> bool:
    between = (block.aa, block.drop_block)
    return (
        all(type(act) is nn.ReLU for act in activations)
        and all(type(part) is nn.Identity for part in between)
        and block.se is None
        and block.drop_path is None
    )


class FusedBottleneck(Bottleneck):  # type: ignore[misc]
    """A bottleneck; fused where `takes_triton` says so."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, h, w) of maps."""
        if not takes_triton(self, x, [self.bn1, self.bn2, self.bn3]):
            y: Tensor = super().forward(x)
            return y
        y = norm_relu(self.conv1(x), self.bn1)
        y = norm_relu(self.conv2(y), self.bn2)
        return norm_relu(self.conv3(y), self.bn3, x if self.downsample is None else self.downsample(x))


class FusedBasicBlock(BasicBlock):  # type: ignore[misc]
    """A block of two 3x3 convolutions; fused where `takes_triton` says so."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, h, w) of maps."""
        if not takes_triton(self, x, [self.bn1, self.bn2]):
            y: Tensor = super().forward(x)
            return y
        y = norm_relu(self.conv1(x), self.bn1)
        return norm_relu(self.conv2(y), self.bn2, x if self.downsample is None else self.downsample(x))


def takes_triton(block: nn.Module, x: Tensor, norms: Sequence[nn.Module]) -> bool:
    """Whether a block is fused: on CUDA, without gradient, with plain batch norm that uses its running statistics."""
    return bool(
        x.is_cuda
        and x.dtype in DTYPES
        and has_triton()
        and all(isinstance(norm, nn.BatchNorm2d) and uses_running_statistics(norm) for norm in norms)
        and not needs_gradient(block, x)
        and not torch.compiler.is_compiling()
    )


def uses_running_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether batch norm does nothing but normalise with what it has learnt, then scale and shift.

    Ours does so in evaluation mode: several processes make all norms of a network so, frozen ones too.
    """
    known = type(norm) in (nn.BatchNorm2d, BatchNorm2d)
    return known and norm.affine and not norm.training and norm.running_mean is not None


def needs_gradient(block: nn.Module, x: Tensor) -> bool:
    """Whether anything that a block makes of ``x`` will have a gradient."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters()))


def norm_relu(x: Tensor, norm: nn.BatchNorm2d, shortcut: Tensor | None = None) -> Tensor:
    """ReLU of the normalised x and a shortcut, written over x.

    Args:
        x: (B, C, h, w) that nobody else reads.
        norm: affine, with running statistics.
        shortcut: of the same shape.
    """
    from tailseg.layers.fused_norm_triton import norm_relu_

    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = x.contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        shortcut = shortcut.to(x.dtype).contiguous(memory_format=torch.channels_last)
    norm_relu_(x, (norm.weight, norm.bias, norm.running_mean, norm.running_var), norm.eps, shortcut)
    return x
