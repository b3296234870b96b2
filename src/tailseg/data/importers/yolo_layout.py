"""The images of a YOLO set by splits: entries of `data.yaml` found on disk, or folders told apart by their names."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tailseg.data.annotations.image_files import FileTree, files_below, linked_folders, parts_below
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.foreign import LeftOut, read_text
from tailseg.data.importers.layouts import Split, split_of
from tailseg.data.importers.yolo_config import YoloConfig, entries_of, find_config, find_names, names_in
from tailseg.data.importers.yolo_labels import listing
from tailseg.errors import UserError

_ABSOLUTE = re.compile(r"/|[A-Za-z]:")
_LONGEST = 30  # parts of a path in a file
_Listed = list[tuple[Path, Path]]  # images, each with the root that it belongs to


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of images, or a text file that lists some."""

    path: Path
    root: Path  # folder that no link, and nothing that the list names, may lead out of


@dataclass(slots=True)
class YoloLayout:
    """The images of a set."""

    where: Path  # the file or folder that describes it
    names: dict[int, str] | None  # of the classes by number; None: no file tells them
    images: dict[str, dict[Path, Path]]  # of "train", and of "val" if there is one: each with its `Place.root`
    folders: list[Place] = field(default_factory=list)  # in which images were looked for
    keypoint_numbers: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def roots(self) -> set[Path]:
        """The roots of all images."""
        return {root for part in self.images.values() for root in part.values()}

    @property
    def root(self) -> Path:
        """The folder that all of them lie in."""
        roots = self.roots
        return next(iter(roots)) if len(roots) == 1 else Path(os.path.commonpath(list(map(str, roots))))


def find_layout(source: Path, found: LeftOut) -> YoloLayout:
    """The images of a set, each in one split only.

    Args:
        source: the set's folder, or its `data.yaml` or `obj.data`.
        found: what is left out is added to it.

    Raises:
        UserError: an entry is wrong or not there, a link or a listed name leads out of the set, or there are no images.
    """
    config = find_config(source)
    folder = config.path.parent if config else source
    layout = YoloLayout(config.path if config else source, None, {})
    roots = _roots(config, layout.notes) if config else [folder]
    if config:
        layout.names, layout.keypoint_numbers = _names(config, roots), config.keypoint_numbers
    if layout.names is None and (listed := find_names(folder)):
        layout.names = listed[1]
    if config and layout.names is None:
        raise UserError(f"{config.path}: 'names' must be a list of class names, or map 0, 1, 2, ... to them")
    entries = config.entries() if config else _lists_in(folder)
    if entries and "train" not in entries:
        raise UserError(f"{layout.where}: the entry 'train' is missing; add it, with the folder of the training images")
    images = _by_entries(layout, entries, roots, found) if entries else _by_folders(layout, folder, found)
    _put_apart(layout, images, found)
    return layout


def _names(config: YoloConfig, roots: Sequence[Path]) -> dict[int, str] | None:
    """The class names that the file states, or those in the file that it names."""
    entry = config.content.get("names")
    place = _locate(entry, roots) if isinstance(entry, str) else None
    return names_in(place.path) if place and place.path.is_file() else config.names()


def _roots(config: YoloConfig, notes: list[str]) -> list[Path]:
    """The folders that entries may be relative to, in the order of preference: the entry `path`, the file's folder.

    `path` is the user's own statement and may lead anywhere. One that is not here is of another machine.
    """
    folder = config.path.parent
    if config.base is None:
        return [folder]
    text = config.base.replace("\\", "/")
    for start in (folder, folder / ".."):
        root = Path(os.path.normpath(start / text))
        if os.path.isdir(root):
            return [folder] if _same(root, folder) else [root, folder]
    for end in _ends(text):
        found = _existing(folder, end)
        if found and found.is_dir():
            notes.append(f"{config.path}: its path {config.base} is not here; {found} was taken")
            return [found, folder]
    notes.append(f"{config.path}: its path {config.base} is not here; the file's own folder was taken")
    return [folder]


def _locate(entry: str, roots: Sequence[Path]) -> Place | None:
    """The folder or file that an entry stands for.

    It is taken as it is written, if it is there. If it is not, or lies outside of the roots though it is a relative
    path, its longest end that exists below a root is taken: Roboflow writes ``../train/images`` beside the folder
    ``train``, others repeat the set's own name, or state the absolute path on another machine.

    Raises:
        UserError: it is a link that leads out of the root.
    """
    text = entry.replace("\\", "/")
    written = [(Path(os.path.normpath(root / text)), root) for root in roots]
    written = [(path, root) for path, root in written if os.path.exists(path)]
    inside = [(path, root) for path, root in written if _is_below(path, root)]
    ends: list[tuple[Path, Path]] = []
    if not inside and not (written and _ABSOLUTE.match(text)):
        ends = [(path, root) for end in _ends(text) for root in roots if (path := _existing(root, end))]
    for path, root in [*inside, *ends]:
        if not any(path.resolve().is_relative_to(top) for top in (root.resolve(), *linked_folders(root))):
            raise UserError(f"{path} is a link that leads out of {root}; put the folder itself there or name its place")
        return Place(path, root)
    for path, _ in written:  # the user's own statement
        parts = path.parts
        images = [place for place, part in enumerate(parts) if part.lower() == "images"]
        return Place(path, Path(*parts[: images[-1]]) if images else path if path.is_dir() else path.parent)
    return None


