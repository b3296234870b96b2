"""Mask R-CNN and Cascade Mask R-CNN of detectron2, for COCO and LVIS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tailseg.errors import UserError
from tailseg.losses import CLASSIFICATIONS
from tailseg.model.box_head import ROI_SIZE as BOX_ROI_SIZE
from tailseg.model.mask_head import ROI_SIZE as MASK_ROI_SIZE
from tailseg.yaml_files import read_yaml
from tailseg.zoo.checkpoint_files import read_checkpoint
from tailseg.zoo.conversion import ForeignModel, change, faults_named, rename, rpn_convs, state_dict_of
from tailseg.zoo.deformable import modulate

CONFIGURATION = "config.yaml"  # beside a checkpoint, where detectron2 writes it
PREDICTOR = "roi_heads.box_predictor"
STAGES = 3  # of a cascade
COSINE_SCALE = 20.0  # of TFA, where its configuration says no other
MOST_CLASSES = 1 << 20  # all of them
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
IOUS = (0.5, 0.6, 0.7)
CASCADE: dict[str, Any] = {  # of the model zoo; the scores of the stages are averaged, not their logits
    "model": {
        "stages": [
            {"iou": iou, "stds": [std / 10, std / 10, std / 5, std / 5]}
            for iou, std in zip(IOUS, (1.0, 0.5, 1 / 3), strict=True)
        ],
        "rpn": {"post_nms_train": 2000},
    },
    "test": {"stage_average": "scores"},
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
    "MODEL.FPN.FUSE_TYPE": "sum",
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": BOX_ROI_SIZE,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": MASK_ROI_SIZE,
}
CHOICES = {  # the same, where there are several
    "INPUT.FORMAT": ("BGR", "RGB"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
}
POOLING = {"POOLER_TYPE": "ROIAlignV2", "POOLER_SAMPLING_RATIO": 0}  # of both heads alike, with detectron2's defaults
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
    with faults_named(path):
        return _read(path)


def _read(path: Path) -> ForeignModel:
    tensors = state_dict_of(read_checkpoint(path), path, ("model",))
    source = path.with_name(CONFIGURATION)
    config = _read_config(source)
    unused = [key for key in tensors if key.startswith(IGNORED) or key.endswith(".box_predictor.scale")]
    stages = STAGES if any(key.startswith(f"{PREDICTOR}.{STAGES - 1}.") for key in tensors) else 1
    prefixes = _prefixes(stages) | rpn_convs(tensors, "proposal_generator.rpn_head.conv.conv{}")
    origins, unknown = rename((key for key in tensors if key not in unused), prefixes)
    state = {ours: tensors[theirs] for ours, theirs in origins.items()}
    modulate(state, origins, path)
    values, refusal, loss, classifier = VALUES, None, None, dict[str, Any]()
    try:
        classifier = _cosine(state, tensors, config)
        values = _merged(VALUES, CASCADE if stages > 1 else {})
        values = _merged(values, _zoo(state, tensors) if config is None else _configured(config, source, stages))
        if config is not None and _at(config, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"):
            loss = "federated"
            classifier |= _federated(config)
            # Its sigmoids have a row for background, too, which plays no part.
            for part in ("weight", "bias"):
                change(state, path, f"box_head.classifier.{part}", lambda rows: rows[:-1])
    except UserError as error:
        refusal = str(error)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if config is None:  # then it is the tensors' fault
            raise
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
        loss=loss,
        refusal=refusal,
        values=values,
        classifiers=dict.fromkeys(CLASSIFICATIONS, classifier),
        remarks=[f"{path} {NO_CONFIGURATION}."] if config is None else [],
    )


def _cosine(state: dict[str, Tensor], tensors: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    """Values of a classifier without bias, which compares directions (TFA, arXiv 2003.06957); it gets a bias of 0."""
    values: dict[str, Any] = {}
    for stage in range(STAGES):
        key = f"stages.{stage}.box_head.classifier"
        weight = state.get(f"{key}.weight")
        if weight is not None and weight.dim() == 2 and f"{key}.bias" not in state:
            state[f"{key}.bias"] = weight.new_zeros(len(weight))
            said = _at(config, "MODEL.ROI_HEADS.COSINE_SCALE")
            learnt = [float(tensor) for name, tensor in tensors.items() if name.endswith(".box_predictor.scale")]
            values = {"normalized": True, "temperature": learnt[0] if learnt else float(said or COSINE_SCALE)}
    return values


def _federated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the federated loss; where it is not used, all classes count."""
    about = _section(config, "MODEL.ROI_BOX_HEAD")
    if not about.get("USE_FED_LOSS"):
        return {"sampled": MOST_CLASSES}
    return {"sampled": about.get("FED_LOSS_NUM_CLASSES", 50), "power": about.get("FED_LOSS_FREQ_WEIGHT_POWER", 0.5)}


