"""What the rows of Table 2 cost: parameters, operations and, where a GPU has measured them, images a second.

    python benchmarks/ladder.py

Writes src/tailseg/recipes/ladder.json, which `tailseg recipes list` shows, and the tables in docs/reproduce.md. What a
GPU has measured is taken from benchmarks/results/gpu.json if that is there.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tailseg.evaluation.tta import view_edges
from tailseg.model.build import build_detector
from tailseg.model.roi_features import ImageFeatures
from tailseg.recipes.ladder import COSTS, REPORT
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override
from tailseg.structures import Batch, Proposals

LVIS_CLASSES = 1203
LVIS_IMAGES = 99_388  # of the training split, with objects
SUSTAINED = 30.0  # TFLOP/s of a GPU in training: assumed
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduce.md"
COUNTED, MEASURED = (f"<!-- {kind} by benchmarks/ladder.py -->" for kind in ("counted", "measured: collected"))
END = "<!-- end -->"
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
            detector.predict_boxes(features, torch.empty(recipe.model.rpn.post_nms_test, 5), hws)
            found = recipe.test.max_detections
            detector.predict_masks(features, torch.empty(found, 5), torch.empty(found, dtype=torch.int64))
    if not recipe.test.tta:
        return parameters, float(trunk.get_total_flops() + heads.get_total_flops())
    ratio = image_hw[0] / image_hw[1]
    views = [edge * edge * ratio for edge in view_edges(recipe)] * (2 if recipe.test.tta_flip else 1)
    passes = (3 * len(views) - 2) * sum(views) / len(views) / (image_hw[0] * image_hw[1])
    return parameters, trunk.get_total_flops() * passes + heads.get_total_flops() * len(views)


class _Counter(FlopCounterMode):
    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable})


def _deformable(x: Any, weight: Any, *_args: Any, out_shape: Any, **_options: Any) -> int:
    """A deformable convolution's products are those of a convolution of its shape (FlopCounterMode gives shapes)."""
    batch, out_channels, height, width = out_shape
    return int(2 * batch * out_channels * height * width * weight[1] * weight[2] * weight[3])