def _ends(text: str) -> list[list[str]]:
    """The parts of a path without those that climb, then without the first, the first two, and so on.

    A part that tells a split stays: ``../test/images`` never stands for ``images``. Not so in an absolute path: the
    folders of another machine may be called anything, ``/content/training/data/obj``.
    """
    parts = [part for part in text.split("/") if part not in ("", ".", "..")][-_LONGEST:]
    told = [None if _ABSOLUTE.match(text) else split_of(part) for part in parts]
    return [parts[first:] for first in range(len(parts)) if set(told[:first]) <= {None, *told[first:]}]


def _existing(root: Path, parts: Sequence[str]) -> Path | None:
    """The path below a folder; each part may differ in letter case and Unicode form, where only one entry is meant."""
    path = root
    for part in parts:
        if not os.path.lexists(path / part):
            names = [name for name in listing(path) if _folded(name) == _folded(part)]
            if len(names) != 1:
                return None
            part = names[0]
        path /= part
    return path if os.path.exists(path) else None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _by_entries(
    layout: YoloLayout, entries: dict[Split, list[str]], roots: Sequence[Path], found: LeftOut
) -> dict[Split, _Listed]:
    images: dict[Split, _Listed] = {split: [] for split in entries}
    for split, entry in ((split, entry) for split, names in entries.items() for entry in names):
        try:
            place = _locate(entry, roots)
            if place is None:
                fix = "put data.yaml into the folder that holds the images, or correct or remove the entry"
                raise UserError(f"{layout.where}: {split} is {entry}, which is not in {roots[0]}; {fix}")
            if place.path == Path(place.path.anchor):
                raise UserError(
                    f"{layout.where}: {split} is {entry}, the root of the disk; name the folder of its images"
                )
            if place.path.is_dir():
                files = list(files_below(place.path, IMAGE_SUFFIXES, inside=place.root))
            else:
                files = _listed(place, found)
        except UserError:
            if split == "test":  # which is only counted
                continue
            raise
        images[split] += [(file, place.root) for file in files]
        if split == "test":
            continue
        if place.path.is_dir():
            layout.folders.append(place)
        if not any(_is_below(place.path, root) for root in roots):
            layout.notes.append(f"{layout.where}: {split} is {place.path}, outside of the file's folder")
        elif _ABSOLUTE.match(entry) and not os.path.exists(entry):
            layout.notes.append(f"{layout.where}: {split} is {entry}, which is not here; {place.path} was taken")
        if split == "train" and "val" not in entries:
            unnamed = _validation_beside(place.path)
            layout.notes += [f"{layout.where}: no entry names {path}: left out; add it as 'val'" for path in unnamed]
    for split in entries:
        if split != "test" and not images[split]:
            raise UserError(f"{layout.where}: {split} has no images; check the folder it names, or remove the entry")
    return images


def _validation_beside(train: Path) -> list[Path]:
    """Folders beside the one that tells training in a path, which tell validation: ``images/val``, ``../valid``."""
    for folder in (train, *train.parents[:2]):
        if split_of(folder.name) == "train":
            return [path for path in entries_of(folder.parent)[0] if split_of(path.name) == "val"]
    return []


