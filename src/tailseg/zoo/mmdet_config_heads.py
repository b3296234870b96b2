"""The heads in a configuration of mmdetection, as recipe values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailseg.layers.norm import GROUPS
from tailseg.model.box_head import ROI_SIZE as BOX_ROI_SIZE
from tailseg.model.semantic import FUSED, ROI_SIZE, STRIDE
from tailseg.zoo.mmdet_text import Config, known, require, section

BATCH_NORMS = ("BN", "SyncBN", "MMSyncBN")
NORMS = (*BATCH_NORMS, "GN")
UPSAMPLING = {  # what a mask head's transposed convolution or CARAFE, or a neck's CARAFE, must be where it is said
    "scale_factor": 2,
    "up_kernel": 5,
    "up_group": 1,
    "encoder_kernel": 3,
    "encoder_dilation": 1,
    "compressed_channels": 64,
}
PREDICTORS: dict[str, dict[str, tuple[str, ...]]] = {  # of a head: key -> what it may be
    "bbox_head": {"cls_predictor_cfg": ("Linear", "NormedLinear"), "reg_predictor_cfg": ("Linear",)},
    "mask_head": {"predictor_cfg": ("Conv", "Conv2d", "Linear", "NormedConv2d")},
}
BOX_LOSSES = (
    *("L1Loss", "SmoothL1Loss", "IoULoss", "BoundedIoULoss", "GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss"),
    *("SIoULoss", "BalancedL1Loss"),
)
# Their loss -> ours, and of our keys their name and default. EQL, EQL v2 and group softmax are those of
# tztztztztz/eqlv2; the effective class margin loss (ECM) has EQL v2's scores.
LOSSES: dict[str, tuple[str, dict[str, tuple[str, Any]]]] = {
    "SeesawLoss": ("seesaw", {"p": ("p", 0.8), "q": ("q", 2.0)}),
    "CrossEntropyLoss": ("cross-entropy", {}),
    "EQL": ("eql", {"threshold": ("lambda_", 0.00177)}),
    "EQLv2": ("eql-v2", {"gamma": ("gamma", 12.0), "mu": ("mu", 0.8), "alpha": ("alpha", 4.0)}),
    "GroupSoftmax": ("group-softmax", {"thresholds": ("bin_split", [10, 100, 1000]), "others_ratio": ("beta", 8.0)}),
    "EffectiveClassMarginLoss": ("eql-v2", {}),
}


def refuse_other_norms(part: Config, where: str, norms: Sequence[str] = NORMS) -> None:
    """Refuse a norm that a part of ours cannot have."""
    norm = section(part, "norm_cfg")
    require(f"{where}.norm_cfg.type", norm.get("type"), norms)
    require(f"{where}.norm_cfg.num_groups", norm.get("num_groups"), (GROUPS,))
    require(f"{where}.norm_cfg.eps", norm.get("eps"), (1e-5,))


def refuse_other_coders(head: Config, where: str) -> None:
    """Refuse boxes that are decoded otherwise than ours; deviations are left to the caller."""
    coder, where = section(head, "bbox_coder"), f"{where}.bbox_coder"
    require(f"{where}.type", coder.get("type"), ("DeltaXYWHBBoxCoder",))
    require(f"{where}.target_means", coder.get("target_means"), ([0.0] * 4,))
    require(f"{where}.clip_border", coder.get("clip_border"), (True,))
    require(f"{where}.add_ctr_clamp", coder.get("add_ctr_clamp"), (False,))


def refuse_other_layers(box: Config, mask: Config) -> None:
    """Refuse activations and predictors of a stage's heads that ours cannot have."""
    for head, name in ((box, "bbox_head"), (mask, "mask_head")):
        where = f"model.roi_head.{name}"
        require(f"{where}.act_cfg.type", section(head, "act_cfg").get("type"), ("ReLU",))
        for key, kinds in PREDICTORS[name].items():
            predictor = section(head, key)
            require(f"{where}.{key}.type", predictor.get("type"), kinds)
            require(f"{where}.{key}.power", predictor.get("power"), (1,))
            require(f"{where}.{key}.eps", predictor.get("eps"), (1e-6,))


