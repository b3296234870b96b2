"""COCO's instance files as tools write them, also LVIS's and Roboflow's, in any of the usual layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailseg.data.annotations.image_files import files_below
from tailseg.data.annotations.streaming import read_lists
from tailseg.data.importers.coco_content import CocoContent
from tailseg.data.importers.foreign import Source
from tailseg.data.importers.layouts import split_of, words_of
from tailseg.data.importers.writer import Part, Row
from tailseg.errors import UserError

MOST_FILES = 50  # JSON files of a folder that are looked into, the largest
_OTHER = {"caption", "captions", "keypoint", "keypoints", "panoptic", "stuff"}  # COCO's files for other tasks


def read_coco(source: Path, *, crowds_are_objects: bool = False) -> Source:
    """A folder of COCO files and images in any of the usual layouts, or one file.

    Which file holds which split is told by words in its name or folder (`layouts.split_of`); a single file is one set.
    Images are searched for below the folder (`layouts.ImageFinder`).

    Args:
        source: the folder or file.
        crowds_are_objects: take ``iscrowd`` as 0 throughout.

    Raises:
        UserError: nothing fits, or a file has errors that cannot be repaired.
    """
    files, notes = coco_files(source)
    root = source if source.is_dir() else root_of(source)
    contents = {split: CocoContent(path, split, root, crowds_are_objects) for split, path in files.items()}
    categories, numbers, more = _categories(contents)
    parts = {split: content.part(numbers[split]) for split, content in contents.items()}
    used = {row["category_id"] for part in parts.values() for row in part.annotations}
    parents = _roots_only(categories, used)
    if parents:
        names = ", ".join(repr(row["name"]) for row in parents)
        more.append(f"{names}: left out, no object has this category and it is only the supercategory of others")
        categories = [row for row in categories if row not in parents]
    if "val" in parts:
        _separate(parts)
    several = len(contents) > 1
    odd = [note for c in contents.values() for note in c.all_notes(f" in {c.path.name}" if several else "")]
    return Source(categories, parts, [*notes, *more, *odd])


def coco_files(source: Path) -> tuple[dict[str, Path], list[str]]:
    """The annotation file of each split, and notes on those that are left out.

    Raises:
        UserError: there is none, or several that could be meant.
    """
    if source.is_file():
        return {"train": source}, []
    found = [path for path in json_files(source) if is_coco(path)]
    if not found:
        raise UserError(f"{source}: there is no COCO annotation file (.json) in it; check the folder, or name the file")
    usual = [path for path in found if not _OTHER & set(words_of(path.name))] or found
    if len(usual) == 1:
        return {"train": usual[0]}, _left_out(source, found, usual)
    by_split: dict[str | None, list[Path]] = {}
    for path in usual:
        by_split.setdefault(_split_of_file(path, source), []).append(path)
    if "train" not in by_split and "val" in by_split and len(by_split.get(None, ())) == 1:
        by_split["train"] = by_split.pop(None)  # CVAT calls the subset that nobody named `default`
    for split in ("train", "val"):
        if len(by_split.get(split, ())) > 1:
            names = " and ".join(str(path.relative_to(source)) for path in by_split[split][:2])
            raise UserError(f"{source}: {names} both look like the {split} split; give one file instead of the folder")
    if "train" not in by_split:
        names = ", ".join(str(path.relative_to(source)) for path in usual[:4])
        raise UserError(f"{source}: none of {names} has 'train' in its name; give the file instead of the folder")
    files: dict[str, Path] = {split: by_split[split][0] for split in ("train", "val") if split in by_split}
    return files, _left_out(source, found, list(files.values()))


def as_downloaded(source: Path) -> tuple[Path, Path, Path] | None:
    """Training file, validation file and image folder of COCO or LVIS as one downloads them; None for anything else.

    They need no import: the images lie in `train2017` and `val2017` of one folder, where our own reader finds them.
    """
    folders = [folder for folder in (source, source / "images") if (folder / "train2017").is_dir()]
    if not folders:
        return None
    files, _ = coco_files(source)
    return (files["train"], files["val"], folders[0]) if "val" in files else None


def is_coco(path: Path) -> bool:
    """Return whether a JSON file has a list of images or annotations at its top; it is read up to there."""
    try:
        for key, _, rows in read_lists(path, ("images", "annotations", "shapes", "items")):
            return key in ("images", "annotations") and isinstance(rows, list)
    except UserError:
        return False
    return False


def json_files(source: Path) -> list[Path]:
    """The JSON files in a folder, in order; of many the largest."""
    paths = sorted(files_below(source, (".json",)), key=lambda path: -path.stat().st_size)[:MOST_FILES]
    return sorted(paths)


def _split_of_file(path: Path, source: Path) -> str | None:
    """The split that a file's name tells, or the nearest folder that tells one."""
    names = [path.stem, *reversed(path.relative_to(source).parent.parts)]
    return next((split for split in map(split_of, names) if split), None)


