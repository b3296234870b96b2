"""Mask R-CNN R50-FPN and R101-FPN of detectron2, for COCO and LVIS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tailseg.errors import UserError
from tailseg.yaml_files import read_yaml
from tailseg.zoo.checkpoint_files import read_checkpoint
from tailseg.zoo.conversion import ForeignModel, change, rename, rpn_convs, state_dict_of
from tailseg.zoo.deformable import modulate

MOST_BLOCKS, MOST_CONVS = 40, 16  # of a stage of the backbone; of the mask head
IGNORED = ("proposal_generator.anchor_generator.", "pixel_mean", "pixel_std")
LVIS_CLASSES = (1203, 1230)  # of v1 and v0.5
# Model zoo: ResNets start from weights that were trained on B, G, R with a deviation of 1 and strides in the 1x1
# convolutions, ResNeXts from others.
RED_FIRST_MEAN = [123.675, 116.28, 103.53]
VALUES: dict[str, Any] = {
    "model": {"box_head": {"low_quality": False}},
    "test": {"score_threshold": 0.05, "max_detections": 100, "min_size": 0.0},
}
KEYS = {  # of config.yaml -> of a recipe
    "MODEL.RESNETS.STRIDE_IN_1X1": "model.backbone.stride_in_1x1",
    "MODEL.RPN.SMOOTH_L1_BETA": "model.rpn.box_beta",
    "MODEL.RPN.NMS_THRESH": "model.rpn.nms_iou",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "model.rpn.pre_nms_train",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "model.rpn.pre_nms_test",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "model.rpn.post_nms_train",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "model.rpn.post_nms_test",
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": "model.box_head.box_beta",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "model.roi_pooling.sampling_ratio",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "model.box_head.rois",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "test.score_threshold",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "test.nms_iou",
    "TEST.DETECTIONS_PER_IMAGE": "test.max_detections",
    "INPUT.MIN_SIZE_TRAIN": "data.short_edges",
    "INPUT.MIN_SIZE_TEST": "data.test_short_edge",
    "INPUT.MAX_SIZE_TEST": "data.long_edge",
}
FIXED: dict[str, Any] = {  # what a recipe cannot say otherwise
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    "MODEL.RPN.BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
    "MODEL.FPN.FUSE_TYPE": "sum",
}
NO_CONFIGURATION = (
    "has no config.yaml beside it: what its tensors do not show is taken from detectron2's model zoo (order and scale "
    "of the colours, strides, thresholds, image sizes); put the run's config.yaml there, or fix it with --set"
)


def read_detectron2(path: Path) -> ForeignModel:
    """A checkpoint of detectron2 (``.pkl`` of the model zoo, or ``.pth``) under our names.

    What its tensors do not show comes from the ``config.yaml`` that detectron2 writes beside its checkpoints, and where
    there is none from the model zoo.

    Raises:
        UserError: the checkpoint cannot be read safely, or the configuration is broken. One that asks for what we have
            not is the model's `refusal`.
    """
    tensors = state_dict_of(read_checkpoint(path), path, ("model",))
    source = path.with_name("config.yaml")
    config = _read_config(source)
    unused = [key for key in tensors if key.startswith(IGNORED)]
    prefixes = _prefixes() | rpn_convs(tensors, "proposal_generator.rpn_head.conv.conv{}")
    origins, unknown = rename((key for key in tensors if key not in unused), prefixes)
    state = {ours: tensors[theirs] for ours, theirs in origins.items()}
    modulate(state, origins, path)
    values, refusal = VALUES, _other_norm(tensors, path)
    try:
        values = _merged(VALUES, _zoo(state, tensors) if config is None else _configured(config, source))
    except UserError as error:
        refusal = str(error)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{source}: holds what detectron2 would not take ({error}); fix or remove it") from error
    if config is None or _blue_first(config):
        change(state, path, "backbone.net.conv1.weight", lambda weight: weight.flip(1))
    return ForeignModel(
        project="detectron2",
        path=path,
        state=state,
        origins=origins,
        unknown=unknown,
        unused=unused,
        refusal=refusal,
        values=values,
        remarks=[f"{path} {NO_CONFIGURATION}."] if config is None else [],
    )


def _other_norm(tensors: Mapping[str, Tensor], path: Path) -> str | None:
    """The sentence that refuses norm without running statistics."""
    for key in tensors:
        if key.endswith(".norm.weight") and key.removesuffix("weight") + "running_mean" not in tensors:
            return f"{path}: '{key}' has no running mean beside it, as group norm has none; batch norm is converted"
    return None


def _zoo(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model zoo's conventions, as recipe values."""
    conv = state.get("backbone.net.layer1.0.conv2.weight")
    plain = conv is None or conv.shape[0] == conv.shape[1]
    mean, std = RED_FIRST_MEAN, [1.0, 1.0, 1.0] if plain else [58.395, 57.12, 57.375]
    if "pixel_mean" in tensors and "pixel_std" in tensors:  # stored by old versions, in the order B, G, R
        mean, std = (tensors[key].flatten().flip(0).tolist() for key in ("pixel_mean", "pixel_std"))
    values: dict[str, Any] = {
        "model": {"backbone": {"stride_in_1x1": plain}, "pixel_mean": mean, "pixel_std": std},
        "test": {},
    }
    logits = state.get("stages.0.box_head.classifier.bias")
    if logits is not None and len(logits) - 1 in LVIS_CLASSES:
        values["test"] = {"score_threshold": 1e-4, "max_detections": 300}
    return values


