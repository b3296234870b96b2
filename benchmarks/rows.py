"""Every row of Table 2 at full size: images a second in training and at inference, peak memory, the largest batch.

    python benchmarks/rows.py --device cuda                           # all rows, bf16, two images of 1280 x 1280
    python benchmarks/rows.py --size 256 256 --batch 1 --rows 10-seesaw   # CPU

Weights are random, the scene is noise with ellipses as objects, a training step ends with the optimiser, inference with
run-length codes in photographs of half that size, as LVIS's are. Untrained, all 1.2 million (box, class) pairs of an
image score above the threshold; it is raised until ``--pairs`` do, as after training. Row 11 trains its second branches
alone; row 12 trains nothing and detects in one photograph through its ten views. The largest batch is the one whose
training step stays below ``--memory`` GiB.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import harness
import torch
from throughput import Settings, scene
from torch import Tensor, nn

from tailseg.evaluation.tta import detect_views, views_of
from tailseg.layers.paste import encode_masks
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.ladder import REPORT
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed, override
from tailseg.structures import Batch
from tailseg.training.finetune import Branches, BranchInputs, Frozen, join
from tailseg.training.optimizer import build_optimizer

RATE = 1e-7  # too small to change what is measured
TASKS = ("train", "infer")


def recipe_of(row: str, settings: Settings) -> Recipe:
    return override(resolve(f"table2/{row}"), settings.overrides)


def detector_of(recipe: Recipe, settings: Settings) -> Detector:
    """With random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        detector = build_detector(recipe, settings.classes)
    return detector.to(memory_format=torch.channels_last)


def training_step(detector: Detector, recipe: Recipe, settings: Settings) -> Callable[[Batch], object]:
    """A step of the recipe's training on a batch."""
    model: nn.Module = detector
    inputs: Callable[[Batch], Batch | BranchInputs] = lambda batch: batch  # noqa: E731
    if recipe.finetune.enabled:
        frozen = Frozen(detector, bf16=settings.precision == "bf16")
        model = Branches(detector).requires_grad_(True)
        inputs = lambda batch: join([frozen(single(batch, i), i) for i in range(len(batch))])  # noqa: E731
    optimizer = build_optimizer(model, changed(recipe, {"optimizer.lr": RATE}).optimizer)

    def step(batch: Batch) -> None:
        model.train()
        seen = inputs(batch)
        with settings.autocast():
            losses: dict[str, Tensor] = model(seen)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def single(batch: Batch, image: int) -> Batch:
    """One image of a batch."""
    return Batch(**{field.name: getattr(batch, field.name)[image : image + 1] for field in fields(batch)})


def batch_of(settings: Settings, images: int) -> Batch:
    return scene(replace(settings, batch=images))[0].to(settings.device)


@torch.no_grad()
def raise_threshold(detector: Detector, batch: Batch, settings: Settings) -> None:
    """Let about ``settings.pairs`` (box, class) pairs an image score above the threshold."""
    detector.eval()
    with settings.autocast():
        features = detector.extract_features(batch)
        boxes = detector.rpn.propose(
            detector.rpn(features.pyramid), batch.image_sizes, training=detector.rpn.training
        ).boxes
        image = torch.arange(len(batch), device=boxes.device).view(-1, 1, 1).expand(-1, boxes.shape[1], 1)
        rois = torch.cat([image.to(boxes), boxes], dim=2).flatten(0, 1)
        _, scores = detector.predict_boxes(features, rois, batch.image_sizes)
    wanted = min(settings.pairs * len(batch), scores.numel())
    detector.score_threshold = float(scores.flatten().topk(wanted).values[-1])


