"""Draw docs/images/gradients_tail.png: pushes and pulls with LVIS v1's own counts, and with shallower tails.

    python docs/plot_tail_gradients.py     # seconds; reads ../shared/data/lvis_v1_categories.csv

As panel (c) of docs/plot_gradients.py, for the losses whose effect benchmarks/long_tail.py measures.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

import torch
from plot_gradients import (
    LVIS_TRAIN_IMAGES,
    by_objects,
    expected_epoch,
    pyplot,
)
from torch import Tensor

from tailseg.losses import CLASSIFICATIONS, ClassStatistics

ROOT = Path(__file__).resolve().parents[1]
CATEGORIES = ROOT.parent / "shared" / "data" / "lvis_v1_categories.csv"
DEPTHS = {"50:1": 50, "600:1": 600, "2,000:1": 2000, "uncut": None}  # most objects of a class

# Name on the plot -> name in CLASSIFICATIONS, options, colour, line.
LOSSES: dict[str, tuple[str, dict[str, float], str, str]] = {
    "cross-entropy": ("cross-entropy", {}, "#000000", "-"),
    "EQL": ("eql", {}, "#cc79a7", "-"),
    "Seesaw, p = 0": ("seesaw", {"p": 0.0}, "#0072b2", "--"),
    "Seesaw, p = 0.8": ("seesaw", {}, "#d55e00", "-"),
}


def read_categories(path: Path) -> tuple[Tensor, Tensor]:
    """Images and instances (C,) int64 of LVIS v1 train, or an end with one sentence where the file is not there."""
    if not path.is_file():
        sys.exit(f"The counts of LVIS v1 are not at {path}; put lvis_v1_categories.csv there.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    images, instances = (torch.tensor([int(row[f"{kind}_count"]) for row in rows]) for kind in ("image", "instance"))
    return images, instances


def ratios(name: str, images: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Pushes over pulls (C,) of an epoch: by objects of other classes, and with background's."""
    key, options, *_ = LOSSES[name]
    kind = CLASSIFICATIONS[key]
    extra: dict[str, Any] = dict(options)
    if kind.needs_statistics:
        extra["statistics"] = ClassStatistics(num_images=LVIS_TRAIN_IMAGES, images=images, instances=instances)
    classification: Any = kind(len(images), **extra)
    if key == "seesaw":
        classification.seesaw.counts.copy_(instances)
    pull, pushes, background = expected_epoch(classification.eval(), instances)
    return pushes / pull, (pushes + background) / pull


def picture(images: Tensor, instances: Tensor, out: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Draw both panels; the mean ratios of the classes of fewest objects by loss and depth."""
    pyplot.rcParams.update({"font.size": 11, "axes.titlesize": 12})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.9), dpi=100, sharey=True, layout="constrained")
    rarest = instances == instances.min()
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (_, _, color, style) in LOSSES.items():
        found[name] = {}
        for depth, most in DEPTHS.items():
            # Images are not cut, so that EQL spares LVIS's rare and common classes at every depth.
            cut = instances if most is None else instances.clamp(max=most)
            solid, dotted = ratios(name, images, cut)  # in the end of the uncut tail, which (a) shows
            found[name][depth] = float(solid[rarest].mean()), float(dotted[rarest].mean())
        spared = solid == 0  # by EQL: of classes of equally many objects those in few images
        for members in (spared, ~spared):
            if members.any():
                left.plot(*by_objects(instances[members], dotted[members]), ":", color=color, linewidth=1.2)
        left.plot(*by_objects(instances[~spared], solid[~spared]), style, color=color, linewidth=2, label=name)
        heights = [found[name][depth] for depth in DEPTHS]
        for at, width in enumerate((2, 1.2)):
            line = [height[at] or math.nan for height in heights]  # EQL's solid one is 0
            right.plot(line, ":" if at else style, color=color, linewidth=width, marker="o", markersize=6 - 2 * at)
    left.set_xlabel("objects of the class")
    left.set_ylabel("pushes / pulls of an epoch")
    left.set_xscale("log")
    left.set_title("(a) LVIS's own counts, 1 to 50,552 objects a class", loc="left")
    right.set_xticks(range(len(DEPTHS)), list(DEPTHS))
    right.set_xlabel("depth of the tail: objects of the largest class to those of the smallest")
    right.set_title("(b) classes of one object, the head cut", loc="left")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.axhline(1, color="#444444", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    about = "solid: by objects of other classes\n(EQL: 0 for rare and common ones)\ndotted: background's too"
    left.legend(edgecolor="none", framealpha=1, title=about, alignment="left", loc="lower left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)
    return found


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "gradients_tail.png")
    options = parser.parse_args()
    found = picture(*read_categories(CATEGORIES), options.out)
    print(f"{'pushes / pulls':17}" + "".join(f"{depth:>11}{'+ backgr.':>11}" for depth in DEPTHS))
    for name, depths in found.items():
        cells = [value for both in depths.values() for value in both]
        print(f"{name:17}" + "".join(f"{cell:11.2g}" if cell < 99.5 else f"{cell:11.0f}" for cell in cells))


if __name__ == "__main__":
    main()
