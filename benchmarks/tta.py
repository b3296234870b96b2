"""What test-time augmentation costs: peak memory and time of all its views, over the largest view alone.

    python benchmarks/tta.py                          # CPU, ten minutes of two cores
    python benchmarks/tta.py --device cuda --edges 1200 1400 1600 1800 2000

Views of five sizes, each mirrored too, are merged into the detections of one picture (`tailseg.evaluation.tta`). Beside
that stands plain detection in the largest size. The promise: ten views need at most 1.3 times its memory, since only
one view's maps exist at a time, for which they are computed 28 times instead of ten.

The model is Mask R-CNN R50-FPN of random weights with boxes of their own for each of LVIS's 1203 classes, the most that
there is to average; its classifier is shifted until ``--pairs`` (box, class) pairs of the largest view score above the
threshold, as in a trained one. Both cases start from the decoded picture and end with run-length codes.

Memory beyond what is there before a call, the weights and the picture, is measured in two ways:

- held: the most that torch's tensors and its work space take at once, by its own account;
- resident: growth of the process in the first call in a process of its own, once a turn: of the resident set on CPU, of
  what torch has reserved on CUDA. Whatever the allocator has to take because freed pieces do not fit is in it, and on
  CPU what libraries take on first use, so it varies; the smallest and largest ratio of any two turns are given.

Cases take turns. Time is by the clock and by processor time over all threads. What the pixels let expect is the padded
area of all 28 passes over that of one pass through the largest view.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import cv2
import harness
import numpy as np
import torch
from losses import held_memory
from throughput import Settings, our_detector

from tailseg.data.batches import batch_of
from tailseg.data.transforms import Image, fit_transform
from tailseg.evaluation.tta import View, detect_views
from tailseg.layers.paste import encode_masks
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.fpn import FPN
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override

CASES = ALL, LARGEST = "all views", "largest view alone"
PROMISE = 1.3  # times the memory of the largest view alone


def picture_of(options: argparse.Namespace) -> Image:
    """Blots of colour."""
    height, width = options.picture
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture: Image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture


def views_of(options: argparse.Namespace) -> list[View]:
    return [View(edge, mirrored) for edge in options.edges for mirrored in (False, True)]


def recipe_of(options: argparse.Namespace) -> Recipe:
    return override(resolve("table1/cross-entropy"), options.set)


def trained_like(options: argparse.Namespace) -> Detector:
    """The detector, its classifier shifted on noise of the largest view's size."""
    largest = batch_of(picture_of(options), View(max(options.edges), mirrored=False).transform, 1)
    settings = Settings(
        device=options.device,
        batch=1,
        size=(int(largest.image_sizes[0, 0]), int(largest.image_sizes[0, 1])),
        classes=options.classes,
        precision=options.precision,
        pairs=options.pairs,
        objects=2,
        overrides=tuple(options.set),
        threads=options.threads,
    )
    return our_detector("table1/cross-entropy", settings, options.pairs)[0].eval()


def call_of(name: str, detector: Detector, options: argparse.Namespace) -> Callable[[], int]:
    """One picture, from its pixels to run-length codes; returns the number of detections."""
    picture, largest = picture_of(options), max(options.edges)
    divisor = detector.divisor

    def call() -> int:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            if name == ALL:
                found = detect_views(detector, picture, views_of(options))
            else:
                batch = batch_of(picture, fit_transform(largest, largest), divisor)
                found = detector.detect(batch.to(options.device))[0]
        return len(encode_masks(found.masks, found.boxes, found.image_hw))

    return call


def resident_memory(name: str, weights: Path, options: argparse.Namespace) -> int:
    """Bytes by which a process of its own grows in its first call."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    detector = build_detector(recipe_of(options), options.classes)
    detector.load_state_dict(torch.load(weights))
    detector = detector.to(device).to(memory_format=torch.channels_last).eval()
    call = call_of(name, detector, options)
    if device.type == "cpu":
        return harness.peak_memory(call, device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_reserved(device) - before


def expected_ratio(options: argparse.Namespace) -> float:
    """Padded pixels of all passes over those of the largest view."""
    divisor = FPN.divisor
    batches = [batch_of(picture_of(options), view.transform, divisor) for view in views_of(options)]
    areas = [batch.images.shape[2] * batch.images.shape[3] for batch in batches]
    return (3 * sum(areas) - areas[-1] - areas[0]) / max(areas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--picture", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="pixels")
    parser.add_argument("--edges", type=int, nargs="+", default=(600, 700, 800, 900, 1000), help="pixels")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs above the score threshold")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the recipe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/tta-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    detector = trained_like(options)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save({key: value.cpu() for key, value in detector.state_dict().items()}, weights)
        resident: dict[str, list[int]] = {name: [] for name in CASES}
        for _ in range(options.repeats):
            for name in CASES:
                resident[name].append(harness.in_own_process(resident_memory, name, weights, options))
    calls = {name: call_of(name, detector, options) for name in CASES}
    held = {name: held_memory(call, device) for name, call in calls.items()}
    counts = {name: call() for name, call in calls.items()}
    times = harness.in_turn(calls, options.repeats, device)
    views = len(views_of(options))
    shown = ("precision", "picture", "edges", "classes", "pairs", "set")
    result: dict[str, Any] = {
        "machine": harness.machine(device) | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "settings": {key: getattr(options, key) for key in shown},
        "views": views,
        "passes": 3 * views - 2,
        "cases": {
            name: harness.summary(times[name], 1)
            | {"detections": counts[name], "held_bytes": held[name], "resident_bytes": resident[name]}
            for name in CASES
        },
        "held_ratio": held[ALL] / held[LARGEST],
        "resident_ratio": {
            "of_medians": statistics.median(resident[ALL]) / statistics.median(resident[LARGEST]),
            "smallest": min(resident[ALL]) / max(resident[LARGEST]),
            "largest": max(resident[ALL]) / min(resident[LARGEST]),
        },
        "time_ratio": harness.speedup(times[LARGEST], times[ALL]),
        "time_ratio_expected_from_pixels": expected_ratio(options),
    }
    print(f"{'':20}{'s':>8}{'CPU s':>8}{'MiB held':>10}{'resident':>10}{'found':>7}")
    for name, row in result["cases"].items():
        print(
            f"{name:20}{row['seconds']['median']:8.2f}{row['processor_seconds']['median']:8.2f}"
            f"{held[name] / 2**20:10.0f}{statistics.median(resident[name]) / 2**20:10.0f}{row['detections']:7}"
        )
    clock, processor = (result["time_ratio"][kind]["of_medians"] for kind in ("clock", "processor"))
    print(
        f"{views} views in {result['passes']} passes: {result['held_ratio']:.2f} times the memory held, "
        "{of_medians:.2f} ({smallest:.2f}-{largest:.2f}) resident".format(**result["resident_ratio"])
        + f" (promised: at most {PROMISE}), {clock:.1f} times the time, {processor:.1f} times the CPU s "
        f"({result['time_ratio_expected_from_pixels']:.1f} by the pixels)"
    )
    harness.write_json(options.out or harness.RESULTS / f"tta-{options.device}.json", result)


if __name__ == "__main__":
    main()
