"""The page of an analysis of detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailseg.evaluation.comparison import KINDS
from tailseg.visualize.analysis_charts import calibration_chart, error_chart, frequency_chart
from tailseg.visualize.page import render


def write_page(analysis: Mapping[str, Any], per_category: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page.

    Args:
        analysis: "bbox" or "segm" -> what `tailseg.evaluation.analysis.analyse` returns.
        per_category: the rows of `Scores.per_category`.
        path: the HTML file.
    """
    kinds = [
        {"name": KINDS[kind], "charts": _charts(kind, found, per_category), "confusions": found["confusions"]}
        for kind, found in analysis.items()
    ]
    path.write_text(render("analysis.html", kinds=kinds), encoding="utf-8")


def _charts(kind: str, found: Mapping[str, Any], per_category: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    charts: list[dict[str, object]] = []
    if found["frequency"]:  # it is empty where the numbers of training images are unknown
        chart = frequency_chart(kind, found["frequency"], per_category)
        charts.append({"chart": chart, "caption": "AP of each class and, as lines, the mean of its bin."})
    chart = error_chart(kind, found["errors"])
    charts.append({"chart": chart, "caption": "What AP50 would gain if this kind of error (TIDE) did not occur."})
    gap = f"Expected gap to the score: {found['calibration']['ece']:.2f}."
    chart = calibration_chart(kind, found["calibration"])
    charts.append({"chart": chart, "caption": f"Share of detections that are right at IoU 0.5. {gap}"})
    return charts