def _left_out(source: Path, found: Sequence[Path], used: Sequence[Path]) -> list[str]:
    others = [str(path.relative_to(source)) for path in found if path not in used]
    return [f"other annotation files, left out: {', '.join(others)}"] if others else []


def root_of(path: Path) -> Path:
    """The folder below which the images of a single file are searched for: its own, or that around `annotations`."""
    folder = path.parent
    return folder.parent if folder.name.lower() in ("annotations", "labels") else folder


def _categories(contents: Mapping[str, CocoContent]) -> tuple[list[Row], dict[str, dict[Any, int]], list[str]]:
    """The categories of all files together; the new id of each file's ids; and notes.

    Ids stay where the files agree on them; else categories are the same where their names are.
    """
    rows = [(split, row) for split, content in contents.items() for row in content.categories]
    notes = []
    sizes = {split: len(content.categories) for split, content in contents.items()}
    by_id: dict[Any, str] = {}
    agree = all(by_id.setdefault(row["id"], row["name"]) == row["name"] for _, row in rows)
    by_name: dict[str, set[Any]] = {}
    for _, row in rows:
        by_name.setdefault(row["name"], set()).add(row["id"])
    unique = all(len({row["name"] for row in c.categories}) == len(c.categories) for c in contents.values())
    if unique and any(len(ids) > 1 for ids in by_name.values()):
        agree = False
    plain = all(type(row["id"]) is int and -(2**63) <= row["id"] < 2**63 for _, row in rows)
    if agree and plain:
        union = {row["id"]: row for _, row in reversed(rows)}
        categories = [union[number] for number in sorted(union)]
        numbers = {split: {row["id"]: row["id"] for row in content.categories} for split, content in contents.items()}
    else:
        if not unique:
            paths = " and ".join(str(content.path) for content in contents.values())
            raise UserError(f"{paths}: ids and names of the categories do not agree; give each category its own name")
        new = {name: number for number, name in enumerate(by_name, 1)}
        first = {row["name"]: row for _, row in reversed(rows)}
        categories = [{**first[name], "id": number} for name, number in new.items()]
        numbers = {
            split: {row["id"]: new[row["name"]] for row in content.categories} for split, content in contents.items()
        }
        notes.append("the files do not agree on the ids of categories, or these are no whole numbers: matched by name")
    for split, size in sizes.items():
        if size < len(categories):
            notes.append(
                f"{contents[split].path.name} lists {size} of {len(categories)} categories: it gets all of them"
            )
    return categories, numbers, notes


def _roots_only(categories: Sequence[Row], used: set[int]) -> list[Row]:
    """Categories without an object that are the supercategory of another: Roboflow writes the project's name so."""
    above = [(row.get("supercategory"), row["id"]) for row in categories]
    return [
        row
        for row in categories
        if row["id"] not in used and any(name == row["name"] and number != row["id"] for name, number in above)
    ]


def _separate(parts: dict[str, Part]) -> None:
    """Keep apart images of the two splits that have the same name but are not the same file."""
    train = dict(zip((row["file_name"] for row in parts["train"].images), parts["train"].files, strict=True))
    pairs = zip(parts["val"].images, parts["val"].files, strict=True)
    if any(train.get(row["file_name"], path) != path for row, path in pairs):
        for split, part in parts.items():
            part.images = [{**row, "file_name": f"{split}/{row['file_name']}"} for row in part.images]
