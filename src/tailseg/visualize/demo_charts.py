"""The charts of the demo's report, drawn from the methods of `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tailseg.evaluation.methods import number
from tailseg.visualize.charts import INK, add_legend, new_figure, to_svg

# One colour a method in every chart and table, dark enough for white paper and light enough for a dark page;
# the pair stays apart for colour-blind readers. Further methods take the rest of Okabe and Ito's colours.
METHOD_COLOURS = {"cross-entropy": "#3a87c8", "seesaw": "#d55e00"}
OTHER_COLOURS = ("#009e73", "#cc79a7", "#b58900", "#7f7f7f")
MARKERS = ("o", "^", "s", "D", "v", "P")
GROUPS = {"AP": "all", "APr": "rare", "APc": "common", "APf": "frequent"}
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
FATES = {"right": "#2a9d6e", "look-alike": "#c1440e", "other class": "#b58900", "missed": "#7f7f7f"}

Methods = Mapping[str, Mapping[str, Any]]  # the "methods" of results.json


def method_colour(methods: Methods, key: str) -> str:
    """CSS colour of a method."""
    others = [name for name in methods if name not in METHOD_COLOURS]
    return METHOD_COLOURS.get(key) or OTHER_COLOURS[others.index(key) % len(OTHER_COLOURS)]


def frequency_chart(methods: Methods, groups: Mapping[str, int]) -> Markup:
    """Mask AP of all, rare, common and frequent classes: bars are means, dots are single runs."""
    with new_figure() as (figure, axes):
        width = 0.8 / len(methods)
        for position, (key, method) in enumerate(methods.items()):
            for place, metric in enumerate(GROUPS):
                values = _percents(run["metrics"].get("segm", {}).get(metric) for run in method["runs"])
                x = place - 0.4 + (position + 0.5) * width
                colour = method_colour(methods, key)
                _bar(axes, x, width, values, colour, method["title"] if place == 0 else None)
        labels = [
            name if metric == "AP" else f"{name}\n({groups.get(metric[2], 0)} classes)"
            for metric, name in GROUPS.items()
        ]
        axes.set_xticks(range(len(GROUPS)), labels)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("mask AP, percent")
        axes.margins(y=0.12)
        add_legend(figure, axes)
        alt = "Bar chart of mask AP by class frequency; its numbers stand in the table above."
        return to_svg(figure, "frequency", alt)


def class_chart(methods: Methods) -> Markup:
    """Mask AP of each class against its training images, with a smoothed line a method."""
    with new_figure() as (figure, axes):
        lowest, highest = 1.0, 10.0
        for position, (key, method) in enumerate(methods.items()):
            images, values = class_points(method)
            if not len(images):
                continue
            # A logarithm has no zero: classes without a training image stand left of 1.
            x = np.maximum(images, 0.5)
            lowest, highest = min(lowest, float(x.min())), max(highest, float(x.max()))
            colour, marker = method_colour(methods, key), MARKERS[position % len(MARKERS)]
            nudged = x * 1.04 ** (position - 0.5)  # or the points of the methods would hide each other
            axes.scatter(nudged, values, s=20, alpha=0.55, linewidths=0, c=colour, marker=marker)
            line_x, line_y = smoothed(np.log(x), values)
            axes.plot(np.exp(line_x), line_y, color=colour, lw=2.5, label=method["title"])
        axes.set_xscale("log")
        ticks = [10**power for power in range(7) if 10**power < highest] or [1]
        zero = [0.5] if lowest < 1 else []
        axes.set_xticks([*zero, *ticks], ["0" for _ in zero] + [f"{tick:,}" for tick in ticks])
        axes.set_xlim(0.8 * lowest, 1.25 * highest)
        axes.set_xlabel("training images with the class")
        axes.set_ylabel("mask AP, percent")
        add_legend(figure, axes)
        alt = "Scatter of each class's mask AP against its number of training images, a smoothed line a method."
        return to_svg(figure, "classes", alt)


def fate_chart(methods: Methods, outcomes: Mapping[str, Any]) -> Markup:
    """Shares of the objects of each frequency group that came to each end, a bar a method."""
    with new_figure() as (figure, axes):
        width = 0.8 / len(methods)
        ticks: list[tuple[float, str]] = []
        for position, (key, method) in enumerate(methods.items()):
            for place, (group, ends) in enumerate(outcomes[key]["ends"].items()):
                x, total, below = place - 0.4 + (position + 0.5) * width, sum(ends.values()), 0.0
                ticks.append((x, f"{method['title']}\n{FREQUENCIES[group]}"))
                for (end, colour), count in zip(FATES.items(), ends.values(), strict=True):
                    share = 100 * count / total if total else 0.0
                    label = end if (position, place) == (0, 0) else None
                    axes.bar(x, share, 0.9 * width, bottom=below, color=colour, label=label)
                    if share >= 6:
                        axes.text(
                            x, below + share / 2, f"{share:.0f}", ha="center", va="center", fontsize=9, color="white"
                        )
                    below += share
        axes.set_xticks(*zip(*sorted(ticks), strict=True), fontsize=7)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("objects, percent")
        add_legend(figure, axes)
        return to_svg(figure, "fates", "Stacked bars: objects named right, taken for another class, or missed.")


def score_chart(methods: Methods, outcomes: Mapping[str, Any]) -> Markup:
    """Quantiles of the scores of the objects' own classes by frequency group, and the score that the limit asks for."""
    with new_figure() as (figure, axes):
        lowest = 1e-4
        width = 0.8 / len(methods)
        for position, (key, method) in enumerate(methods.items()):
            colour = method_colour(methods, key)
            axes.axhline(max(outcomes[key]["bar"], lowest), color=colour, linestyle="--", linewidth=1)
            for place, quantiles in enumerate(outcomes[key]["scores"].values()):
                if not quantiles:
                    continue
                p10, p25, p50, p75, p90 = (max(value, lowest) for value in quantiles)
                x = place - 0.4 + (position + 0.5) * width
                axes.plot([x, x], [p10, p90], color=colour, linewidth=1.5)
                axes.plot([x, x], [p25, p75], color=colour, linewidth=7, alpha=0.5, solid_capstyle="butt")
                label = method["title"] if place == 0 else None
                axes.plot(x, p50, "o", color=colour, markeredgecolor=INK, markersize=7, label=label)
        axes.set_yscale("log")
        axes.set_ylim(lowest * 0.7, 1.2)
        axes.set_xticks(range(len(FREQUENCIES)), list(FREQUENCIES.values()))
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("score")
        add_legend(figure, axes)
        return to_svg(figure, "scores", "Scores of the objects' own classes by class frequency, against the limit's.")


