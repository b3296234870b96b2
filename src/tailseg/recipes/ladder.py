"""Table 2 of the report as a ladder: what each row adds, costs and scored.

Parameters and operations are counted by ``python benchmarks/ladder.py``, which writes ladder.json beside this file:
listing recipes should not take the time of building twelve models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COSTS = Path(__file__).with_name("ladder.json")


@dataclass(frozen=True, slots=True)
class Reported:
    """A row of Table 2 in the report: LVIS v1 val, percent."""

    title: str
    box_ap: float
    mask_ap: float
    ap_rare: float
    ap_common: float
    ap_frequent: float

    @property
    def metrics(self) -> tuple[float, float, float, float, float]:
        """Box AP, mask AP, mask AP of rare, common and frequent classes."""
        return self.box_ap, self.mask_ap, self.ap_rare, self.ap_common, self.ap_frequent


REPORT = {
    "01-mask-rcnn": Reported("Mask R-CNN", 20.1, 18.7, 1.0, 16.1, 29.4),
    "02-sync-bn": Reported("+ SyncBN", 20.2, 18.9, 0.7, 16.0, 30.3),
    "03-carafe": Reported("+ CARAFE upsample", 20.4, 19.4, 0.7, 16.5, 30.9),
    "04-htc-lite": Reported("+ HTC-Lite", 23.6, 21.9, 1.1, 19.8, 33.5),
    "05-tsd": Reported("+ TSD", 25.5, 23.5, 2.3, 22.3, 34.0),
    "06-mask-scoring": Reported("+ Mask scoring", 25.6, 23.9, 2.8, 22.4, 35.0),
    "07-augmentation": Reported("+ Training-time augmentation", 28.1, 26.5, 3.6, 25.7, 37.4),
    "08-neck": Reported("+ Better neck", 29.1, 27.0, 3.5, 25.8, 38.6),
    "09-backbone": Reported("+ Better backbone", 32.1, 29.9, 4.2, 29.4, 41.8),
    "10-seesaw": Reported("+ Seesaw Loss", 39.8, 36.8, 25.5, 35.6, 42.9),
    "11-finetune": Reported("+ Finetuning", 40.6, 37.3, 26.4, 36.3, 43.1),
    "12-tta": Reported("+ Test-time augmentation", 41.5, 38.8, 26.4, 38.3, 44.9),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a row at full size, C = 1203."""

    parameters: int
    teraflops: float  # of one image of 832 x 1344 pixels at test time; a multiplication with its addition counts two
    images_per_second: dict[str, float | None]  # "train" and "infer" in bf16 on the GPU named in the file, if measured


def costs() -> tuple[dict[str, Cost], str | None]:
    """The costs of each row, and the GPU on which images/s were measured (None: not yet)."""
    content: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8"))
    return {name: Cost(**row) for name, row in content["rows"].items()}, content["gpu"]


def ladder_lines() -> list[str]:
    """The ladder as text: a line a row, under a head and above a note on what the numbers are."""
    cost, gpu = costs()
    head = ("adds", "params M", "TFLOP", "train/s", "infer/s", "box AP", "mask AP", "rare", "common", "freq.")
    widths = (29, 9, 8, 8, 8, 7, 8, 6, 7, 6)
    lines = [f"{'recipe':24}" + _cells(head, widths)]
    for name, reported in REPORT.items():
        own = cost[name]
        speeds = (own.images_per_second[task] for task in ("train", "infer"))
        cells = (
            reported.title,
            f"{own.parameters / 1e6:.1f}",
            f"{own.teraflops:.2f}",
            *("-" if speed is None else f"{speed:.1f}" for speed in speeds),
            *(f"{metric:.1f}" for metric in reported.metrics),
        )
        lines.append(f"{f'table2/{name}':24}" + _cells(cells, widths))
    measured = (
        f"two images of 1280 x 1280 px at a time, bf16, {gpu}"
        if gpu
        else "not measured on a GPU yet (benchmarks/gpu.py)"
    )
    return [
        *lines,
        "",
        "AP: the report's, LVIS v1 val, percent. Parameters: C = 1203. TFLOP: one image of 832 x 1344 px at test time,",
        "a multiplication with its addition counting two; row 12 its ten views.",
        f"Images/s in training and at inference: {measured}.",
    ]


def _cells(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return f"{first[0]:{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)