def box_loss_beta(head: Config, where: str) -> float | None:
    """Beta of a head's box loss; 0 is L1, with which a training would go on where theirs is another."""
    loss = section(head, "loss_bbox")
    require(f"{where}.loss_bbox.type", loss.get("type"), BOX_LOSSES)
    if "type" not in loss:
        return None
    return float(loss.get("beta", 1.0)) if loss["type"] == "SmoothL1Loss" and not head.get("reg_decoded_bbox") else 0.0


def trained_otherwise(rpn: Config, head: Config, roi: Config) -> tuple[str, ...]:
    """What a training has that ours has not, and detection does not need, in words."""
    found = []
    for config, where in ((rpn, "RPN"), (head, "box heads")):
        kind, decoded = section(config, "loss_bbox").get("type"), config.get("reg_decoded_bbox")
        if decoded or kind not in (None, "L1Loss", "SmoothL1Loss"):
            what = "boxes" if decoded else "deltas"
            found.append(f"{kind or 'a loss'} of {what} in the {where} (here L1 of deltas)")
    if roi.get("type") == "PISARoIHead":
        found.append("prime sample attention (PISA; here random samples)")
    return tuple(found)


def box_head(head: Config, train: Sequence[Config]) -> dict[str, Any]:
    """The box loss, and what the head learns from."""
    sampler, assigner = section(train[0], "sampler"), section(train[0], "assigner")
    rois, share = sampler.get("num"), sampler.get("pos_fraction")
    refuse_other_norms(head, "model.roi_head.bbox_head")
    return known(
        box_beta=box_loss_beta(head, "model.roi_head.bbox_head"),
        low_quality=assigner.get("match_low_quality"),
        rois=rois,
        max_positive=None if rois is None or share is None else int(rois * share),
    )


def mask_head(head: Config, roi: Config) -> dict[str, Any]:
    """The predictor's normalisation, and how HTC's mask heads learn."""
    upsampling, where = section(head, "upsample_cfg"), "model.roi_head.mask_head"
    refuse_other_norms(head, where)
    refuse_other_upsampling(upsampling, where, ("deconv", "carafe"))
    values = _predictor(head, "predictor_cfg", "NormedConv2d")
    if roi.get("type") == "HybridTaskCascadeRoIHead":
        require("model.roi_head.mask_info_flow", roi.get("mask_info_flow"), (True,))
        values["interleaved"] = bool(roi.get("interleaved", True))
    return values


def refuse_other_upsampling(upsampling: Config, where: str, kinds: Sequence[str]) -> None:
    """Refuse another kind than these of ``upsample_cfg``, and other sizes than ours."""
    require(f"{where}.upsample_cfg.type", upsampling.get("type"), kinds)
    for key, ours in UPSAMPLING.items():
        require(f"{where}.upsample_cfg.{key}", upsampling.get(key), (ours,))


def mask_iou(head: Config, train: Config) -> dict[str, Any]:
    """Weight of the mask-IoU head's loss, of which mmdetection has 0.5 by default, but 1 of a loss that says none."""
    if not head:
        return {}
    loss, where = section(head, "loss_iou"), "model.roi_head.mask_iou_head"
    require(f"{where}.type", head.get("type"), ("MaskIoUHead",))
    require(f"{where}.loss_iou.type", loss.get("type"), ("MSELoss",))
    require("model.train_cfg.rcnn.mask_thr_binary", train.get("mask_thr_binary"), (0.5,))
    return {"weight": float(loss.get("loss_weight", 1.0))} if loss else {}


