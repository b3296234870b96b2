"""Draw docs/images/gradients.png: what the losses do to the logit of a rare class, asked of the losses themselves.

    python docs/plot_gradients.py                       # LVIS-like counts; a few minutes on one core
    python docs/plot_gradients.py --counts FILE.csv     # one line a class: images,instances

Every number is a gradient that autograd returns through a class of `tailseg.losses`; docs/gradients.md explains them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the command line does

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from tailseg.data.synthetic.generate import lvis_curve
from tailseg.losses import CLASSIFICATIONS, ClassStatistics, FederatedClassification

LVIS_CLASSES, LVIS_TRAIN_IMAGES = 1203, 100_170
FREQUENT, RARE = 0, 1  # the two classes of (a) and (b)
RARE_OBJECTS = 10
RULED_OUT = -20.0  # logit of all others there: e^-20 an output, 2.5e-6 for all of LVIS
FOREGROUND, BACKGROUND = 128, 384  # RoIs of a step in (c), a quarter foreground as the sampler draws them
DRAWS = 20_000  # of the federated loss's classes, to average over

# Name on the plot -> name in CLASSIFICATIONS, options, colour (Okabe and Ito's, legible to the colour-blind), line.
LOSSES: dict[str, tuple[str, dict[str, float], str, str]] = {
    "cross-entropy": ("cross-entropy", {}, "#000000", "-"),
    "focal": ("focal", {}, "#666666", "-."),
    "LDAM": ("ldam", {}, "#56b4e9", "-"),
    "class-balanced": ("class-balanced", {}, "#009e73", "-"),
    "federated": ("federated", {}, "#e69f00", "-"),
    "group softmax": ("group-softmax", {}, "#8a5a00", "--"),
    "EQL": ("eql", {}, "#cc79a7", "-"),
    "EQL v2": ("eql-v2", {}, "#a0477a", "--"),
    "logit adjustment": ("logit-adjustment", {}, "#0072b2", "-"),
    "Seesaw": ("seesaw", {}, "#d55e00", "-"),
    "Seesaw, q = 2": ("seesaw", {"q": 2.0}, "#d55e00", "--"),
}
NOTES = {"EQL": "solid: 0 for\nrare classes", "Seesaw": "background\npushes none"}  # in the panels of (c)
OF_A_STEP = ("EQL v2", "federated", "group softmax")  # what a sample does hangs on the others, or on earlier ones


def lvis_like(classes: int = LVIS_CLASSES) -> tuple[Tensor, Tensor]:
    """Images and instances (C,) int64 along LVIS's curve, most frequent first, one instance an image."""
    images = torch.from_numpy(np.rint(lvis_curve((np.arange(classes) + 0.5) / classes)).astype(np.int64))
    return images, images.clone()


def make(name: str, images: Tensor, instances: Tensor, num_images: int) -> Any:
    """A loss of ``LOSSES`` that knows the data; Seesaw has counted every instance once."""
    key, options, *_ = LOSSES[name]
    kind = CLASSIFICATIONS[key]
    if kind.needs_statistics:
        options = options | {"statistics": ClassStatistics(num_images=num_images, images=images, instances=instances)}
    classification = kind(len(images), **options)
    if key == "seesaw":
        classification.seesaw.counts.copy_(instances)
    return classification.eval()


