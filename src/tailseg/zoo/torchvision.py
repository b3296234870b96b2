"""Mask R-CNN R50-FPN of torchvision, versions 1 and 2."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights

from tailseg.errors import UserError
from tailseg.zoo.checkpoint_files import read_checkpoint
from tailseg.zoo.conversion import ForeignModel, change, faults_named, rename, rpn_convs, state_dict_of

NAME = "maskrcnn_resnet50_fpn"
CONVS = 4  # of the mask head, and of version 2's box head
PUBLISHED = MaskRCNN_ResNet50_FPN_Weights.COCO_V1
BY_NAME = {NAME: PUBLISHED, f"{NAME}_v2": MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1}
PATIENCE = 30.0  # seconds without an answer after which a download fails
VALUES: dict[str, Any] = {
    "model": {
        "rpn": {
            "box_beta": 1 / 9,
            "post_nms_train": 2000,
            "rounded_anchors": True,
            "fitted_strides": True,
        },
        "roi_pooling": {"sampling_ratio": 2, "aligned": False},
        "box_head": {"box_beta": 1 / 9, "low_quality": False},
    },
    "data": {"short_edges": [800]},
    "test": {"score_threshold": 0.05, "max_detections": 100, "min_size": 0.01},
}
OWN_EPS = (
    "was taken to be trained with batch norm's usual 1e-5; torchvision sets it to 0 in what starts from its own COCO "
    "weights: then add --set model.backbone.norm_eps=0"
)


def read_torchvision(source: str) -> ForeignModel:
    """The published weights by their name, or a state dict in a file, under our names.

    Args:
        source: ``maskrcnn_resnet50_fpn``, the same with ``_v2``, or the path of a state dict of such a model.

    Raises:
        UserError: there is neither, the weights cannot be downloaded, or the file cannot be read safely.
    """
    with faults_named(Path(source)):
        return _read(source)


def _read(source: str) -> ForeignModel:
    path = Path(source)
    frozen_with_zero_eps = source == NAME or path.name == Path(PUBLISHED.url).name  # version 2 learnt its batch norm
    if path.exists() or path.suffix:
        content = read_checkpoint(path)
    else:
        _require_known(source)
        content = read_checkpoint(published_file(source))
    tensors = state_dict_of(content, path, ("model", "model_state_dict", "state_dict"))
    origins, unknown = rename(tensors, _prefixes() | rpn_convs(tensors, "rpn.head.conv.{}.0"))
    state = {ours: tensors[theirs] for ours, theirs in origins.items()}
    # Their first class is background, ours the last; nothing reads its box and its mask.
    change(state, path, "box_head.classifier.weight", lambda rows: rows.roll(-1, 0))
    change(state, path, "box_head.classifier.bias", lambda rows: rows.roll(-1, 0))
    for kind, rows_a_class in (("box_head.regressor", 4), ("mask_head.predictor", 1)):
        for part in ("weight", "bias"):
            change(state, path, f"{kind}.{part}", lambda rows, first=rows_a_class: rows[first:])  # type: ignore[misc]
    frozen = not any(key.endswith("num_batches_tracked") for key in tensors)
    backbone = {"norm_eps": 0.0} if frozen_with_zero_eps else {}
    names = None
    if state.get("stages.0.box_head.classifier.bias", torch.empty(0)).shape[0] == len(PUBLISHED.meta["categories"]):
        listed = enumerate(PUBLISHED.meta["categories"][1:], start=1)
        names = [f"unused {i}" if name == "N/A" else name for i, name in listed]
    return ForeignModel(
        project="torchvision",
        path=path,
        state=state,
        origins=origins,
        unknown=unknown,
        names=names,
        labels_are_ids=True,
        values={**VALUES, "model": {**VALUES["model"], "backbone": backbone}},
        remarks=[f"{path} {OWN_EPS}."] if frozen and not frozen_with_zero_eps else [],
    )


def published_file(name: str = NAME) -> Path:
    """The file of the published weights where torchvision keeps it; downloaded if it is not there.

    Args:
        name: of the model.

    Raises:
        UserError: it cannot be downloaded. The message says from where, and where to put it.
    """
    url = BY_NAME[name].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if file.is_file():
        return file
    usual = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it would say that it begins
            torch.hub.load_state_dict_from_url(
                url, map_location="cpu", weights_only=True, check_hash=True, progress=sys.stderr.isatty()
            )
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"{name}: {url} cannot be downloaded ({getattr(error, 'reason', error)}); fetch it elsewhere and "
            f"put it at {file}"
        ) from error
    finally:
        socket.setdefaulttimeout(usual)
    return file


def _require_known(name: str) -> None:
    if name not in BY_NAME:
        raise UserError(
            f"{name}: is neither a file nor the name of a model that is converted; there are {' and '.join(BY_NAME)}"
        )


def _prefixes() -> dict[str, str]:
    """Their names -> ours; layers gained a level of nesting in torchvision 0.13."""
    names = {
        "backbone.body": "backbone.net",
        "rpn.head.conv": "rpn.conv",
        "rpn.head.cls_logits": "rpn.objectness",
        "rpn.head.bbox_pred": "rpn.deltas",
        "roi_heads.box_head.fc6": "stages.0.box_head.fc1",
        f"roi_heads.box_head.{CONVS + 1}": "stages.0.box_head.fc1",  # version 2's, behind convolutions and flattening
        "roi_heads.box_head.fc7": "stages.0.box_head.fc2",
        "roi_heads.box_predictor.cls_score": "stages.0.box_head.classifier",
        "roi_heads.box_predictor.bbox_pred": "stages.0.box_head.regressor",
        "roi_heads.mask_predictor.conv5_mask": "stages.0.mask_head.upsample",
        "roi_heads.mask_predictor.mask_fcn_logits": "stages.0.mask_head.predictor",
    }
    for level in range(4):
        for theirs, ours in (("inner_blocks", "lateral"), ("layer_blocks", "output")):
            names[f"backbone.fpn.{theirs}.{level}"] = f"neck.{ours}_convs.{level}"
            names[f"backbone.fpn.{theirs}.{level}.0"] = f"neck.{ours}_convs.{level}"
            names[f"backbone.fpn.{theirs}.{level}.1"] = f"neck.{ours}_norms.{level}"
    for i in range(CONVS):
        for head in ("box_head", "mask_head"):
            names[f"roi_heads.{head}.{i}.0"] = f"stages.0.{head}.convs.{i}"
            names[f"roi_heads.{head}.{i}.1"] = f"stages.0.{head}.norms.{i}"
        names[f"roi_heads.mask_head.mask_fcn{i + 1}"] = f"stages.0.mask_head.convs.{i}"
    return names
