"""Detections on disk: LVIS results files, written as images come, merged over processes, read with checks.

A results file is a JSON list of rows ``{"image_id", "category_id", "bbox": [x, y, w, h], "score",
"segmentation"}``, boxes in pixels of the image file, segmentation in COCO run-length code. Ours hold one row
a line, so that parts can be merged without reading them whole. N is the number of rows.
"""

from __future__ import annotations

import gc
import gzip
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import orjson
from hotcoco import mask as rle_codec
from numpy.typing import NDArray

from tailseg.errors import UserError
from tailseg.layers.paste import Rle, encode_masks
from tailseg.structures import Detections

Row = dict[str, Any]


class ResultsWriter:
    """Writes a results file row by row, for use in a ``with`` block.

    The file appears under its name when the block ends without an error; until then it is ``NAME.partial``,
    which an error removes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self._partial.open("wb")
        self._separator = b"[\n"
        return self

    def add(self, image_id: int, detections: Detections, category_ids: Sequence[int]) -> None:
        """Append the detections of one image, in their order.

        Args:
            image_id: the image's id in the annotation file.
            detections: boxes in pixels of the image file (not of the resized network input).
            category_ids: (C,) the annotation file's category id of each label.
        """
        boxes = detections.boxes.detach().cpu().float().numpy()
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        scores = detections.scores.detach().cpu().float().numpy()
        labels = detections.labels.tolist()
        masks = encode_masks(detections.masks, detections.boxes, detections.image_hw)
        for label, box, score, rle in zip(labels, xywh, scores, masks, strict=True):
            row = {
                "image_id": int(image_id),
                "category_id": int(category_ids[label]),
                "bbox": box,
                "score": score,
                "segmentation": rle,
            }
            # orjson writes float32 with the fewest digits that read back as the same float32.
            self._write_line(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))

    def _write_line(self, line: bytes) -> None:
        self._file.write(self._separator)
        self._file.write(line)
        self._separator = b",\n"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.write(b"[]\n" if self._separator == b"[\n" else b"\n]\n")
        self._file.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink()


_LINE_START = re.compile(rb'\{"image_id":(-?\d+),')


def merge_results(parts: Sequence[Path], out: Path) -> None:
    """Join results files of several processes into one, ordered by image id.

    Only an index of the images is held in memory. An image that several parts hold, as happens when a sampler
    repeats images to give each process the same number, is taken from the first of them.

    Args:
        parts: files written by `ResultsWriter`.
        out: the file to write.

    Raises:
        UserError: a part is missing or was not written by `ResultsWriter`.
    """
    blocks: dict[int, tuple[int, int, int]] = {}  # image id -> part, first byte, one past the last byte
    for number, part in enumerate(parts):
        for image_id, start, end in _image_blocks(part):
            known = blocks.get(image_id)
            if known is None:
                blocks[image_id] = (number, start, end)
            elif known[0] == number:
                if known[2] != start:
                    raise UserError(f"{part}: the rows of image {image_id} are not together; write the part again")
                blocks[image_id] = (number, known[1], end)
    files = [part.open("rb") for part in parts]
    try:
        with ResultsWriter(out) as writer:
            for image_id in sorted(blocks):
                number, start, end = blocks[image_id]
                files[number].seek(start)
                writer._write_line(files[number].read(end - start).rstrip(b",\n"))
    finally:
        for file in files:
            file.close()


def _image_blocks(part: Path) -> list[tuple[int, int, int]]:
    """Stretches of lines of one image in a part: image id, first byte, one past the last byte."""
    blocks: list[tuple[int, int, int]] = []
    try:
        file = part.open("rb")
    except OSError as error:
        raise UserError(f"{part}: cannot be read ({error.strerror}); give the results files to merge") from error
    with file:
        place = 0
        for line in file:
            start, place = place, place + len(line)
            if line.strip() in (b"[", b"]", b"[]"):
                continue
            match = _LINE_START.match(line)
            if match is None:
                raise UserError(f"{part}: byte {start} does not start a results row; write the part again")
            image_id = int(match[1])
            if blocks and blocks[-1][0] == image_id:
                blocks[-1] = (image_id, blocks[-1][1], place)
            else:
                blocks.append((image_id, start, place))
    return blocks


def read_json(path: Path) -> Any:
    """Content of a JSON file, which may be packed with gzip (``.gz``).

    Raises:
        UserError: the file is missing, empty, damaged, or cut off.
    """
    try:
        text = path.read_bytes()
        if path.suffix == ".gz":
            text = gzip.decompress(text)
    except (gzip.BadGzipFile, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); write or download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty; write or download it again")
    collecting = gc.isenabled()
    gc.disable()  # none of the new objects is garbage, and searching millions takes longer than reading
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} of {len(text)} bytes"
            f" ({error.msg}); write or download it again"
        ) from error
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResultColumns:
    """The rows of a results file as columns, in the file's order, every value checked."""

    image_ids: NDArray[np.int64]  # (N,)
    category_ids: NDArray[np.int64]  # (N,)
    scores: NDArray[np.float64]  # (N,) finite
    boxes: NDArray[np.float64] | None  # (N, 4) xywh in pixels; None if the first row has none
    masks: list[Rle] | None  # N codes; None if not asked for
    mask_areas: NDArray[np.float64] | None  # (N,) pixels

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: NDArray[np.int64]) -> ResultColumns:
        """The rows at the positions ``index``."""
        return ResultColumns(
            image_ids=self.image_ids[index],
            category_ids=self.category_ids[index],
            scores=self.scores[index],
            boxes=None if self.boxes is None else self.boxes[index],
            masks=None if self.masks is None else [self.masks[i] for i in index],
            mask_areas=None if self.mask_areas is None else self.mask_areas[index],
        )


