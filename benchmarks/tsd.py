"""What TSD costs over the plain box head: time of forward and backward, and of inference, on the same RoIs.

    python benchmarks/tsd.py                       # CPU, two threads, three minutes
    python benchmarks/tsd.py --device cuda

Of one image's pyramid and RoIs a step pools the features, runs the head, computes its losses and goes back to the
pyramid and all weights; inference pools and runs the head. Both heads have the classes, losses and one box a RoI of
table 2, and share everything but themselves. Beside the ratio of times stands that of the floating-point operations of
their matrix products (counted by torch): in training TSD has the hidden layers of the plain head three times.

Also timed, alone: TSD's shifted pooling, gradients to pyramid and shifts, over torchvision's roi_align with the same
points, gradient to the pyramid.

Cases take turns. A ratio is that of the medians, its spread the smallest and largest within a turn: by the clock and by
processor time over all threads, which hardly minds that others use the processor too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import harness
import torch
from roi_align import picked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tailseg.losses import CrossEntropyClassification
from tailseg.model.box_head import ROI_SIZE, BoxHead, RoITargets
from tailseg.model.roi_features import ImageFeatures, RoIPooler, pyramid_rows, shifted_roi_align
from tailseg.model.tsd import TsdBoxHead
from tailseg.recipes.classifiers import CrossEntropyRecipe
from tailseg.recipes.model_section import StageRecipe, TsdRecipe

STRIDES = (4, 8, 16, 32)
Heads = dict[str, BoxHead | TsdBoxHead]
POOLER = RoIPooler(ROI_SIZE, sampling_ratio=0, aligned=True)


def pyramid_of(size: tuple[int, int], channels: int, device: torch.device) -> list[Tensor]:
    """P2..P5 of one image, channels_last as the neck gives them, smooth enough to be features."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, channels, size[0] // s, size[1] // s, generator=generator) for s in STRIDES]
    return [m.to(device, memory_format=torch.channels_last).requires_grad_() for m in maps]


def targets_of(rois: int, size: tuple[int, int], classes: int, device: torch.device) -> RoITargets:
    """Sampled RoIs, a quarter of them positive; sides are log-normal around 64 pixels, cut at the image's edges."""
    generator = torch.Generator().manual_seed(1)
    limits = torch.tensor([size[1], size[0]]).float()
    sides = (torch.randn(rois, 2, generator=generator) * 0.8).exp() * 64
    corners = torch.rand(rois, 2, generator=generator) * (limits - 8)
    boxes = torch.cat([corners, torch.minimum(corners + sides, limits)], dim=1)
    positive = torch.arange(rois) < rois // 4
    moved = boxes + (torch.rand(rois, 4, generator=generator) - 0.5) * 0.2 * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    labels = torch.randint(0, classes, (rois,), generator=generator)
    targets = {
        "rois": torch.cat([torch.zeros(rois, 1), boxes], dim=1),
        "labels": torch.where(positive, labels, classes),
        "positive": positive,
        "valid": torch.ones_like(positive),
        "is_ground_truth": torch.zeros_like(positive),
        "objects": torch.zeros_like(labels),
        "boxes": torch.where(positive.unsqueeze(1), moved, boxes),
    }
    return RoITargets(**{name: value.to(device) for name, value in targets.items()})


def heads_of(channels: int, classes: int, width: int, device: torch.device) -> Heads:
    torch.manual_seed(0)
    classifier = CrossEntropyRecipe()
    options: dict[str, Any] = {
        "width": width,
        "class_agnostic": True,
        "box_beta": 1.0,
        "stds": StageRecipe().stds,
        "normalized": classifier.normalized,
        "temperature": classifier.temperature,
        "tau_norm": 0.0,
    }
    plain = BoxHead(channels, CrossEntropyClassification(classes), convs=0, norm=False, **options)
    tsd = TsdBoxHead(channels, CrossEntropyClassification(classes), **options, **TsdRecipe().model_dump())
    return {"box head": plain.to(device), "TSD": tsd.to(device)}


