"""What the command `tailseg predict` writes: pictures, videos and JSON, or a set that a labelling tool can open."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import orjson
from PIL import Image

from tailseg.data.exporters.export import Exported, export
from tailseg.data.exporters.folder import fitting_stem, name_key
from tailseg.data.exporters.records import ExportImage, ExportSet
from tailseg.data.images import page_count
from tailseg.errors import UserError
from tailseg.files import write_whole
from tailseg.model.detector import Wanted
from tailseg.predict.model import Look, Model, Picture
from tailseg.predict.sources import Item, Source, open_or_faulty, total_count
from tailseg.predict.thresholds import class_scores
from tailseg.predict.video import VideoFile
from tailseg.progress import progress_bar
from tailseg.results.detections import Detections
from tailseg.results.pictures import image_bytes
from tailseg.results.rows import export_objects
from tailseg.threads import read_ahead, usable_cores
from tailseg.wording import printable

_NAMED = 5  # faults that the last sentence names
_THREADS = 4  # that draw; up to two results of each wait in memory


@dataclass(frozen=True, slots=True)
class Request:
    """Pictures to predict on, and how."""

    sources: Sequence[str | Path]  # paths, folders, patterns, addresses
    min_score: float = 0.5  # objects below it are neither drawn nor written
    thresholds: Path | None = None  # instead of it: JSON file of the lowest score of each class
    limit: int | None = None  # most pictures
    slices: int | None = None  # see `Model.predict`
    overlap: float = 0.2
    show: bool = True  # draw a progress bar


@dataclass(slots=True)
class Tally:
    """Counts of a prediction."""

    pictures: int = 0
    objects: int = 0
    empty: int = 0  # pictures without an object
    best: float = 0.0  # the best score in these
    floor: float = 0.0  # lowest score that was looked for
    thresholds: Path | None = None  # file of the lowest scores by class
    more_pages: int = 0  # of files with several, of which the first is the picture
    faults: list[str] = field(default_factory=list)  # a sentence for each picture that could not be read

    def add(self, found: Detections, kept: Detections) -> None:
        """Count a picture: what was found in it, and the part that scores enough."""
        self.pictures += 1
        self.objects += len(kept)
        if not len(kept):
            self.empty += 1
            self.best = max(self.best, float(found.scores.max()) if len(found) else 0.0)

    def sentence(self) -> str:
        """The counts, with the score to try where there is no object in most of the pictures."""
        counts = f"{_several(self.pictures, 'picture')}, {_several(self.objects, 'object')}, {self.empty} empty"
        if self.more_pages:
            counts += f", {_several(self.more_pages, 'more page')} of files not looked at"
        if self.faults:
            counts += f", {len(self.faults)} not readable"
        if 2 * self.empty <= self.pictures:
            return counts
        if self.thresholds is not None:
            return f"{counts}: nothing there reaches its class's score in {self.thresholds}"
        if self.best == 0:
            return f"{counts}: nothing there reaches a score of {self.floor:g}, the lowest looked for"
        return f"{counts}: the best score there is {self.best:.2g}; try --score {_rounded_down(self.best):.1g}"

    def fault(self) -> UserError:
        """All faults as one; the first are named."""
        more = len(self.faults) - _NAMED
        return UserError("; ".join(self.faults[:_NAMED]) + (f"; and {more} more" if more > 0 else ""))


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _rounded_down(value: float) -> float:
    """A positive number with one digit that is not larger."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.floor(value / unit * (1 + 1e-6)) * unit


