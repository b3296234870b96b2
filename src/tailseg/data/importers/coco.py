"""COCO's instance files as tools write them, also LVIS's and Roboflow's, in any of the usual layouts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailseg.data.annotations.image_files import walk
from tailseg.data.annotations.oddities import counted
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.coco_content import CocoContent, kind_of
from tailseg.data.importers.coco_files import coco_files, root_of
from tailseg.data.importers.foreign import Source, id_of
from tailseg.data.importers.layouts import split_of
from tailseg.data.importers.writer import Part, Row
from tailseg.errors import UserError


def read_coco(
    source: Path, *, crowds_are_objects: bool = False, progress: Callable[[int], None] = lambda done: None
) -> Source:
    """A folder of COCO files and images in any of the usual layouts, or one file.

    Which file holds which split is told by words in its name or folder (`layouts.split_of`); a single file is one set.
    Images are searched for below the folder (`layouts.ImageFinder`).

    Args:
        source: the folder or file.
        crowds_are_objects: take ``iscrowd`` as 0 throughout.
        progress: called with the number of images looked at.

    Raises:
        UserError: nothing fits, or a file has errors that cannot be repaired.
    """
    files = coco_files(source)
    root = source if source.is_dir() else root_of(source)
    alone = len(files.by_split) == 1
    contents = {
        split: CocoContent(path, split, root, alone=alone, crowds_are_objects=crowds_are_objects)
        for split, path in files.by_split.items()
    }
    notes = files.notes
    if "val" in contents and not contents["val"].images:
        notes.append(f"{contents.pop('val').path.name} lists no images: left out")
    parents = _roots_only(contents)
    if parents:
        names = ", ".join(dict.fromkeys(repr(row["name"]) for row in parents))
        notes.append(f"{names}: left out, no object has this category and it is only the supercategory of others")
    for content in contents.values():
        content.settle(parents)
    categories, numbers, more = _categories(contents)
    parts, done = {}, 0
    for split, content in contents.items():
        parts[split] = content.part(numbers[split], lambda count, done=done: progress(done + count))  # type: ignore[misc]
        done += len(content.images)
    if "val" in parts:
        _separate(parts)
    several = len(contents) > 1
    odd = [note for c in contents.values() for note in c.all_notes(f" in {c.path.name}" if several else "")]
    unlisted = _unlisted(source, [path for c in contents.values() for path in c.files]) if source.is_dir() else []
    return Source(categories, parts, [*notes, *more, *odd, *unlisted])


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
    unique = all(content.names_are_unique for content in contents.values())
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


def _unlisted(source: Path, listed: Sequence[Path]) -> list[str]:
    """Notes on image files that are not ``listed``, those of a test split aside, and on links that are not followed."""
    known = set(map(str, listed))
    out: list[Path] = []
    files_there = walk(source, leave=out.append)
    paths = [entry.path for entry in files_there if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    if others := [path for path in paths if path not in known]:
        known = set(map(os.path.realpath, listed))
    files = [Path(path).relative_to(source) for path in sorted(others) if os.path.realpath(path) not in known]
    found = [str(path) for path in files if "test" not in map(split_of, path.parts[:-1])]
    notes = [counted(len(found), "images that these annotations do not list: left out", found)] if found else []
    links = [str(path.relative_to(source)) for path in sorted(out)]
    return (
        [*notes, counted(len(links), "links to folders outside of the source: not followed", links)] if links else notes
    )


def _roots_only(contents: Mapping[str, CocoContent]) -> list[Row]:
    """Categories without an object in any file that are the supercategory of another: Roboflow's name of the project.

    The project may have the name of a class.
    """
    roots: list[Row] = []
    used: set[tuple[str, str]] = set()
    for content in contents.values():
        with_object = {id_of(row.get("category_id")) for row in content.annotations}
        below: dict[str, set[Any]] = {}
        for row in content.categories:
            below.setdefault(kind_of(row)[1], set()).add(row["id"])
        used |= {kind_of(row) for row in content.categories if row["id"] in with_object}
        roots += [row for row in content.categories if below.get(row["name"], set()) - {row["id"]}]
    return [row for row in roots if kind_of(row) not in used]


def _separate(parts: dict[str, Part]) -> None:
    """Keep apart images of the two splits that have the same name but are not the same file."""
    train = dict(zip((row["file_name"] for row in parts["train"].images), parts["train"].files, strict=True))
    pairs = zip(parts["val"].images, parts["val"].files, strict=True)
    if any(train.get(row["file_name"], path) != path for row, path in pairs):
        for split, part in parts.items():
            part.images = [{**row, "file_name": f"{split}/{row['file_name']}"} for row in part.images]
