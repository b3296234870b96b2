"""Mask R-CNN, Mask Scoring R-CNN, Cascade Mask R-CNN, HTC and SCNet of mmdetection 2.x and 3.x."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailseg.errors import UserError
from tailseg.losses import CLASSIFICATIONS
from tailseg.model.semantic import LEVELS
from tailseg.zoo.checkpoint_files import read_checkpoint
from tailseg.zoo.conversion import COUNTS, ForeignModel, change, faults_named, rename, rpn_convs, state_dict_of
from tailseg.zoo.deformable import modulate
from tailseg.zoo.mmdet_backbones import (
    FIRST_CONVOLUTIONS,
    backbone_conventions,
    backbone_names,
    in_timm_s_order,
    is_index,
)
from tailseg.zoo.mmdet_config import conventions
from tailseg.zoo.mmdet_necks import neck_names
from tailseg.zoo.mmdet_text import Config, read_config
from tailseg.zoo.standardized import CONVOLUTIONS, standardize

MOST_CONVS = 16  # of a head
# Mean and deviation, which the configuration says too; stuff and things of each place, which only a loss reads.
UNUSED = ("data_preprocessor.", "roi_head.semantic_head.conv_logits.")
OF_LOSSES = (".loss_cls.pos_neg", ".loss_cls.sample_n", ".loss_cls.detection_cls_weight")  # what others lead to
CASCADE_STDS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
CASCADE: dict[str, Any] = {  # what Cascade Mask R-CNN has otherwise than Mask R-CNN
    "rpn": {"box_beta": 1 / 9, "inside_image": True, "post_nms_train": 2000},
    "box_head": {"box_beta": 1.0, "low_quality": False},
    "stages": [
        {"iou": iou, "stds": stds, "weight": weight, "mask_weight": weight}
        for iou, stds, weight in zip((0.5, 0.6, 0.7), CASCADE_STDS, (1.0, 0.5, 0.25), strict=True)
    ],
}
NO_CONFIGURATION = (
    "carries no configuration: what its tensors do not show is taken from mmdetection's published configurations for "
    "LVIS (thresholds, image sizes, pixel mean, normalised layers); fix it with --set where yours differs"
)
OF_FORKS = ("eql", "eql-v2", "group-softmax")  # losses that their number of logits need not tell
MARGIN = (
    "has the effective class margin loss (ECM): its scores are those of EQL v2, with whose loss a training would go on"
)
RESIDUAL = {"mask_head": "mask_head", "semantic_head": "semantic", "glbctx_head": "context"}  # parts with pairs
EXTRA_CLASS = (
    "has a global context of one class more than the model, which no object is of, as SCNet was published; its row of "
    "the context's classifier was left out, which plays no part in detection"
)
OTHERWISE = "detections are the same, a training that goes on is not"
STANDARDIZED = (
    "has weight standardisation, which was worked into the weights: detections are the same, but training goes on "
    "without it"
)


def read_mmdet(path: Path) -> ForeignModel:
    """A checkpoint of mmdetection under our names.

    What its tensors do not show comes from the configuration that mmdetection stores in ``meta``, and where there is
    none from the published configurations for LVIS.

    Raises:
        UserError: the file cannot be read safely, or is of mmdetection 1.x. A configuration that asks for what we have
            not is the model's `refusal`.
    """
    with faults_named(path):
        return _read(path)


def _read(path: Path) -> ForeignModel:
    content = read_checkpoint(path)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    if str(meta.get("mmdet_version", "")).startswith("1."):
        raise UserError(
            f"{path}: was written by mmdetection {meta['mmdet_version']}, which puts background first and counts boxes "
            "a pixel wider; convert a checkpoint of 2.x or 3.x"
        )
    tensors = state_dict_of(content, path, ("state_dict",))
    unused = [key for key in tensors if key.startswith(UNUSED) or key.endswith(OF_LOSSES) or is_index(key)]
    cascade = any(key.startswith("roi_head.bbox_head.2.") for key in tensors)
    origins, unknown = rename(
        _without(tensors, unused),
        backbone_names(tensors) | part_names(3 if cascade else 1) | rpn_convs(tensors, "rpn_head.rpn_conv.{}.conv"),
    )
    state = {ours: tensors[theirs] for ours, theirs in origins.items()}
    modulate(state, origins, path)
    in_timm_s_order(state)
    change(state, path, COUNTS, lambda counts: _whole_counts(counts, path))
    config = read_config(meta)
    said = _published(path, state, cascade) if config is None else _configured(path, config, 3 if cascade else 1)
    values, remarks, loss = said.values, [f"{path} {NO_CONFIGURATION}"] if config is None else [], said.loss
    if said.blue_first:
        change(state, path, FIRST_CONVOLUTIONS, lambda weight: weight.flip(1))
    if any(key.endswith(".loss_cls.sample_n") for key in tensors):
        loss = "eql-v2"
        remarks.append(f"{path} {MARGIN}")
    if said.standardized:
        standardize(state, said.standardized)
        remarks.append(f"{path} {STANDARDIZED}")
    if said.trained_otherwise:
        remarks.append(f"{path} was trained with {' and '.join(said.trained_otherwise)}; {OTHERWISE}")
    values["model"]["backbone"] = backbone_conventions(tensors) | values["model"].get("backbone", {})
    for theirs, ours in RESIDUAL.items():
        if f"roi_head.{theirs}.convs.0.conv1.weight" in tensors:
            values["model"].setdefault(ours, {})["residual"] = True
    if _without_extra_class(state, path):
        remarks.append(f"{path} {EXTRA_CLASS}")
    return ForeignModel(
        project="mmdet",
        path=path,
        state=state,
        origins=origins,
        unknown=unknown,
        unused=unused,
        loss=loss,
        refusal=said.refusal,
        names=_class_names(meta),
        values=values,
        classifiers=said.classifiers,
        remarks=remarks,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Said:
    """What a configuration says of a checkpoint, or is assumed where there is none."""

    values: dict[str, Any]
    classifiers: dict[str, dict[str, Any]]  # loss -> recipe values of the classifier
    loss: str | None = None
    blue_first: bool = False
    standardized: tuple[str, ...] = ()
    trained_otherwise: tuple[str, ...] = ()
    refusal: str | None = None


def _published(path: Path, state: Mapping[str, Tensor], cascade: bool) -> _Said:
    """The published configurations for LVIS, as far as tensors and the file's name tell which."""
    masks: dict[str, Any] = {"normalized": True} if "normed-mask" in path.stem.replace("_", "-") else {}
    if any(".mask_head.flow." in key for key in state):
        masks["interleaved"] = True
    model: dict[str, Any] = (CASCADE if cascade else {}) | ({"mask_head": masks} if masks else {})
    if "relay.fc.weight" in state:  # SCNet, whose one mask head has the weights of all stages
        model = model | {"stages": [{**row, "mask_weight": 1.75} for row in CASCADE["stages"]]}
    return _Said(
        values={"model": model},
        classifiers={"seesaw": {"normalized": True, "q": 2.0}},
        standardized=tuple(CONVOLUTIONS) if re.search("gn[-_+]ws", path.stem) else (),
    )


