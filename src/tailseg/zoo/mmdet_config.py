"""A configuration of mmdetection, as recipe values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tailseg.errors import UserError
from tailseg.layers.norm import GROUPS
from tailseg.model.box_head import ROI_SIZE as BOX_ROI_SIZE
from tailseg.model.mask_head import ROI_SIZE as MASK_ROI_SIZE
from tailseg.model.rpn import RATIOS, STRIDES
from tailseg.zoo.mmdet_config_heads import (
    NORMS,
    box_head,
    box_loss_beta,
    classifier,
    classifier_loss,
    context,
    mask_head,
    mask_iou,
    refuse_other_coders,
    refuse_other_layers,
    refuse_other_norms,
    refuse_other_relays,
    refuse_other_semantics,
    refuse_other_upsampling,
    stage_rows,
    trained_otherwise,
)
from tailseg.zoo.mmdet_text import Config, known, per_stage, require, section

ROI_HEADS = (
    *("StandardRoIHead", "CascadeRoIHead", "MaskScoringRoIHead", "HybridTaskCascadeRoIHead", "SCNetRoIHead"),
    "PISARoIHead",  # the standard one, which samples otherwise
)
NECKS = ("FPN", "PAFPN", "FPN_CARAFE", "FPG", "HRFPN")
ROI_LEVELS = STRIDES[:4]
TRANSFORMERS = ("SwinTransformer", "mmdet.SwinTransformer")
CONVNEXTS = ("mmcls.ConvNeXt", "mmpretrain.ConvNeXt")
BACKBONES = (
    *("ResNet", "ResNeXt", "ResNetV1d", "ResNeSt", "Res2Net", "RegNet", "HRNet"),
    *(*TRANSFORMERS, *CONVNEXTS),
)
RESNET_STRIDES = [1, 2, 2, 2]  # of stages
OTHER_STRIDES = {"RegNet": [2, 2, 2, 2], **{kind: [4, 2, 2, 2] for kind in TRANSFORMERS}}
POOLED = {"bbox_roi_extractor": BOX_ROI_SIZE, "mask_roi_extractor": MASK_ROI_SIZE}  # cells of a side
GRID = {  # kinds of FPG's transitions
    "same_up_trans": "conv",
    "across_lateral_trans": "conv",
    "across_down_trans": "interpolation_conv",
    "across_skip_trans": "conv",
    "output_trans": "last_conv",
}


@dataclass(frozen=True, slots=True)
class Conventions:
    """Settings of a configuration that tensors do not show."""

    values: dict[str, Any]  # nested like a recipe, without its classifier
    classifier: dict[str, Any]  # recipe values of the classifier
    loss: str | None  # of the classifier, in our words
    blue_first: bool  # the network takes B, G, R
    standardized: tuple[str, ...]  # parts whose convolutions' weights are standardised
    trained_otherwise: tuple[str, ...]  # what its training has and ours has not, in words


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
    rpn, roi = section(model, "rpn_head"), section(model, "roi_head")
    _refuse_other_parts(model, roi)
    box_heads = per_stage(roi, "bbox_head", stages)
    mask_heads = per_stage(roi, "mask_head", stages)
    train, test = (section(model, name) or section(config, name) for name in ("train_cfg", "test_cfg"))
    _neck(section(model, "neck"))
    for box, mask in zip(box_heads, mask_heads, strict=True):
        refuse_other_layers(box, mask)
    pixels, blue_first = _pixels(config, model)
    values = {
        "model": {
            "backbone": _backbone(section(model, "backbone")),
            "rpn": _rpn(rpn, train, test),
            "roi_pooling": _roi_pooling(roi),
            "box_head": box_head(box_heads[0], per_stage(train, "rcnn", stages)),
            "mask_head": mask_head(mask_heads[0], roi),
            "mask_iou": mask_iou(section(roi, "mask_iou_head"), per_stage(train, "rcnn", 1)[0]),
            "context": context(section(roi, "glbctx_head")),
            "stages": stage_rows(roi, box_heads, per_stage(train, "rcnn", stages)),
            **pixels,
        },
        "data": _data(config),
        "test": _test(section(test, "rcnn")),
    }
    return Conventions(
        values=values,
        classifier=classifier(box_heads[0]),
        loss=classifier_loss(box_heads[0]),
        blue_first=blue_first,
        standardized=_standardized(model, box_heads[0], mask_heads[0]),
        trained_otherwise=trained_otherwise(rpn, box_heads[0], roi),
    )


def _standardized(model: Config, box: Config, mask: Config) -> tuple[str, ...]:
    """Parts with `conv_cfg=dict(type='ConvWS')`."""
    places = {
        "model.backbone": section(model, "backbone"),
        "model.neck": section(model, "neck"),
        "model.roi_head.bbox_head": box,
        "model.roi_head.mask_head": mask,
    }
    kinds = {place: section(config, "conv_cfg").get("type") for place, config in places.items()}
    for place, kind in kinds.items():
        require(f"{place}.conv_cfg.type", kind, ("ConvWS", "Conv", "Conv2d"))
    return tuple(place.rpartition(".")[2] for place, kind in kinds.items() if kind == "ConvWS")


def _refuse_other_parts(model: Config, roi: Config) -> None:
    require("model.neck.type", section(model, "neck").get("type"), NECKS)
    require("model.roi_head.type", roi.get("type"), ROI_HEADS)
    refuse_other_semantics(roi)
    refuse_other_relays(section(roi, "feat_relay_head"))


def _neck(neck: Config) -> None:
    refuse_other_norms(neck, "model.neck")
    require("model.neck.act_cfg.type", section(neck, "act_cfg").get("type"), ())
    require("model.neck.pooling_type", neck.get("pooling_type"), ("AVG",))
    upsampling, grid = section(neck, "upsample_cfg"), neck.get("type") == "FPG"
    require("model.neck.upsample_cfg.mode", upsampling.get("mode"), ("nearest",))
    if neck.get("type") == "FPN_CARAFE":
        refuse_other_upsampling(upsampling, "model.neck", ("carafe",))
    for key, kind in GRID.items() if grid else ():
        require(f"model.neck.{key}.type", section(neck, key).get("type"), (kind,))
        require(f"model.neck.{key}.mode", section(neck, key).get("mode"), ("nearest",))
    if grid and neck.get("paths") is not None:
        require("model.neck.paths", neck["paths"], (["bu"] * len(neck["paths"]),))


def _backbone(backbone: Config) -> dict[str, Any]:
    require("model.backbone.type", backbone.get("type"), BACKBONES)
    for plugin in backbone.get("plugins") or ():
        block, where = section(plugin, "cfg"), "model.backbone.plugins"
        require(f"{where}.cfg.type", block.get("type"), ("ContextBlock",))
        require(f"{where}.cfg.fusion_types", block.get("fusion_types"), (["channel_add"],))
        require(f"{where}.cfg.pooling_type", block.get("pooling_type"), ("att",))
        require(f"{where}.position", plugin.get("position"), ("after_conv3",))
    require("model.backbone.qk_scale", backbone.get("qk_scale"), ())
    require("model.backbone.out_indices", backbone.get("out_indices"), ([0, 1, 2, 3],))
    require("model.backbone.avg_down_stride", backbone.get("avg_down_stride"), (True,))
    require("model.backbone.style", backbone.get("style"), ("pytorch", "caffe"))
    kind = backbone.get("type") or ""
    activation = "GELU" if kind in (*TRANSFORMERS, *CONVNEXTS) else "ReLU"
    require("model.backbone.act_cfg.type", section(backbone, "act_cfg").get("type"), (activation,))
    require("model.backbone.strides", backbone.get("strides"), (OTHER_STRIDES.get(kind, RESNET_STRIDES),))
    require("model.backbone.dilations", backbone.get("dilations"), ([1, 1, 1, 1],))
    norm_eval, norm = backbone.get("norm_eval"), section(backbone, "norm_cfg")
    require("model.backbone.norm_cfg.type", norm.get("type"), (*NORMS, "LN", "LN2d"))
    require("model.backbone.norm_cfg.num_groups", norm.get("num_groups"), (GROUPS,))
    return known(
        frozen_stages=backbone.get("frozen_stages"),
        train_norm=None if norm_eval is None else not norm_eval,
        norm_eps=norm.get("eps"),
        stride_in_1x1=True if backbone.get("style") == "caffe" else None,
    )


def _rpn(rpn: Config, train: Config, test: Config) -> dict[str, Any]:
    anchors = section(rpn, "anchor_generator")
    where = "model.rpn_head.anchor_generator"
    require(f"{where}.type", anchors.get("type"), ("AnchorGenerator",))
    require(f"{where}.center_offset", anchors.get("center_offset"), (0,))
    require("model.rpn_head.bbox_coder.target_stds", section(rpn, "bbox_coder").get("target_stds"), ([1] * 4,))
    refuse_other_coders(rpn, "model.rpn_head")
    require("model.rpn_head.act_cfg.type", section(rpn, "act_cfg").get("type"), ("ReLU",))
    require(f"{where}.ratios", anchors.get("ratios"), (list(RATIOS),))
    require(f"{where}.strides", anchors.get("strides"), (list(STRIDES),))
    require(f"{where}.base_sizes", anchors.get("base_sizes"), (list(STRIDES),))
    require(f"{where}.centers", anchors.get("centers"), ())
    require(f"{where}.octave_base_scale", anchors.get("octave_base_scale"), ())
    scales = anchors.get("scales")
    if scales is not None and len(scales) != 1:
        require(f"{where}.scales", scales, ([8],))
    require("model.rpn_head.loss_cls.use_sigmoid", section(rpn, "loss_cls").get("use_sigmoid"), (True,))
    proposals, at_test = section(train, "rpn_proposal"), section(test, "rpn")
    return known(
        anchor_scale=None if scales is None else float(scales[0]),
        box_beta=box_loss_beta(rpn, "model.rpn_head"),
        inside_image=True if section(train, "rpn").get("allowed_border") == 0 else None,
        pre_nms_train=proposals.get("nms_pre"),
        post_nms_train=_most_proposals(proposals, "model.train_cfg.rpn_proposal"),
        pre_nms_test=at_test.get("nms_pre"),
        post_nms_test=_most_proposals(at_test, "model.test_cfg.rpn"),
        nms_iou=_nms_iou(at_test, "model.test_cfg.rpn"),
    )


def _most_proposals(rules: Config, where: str) -> int | None:
    """Proposals that are left behind NMS; versions before 2.6 had two other names for it, of which each read one."""
    found = [rules[key] for key in ("max_per_img", "max_num", "nms_post") if rules.get(key) is not None]
    if "max_per_img" not in rules and len(found) > 1:
        require(f"{where}.nms_post", found[1], (found[0],))
    return found[0] if found else None


def _nms_iou(rules: Config, where: str) -> float | None:
    """Threshold of plain NMS; old versions had it in ``iou_thr``, and that of the RPN beside ``nms`` in ``nms_thr``."""
    nms = section(rules, "nms")
    require(f"{where}.nms.type", nms.get("type"), ("nms",))
    require(f"{where}.nms.class_agnostic", nms.get("class_agnostic"), (False,))
    require(f"{where}.min_bbox_size", rules.get("min_bbox_size"), (0,))
    require(f"{where}.nms_across_levels", rules.get("nms_across_levels"), (False,))
    return nms.get("iou_threshold", nms.get("iou_thr", rules.get("nms_thr")))


def _roi_pooling(roi: Config) -> dict[str, Any]:
    pooling: dict[str, Any] = {}
    for name, cells in POOLED.items():
        count = len(roi[name]) if isinstance(roi.get(name), list) else 1
        for extractor in per_stage(roi, name, max(count, 1)):
            layer, where = section(extractor, "roi_layer"), f"model.roi_head.{name}"
            require(f"{where}.type", extractor.get("type"), ("SingleRoIExtractor",))
            require(f"{where}.roi_layer.type", layer.get("type"), ("RoIAlign",))
            require(f"{where}.featmap_strides", extractor.get("featmap_strides"), (list(ROI_LEVELS),))
            require(f"{where}.finest_scale", extractor.get("finest_scale"), (56,))
            require(f"{where}.roi_layer.output_size", layer.get("output_size"), (cells, [cells, cells]))
            require(f"{where}.roi_layer.pool_mode", layer.get("pool_mode"), ("avg",))
            found = known(sampling_ratio=layer.get("sampling_ratio"), aligned=layer.get("aligned"))
            for key, value in found.items():
                require(f"{where}.roi_layer.{key}", value, (pooling.get(key, value),))
            pooling |= found
    return pooling


def _pixels(config: Config, model: Config) -> tuple[dict[str, Any], bool]:
    """Mean and deviation in the order R, G, B; and whether the network takes them the other way round.

    In 3.x the model's preprocessor does all of it, or none where it has no mean. In 2.x it is a step of the test
    pipeline, which mostly takes it from ``img_norm_cfg``.
    """
    new, old = section(model, "data_preprocessor"), section(config, "img_norm_cfg")
    steps = [step for step in _test_steps(config) if step.get("type") == "Normalize" and step.get("mean") is not None]
    if new:
        require(
            "model.data_preprocessor beside a step of the test pipeline", [step["type"] for step in steps] or None, ()
        )
        blue_first = not (new.get("bgr_to_rgb", False) or new.get("rgb_to_bgr", False))
        about: Config = new if None not in (new.get("mean"), new.get("std")) else {"mean": [0.0] * 3, "std": [1.0] * 3}
    else:
        about = steps[0] if steps else old
        blue_first = not about.get("to_rgb", True)
    mean, std = about.get("mean"), about.get("std")
    if mean is None or std is None:
        return {}, False
    if blue_first:
        mean, std = mean[::-1], std[::-1]
    return {"pixel_mean": mean, "pixel_std": std}, blue_first


def _data(config: Config) -> dict[str, Any]:
    """Image sizes; scales are (long, short) or (short, long)."""
    test = [scale for step in _test_steps(config) for scale in _scales(step)]
    train = [scale for step in _steps(config.get("train_pipeline")) for scale in _scales(step)]
    values: dict[str, Any] = {}
    if test:
        values |= {"test_short_edge": min(test[0]), "long_edge": max(test[0])}
    if train:
        values["short_edges"] = sorted({min(scale) for scale in train})
    return values


def _test_steps(config: Config) -> list[Config]:
    """The steps by which images are made to be tested on, and those in them; where a data set says its own, these."""
    places = (section(section(config, "test_dataloader"), "dataset"), section(section(config, "data"), "test"))
    pipelines = [place["pipeline"] for place in places if isinstance(place.get("pipeline"), list)]
    outer = _steps(pipelines[0] if pipelines else config.get("test_pipeline"))
    return [one for step in outer for one in (step, *_steps(step.get("transforms")))]


def _steps(pipeline: Any) -> Iterator[Config]:
    for step in pipeline or ():
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
    require("model.test_cfg.rcnn.mask_thr_binary", rcnn.get("mask_thr_binary"), (0.5,))
    return known(
        score_threshold=rcnn.get("score_thr"),
        nms_iou=_nms_iou(rcnn, "model.test_cfg.rcnn"),
        max_detections=rcnn.get("max_per_img"),
    )
