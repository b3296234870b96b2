"""What a model is asked to look at, as pictures one after the other: files, folders, addresses, videos, arrays."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from io import IOBase, TextIOBase
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tailseg.data.annotations.image_files import MOST_ENTRIES, is_hidden
from tailseg.data.images import IMAGE_SUFFIXES, read_content, read_image, to_rgb
from tailseg.errors import UserError
from tailseg.predict.arrays import array_to_picture, tensor_to_picture
from tailseg.predict.download import download, is_url
from tailseg.predict.video import Video, is_video, open_video

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
TAKES = (
    "a path, folder, glob pattern, http(s) address, video file, Pillow image, array, tensor, bytes, "
    "or a list or iterator of these"
)


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One picture that has not been read yet."""

    name: str  # in messages and results
    read: Callable[[], Picture]  # UserError if it is missing or broken; ValueError for an array of another kind
    path: Path | None = None  # its file, if it is an image file
    video: Video | None = None  # that it is a frame of
    stem: str = "image"  # of files that are written about it


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Pictures, in their order."""

    kind: Literal["one", "list", "stream"]  # as which results come back
    items: Iterable[Item]
    count: int | None  # of the pictures; None where nobody knows
    paths: Sequence[Path] = ()  # files of images and videos, as far as they are known from the start
    left_out: Counter[str] = field(default_factory=Counter)  # files of a folder, by why they are no pictures

    def __post_init__(self) -> None:
        for reason, count in self.left_out.items():
            logger.info("%d %s left out.", count, reason)


def open_pictures(source: Any, *, bgr: bool = False, name: str = "image", results: Path | None = None) -> Source:
    """Find out what something is that holds pictures; nothing is decoded yet.

    Args:
        source: see `Model.predict`.
        bgr: arrays and tensors are BGR(A), as OpenCV's are; files are not.
        name: of a picture that has none of its own.
        results: a folder to leave out where it lies inside of a source.

    Raises:
        UserError: a folder without images, a pattern that fits nothing, a video that cannot be decoded.
        TypeError: it is nothing of the kind.
    """
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), results)
    read = _reader(source, name, bgr)
    if read is not None:
        return Source("one", [Item(name, read)], 1)
    if isinstance(source, list | tuple):
        parts = [open_pictures(part, bgr=bgr, name=f"{name} {i}") for i, part in enumerate(source)]
        return Source("list", (item for part in parts for item in part.items), total_count(parts))
    if isinstance(source, Iterable) and not isinstance(source, Mapping | Set | TextIOBase):
        return Source("stream", _items_of(source, bgr, name), None)
    raise TypeError(f"predict takes {TAKES}; received {type(source).__name__}")


def open_or_faulty(source: str | Path, results: Path | None = None) -> Source:
    """`open_pictures` of a path that becomes one faulty picture where it raises a UserError."""
    try:
        return open_pictures(source, results=results)
    except UserError as error:
        return Source("one", [faulty(str(source), error)], 1)


def total_count(parts: Sequence[Source]) -> int | None:
    """Pictures in all of the parts; None where nobody knows."""
    counts = [part.count for part in parts if part.count is not None]
    return sum(counts) if len(counts) == len(parts) else None


def _items_of(source: Iterable[Any], bgr: bool, name: str) -> Iterator[Item]:
    for i, part in enumerate(source):
        try:
            yield from open_pictures(part, bgr=bgr, name=f"{name} {i}").items
        except UserError as error:
            yield faulty(str(part), error)


def faulty(name: str, error: UserError) -> Item:
    """A picture that cannot be read, for what could not even be opened."""

    def read() -> Picture:
        raise error

    return Item(name, read)


def _reader(source: Any, name: str, bgr: bool) -> Callable[[], Picture] | None:
    """A function that makes a picture of an object in memory; None if it is no picture."""
    if isinstance(source, Image.Image):
        return lambda: to_rgb(source, name, upright=True)  # as if read from its file
    if isinstance(source, np.ndarray):
        return lambda: array_to_picture(source, bgr=bgr)
    if isinstance(source, Tensor):
        return lambda: tensor_to_picture(source, bgr=bgr)
    if isinstance(source, bytes | bytearray | memoryview):
        return lambda: read_content(bytes(source), name)
    if isinstance(source, IOBase) and not isinstance(source, TextIOBase):
        return lambda: read_content(source.read(), name)
    return None


def _open_path(text: str, results: Path | None) -> Source:
    if is_url(text):
        return Source("one", [Item(text, lambda: read_content(download(text), text), stem=_stem_of_url(text))], 1)
    path = Path(text)
    if path.is_dir():
        files, left_out = images_below(path, results)
        return Source("stream", [_file(file) for file in files], len(files), files, left_out)
    if is_video(path) and path.is_file():
        return _open_video(path)
    if glob.has_magic(text) and not path.exists():
        return _open_pattern(text)
    return Source("one", [_file(path)], 1, [path])


def _stem_of_url(url: str) -> str:
    """The name of a picture's file on its server, as any disk can take it."""
    stem = Path(unquote(urlsplit(url).path)).stem
    return re.sub(r"[^\w. -]", "_", stem)[:100].strip(". ") or "image"


