"""The configuration that mmdetection stores in a checkpoint, read as data, as recipe values.

It is Python text made of ``dict(...)`` calls and literals. It is parsed, never run; whatever is neither is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tailseg.errors import UserError
from tailseg.model.rpn import RATIOS, STRIDES

Config = Mapping[str, Any]
ROI_LEVELS = STRIDES[:4]
BATCH_NORMS = ("BN", "SyncBN", "MMSyncBN")
RESNETS = ("ResNet", "ResNeXt", "ResNetV1d", "ResNeSt", "Res2Net")
UPSAMPLING = {  # what the mask head's, a transposed convolution or CARAFE, must be where it is said
    "scale_factor": 2,
    "up_kernel": 5,
    "up_group": 1,
    "encoder_kernel": 3,
    "encoder_dilation": 1,
    "compressed_channels": 64,
}


@dataclass(frozen=True, slots=True)
class Conventions:
    """Settings of a configuration that tensors do not show."""

    values: dict[str, Any]  # nested like a recipe, without its classifier
    classifier: dict[str, Any]  # recipe values of the classifier
    blue_first: bool  # the network takes B, G, R


def read_config(meta: Mapping[str, Any]) -> Config | None:
    """The configuration in a checkpoint's ``meta`` (``cfg`` in 3.x, ``config`` in 2.x); None where none can be read."""
    text = meta.get("cfg", meta.get("config"))
    if not isinstance(text, str):
        return None
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = {
        target.id: _value(line.value)
        for line in body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }
    return found if isinstance(found.get("model"), dict) else None


def _value(node: ast.expr) -> Any:
    """A literal, or a ``dict(...)`` of literals; None for all else."""
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.Tuple(parts) | ast.List(parts):
            return [_value(part) for part in parts]
        case ast.Dict(keys, values):
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if isinstance(k, ast.Constant)}
        case ast.Call(ast.Name("dict"), [], keywords):
            return {word.arg: _value(word.value) for word in keywords if word.arg is not None}
    return None


def conventions(config: Config, stages: int) -> Conventions:
    """Recipe values of a configuration.

    Args:
        config: from `read_config`.
        stages: number of box heads that the tensors have.

    Raises:
        UserError: it asks for something that no recipe can say; names the key.
    """
    try:
        return _conventions(config, stages)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"its configuration holds what mmdetection would not take ({type(error).__name__}: {error}); save its "
            "state dict alone and give what tensors do not show with --set"
        ) from error


def _conventions(config: Config, stages: int) -> Conventions:
    model = config["model"]
    rpn, roi = _section(model, "rpn_head"), _section(model, "roi_head")
    _refuse_other_parts(model, roi)
    box_heads = _per_stage(roi, "bbox_head", stages)
    mask_heads = _per_stage(roi, "mask_head", stages)
    train, test = (_section(model, name) or _section(config, name) for name in ("train_cfg", "test_cfg"))
    _neck(_section(model, "neck"))
    pixels, blue_first = _pixels(config, model)
    values = {
        "model": {
            "backbone": _backbone(_section(model, "backbone")),
            "rpn": _rpn(rpn, train, test),
            "roi_pooling": _roi_pooling(roi),
            "box_head": _box_head(box_heads[0], _per_stage(train, "rcnn", stages)),
            "mask_head": _mask_head(mask_heads[0]),
            "mask_iou": _mask_iou(_section(roi, "mask_iou_head"), _per_stage(train, "rcnn", 1)[0]),
            "context": _context(_section(roi, "glbctx_head")),
            "stages": _stages(roi, box_heads, _per_stage(train, "rcnn", stages)),
            **pixels,
        },
        "data": _data(config),
        "test": _test(_section(test, "rcnn")),
    }
    return Conventions(values, _classifier(box_heads[0]), blue_first)


def _section(config: Any, key: str) -> dict[str, Any]:
    """The dict under a key; an empty one where there is none."""
    found = config.get(key) if isinstance(config, Mapping) else None
    return found if isinstance(found, dict) else {}


