"""A detector's architecture, read from its tensors under our names."""

from __future__ import annotations

from typing import Any

from tailseg.errors import UserError
from tailseg.zoo.backbones import State, count_tensors, infer_backbone, tensor_shape

LOSS_OF_EXTRA_LOGITS = {0: "eql", 1: "cross-entropy", 2: "seesaw", 6: "group-softmax"}  # beyond those of the classes
MASK_IOU_WEIGHT = 0.5  # of the losses as published, where no configuration says another
CONTEXT_WEIGHT = 3.0

Values = dict[str, Any]


def infer_model(
    state: State, num_classes: int | None, listed: int | None = None, loss: str | None = None
) -> tuple[Values, int]:
    """Recipe values of `model` and `classifier` that tensors decide, and the number of classes.

    Args:
        state: tensors under the names of our `Detector`, those of the backbone as timm names them.
        num_classes: if the file says it elsewhere.
        listed: number of classes if neither file nor tensors say it.
        loss: of the classifier, if the file says it elsewhere.

    Raises:
        UserError: a tensor that decides is missing, or two of them disagree.
    """
    stages = count_tensors(state, "stages.{}.box_head.fc1.weight")
    if stages == 0:
        raise UserError("no box head was found; only Mask R-CNN and its cascades are converted")
    classes = _number_of_classes(state, num_classes, listed)
    logits = tensor_shape(state, "stages.0.box_head.classifier.weight", 2)[0]
    if any(key.endswith("classification.positive_gradients") for key in state):
        loss = "eql-v2"
    loss = loss or LOSS_OF_EXTRA_LOGITS.get(logits - classes)
    if loss is None:
        raise UserError(
            f"its classifier has {logits} logits for {classes} classes; sigmoid heads (as many), softmax heads (one "
            "more), Seesaw heads with objectness (two more) and group softmax heads (six more) are converted"
        )
    masks = [t for t in range(stages) if f"stages.{t}.mask_head.predictor.weight" in state]
    if not masks:
        raise UserError("no mask head was found; only models that predict masks are converted")
    mask_head = f"stages.{masks[0]}.mask_head"
    rows, channels = tensor_shape(state, f"{mask_head}.predictor.weight", 4)[:2]
    model: Values = {
        "backbone": infer_backbone(state),
        "neck": _neck(state),
        "rpn": _rpn(state),
        "box_head": {
            "width": tensor_shape(state, "stages.0.box_head.fc1.weight", 2)[0],
            **_box_convolutions(state),
            "class_agnostic": tensor_shape(state, "stages.0.box_head.regressor.weight", 2)[0] == 4,
        },
        "mask_head": {
            "channels": channels,
            "convs": count_tensors(state, mask_head + ".convs.{}.weight"),
            "norm": _norm(state, f"{mask_head}.norms."),
            "flow": any(".mask_head.flow." in key for key in state),
            "upsample": "carafe" if f"{mask_head}.upsample.encoder.weight" in state else "deconv",
            "class_agnostic": rows == 1 and classes > 1,
        },
        "stages": [{"mask_weight": 1.0 if t in masks else 0.0} for t in range(stages)],
        **_further_heads(state),
    }
    return {"model": model, "classifier": {"loss": loss}}, classes


def _neck(state: State) -> Values:
    if "neck.reduction.weight" in state:
        return {"channels": tensor_shape(state, "neck.reduction.weight", 4)[0], "kind": "hrfpn"}
    values: Values = {"channels": tensor_shape(state, "neck.lateral_convs.0.weight", 4)[0]}
    if any(key.startswith("neck.pathways.") for key in state):
        pathways = {int(key.split(".")[2]) for key in state if key.startswith("neck.pathways.")}
        return values | {"kind": "fpg", "pathways": max(pathways) + 1}
    if any(key.startswith("neck.upsamplers.") for key in state):
        return values | {"kind": "fpn-carafe"}
    if "neck.down_convs.0.weight" in state:
        values["kind"] = "pafpn"
    return values | {"norm": _norm(state, "neck.output_norms.")}


def _rpn(state: State) -> Values:
    first = "rpn.first_convs.0.weight" if "rpn.first_convs.0.weight" in state else "rpn.conv.weight"
    width, channels = tensor_shape(state, first, 4)[:2]
    values: Values = {"convs": 1 + count_tensors(state, "rpn.first_convs.{}.weight")}
    return values if width == channels else values | {"width": width}


def _norm(state: State, beginning: str) -> bool | str:
    """None, batch norm, or group norm, which has no running statistics."""
    found = [key for key in state if key.startswith(beginning)]
    if not found:
        return False
    return True if any(key.endswith("running_mean") for key in found) else "group"


def _box_convolutions(state: State) -> Values:
    convs = count_tensors(state, "stages.0.box_head.convs.{}.weight")
    return {"convs": convs, "norm": _norm(state, "stages.0.box_head.norms.")} if convs else {"convs": 0}


def _further_heads(state: State) -> Values:
    """Recipe values of mask-IoU head, semantic branch, relay and context encoder, of those that there are."""
    model: Values = {}
    if "mask_iou.predictor.weight" in state:
        model["mask_iou"] = {
            "weight": MASK_IOU_WEIGHT,
            "channels": tensor_shape(state, "mask_iou.convs.0.weight", 4)[0],
            "width": tensor_shape(state, "mask_iou.fc1.weight", 2)[0],
        }
    if "semantic.embedding.weight" in state:
        model["semantic"] = {"enabled": True, "convs": max(count_tensors(state, "semantic.convs.{}.weight"), 1)}
    if "relay.fc.weight" in state:
        model["relay"] = {"enabled": True}
    if "context.classifier.weight" in state:
        model["context"] = {
            "weight": CONTEXT_WEIGHT,
            "convs": max(count_tensors(state, "context.convs.{}.weight"), 1),
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
            if key.endswith(f"{name}.weight") and (rows := tensor_shape(state, key, dims)[0]) > rows_a_class:
                told[f"'{key}'"] = rows // rows_a_class
    for key in state:
        if key.endswith("seesaw.counts"):
            told[f"'{key}'"] = tensor_shape(state, key, 1)[0]
    if not told and listed is not None:
        return listed
    if not told:
        raise UserError("its tensors do not say how many classes it has; name them with --categories ANNOTATIONS.json")
    if len(set(told.values())) > 1:
        each = ", ".join(f"{count} by {source}" for source, count in told.items())
        raise UserError(f"the number of classes is not clear ({each}); the file is damaged or was edited")
    return next(iter(told.values()))