def _file(path: Path) -> Item:
    place = path.absolute()  # the same file wherever the program goes before it is read
    return Item(str(path), partial(read_image, place, path), path=place, stem=path.stem)


def _open_video(path: Path) -> Source:
    video = open_video(path)
    return Source("stream", _frames(video), video.stated_frames or None, [path])


def _frames(video: Video) -> Iterator[Item]:
    for i, frame in enumerate(video.frames()):
        name, stem = f"{video.path} frame {i}", f"{video.path.stem}-{i:06d}"
        yield Item(name, partial(np.asarray, frame), video=video, stem=stem)


def _open_pattern(pattern: str) -> Source:
    left_out: Counter[str] = Counter()
    parts: list[Source] = []
    for found in sorted(glob.iglob(pattern, recursive=True)):
        path = Path(found)
        if path.is_dir():
            left_out["folders"] += 1
        elif is_video(path):
            parts.append(open_or_faulty(path))
        elif path.name.lower().endswith(IMAGE_SUFFIXES) and (path.is_file() or not path.exists()):
            parts.append(Source("one", [_file(path)], 1, [path]))
        else:
            left_out["files that are no images"] += 1
    if not parts:
        raise UserError(f"{pattern}: no image fits the pattern; check it, and put it in quotes in a shell")
    paths = [path for part in parts for path in part.paths]
    items = (item for part in parts for item in part.items)
    return Source("stream", items, total_count(parts), paths, left_out)


def images_below(folder: Path, results: Path | None = None) -> tuple[list[Path], Counter[str]]:
    """The images in a folder and the folders in it, sorted by path, and the number of what was left out by kind.

    Hidden files and folders are left out, videos and other files that are no images, links that lead out of the
    folder, and a folder in it that is for results: they would be the pictures of the next time.

    Raises:
        UserError: there is no image, there are too many files, or a folder cannot be listed.
    """
    images: list[Path] = []
    left_out: Counter[str] = Counter()
    top, waiting, seen = folder.resolve(), [folder], 0
    own = None if results is None else results.resolve()
    while waiting:
        place = waiting.pop()
        try:
            entries = list(os.scandir(place))
        except OSError as error:
            raise UserError(f"{place}: cannot be listed ({error.strerror}); check its rights") from None
        seen += len(entries)
        if seen > MOST_ENTRIES:
            raise UserError(f"{folder}: holds more than {MOST_ENTRIES:,} files; name a folder of images alone")
        for entry in entries:
            path = Path(entry.path)
            if is_hidden(entry.name):
                left_out["hidden files"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if own is not None and path.resolve() == own:
                    left_out["folder of results"] += 1
                else:
                    waiting.append(path)
            elif entry.is_symlink() and not _stays_inside(path, top):
                left_out["links that lead out of the folder"] += 1
            elif entry.is_dir():
                left_out["links to folders"] += 1  # which is come upon by itself, as it lies inside
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():  # a named pipe would block
                images.append(path)
            elif is_video(path):
                left_out["videos (name them one by one)"] += 1
            else:
                left_out["files that are no images"] += 1
    if not images:
        others = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it is empty"
        raise UserError(f"{folder}: there is no image in the folder ({others}); name a folder of JPEG or PNG files")
    return sorted(images), left_out


def _stays_inside(link: Path, top: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(top)
    except (OSError, RuntimeError):  # it leads nowhere, or to itself
        return False
