"""The charts of an analysis: what lies behind the AP of masks or boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from tailseg.visualize.charts import INK, new_figure, to_svg

COLOUR = "#3a87c8"
ERRORS = {  # TIDE's kinds of errors
    "Cls": "right place, wrong class",
    "Loc": "right class, badly placed",
    "Both": "wrong class and badly placed",
    "Dupe": "object found twice",
    "Bkg": "background taken for an object",
    "Miss": "object not found",
}


def frequency_chart(kind: str, bins: Sequence[Mapping[str, Any]], per_category: Sequence[Mapping[str, Any]]) -> Markup:
    """AP of each class against its training images, with the mean of each bin; needs at least one bin."""
    key = f"{kind}_AP"
    points = [(c["train_images"], c[key]) for c in per_category if c[key] is not None and c["train_images"] is not None]
    images, values = np.array(points, dtype=np.float64).T
    with new_figure() as (figure, axes):
        axes.scatter(np.maximum(images, 0.5), 100 * values, s=9, color=COLOUR, alpha=0.5, linewidths=0)
        for found in bins:
            last = found["last"] or max(images.max(), found["first"])
            axes.plot([max(found["first"] - 0.5, 0.5), last + 0.5], [100 * found["AP"]] * 2, color=INK, lw=2)
        axes.set(xscale="log", xlabel="training images with the class", ylabel="AP (%)", ylim=(0, 100))
        return to_svg(figure, f"frequency-{kind}", "AP by number of training images")


def error_chart(kind: str, errors: Mapping[str, Any]) -> Markup:
    """AP50 that each kind of error costs, as bars."""
    with new_figure() as (figure, axes):
        axes.bar(list(ERRORS), [100 * errors["delta_ap"][name] for name in ERRORS], color=COLOUR)
        axes.set_ylabel("AP50 lost (points)")
        axes.tick_params(axis="x", labelsize=8)
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