def _listed(place: Place, found: LeftOut) -> list[Path]:
    """The images that a text file lists, one a line."""
    tree = FileTree(place.root, also_inside=linked_folders(place.root))
    images: list[Path] = []
    gone: list[str] = []
    for number, line in enumerate(read_text(place.path).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        where = f"{place.path}: line {number}"
        image = _listed_file(tree, place, name, where)
        if image is not None:
            images.append(image)
            continue
        if not images and not gone:
            first = f"{where}: {name[:200]} does not exist; put the image there or remove the line"
        gone.append(where)
    if gone and not images:
        raise UserError(first)
    if gone:
        found.add("images that a list names and that are not there: left out", *gone)
    return images


def _listed_file(tree: FileTree, place: Place, name: str, where: str) -> Path | None:
    """The file that a line stands for: below the root or the list's folder, or else its longest end below the root."""
    text = name.replace("\\", "/")
    beside = place.path.parent
    bases = (beside, place.root) if text.startswith("./") else (place.root, beside)
    climbs = False
    for base in bases:
        parts = parts_below(place.root, text, base)
        climbs |= parts is None
        if parts and (image := tree.at(parts, where)):
            return image
    for end in _ends(text):
        if image := tree.at(end, where):
            return image
    if climbs and any(os.path.exists(base / text) for base in bases):
        fix = "state the folder that holds all images as 'path' in data.yaml"
        raise UserError(f"{where}: {name} leads out of {place.root}; {fix}")
    return None


def _lists_in(folder: Path) -> dict[Split, list[str]]:
    """Text files in a folder whose names tell a split and that list images, if one is for training."""
    found: dict[Split, list[str]] = {}
    for path in entries_of(folder)[1]:
        split = split_of(path.stem) if path.suffix.lower() == ".txt" else None
        if split and _first_line(path).lower().endswith(IMAGE_SUFFIXES):
            found.setdefault(split, []).append(path.name)
    return found if "train" in found else {}


def _first_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(5000).decode("utf-8", "replace").partition("\n")[0].strip()
    except OSError:
        return ""


def _by_folders(layout: YoloLayout, root: Path, found: LeftOut) -> dict[Split, _Listed]:
    """The images below a folder; the first folder on the way to an image whose name tells a split decides."""
    files = list(files_below(root, IMAGE_SUFFIXES, inside=root))
    above = {file: file.relative_to(root).parts[:-1] for file in files}
    if chosen := [file for file in files if "images" in map(str.lower, above[file])]:
        real: dict[Path, str] = {}
        known = {_real(file, real) for file in chosen}  # where links lead to
        others = [str(file) for file in files if _real(file, real) not in known]
        if others:
            found.add("pictures outside of the folders called images: left out", *others)
        files = chosen
    splits: dict[Split | None, list[Path]] = {}
    folders: dict[Path, None] = {}
    for file in files:
        told = [split_of(part) for part in above[file]]
        splits.setdefault(next((split for split in told if split), None), []).append(file)
        ends = [i for i, part in enumerate(above[file], start=1) if told[i - 1] or part.lower() == "images"]
        folders[root.joinpath(*above[file][: ends[-1] if ends else 0])] = None
    if not files:
        raise UserError(f"{root}: there is neither a data.yaml nor an image in it; give the folder of a YOLO set")
    if "train" not in splits:
        whole = next(split for split in (None, "val", "test") if split in splits)
        splits["train"] = splits.pop(whole)
        if whole:
            layout.notes.append(f"{root}: no folder is called train; the images of {whole} were taken for training")
    if untold := splits.pop(None, []):
        found.add("images outside of the folders of splits: left out", *map(str, untold))
    layout.folders = [Place(folder, root) for folder in folders]
    return {split: [(file, root) for file in part] for split, part in splits.items() if split}


def _put_apart(layout: YoloLayout, images: dict[Split, _Listed], found: LeftOut) -> None:
    """Take every image once, in one split; those of the test split are counted only."""
    unique: dict[Split, dict[str, tuple[Path, Path]]] = {}
    folders: dict[Path, str] = {}
    for split, listed in images.items():
        known = unique[split] = {}
        for path, root in listed:
            if known.setdefault(_real(path, folders), (path, root))[0] is not path and split != "test":
                found.add(f"images named twice for {split}: taken once", str(path))
    train, val = unique["train"], unique.get("val", {})
    shared = train.keys() & val.keys()
    if val and len(shared) == len(train) == len(val):
        layout.notes.append(f"{layout.where}: train and val are the same images; they are taken as one set")
        val = {}
    elif shared:
        loser, name = (train, "training") if len(shared) == len(val) else (val, "validation")
        kind = f"images that are in both train and val: left out of {name}"
        found.add(kind, *(str(loser.pop(real)[0]) for real in sorted(shared)))
    test = unique.get("test", {}).keys() - train.keys() - val.keys()
    if test:
        found.add("images of the test split: left out", *sorted(test))
    layout.images = {"train": dict(train.values())} | ({"val": dict(val.values())} if val else {})
    if len(layout.roots) > 1:  # one may be relative to the working folder, another absolute
        for name, part in layout.images.items():
            layout.images[name] = {_absolute(path): _absolute(root) for path, root in part.items()}
        layout.folders = [Place(_absolute(place.path), _absolute(place.root)) for place in layout.folders]


def _real(path: Path, folders: dict[Path, str]) -> str:
    """`os.path.realpath` of a file; that of its folder is looked up once."""
    folder = folders.get(path.parent) or folders.setdefault(path.parent, os.path.realpath(path.parent))
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(folder, path.name)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _is_below(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder or is it, links not followed."""
    return _absolute(path).is_relative_to(_absolute(root))


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
