"""Pictures of detections and of ground truth: translucent masks, outlines, boxes and labels that can be read.

Everything goes through `draw`, which takes a list of `Drawn` records in the pixels of the picture that it
draws on. The classes of a picture have different colours, and their names are written beside them, so no meaning
hangs on colour alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tailseg.layers.paste import mask_crop
from tailseg.structures import Instances, RawDetections
from tailseg.visualize.colours import Colour, class_colours, text_colour
from tailseg.visualize.fonts import machine_fonts
from tailseg.visualize.label_placement import place_labels

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
SMALL_SIDE, ENLARGED_SIDE, LONGEST_SIDE = 320, 480, 4096  # pixels
FILL_OPACITY = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """One object, in pixels of the picture it is drawn on."""

    box: tuple[float, float, float, float]  # xyxy
    mask: NDArray[np.bool_]  # (h, w), a crop of the picture-sized mask
    origin: tuple[int, int]  # (y, x) of the crop's first pixel
    text: str
    colour: Colour


def enlargement(image_hw: tuple[int, int]) -> int:
    """The whole factor by which an image of ``image_hw`` pixels is enlarged, so that labels have room."""
    short, long = max(min(image_hw), 1), max(*image_hw, 1)
    if short >= SMALL_SIDE:
        return 1
    return max(1, min(math.ceil(ENLARGED_SIDE / short), LONGEST_SIDE // long))


def draw_detections(
    image: Picture,
    detections: RawDetections,
    names: Sequence[str],
    *,
    ids: Sequence[int] | None = None,
    min_score: float = 0.5,
    scale: int | None = None,
) -> Picture:
    """Draw the detections with a score of at least ``min_score``.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        detections: in pixels of ``image``, best score first; where labels compete for room, the first wins.
        names: name of class 0..C-1.
        ids: category id of each class, written where no font of the machine has the name's characters; None: the
            class number.
        min_score: lowest score drawn, in [0, 1].
        scale: whole factor of enlargement; None enlarges images whose short side is under 320 pixels to
            at least 480 pixels.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.

    Raises:
        ValueError: the image is not (H, W, 3) uint8, or not of the size that the detections refer to.
    """
    _require_picture(image)
    if tuple(detections.image_hw) != image.shape[:2]:
        raise ValueError(f"expected an image of {detections.image_hw} pixels, received {image.shape[:2]}")
    kept = detections.to("cpu")[(detections.scores >= min_score).cpu()]
    texts = [
        f"{_readable(names, label, ids)} {score:.2f}"
        for label, score in zip(kept.labels.tolist(), kept.scores.tolist(), strict=True)
    ]
    return _draw_grids(image, kept.boxes, kept.labels, kept.masks, kept.boxes, texts, scale)


def draw_instances(image: Picture, instances: Instances, names: Sequence[str]) -> Picture:
    """Draw annotated objects of an `Instances` record; the other arguments and the result as in `draw_detections`."""
    _require_picture(image)
    texts = [_readable(names, label) for label in instances.labels.tolist()]
    coverage = instances.masks.cpu().float() / 255
    return _draw_grids(image, instances.boxes, instances.labels, coverage, instances.mask_frames, texts)


def draw_objects(
    image: Picture,
    boxes: NDArray[np.floating],
    labels: NDArray[np.integer],
    masks: NDArray[np.bool_],
    names: Sequence[str],
    *,
    scores: Sequence[float] | None = None,
    scale: int | None = None,
) -> Picture:
    """Draw objects given by full-size masks.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        boxes: (N, 4) xyxy in pixels.
        labels: (N,) in [0, C).
        masks: (N, H, W) bool.
        names: name of class 0..C-1.
        scores: (N,) written behind the names; None: of annotations.
        scale: as in `draw_detections`.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.
    """
    _require_picture(image)
    factor = scale or enlargement(image.shape[:2])
    colours = class_colours(labels.tolist())
    endings = [""] * len(labels) if scores is None else [f" {score:.2f}" for score in scores]
    drawn = []
    for box, label, mask, ending in zip(boxes.tolist(), labels.tolist(), masks, endings, strict=True):
        top, left, crop = _tight(mask)
        x0, y0, x1, y1 = (factor * value for value in box)
        text, finer = _readable(names, label) + ending, _enlarge_mask(crop, factor)
        drawn.append(Drawn((x0, y0, x1, y1), finer, (factor * top, factor * left), text, colours[label]))
    return draw(_enlarge(image, factor), drawn)


def draw(picture: Picture, objects: Sequence[Drawn]) -> Picture:
    """Draw objects on a copy of ``picture`` (H, W, 3) uint8 RGB, at its own size.

    Large objects are drawn first, so that they do not hide small ones. Labels are placed in the order of
    ``objects``, outside their own box where there is room; one that finds no room beside those already
    placed is left out, since a pile of labels tells nothing.
    """
    canvas = picture.copy()
    height, width = canvas.shape[:2]
    thickest = 2 if min(height, width) < 900 else 3
    for item in sorted(objects, key=lambda item: -_area(item.box)):
        # An outline of full width would cover all of a small object.
        _draw_mask(canvas, item, 1 if min(item.mask.shape) < 10 * thickest else thickest)
    for item in objects:
        corners = _box_corners(item.box, (height, width))
        cv2.rectangle(canvas, corners[0], corners[1], item.colour, 1)
    return _draw_labels(canvas, objects)


def contact_sheet(pictures: Sequence[Picture], captions: Sequence[str], columns: int) -> Picture:
    """Lay pictures out in rows, each with its caption below, on white.

    Args:
        pictures: (H_i, W_i, 3) uint8 RGB; shrunk, never enlarged, to the narrowest of their widths (but
            not below 320 pixels), in their own aspect.
        captions: one a picture, wrapped to the column.
        columns: at least 1.

    Returns:
        (H, W, 3) uint8 RGB; without pictures a blank strip.

    Raises:
        ValueError: the numbers of pictures and captions differ, or columns < 1.
    """
    if len(pictures) != len(captions) or columns < 1:
        raise ValueError(
            f"expected a caption a picture and at least one column, received {len(pictures)} pictures, "
            f"{len(captions)} captions, {columns} columns"
        )
    gap = 12
    column = max(320, min((picture.shape[1] for picture in pictures), default=320))
    cells = [_cell(picture, caption, column) for picture, caption in zip(pictures, captions, strict=True)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    used = min(columns, max(len(cells), 1))
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (used * (column + gap) + gap, sum(height + gap for height in heights) + gap), "white")
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for position, cell in enumerate(row):
            sheet.paste(cell, (gap + position * (column + gap), top))
        top += height + gap
    return np.array(sheet)


def _require_picture(image: Picture) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected an (H, W, 3) uint8 image, received {image.shape} {image.dtype}")


def _readable(names: Sequence[str], label: int, ids: Sequence[int] | None = None) -> str:
    return machine_fonts().legible(names[label].replace("_", " "), label if ids is None else ids[label])


def _enlarge(image: Picture, factor: int) -> Picture:
    if factor == 1:
        return image
    height, width = image.shape[:2]
    larger = cv2.resize(image, (factor * width, factor * height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(larger, dtype=np.uint8)


def _draw_grids(
    image: Picture,
    boxes: Tensor,
    labels: Tensor,
    grids: Tensor,
    frames: Tensor,
    texts: Sequence[str],
    scale: int | None = None,
) -> Picture:
    """Draw objects whose masks are (N, M, M) grids in [0, 1] over ``frames`` (N, 4)."""
    factor = scale or enlargement(image.shape[:2])
    # The grid is sampled at the enlarged picture's own pixels: an outline of the finest detail it holds.
    larger = _enlarge(image, factor)
    height, width = larger.shape[:2]
    colours = class_colours(labels.tolist())
    drawn = []
    for box, label, grid, frame, text in zip(
        (factor * boxes).tolist(), labels.tolist(), grids.cpu(), factor * frames.cpu(), texts, strict=True
    ):
        crop, (top, left) = mask_crop(grid, frame, (height, width))
        mask = np.asarray(crop, dtype=bool)
        drawn.append(Drawn(tuple(box), mask, (int(top), int(left)), text, colours[label]))
    return draw(larger, drawn)


def _tight(mask: NDArray[np.bool_]) -> tuple[int, int, NDArray[np.bool_]]:
    """Top, left and content of the smallest rectangle that holds the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return 0, 0, mask[:0, :0]
    top, left = int(rows[0]), int(columns[0])
    return top, left, mask[top : rows[-1] + 1, left : columns[-1] + 1]


