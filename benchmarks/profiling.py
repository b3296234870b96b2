"""Where a call's time goes, part by part of the detector."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import harness
import torch

from tailseg.layers.paste import encode_masks
from tailseg.model import detector as detector_file
from tailseg.model.detector import Detector
from tailseg.structures import Batch

SITES = {  # part -> (owner within the detector, its method)
    "backbone": ("backbone", "forward"),
    "neck": ("neck", "forward"),
    "rpn convolutions": ("rpn", "forward"),
    "rpn matching, loss": ("rpn", "loss"),
    "proposals": ("rpn", "propose"),
    "roi sampling": ("stages.0.sampler", "forward"),
    "box pooling": ("box_pooler", "forward"),
    "box head": ("stages.0.box_head", "forward"),
    "box losses": ("stages.0.box_head", "loss"),
    "scores": ("stages.0.box_head.classification", "scores"),
    "mask pooling": ("mask_pooler", "forward"),
    "mask head": ("stages.0.mask_head", "forward"),
}
FUNCTIONS = {"mask targets": "mask_targets", "mask loss": "mask_loss", "class NMS": "multiclass_nms"}


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = [0.0]  # of the calls that are running, outermost first: seconds of watched calls inside

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            harness.wait(self.device)
            start = time.perf_counter()
            self._within.append(0.0)
            result = function(*args, **kwargs)
            harness.wait(self.device)
            whole = time.perf_counter() - start
            self.seconds[name] += whole - self._within.pop()
            self._within[-1] += whole
            return result

        return call

    def watch(self, detector: Detector) -> None:
        """Time every part of a detector from now on, each without the parts that it calls."""
        for name, (path, method) in SITES.items():
            owner = detector.get_submodule(path)
            setattr(owner, method, self.around(name, getattr(owner, method)))
        for name, function in FUNCTIONS.items():
            setattr(detector_file, function, self.around(name, getattr(detector_file, function)))


def profile(
    detector: Detector,
    batch: Batch,
    task: str,
    repeats: int,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    title: str,
) -> dict[str, float]:
    """Median seconds of each part of a call of a detector, and of what is in none of them.

    Args:
        detector: its methods are watched from then on, so it serves no other call.
        batch: on the detector's device.
        task: "train" or "infer".
        repeats: calls measured, after a first one that is not.
        autocast: makes the context in which the calls run.
        title: printed above the table.
    """
    device = batch.images.device
    clock = Clock(device)
    originals = {function: getattr(detector_file, function) for function in FUNCTIONS.values()}
    clock.watch(detector)

    def train() -> None:
        detector.train()
        with autocast():
            losses = detector(batch)
        clock.around("backward", torch.stack(list(losses.values())).sum().backward)()
        detector.zero_grad()

    def infer() -> None:
        detector.eval()
        with autocast():
            found = detector.detect(batch)
        for one in found:
            clock.around("mask pasting", encode_masks)(one.masks, one.boxes, one.image_hw)

    rows: dict[str, list[float]] = defaultdict(list)
    try:
        for turn in range(repeats + 1):
            clock.seconds.clear()
            whole = harness.timed(train if task == "train" else infer, device).clock
            if turn > 0:  # the first is the warm-up
                for name, seconds in clock.seconds.items():
                    rows[name].append(seconds)
                rows["all else"].append(whole - sum(clock.seconds.values()))
    finally:
        for function, original in originals.items():
            setattr(detector_file, function, original)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    total = sum(medians.values())
    print(f"\n{title}, {task}, batch {len(batch)} on {device}: {total:.3f} s a call")
    for name, seconds in medians.items():
        print(f"  {name:20}{seconds:9.3f} s{seconds / total:8.1%}")
    return medians
