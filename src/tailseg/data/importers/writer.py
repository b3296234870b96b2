"""A new data folder: `train.json`, `val.json` and `images/`, complete or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from tailseg.data.annotations.image_files import parts_below
from tailseg.errors import UserError
from tailseg.files import new_folder

Row = dict[str, Any]
ImageFile = Path | Callable[[], bytes]  # where an image lies now; or reads its bytes, if it lies in no file of its own
IMAGE_FOLDERS = ("images", "JPEGImages")  # names that say nothing about an image: left out of its new name
OF_TRAINING = ("frequency", "image_count", "instance_count")  # entries of a category that count training images


@dataclass(slots=True)
class Part:
    """The images and annotations of one split, as LVIS rows."""

    images: list[Row] = field(default_factory=list)  # with id, file_name (its name in the new folder), height, width
    files: list[ImageFile] = field(default_factory=list)  # of each image
    annotations: list[Row] = field(default_factory=list)


def write_parts(
    out: Path,
    categories: Sequence[Row],
    parts: dict[str, Part],
    progress: Callable[[int], None] = lambda done: None,
) -> bool:
    """Write the splits to ``out``; returns whether the images are links to the source's bytes.

    Hard links: a symbolic link that leads out of the image folder is refused when the data is read. Where the file
    system has none, images are copied. Categories are written without frequency and counts, also where the source has
    them: those of another set of images would be read as if they were of this training split.
    """
    with new_folder(out) as folder:
        linked = place_parts(folder / "images", parts, progress)
        write_annotations(folder, categories, parts)
    return linked


def place_parts(folder: Path, parts: dict[str, Part], progress: Callable[[int], None] = lambda done: None) -> bool:
    """Put the images of all splits below ``folder``, by hard links where it can be; returns whether they are links."""
    linked, done = True, 0
    for part in parts.values():
        for row, path in zip(part.images, part.files, strict=True):
            linked = place_file(path, folder, row["file_name"], linked)
            done += 1
            progress(done)
    return linked


def write_annotations(folder: Path, categories: Sequence[Row], parts: dict[str, Part]) -> None:
    """Write ``train.json`` and ``val.json``."""
    rows = [{key: value for key, value in row.items() if key not in OF_TRAINING} for row in categories]
    for split, part in parts.items():
        content = {"images": part.images, "annotations": part.annotations, "categories": rows}
        (folder / f"{split}.json").write_bytes(orjson.dumps(content))


def place_file(file: ImageFile, folder: Path, name: str, link: bool) -> bool:
    """Put an image below ``folder``: the one place that writes images.

    Args:
        file: the image.
        folder: that nothing may leave.
        name: the new file's path in it, parts joined by slashes.
        link: make a hard link, if the file system allows.

    Returns:
        Whether files can be linked there.

    Raises:
        UserError: the name leads out of the folder.
    """
    parts = parts_below(folder, name)
    if parts is None:
        raise UserError(f"an image would be written to {folder / name}, outside of {folder}; correct its name")
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # the same picture in both splits
        return link
    if not isinstance(file, Path):
        target.write_bytes(file())
        return link
    source = file.resolve()
    if link:
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return True
    shutil.copyfile(source, target)
    return False


def new_names(files: Sequence[Path], root: Path) -> list[str]:
    """A name below `images/` for each file below ``root``: its path without folders that are just called images.

    Raises:
        UserError: a path is no UTF-8 text.
    """
    for path in files:
        require_text(path)
    paths = [PurePosixPath(*path.relative_to(root).parts) for path in files]
    short = ["/".join(p for p in path.parts if p not in IMAGE_FOLDERS) for path in paths]
    unique = len(set(short)) == len(set(paths))
    return short if unique else [str(path) for path in paths]


def require_text(path: Path) -> None:
    """Raise UserError for a path that JSON cannot hold: one that was written in another encoding than UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UserError(f"{shown}: the name is no UTF-8 text; rename the file or folder") from None


def require_inside(path: Path, root: Path, where: str) -> Path:
    """``path`` itself, or a UserError that begins with ``where`` if it leads out of ``root``."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: {path} leads out of {root}; put the file itself there")
    return path
