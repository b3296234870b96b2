"""Changes to a timm network that its own arguments do not offer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models.res2net import Bottle2neck
from timm.models.resnet import Bottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.errors import UserError
from tailseg.layers.context_block import ContextBlock
from tailseg.layers.deform_conv import ModulatedDeformConv2d


def set_stem_channels(net: nn.ModuleDict, name: str, channels: int) -> None:
    """Exchange the layers of a ResNet that touch the stem's output, which timm has fixed at 64 channels."""
    parts = dict(net.named_children())
    first: Any = next(iter(parts["layer1"].children())) if "layer1" in parts else None
    plain = isinstance(parts.get("conv1"), nn.Conv2d) and isinstance(first, Bottleneck)
    if not plain or (first.downsample is not None and not isinstance(first.downsample[0], nn.Conv2d)):
        raise UserError(
            f"model.backbone.stem_channels: '{name}' is no plain ResNet of bottlenecks with a 7x7 stem; leave it out"
        )

    def exchanged(conv: Any, in_channels: int, out_channels: int) -> nn.Conv2d:
        fresh = nn.Conv2d(in_channels, out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
        return fresh

    net["conv1"], net["bn1"] = exchanged(parts["conv1"], 3, channels), nn.BatchNorm2d(channels)
    first.conv1 = exchanged(first.conv1, channels, first.conv1.out_channels)
    width = first.conv3.out_channels
    # timm left out the shortcut's convolution if its own stem happened to be as wide as the stage.
    first.downsample = nn.Sequential(exchanged(first.conv3, channels, width), nn.BatchNorm2d(width))


def move_strides(net: nn.Module, name: str) -> None:
    """Give every bottleneck's stride to its first convolution, as ResNet was published (its 3x3 came later)."""
    blocks = [block for block in net.modules() if isinstance(block, Bottleneck)]
    if not any(block.conv2.stride != (1, 1) for block in blocks):
        raise UserError(
            f"model.backbone.stride_in_1x1: '{name}' has no bottlenecks with their stride in the 3x3 convolution; "
            "leave it out"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def leave_out_first_pool(net: nn.Module, name: str) -> None:
    """Make the first block of a Res2Net's first stage pass on its last part as it is, instead of its 3x3 averages."""
    first = next((block for block in net.modules() if isinstance(block, Bottle2neck)), None)
    if first is None:
        raise UserError(f"model.backbone.res2net_pool: '{name}' is no Res2Net; leave it out")
    first.pool = nn.Identity()


def add_context_blocks(net: nn.Module, name: str, stages: Iterable[int], ratio: float) -> None:
    """Put a global context block at the end of every bottleneck of these stages, before the shortcut is added.

    Raises:
        UserError: there is no such stage, or it has other blocks.
    """
    key = "model.backbone.context_stages"
    for stage in sorted(set(stages)):
        layer = dict(net.named_children()).get(f"layer{stage}")
        blocks = [] if layer is None else [block for block in layer.children() if isinstance(block, Bottleneck)]
        if not blocks:
            raise UserError(f"{key}: '{name}' has no stage {stage} of ResNet's bottlenecks; leave {stage} out")
        for block in blocks:
            block.se = ContextBlock(block.conv3.out_channels, ratio)


class PaddedSwinBlock(SwinTransformerBlock):  # type: ignore[misc]
    """A Swin Transformer's block that pads its maps to whole windows before it shifts them, not after.

    So do the detectors that were published with it. Where maps are whole windows, it makes no difference.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """Windowed attention of maps (B, h, w, channels)."""
        height, width = x.shape[1:3]
        below, right = (-height) % self.window_size[0], (-width) % self.window_size[1]
        attended: Tensor = super()._attn(F.pad(x, (0, 0, 0, right, 0, below)))
        return attended[:, :height, :width]


def pad_before_shift(net: nn.Module) -> None:
    """Make every block of a Swin Transformer a `PaddedSwinBlock`; other networks are left as they are."""
    for module in net.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedSwinBlock


def make_deformable(net: nn.Module, name: str, stage: int, parts: Iterable[str]) -> None:
    """Make every convolution larger than 1x1 of a stage modulated deformable, without a change to what it computes yet.

    Args:
        net: the network, changed in place.
        name: of the network, for errors.
        stage: its number, for errors.
        parts: names of the stage's modules in ``net``.

    Raises:
        UserError: the stage has no such convolution, or one that has no deformable form.
    """
    key = "model.backbone.deformable_stages"
    inside = tuple(f"{part}." for part in parts)
    found = [
        (path, module)
        for path, module in net.named_modules()
        if f"{path}.".startswith(inside) and isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    ]
    if not found:
        raise UserError(f"{key}: stage {stage} of '{name}' has no convolution larger than 1x1; leave {stage} out")
    for path, conv in found:
        parent, _, child = path.rpartition(".")
        try:
            setattr(net.get_submodule(parent), child, ModulatedDeformConv2d.from_conv(conv))
        except ValueError as error:
            raise UserError(f"{key}: stage {stage} of '{name}' cannot be deformable ({error}); leave it out") from error
