"""Detections on disk: LVIS results files, written as images come, merged over processes.

A results file is a JSON list of rows ``{"image_id", "category_id", "bbox": [x, y, w, h], "score",
"segmentation"}``, boxes in pixels of the image file, segmentation in COCO run-length code. Ours hold one row
a line, so that parts can be merged without reading them whole. Where a model ranks masks by a score of their own
(a mask-IoU head), that is the ``score``, as a test server of masks needs it, and ``box_score`` ranks the boxes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import orjson

from tailseg.errors import UserError
from tailseg.files import writing
from tailseg.layers.paste import encode_masks
from tailseg.structures import RawDetections

logger = logging.getLogger(__name__)


class ResultsWriter:
    """Writes a results file row by row, for use in a ``with`` block.

    The file appears under its name when the block ends without an error; until then it is ``NAME.partial``,
    which an error removes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._left_out = 0

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self._partial.open("wb")
        self._separator = b"[\n"
        return self

    def add(self, image_id: int, detections: RawDetections, category_ids: Sequence[int]) -> None:
        """Append the detections of one image, in their order, but for those with a value that is not finite.

        JSON has no NaN, and a test server refuses the whole file for one; a box that is nowhere finds nothing.

        Args:
            image_id: the image's id in the annotation file.
            detections: boxes in pixels of the image file (not of the resized network input).
            category_ids: (C,) the annotation file's category id of each label.
        """
        scores = detections.scores if detections.mask_scores is None else detections.mask_scores
        finite = detections.boxes.isfinite().all(1) & detections.scores.isfinite() & scores.isfinite()
        if not finite.all():
            self._left_out += int((~finite).sum())
            detections = detections[finite]
        for row in result_rows(detections, category_ids):
            # orjson writes float32 with the fewest digits that read back as the same float32.
            line = orjson.dumps({"image_id": int(image_id), **row}, option=orjson.OPT_SERIALIZE_NUMPY)
            self._write_line(line)

    def _write_line(self, line: bytes) -> None:
        with writing(self.path):
            self._file.write(self._separator)
            self._file.write(line)
        self._separator = b",\n"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with writing(self.path):
                if kind is None:
                    self._file.write(b"[]\n" if self._separator == b"[\n" else b"\n]\n")
                    self._file.close()
                    self._partial.replace(self.path)
        finally:
            with suppress(OSError):  # the disk may be full, so that the rest cannot be written when it is closed
                self._file.close()
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)
        if kind is None and self._left_out:
            logger.warning(
                "%s: left out %d detections with values that are not finite; has the training diverged?",
                self.path, self._left_out,
            )  # fmt: skip


def result_rows(detections: RawDetections, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of a results file for one image, in the order of the detections, without the image's id.

    Args:
        detections: in pixels of the image file.
        category_ids: (C,) the category id of each label.

    Returns:
        A row each: category_id, bbox (4,) float32 xywh in pixels, score float32, segmentation, and box_score float32
        where masks have scores of their own.
    """
    boxes = detections.boxes.detach().cpu().float().numpy()
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    box_scores = detections.scores.detach().cpu().float().numpy()
    own_scores = None if detections.mask_scores is None else detections.mask_scores.detach().cpu().float().numpy()
    rows: list[dict[str, Any]] = [
        {"category_id": int(category_ids[label]), "bbox": box, "score": score, "segmentation": rle}
        for label, box, score, rle in zip(
            detections.labels.tolist(),
            xywh,
            box_scores if own_scores is None else own_scores,
            encode_masks(detections.masks, detections.boxes, detections.image_hw),
            strict=True,
        )
    ]
    if own_scores is not None:
        for row, box_score in zip(rows, box_scores, strict=True):
            row["box_score"] = box_score
    return rows


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