def _configured(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """A configuration's conventions, as recipe values."""
    for key, value in FIXED.items():
        found = _at(config, key)
        if found is not None and found != value:
            raise UserError(f"{source}: {key} is {found}, which tailseg has not (only {value}); it is not converted")
    values: dict[str, Any] = {}
    for theirs, ours in KEYS.items():
        value = _at(config, theirs)
        if value is not None:
            _put(values, ours, value)
    pooler = _at(config, "MODEL.ROI_BOX_HEAD.POOLER_TYPE")
    if pooler is not None:
        _put(values, "model.roi_pooling.aligned", pooler == "ROIAlignV2")
    weights = _at(config, "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS")
    if weights is not None:
        _put(values, "model.stages", [{"stds": [1 / weight for weight in weights]}])
    for name in ("pixel_mean", "pixel_std"):
        value = _at(config, f"MODEL.{name.upper()}")
        if value is not None:
            _put(values, f"model.{name}", value[::-1] if _blue_first(config) else value)
    return values


def _blue_first(config: Mapping[str, Any]) -> bool:
    return (_at(config, "INPUT.FORMAT") or "BGR") == "BGR"


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    config = read_yaml(path, fix="fix or remove it", aliases=True)
    return config if isinstance(config, dict) and isinstance(config.get("MODEL"), dict) else None


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _prefixes() -> dict[str, str]:
    """Their names -> ours."""
    names = {
        "backbone.bottom_up.stem.conv1": "backbone.net.conv1",
        "backbone.bottom_up.stem.conv1.norm": "backbone.net.bn1",
        "proposal_generator.rpn_head.conv": "rpn.conv",
        "proposal_generator.rpn_head.objectness_logits": "rpn.objectness",
        "proposal_generator.rpn_head.anchor_deltas": "rpn.deltas",
        "roi_heads.box_head.fc1": "stages.0.box_head.fc1",
        "roi_heads.box_head.fc2": "stages.0.box_head.fc2",
        "roi_heads.box_predictor.cls_score": "stages.0.box_head.classifier",
        "roi_heads.box_predictor.bbox_pred": "stages.0.box_head.regressor",
        "roi_heads.mask_head.deconv": "stages.0.mask_head.upsample",
        "roi_heads.mask_head.predictor": "stages.0.mask_head.predictor",
    }
    for i in range(MOST_CONVS):
        for theirs, ours in (("mask_head.mask_fcn", "mask_head"), ("box_head.conv", "box_head")):
            names[f"roi_heads.{theirs}{i + 1}"] = f"stages.0.{ours}.convs.{i}"
            names[f"roi_heads.{theirs}{i + 1}.norm"] = f"stages.0.{ours}.norms.{i}"
    for i in range(4):
        for part in ("lateral", "output"):
            names[f"backbone.fpn_{part}{i + 2}"] = f"neck.{part}_convs.{i}"
            names[f"backbone.fpn_{part}{i + 2}.norm"] = f"neck.{part}_norms.{i}"
        for block in range(MOST_BLOCKS):
            theirs, ours = f"backbone.bottom_up.res{i + 2}.{block}", f"backbone.net.layer{i + 1}.{block}"
            names[f"{theirs}.shortcut"] = f"{ours}.downsample.0"
            names[f"{theirs}.conv2_offset"] = f"{ours}.conv2.conv_offset"
            names[f"{theirs}.shortcut.norm"] = f"{ours}.downsample.1"
            for conv in (1, 2, 3):
                names[f"{theirs}.conv{conv}"] = f"{ours}.conv{conv}"
                names[f"{theirs}.conv{conv}.norm"] = f"{ours}.bn{conv}"
    return names