def _configured(path: Path, config: Config, stages: int) -> _Said:
    try:
        said = conventions(config, stages)
    except UserError as error:
        return _Said(values={"model": {}}, classifiers={}, refusal=f"{path}: {error}")
    general: dict[str, Any] = {
        key: said.classifier[key] for key in ("normalized", "temperature") if key in said.classifier
    }
    return _Said(
        values=said.values,
        classifiers=dict.fromkeys(CLASSIFICATIONS, general) | ({said.loss: said.classifier} if said.loss else {}),
        loss=said.loss if said.loss in OF_FORKS else None,
        blue_first=said.blue_first,
        standardized=said.standardized,
        trained_otherwise=said.trained_otherwise,
    )


def part_names(stages: int) -> dict[str, str]:
    """Their names, without the backbone's -> ours."""
    names = neck_names() | {
        "rpn_head.rpn_conv": "rpn.conv",
        "rpn_head.rpn_cls": "rpn.objectness",
        "rpn_head.rpn_reg": "rpn.deltas",
    }
    for stage in range(stages):
        number = f".{stage}" if stages > 1 else ""
        box, mask = f"roi_head.bbox_head{number}", f"roi_head.mask_head{number}"
        names |= _heads(box, mask, stage)
    if stages == 1:
        return names | _mask_iou_head()
    # A single mask head serves the last stage.
    names |= _heads("", "roi_head.mask_head", stages - 1) | _context_head() | _semantic_head()
    return names | {"roi_head.feat_relay_head.fc": "relay.fc"}


