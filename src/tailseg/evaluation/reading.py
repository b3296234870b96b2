"""Results files read with checks, in bounded memory: a file becomes columns some megabytes at a time.

Never are all rows Python objects at once, and what cannot count is let go on the way: rows beyond the best of their
image (or of their class), and masks of classes that nobody looked for in their image. N is the number of rows.
"""

from __future__ import annotations

import gc
import gzip
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tailseg.data.annotations.columns import positions_of
from tailseg.data.annotations.packed import open_unpacked
from tailseg.data.annotations.streaming import NOT_A_NUMBER
from tailseg.errors import UserError
from tailseg.evaluation.pairs import Pairs
from tailseg.evaluation.rows import Row, Rows, kind_of

logger = logging.getLogger(__name__)

_CHUNK = 16 << 20  # bytes read at once
_WINDOW = 1 << 16  # bytes at their end in which the last row's end is looked for
_SETTLE = 1_000_000  # rows that wait, at least, until the best are picked
_JSON_LINES = re.compile(rb"\s*\{[^\n]*\}[ \t\r]*\n\s*\{")
_SEAM = re.compile(rb"\}\s*,\s*\{")  # between two rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Known:
    """The parts of an annotation file that rows are checked against; rows name images and classes by id."""

    image_ids: NDArray[np.int64]  # (I,) ascending as the file states them: from 2^63 on they are negative here
    image_sizes: NDArray[np.int64]  # (I, 2) pixels
    category_ids: NDArray[np.int64]  # (K,) ascending
    judged: Pairs  # the class was annotated in the image, or verified absent

    def codes(self, columns: ResultColumns) -> list[Any]:
        """The masks of rows as run-length codes."""
        assert columns.counts is not None
        return self.codes_at(columns.images, columns.counts)

    def codes_at(self, images: NDArray[np.int64], counts: NDArray[np.object_]) -> list[Any]:
        """Run lengths of masks in the images at these positions, as run-length codes."""
        sizes = self.image_sizes.tolist()  # shared: one list an image, not one a mask
        return [{"size": sizes[i], "counts": c} for i, c in zip(images.tolist(), counts.tolist(), strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Limit of the detections that count: the best ``limit`` of each image, or of each class over all images."""

    limit: int = 300
    per_class: bool = False

    def best(self, columns: ResultColumns) -> NDArray[np.int64]:
        """Positions of the rows that count, in the file's order; ties go to the earlier row."""
        groups = columns.categories if self.per_class else columns.images
        order = np.lexsort((-columns.scores, groups))  # stable
        grouped = groups[order]
        rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
        return np.sort(order[rank < self.limit])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResultColumns:
    """Rows of a results file as columns, in the file's order, every value checked."""

    images: NDArray[np.int64]  # (N,) position in `Known.image_ids`
    categories: NDArray[np.int64]  # (N,) position in `Known.category_ids`
    scores: NDArray[np.float64]  # (N,) finite
    box_scores: NDArray[np.float64] | None  # (N,) what ranks the boxes; None if the first row has none: as the masks
    judged: NDArray[np.bool_]  # (N,) false: left out by the rules, though it takes a place among the best
    boxes: NDArray[np.float64] | None  # (N, 4) xywh in pixels; None if the first row has none
    counts: NDArray[np.object_] | None  # (N,) run lengths as in the file, None where not judged; None if not asked for
    mask_areas: NDArray[np.float64] | None  # (N,) pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: NDArray[Any]) -> ResultColumns:
        """The rows at the positions ``index``, or where the mask ``index`` is true."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        chosen: dict[str, Any] = {name: None if c is None else c[index] for name, c in columns.items()}
        return ResultColumns(**chosen)

    def ranked(self, iou_type: str, cut: Cut) -> ResultColumns:
        """The rows that count for "bbox" or "segm", with the scores that rank those."""
        if self.box_scores is None:
            return self
        own = replace(self, scores=self.box_scores) if iou_type == "bbox" else self
        best = own[cut.best(own)]
        return best[best.judged]

    @staticmethod
    def join(parts: Sequence[ResultColumns]) -> ResultColumns:
        """All rows of all parts, of which there is at least one."""
        columns: dict[str, list[Any]] = {name: [getattr(part, name) for part in parts] for name in _NAMES}
        joined: dict[str, Any] = {k: None if v[0] is None else np.concatenate(v) for k, v in columns.items()}
        return ResultColumns(**joined)


_NAMES = ResultColumns.__slots__


@dataclass(slots=True)
class _Odd:
    """Rows that find nothing for what they are: how many, and the place and the id of the first."""

    count: int = 0
    first: int = 0
    id: int = 0

    def add(self, flags: NDArray[np.bool_], first_row: int, ids: NDArray[np.int64]) -> None:
        """Count the rows (N,) that are flagged, of a stretch with these ids that begins at a row."""
        if self.count == 0 and flags.any():
            index = int(flags.argmax())
            self.first, self.id = first_row + index, int(ids[index])
        self.count += int(flags.sum())


@dataclass(frozen=True, slots=True)
class _Oddities:
    """What is told of a results file when all of it is read."""

    unlisted: _Odd = field(default_factory=_Odd)  # rows of a category that the annotation file does not list
    maskless: _Odd = field(default_factory=_Odd)

    def tell(self, source: str, rows: int, cut: Cut) -> None:
        """Warn of each kind (UserError if no row has a category that is listed)."""
        if odd := self.unlisted.count:
            first = (
                f"row {self.unlisted.first} names category {self.unlisted.id}, which the annotation file does not have"
            )
            if odd == rows:
                raise UserError(f"{source}: {first}; score against the split that the results were made on")
            left = (
                "they are left out" if cut.per_class else "they take their places among the best of an image, no more"
            )
            logger.warning("%s: %d of %d rows have an unknown category (%s); %s.", source, odd, rows, first, left)
        if odd := self.maskless.count:
            logger.warning(
                "%s: %d of %d rows have no mask (first: row %d); they find nothing in segm.",
                source, odd, rows, self.maskless.first,
            )  # fmt: skip


def read_results(
    detections: Path | list[Row], source: str, known: Known, need: Sequence[str], cut: Cut
) -> ResultColumns:
    """Check the rows of a results file against an annotation file and turn those that may count into columns.

    `ResultColumns.ranked` has those that do. As in lvis-api, a row of a category that the annotation file does not list
    takes its place among the best of its image and finds nothing; such rows are counted in a warning, and so are rows
    whose segmentation is no mask.

    Args:
        detections: the file (``.json`` or ``.json.gz``), or its rows.
        source: the file's name, for messages.
        known: ids and sizes of the annotation file.
        need: which of "bbox" and "segm" every row must have. Boxes are read whenever the first row has one.
        cut: which rows count.

    Raises:
        UserError: the file is missing or damaged; or names the first row (counted from 0) that is at fault; or no row
            is of a category that is listed.
    """
    settled: list[ResultColumns] = []
    waiting, done = 0, 0
    with_boxes, with_box_scores = "bbox" in need, False
    odd = _Oddities()
    with _no_garbage_collection():
        for rows in _row_lists(detections, source):
            if done == 0 and rows and isinstance(rows[0], dict):
                with_boxes |= "bbox" in rows[0]
                with_box_scores = "box_score" in rows[0]
            table = Rows(rows=rows, source=source, first=done)
            columns = _columns(table, known, with_boxes, with_box_scores, "segm" in need, odd)
            settled.append(columns[columns.categories >= 0] if cut.per_class else columns)
            done += len(rows)
            waiting += len(rows)
            if waiting > max(_SETTLE, len(settled[0])):
                settled, waiting = [_best(settled, cut)], 0
        found = _best(settled, cut)
    odd.tell(source, done, cut)
    found = replace(found, categories=found.categories.clip(0))  # of those that are not judged none is looked at
    return found[found.judged] if found.box_scores is None else found


def kinds_in(detections: Path, source: str) -> frozenset[str]:
    """Which of "bbox" and "segm" the first row of a results file has; both if there is no row.

    Raises:
        UserError: the file is missing or damaged at its beginning.
    """
    rows = next(_row_lists(detections, source))
    if not rows or not isinstance(rows[0], dict):
        return frozenset(("bbox", "segm"))  # what is no row is told where rows are read
    return frozenset(kind for kind, key in (("bbox", "bbox"), ("segm", "segmentation")) if key in rows[0])


def _best(parts: list[ResultColumns], cut: Cut) -> ResultColumns:
    """The rows among the best of either ranking."""
    joined = ResultColumns.join(parts)
    best = cut.best(joined)
    if joined.box_scores is not None:
        best = np.union1d(best, cut.best(replace(joined, scores=joined.box_scores)))
    return joined[best]


def _row_lists(detections: Path | list[Row], source: str) -> Iterator[list[Row]]:
    """The rows of a file in lists of some megabytes' worth; at least one list, which may be empty."""
    if not isinstance(detections, Path):
        if not isinstance(detections, list):
            raise UserError(f"{source}: expected a list of results rows, found {kind_of(detections)}")
        yield detections
        return
    text, before, lines = b"", 0, 0  # not yet parsed; bytes and line ends parsed before it
    with _reading(detections) as file:
        while block := file.read(_CHUNK):
            text += block if before or text else block.removeprefix(b"\xef\xbb\xbf")  # the mark of some editors
            if before == 0 and (other := _other_format(text)):
                raise UserError(f"{source}: {other}")
            seam = _last_seam(text)
            if seam is None:
                continue
            end = seam.start() + 1
            try:
                rows = _parse_rows(text[:end] + b"]", source, before, lines)
            except UserError:
                if not _closed(text[:end]):
                    continue  # the seam is within a row: more must be read at once
                raise
            yield rows
            begin = seam.end() - 1
            before, lines = before + begin - 1, lines + text.count(b"\n", 0, begin)
            text = b"[" + text[begin:]
        yield _parse_rows(text, source, before, lines)


def _other_format(text: bytes) -> str:
    """What a file that begins like this is instead of a list of rows, and what to do; "" if it may be one."""
    if text[:1] == b"\x80":
        return "a Python pickle, expected JSON; have mmdetection write that, with `outfile_prefix` of its evaluator"
    if text[:2] in (b"\xff\xfe", b"\xfe\xff", b"[\0", b"\0["):
        return "text in UTF-16, expected UTF-8; save it as UTF-8"
    if _JSON_LINES.match(text):
        return "a row on each line (JSON lines), expected a list; put commas between the lines and [ ] around them"
    if text.lstrip()[:1] == b"{":
        return 'expected a list of results rows, found an object; give the list in it, often under "annotations"'
    return ""


def _last_seam(text: bytes) -> re.Match[bytes] | None:
    """Find the end of the last row that is followed by another. Within a row's lists or strings it may be wrong."""
    seam = None
    for seam in _SEAM.finditer(text, max(0, len(text) - _WINDOW)):  # noqa: B007
        pass
    return seam


def _closed(text: bytes) -> bool:
    """Return whether every brace and every string is closed; braces within strings do not count."""
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    return plain.count(b"{") == plain.count(b"}") and plain.count(b'"') % 2 == 0


def _parse_rows(text: bytes, source: str, before: int, lines: int) -> list[Row]:
    if not before and not text.strip():
        raise UserError(f"{source}: the file is empty; write or download it again")
    try:
        rows = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _not_json(source, text, error, before, lines) from error
    if not isinstance(rows, list):
        raise UserError(f"{source}: expected a list of results rows, found {kind_of(rows)}")
    return rows


def _not_json(source: str, text: bytes, error: orjson.JSONDecodeError, before: int = 0, lines: int = 0) -> UserError:
    line = lines + text.count(b"\n", 0, error.pos) + 1
    where = f"not valid JSON at line {line}, byte {before + error.pos}"
    if word := NOT_A_NUMBER.match(text, error.pos):
        return UserError(f"{source}: {where}: {word[0].decode()} is no JSON number; fix what wrote it")
    return UserError(f"{source}: {where} ({error.msg}); write or download it again")


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    """The file opened, unpacked if it is packed; what goes wrong while it is read is told in one sentence."""
    try:
        with open_unpacked(path) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); write or download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """None of the new objects is garbage, and searching millions takes longer than reading them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _columns(
    rows: Rows, known: Known, with_boxes: bool, with_box_scores: bool, with_masks: bool, odd: _Oddities
) -> ResultColumns:
    """Rows of a results file as columns; a category that is not listed has the position -1."""
    images, categories = rows.whole_numbers("image_id"), rows.whole_numbers("category_id")
    image, strange = positions(images, known.image_ids)
    if strange.any():
        index = int(strange.argmax())
        raise UserError(
            f"{rows.place(index)} names image {images[index]}, which the annotation file does not have;"
            " score against the split that the results were made on"
        )
    category, unlisted = positions(categories, known.category_ids)
    odd.unlisted.add(unlisted, rows.first, categories)
    scores = rows.numbers("score")
    box_scores = rows.numbers("box_score") if with_box_scores else None
    boxes = rows.boxes() if with_boxes else None
    judged = known.judged.has(image, category) & ~unlisted
    category[unlisted] = -1
    counts = areas = None
    if with_masks:
        counts, areas, maskless = rows.masks(known.image_sizes[image])
        odd.maskless.add(maskless, rows.first, images)
        counts[~judged] = None
    return ResultColumns(
        images=image,
        categories=category,
        scores=scores,
        box_scores=box_scores,
        judged=judged,
        boxes=boxes,
        counts=counts,
        mask_areas=areas,
    )


def positions(ids: NDArray[np.int64], known: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Position of each id among the known ones, in any order; and a flag for each id that is not among them."""
    places, found = positions_of(ids, known)
    return places, ~found
