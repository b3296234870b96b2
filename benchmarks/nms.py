"""What NMS costs: of the proposals of a batch, within image and level, and of an image's detections, within class.

    python benchmarks/nms.py                       # CPU, two threads
    python benchmarks/nms.py --device cuda

Ours is `keep_within_levels` and `multiclass_nms`. Named alternatives, timed in turn with it on the same boxes:

- torchvision: as its detectors do it, `torchvision.ops.batched_nms` for each image, by level; for detections by class,
  on all pairs above the score threshold;
- float64: one call of torchvision's NMS for the whole batch, boxes moved apart in float64, as we do it without Triton.

The boxes crowd around objects, so that NMS drops most of them. What ours keeps must be what torchvision's NMS keeps of
each list on the CPU, and what the others keep is counted against it. Also said, on CUDA: whether `keep_within_levels`
waits for the device.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as our command line sets it

import harness
import torch
from gpu import in_error_mode
from torch import Tensor
from torchvision.ops import batched_nms, nms

from tailseg.model.boxes import keep_within_levels, multiclass_nms, nms_within_groups

IMAGE = 1280  # pixels a side
LAST_LEVEL = 1200  # anchors of P6, all of which go into NMS
OBJECTS = 40
LEVEL_IOU = 0.7
SCORE, CLASS_IOU, LIMIT = 1e-4, 0.5, 300  # as the recipes for LVIS


def crowd(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Boxes (*shape, 4) around objects, inside the image."""
    corners = torch.rand(OBJECTS, 2, generator=generator) * IMAGE * 0.8
    objects = torch.cat([corners, corners + 20 + torch.rand(OBJECTS, 2, generator=generator) * 200], dim=1)
    own = objects[torch.randint(0, OBJECTS, shape, generator=generator)]
    side = (own[..., 2:] - own[..., :2]).repeat_interleave(2, dim=-1).view(*shape, 2, 2).transpose(-1, -2).flatten(-2)
    return (own + torch.randn(*shape, 4, generator=generator) * 0.12 * side).clamp(0, IMAGE)


def proposals(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Boxes (B, N, 4), scores that fall within each level, valid ones, and the lengths of the levels, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    sizes = [options.boxes] * 4 + [min(options.boxes, LAST_LEVEL)]
    boxes = crowd((options.batch, sum(sizes)), generator)
    scores = torch.rand(options.batch, sum(sizes), generator=generator)
    scores = torch.cat([part.sort(dim=1, descending=True).values for part in scores.split(sizes, dim=1)], dim=1)
    return boxes, scores, (boxes[..., 2:] > boxes[..., :2]).all(2), sizes


def proposal_ways(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Marks (B, N) of the survivors."""
    *tensors, sizes = proposals(options)
    boxes, scores, valid = (part.to(options.device) for part in tensors)
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(options.device)
    groups = levels + len(sizes) * torch.arange(len(boxes), device=options.device)[:, None]

    def torchvision() -> Tensor:
        keep = torch.zeros_like(valid)
        for image in range(len(boxes)):
            rows = valid[image].nonzero().squeeze(1)
            keep[image, rows[batched_nms(boxes[image, rows], scores[image, rows], levels[rows], LEVEL_IOU)]] = True
        return keep

    def float64() -> Tensor:
        own = torch.where(valid, groups, len(boxes) * len(sizes)).flatten()
        keep = torch.zeros_like(valid)
        keep.view(-1)[nms_within_groups(boxes.flatten(0, 1), scores.flatten(), own, LEVEL_IOU)] = True
        return keep & valid

    ours = partial(keep_within_levels, boxes, scores, valid, sizes, LEVEL_IOU)
    return {"ours": ours, "torchvision": torchvision, "float64": float64}


def kept_list_by_list(options: argparse.Namespace) -> Tensor:
    """What torchvision keeps of each list, in float32 on the CPU."""
    boxes, scores, valid, sizes = proposals(options)
    keep = torch.zeros_like(valid)
    for image in range(len(boxes)):
        for rows in torch.arange(boxes.shape[1]).split(sizes):
            own = rows[valid[image, rows]]
            keep[image, own[nms(boxes[image, own], scores[image, own], LEVEL_IOU)]] = True
    return keep


def detection_ways(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Boxes (n, 4) of an image's detections, best first; a box has a few likely classes and many that are not."""
    generator = torch.Generator().manual_seed(1)
    boxes = crowd((options.rois, 1), generator).to(options.device)
    logits = torch.randn(options.rois, options.classes, generator=generator) * 4
    scores = logits.softmax(dim=1).to(options.device)

    def torchvision() -> Tensor:
        rows, labels = (scores > SCORE).nonzero().unbind(1)
        kept = batched_nms(boxes[rows, 0], scores[rows, labels], labels, CLASS_IOU)[:LIMIT]
        return boxes[rows[kept], 0]

    def ours() -> Tensor:
        return multiclass_nms(boxes, scores, score_threshold=SCORE, iou=CLASS_IOU, limit=LIMIT)[0]

    return {"ours": ours, "torchvision": torchvision}


def compare(title: str, ways: Mapping[str, Callable[[], Tensor]], images: int, options: argparse.Namespace) -> Any:
    """Times of each way and their ratios to ours, printed too."""
    for way in ways.values():
        way()  # the first call compiles and loads kernels
    times = harness.in_turn(ways, options.repeats, torch.device(options.device))
    rows = {
        name: {
            **harness.summary(times[name], images),
            "ours_is_faster_by": harness.speedup(times["ours"], times[name]),
        }
        for name in ways
    }
    print(f"\n{title}\n{'':14}{'ms':>9}   over ours by the clock (range over turns)")
    for name, row in rows.items():
        ratio = row["ours_is_faster_by"]["clock"]
        print(
            f"{name:14}{1e3 * row['seconds']['median']:9.3f}"
            f"{ratio['of_medians']:9.2f} ({ratio['smallest']:.2f}-{ratio['largest']:.2f})"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=2000, help="of a level")
    parser.add_argument("--rois", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--repeats", type=int, default=20, help="turns of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/nms-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    ways = proposal_ways(options)
    expected = kept_list_by_list(options)
    differing = {name: int((way().cpu() != expected).sum()) for name, way in ways.items()}
    assert differing["ours"] == 0, f"{differing['ours']} boxes are kept by one and dropped by the other"
    detections = detection_ways(options)
    names = ("batch", "boxes", "rois", "classes", "repeats")
    result: dict[str, Any] = {
        "machine": harness.machine(device) | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "settings": {name: getattr(options, name) for name in names},
        "kept": int(expected.sum()),
        "other_than_list_by_list": differing,
        "same_detections": torch.equal(detections["ours"](), detections["torchvision"]()),
        "proposals": compare("Proposals of a batch", ways, options.batch, options),
        "detections": compare("Detections of an image", detections, 1, options),
    }
    if device.type == "cuda":
        result["waits"] = in_error_mode(ways["ours"])
        print(f"\nunder torch.cuda.set_sync_debug_mode('error'): {result['waits']}")
    harness.write_json(options.out or harness.RESULTS / f"nms-{options.device}.json", result)


if __name__ == "__main__":
    main()
