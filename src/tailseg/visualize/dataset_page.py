"""The page of `tailseg data check`: numbers, findings, charts and a gallery of rare classes."""

from __future__ import annotations

from pathlib import Path

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.diagnosis.dataset_report import DatasetReport
from tailseg.data.diagnosis.findings import Finding
from tailseg.files import write_whole
from tailseg.visualize.dataset_charts import objects_chart, repeat_chart, size_chart, tail_chart
from tailseg.visualize.gallery import rarest_classes
from tailseg.visualize.page import data_uri, render

EXAMPLES = 20  # of a finding


def write_page(report: DatasetReport, train: Annotations, path: Path) -> None:
    """Write the page; pictures of the gallery come from the training split."""
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    state = "Training can begin" if report.usable() else "This data cannot be trained on yet"
    page = render(
        "dataset.html",
        title=f"Check of {report.data}",
        verdict=f"{state}: {_count(errors, 'error')}, {_count(warnings, 'warning')}.",
        findings=[_finding(finding) for finding in report.findings],
        tables=_tables(report),
        charts=_charts(report, train),
        gallery=_gallery(report, train),
        suggestion=report.suggestion,
        memory={
            "annotations": f"{report.memory['annotations'] / 2**20:,.1f}",
            "batch": f"{report.memory['batch'] / 2**20:,.0f}",
            "objects": f"{report.memory['objects_of_the_fullest_image']:,}",
        },
    )
    write_whole(path, page)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _finding(finding: Finding) -> dict[str, str]:
    more = finding.count - EXAMPLES
    examples = ", ".join(finding.examples[:EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")
    return {
        "severity": finding.severity,
        "split": finding.split,
        "count": f"{finding.count:,}",
        "what": finding.what,
        "fix": finding.fix,
        "examples": examples if finding.examples else "",
    }


def _tables(report: DatasetReport) -> list[dict[str, object]]:
    keys = list(report.splits["train"])
    return [
        {
            "caption": "What the files hold.",
            "head": ["", *report.splits],
            "rows": [
                [key.replace("_", " "), *(f"{counts[key]:,}" for counts in report.splits.values())] for key in keys
            ],
        },
        {
            "caption": "Frequency groups.",
            "head": ["", "classes", "training objects", "validation objects"],
            "rows": [[name, *(f"{value:,}" for value in row.values())] for name, row in report.groups.items()],
        },
    ]


def _charts(report: DatasetReport, train: Annotations) -> list[dict[str, object]]:
    sampling, scale = report.sampling, report.scale
    shares = ", ".join(f"{scale[f'under_{side}']:.1%} under {side}" for side in (8, 16, 32))
    return [
        {
            "chart": tail_chart(report),
            "caption": "Training images of each class, the most frequent first; a class without any stands at 0.5.",
        },
        {
            "chart": size_chart(report, train),
            "caption": f"Sides of training objects (root of the box's area) after the resize of {report.recipe} to "
            f"{scale['short_edge']:g} by {scale['long_edge']:g} pixels: {shares}.",
        },
        {
            "chart": repeat_chart(report),
            "caption": f"Repeat factor of each class at the threshold {sampling['threshold']:g}: an epoch of "
            f"{sampling['images']:,} images becomes one of {sampling['epoch_ceil']:,} (rounded up) or "
            f"{sampling['epoch_stochastic']:,.0f} (by chance).",
        },
        {"chart": objects_chart(train), "caption": "Objects of a training image."},
    ]


def _gallery(report: DatasetReport, train: Annotations) -> list[dict[str, object]]:
    return [
        {
            "name": row.name,
            "images": _count(row.train_images, "image"),
            "objects": _count(row.train_instances, "object"),
            "pictures": [data_uri(picture, "image/jpeg") for picture in pictures],
        }
        for row, pictures in rarest_classes(report, train)
    ]
