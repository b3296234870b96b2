"""mmdetection's names of backbones -> timm's, and what its networks do otherwise."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

MOST_BLOCKS = 40  # of a stage
OURS = "backbone.net"


def backbone_names(tensors: Container[str]) -> dict[str, str]:
    """Their names, or beginnings up to a dot -> ours.

    Args:
        tensors: all of their names.
    """
    names = {"backbone": OURS, "backbone.stem": f"{OURS}.conv1", "backbone.stem.7": f"{OURS}.bn1"}
    names["backbone.gn1"] = f"{OURS}.bn1"
    for block in (f"layer{stage}.{i}" for stage in range(1, 5) for i in range(MOST_BLOCKS)):
        # Of deformable convolutions as the first version of mmcv's layer named them.
        names[f"backbone.{block}.conv2_offset"] = f"{OURS}.{block}.conv2.conv_offset"
        names |= {f"backbone.{block}.gn{i}": f"{OURS}.{block}.bn{i}" for i in (1, 2, 3)}
    return names


def backbone_conventions(tensors: Container[str]) -> dict[str, Any]:
    """Recipe values of a backbone that mmdetection builds otherwise than its authors, which its tensors do not show."""
    return {"res2net_pool": False} if "backbone.layer1.0.convs.0.weight" in tensors else {}
