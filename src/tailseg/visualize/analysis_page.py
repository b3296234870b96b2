"""The analysis as one HTML page with charts: no network, no JavaScript, as the report of a comparison."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailseg.evaluation.comparison import KINDS
from tailseg.visualize.charts import INK, new_figure, to_svg
from tailseg.visualize.comparison_page import CSS

COLOUR = "#3a87c8"
ERRORS = {
    "Cls": "wrong class",
    "Loc": "badly placed",
    "Both": "both",
    "Dupe": "found twice",
    "Bkg": "nothing there",
    "Miss": "not found",
}


def write_page(analysis: Mapping[str, Any], per_category: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page.

    Args:
        analysis: "bbox" or "segm" -> what `tailseg.evaluation.analysis.analyse` returns.
        per_category: the rows of `Scores.per_category`.
        path: the HTML file.
    """
    sections = "".join(_section(kind, found, per_category) for kind, found in analysis.items())
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Analysis</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<h1>What lies behind the AP</h1>\n{sections}</body>\n</html>\n",
        encoding="utf-8",
    )


def _section(kind: str, found: Mapping[str, Any], per_category: Sequence[Mapping[str, Any]]) -> str:
    calibration = found["calibration"]
    figures = (
        (_frequency(kind, found["frequency"], per_category), "AP of each class and, as lines, the mean of its bin."),
        (_errors(kind, found["errors"]), "What AP50 would gain if this kind of error (TIDE) did not occur."),
        (
            _calibration(kind, calibration),
            f"Share of detections that are right at IoU 0.5. Expected gap to the score: {calibration['ece']:.2f}.",
        ),
    )
    charts = "\n".join(f"<figure>\n{svg}\n<figcaption>{text}</figcaption>\n</figure>" for svg, text in figures if svg)
    rows = "".join(
        f'<tr><td class="text">{html.escape(pair["object"])}</td><td class="text">{html.escape(pair["found"])}</td>'
        f"<td>{pair['count']}</td></tr>\n"
        for pair in found["confusions"]
    )
    table = f'<div class="wide"><table>\n<tr><th>Object</th><th>Found</th><th>Times</th></tr>\n{rows}</table></div>\n'
    return (
        f'<h2>{KINDS[kind]} AP</h2>\n<div class="charts">\n{charts}\n</div>\n'
        f"<h3>Classes taken for each other, with a score of 0.5 or more</h3>\n{table if rows else '<p>None.</p>'}"
    )


def _frequency(kind: str, bins: Sequence[Mapping[str, Any]], per_category: Sequence[Mapping[str, Any]]) -> str:
    """AP against the number of training images; nothing if that is unknown."""
    if not bins:
        return ""
    key = f"{kind}_AP"
    points = [(c["train_images"], c[key]) for c in per_category if c[key] is not None and c["train_images"] is not None]
    images, values = np.array(points, dtype=np.float64).T
    figure, axes = new_figure()
    axes.scatter(np.maximum(images, 0.5), 100 * values, s=9, color=COLOUR, alpha=0.5, linewidths=0)
    for found in bins:
        last = found["last"] or max(images.max(), found["first"])
        axes.plot([max(found["first"] - 0.5, 0.5), last + 0.5], [100 * found["AP"]] * 2, color=INK, lw=2)
    axes.set(xscale="log", xlabel="training images with the class", ylabel="AP (%)", ylim=(0, 100))
    return to_svg(figure, f"frequency-{kind}", "AP by number of training images")


def _errors(kind: str, errors: Mapping[str, Any]) -> str:
    figure, axes = new_figure()
    axes.bar(list(ERRORS.values()), [100 * errors["delta_ap"][name] for name in ERRORS], color=COLOUR)
    axes.set_ylabel("AP50 lost (points)")
    axes.tick_params(axis="x", labelsize=8)
    return to_svg(figure, f"errors-{kind}", "AP50 lost by kind of error")


def _calibration(kind: str, calibration: Mapping[str, Any]) -> str:
    bins = [found for found in calibration["bins"] if found["count"]]
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
    scores, right = [b["avg_confidence"] for b in bins], [b["avg_accuracy"] for b in bins]
    axes.plot(scores, right, color=COLOUR, marker="o", lw=2)
    axes.set(xlabel="score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    return to_svg(figure, f"calibration-{kind}", "share of right detections by score")
