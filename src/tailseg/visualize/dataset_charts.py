"""The charts of a data set's check."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import GROUPS
from tailseg.data.diagnosis.dataset_report import DatasetReport, object_sides
from tailseg.data.diagnosis.mask_checks import image_of_rows
from tailseg.visualize.charts import add_legend, new_figure, to_svg

GROUP_COLOURS = {"r": "#d55e00", "c": "#b58900", "f": "#3a87c8"}


def tail_chart(report: DatasetReport) -> Markup:
    """Training images against the rank of the class, coloured by frequency group."""
    with new_figure() as (figure, axes):
        counts = np.array([row.train_images for row in report.classes], dtype=np.float64)
        groups = np.array([row.frequency for row in report.classes])
        for key, name in reversed(GROUPS.items()):
            ranks = np.flatnonzero(groups == key)
            if len(ranks):
                axes.bar(ranks, counts[ranks].clip(min=0.5), width=1.0, color=GROUP_COLOURS[key], label=name)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.4)
        axes.set_xlabel("classes by frequency")
        axes.set_ylabel("training images")
        add_legend(figure, axes)
        return to_svg(figure, "tail", "Bars of the training images of each class, from frequent to rare.")


def size_chart(report: DatasetReport, train: Annotations) -> Markup:
    """Histogram of object sides at the recipe's resolution."""
    sides = object_sides(train, int(report.scale["short_edge"]), int(report.scale["long_edge"]))
    with new_figure() as (figure, axes):
        if len(sides):
            axes.hist(sides.clip(min=1), bins=np.geomspace(1, max(sides.max(), 2), 40).tolist(), color="#009e73")
        axes.set_xscale("log")
        axes.set_xticks([1, 8, 32, 96, 300, 1000], ["1", "8", "32", "96", "300", "1000"])
        axes.set_xlabel("side of the object, pixels")
        axes.set_ylabel("training objects")
        return to_svg(figure, "sizes", "Histogram of the sides of training objects.")


def repeat_chart(report: DatasetReport) -> Markup:
    """Repeat factors of the classes, by rank."""
    with new_figure() as (figure, axes):
        axes.plot([row.repeat_factor for row in report.classes], color="#cc79a7", lw=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("classes by frequency")
        axes.set_ylabel("repeat factor")
        return to_svg(figure, "repeat", "Line of the repeat factor of each class, from frequent to rare.")


def objects_chart(train: Annotations) -> Markup:
    """Histogram of the objects of an image."""
    counts = np.bincount(image_of_rows(train)[np.asarray(train.trained)], minlength=len(train))
    with new_figure() as (figure, axes):
        step = max(1, -(-int(counts.max(initial=1)) // 40))
        axes.hist(counts, bins=(np.arange(0, counts.max(initial=1) + step + 1, step) - 0.5).tolist(), color="#3a87c8")
        axes.set_xlabel("objects")
        axes.set_ylabel("training images")
        return to_svg(figure, "objects", "Histogram of the number of objects of a training image.")