def curve_chart(methods: Methods, name: str) -> Markup:
    """One recorded loss against the step: thin lines are runs, the thick one smooths their mean."""
    with new_figure((4.2, 3.0)) as (figure, axes):
        for key, method in methods.items():
            _curves(axes, method, name, method_colour(methods, key))
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("training step")
        add_legend(figure, axes)
        return to_svg(figure, f"curve-{name}", f"Training curves of {name.replace('_', ' ')} against the step.")


def curve_names(methods: Methods) -> list[str]:
    """The losses that the curves record, the total first."""
    names = {
        name
        for method in methods.values()
        for run in method["runs"]
        for point in run.get("curves", [])
        for name in point
        if name != "step"
    }
    return sorted(names, key=lambda name: (name != "loss", name))


def class_points(method: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Training images (C,) and mask AP in percent, mean over the runs (C,), of classes that have an AP."""
    values: dict[int, list[float]] = {}
    images: dict[int, float] = {}
    for run in method["runs"]:
        for row in run.get("per_category", []):
            value = number(row["segm_AP"])
            if value is not None:
                values.setdefault(row["id"], []).append(100 * value)
                images[row["id"]] = row["train_images"]
    return (
        np.array([images[key] for key in values], dtype=np.float64),
        np.array([np.mean(found) for found in values.values()], dtype=np.float64),
    )


def smoothed(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Kernel regression (Nadaraya 1964, Watson 1964) of y on x, Gaussian kernel of an eighth of x's range.

    Args:
        x: (N,) with N >= 1.
        y: (N,).

    Returns:
        60 places from the least to the greatest x, and the smoothed y there.
    """
    places = np.linspace(x.min(), x.max(), 60)
    width = max(float(np.ptp(x)) / 8, 1e-6)
    weights = np.exp(-(((places[:, None] - x[None, :]) / width) ** 2) / 2)
    return places, weights @ y / weights.sum(axis=1)


def _percents(values: Any) -> list[float]:
    return [100 * found for value in values if (found := number(value)) is not None]


def _bar(axes: Axes, x: float, width: float, values: Sequence[float], colour: str, label: str | None) -> None:
    if not values:
        axes.text(x, 0, "–", ha="center", va="bottom")
    mean = float(np.mean(values)) if values else 0.0
    axes.bar(x, mean, 0.9 * width, color=colour, alpha=0.85, label=label)
    if len(values) > 1:
        spread = np.linspace(-0.2, 0.2, len(values)) * width
        axes.scatter(x + spread, values, s=16, color=colour, edgecolors=INK, linewidths=0.8, zorder=3)
    if values:
        axes.annotate(
            f"{mean:.1f}",
            (x, max(values)),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=10,
        )


def _curves(panel: Axes, method: Mapping[str, Any], name: str, colour: str) -> None:
    points: dict[float, list[float]] = {}
    for run in method["runs"]:
        curve = [
            (point["step"], value) for point in run.get("curves", []) if (value := number(point.get(name))) is not None
        ]
        if curve:
            panel.plot(*zip(*curve, strict=True), color=colour, lw=0.8, alpha=0.35)
        for step, value in curve:
            points.setdefault(step, []).append(value)
    if points:
        steps = np.array(sorted(points), dtype=np.float64)
        means = np.array([np.mean(points[step]) for step in steps])
        panel.plot(steps, _running_mean(means), color=colour, lw=2, label=method["title"])


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a window of a fifteenth of the curve, cut at its ends."""
    window = np.ones(max(1, len(values) // 15))
    sums = np.convolve(values, window, mode="same")
    means: NDArray[np.float64] = sums / np.convolve(np.ones_like(values), window, mode="same")
    return means
