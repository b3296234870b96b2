"""The charts of an analysis: what lies behind the AP of masks or boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from tailseg.data.annotations.frequency import GROUPS
from tailseg.visualize.charts import INK, add_legend, new_figure, to_svg
from tailseg.visualize.dataset_charts import GROUP_COLOURS

COLOUR = "#3a87c8"
GROUP_NAMES = {str(key): name for key, name in GROUPS.items()}
ERRORS = {  # TIDE's kinds of errors
    "Cls": "right place, wrong class",
    "Loc": "right class, badly placed (IoU between 0.1 and 0.5)",
    "Both": "wrong class and badly placed",
    "Dupe": "an object found a second time",
    "Bkg": "background taken for an object",
    "Miss": "an object that no detection comes near",
}
SUMS = {"FP": "all false detections, of whatever kind", "FN": "all objects that were not found, for whatever reason"}


def frequency_chart(kind: str, bins: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]) -> Markup:
    """AP of each class against its training images, with the mean of each bin; needs at least one bin."""
    points = [row for row in classes if row["AP"] is not None and row["train_images"] is not None]
    images = np.array([row["train_images"] for row in points], np.float64).clip(min=0.5)
    values = 100 * np.array([row["AP"] for row in points], np.float64)
    groups = np.array([row["frequency"] or "" for row in points])
    low, high = images.min() / 1.4, images.max() * 1.4
    with new_figure() as (figure, axes):
        for group in ("", *reversed(GROUP_NAMES)):
            own = groups == group
            if own.any():
                colour, name = GROUP_COLOURS.get(group, COLOUR), GROUP_NAMES.get(group)
                axes.scatter(images[own], values[own], s=12, color=colour, alpha=0.65, linewidths=0, label=name)
        for found in bins:
            last = math.inf if found["last"] is None else found["last"]
            ends = max(found["first"] - 0.5, low), min(last + 0.5, high)
            axes.plot(ends, [100 * found["AP"]] * 2, color=INK, lw=2)
        axes.set(xscale="log", xlabel="training images with the class", ylabel="AP (%)")
        axes.set(xlim=(low, high), ylim=(0, min(100.0, 10 * math.ceil(max(values.max(), 1) * 1.02 / 10))))
        decades = [step * 10**power for power in range(7) for step in (1, 3)]
        ticks = [value for value in decades if low <= value <= high] or [round(float(np.sqrt(low * high)))]
        axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
        axes.minorticks_off()
        add_legend(figure, axes, marker_scale=2)
        return to_svg(figure, f"frequency-{kind}", "AP by number of training images")


def curve_chart(kind: str, curves: Mapping[str, Sequence[float]]) -> Markup:
    """Mean precision at each recall: of all classes, and of each frequency group."""
    with new_figure() as (figure, axes):
        for name, curve in curves.items():
            colour, title = (INK, "all") if name == "all" else (GROUP_COLOURS[name], GROUP_NAMES[name])
            axes.plot(np.linspace(0, 1, len(curve)), curve, color=colour, lw=2, label=title)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        add_legend(figure, axes, columns=4)
        return to_svg(figure, f"curves-{kind}", "mean precision against recall of each group of classes")


def error_chart(kind: str, errors: Mapping[str, Any]) -> Markup:
    """AP50 that each kind of error costs, as bars."""
    with new_figure() as (figure, axes):
        axes.bar(list(ERRORS), [100 * errors["delta_ap"][name] for name in ERRORS], color=COLOUR)
        axes.set_ylabel("AP50 lost (points)")
        return to_svg(figure, f"errors-{kind}", "AP50 lost by kind of error")


def calibration_chart(kind: str, calibration: Mapping[str, Any]) -> Markup:
    """Share of right detections against their score, beside the diagonal of a calibrated detector."""
    bins = [found for found in calibration["bins"] if found["count"]]
    scores, right = [b["avg_confidence"] for b in bins], [b["avg_accuracy"] for b in bins]
    with new_figure() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
        axes.plot(scores, right, color=COLOUR, marker="o", lw=2)
        axes.set(xlabel="score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        return to_svg(figure, f"calibration-{kind}", "share of right detections by score")
