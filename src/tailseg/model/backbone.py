"""Image features at four scales from any timm model with `features_only`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import timm
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, LayerNorm2d
from torch import Tensor, nn

from tailseg.errors import UserError
from tailseg.layers.activation_checkpointing import recompute
from tailseg.model.backbone_edits import (
    add_context_blocks,
    leave_out_first_pool,
    make_deformable,
    move_strides,
    pad_before_shift,
    set_stem_channels,
)
from tailseg.model.fused_blocks import fuse_blocks
from tailseg.recipes.backbone_options import reaches_outside

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
        res2net_pool: keep the 3x3 average in the first block of a Res2Net's first stage.
        output_norm: layer norm over the channels of each of the four maps, with the eps of the network's own.
        context_stages: of the four stages, counted from 1, those whose bottlenecks end with a `ContextBlock`.
        context_ratio: of these blocks.
        deformable_stages: of the four stages, counted from 1, those whose convolutions larger than 1x1 are modulated
            deformable ones. At the start they compute what the plain ones would, also with `load_pretrained`.
        checkpointing: for the backward pass keep what goes in and out of the blocks of the trained stages, and compute
            the rest again: less memory, more time, the same gradients and statistics.
        options: further arguments of the timm model.

    Raises:
        UserError: the name is not a timm model with features at strides 4, 8, 16 and 32, an option does not go with
            it, or a deformable stage is frozen.
    """

    def __init__(
        self,
        name: str,
        *,
        frozen_stages: int,
        train_norm: bool,
        norm_eps: float | None,
        stem_channels: int | None,
        stride_in_1x1: bool,
        res2net_pool: bool,
        output_norm: bool,
        context_stages: Sequence[int],
        context_ratio: float,
        deformable_stages: Sequence[int],
        checkpointing: bool,
        options: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        try:
            net = timm.create_model(name, pretrained=False, features_only=True, **(options or {}))
        except Exception as error:  # of odd options and names, timm lets through many types
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
            set_stem_channels(self.net, name, stem_channels)
        if stride_in_1x1:
            move_strides(self.net, name)
        if not res2net_pool:
            leave_out_first_pool(self.net, name)
        add_context_blocks(self.net, name, context_stages, context_ratio)
        pad_before_shift(self.net)
        fuse_blocks(self.net)
        if norm_eps is not None:
            for norm in _batch_norms(self.net):
                norm.eps = norm_eps
        self.name = name
        # What timm calls it, also where `name` is that of a file on a hub or in a folder.
        self.architecture = (
            str((self.net.pretrained_cfg or {}).get("architecture", "")) if reaches_outside(name) else name
        )
        self.channels: tuple[int, ...] = tuple(self.net.feature_info.channels())
        self.channels_last = getattr(self.net, "output_fmt", None) == "NHWC"
        self.output_norms = nn.ModuleList()
        if output_norm:
            eps = next((module.eps for module in self.net.modules() if isinstance(module, nn.LayerNorm)), 1e-6)
            self.output_norms.extend(LayerNorm2d(channels, eps=eps) for channels in self.channels)
        self.train_norm = train_norm
        self._frozen: list[nn.Module] = []
        if frozen_stages < 0 and not deformable_stages and not checkpointing:
            return
        stages = _stages(self.net, name, ends, wanted)
        for stage in sorted(set(deformable_stages)):
            _require_trained(stage, frozen_stages)
            make_deformable(self.net, name, stage, stages[stage])
        first_trained = frozen_stages + 1
        self._frozen = [self.net.get_submodule(part) for part in chain.from_iterable(stages[:first_trained])]
        for module in self._frozen:
            module.requires_grad_(False)
        if checkpointing:
            for part in chain.from_iterable(stages[max(first_trained, 1) :]):
                for block in _blocks(self.net.get_submodule(part)):
                    recompute(block)

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
        maps = list(self.net(images))
        if self.channels_last:
            maps = [own.permute(0, 3, 1, 2) for own in maps]
        return [norm(own) for norm, own in zip(self.output_norms, maps, strict=True)] if self.output_norms else maps


def _stages(net: nn.Module, name: str, ends: list[str], wanted: tuple[int, ...]) -> list[list[str]]:
    """Names of the modules of the stem and of the four stages, a chain whose features end at ``ends``.

    The stem ends with the last feature before stride 4, or before the module that computes that if there is none.
    """
    names: list[str] = []
    for part, module in net.named_children():
        if any(end.startswith(f"{part}_") for end in ends):  # a container of stages, such as blocks of EfficientNet
            names.extend(f"{part}.{child}" for child, _ in module.named_children())
        else:
            names.append(part)
    flat = [part.replace(".", "_") for part in names]
    if any(end not in flat for end in ends[: wanted[-1] + 1]):
        raise UserError(
            f"model.backbone: '{name}' is no chain of stages, so none can be frozen, deformable or recomputed; "
            "set frozen_stages=-1, or choose a network such as resnet50"
        )
    after = [flat.index(ends[index]) + 1 for index in wanted]
    stem = flat.index(ends[wanted[0] - 1]) + 1 if wanted[0] > 0 else after[0] - 1
    return [names[start:stop] for start, stop in pairwise((0, stem, *after))]


def _require_trained(stage: int, frozen_stages: int) -> None:
    key = "model.backbone.deformable_stages"
    if not 1 <= stage <= len(STRIDES):
        raise UserError(f"{key}: there is no stage {stage}; choose from 1 to {len(STRIDES)}")
    if stage <= frozen_stages:
        raise UserError(
            f"{key}: stage {stage} is frozen by model.backbone.frozen_stages={frozen_stages}; leave it out, or freeze "
            "fewer stages"
        )


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """The modules with parameters that a stage runs one after the other; itself if it does not say which."""
    parts = stage.children() if isinstance(stage, nn.Sequential) else (stage,)
    return [part for part in parts if any(True for _ in part.parameters())]


def _batch_norms(module: nn.Module) -> Iterator[Any]:
    kinds = (nn.modules.batchnorm._BatchNorm, BatchNormAct2d, FrozenBatchNormAct2d)
    return (m for m in module.modules() if isinstance(m, kinds))