@dataclass(frozen=True, slots=True)
class _Opened:
    """The pictures of a request."""

    model: Model
    request: Request
    sources: list[Source]
    class_scores: tuple[float, ...] | None  # lowest of each label, if they differ

    @property
    def count(self) -> int | None:
        """Pictures, where it is known."""
        counts = [count for count in (total_count(self.sources), self.request.limit) if count is not None]
        return min(counts, default=None)

    def each(self, tally: Tally) -> Iterator[tuple[Item, Detections]]:
        """Every picture that can be read with the objects that score enough; all are counted."""
        request, test = self.request, self.model.recipe.test
        items = islice((item for source in self.sources for item in source.items), request.limit)
        tally.floor, tally.thresholds = min(request.min_score, test.score_threshold), request.thresholds
        wanted, min_score = Wanted(min_score=tally.floor), request.min_score
        if self.class_scores is not None:
            # Chosen before the limit of detections, so that what misses its class's score takes no place there.
            wanted, min_score = Wanted(min_score=min(self.class_scores), class_scores=self.class_scores), 0.0
        look = Look(wanted, self.model.recipe.data.batch, request.slices, request.overlap)
        with progress_bar("predicting", self.count, show=request.show) as advance:
            for done, outcome in enumerate(self.model.outcomes(items, look), start=1):
                if outcome.found is None or outcome.picture is None:
                    tally.faults.append(str(outcome.fault))
                else:
                    raw = outcome.found.raw
                    # With its pixels, or the file would be read again to draw on.
                    kept = Detections(
                        raw[raw.scores >= min_score],
                        self.model.categories,
                        outcome.picture,
                        outcome.item.name,
                    )
                    tally.add(outcome.found, kept)
                    tally.more_pages += 0 if outcome.item.path is None else page_count(outcome.item.path) - 1
                    yield outcome.item, kept
                advance(done)


def _open(model: Model, request: Request, out: Path) -> _Opened:
    least = None if request.thresholds is None else class_scores(request.thresholds, model.categories)
    return _Opened(model, request, [open_or_faulty(source, out) for source in request.sources], least)