def _heads(box: str, mask: str, stage: int) -> dict[str, str]:
    ours = f"stages.{stage}"
    names = {
        **_convolutions(f"{mask}.convs", f"{ours}.mask_head"),
        **_pairs(f"{mask}.convs", f"{ours}.mask_head"),
        f"{mask}.upsample": f"{ours}.mask_head.upsample",
        f"{mask}.upsample.channel_compressor": f"{ours}.mask_head.upsample.compressor",
        f"{mask}.upsample.content_encoder": f"{ours}.mask_head.upsample.encoder",
        f"{mask}.conv_logits": f"{ours}.mask_head.predictor",
        f"{mask}.conv_res.conv": f"{ours}.mask_head.flow",
    }
    if box:
        names |= _convolutions(f"{box}.shared_convs", f"{ours}.box_head") | {
            f"{box}.shared_fcs.0": f"{ours}.box_head.fc1",
            f"{box}.shared_fcs.1": f"{ours}.box_head.fc2",
            f"{box}.fc_cls": f"{ours}.box_head.classifier",
            f"{box}.fc_reg": f"{ours}.box_head.regressor",
            f"{box}.loss_cls.cum_samples": f"{ours}.{COUNTS}",
            f"{box}.loss_cls.pos_grad": f"{ours}.box_head.classification.positive_gradients",
            f"{box}.loss_cls.neg_grad": f"{ours}.box_head.classification.negative_gradients",
        }
    return names


def _convolutions(theirs: str, ours: str) -> dict[str, str]:
    """Convolutions in a row, each with its norm if it has one."""
    names = {f"{theirs}.{i}.conv": f"{ours}.convs.{i}" for i in range(MOST_CONVS)}
    return names | {f"{theirs}.{i}.{norm}": f"{ours}.norms.{i}" for i in range(MOST_CONVS) for norm in ("bn", "gn")}


def _pairs(theirs: str, ours: str) -> dict[str, str]:
    """Convolutions in residual pairs (SCNet), each with batch norm if it has one."""
    names: dict[str, str] = {}
    for i in range(MOST_CONVS):
        block, place = f"{theirs}.{i // 2}", i % 2 + 1
        names |= {f"{block}.conv{place}": f"{ours}.convs.{i}", f"{block}.bn{place}": f"{ours}.norms.{i}"}
    return names


def _mask_iou_head() -> dict[str, str]:
    theirs = "roi_head.mask_iou_head"
    return {
        f"{theirs}.convs": "mask_iou.convs",
        f"{theirs}.fcs.0": "mask_iou.fc1",
        f"{theirs}.fcs.1": "mask_iou.fc2",
        f"{theirs}.fc_mask_iou": "mask_iou.predictor",
    }


def _semantic_head() -> dict[str, str]:
    """That of HTC and SCNet, without the prediction that only its own loss reads."""
    theirs = "roi_head.semantic_head"
    names = {f"{theirs}.lateral_convs.{level}.conv": f"semantic.lateral_convs.{level}" for level in range(LEVELS)}
    names |= {f"{theirs}.convs.{i}.conv": f"semantic.convs.{i}" for i in range(MOST_CONVS)}
    names |= {k: v for k, v in _pairs(f"{theirs}.convs", "semantic").items() if ".convs." in v}
    return names | {f"{theirs}.conv_embedding.conv": "semantic.embedding"}


def _context_head() -> dict[str, str]:
    """SCNet's, whose convolutions stand one by one or in residual pairs."""
    theirs = "roi_head.glbctx_head"
    names = _convolutions(f"{theirs}.convs", "context") | _pairs(f"{theirs}.convs", "context")
    return names | {f"{theirs}.fc": "context.classifier"}


def _without_extra_class(state: dict[str, Tensor], path: Path) -> bool:
    """Cut the context's classifier to the model's classes where it has one more; whether it had."""
    classes = {tensor.numel() for key, tensor in state.items() if key.endswith("mask_head.predictor.bias")}
    bias = state.get("context.classifier.bias")
    if bias is None or {bias.numel() - 1} != classes:
        return False
    change(state, path, ("context.classifier.weight", "context.classifier.bias"), lambda rows: rows[:-1])
    return True


def _whole_counts(counts: Tensor, path: Path) -> Tensor:
    """Samples of each class as whole numbers; theirs are float32 and end with background, which is never counted."""
    if counts.dim() != 1 or not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise UserError(f"{path}: 'cum_samples' must be a count for every class; the file is damaged")
    return counts[:-1].round().long()


def _class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes by label: ``dataset_meta`` of 3.x, ``CLASSES`` of 2.x."""
    about = meta.get("dataset_meta")
    about = about if isinstance(about, Mapping) else {}
    for names in (about.get("classes"), about.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def _without(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