def _per_stage(config: Config, key: str, stages: int) -> list[dict[str, Any]]:
    """A dict for each stage, from a list of them or one for all."""
    found = config.get(key)
    rows = found if isinstance(found, list) else [found]
    rows = [row if isinstance(row, dict) else {} for row in rows] or [{}]
    return [*rows, *[rows[-1]] * stages][:stages]


def _known(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {key: value for key, value in values.items() if value is not None}


def _require(key: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value that would give other detections."""
    if value is not None and value not in allowed:
        only = f" (only {' or '.join(map(repr, allowed))})" if allowed else ""
        raise UserError(f"its configuration has {key} = {value!r}, which tailseg has not{only}; it is not converted")


def _refuse_other_parts(model: Config, roi: Config) -> None:
    _require("model.neck.type", _section(model, "neck").get("type"), ("FPN",))
    for part in ("semantic_head", "feat_relay_head"):  # of HTC and SCNet
        _require(f"model.roi_head.{part}.type", _section(roi, part).get("type"), ())
    _require("model.roi_head.mask_info_flow", roi.get("mask_info_flow"), (False,))


def _refuse_other_norms(part: Config, where: str) -> None:
    norm = _section(part, "norm_cfg")
    _require(f"{where}.norm_cfg.type", norm.get("type"), BATCH_NORMS)
    _require(f"{where}.norm_cfg.eps", norm.get("eps"), (1e-5,))


def _neck(neck: Config) -> None:
    _refuse_other_norms(neck, "model.neck")
    _require("model.neck.act_cfg.type", _section(neck, "act_cfg").get("type"), ())
    _require("model.neck.upsample_cfg.mode", _section(neck, "upsample_cfg").get("mode"), ("nearest",))


def _backbone(backbone: Config) -> dict[str, Any]:
    _require("model.backbone.type", backbone.get("type"), RESNETS)
    _require("model.backbone.avg_down_stride", backbone.get("avg_down_stride"), (True,))
    _require("model.backbone.style", backbone.get("style"), ("pytorch", "caffe"))
    norm_eval, norm = backbone.get("norm_eval"), _section(backbone, "norm_cfg")
    _require("model.backbone.norm_cfg.type", norm.get("type"), BATCH_NORMS)
    return _known(
        frozen_stages=backbone.get("frozen_stages"),
        train_norm=None if norm_eval is None else not norm_eval,
        norm_eps=norm.get("eps"),
        stride_in_1x1=True if backbone.get("style") == "caffe" else None,
    )


def _rpn(rpn: Config, train: Config, test: Config) -> dict[str, Any]:
    anchors = _section(rpn, "anchor_generator")
    where = "model.rpn_head.anchor_generator"
    _require(f"{where}.type", anchors.get("type"), ("AnchorGenerator",))
    _require(f"{where}.center_offset", anchors.get("center_offset"), (0,))
    _require("model.rpn_head.bbox_coder.target_stds", _section(rpn, "bbox_coder").get("target_stds"), ([1] * 4,))
    _require(f"{where}.ratios", anchors.get("ratios"), (list(RATIOS),))
    _require(f"{where}.strides", anchors.get("strides"), (list(STRIDES),))
    _require(f"{where}.octave_base_scale", anchors.get("octave_base_scale"), ())
    scales = anchors.get("scales")
    if scales is not None and len(scales) != 1:
        _require(f"{where}.scales", scales, ([8],))
    _require("model.rpn_head.loss_cls.use_sigmoid", _section(rpn, "loss_cls").get("use_sigmoid"), (True,))
    proposals, at_test = _section(train, "rpn_proposal"), _section(test, "rpn")
    return _known(
        anchor_scale=None if scales is None else float(scales[0]),
        box_beta=_beta(rpn, "model.rpn_head"),
        inside_image=True if _section(train, "rpn").get("allowed_border") == 0 else None,
        pre_nms_train=proposals.get("nms_pre"),
        post_nms_train=proposals.get("max_per_img"),
        pre_nms_test=at_test.get("nms_pre"),
        post_nms_test=at_test.get("max_per_img"),
        nms_iou=_nms_iou(at_test, "model.test_cfg.rpn"),
    )


def _nms_iou(rules: Config, where: str) -> float | None:
    """Threshold of plain NMS, ``iou_thr`` in old versions."""
    nms = _section(rules, "nms")
    _require(f"{where}.nms.type", nms.get("type"), ("nms",))
    _require(f"{where}.nms.class_agnostic", nms.get("class_agnostic"), (False,))
    _require(f"{where}.min_bbox_size", rules.get("min_bbox_size"), (0,))
    return nms.get("iou_threshold", nms.get("iou_thr"))


def _beta(head: Config, where: str) -> float | None:
    """Beta of a head's box loss; 0 is L1."""
    loss = _section(head, "loss_bbox")
    _require(f"{where}.loss_bbox.type", loss.get("type"), ("L1Loss", "SmoothL1Loss"))
    _require(f"{where}.reg_decoded_bbox", head.get("reg_decoded_bbox"), (False,))
    if "type" not in loss:
        return None
    return 0.0 if loss["type"] == "L1Loss" else float(loss.get("beta", 1.0))


def _roi_pooling(roi: Config) -> dict[str, Any]:
    pooling: dict[str, Any] = {}
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        for extractor in _per_stage(roi, name, 1):
            layer, where = _section(extractor, "roi_layer"), f"model.roi_head.{name}"
            _require(f"{where}.type", extractor.get("type"), ("SingleRoIExtractor",))
            _require(f"{where}.roi_layer.type", layer.get("type"), ("RoIAlign",))
            _require(f"{where}.featmap_strides", extractor.get("featmap_strides"), (list(ROI_LEVELS),))
            _require(f"{where}.finest_scale", extractor.get("finest_scale"), (56,))
            found = _known(sampling_ratio=layer.get("sampling_ratio"), aligned=layer.get("aligned"))
            for key, value in found.items():
                _require(f"{where}.roi_layer.{key}", value, (pooling.get(key, value),))
            pooling |= found
    return pooling


def _box_head(head: Config, train: Sequence[Config]) -> dict[str, Any]:
    sampler, assigner = _section(train[0], "sampler"), _section(train[0], "assigner")
    rois, share = sampler.get("num"), sampler.get("pos_fraction")
    _refuse_other_norms(head, "model.roi_head.bbox_head")
    return _known(
        box_beta=_beta(head, "model.roi_head.bbox_head"),
        low_quality=assigner.get("match_low_quality"),
        rois=rois,
        max_positive=None if rois is None or share is None else int(rois * share),
    )


def _mask_head(head: Config) -> dict[str, Any]:
    upsampling, where = _section(head, "upsample_cfg"), "model.roi_head.mask_head"
    _refuse_other_norms(head, where)
    _require(f"{where}.upsample_cfg.type", upsampling.get("type"), ("deconv", "carafe"))
    for key, ours in UPSAMPLING.items():
        _require(f"{where}.upsample_cfg.{key}", upsampling.get(key), (ours,))
    return _predictor(head, "predictor_cfg", "NormedConv2d")


def _mask_iou(head: Config, train: Config) -> dict[str, Any]:
    """Weight of the mask-IoU head's loss, of which mmdetection has 0.5 by default, but 1 of a loss that says none."""
    if not head:
        return {}
    loss, where = _section(head, "loss_iou"), "model.roi_head.mask_iou_head"
    _require(f"{where}.type", head.get("type"), ("MaskIoUHead",))
    _require(f"{where}.loss_iou.type", loss.get("type"), ("MSELoss",))
    _require("model.train_cfg.rcnn.mask_thr_binary", train.get("mask_thr_binary"), (0.5,))
    return {"weight": float(loss.get("loss_weight", 1.0))} if loss else {}


def _context(head: Config) -> dict[str, Any]:
    """Weight of the context encoder's loss, 1 by mmdetection's default."""
    if not head:
        return {}
    _require("model.roi_head.glbctx_head.type", head.get("type"), ("GlobalContextHead",))
    _refuse_other_norms(head, "model.roi_head.glbctx_head")
    return {"weight": float(head.get("loss_weight", 1.0))}


def _predictor(head: Config, key: str, normalized: str) -> dict[str, Any]:
    """A predictor's normalisation; mmdetection misspells the temperature."""
    predictor = _section(head, key)
    if predictor.get("type") != normalized:
        return {"normalized": False} if head else {}
    tau = predictor.get("tempearture", predictor.get("temperature", 20))
    return {"normalized": True, "temperature": float(tau)}


def _stages(roi: Config, heads: Sequence[Config], train: Sequence[Config]) -> list[dict[str, Any]]:
    weights = roi.get("stage_loss_weights") or [1.0] * len(heads)
    of_masks = [sum(weights)] * len(weights) if roi.get("type") == "SCNetRoIHead" else weights
    rows = []
    for head, rules, weight, mask_weight in zip(heads, train, weights, of_masks, strict=False):
        coder = _section(head, "bbox_coder")
        kind = coder.get("type")
        _require("model.roi_head.bbox_head.bbox_coder.type", kind, ("DeltaXYWHBBoxCoder",))
        _require("model.roi_head.bbox_head.bbox_coder.target_means", coder.get("target_means"), ([0.0] * 4,))
        rows.append(
            _known(
                iou=_section(rules, "assigner").get("pos_iou_thr"),
                stds=coder.get("target_stds"),
                weight=float(weight),
                mask_weight=float(mask_weight),
            )
        )
    return rows


def _classifier(head: Config) -> dict[str, Any]:
    loss = _section(head, "loss_cls")
    if not loss:
        return {}
    where = "model.roi_head.bbox_head.loss_cls"
    _require(f"{where}.type", loss.get("type"), ("SeesawLoss", "CrossEntropyLoss"))
    _require(f"{where}.use_sigmoid", loss.get("use_sigmoid"), (False,))
    values = _predictor(head, "cls_predictor_cfg", "NormedLinear")
    if loss.get("type") == "SeesawLoss":
        values |= {"p": float(loss.get("p", 0.8)), "q": float(loss.get("q", 2.0))}
    return values


def _pixels(config: Config, model: Config) -> tuple[dict[str, Any], bool]:
    """Mean and deviation in the order R, G, B; and whether the network takes them the other way round."""
    new, old = _section(model, "data_preprocessor"), _section(config, "img_norm_cfg")
    about = new or old
    mean, std = about.get("mean"), about.get("std")
    if mean is None or std is None:
        return {}, False
    blue_first = not (new.get("bgr_to_rgb", False) if new else old.get("to_rgb", True))  # each by its own default
    if blue_first:
        mean, std = mean[::-1], std[::-1]
    return {"pixel_mean": mean, "pixel_std": std}, blue_first


def _data(config: Config) -> dict[str, Any]:
    """Image sizes; scales are (long, short) or (short, long)."""
    test = [scale for step in _steps(config, "test_pipeline") for scale in _scales(step)]
    train = [scale for step in _steps(config, "train_pipeline") for scale in _scales(step)]
    values: dict[str, Any] = {}
    if test:
        values |= {"test_short_edge": min(test[0]), "long_edge": max(test[0])}
    if train:
        values["short_edges"] = sorted({min(scale) for scale in train})
    return values


def _steps(config: Config, key: str) -> Iterator[Config]:
    for step in config.get(key) or ():
        if isinstance(step, dict):
            yield step


def _scales(step: Config) -> list[list[int]]:
    """The sizes that a resizing step fits images into; none for other steps and for sizes drawn from a range."""
    if step.get("type") not in ("Resize", "RandomChoiceResize", "MultiScaleFlipAug"):
        return []
    if step.get("multiscale_mode") == "range" or step.get("keep_ratio") is False:
        return []
    found = step.get("scales") or step.get("scale") or step.get("img_scale")
    rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    return [row for row in rows if isinstance(row, list) and len(row) == 2 and all(type(side) is int for side in row)]


def _test(rcnn: Config) -> dict[str, Any]:
    _require("model.test_cfg.rcnn.mask_thr_binary", rcnn.get("mask_thr_binary"), (0.5,))
    return _known(
        score_threshold=rcnn.get("score_thr"),
        nms_iou=_nms_iou(rcnn, "model.test_cfg.rcnn"),
        max_detections=rcnn.get("max_per_img"),
    )
