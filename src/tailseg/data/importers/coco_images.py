"""The images of one COCO file: found, and looked at as far as their size and whether they can be read at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tailseg.data.annotations.image_files import candidate_names
from tailseg.data.annotations.oddities import Tally
from tailseg.data.annotations.repair import meant
from tailseg.data.annotations.segmentations import MAX_SIDE
from tailseg.data.images import ImageTooLargeError, read_header, require_whole
from tailseg.data.importers.foreign import id_of
from tailseg.data.importers.layouts import ImageFinder
from tailseg.data.importers.writer import Row
from tailseg.errors import UserError

# Kinds of images that cannot be used: as notes say it, as the error says it where most are so, and the fix.
_FAULTS = {
    "missing_image": (
        "images whose file is not there",
        "are not in {}",
        "put the images there, or name their folder in a YAML file with train, val and images",
    ),
    "one_of_several": (
        "images whose file may be any of several of that name",
        "may be any of several files in {}",
        "write their folders into the names",
    ),
    "image_without_name": ("images without a file_name", "have no file_name", "give each the name of its file"),
    "image_without_id": ("images without an id", "have no id", "number them"),
    "broken_image": ("images that cannot be read", "cannot be read", "copy or download them again"),
    "large_image": ("images that are too large", "are too large", "shrink them, or cut them into pieces"),
    "other_size": (
        "images of another size than stated",
        "have another size than stated",
        "correct height and width, or put the images there that were annotated",
    ),
}
MEANINGS = {
    **{kind: f"{meaning}: left out with their annotations" for kind, (meaning, _, _) in _FAULTS.items()},
    "size_read": "images without a sound height and width: taken from the file",
    "size_exchanged": "images whose height and width are exchanged: taken from the file",
    "image_again": "images that are listed more than once: taken as one",
}


@dataclass(frozen=True, slots=True)
class UsableImage:
    """An entry of the list of images, with its file."""

    row: Row
    path: Path
    image_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Looked:
    """What a look at an image's file tells."""

    kind: str = ""  # of `MEANINGS`
    place: str = ""  # more for a note than the name
    image_hw: tuple[int, int] = (0, 0)  # of the objects' coordinates


def usable_images(
    rows: Sequence[Row],
    path: Path,
    root: Path,
    split: str,
    met: Tally,
    progress: Callable[[int], None],
    exchanged: Callable[[Mapping[Any, tuple[int, int]]], bool],
    *,
    alone: bool,
) -> tuple[list[UsableImage], list[Path]]:
    """The images that have an id and a sound file; the others are counted. And all files that are there.

    Args:
        rows: the list of images.
        path: of the annotation file.
        root: folder below which images are searched for.
        split: "train" or "val".
        met: where odd things are counted.
        progress: called with the number of images looked at.
        exchanged: asked for images whose height and width are those of their files exchanged, by id with the files'
            (height, width): whether the objects show that this is a mistake.
        alone: there is no annotation file of another split.

    Raises:
        UserError: more than half cannot be used.
    """
    candidates = [
        candidate_names(_text(row.get("file_name")) or _text(row.get("path")), _text(row.get("coco_url")))
        for row in rows
    ]
    finder = ImageFinder(root)

    @cache
    def sizes(file: Path) -> tuple[tuple[int, int], ...]:
        try:
            header = read_header(file)
        except UserError:
            return ()
        return header.shown_hw, header.stored_hw

    def fits(place: int, file: Path) -> bool:
        return (meant(rows[place].get("height")), meant(rows[place].get("width"))) in sizes(file)

    paths = finder.locate(candidates, path.parent, split, alone=alone, fits=fits)
    _separate(rows, paths, finder.rivals)
    usable, faults = [], Tally()
    seen: list[_Looked] = []
    for place, (row, file) in enumerate(zip(rows, paths, strict=True)):
        several = len(finder.rivals.get(place, ())) if file is None else 0
        if not candidates[place]:
            seen.append(_Looked("image_without_name"))
        else:
            seen.append(_Looked("one_of_several", f": any of {several} files") if several else _looked_at(row, file))
        progress(len(seen))
    turned = {i: seen[i].image_hw for i, row in enumerate(rows) if _is_exchanged(row, seen[i])}
    if turned and exchanged({id_of(rows[i]["id"]): image_hw for i, image_hw in turned.items()}):
        for i, image_hw in turned.items():
            seen[i] = _Looked("size_exchanged", image_hw=image_hw)
    for row, names, file, looked in zip(rows, candidates, paths, seen, strict=True):
        name = f"{names[0]}{looked.place}" if names else f"image {row.get('id')!r}"
        if looked.kind in _FAULTS:
            faults.add(looked.kind, [name])
            continue
        if looked.kind:
            met.add(looked.kind, [f"image {row['id']!r}"])
        assert file is not None
        usable.append(UsableImage(row, file, looked.image_hw))
    for kind, count in faults.counts.items():
        met.add(kind, faults.places[kind], count)
    if len(usable) < len(rows) / 2:
        kind, count = Counter(faults.counts).most_common(1)[0]
        _, problem, fix = _FAULTS[kind]
        share = f"{count} of its {len(rows)} images {problem.format(root)}"
        raise UserError(f"{path}: {share}, the first of them {faults.places[kind][0]}; {fix}")
    there = {file: None for file in paths if file is not None}
    unknown = {id(rivals): rivals for place, rivals in finder.rivals.items() if paths[place] is None}
    for rivals in unknown.values():
        there |= dict.fromkeys(rivals)
    return usable, list(there)


def _separate(rows: Sequence[Row], paths: list[Path | None], rivals: Mapping[int, Sequence[Path]]) -> None:
    """Take the file from entries of several ids that have one name and so one file, where several have this name."""
    ids: dict[Path | None, set[Any]] = {}
    for place in rivals:
        ids.setdefault(paths[place], set()).add(id_of(rows[place].get("id")))
    for place in rivals:
        if len(ids[paths[place]]) > 1:
            paths[place] = None


def _looked_at(row: Row, path: Path | None) -> _Looked:
    if path is None:
        return _Looked("missing_image")
    if id_of(row.get("id")) is None:
        return _Looked("image_without_id")
    try:
        header = read_header(path)
        require_whole(path, header)
    except ImageTooLargeError as error:
        return _Looked("large_image", f": {error}")
    except UserError as error:
        return _Looked("broken_image", f": {error}")
    shown, stored = header.shown_hw, header.stored_hw
    height, width = meant(row.get("height")), meant(row.get("width"))
    if height is None or width is None or not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        return _Looked("size_read", image_hw=shown)
    if (height, width) in (shown, stored):
        return _Looked(image_hw=(height, width))
    return _Looked("other_size", f": it says {width} x {height} pixels and has {shown[1]} x {shown[0]}", shown)


def _is_exchanged(row: Row, looked: _Looked) -> bool:
    return looked.kind == "other_size" and (meant(row["width"]), meant(row["height"])) == looked.image_hw


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
