"""A detector's architecture, read from its tensors under our names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tailseg.errors import UserError

State = Mapping[str, Tensor]

BOTTLENECKS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
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
PLANES = (64, 128, 256, 512)
STEM = 64
LOSS_OF_EXTRA_LOGITS = {2: "seesaw", 1: "cross-entropy"}  # logits beyond those of the classes
MASK_IOU_WEIGHT = 0.5  # of the losses as published, where no configuration says another (spec, sections 13 and 21)
CONTEXT_WEIGHT = 3.0

Values = dict[str, Any]


def infer_model(state: State, num_classes: int | None, listed: int | None = None) -> tuple[Values, int]:
    """Recipe values of `model` and `classifier` that tensors decide, and the number of classes.

    Args:
        state: tensors under the names of our `Detector`, with a `ResNet` as its backbone.
        num_classes: if the file says it elsewhere.
        listed: number of classes if neither file nor tensors say it.

    Raises:
        UserError: a tensor that decides is missing, or two of them disagree.
    """
    stages = _count(state, "stages.{}.box_head.fc1.weight")
    if stages == 0:
        raise UserError("no box head was found; only Mask R-CNN and its cascades are converted")
    classes = _number_of_classes(state, num_classes, listed)
    logits = _shape(state, "stages.0.box_head.classifier.weight", 2)[0]
    loss = LOSS_OF_EXTRA_LOGITS.get(logits - classes)
    if loss is None:
        raise UserError(
            f"its classifier has {logits} logits for {classes} classes; softmax heads (one more) and Seesaw heads with "
            "objectness (two more) are converted"
        )
    masks = [t for t in range(stages) if f"stages.{t}.mask_head.predictor.weight" in state]
    if not masks:
        raise UserError("no mask head was found; only models that predict masks are converted")
    mask_head = f"stages.{masks[0]}.mask_head"
    rows, channels = _shape(state, f"{mask_head}.predictor.weight", 4)[:2]
    model: Values = {
        "backbone": infer_resnet(state),
        "neck": {
            "channels": _shape(state, "neck.lateral_convs.0.weight", 4)[0],
            "norm": "neck.output_norms.0.running_mean" in state,
        },
        "rpn": {"convs": 1 + _count(state, "rpn.first_convs.{}.weight")},
        "box_head": {
            "width": _shape(state, "stages.0.box_head.fc1.weight", 2)[0],
            "convs": _count(state, "stages.0.box_head.convs.{}.weight"),
            "class_agnostic": _shape(state, "stages.0.box_head.regressor.weight", 2)[0] == 4,
        },
        "mask_head": {
            "channels": channels,
            "convs": _count(state, mask_head + ".convs.{}.weight"),
            "norm": f"{mask_head}.norms.0.weight" in state,
            "upsample": "carafe" if f"{mask_head}.upsample.encoder.weight" in state else "deconv",
            "class_agnostic": rows == 1 and classes > 1,
        },
        "stages": [{"mask_weight": 1.0 if t in masks else 0.0} for t in range(stages)],
        **_further_heads(state),
    }
    return {"model": model, "classifier": {"loss": loss}}, classes


def _further_heads(state: State) -> Values:
    """Recipe values of the mask-IoU head and the context encoder, of those that there are."""
    model: Values = {}
    if "mask_iou.predictor.weight" in state:
        model["mask_iou"] = {
            "weight": MASK_IOU_WEIGHT,
            "channels": _shape(state, "mask_iou.convs.0.weight", 4)[0],
            "width": _shape(state, "mask_iou.fc1.weight", 2)[0],
        }
    if "context.classifier.weight" in state:
        model["context"] = {
            "weight": CONTEXT_WEIGHT,
            "convs": max(_count(state, "context.convs.{}.weight"), 1),
            "norm": "context.norms.0.weight" in state,
        }
    return model


def _number_of_classes(state: State, known: int | None, listed: int | None) -> int:
    """C, from whatever has a row a class."""
    told: dict[str, int] = {} if known is None else {"its own list of classes": known}
    for name, rows_a_class, dims in (
        ("mask_head.predictor", 1, 4),
        ("box_head.regressor", 4, 2),
        ("mask_iou.predictor", 1, 2),
        ("context.classifier", 1, 2),
    ):
        for key in state:
            if key.endswith(f"{name}.weight") and (rows := _shape(state, key, dims)[0]) > rows_a_class:
                told[f"'{key}'"] = rows // rows_a_class
    for key in state:
        if key.endswith("seesaw.counts"):
            told[f"'{key}'"] = _shape(state, key, 1)[0]
    if not told and listed is not None:
        return listed
    if not told:
        raise UserError("its tensors do not say how many classes it has; name them with --categories ANNOTATIONS.json")
    if len(set(told.values())) > 1:
        each = ", ".join(f"{count} by {source}" for source, count in told.items())
        raise UserError(f"the number of classes is not clear ({each}); the file is damaged or was edited")
    return next(iter(told.values()))


def infer_resnet(state: State) -> Values:
    """Recipe values of a ResNet or ResNeXt, from its depth, widths and groups."""
    prefix = "backbone.net."
    stem = _shape(state, f"{prefix}conv1.weight", 4)[0]
    depths = tuple(_count(state, f"{prefix}layer{i}.{{}}.conv1.weight") for i in range(1, 5))
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state
    depth = (BOTTLENECKS if bottleneck else BASIC_BLOCKS).get(depths)
    if depth is None:
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise UserError(f"its backbone has {depths} {kind} a stage; ResNets of 18 to 152 layers are converted")
    last = "conv3" if bottleneck else "conv1"
    widths = tuple(_shape(state, f"{prefix}layer{i}.0.{last}.weight", 4)[0] for i in range(1, 5))
    if not bottleneck:
        if stem != STEM:
            raise UserError(
                f"its backbone has basic blocks and a stem of {stem} channels; only one of {STEM} is converted"
            )
        options: Values = {} if widths == PLANES else {"channels": list(widths)}
        return {"name": f"resnet{depth}", "options": options}
    planes = tuple(width // 4 for width in widths)
    width, group_width = _shape(state, f"{prefix}layer1.0.conv2.weight", 4)[:2]
    groups, base_width = width // group_width, round(group_width * PLANES[0] / max(planes[0], 1))
    options = {} if planes == PLANES else {"channels": list(planes)}
    name = NAMED.get((depth, groups, base_width), f"resnet{depth}")
    if name == f"resnet{depth}" and (groups, base_width) != (1, 64):
        options |= {"cardinality": groups, "base_width": base_width}
    values: Values = {"name": name, "options": options}
    if deformable := _deformable_stages(state, depths):
        values["deformable_stages"] = deformable
    if stem != STEM:
        values["stem_channels"] = stem
    return values


def _deformable_stages(state: State, depths: Sequence[int]) -> list[int]:
    """Stages, from 1 on, whose bottlenecks have a deformable convolution."""
    stages = []
    for stage, depth in enumerate(depths, start=1):
        keys = [f"backbone.net.layer{stage}.{block}.conv2.conv_offset.weight" for block in range(depth)]
        found = [key in state for key in keys]
        if any(found) and not all(found):
            raise UserError(
                f"{sum(found)} of the {depth} bottlenecks of stage {stage} have deformable convolutions; all of a "
                "stage are converted, or none"
            )
        stages += [stage] if any(found) else []
    return stages


def _shape(state: State, key: str, dims: int) -> tuple[int, ...]:
    """Shape of a tensor that decides about the architecture: it must be there, have ``dims`` sides, none of them 0."""
    if key not in state:
        raise UserError(f"no tensor was found for our '{key}'; the file is incomplete or another kind of model")
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise UserError(f"'{key}' has shape {shape}, but {dims} sides were expected; the file is damaged or was edited")
    return shape


def _count(state: State, template: str) -> int:
    """Count the template's keys that are there in a row, from 0 on."""
    number = 0
    while template.format(number) in state:
        number += 1
    return number
