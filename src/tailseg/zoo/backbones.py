"""The backbone that tensors under our names belong to: a timm network and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tailseg.errors import UserError
from tailseg.zoo.backbone_families import infer_family

State = Mapping[str, Tensor]
Values = dict[str, Any]

PREFIX = "backbone.net."
BOTTLENECKS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
SPLIT_ATTENTION: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 24, 36, 3): 200}
BASIC_BLOCKS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
# timm's names of what is no plain ResNet: (depth, groups, base width).
NAMED = {
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 4): "resnext101_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (101, 64, 4): "resnext101_64x4d",
    (50, 1, 128): "wide_resnet50_2",
    (101, 1, 128): "wide_resnet101_2",
}
RESNESTS = {50: ("resnest50d", 32), 101: ("resnest101e", 64), 200: ("resnest200e", 64)}  # and the stem's width
RES2NETS = {50: ("res2net50d", 32), 101: ("res2net101d", 32)}
DEEP_STEMS = {50: ("resnet50d", 32), 101: ("resnet101d", 32), 152: ("resnet152d", 32)}
RES2NET_WIDTH, RES2NET_PARTS = 26, 4  # of a part at 64 channels, and their number
RADIX = 2
PLANES = (64, 128, 256, 512)
STEM = 64


def infer_backbone(state: State) -> Values:
    """Recipe values of the backbone.

    Args:
        state: tensors under our names, those of the backbone as timm's networks with `features_only` have them.

    Raises:
        UserError: it is of no family that is converted, or of another size.
    """
    other = infer_family(state)
    if other is not None:
        return other
    if f"{PREFIX}conv1.0.weight" in state:
        return _deep_stem(state)
    return infer_resnet(state)


def infer_resnet(state: State) -> Values:
    """Recipe values of a ResNet or ResNeXt, from its depth, widths and groups."""
    stem = tensor_shape(state, f"{PREFIX}conv1.weight", 4)[0]
    depths = _depths(state)
    bottleneck = f"{PREFIX}layer1.0.conv3.weight" in state
    depth = (BOTTLENECKS if bottleneck else BASIC_BLOCKS).get(depths)
    if depth is None:
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise UserError(f"its backbone has {depths} {kind} a stage; ResNets of 18 to 152 layers are converted")
    widths = _widths(state, "conv3" if bottleneck else "conv1")
    if not bottleneck:
        if stem != STEM:
            raise UserError(
                f"its backbone has basic blocks and a stem of {stem} channels; only one of {STEM} is converted"
            )
        options: Values = {} if widths == PLANES else {"channels": list(widths)}
        return {"name": f"resnet{depth}", "options": options}
    planes = tuple(width // 4 for width in widths)
    width, group_width = tensor_shape(state, f"{PREFIX}layer1.0.conv2.weight", 4)[:2]
    groups, base_width = width // group_width, round(group_width * PLANES[0] / max(planes[0], 1))
    options = {} if planes == PLANES else {"channels": list(planes)}
    name = NAMED.get((depth, groups, base_width), f"resnet{depth}")
    if name == f"resnet{depth}" and (groups, base_width) != (1, 64):
        options |= {"cardinality": groups, "base_width": base_width}
    if not any(key.startswith(PREFIX) and key.endswith("running_mean") for key in state):
        options["norm_layer"] = "groupnorm"
    values: Values = {"name": name, "options": options}
    values |= _context_blocks(state, depths, widths)
    if deformable := _stages_with(state, depths, "conv2.conv_offset.weight", "deformable convolutions"):
        values["deformable_stages"] = deformable
    if stem != STEM:
        values["stem_channels"] = stem
    return values


def _deep_stem(state: State) -> Values:
    """ResNeSt, Res2Net and ResNet-D: a stem of three 3x3 convolutions, and shortcuts that average."""
    depths = _depths(state)
    stem = tensor_shape(state, f"{PREFIX}conv1.0.weight", 4)[0]
    planes = tuple(width // 4 for width in _widths(state, "conv3"))
    options: Values = {} if planes == PLANES else {"channels": list(planes)}
    first, deformable = f"{PREFIX}layer1.0", "conv2"
    if f"{first}.conv2.fc1.weight" in state:
        kind, names, depth = "ResNeSt", RESNESTS, SPLIT_ATTENTION.get(depths)
        radix = tensor_shape(state, f"{first}.conv2.conv.weight", 4)[0] // max(planes[0], 1)
        if radix != RADIX:
            raise UserError(f"its ResNeSt has a radix of {radix}; one of {RADIX} is converted")
        deformable = "conv2.conv"
    elif f"{first}.convs.0.weight" in state:
        kind, names, depth = "Res2Net", RES2NETS, BOTTLENECKS.get(depths)
        parts = 1 + count_tensors(state, first + ".convs.{}.weight")
        width, usual = tensor_shape(state, f"{first}.convs.0.weight", 4)[0], planes[0] * RES2NET_WIDTH // PLANES[0]
        if (parts, width) != (RES2NET_PARTS, usual):
            raise UserError(
                f"its Res2Net has {parts} parts of {width} channels; {RES2NET_PARTS} of {usual} are converted"
            )
        deformable = "convs.0"
    else:
        kind, names, depth = "ResNet with a deep stem", DEEP_STEMS, BOTTLENECKS.get(depths)
    name, usual_stem = names.get(depth or 0, ("", 0))
    if not name:
        raise UserError(
            f"its backbone is a {kind} of {depths} bottlenecks a stage; those of {_listed(names)} layers are converted"
        )
    if stem != usual_stem:
        options["stem_width"] = stem
    values: Values = {"name": name, "options": options}
    values |= _context_blocks(state, depths, [4 * width for width in planes])
    if stages := _stages_with(state, depths, f"{deformable}.conv_offset.weight", "deformable convolutions"):
        values["deformable_stages"] = stages
    return values


def _depths(state: State) -> tuple[int, ...]:
    return tuple(count_tensors(state, f"{PREFIX}layer{i}.{{}}.conv1.weight") for i in range(1, 5))


def _widths(state: State, conv: str) -> tuple[int, ...]:
    """Output channels of this convolution in the first block of each stage."""
    return tuple(tensor_shape(state, f"{PREFIX}layer{i}.0.{conv}.weight", 4)[0] for i in range(1, 5))


def _listed(names: Mapping[int, Any]) -> str:
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}"


def _context_blocks(state: State, depths: Sequence[int], widths: Sequence[int]) -> Values:
    """Stages with GCNet's blocks, and the share of the channels that they have inside."""
    stages = _stages_with(state, depths, "se.attention.weight", "global context blocks")
    if not stages:
        return {}
    hidden = tensor_shape(state, f"{PREFIX}layer{stages[0]}.0.se.reduce.weight", 4)[0]
    return {"context_stages": stages, "context_ratio": hidden / widths[stages[0] - 1]}


def _stages_with(state: State, depths: Sequence[int], name: str, what: str) -> list[int]:
    """Stages, from 1 on, whose bottlenecks have a tensor of this name."""
    stages = []
    for stage, depth in enumerate(depths, start=1):
        found = [f"{PREFIX}layer{stage}.{block}.{name}" in state for block in range(depth)]
        if any(found) and not all(found):
            raise UserError(
                f"{sum(found)} of the {depth} bottlenecks of stage {stage} have {what}; all of a stage are converted, "
                "or none"
            )
        stages += [stage] if any(found) else []
    return stages


def tensor_shape(state: State, key: str, dims: int) -> tuple[int, ...]:
    """Shape of a tensor that decides about the architecture: it must be there, have ``dims`` sides, none of them 0."""
    if key not in state:
        raise UserError(f"no tensor was found for our '{key}'; the file is incomplete or another kind of model")
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise UserError(f"'{key}' has shape {shape}, but {dims} sides were expected; the file is damaged or was edited")
    return shape


def count_tensors(state: State, template: str) -> int:
    """Count the template's keys that are there in a row, from 0 on."""
    number = 0
    while template.format(number) in state:
        number += 1
    return number
