"""The folder that an export fills: the one place that writes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from PIL import Image

from tailseg.data.annotations.image_files import parts_below
from tailseg.data.exporters.records import ExportImage
from tailseg.data.images import decode, read_header, to_rgb
from tailseg.data.importers.foreign import LeftOut, image_size
from tailseg.data.importers.writer import ImageFile, place_file

LONGEST_STEM = 230  # bytes; a name has at most 255
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"\\|?*]')  # in names that other systems read too


class ExportFolder:
    """A new folder, with unused names for images. As a context, it closes the files that it opened.

    Attributes:
        found: what was left out or changed.
        linked: images are links to the source's files, as far as they could be.
    """

    def __init__(self, root: Path, found: LeftOut) -> None:
        self.root = root
        self.found = found
        self.linked = True
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}  # the last one of each name, or to find the next would take ever longer
        self._opened = ExitStack()

    def __enter__(self) -> ExportFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def place(
        self,
        image: ExportImage,
        folder: str,
        *,
        rename: Callable[[str], str] = lambda name: name,
    ) -> str:
        """Put an image's file into a folder of the export.

        Args:
            image: the image.
            folder: path in the export; "" for the export itself.
            rename: turns a name into one that the format's readers can take.

        Returns:
            Its name below ``folder``: its own, where that is readable everywhere and unused up to its suffix, as label
            files have it and CVAT tells images apart.

        Raises:
            UserError: the image cannot be read, or has not the size of the record.
        """
        own = image.name
        content: ImageFile = image.path
        if read_header(image.path).shown_hw != image.image_hw:
            image_size(image.path, image.name, image.image_hw)  # raises the error, if it is no matter of turning
            own, content = str(PurePosixPath(image.name).with_suffix(".png")), partial(_as_stored, image.path)
            self.found.add("images annotated as their pixels are stored, not as shown: written so, as PNG", own)
        name = self._unused(folder, rename(_readable(own)))
        if name != own:
            self.found.add("images renamed, since their name was taken or cannot be read everywhere", name)
        self.linked = place_file(content, self._inside(folder) if folder else self.root, name, self.linked)
        return name

    def write(self, name: str, content: bytes) -> None:
        """Write a file; ``name`` is its path in the folder."""
        with self._new(name) as file:
            file.write(content)

    def open(self, name: str) -> BinaryIO:
        """A new file to write into until the folder is complete; ``name`` is its path in the folder."""
        return self._opened.enter_context(self._new(name))

    def _new(self, name: str) -> BinaryIO:
        target = self._inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")

    def _inside(self, name: str) -> Path:
        """The path of a name in the folder (ValueError if it leads out)."""
        parts = parts_below(self.root, name)
        if parts is None:
            raise ValueError(f"expected a path inside of {self.root}, received {name!r}")
        return self.root.joinpath(*parts)

    def _unused(self, folder: str, name: str) -> str:
        path = PurePosixPath(name)
        path = path.with_name(fitting_stem(path.stem) + path.suffix)
        first = name_key(f"{folder}/{path.with_suffix('')}")
        number, free = self._numbers.get(first, 1), path
        if number > 1:
            free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        while (key := name_key(f"{folder}/{free.with_suffix('')}")) in self._taken:
            number += 1
            free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        self._numbers[first] = number
        self._taken.add(key)
        return str(free)


def fitting_stem(stem: str) -> str:
    """The stem of a file's name, cut where a number and a suffix would make it longer than disks can take."""
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    return stem


def name_key(name: str) -> str:
    """Equal for names that some file systems take for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _readable(name: str) -> str:
    """A name without signs that other systems refuse and without hidden parts."""
    text = _UNSAFE.sub("_", name.encode("utf-8", "replace").decode())
    return "/".join(part.lstrip(".") or "_" for part in PurePosixPath(text).parts)


def _as_stored(path: Path) -> bytes:
    """An image as PNG, its pixels as they are stored, without the camera's orientation."""
    buffer = BytesIO()
    Image.fromarray(to_rgb(decode(path)[0], path, upright=False)).save(buffer, "PNG")
    return buffer.getvalue()