def training_step(head: BoxHead | TsdBoxHead, pyramid: list[Tensor], targets: RoITargets) -> Callable[[], object]:
    leaves = [*pyramid, *head.parameters()]

    def step() -> object:
        head.train()
        prediction = head(
            ImageFeatures(pyramid).pool(POOLER),
            targets.rois,
            targets.valid,
        )
        loss = torch.stack(list(head.loss(prediction, targets).values())).sum()
        return torch.autograd.grad(loss, leaves)

    return step


def inference(head: BoxHead | TsdBoxHead, pyramid: list[Tensor], targets: RoITargets) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        head.eval()
        return head.decode(head(ImageFeatures(pyramid).pool(POOLER), targets.rois))

    return run


def poolings(pyramid: list[Tensor], rois: Tensor, *, backward: bool) -> dict[str, Callable[[], object]]:
    """Torchvision's pooling and ours, the making of the maps or rows that they read included."""
    shifts = torch.zeros(len(rois), 2, ROI_SIZE, ROI_SIZE, device=rois.device)
    shifts.normal_(0, 0.05, generator=torch.Generator(rois.device).manual_seed(2)).requires_grad_()

    def with_backward(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(backward):
                pooled = forward()
            return torch.autograd.grad(pooled, leaves, torch.ones_like(pooled)) if backward else pooled

        return call

    def theirs() -> Tensor:
        return picked([features.contiguous() for features in pyramid], rois, ROI_SIZE, sampling=2)

    def ours() -> Tensor:
        return shifted_roi_align(pyramid_rows(pyramid, STRIDES), rois, shifts, ROI_SIZE)

    return {
        "torchvision's roi_align": with_backward(theirs, pyramid),
        "shifted pooling": with_backward(ours, [*pyramid, shifts]),
    }


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    total: int = counter.get_total_flops()
    return total


def compare(cases: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Times of two cases, and how many times longer the second takes."""
    for call in cases.values():
        call()  # the first call loads kernels and finds memory
    times = harness.in_turn(cases, repeats, device)
    first, second = cases
    rows: dict[str, Any] = {name: harness.summary(own, 1) for name, own in times.items()}
    return rows | {"time_ratio": harness.speedup(times[first], times[second])}


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in result.items():
        if isinstance(row, dict) and "seconds" in row:
            print(f"  {name:26}{row['seconds']['median'] * 1e3:9.1f} ms")
    for clock, ratio in result["time_ratio"].items():
        print(f"  ratio by {clock:10}{ratio['of_medians']:7.3f} ({ratio['smallest']:.3f}-{ratio['largest']:.3f})")
    if "operations_ratio" in result:
        print(f"  ratio of matrix operations {result['operations_ratio']:.3f}")
    print(end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rois", type=int, default=512)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), help="of the image: height, width")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=10, help="turns of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/tsd-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    size = (options.size[0], options.size[1])
    pyramid = pyramid_of(size, options.channels, device)
    targets = targets_of(options.rois, size, options.classes, device)
    heads = heads_of(options.channels, options.classes, options.width, device)
    names = ("rois", "channels", "classes", "width", "repeats")
    result: dict[str, Any] = {
        "machine": harness.machine(device) | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "settings": {name: getattr(options, name) for name in names} | {"size": list(size)},
    }
    for task, make in (("train", training_step), ("infer", inference)):
        cases = {name: make(head, pyramid, targets) for name, head in heads.items()}
        result[task] = compare(cases, options.repeats, device)
        counted = [operations(call) for call in cases.values()]
        result[task]["operations_ratio"] = counted[1] / counted[0]
        show(f"{task}: {options.rois} RoIs, {options.classes} classes", result[task])
    for task, backward in (("pooling, forward and backward", True), ("pooling, forward", False)):
        result[task] = compare(poolings(pyramid, targets.rois, backward=backward), options.repeats, device)
        show(task, result[task])
    harness.write_json(options.out or harness.RESULTS / f"tsd-{options.device}.json", result)


if __name__ == "__main__":
    main()