def _zoo(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model zoo's conventions, as recipe values."""
    conv = state.get("backbone.net.layer1.0.conv2.weight")
    plain = conv is None or conv.shape[0] == conv.shape[1]
    grouped = not any(key.startswith("backbone.net.") and key.endswith("running_mean") for key in state)
    mean, std = RED_FIRST_MEAN, [1.0, 1.0, 1.0] if plain else [58.395, 57.12, 57.375]
    if "pixel_mean" in tensors and "pixel_std" in tensors:  # stored by old versions, in the order B, G, R
        mean, std = (tensors[key].flatten().flip(0).tolist() for key in ("pixel_mean", "pixel_std"))
    values: dict[str, Any] = {
        "model": {"backbone": {"stride_in_1x1": plain and not grouped}, "pixel_mean": mean, "pixel_std": std},
        "test": {},
    }
    logits = state.get("stages.0.box_head.classifier.bias")
    if logits is not None and len(logits) - 1 in LVIS_CLASSES:
        values["test"] = {"score_threshold": 1e-4, "max_detections": 300}
    return values


def _configured(config: Mapping[str, Any], source: Path, stages: int) -> dict[str, Any]:
    """A configuration's conventions, as recipe values."""
    allowed = {key: (value,) for key, value in FIXED.items()} | CHOICES
    for key, default in POOLING.items():
        box = _at(config, f"MODEL.ROI_BOX_HEAD.{key}")
        allowed[f"MODEL.ROI_MASK_HEAD.{key}"] = (default if box is None else box,)
    for key, values_of_ours in allowed.items():
        found = _at(config, key)
        if found is not None and found not in values_of_ours:
            only = " or ".join(map(str, values_of_ours))
            raise UserError(f"{source}: {key} is {found}, which tailseg has not (only {only}); it is not converted")
    values: dict[str, Any] = {}
    for theirs, ours in KEYS.items():
        value = _at(config, theirs)
        if value is not None:
            _put(values, ours, value)
    pooler = _at(config, "MODEL.ROI_BOX_HEAD.POOLER_TYPE")
    if pooler is not None:
        _put(values, "model.roi_pooling.aligned", pooler == "ROIAlignV2")
    cascade = _section(config, "MODEL.ROI_BOX_CASCADE_HEAD") if stages > 1 else {}
    weights = [_at(config, "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS")] if stages == 1 else cascade.get("BBOX_REG_WEIGHTS")
    ious = cascade.get("IOUS", IOUS)[-stages:]
    if weights and weights[0] is not None:
        if len(weights) != len(ious) or len(ious) != stages:
            found = len(weights)
            raise UserError(f"{source}: MODEL.ROI_BOX_CASCADE_HEAD is for {found} stages, the checkpoint has {stages}")
        rows: list[dict[str, Any]] = [{"stds": [1 / weight for weight in row]} for row in weights]
        rows = [row | ({} if stages == 1 else {"iou": iou}) for row, iou in zip(rows, ious, strict=True)]
        _put(values, "model.stages", rows)
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


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = _at(config, key)
    return found if isinstance(found, Mapping) else {}


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


def _prefixes(stages: int) -> dict[str, str]:
    """Their names -> ours."""
    names = {
        "backbone.bottom_up.stem.conv1": "backbone.net.conv1",
        "backbone.bottom_up.stem.conv1.norm": "backbone.net.bn1",
        "proposal_generator.rpn_head.conv": "rpn.conv",
        "proposal_generator.rpn_head.objectness_logits": "rpn.objectness",
        "proposal_generator.rpn_head.anchor_deltas": "rpn.deltas",
    }
    mask = f"stages.{stages - 1}.mask_head"  # a cascade has one, which the last stage's boxes go to
    names |= {"roi_heads.mask_head.deconv": f"{mask}.upsample", "roi_heads.mask_head.predictor": f"{mask}.predictor"}
    for i in range(MOST_CONVS):
        names[f"roi_heads.mask_head.mask_fcn{i + 1}"] = f"{mask}.convs.{i}"
        names[f"roi_heads.mask_head.mask_fcn{i + 1}.norm"] = f"{mask}.norms.{i}"
    for stage in range(stages):
        number, ours = f".{stage}" if stages > 1 else "", f"stages.{stage}.box_head"
        box, predictor = f"roi_heads.box_head{number}", f"{PREDICTOR}{number}"
        names |= {f"{box}.fc1": f"{ours}.fc1", f"{box}.fc2": f"{ours}.fc2"}
        names |= {f"{predictor}.cls_score": f"{ours}.classifier", f"{predictor}.bbox_pred": f"{ours}.regressor"}
        for i in range(MOST_CONVS):
            names |= {f"{box}.conv{i + 1}": f"{ours}.convs.{i}", f"{box}.conv{i + 1}.norm": f"{ours}.norms.{i}"}
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