def _enlarge_mask(mask: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    """The mask in finer pixels, its staircase smoothed; a single pixel stays."""
    if factor == 1 or mask.size == 0:
        return mask
    height, width = mask.shape
    size = (factor * width, factor * height)
    # The crop's own frame must count as outside, or masks would bulge out of it.
    framed = np.pad(mask.astype(np.float32), 1)
    finer = cv2.resize(framed, (size[0] + 2 * factor, size[1] + 2 * factor), interpolation=cv2.INTER_LINEAR)
    smooth: NDArray[np.bool_] = finer[factor:-factor, factor:-factor] >= 0.5
    return smooth


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _box_corners(
    box: tuple[float, float, float, float], picture_hw: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last pixel of the box, inside the picture."""
    height, width = picture_hw
    left, top = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    right = min(max(math.ceil(box[2]) - 1, left), width - 1)
    bottom = min(max(math.ceil(box[3]) - 1, top), height - 1)
    return (left, top), (right, bottom)


def _draw_mask(canvas: Picture, item: Drawn, thickness: int) -> None:
    """Fill and outline, in place; the outline has a dark rim so that it stands out on any ground."""
    height, width = item.mask.shape
    if not item.mask.any():
        return
    top, left = item.origin
    region = canvas[top : top + height, left : left + width]
    tint = np.array(item.colour, dtype=np.float32)
    region[item.mask] = (region[item.mask] * (1 - FILL_OPACITY) + tint * FILL_OPACITY).astype(np.uint8)
    contours, _ = cv2.findContours(
        item.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left, top)
    )
    rim = tuple(value // 3 for value in item.colour)
    cv2.polylines(canvas, contours, True, rim, thickness + 2, cv2.LINE_AA)
    cv2.polylines(canvas, contours, True, item.colour, thickness, cv2.LINE_AA)


def _draw_labels(canvas: Picture, objects: Sequence[Drawn]) -> Picture:
    height, width = canvas.shape[:2]
    size, fonts = max(12, min(28, round(min(height, width) / 40))), machine_fonts()
    faces = [fonts.font(item.text, size) for item in objects]
    padding, gap = 3, 2
    texts = [_shortened(item.text, font, width // 2) for item, font in zip(objects, faces, strict=True)]
    sizes = [
        (math.ceil(font.getlength(text)) + 2 * padding, sum(font.getmetrics()) + padding)
        for text, font in zip(texts, faces, strict=True)
    ]
    boxes = np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4)
    plates = place_labels(boxes, sizes, (height, width), gap=gap)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    rows = zip(objects, texts, faces, plates, strict=True)
    shown = [(item, text, font, plate) for item, text, font, plate in rows if plate]
    for item, _, _, plate in shown:  # all leader lines first: none may cross a text
        _draw_leader(pen, item, plate, 2 * gap)
    for item, text, font, (left, top, right, bottom) in shown:
        rim = tuple(value // 3 for value in item.colour)
        pen.rectangle((left, top, right - 1, bottom - 1), fill=item.colour, outline=rim)
        pen.text((left + padding, top + padding // 2), text, font=font, fill=text_colour(item.colour))
    return np.array(picture)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, its name cut in the middle with an ellipsis when wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text

    def cut(kept: int) -> str:
        return f"{text[:kept]}…{text[-5:]}"  # the score stands in the last five characters

    # The most letters of the beginning that fit, by halving.
    kept = bisect_right(range(1, len(text) - 5), float(width), key=lambda count: font.getlength(cut(count)))
    return cut(kept) if kept else text[-4:]


def _draw_leader(pen: ImageDraw.ImageDraw, item: Drawn, plate: tuple[int, int, int, int], near: float) -> None:
    """A line from a plate that stands apart to the nearest point of its box."""
    left, top, right, bottom = plate
    x0, y0, x1, y1 = item.box
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    target = (min(max(middle_x, x0), x1), min(max(middle_y, y0), y1))
    start = (min(max(target[0], left), right), min(max(target[1], top), bottom))
    if math.dist(start, target) > near:
        pen.line((start, target), fill=tuple(value // 3 for value in item.colour), width=3)
        pen.line((start, target), fill=item.colour, width=1)


def _cell(picture: Picture, caption: str, width: int) -> Image.Image:
    """One picture of a contact sheet over its caption, ``width`` pixels wide."""
    font = machine_fonts().font(caption, 16)
    image = Image.fromarray(picture)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    lines = _wrapped(caption, font, width)
    line_height = sum(font.getmetrics()) + 2
    cell = Image.new("RGB", (width, image.height + 6 + line_height * len(lines)), "white")
    cell.paste(image, ((width - image.width) // 2, 0))
    pen = ImageDraw.Draw(cell)
    for row, line in enumerate(lines):
        pen.text((0, image.height + 6 + row * line_height), line, font=font, fill=(20, 20, 20))
    return cell


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines
