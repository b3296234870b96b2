"""The page of an analysis of detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import GROUPS
from tailseg.evaluation.methods import NOTHING
from tailseg.evaluation.metrics import Scores
from tailseg.evaluation.thresholds import FALLBACK, FEWEST
from tailseg.files import write_whole
from tailseg.visualize.analysis_charts import (
    ERRORS,
    SUMS,
    calibration_chart,
    curve_chart,
    error_chart,
    frequency_chart,
)
from tailseg.visualize.analysis_pictures import worst_pictures
from tailseg.visualize.page import render
from tailseg.wording import score_text

METRICS = ("AP", "AP50", "AP75", "APr", "APc", "APf", "APs", "APm", "APl")
TITLES = {"segm": "Masks", "bbox": "Boxes", "boundary": "Outlines"}
MOST_NAMES = 8  # of what was missed or wrong in a picture

Row = Mapping[str, Any]


def write_page(
    scores: Scores, path: Path, *, title: str, facts: Mapping[str, str], annotations: Annotations | None = None
) -> None:
    """Write the page: masks if they were scored, else boxes; the table of metrics has all.

    Args:
        scores: with an analysis.
        path: the HTML file.
        title: what was scored on what.
        facts: model, data, settings: names and values of a list.
        annotations: the split, if its pictures can be shown.
    """
    assert scores.analysis is not None
    kind = "segm" if "segm" in scores.analysis else "bbox"
    found = scores.analysis[kind]
    suggested, calibration = scores.thresholds or {}, found["calibration"]
    page = render(
        "analysis.html",
        title=title,
        kind="masks" if kind == "segm" else "boxes",
        facts=dict(facts) | {"Images": f"{found['images']:,}", "Objects": f"{found['objects']:,}"},
        metrics=[
            [TITLES[name], *(_percent(scores.metrics[name][metric]) for metric in METRICS)]
            for name in TITLES
            if name in scores.metrics
        ],
        metric_names=list(METRICS),
        threshold=_threshold(found["threshold"]),
        mask_threshold=None if found["mask_threshold"] is None else _score(found["mask_threshold"]["score"]),
        classes=[_class(row) for row in found["classes"]],
        own_thresholds=len(suggested["classes"]),
        fewest=FEWEST,
        curves=curve_chart(kind, found["curves"]) if found["curves"] else None,
        errors=_errors(found["errors"]),
        error_chart=error_chart(kind, found["errors"]),
        matrix=_matrix(found["confusion_matrix"]),
        calibration=calibration_chart(kind, calibration) if calibration else None,
        gap=_percent(calibration["ece"]) if calibration else "",
        frequency=frequency_chart(kind, found["frequency"], found["classes"]) if found["frequency"] else None,
        slices=_slices(found["slices"]),
        worst=_worst(found["worst"], annotations),
        with_pictures=annotations is not None,
        labels=[row | {"score": score_text(row["score"])} for row in found["labels"]["first"]],
        label_count=f"{found['labels']['count']:,}",
    )
    write_whole(path, page)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}"


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _score(value: float | None) -> str:
    return NOTHING if value is None else score_text(value)


def _threshold(found: Row | None) -> dict[str, str]:
    """The common threshold in words; where nothing was right there is no precision and no recall."""
    if found is None:
        return {"score": _score(FALLBACK), "precision": "", "recall": ""}
    shares = {key: f"{100 * found[key]:.0f}%" for key in ("precision", "recall")}
    return {"score": _score(found["score"])} | shares


def _class(row: Row) -> dict[str, str]:
    curve = "" if row["curve"] is None else " ".join(f"{100 * value:.0f}" for value in row["curve"])
    return {
        "name": row["name"],
        "group": GROUPS.get(row["frequency"], NOTHING),
        "AP": _percent(row["AP"]),
        "train_images": _count(row["train_images"]),
        "objects": _count(row["objects"]),
        "threshold": _score(row["threshold"]),
        "precision": _percent(row["precision"]),
        "recall": _percent(row["recall"]),
        "curve": curve,
    }


def _errors(errors: Row) -> list[list[str]]:
    rows = [
        [name, text, _percent(errors["delta_ap"][name]), _count(errors["counts"].get(name))]
        for name, text in (ERRORS | SUMS).items()
        if name in errors["delta_ap"]
    ]
    return rows


def _matrix(matrix: Row) -> dict[str, Any]:
    """Cells with their number and, in percent, their share of the row."""
    names, rows = matrix["classes"], []
    for number, counts in enumerate(matrix["counts"]):
        total = max(sum(counts), 1)
        cells = [
            {
                "count": count or "",
                "shade": round(100 * count / total),
                "right": column == number,
                "title": f"{names[number]} → {[*names, 'another class', 'not found'][column]}: {count}",
            }
            for column, count in enumerate(counts)
        ]
        rows.append({"name": names[number], "cells": cells})
    return {"size": len(names), "rows": rows}


def _slices(slices: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    def bounds(row: Row) -> str:
        return f"{row['first']} or more" if row["last"] is None else f"{row['first']}–{row['last']}"

    def one(row: Row) -> str:
        return str(row["first"]) if row["first"] == row["last"] else bounds(row)

    numbers = ("AP50", "precision", "recall")
    tables = [
        {
            "caption": "Objects by size: root of the area in pixels.",
            "head": ["Side", "Objects", "Found", "Found, any score"],
            "rows": [
                [bounds(row), _count(row["objects"]), _percent(row["recall"]), _percent(row["recall_any_score"])]
                for row in slices["size"]
            ],
        },
        {
            "caption": "Images by the number of objects in them.",
            "head": ["Objects", "Images", "AP50", "Precision", "Recall"],
            "rows": [
                [one(row), _count(row["images"]), *(_percent(row[key]) for key in numbers)]
                for row in slices["crowding"]
            ],
        },
        {
            "caption": "Classes by frequency in training.",
            "head": ["Group", "Classes", "Objects", "AP50", "Precision", "Recall"],
            "rows": [
                [
                    *(GROUPS[row["group"]], _count(row["classes"]), _count(row["objects"])),
                    *(_percent(row[key]) for key in numbers),
                ]
                for row in slices["frequency"]
            ],
        },
    ]
    return [table for table in tables if table["rows"]]


def _worst(worst: Sequence[Row], annotations: Annotations | None) -> list[dict[str, Any]]:
    pairs = [None] * len(worst) if annotations is None else worst_pictures(annotations, worst)
    return [
        {
            "name": Path(row["file_name"]).name or f"image {row['image_id']}",
            "numbers": f"{row['right']} right, {row['wrong']} wrong, {row['missed']} missed",
            "F1": _score(row["F1"]),
            "missed": _listed([name + (f" ×{n}" if n > 1 else "") for name, n in row["missed_classes"].items()]),
            "wrong": _listed([f"{one['name']} {score_text(one['score'])}" for one in row["found"] if not one["right"]]),
            "pictures": pair,
        }
        for row, pair in zip(worst, pairs, strict=True)
    ]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
