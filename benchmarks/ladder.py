"""What the rows of Table 2 cost: parameters, operations and, where a GPU has measured them, images a second.

    python benchmarks/ladder.py

Writes src/tailseg/recipes/ladder.json, which `tailseg recipes list` shows. Images a second are taken from
benchmarks/results/gpu.json if that is there.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any
from unittest import mock

import harness
import torch
from torch.utils.flop_counter import FlopCounterMode

from tailseg.model.build import build_detector
from tailseg.model.roi_features import ImageFeatures
from tailseg.recipe import Recipe
from tailseg.recipe_values import resolve
from tailseg.recipes.ladder import COSTS, REPORT

LVIS_CLASSES = 1203
IMAGE_HW = (832, 1344)  # the usual 800 x 1333, padded to what every neck takes


def count(recipe: Recipe, num_classes: int, image_hw: tuple[int, int] = IMAGE_HW) -> tuple[int, float]:
    """Parameters, and floating point operations of detecting in one image.

    Convolutions and matrix products are counted, a multiplication with its addition as two; interpolation (RoIAlign,
    CARAFE's sums, the sampling of deformable convolutions), NMS and activations are not. The recipe's own numbers of
    proposals and detections are taken as reached. With test-time augmentation, trunks count by their pixels, three
    times a view less two, heads once a view.
    """
    # Tensors without data know no autocast, which parts of the detector switch off.
    with torch.device("meta"), mock.patch("torch.autocast", return_value=nullcontext()):
        detector = build_detector(recipe, num_classes).eval()
        parameters = sum(p.numel() for p in detector.parameters())
        image = torch.empty(1, 3, *image_hw)
        hws = torch.empty(1, 2, dtype=torch.int64)
        trunk, heads = _Counter(), _Counter()
        with torch.no_grad(), trunk:
            pyramid = list(detector.neck(detector.backbone(image)))
            detector.rpn(pyramid)
            context = None if detector.context is None else detector.context(pyramid[-1], hws)[1]
        features = ImageFeatures(pyramid, context)
        with torch.no_grad(), heads:
            detector.scored(features, torch.empty(recipe.model.rpn.post_nms_test, 5), hws)
            found = recipe.test.max_detections
            detector.masks_of(features, torch.empty(found, 5), torch.empty(found, dtype=torch.int64))
    if not recipe.test.tta:
        return parameters, float(trunk.get_total_flops() + heads.get_total_flops())
    ratio = image_hw[0] / image_hw[1]
    views = [edge * edge * ratio for edge in recipe.test.tta_long_edges] * (2 if recipe.test.tta_flip else 1)
    passes = (3 * len(views) - 2) * sum(views) / len(views) / (image_hw[0] * image_hw[1])
    return parameters, trunk.get_total_flops() * passes + heads.get_total_flops() * len(views)


class _Counter(FlopCounterMode):
    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable})


def _deformable(x: Any, weight: Any, *_args: Any, out_shape: Any, **_options: Any) -> int:
    """A deformable convolution's products are those of a convolution of its shape (FlopCounterMode gives shapes)."""
    batch, out_channels, height, width = out_shape
    return int(2 * batch * out_channels * height * width * weight[1] * weight[2] * weight[3])


def main() -> None:
    measured = harness.RESULTS / "gpu.json"
    gpu = json.loads(measured.read_text()) if measured.is_file() else {}
    speeds = gpu.get("rows", {}).get("rows", {})
    rows = {}
    for name in REPORT:
        parameters, flops = count(resolve(f"table2/{name}"), LVIS_CLASSES)
        own = speeds.get(name, {})
        rows[name] = {
            "parameters": parameters,
            "teraflops": round(flops / 1e12, 3),
            "images_per_second": {task: own.get(task, {}).get("images_per_second") for task in ("train", "infer")},
        }
        print(f"{name:18}{parameters:>14,}{flops / 1e12:>10.2f} TFLOP")
    COSTS.write_text(json.dumps({"gpu": gpu.get("machine", {}).get("device"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