def predict_files(model: Model, request: Request, out: Path, *, pictures: bool = True) -> Tally:
    """Write what is found into a folder, one picture after the other.

    That is ``STEM.png``, the picture with its objects, and ``STEM.json`` for an image; for a video ``STEM.mp4`` and
    ``STEM.jsonl``, a line a frame. A faulty picture does not stop the others.

    Args:
        model: finds the objects.
        request: the pictures.
        out: the folder.
        pictures: write pictures and videos, not only JSON.

    Raises:
        UserError: the folder cannot be made, or a file not be written.
    """
    opened, tally = _open(model, request, out), Tally()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: the folder cannot be made ({error.strerror}); choose another --out") from error
    inputs = {path.resolve() for source in opened.sources for path in source.paths}
    taken = {name_key(path.name) for path in out.iterdir() if path.resolve() in inputs}
    # Drawing and compressing a picture can take longer than a small model takes to look at it. Not so in slices, which
    # are for pictures so large that few of them should wait in memory.
    threads = 0 if request.slices is not None else min(_THREADS, usable_cores())
    prepared = read_ahead(partial(_prepare, pictures=pictures), opened.each(tally), threads)
    with _Folder(out, taken, pictures=pictures) as folder, closing(prepared) as results:
        for result in results:
            folder.add(result)
    return tally


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is to be written of a picture or a frame."""

    item: Item
    rows: dict[str, Any]  # of the JSON
    drawn: bytes | Picture | None  # a PNG; of a frame its pixels


def _prepare(result: tuple[Item, Detections], *, pictures: bool) -> _Prepared:
    item, found = result
    drawn = found.plot() if pictures else None
    if drawn is None or item.video is not None:
        return _Prepared(item, found.to_dict(), drawn)
    return _Prepared(item, found.to_dict(), image_bytes(drawn, "PNG"))


class _Folder:
    """The folder that results go to. As a context, it closes the video that is being written."""

    def __init__(self, out: Path, taken: set[str], *, pictures: bool) -> None:
        self.out, self.taken, self.pictures = out, taken, pictures
        self._video: _VideoResult | None = None
        self._numbers: dict[tuple[str, tuple[str, ...]], int] = {}  # the last one of each stem and its suffixes

    def __enter__(self) -> _Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with nullcontext() if kind is None else suppress(UserError):  # of two faults the first is told
            self._close()

    def _close(self) -> None:
        if self._video is not None:
            video, self._video = self._video, None
            video.close()

    def add(self, result: _Prepared) -> None:
        """Write what was found in a picture, or in the next frame of a video."""
        item = result.item
        if item.video is None:
            self._close()
            contents = {".png": result.drawn} if isinstance(result.drawn, bytes) else {}
            contents[".json"] = orjson.dumps(result.rows, option=orjson.OPT_INDENT_2)
            stem = self._free(item.stem, tuple(contents))
            for suffix, content in contents.items():
                path = self.out / f"{stem}{suffix}"
                try:
                    write_whole(path, content)
                except OSError as error:
                    raise _unwritten(path, error) from error
            return
        if self._video is None or self._video.item.video is not item.video:
            self._close()
            self._video = self._begin_video(item)
        self._video.add(result)

    def _begin_video(self, item: Item) -> _VideoResult:
        assert item.video is not None
        stem = self._free(item.video.path.stem, (".mp4", ".jsonl") if self.pictures else (".jsonl",))
        files = ExitStack()
        try:
            lines = files.enter_context((self.out / f"{stem}.jsonl").open("wb"))
        except OSError as error:
            raise _unwritten(self.out / stem, error) from error
        video = None
        if self.pictures:
            video = files.enter_context(VideoFile(self.out / f"{stem}.mp4", item.video.fps))
        return _VideoResult(item, files, lines, video)

    def _free(self, stem: str, suffixes: tuple[str, ...]) -> str:
        """``stem``, numbered if files of that name were written before or are among the inputs; cut if too long."""
        stem = fitting_stem(stem)
        first = (name_key(stem), suffixes)
        number = self._numbers.get(first, 1)
        free = stem if number == 1 else f"{stem}-{number}"
        while any(name_key(f"{free}{suffix}") in self.taken for suffix in suffixes):
            number += 1
            free = f"{stem}-{number}"
        self._numbers[first] = number
        self.taken.update(name_key(f"{free}{suffix}") for suffix in suffixes)
        return free


@dataclass(slots=True)
class _VideoResult:
    """A video on its way to the disk."""

    item: Item  # the first frame
    files: ExitStack
    lines: BinaryIO
    video: VideoFile | None
    frames: int = 0

    def close(self) -> None:
        """Finish the files (UserError if one cannot be written)."""
        try:
            self.files.close()
        except OSError as error:
            raise _unwritten(Path(self.lines.name), error) from error

    def add(self, frame: _Prepared) -> None:
        assert self.item.video is not None
        fps = self.item.video.fps
        about = {"video": printable(str(self.item.video.path)), "frame": self.frames, "seconds": self.frames / fps}
        about |= {key: value for key, value in frame.rows.items() if key != "image"}
        try:
            self.lines.write(orjson.dumps(about, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            raise _unwritten(Path(self.lines.name), error) from error
        if self.video is not None and isinstance(frame.drawn, np.ndarray):
            self.video.add(frame.drawn)
        self.frames += 1


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: could not be written ({error.strerror}); make room or choose another --out")


def export_predictions(model: Model, request: Request, out: Path, kind: str) -> tuple[Exported, Tally]:
    """Write the pictures and their objects to a new folder in the format of a tool in which they can be corrected.

    Masks become polygons of few corners, see `editable`. Frames of videos and pictures from the web become PNG files. A
    faulty picture does not stop the others.

    Args:
        model: finds the objects.
        request: the pictures.
        out: the new folder.
        kind: the format: coco, yolo, labelme or cvat.

    Returns:
        Counts and notes of the export, and those of the prediction.

    Raises:
        UserError: the folder is not empty or cannot be made, or none of the pictures could be read.
    """
    opened, tally = _open(model, request, out), Tally()
    with tempfile.TemporaryDirectory(prefix="tailseg-") as scratch:

        def predicted() -> Iterator[ExportImage]:
            for item, found in opened.each(tally):
                path = item.path or Path(scratch) / f"{item.stem}.png"
                if item.path is None:
                    Image.fromarray(found.picture).save(path)
                yield ExportImage(path.name, path, found.image_hw, export_objects(found.raw, found.categories))
                if item.path is None:
                    path.unlink()
            if tally.faults and not tally.pictures:
                raise tally.fault()

        return export(kind, ExportSet("the model", model.categories, {"": predicted()}), out), tally
