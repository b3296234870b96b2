"""Which files of a folder are COCO annotation files, and of which split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tailseg.data.annotations.image_files import files_below
from tailseg.data.annotations.streaming import read_lists
from tailseg.data.importers.layouts import split_of, words_of
from tailseg.errors import UserError

MOST_FILES = 50  # JSON files of a folder that are looked into, the largest
_SUFFIXES = (".json", ".json.gz")
# Words in the names of COCO's files for other tasks, and of files that hold no annotations though their words tell a
# split: ``val_detections.json``.
_OTHER = {"caption", "captions", "keypoint", "keypoints", "panoptic", "stuff"}
_BESIDE_INSTANCES = {"info", "labels"}  # Datumaro's files of images and of their labels
_RAW = "raw"  # FiftyOne's folder for the files of all images, of which it has downloaded some
_NONE = {"config", "detections", "log", "metrics", "predictions", "preds", "result", "results", "scores"}
_YAML = "or write a YAML file with the entries train, val and images"


@dataclass(frozen=True, slots=True)
class CocoFiles:
    """The annotation file of each split that a source has, and notes on those that are left out."""

    by_split: dict[str, Path]
    notes: list[str] = field(default_factory=list)


def coco_files(source: Path) -> CocoFiles:
    """The annotation files of a source: a folder, or one of these files.

    Raises:
        UserError: there is none, or several that could be meant, or one that cannot be read.
    """
    if source.is_file():
        return CocoFiles({"train": source})
    if not source.exists():
        raise UserError(f"{source}: no such folder or file; check the path")
    found, broken = _looked_into(source)
    if not found:
        for _, error in broken:
            raise error
        raise UserError(f"{source}: there is no COCO annotation file (.json) in it; check the folder, or name the file")
    usual = _for_this_task(found, source)
    by_split: dict[str | None, list[Path]] = {}
    for path in usual:
        by_split.setdefault(_split_of_file(path, source), []).append(path)
    for path, error in broken:
        if _split_of_file(path, source) not in (*by_split, None, "test"):
            raise error  # else the other split would be taken for the whole set
    files = {"train": usual[0]} if len(usual) == 1 else _chosen(by_split, source)
    others = [path for path in found if path not in files.values()]
    kinds = {
        "other annotation files, left out": others,
        "files that cannot be read as JSON objects, left out": [path for path, _ in broken],
    }
    return CocoFiles(files, [f"{kind}: {_names(paths, source)}" for kind, paths in kinds.items() if paths])


def _chosen(by_split: dict[str | None, list[Path]], source: Path) -> dict[str, Path]:
    """The files for training and, if there is one, validation, of several."""
    files: dict[str, Path] = {}
    for split in ("train", "val"):
        paths = by_split.get(split, [])
        if plain := _plain(paths, source):
            files[split] = plain
        elif paths:
            told = f"{_names(paths[:2], source, ' and ')} both look like the {split} split"
            raise UserError(f"{source}: {told}; give one instead of the folder, {_YAML}")
    if "train" not in files and (unnamed := _plain(by_split.get(None, []), source)):
        files = {"train": unnamed, **files}  # as `default`, CVAT's subset that nobody named, or `trainval`
    if "train" not in files:
        names = _names([path for paths in by_split.values() for path in paths][:4], source)
        raise UserError(f"{source}: no file is called train, of {names}; give one instead of the folder, {_YAML}")
    return files


def _for_this_task(found: Sequence[Path], source: Path) -> list[Path]:
    """The files without those for other tasks, and of other images; where there are only such, all of them."""
    found = [path for path in found if _RAW not in path.relative_to(source).parts] or found
    words = {path: set(words_of(path.name)) for path in found}
    other = _OTHER | (_BESIDE_INSTANCES if any("instances" in own for own in words.values()) else set())
    return [path for path in found if not other & words[path]] or list(found)


def _plain(paths: Sequence[Path], source: Path) -> Path | None:
    """The file to whose words the names of all others add some: ``train.json``, not ``train_old.json``."""
    words = {path: set(words_of(str(path.relative_to(source)))) for path in paths}
    return next((path for path in paths if all(words[path] < words[other] for other in paths if other != path)), None)


def as_downloaded(source: Path) -> tuple[Path | None, Path, Path] | None:
    """Training file (if it is there), validation file and image folder of COCO or LVIS as one downloads them.

    They need no import: the images lie in `train2017` and `val2017` of one folder, where our own reader finds them;
    who only evaluates may have no `train2017`. None for anything else.
    """
    folders = [folder for folder in (source, source / "images") if (folder / "val2017").is_dir()]
    folders += [folder for folder in (source, source / "images") if (folder / "train2017").is_dir()]
    if not folders:
        return None
    files = coco_files(source).by_split
    if len(files) == 2:
        return files["train"], files["val"], folders[0]
    alone = files["train"]
    return (None, alone, folders[0]) if _split_of_file(alone, source) == "val" else None


def is_coco(path: Path) -> bool:
    """Return whether a JSON file has a list of images or of their annotations at its top; it is read up to there."""
    try:
        return _is_coco(path)
    except UserError:
        return False


def json_files(source: Path) -> list[Path]:
    """The JSON files in a folder, in order, each once also where a link leads to its folder; of many the largest."""
    folders: dict[Path, str] = {}
    files: dict[str, Path] = {}
    for path in files_below(source, _SUFFIXES):
        real = folders.get(path.parent) or folders.setdefault(path.parent, os.path.realpath(path.parent))
        if real == os.path.abspath(path.parent):
            files[os.path.join(real, path.name)] = path
        else:
            files.setdefault(os.path.join(real, path.name), path)
    return sorted(sorted(files.values(), key=lambda path: -path.stat().st_size)[:MOST_FILES])


def root_of(path: Path) -> Path:
    """The folder below which the images of a single file are searched for: its own, or that around `annotations`."""
    folder = path.parent
    return folder.parent if folder.name.lower() in ("annotations", "labels") else folder


def unreadable(source: Path) -> list[UserError]:
    """What is wrong with JSON files of a folder that cannot be read."""
    return [error for _, error in _looked_into(source)[1]]


def _looked_into(source: Path) -> tuple[list[Path], list[tuple[Path, UserError]]]:
    """The annotation files of a folder; and those that cannot be read, with their errors."""
    found, broken = [], []
    for path in json_files(source):
        try:
            if _is_coco(path):
                found.append(path)
        except UserError as error:
            if not _NONE & set(words_of(path.name)):
                broken.append((path, error))
    return found, broken


def _is_coco(path: Path) -> bool:
    for key, _, rows in read_lists(path, ("images", "annotations", "shapes", "items")):
        if key == "annotations" and isinstance(rows, list) and rows:  # SAM's lists of one image have no image_id
            return isinstance(rows[0], dict) and "image_id" in rows[0]
        if key != "annotations":
            return key == "images" and isinstance(rows, list)
    return False


def _split_of_file(path: Path, source: Path) -> str | None:
    """The split that a file's name tells, or the nearest folder that tells one."""
    names = reversed(path.relative_to(source).parts)
    return next((split for split in map(split_of, names) if split), None)


def _names(paths: Sequence[Path], source: Path, joined_by: str = ", ") -> str:
    return joined_by.join(str(path.relative_to(source)) for path in paths)
