"""The page of `tailseg data check`: one HTML file with numbers, findings, charts and a gallery of rare classes."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from hotcoco import mask as rle
from matplotlib import rc_context
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.dataset import read_image
from tailseg.data.diagnosis.dataset_report import GROUPS, Checkup, object_sides
from tailseg.data.diagnosis.mask_checks import image_of_rows
from tailseg.errors import UserError
from tailseg.visualize.charts import STYLE, add_legend, new_figure, to_svg
from tailseg.visualize.colours import PALETTE
from tailseg.visualize.comparison_page import CSS

GROUP_COLOURS = {"r": "#d55e00", "c": "#b58900", "f": "#3a87c8"}
CLASSES_SHOWN, CROPS = 24, 3  # of the gallery: classes, and pictures of each
CROP_SIDE, MARGIN = 220, 0.35  # pixels of a picture's longer side; surroundings shown, in sides of the box
EXAMPLES = 20  # of a finding
SEVERITIES = {"error": "#c62828", "warning": "#d55e00", "note": "#7f7f7f"}
EXTRA_CSS = """
.tag { color: #fff; border-radius: 3px; padding: .1rem .45rem; font-size: .85rem }
.findings li { margin: .6rem 0 } .findings { padding-left: 0; list-style: none }
.gallery { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
.gallery div { display: flex; gap: .4rem; flex-wrap: wrap; align-items: end }
.gallery img { height: 6.5rem; width: auto }
"""


def write_page(checkup: Checkup, train: Annotations, path: Path) -> None:
    """Write the page; pictures of the gallery come from the training split."""
    sections = [
        _section("Findings", _findings(checkup)),
        _section("In numbers", _numbers(checkup)),
        _section("The long tail", _charts(checkup, train)),
        _section("Rare classes", gallery(checkup, train)),
        _section("Where to begin", _suggestion(checkup)),
    ]
    errors = sum(finding.severity == "error" for finding in checkup.findings)
    warnings = sum(finding.severity == "warning" for finding in checkup.findings)
    state = "Training can begin" if checkup.usable() else "This data cannot be trained on yet"
    verdict = f"{state}: {_count(errors, 'error')}, {_count(warnings, 'warning')}."
    title = f"Check of {checkup.data}"
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(title)}</title>\n'
        f"<style>{CSS}{EXTRA_CSS}</style>\n</head>\n<body>\n<header>\n<h1>{_text(title)}</h1>\n"
        f'<p class="verdict">{_text(verdict)}</p>\n</header>\n<main>\n{"".join(sections)}</main>\n</body>\n</html>\n',
        encoding="utf-8",
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>\n"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    columns = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{_text(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _findings(checkup: Checkup) -> str:
    items = []
    for finding in checkup.findings:
        split = f"{finding.split}: " if finding.split else ""
        examples = ""
        if finding.examples:
            more = finding.count - EXAMPLES
            shown = ", ".join(finding.examples[:EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")
            examples = f"<details><summary>Which</summary><p>{_text(shown)}</p></details>"
        items.append(
            f'<li><span class="tag" style="background:{SEVERITIES[finding.severity]}">{finding.severity}</span> '
            f"{_text(split)}<strong>{finding.count:,}</strong> {_text(finding.what)}. "
            f'<span class="note">{_text(finding.mend)}.</span>{examples}</li>\n'
        )
    return f'<ul class="findings">{"".join(items)}</ul>' if items else "<p>Nothing to remark.</p>"


def _numbers(checkup: Checkup) -> str:
    keys = list(checkup.splits["train"])
    rows = [[key.replace("_", " "), *(f"{counts[key]:,}" for counts in checkup.splits.values())] for key in keys]
    groups = [[name, *(f"{value:,}" for value in row.values())] for name, row in checkup.groups.items()]
    return (
        '<div class="charts">'
        + _table("What the files hold.", ["", *checkup.splits], rows)
        + _table("Frequency groups.", ["", "classes", "training objects", "validation objects"], groups)
        + "</div>"
    )


def _suggestion(checkup: Checkup) -> str:
    memory = checkup.memory
    return (
        f"<p><code>{_text(checkup.suggestion['command'])}</code></p>\n"
        f'<p class="note">Because: {_text(checkup.suggestion["reason"])}.</p>\n'
        f"<p>Memory: annotations {memory['annotations'] / 2**20:,.1f} MiB, shared by all workers; a batch of the "
        f"largest images {memory['batch'] / 2**20:,.0f} MiB (pixels as bytes and as float32, masks of "
        f"{memory['objects_of_the_fullest_image']:,} objects an image), without the network's activations.</p>"
    )


# ---------------------------------------------------------------------------------------------------------
# Charts


def _charts(checkup: Checkup, train: Annotations) -> str:
    sampling = checkup.sampling
    figures = [
        (
            tail_chart(checkup),
            "Training images of each class, the most frequent first; a class without any stands at 0.5.",
        ),
        (size_chart(checkup, train), _size_caption(checkup)),
        (
            repeat_chart(checkup),
            f"Repeat factor of each class at the threshold {sampling['threshold']:g}: an epoch of "
            f"{sampling['images']:,} images becomes one of {sampling['epoch_ceil']:,} (rounded up) or "
            f"{sampling['epoch_stochastic']:,.0f} (by chance).",
        ),
        (objects_chart(train), "Objects of a training image."),
    ]
    return (
        '<div class="charts">'
        + "".join(f"<figure>{svg}<figcaption>{_text(text)}</figcaption></figure>\n" for svg, text in figures)
        + "</div>\n"
    )


def _size_caption(checkup: Checkup) -> str:
    scale = checkup.scale
    shares = ", ".join(f"{scale[f'under_{side}']:.1%} under {side}" for side in (8, 16, 32))
    return (
        f"Sides of training objects (root of the box's area) after the resize of {checkup.recipe} to "
        f"{scale['short_edge']:g} by {scale['long_edge']:g} pixels: {shares}."
    )


def tail_chart(checkup: Checkup) -> str:
    """Training images against the rank of the class, coloured by frequency group."""
    with rc_context(STYLE):
        figure, axes = new_figure()
        counts = np.array([row.train_images for row in checkup.classes], dtype=np.float64)
        groups = np.array([row.frequency for row in checkup.classes])
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


def size_chart(checkup: Checkup, train: Annotations) -> str:
    """Histogram of object sides at the recipe's resolution."""
    sides = object_sides(train, int(checkup.scale["short_edge"]), int(checkup.scale["long_edge"]))
    with rc_context(STYLE):
        figure, axes = new_figure()
        if len(sides):
            axes.hist(sides.clip(min=1), bins=np.geomspace(1, max(sides.max(), 2), 40).tolist(), color="#009e73")
        axes.set_xscale("log")
        axes.set_xticks([1, 8, 32, 96, 300, 1000], ["1", "8", "32", "96", "300", "1000"])
        axes.set_xlabel("side of the object, pixels")
        axes.set_ylabel("training objects")
        return to_svg(figure, "sizes", "Histogram of the sides of training objects.")


def repeat_chart(checkup: Checkup) -> str:
    """Repeat factors of the classes, by rank."""
    with rc_context(STYLE):
        figure, axes = new_figure()
        axes.plot([row.repeat_factor for row in checkup.classes], color="#cc79a7", lw=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("classes by frequency")
        axes.set_ylabel("repeat factor")
        return to_svg(figure, "repeat", "Line of the repeat factor of each class, from frequent to rare.")


def objects_chart(train: Annotations) -> str:
    """Histogram of the objects of an image."""
    counts = np.bincount(image_of_rows(train)[np.asarray(train.trained)], minlength=len(train))
    with rc_context(STYLE):
        figure, axes = new_figure()
        step = max(1, -(-int(counts.max(initial=1)) // 40))
        axes.hist(counts, bins=(np.arange(0, counts.max(initial=1) + step + 1, step) - 0.5).tolist(), color="#3a87c8")
        axes.set_xlabel("objects")
        axes.set_ylabel("training images")
        return to_svg(figure, "objects", "Histogram of the number of objects of a training image.")


# ---------------------------------------------------------------------------------------------------------
# Gallery


def gallery(checkup: Checkup, train: Annotations) -> str:
    """Some objects of the rarest classes that have any, outlined."""
    rows = sorted((row for row in checkup.classes if row.train_instances), key=lambda row: (row.train_images, row.id))
    labels = {category.id: label for label, category in enumerate(train.categories)}
    images = image_of_rows(train)
    real = np.asarray(train.trained)
    figures = []
    for row in rows[:CLASSES_SHOWN]:
        found = np.flatnonzero((np.asarray(train.labels) == labels[row.id]) & real)
        pictures = [crop(train, int(images[number]), int(number)) for number in _largest(train, found).tolist()]
        shown = "".join(_picture(picture, row.name) for picture in pictures if picture is not None)
        caption = f"{row.name}: {_count(row.train_images, 'image')}, {_count(row.train_instances, 'object')}"
        figures.append(f"<figure><div>{shown}</div><figcaption>{_text(caption)}</figcaption></figure>\n")
    note = f'<p class="note">The {len(figures)} rarest classes with training objects.</p>\n'
    return note + f'<div class="gallery">{"".join(figures)}</div>' if figures else "<p>There are no objects.</p>"


def _largest(train: Annotations, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.argsort(-np.asarray(train.areas)[rows], kind="stable")][:CROPS]


def crop(train: Annotations, image: int, row: int) -> NDArray[np.uint8] | None:
    """The surroundings of annotation ``row`` with its outline; None if the image cannot be read."""
    try:
        pixels = read_image(train.image_path(image))
    except UserError:
        return None
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = train.boxes[row].astype(np.float64).tolist()
    margin = MARGIN * max(x1 - x0, y1 - y0, 8)
    left, top = int(max(x0 - margin, 0)), int(max(y0 - margin, 0))
    right, bottom = int(min(x1 + margin, width)) + 1, int(min(y1 + margin, height)) + 1
    cut = pixels[top:bottom, left:right]
    if cut.size == 0:
        return None
    factor = CROP_SIDE / max(cut.shape[:2])
    size = (max(1, round(cut.shape[1] * factor)), max(1, round(cut.shape[0] * factor)))
    picture = cv2.resize(cut, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    outlines = [((p - (left, top)) * factor).round().astype(np.int32) for p in _outlines(train, image, row)]
    for colour, thickness in (((0, 0, 0), 4), (PALETTE[3], 2)):
        cv2.polylines(picture, outlines, isClosed=True, color=colour, thickness=thickness, lineType=cv2.LINE_AA)
    return np.asarray(picture, np.uint8)


def _outlines(train: Annotations, image: int, row: int) -> list[NDArray[np.float64]]:
    """Closed lines (K, 2) of a mask, in pixels of the image."""
    segmentation = train.segmentation(row)
    if not isinstance(segmentation, bytes):
        return [polygon.astype(np.float64).reshape(-1, 2) for polygon in segmentation]
    bitmap = rle.decode({"size": train.image_hws[image].tolist(), "counts": segmentation})
    found, _ = cv2.findContours(np.ascontiguousarray(bitmap), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [line.reshape(-1, 2).astype(np.float64) + 0.5 for line in found]


def _picture(picture: NDArray[np.uint8], name: str) -> str:
    _, code = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
    data = base64.b64encode(code.tobytes()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{_text(name)}" loading="lazy">'