def gradients(classification: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient (R, num_logits) of the loss of logits (R, num_logits) and labels (R,)."""
    logits = logits.detach().requires_grad_()
    losses = classification.loss(logits, labels, torch.ones_like(labels, dtype=torch.bool))
    return torch.autograd.grad(sum(losses.values()), logits)[0]


def confused(classification: Any, rare_logits: Tensor) -> Tensor:
    """Logits (R, num_logits) between two classes: 0 for the frequent one, (R,) for the rare one, others ruled out."""
    logits = torch.full((len(rare_logits), classification.num_logits), RULED_OUT)
    logits[:, FREQUENT] = 0
    logits[:, RARE] = rare_logits
    return logits


def average_draw(classification: FederatedClassification) -> Tensor:
    """Share (C,) of the steps in which a class counts where the frequent class is present alone."""
    labels, valid = torch.tensor([FREQUENT]), torch.tensor([True])
    total = torch.zeros(classification.num_classes)
    for _ in range(DRAWS):
        total += classification.draw(labels, valid)
    return total / DRAWS


def live_through(classification: Any, times: int) -> None:
    """One epoch of EQL v2 on the two classes: in each step one sample of the rare class and ``times`` of the other."""
    labels = torch.tensor([RARE] + [FREQUENT] * times)
    logits = confused(classification, torch.zeros(len(labels)))
    classification.train()
    for _ in range(RARE_OBJECTS):
        classification.loss(logits, labels, torch.ones_like(labels, dtype=torch.bool))
    classification.eval()


def push(
    name: str, counts: tuple[Tensor, Tensor], num_images: int, times: int, rare_logits: Tensor, draw: Tensor
) -> Tensor:
    """Gradient (R,) on the rare class's logit from one sample of a class ``times`` as frequent, at each logit (R,)."""
    images, instances = (count.clone() for count in counts)
    for count in (images, instances):
        count[FREQUENT], count[RARE] = RARE_OBJECTS * times, RARE_OBJECTS
    classification = make(name, images, instances, num_images)
    if name == "federated":
        classification.draw = lambda labels, valid: draw  # the loss is linear in what is drawn: this is its mean
    if name == "EQL v2":
        live_through(classification, times)
    labels = torch.full((len(rare_logits),), FREQUENT)
    # Losses are means over the batch; a sample's own gradient is the row times their number.
    return gradients(classification, confused(classification, rare_logits), labels)[:, RARE] * len(labels)


def epoch(name: str, counts: tuple[Tensor, Tensor], num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """What an epoch does to each class's logit in a fresh classifier, all of whose logits are its initial bias.

    Returns:
        Sums (C,) of the pulls by own samples, the pushes by those of other classes, and the pushes by background,
        of which there are three RoIs for each of an object. All have the same unknown factor.
    """
    instances = counts[1]
    classes = len(instances)
    classification = make(name, *counts, num_images)
    if name not in OF_A_STEP:
        return expected_epoch(classification, instances)
    classification.train()
    generator = torch.Generator().manual_seed(0)
    objects = torch.arange(classes).repeat_interleave(instances)
    pull, pushes, background = torch.zeros(3, classes).unbind()
    for own in objects[torch.randperm(len(objects), generator=generator)].split(FOREGROUND):
        labels = torch.cat([own, torch.full((len(own) * BACKGROUND // FOREGROUND,), classes)])
        logits = torch.full((len(labels), classification.num_logits), classification.initial_bias)
        grads = gradients(classification, logits, labels)[:, :classes]
        pull -= grads.clamp(max=0).sum(0)
        pushes += grads[: len(own)].clamp(min=0).sum(0)
        background += grads[len(own) :].sum(0)
    return pull, pushes, background


def expected_epoch(classification: Any, instances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`epoch` of a loss in which a sample does the same whatever the others of its step are."""
    classes = len(instances)
    labels = torch.arange(classes + 1)
    logits = torch.full((len(labels), classification.num_logits), classification.initial_bias)
    grads = gradients(classification, logits, labels)[:, :classes]
    own = grads.diagonal() * instances
    others = (grads[:classes] * instances.unsqueeze(1)).sum(0) - own
    return -own, others, grads[-1] * instances.sum() * BACKGROUND / FOREGROUND


def by_objects(instances: Tensor, values: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Different numbers of instances, rising, and the geometric mean of the values of the classes that have them."""
    levels, index = instances.unique(return_inverse=True)
    total = torch.zeros(len(levels)).index_add_(0, index, values.float().log())
    return levels.numpy(), (total / index.bincount()).exp().numpy()


def label_lines(axes: Axes, ends: dict[str, float], apart: float) -> None:
    """Names right of the axes, each where its line ends, kept ``apart`` (in powers of ten)."""
    floor, top = np.log10(axes.get_ylim())
    names = sorted(ends, key=lambda name: ends[name])
    exact = np.log10([max(ends[name], 10**floor) for name in names])
    heights = exact.copy()
    for _ in range(500):
        short = np.diff(heights) - apart
        moved = np.minimum(short, 0) / 2
        heights[:-1] += moved
        heights[1:] -= moved
        heights = heights.clip(floor, top)
    for name, height, end in zip(names, heights, exact, strict=True):
        axes.annotate(
            name if ends[name] > 0 else f"{name}: 0",
            (1.0, 10**end),
            (1.05, 10**height),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            color=LOSSES[name][2],
            va="center",
            arrowprops={"arrowstyle": "-", "color": LOSSES[name][2], "linewidth": 0.8, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def draw_pushes(axes: Axes, x: Any, lines: dict[str, Tensor], floor: float) -> None:
    """Panels (a) and (b): a line a loss; what is 0 lies on the floor."""
    for name, values in lines.items():
        _, _, color, style = LOSSES[name]
        width = 2.6 if name.startswith("Seesaw") else 1.6
        axes.plot(x, values.clamp(min=floor).numpy(), style, color=color, linewidth=width, clip_on=False)
    axes.set_yscale("log")
    axes.set_ylim(floor, 1.3)
    axes.set_xlim(x[0], x[-1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    label_lines(axes, {name: float(values[-1]) for name, values in lines.items()}, 0.2)


def draw_ratio(axes: Axes, name: str, instances: Tensor, sums: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """A panel of (c): pushes over pulls of each class, with cross-entropy's in grey to compare."""
    for shown, color, width in (("cross-entropy", "#b8b8b8", 1.3), (name, LOSSES[name][2], 2.2)):
        pull, pushes, background = sums[shown]
        axes.plot(*by_objects(instances, (pushes + background) / pull), ":", color=color, linewidth=width)
        axes.plot(*by_objects(instances, pushes / pull), "-", color=color, linewidth=width)
    pull, pushes, _ = sums[name]
    levels, ratio = by_objects(instances, pushes / pull)
    if name in NOTES:
        axes.text(0.05, 0.05, NOTES[name], transform=axes.transAxes, color=LOSSES[name][2])
    if ratio[0] > 0:
        axes.annotate(
            f"{ratio[0]:.2g}" if ratio[0] < 99.5 else f"{ratio[0]:.0f}",
            (levels[0], ratio[0]), (-4, -15), textcoords="offset points", va="top",
        )  # fmt: skip
    axes.axhline(1, color="#444444", linewidth=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(name, color=LOSSES[name][2], fontweight="bold", loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def picture(counts: tuple[Tensor, Tensor], num_images: int, out: Path) -> None:
    """Compute and draw everything, print the numbers of the page, write the PNG."""
    pyplot.rcParams.update({"font.size": 11, "axes.titlesize": 13, "axes.labelsize": 11})
    figure = pyplot.figure(figsize=(12, 13.2), dpi=100)
    upper, lower = figure.subfigures(2, 1, height_ratios=(5.6, 7.6))
    left, right = upper.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.865, "wspace": 0.56, "bottom": 0.13})

    draw = average_draw(make("federated", *counts, num_images))
    level = torch.zeros(1)
    times = sorted({round(float(k)) for k in np.logspace(0, 4, 49)})
    by_times = {
        name: torch.cat([push(name, counts, num_images, k, level, draw) for k in times])
        for name in LOSSES
        if name != "Seesaw, q = 2"  # no logit is above the label's, so that q makes no difference
    }
    draw_pushes(left, times, by_times, 1e-5)
    left.set_xscale("log")
    left.set_xlabel("k: the sample's class is k times as frequent")
    left.set_ylabel("push on the rare class's logit")
    left.set_title("(a) one sample, both logits equal", loc="left")

    rare_logits = torch.linspace(-6, 3, 46)
    by_logit = {name: push(name, counts, num_images, 100, rare_logits, draw) for name in LOSSES}
    draw_pushes(right, rare_logits.numpy(), by_logit, 1e-5)
    right.set_xlabel("logit of the rare class over that of the sample's class")
    right.set_title("(b) the same for k = 100, other logits", loc="left")

    sums = {name: epoch(name, counts, num_images) for name in LOSSES}
    grid = lower.subplots(
        2, 5, sharex=True, sharey=True,
        gridspec_kw={"left": 0.07, "right": 0.985, "top": 0.87, "bottom": 0.08, "wspace": 0.1, "hspace": 0.2},
    )  # fmt: skip
    names = [name for name in LOSSES if name != "Seesaw, q = 2"]
    for axes, name in zip(grid.flat, names, strict=True):
        draw_ratio(axes, name, counts[1], sums)
    for axes in grid[:, 0]:
        axes.set_ylabel("pushes / pulls")
    for axes in grid[1]:
        axes.set_xlabel("objects of the class")
    lower.text(0.07, 0.965, "(c) an epoch of a fresh classifier: all pushes on a class over all its pulls", fontsize=13)
    lower.text(
        0.07, 0.925, "solid: pushes by objects of other classes;  dotted: background's too;  grey: cross-entropy; "
        " at 1 they balance", fontsize=11,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)
    report(counts[1], by_logit, rare_logits, sums)


def report(
    instances: Tensor, by_logit: dict[str, Tensor], rare_logits: Tensor, sums: dict[str, tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Print the page's table."""
    low, middle, high = (int((rare_logits - z).abs().argmin()) for z in (-3.0, 0.0, 3.0))
    heads = ("z_j = -3", "z_j = 0", "z_j = 3", "rarest", "+ backgr.", "most freq.", "+ backgr.")
    print(f"{'':17}{'push of a sample, k = 100':>33}{'pushes / pulls of an epoch':>44}")
    print(f"{'loss':17}" + "".join(f"{head:>11}" for head in heads))
    for name, values in by_logit.items():
        pull, pushes, background = sums[name]
        cells = [float(values[index]) for index in (low, middle, high)]
        ratios = [by_objects(instances, push / pull)[1] for push in (pushes, pushes + background)]
        cells += [ratio[end] for end in (0, -1) for ratio in ratios]  # of the rarest and the most frequent classes
        print(f"{name:17}" + "".join(f"{cell:11.2g}" if cell < 99.5 else f"{cell:11.0f}" for cell in cells))


def read_counts(path: Path) -> tuple[Tensor, Tensor]:
    """Images and instances (C,) int64 of a CSV without a head, a line a class.

    Raises:
        ValueError: the file has not two columns of positive whole numbers, or fewer than three classes.
    """
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2))
    if table.shape[1] != 2 or len(table) < 3 or not (table > 0).all():
        raise ValueError(f"expected 'images,instances' of at least 3 classes, all positive, received {path}")
    return table[:, 0].clone(), table[:, 1].clone()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, help="CSV, a line a class: images,instances; default LVIS-like")
    parser.add_argument("--num-images", type=int, default=LVIS_TRAIN_IMAGES, help="training images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "gradients.png")
    options = parser.parse_args()
    try:
        counts = read_counts(options.counts) if options.counts else lvis_like()
    except (OSError, ValueError) as error:
        parser.error(f"{options.counts}: {error}; give a CSV with a line images,instances a class")
    torch.manual_seed(0)
    picture(counts, options.num_images, options.out)


if __name__ == "__main__":
    main()