def inference(detector: Detector, recipe: Recipe, settings: Settings) -> tuple[Callable[[], object], int]:
    """Detection in a batch, down to run-length codes, and its images: one where it is looked at in several views."""
    views = views_of(recipe)
    images = 1 if views else settings.batch
    batch = batch_of(settings, images)
    batch = replace(batch, original_sizes=batch.image_sizes // 2)
    raise_threshold(detector, batch, settings)
    picture = batch.images[0, :, ::2, ::2].permute(1, 2, 0).contiguous().cpu().numpy()

    def detect() -> None:
        detector.eval()
        with settings.autocast():
            found = [detect_views(detector, picture, views)] if views else detector.detect(batch)
        for detections in found:
            encode_masks(detections.masks, detections.boxes, detections.image_hw)

    return detect, images


def measured(
    row: str, tasks: Sequence[str], settings: Settings, repeats: int, limit: int | None
) -> dict[str, dict[str, Any] | int]:
    """By task peak memory of a call and times of later ones; with ``limit`` (bytes) also the largest batch.

    For a process of its own: what was there before would count as memory on CPU.
    """
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    recipe = recipe_of(row, settings)
    detector = detector_of(recipe, settings)
    found: dict[str, dict[str, Any] | int] = {}

    def add(task: str, call: Callable[[], object], images: int) -> int:
        if device.type == "cuda":
            call()  # the first loads kernels and makes momentum; on CPU it would leave what it freed
        peak = harness.peak_memory(call, device)
        times = [harness.timed(call, device) for _ in range(repeats)]
        found[task] = harness.summary(times, images) | {"batch": images, "peak_bytes": peak}
        return peak

    if "infer" in tasks:  # first, while there are neither gradients nor momentum
        add("infer", *inference(detector, recipe, settings))
    if "train" in tasks and not recipe.test.tta:  # test-time augmentation trains nothing
        step, batch = training_step(detector, recipe, settings), batch_of(settings, settings.batch)
        peak = add("train", lambda: step(batch), settings.batch)
        if limit is not None:
            known = {len(batch): peak}
            found["largest_batch"] = largest_batch(lambda n: known.get(n) or peak_of(step, batch, n), limit)
    return found


def peak_of(step: Callable[[Batch], object], some: Batch, images: int) -> float:
    """Bytes at the peak of a training step on so many images, copies of some; infinite where there are not so many."""
    torch.cuda.empty_cache()
    copies = torch.arange(images, device=some.images.device) % len(some)
    batch = Batch(**{field.name: getattr(some, field.name)[copies] for field in fields(some)})
    try:
        return harness.peak_memory(lambda: step(batch), some.images.device)
    except torch.cuda.OutOfMemoryError:
        return math.inf


def largest_batch(peak: Callable[[int], float], limit: int) -> int:
    """The most images whose training step peaks at ``limit`` bytes; 0 if two are too many.

    One image is too few for ResNeSt, whose split attention has batch norm over one value an image. Memory grows by
    about the same with every image: the line through 2 and 4 images tells where to look.
    """
    two, four = peak(2), peak(4)
    if two > limit:
        return 0
    images = 2 if four == math.inf else 2 + int(2 * (limit - two) / max(four - two, 1))
    if peak(images) <= limit:
        while peak(images + 1) <= limit:
            images += 1
        return images
    while images > 2 and peak(images) > limit:
        images -= 1
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each row, after one that is not")
    parser.add_argument("--batch", type=int, default=2, help="images of a call")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 1280), metavar=("H", "W"), help="pixels")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--rows", nargs="+", default=list(REPORT), choices=list(REPORT), metavar="ROW")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs an image above the score threshold")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the recipes")
    parser.add_argument("--memory", type=float, help="GiB that the largest batch has to fit; without it none is sought")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/rows-DEVICE.json")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    device = harness.require_device(options.device)
    settings = Settings(
        device=options.device,
        batch=options.batch,
        size=(options.size[0], options.size[1]),
        classes=options.classes,
        precision=options.precision,
        pairs=options.pairs,
        objects=12,
        overrides=tuple(options.set),
        threads=options.threads,
    )
    result: dict[str, Any] = {"machine": harness.machine(device), "settings": asdict(settings), "rows": {}}
    out = options.out or harness.RESULTS / f"rows-{options.device}.json"
    limit = None if options.memory is None else int(options.memory * 2**30)
    for row in options.rows:
        # The resident set keeps what was freed, so on CPU no task comes after another.
        groups = [options.tasks] if device.type == "cuda" else [[task] for task in options.tasks]
        found: dict[str, Any] = {}
        for tasks in groups:
            found |= harness.in_own_process(measured, row, tasks, settings, options.repeats, limit)
        result["rows"][row] = found
        harness.write_json(out, result)
        numbers = [
            f"{task} {found[task]['images_per_second']:.3f} images/s, {found[task]['peak_bytes'] / 2**30:.2f} GiB"
            for task in TASKS
            if task in found
        ]
        if "largest_batch" in found:
            numbers.append(f"at most {found['largest_batch']} images")
        print(f"{row:18}" + "; ".join(numbers), flush=True)


if __name__ == "__main__":
    main()
