"""mmdetection's names of backbones -> timm's, and what its networks do otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

MOST_BLOCKS = 40  # of a stage
OURS = "backbone.net"
# The convolution that takes the colours, in any of the networks.
FIRST_CONVOLUTIONS = tuple(
    f"{OURS}.{name}.weight" for name in ("conv1", "conv1.0", "stem.conv", "patch_embed.proj", "stem_0")
)
REGNET, SWIN, CONVNEXT = "RegNet", "Swin Transformer", "ConvNeXt"


def backbone_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Their names, or beginnings up to a dot -> ours.

    Args:
        tensors: all of a checkpoint, under their names.
    """
    family = _family(tensors)
    if family == REGNET:
        return _regnet()
    if family == SWIN:
        return _swin() | _output_norms()
    if family == CONVNEXT:
        return _convnext() | _output_norms()
    names = {"backbone": OURS, "backbone.stem": f"{OURS}.conv1", "backbone.stem.7": f"{OURS}.bn1"}
    names["backbone.gn1"] = f"{OURS}.bn1"
    for block in (f"layer{stage}.{i}" for stage in range(1, 5) for i in range(MOST_BLOCKS)):
        # Of deformable convolutions as the first version of mmcv's layer named them.
        names[f"backbone.{block}.conv2_offset"] = f"{OURS}.{block}.conv2.conv_offset"
        names |= {f"backbone.{block}.gn{i}": f"{OURS}.{block}.bn{i}" for i in (1, 2, 3)}
        context, own = f"backbone.{block}.context_block", f"{OURS}.{block}.se"
        names |= {f"{context}.conv_mask": f"{own}.attention", f"{context}.channel_add_conv.0": f"{own}.reduce"}
        names |= {f"{context}.channel_add_conv.1": f"{own}.norm", f"{context}.channel_add_conv.3": f"{own}.expand"}
    return names


def backbone_conventions(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Recipe values that hold in mmdetection without being said in tensors or configuration."""
    if "backbone.layer1.0.convs.0.weight" in tensors:
        return {"res2net_pool": False}
    all_trained = _family(tensors) in (SWIN, CONVNEXT) or "backbone.transition1.0.0.weight" in tensors  # HRNet
    return {"frozen_stages": -1} if all_trained else {}


def in_timm_s_order(state: dict[str, Tensor]) -> None:
    """Sort the inputs of a Swin Transformer's merged patches, changed in place.

    mmdetection has them by channel, row and column of the four patches, timm by column, row and channel.
    """
    for key, tensor in state.items():
        if key.startswith(f"{OURS}.layers_") and ".downsample." in key and tensor.shape[-1] % 4 == 0:
            patches = tensor.unflatten(-1, (-1, 2, 2))
            state[key] = patches.movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3)


def is_index(name: str) -> bool:
    """Whether a tensor of theirs only says which rows of a table belong to which places, as those of Swin do."""
    return name.startswith("backbone.") and name.endswith(".relative_position_index")


def _family(tensors: Mapping[str, Tensor]) -> str | None:
    first = tensors.get("backbone.conv1.weight")
    if first is not None and first.shape[-1] == 3 and "backbone.conv2.weight" not in tensors:  # that is HRNet
        return REGNET
    if "backbone.patch_embed.projection.weight" in tensors:
        return SWIN
    return CONVNEXT if "backbone.downsample_layers.0.0.weight" in tensors else None


def _regnet() -> dict[str, str]:
    names = {"backbone.conv1": f"{OURS}.stem.conv", "backbone.bn1": f"{OURS}.stem.bn"}
    for stage in range(1, 5):
        for i in range(MOST_BLOCKS):
            block, own = f"backbone.layer{stage}.{i}", f"{OURS}.s{stage}.b{i + 1}"
            names[f"{block}.conv2.conv_offset"] = f"{own}.conv2.conv.conv_offset"
            for conv in (1, 2, 3):
                names |= {f"{block}.conv{conv}": f"{own}.conv{conv}.conv", f"{block}.bn{conv}": f"{own}.conv{conv}.bn"}
            names |= {
                f"{block}.downsample.0": f"{own}.downsample.conv",
                f"{block}.downsample.1": f"{own}.downsample.bn",
            }
    return names


def _swin() -> dict[str, str]:
    names = {"backbone.patch_embed.projection": f"{OURS}.patch_embed.proj"}
    names["backbone.patch_embed.norm"] = f"{OURS}.patch_embed.norm"
    for stage in range(4):
        names[f"backbone.stages.{stage}.downsample"] = f"{OURS}.layers_{stage + 1}.downsample"
        for i in range(MOST_BLOCKS):
            block, own = f"backbone.stages.{stage}.blocks.{i}", f"{OURS}.layers_{stage}.blocks.{i}"
            names |= {f"{block}.{norm}": f"{own}.{norm}" for norm in ("norm1", "norm2")}
            names[f"{block}.attn.w_msa"] = f"{own}.attn"
            names |= {f"{block}.ffn.layers.0.0": f"{own}.mlp.fc1", f"{block}.ffn.layers.1": f"{own}.mlp.fc2"}
    return names


def _convnext() -> dict[str, str]:
    names = {f"backbone.downsample_layers.0.{i}": f"{OURS}.stem_{i}" for i in (0, 1)}
    layers = {"depthwise_conv": "conv_dw", "norm": "norm", "pointwise_conv1": "mlp.fc1", "pointwise_conv2": "mlp.fc2"}
    for stage in range(4):
        if stage > 0:
            names[f"backbone.downsample_layers.{stage}"] = f"{OURS}.stages_{stage}.downsample"
        for i in range(MOST_BLOCKS):
            block, own = f"backbone.stages.{stage}.{i}", f"{OURS}.stages_{stage}.blocks.{i}"
            names |= {f"{block}.{theirs}": f"{own}.{ours}" for theirs, ours in layers.items()}
            names[f"{block}.gamma"] = f"{own}.gamma"
    return names


def _output_norms() -> dict[str, str]:
    return {f"backbone.norm{stage}": f"backbone.output_norms.{stage}" for stage in range(4)}