def training_table(rows: dict[str, Any]) -> list[str]:
    """What training each row on LVIS v1 takes, derived from what can be counted."""
    lines = [
        "| row | epochs | TFLOP an image | EFLOP in all | hours on 8 / 16 / 64 GPUs "
        "| weights, gradients, momentum, GiB | kept for the backward pass, GiB | the same with checkpointing |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        recipe = resolve(f"table2/{name}")
        if recipe.test.tta:
            continue  # trains nothing
        each = training_teraflops(recipe, row["teraflops"])
        exa = each * recipe.schedule.epochs * LVIS_IMAGES / 1e6
        hours = " / ".join(f"{exa * 1e6 / SUSTAINED / gpus / 3600:.0f}" for gpus in (8, 16, 64))
        held, kept = row["parameters"] * 4 * 3 / 2**30, ["", ""]
        if recipe.finetune.enabled:  # only the branches, what row 11 has more than row 10, are trained
            trained = row["parameters"] - rows["10-seesaw"]["parameters"]
            held = (row["parameters"] + 2 * trained) * 4 / 2**30
        else:
            recomputing = override(recipe, ["model.backbone.checkpointing=true"])
            kept = [f"{kept_bytes(r, LVIS_CLASSES) / 2**30:.1f}" for r in (recipe, recomputing)]
        cells = (f"`{name}`", recipe.schedule.epochs, f"{each:.1f}", f"{exa:.1f}", hours, f"{held:.1f}", *kept)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def measured_table(measured: dict[str, Any]) -> list[str]:
    """What a GPU has shown of each row, and how long the training of LVIS v1 would take at that speed."""
    if not measured:
        return []
    lines = [
        "| row | images/s, training | hours on 8 / 16 / 64 GPUs | peak, GiB | largest batch in 80 GB "
        "| images/s, inference | peak, GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in measured["rows"].items():
        cells = [f"`{name}`"]
        if "train" in row:
            speed = row["train"]["images_per_second"]
            hours = resolve(f"table2/{name}").schedule.epochs * LVIS_IMAGES / speed / 3600
            each = " / ".join(f"{hours / gpus:.0f}" for gpus in (8, 16, 64))
            cells += [f"{speed:.1f}", each, _gibibytes(row["train"]), str(row.get("largest_batch", ""))]
        else:
            cells += [""] * 4
        cells += [f"{row['infer']['images_per_second']:.1f}", _gibibytes(row["infer"])] if "infer" in row else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _gibibytes(found: dict[str, Any]) -> str:
    return f"{found['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in found else ""


def kept_bytes(recipe: Recipe, num_classes: int, batch: int = 2, side: int = 1280) -> int:
    """Bytes that the forward pass of a training step keeps for the backward pass, in float32, parameters left out.

    The most that there is of a step's memory; what operations need for a moment comes on top.
    """
    seen: dict[int, tuple[int, object]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage.nbytes(), storage)  # held, lest another be given its number
        return tensor

    with torch.device("meta"), mock.patch("torch.autocast", return_value=nullcontext()):
        detector = build_detector(recipe, num_classes).train()
        proposals = recipe.model.rpn.post_nms_train
        boxes, valid = torch.empty(batch, proposals, 4), torch.ones(batch, proposals, dtype=torch.bool)
        # How many boxes NMS leaves is not known without data.
        left = Proposals(boxes=boxes, scores=boxes[..., 0], valid=valid)
        own = {parameter.untyped_storage()._cdata for parameter in detector.parameters()}
        with (
            mock.patch.object(detector.rpn, "propose", return_value=left),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            losses = detector(_batch_without_data(batch, side, num_classes))
            total = sum(size for size, _ in seen.values())
            del losses
    return total


def _batch_without_data(batch: int, side: int, classes: int, objects: int = 12) -> Batch:
    sizes = torch.empty(batch, 2, dtype=torch.int64)
    boxes = torch.empty(batch, objects, 4)
    return Batch(
        images=torch.empty(batch, 3, side, side, dtype=torch.uint8),
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=sizes[:, 0],
        boxes=boxes,
        labels=torch.empty(batch, objects, dtype=torch.int64),
        valid=torch.ones(batch, objects, dtype=torch.bool),
        masks=torch.empty(batch, objects, 114, 114, dtype=torch.uint8),
        mask_frames=boxes,
        absent=torch.zeros(batch, classes, dtype=torch.bool),
        ignored=torch.zeros(batch, 0, 0, dtype=torch.uint8),
    )


def training_teraflops(recipe: Recipe, inference: float) -> float:
    """Of one image, forward and backward: three times inference at the mean size that is drawn.

    Finetuning has only the forward half of nearly all of it.
    """
    pixels = mean_pixels(recipe) / (IMAGE_HW[0] * IMAGE_HW[1])
    return inference * pixels * (1 if recipe.finetune.enabled else 3)


def mean_pixels(recipe: Recipe, image_hw: tuple[int, int] = (480, 640)) -> float:
    """Of an image of LVIS's usual shape in training: the mean over the sizes that are drawn, cut as they are."""
    data, shape = recipe.data, max(image_hw) / min(image_hw)
    if data.long_edges is None:
        edges = [min(short * shape, data.long_edge) for short in data.short_edges]
    else:
        edges = [float(edge) for edge in range(data.long_edges[0], data.long_edges[1] + 1)]
    crop = data.crop or max(edges)
    return sum(min(edge, crop) * min(edge / shape, crop) for edge in edges) / len(edges)


def main() -> None:
    measured = harness.RESULTS / "gpu.json"
    gpu = json.loads(measured.read_text()) if measured.is_file() else {}
    on_gpu = gpu.get("rows", {})
    speeds = on_gpu.get("rows", {})
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
    COSTS.write_text(json.dumps({"gpu": on_gpu.get("machine", {}).get("device"), "rows": rows}, indent=1) + "\n")
    page = PAGE.read_text()
    for begin, lines in ((COUNTED, training_table(rows)), (MEASURED, measured_table(on_gpu))):
        before, _, rest = page.partition(begin)
        page = "\n".join([before + begin, *lines, END + rest.partition(END)[2]])
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