def refuse_other_semantics(roi: Config) -> None:
    """Refuse another semantic branch than that of HTC and SCNet."""
    head, extractor = section(roi, "semantic_head"), section(roi, "semantic_roi_extractor")
    where = "model.roi_head.semantic"
    require(f"{where}_head.type", head.get("type"), ("FusedSemanticHead", "SCNetSemanticHead"))
    require(f"{where}_head.fusion_level", head.get("fusion_level"), (FUSED,))
    require(f"{where}_fusion", roi.get("semantic_fusion"), (["bbox", "mask"],))
    require(f"{where}_roi_extractor.type", extractor.get("type"), ("SingleRoIExtractor",))
    require(f"{where}_roi_extractor.featmap_strides", extractor.get("featmap_strides"), ([STRIDE],))
    layer = section(extractor, "roi_layer")
    require(f"{where}_roi_extractor.roi_layer.output_size", layer.get("output_size"), (ROI_SIZE,))


def refuse_other_relays(head: Config) -> None:
    """Refuse another feature relay than SCNet's."""
    where = "model.roi_head.feat_relay_head"
    require(f"{where}.type", head.get("type"), ("FeatureRelayHead",))
    require(f"{where}.roi_feat_size", head.get("roi_feat_size"), (BOX_ROI_SIZE,))
    require(f"{where}.scale_factor", head.get("scale_factor"), (ROI_SIZE // BOX_ROI_SIZE,))


def context(head: Config) -> dict[str, Any]:
    """Weight of the context encoder's loss, 1 by mmdetection's default."""
    if not head:
        return {}
    require("model.roi_head.glbctx_head.type", head.get("type"), ("GlobalContextHead",))
    refuse_other_norms(head, "model.roi_head.glbctx_head", BATCH_NORMS)
    return {"weight": float(head.get("loss_weight", 1.0))}


def _predictor(head: Config, key: str, normalized: str) -> dict[str, Any]:
    """A predictor's normalisation; mmdetection misspells the temperature."""
    predictor = section(head, key)
    if predictor.get("type") != normalized:
        return {"normalized": False} if head else {}
    tau = predictor.get("tempearture", predictor.get("temperature", 20))
    return {"normalized": True, "temperature": float(tau)}


def stage_rows(roi: Config, heads: Sequence[Config], train: Sequence[Config]) -> list[dict[str, Any]]:
    """Thresholds, deviations and weights of each stage."""
    weights = roi.get("stage_loss_weights") or [1.0] * len(heads)
    of_masks = [sum(weights)] * len(weights) if roi.get("type") == "SCNetRoIHead" else weights
    rows = []
    for head, rules, weight, mask_weight in zip(heads, train, weights, of_masks, strict=False):
        refuse_other_coders(head, "model.roi_head.bbox_head")
        rows.append(
            known(
                iou=section(rules, "assigner").get("pos_iou_thr"),
                stds=section(head, "bbox_coder").get("target_stds"),
                weight=float(weight),
                mask_weight=float(mask_weight),
            )
        )
    return rows


def classifier(head: Config) -> dict[str, Any]:
    """The classifier's normalisation, and its loss's own values."""
    loss = section(head, "loss_cls")
    if not loss:
        return {}
    where, kind = "model.roi_head.bbox_head.loss_cls", loss.get("type")
    require(f"{where}.type", kind, tuple(LOSSES))
    if kind in ("SeesawLoss", "CrossEntropyLoss"):
        require(f"{where}.use_sigmoid", loss.get("use_sigmoid"), (False,))
    require(f"{where}.test_with_obj", loss.get("test_with_obj"), (True,))  # EQL v2's scores
    values = _predictor(head, "cls_predictor_cfg", "NormedLinear")
    _, keys = LOSSES.get(kind or "", ("", {}))
    return values | {own: loss.get(theirs, default) for own, (theirs, default) in keys.items()}


def classifier_loss(head: Config) -> str | None:
    """Our name of the classifier's loss; None where none is said."""
    return LOSSES.get(section(head, "loss_cls").get("type", ""), (None,))[0]
