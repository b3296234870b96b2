"""Every row of Table 2 at full size: images a second in training and at inference, peak memory, the largest batch.

    python benchmarks/rows.py --device cuda                           # all rows, bf16, two images of 1280 x 1280
    python benchmarks/rows.py --size 256 256 --batch 1 --rows 10-seesaw   # CPU

Weights are random, the scene is noise with ellipses as objects, a training step ends with the optimiser, inference with
run-length codes. Row 11 trains its second branches alone; row 12 detects in one image of that size through its ten
views. The largest batch is sought by doubling and halving until a training step stays below ``--memory`` GiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
from tailseg.recipe import Recipe
from tailseg.recipe_values import override, resolve
from tailseg.recipes.ladder import REPORT
from tailseg.structures import Batch
from tailseg.training.finetune import Branches, BranchInputs, Frozen, join
from tailseg.training.optimizer import build_optimizer

RATE = 1e-7  # too small to change what is measured
TASKS = ("train", "infer")


def recipe_of(row: str, settings: Settings) -> Recipe:
    return override(resolve(f"table2/{row}"), settings.overrides)


def training_step(recipe: Recipe, settings: Settings) -> Callable[[], object]:
    """A step of the recipe's training on one batch, again and again."""
    torch.manual_seed(0)
    detector = build_detector(recipe, settings.classes).to(settings.device).to(memory_format=torch.channels_last)
    batch = scene(settings)[0].to(settings.device)
    model: nn.Module = detector
    inputs: Callable[[], Batch | BranchInputs] = lambda: batch  # noqa: E731
    if recipe.finetune.enabled:
        frozen = Frozen(detector, bf16=settings.precision == "bf16")
        model = Branches(detector).requires_grad_(True)
        singles = [single(batch, i) for i in range(len(batch))]
        inputs = lambda: join([frozen(image, seed) for seed, image in enumerate(singles)])  # noqa: E731
    optimizer = build_optimizer(model, recipe.optimizer.model_copy(update={"lr": RATE}))
    model.train()

    def step() -> None:
        seen = inputs()
        with settings.autocast():
            losses: dict[str, Tensor] = model(seen)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def single(batch: Batch, image: int) -> Batch:
    """One image of a batch."""
    return Batch(**{field.name: getattr(batch, field.name)[image : image + 1] for field in fields(batch)})


def inference(recipe: Recipe, settings: Settings) -> Callable[[], object]:
    """Detection in the images of one batch, down to run-length codes."""
    torch.manual_seed(0)
    detector = build_detector(recipe, settings.classes).to(settings.device).to(memory_format=torch.channels_last)
    detector.eval()
    batch = scene(settings)[0]
    picture = batch.images[0].permute(1, 2, 0).contiguous().numpy()
    views, divisor = views_of(recipe.test), recipe.model.neck.divisor
    batch = batch.to(settings.device)

    def detect() -> None:
        with settings.autocast():
            found = [detect_views(detector, picture, views, divisor)] if views else detector.detect(batch)
        for detections in found:
            encode_masks(detections.masks, detections.boxes, detections.image_hw)

    return detect


TASK = {"train": training_step, "infer": inference}


def measured(row: str, task: str, settings: Settings, repeats: int) -> dict[str, Any]:
    """Peak memory of a row's first step and times of later ones, for a process of its own."""
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    recipe = recipe_of(row, settings)
    own = replace(settings, batch=1) if task == "infer" and recipe.test.tta else settings
    call = TASK[task](recipe, own)
    peak = harness.peak_memory(call, device)  # gradients and momentum are made in it
    found = harness.summary([harness.timed(call, device) for _ in range(repeats)], own.batch)
    return found | {"batch": own.batch, "peak_bytes": peak}


def fits(row: str, settings: Settings, limit: int) -> bool:
    """Whether a training step stays below ``limit`` bytes on the device, for a process of its own.

    One image is too few for ResNeSt, whose split attention has batch norm over one value an image.
    """
    try:
        step = training_step(recipe_of(row, settings), settings)
        step()  # momentum is there from now on
        return harness.peak_memory(step, torch.device(settings.device)) <= limit
    except torch.cuda.OutOfMemoryError:
        return False
    except ValueError as error:
        if settings.batch > 1 or "more than 1 value per channel" not in str(error):
            raise
        return False


def largest_batch(row: str, settings: Settings, limit: int) -> int:
    """The most images a training step takes; 0 if there is no such number."""

    def fit(batch: int) -> bool:
        return bool(harness.in_own_process(fits, row, replace(settings, batch=batch), limit))

    good, bad = 0, 2
    while fit(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fit(middle) else (good, middle)
    return good


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
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the recipes")
    parser.add_argument("--memory", type=float, help="GiB that the largest batch has to fit; without it none is sought")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/rows-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    settings = Settings(
        device=options.device,
        batch=options.batch,
        size=(options.size[0], options.size[1]),
        classes=options.classes,
        precision=options.precision,
        pairs=0,
        objects=12,
        overrides=tuple(options.set),
        threads=options.threads,
    )
    result: dict[str, Any] = {"machine": harness.machine(device), "settings": asdict(settings), "rows": {}}
    out = options.out or harness.RESULTS / f"rows-{options.device}.json"
    for row in options.rows:
        found = {task: harness.in_own_process(measured, row, task, settings, options.repeats) for task in options.tasks}
        if options.memory is not None:
            found["largest_batch"] = largest_batch(row, settings, int(options.memory * 2**30))
        result["rows"][row] = found
        harness.write_json(out, result)
        numbers = [
            f"{task} {found[task]['images_per_second']:.3f} images/s, {found[task]['peak_bytes'] / 2**30:.2f} GiB"
            for task in options.tasks
        ]
        print(f"{row:18}" + "; ".join(numbers), flush=True)


if __name__ == "__main__":
    main()