def read_results(
    rows: Any, source: str, image_hws: dict[int, tuple[int, int]], category_ids: set[int], need: Sequence[str]
) -> ResultColumns:
    """Check the rows of a results file against an annotation file and turn them into columns.

    Args:
        rows: what the file holds, a list of rows if all is well.
        source: the file's name, for messages.
        image_hws: (height, width) in pixels of every image id of the annotation file.
        category_ids: category ids of the annotation file.
        need: which of "bbox" and "segm" every row must have. Boxes are read whenever the first row has one.

    Raises:
        UserError: names the first row (counted from 0) that is at fault.
    """
    if not isinstance(rows, list):
        raise UserError(f"{source}: expected a list of results rows, found {_kind(rows)}")
    images = _column(rows, "image_id", source, "a whole number", _is_int, "i").astype(np.int64)
    _require_known(images, set(image_hws), source, "image")
    categories = _column(rows, "category_id", source, "a whole number", _is_int, "i").astype(np.int64)
    _require_known(categories, category_ids, source, "category")
    scores = _column(rows, "score", source, "a finite number", _is_number, "if").astype(np.float64)
    boxes = masks = areas = None
    if "bbox" in need or (rows and "bbox" in rows[0]):
        expected = "four finite numbers x, y, width, height"
        boxes = _column(rows, "bbox", source, expected, is_box, "if", 4).astype(np.float64)
    if "segm" in need:
        masks, areas = _mask_column(rows, source, [image_hws[i] for i in images.tolist()])
    return ResultColumns(
        image_ids=images, category_ids=categories, scores=scores, boxes=boxes, masks=masks, mask_areas=areas
    )


def _column(
    rows: list[Row],
    key: str,
    source: str,
    expected: str,
    valid: Callable[[Any], bool],
    kinds: str,
    width: int = 0,
) -> NDArray[Any]:
    """One key of all rows as an array (N,), or (N, width); one by one only to name a fault."""
    try:
        array = np.asarray([row[key] for row in rows])
    except (KeyError, TypeError, ValueError, IndexError):
        array = np.empty(0, dtype=object)
    if not rows:
        return np.zeros((0, width) if width else 0)
    shape = (len(rows), width) if width else (len(rows),)
    if array.shape == shape and array.dtype.kind in kinds and np.isfinite(array).all():
        return array
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{source}: row {index} is {_kind(row)}, not an object with image_id, score, ...")
        if key not in row:
            raise UserError(f"{source}: row {index} has no {key!r}; every row needs one here")
        if not valid(row[key]):
            raise UserError(f"{source}: {key} of row {index} is {_short(row[key])}, expected {expected}")
    raise UserError(f"{source}: {key} must be {expected} in every row")


def _mask_column(
    rows: list[Row], source: str, image_hws: list[tuple[int, int]]
) -> tuple[list[Rle], NDArray[np.float64]]:
    """The segmentations as run-length codes (polygons are rasterised), and their areas in pixels."""
    masks = []
    for index, (row, image_hw) in enumerate(zip(rows, image_hws, strict=True)):
        if "segmentation" not in row:
            raise UserError(f"{source}: row {index} has no 'segmentation'; score boxes alone or add masks")
        masks.append(to_rle(row["segmentation"], image_hw, f"{source}: segmentation of row {index}"))
    try:
        areas = rle_codec.area(masks) if masks else np.zeros(0)
    except (ValueError, TypeError):
        for index, mask in enumerate(masks):
            rle_area(mask, f"{source}: segmentation of row {index}")
        raise
    return masks, np.asarray(areas, dtype=np.float64)


def to_rle(segmentation: Any, image_hw: tuple[int, int], place: str) -> Rle:
    """A segmentation as it stands in a file, as a run-length code of the image's size.

    Args:
        segmentation: run-length code, or polygons [[x, y, x, y, ...], ...] in pixels.
        image_hw: (height, width) of the image in pixels.
        place: file and row, for messages.

    Raises:
        UserError: it is neither of the two, or its size is not the image's. Counts are not looked into.
    """
    if isinstance(segmentation, dict):
        if list(image_hw) != segmentation.get("size"):
            found = _short(segmentation.get("size"))
            raise UserError(f"{place} has the size {found}, expected [height, width] = {list(image_hw)}")
        if not isinstance(segmentation.get("counts"), str | bytes | list):
            raise UserError(f"{place} has no run-length counts")
        return segmentation
    try:
        rle = rle_codec.merge([rle_codec.frPoly(polygon, *image_hw) for polygon in segmentation])
    except (ValueError, TypeError) as error:
        raise UserError(f"{place} is neither a run-length code nor a list of polygons ({error})") from error
    return {"size": list(image_hw), "counts": rle["counts"].decode("ascii")}


def rle_area(rle: Rle, place: str) -> int:
    """Area of a run-length code in pixels; UserError, beginning with ``place``, if it cannot be decoded."""
    try:
        return int(rle_codec.area(rle))
    except (ValueError, TypeError) as error:
        raise UserError(f"{place} is malformed ({error})") from error


def _require_known(ids: NDArray[np.int64], known: set[int], source: str, what: str) -> None:
    unknown = ~np.isin(ids, np.fromiter(known, dtype=np.int64, count=len(known)))
    if unknown.any():
        index = int(unknown.argmax())
        raise UserError(
            f"{source}: row {index} names {what} {ids[index]}, which the annotation file does not have;"
            " score against the split that the results were made on"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def is_box(value: Any) -> bool:
    """Whether a value read from a file is four finite numbers."""
    return isinstance(value, list | tuple | np.ndarray) and len(value) == 4 and all(map(_is_number, value))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
