"""Sets of other tools opened where they lie: their annotations go into the cache, their images stay.

The cache is found by the source's content: the bytes of its annotation files, and names, sizes and times of its
images. A changed source is imported again, and so is one whose files in the cache have changed. An import unused for
a month goes when another is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from tailseg.data.annotations.cache import KEPT_DAYS, cache_folder
from tailseg.data.annotations.image_files import walk
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.coco_files import root_of
from tailseg.data.importers.convert import read_source
from tailseg.data.importers.foreign import LeftOut
from tailseg.data.importers.supervisely import meta_above
from tailseg.data.importers.writer import Part, place_parts, require_text, write_annotations
from tailseg.data.importers.yolo_layout import find_layout
from tailseg.errors import UserError
from tailseg.files import new_folder
from tailseg.wording import controls_escaped

VERSION = 5  # raise it when an import writes anything else
_ABOUT = "import.json"
_ANNOTATIONS = (
    ".json",
    ".gz",
    ".txt",
    ".xml",
    ".yaml",
    ".yml",
    ".names",
    ".labels",
    ".data",
)  # suffixes of annotation files


@dataclass(frozen=True, slots=True)
class Imported:
    """A set of another tool as LVIS files."""

    train: Path
    val: Path
    images: Path  # folder that the file names start from
    line: str  # what was recognised, and how much of it
    notes: list[str]  # on what was left out or made good


def import_in_place(kind: str, source: Path, *, progress: Callable[[int], None] = lambda done: None) -> Imported:
    """Import a set into the cache, unless it is there.

    Args:
        kind: of `convert.READERS`.
        source: folder or file.
        progress: called with the number of images read.

    Raises:
        UserError: the source is broken or not of this kind, or the cache cannot be written.
    """
    imports = cache_folder() / "imports"
    folder = imports / _key(kind, source)
    about = _sound(folder)
    if about is None:
        shutil.rmtree(folder, ignore_errors=True)
        found = read_source(kind, source, progress=progress)
        files = [path for part in found.parts.values() for path in part.files]
        paths = [path.resolve() for path in files if isinstance(path, Path)]
        stay = len(paths) == len(files)  # no image stands inside of an annotation file
        root = Path(os.path.commonpath([path.parent for path in paths])) if stay else folder / "images"
        require_text(root)
        counts = {split: (len(part.images), len(part.annotations)) for split, part in found.parts.items()}
        (images, objects), (val_images, val_objects) = counts["train"], counts["val"]
        about = {
            "images": str(root),
            "line": f"{images:,} training images with {objects:,} objects, {val_images:,} validation images with "
            f"{val_objects:,}",
            "notes": list(map(controls_escaped, found.notes)),
        }
        _remove_unused(imports)
        try:
            with new_folder(folder) as content:
                if not stay:
                    place_parts(content / "images", found.parts)
                for part in found.parts.values() if stay else ():
                    _name_from(root, part)
                write_annotations(content, found.categories, found.parts)
                written = sorted(path for path in content.rglob("*") if path.is_file())
                about["sums"] = {str(path.relative_to(content)): _sum(path) for path in written}
                row = orjson.dumps(about)
                (content / _ABOUT).write_bytes(_digest(row).encode() + row)
        except UserError as error:
            if _sound(folder) is None:  # else another process was faster
                raise UserError(f"{error}; TAILSEG_CACHE names the cache, `tailseg data convert` needs none") from None
    with contextlib.suppress(OSError):
        os.utime(folder)  # it is in use
    return Imported(folder / "train.json", folder / "val.json", Path(about["images"]), about["line"], about["notes"])


def _sound(folder: Path) -> dict[str, Any] | None:
    """The record about an import, if it is there and its files are what was written."""
    try:
        content = (folder / _ABOUT).read_bytes()
        length = len(_digest(b""))
        if content[:length] != _digest(content[length:]).encode():
            return None
        about: dict[str, Any] = orjson.loads(content[length:])
        return about if all(_sum(folder / name) == known for name, known in about["sums"].items()) else None
    except OSError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _name_from(root: Path, part: Part) -> None:
    for row, path in zip(part.images, part.files, strict=True):
        assert isinstance(path, Path)
        row["file_name"] = str(PurePosixPath(*path.resolve().relative_to(root).parts))


def _key(kind: str, source: Path) -> str:
    """A name for the content of a source."""
    digest = hashlib.blake2b(repr((VERSION, kind, str(source.resolve()))).encode(), digest_size=16)
    files = {path: status for root in _roots(kind, source) for path, status in _files(root)}
    if kind == "supervisely" and (meta := meta_above(source)):
        files[meta] = meta.stat()
    for path, status in sorted(files.items()):
        digest.update(f"{path}\0{status.st_size}\0".encode("utf-8", "surrogateescape"))
        if path.name.lower().endswith(_ANNOTATIONS) or path == source:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        else:
            digest.update(str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def _roots(kind: str, source: Path) -> list[Path]:
    """The folders that a set lies in."""
    if kind == "yolo":
        return [source if source.is_dir() else source.parent, *find_layout(source, LeftOut()).roots]
    if kind == "coco" and source.is_file():
        return [root_of(source)]
    return [source if source.is_dir() else source.parent]


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a set that are annotations or images."""
    suffixes = (*_ANNOTATIONS, *IMAGE_SUFFIXES)
    for entry in walk(root):
        if entry.name.lower().endswith(suffixes):
            yield Path(entry.path), entry.stat()


def _remove_unused(imports: Path) -> None:
    """Delete imports, and pieces left by processes that were killed, which nobody opened for a month."""
    for path in imports.iterdir() if imports.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - KEPT_DAYS * 24 * 3600:
                shutil.rmtree(path)
