"""Paths of an annotation file's images on disk."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path

from tailseg.errors import UserError

_SUBFOLDERS = ("", "train2017", "val2017")  # LVIS's val split has files of both COCO splits
_V05_NAME = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d{12}\.jpg)$")


def candidate_names(file_name: str | None, coco_url: str | None) -> list[str]:
    """The names an image may have, in the order of preference.

    ``file_name`` (LVIS v0.5 puts ``COCO_train2014_`` before the last 16 characters, which name the file),
    then the last part and the last two parts of ``coco_url`` (LVIS v1).
    """
    names: list[str] = []
    if file_name:
        old = _V05_NAME.search(file_name)
        names += [file_name, old.group(1)] if old else [file_name]
    if coco_url:
        parts = coco_url.split("/")
        names += [parts[-1], "/".join(parts[-2:])]
    return names


class ImageFolder:
    """Finds images in a folder of images and its ``train2017`` and ``val2017``, listed once each.

    The three folders may be links. A file, or a deeper folder, that leads out of them is refused, so that
    somebody else's data set cannot name a private file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _listings(self) -> list[tuple[Path, dict[str, bool]]]:
        """Each folder that exists, and of its entries: name -> is it a link."""
        listings = []
        for folder in (self.folder / sub for sub in _SUBFOLDERS):
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    listings.append((folder, {entry.name: entry.is_symlink() for entry in entries}))
        return listings

    @cached_property
    def _roots(self) -> tuple[Path, ...]:
        return tuple(folder.resolve() for folder, _ in self._listings)

    def find(self, names: list[str], where: str) -> Path | None:
        """The first of ``names`` that exists, or None; ``where`` (file and image) opens the error sentence.

        Raises:
            UserError: a name climbs out of the folder.
        """
        for name in names:
            parts = re.split(r"[/\\]", name)
            if ".." in parts or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
                raise UserError(f"{where} leads out of the image folder ({name!r}); give a path inside of it")
            for folder, listing in self._listings:
                nested = len(parts) > 1
                if not nested and name not in listing:
                    continue
                path = folder / name
                if nested and not path.is_file():
                    continue
                if (nested or listing[name]) and not self._is_inside(path):
                    problem = f"{path} is a link that leads out of {self.folder}"
                    raise UserError(f"{where}: {problem}; put the file itself there")
                return path
        return None

    def _is_inside(self, path: Path) -> bool:
        target = path.resolve()
        return any(target.is_relative_to(root) for root in self._roots)
