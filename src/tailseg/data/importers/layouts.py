"""How tools name the files and folders of training, validation and test data, and where they put images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypeVar

from tailseg.data.annotations.image_files import FileTree, alike, files_below, linked_folders, parts_below
from tailseg.data.images import IMAGE_SUFFIXES

T = TypeVar("T")
Split = Literal["train", "val", "test"]
_NAMES: dict[Split, frozenset[str]] = {
    "train": frozenset({"train", "training", "trainset"}),
    "val": frozenset({"val", "vals", "valid", "validate", "validation", "valset", "eval", "evaluation"}),
    "test": frozenset({"test", "testing", "testset", "tests"}),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # digits, signs and a change from lower to upper case end a word


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: ``instances_Val2017`` has instances and val, ``minival`` has mini and val."""
    words = [word.lower() for word in _WORD.findall(name)]
    return [part for word in words for part in (("mini", "val") if word == "minival" else (word,))]


def split_of(name: str) -> Split | None:
    """The split that a file's or folder's name tells; None if it tells none, or more than one: ``train_val``."""
    words = set(words_of(name))
    told: list[Split] = [split for split, names in _NAMES.items() if words & names]
    return told[0] if len(told) == 1 else None


def split_of_path(path: Path, root: Path) -> Split | None:
    """The split that the folders between ``root`` and a file tell: the first of them that tells one."""
    return next(filter(None, map(split_of, path.relative_to(root).parts[:-1])), None)


def by_split(items: Iterable[tuple[T, Split | None]]) -> tuple[dict[str, list[T]], list[T]]:
    """Items for training and validation, in their order, and those for neither, by the splits that they are told.

    An item that is told none belongs to neither where both are told of others. Else it is for training: folders called
    train, bus and car are classes. Where none is told to be for validation or training, all are for training.
    """
    told = list(items)
    splits = {split for _, split in told}
    if not splits & {"train", "val"} or len(splits) == 1:
        return {"train": [item for item, _ in told]}, []
    training: set[Split | None] = {"train"} if {"train", "val"} <= splits else {"train", None}
    if not training & splits:
        training = {"test"}
    train = [item for item, split in told if split in training]
    val = [item for item, split in told if split == "val"]
    rest = [item for item, split in told if split not in (*training, "val")]
    return {"train": train} | ({"val": val} if val else {}), rest


class ImageFinder:
    r"""Finds the images of an annotation file in whatever folder of a set they lie.

    First the usual places are tried for all of them, then every folder below the root is searched by the ends of
    names: ``/data/upload/3/a.jpg`` and ``C:\x\a.jpg`` find ``images/a.jpg``.
    """

    def __init__(self, root: Path) -> None:
        """Make one for the set in ``root``, in which folders may be links; nothing else is listed yet."""
        self.root = root
        self._tree = FileTree(root, also_inside=linked_folders(root))

    def locate(
        self, names: Sequence[Sequence[str]], folder: Path, split: str, *, alone: bool = False
    ) -> list[Path | None]:
        """The file of each image, or None.

        Args:
            names: of each image, those it may have, in order of preference.
            folder: of the annotation file.
            split: "train" or "val"; where files of one name lie in several folders, those of the split come first.
            alone: there is no annotation file of another split. Otherwise an image that is not in the split's folder,
                where it has one, is not meant to be that of the same name in another split's.

        Raises:
            UserError: a file is a link that leads out of the root.
        """
        for base in self._usual(folder, split):
            found = [self._first(candidates, base) for candidates in names]
            if all(found):
                return found
        return self._searched(names, folder, split, alone)

    def _usual(self, folder: Path, split: str) -> list[Path]:
        """Folders that tools put images in, those of the split first."""
        places = [folder, self.root, *(self.root / name for name in ("images", "JPEGImages", "data"))]
        places += [folder / name for name in ("images", "data")]
        inside = [path for path in dict.fromkeys(places) if path.is_dir()]
        own = [path for place in inside for path in sorted(place.iterdir()) if split_of(path.name) == split]
        return [path for path in [*own, *(path / "images" for path in own), *inside] if path.is_dir()]

    def _first(self, candidates: Sequence[str], base: Path) -> Path | None:
        for name in candidates:
            parts = parts_below(self.root, name, base)
            if parts and (path := self._tree.at(parts, str(self.root))) is not None:
                return path
        return None

    def _searched(self, names: Sequence[Sequence[str]], folder: Path, split: str, alone: bool) -> list[Path | None]:
        by_name: dict[str, list[Path]] = {}
        for path in files_below(self.root, IMAGE_SUFFIXES):
            by_name.setdefault(alike(path.name), []).append(path)
        matches = [[_matches(name, by_name, self.root) for name in candidates] for candidates in names]
        if not alone and any(split in _told(base) for own in matches for found in own for _, base, _ in found):
            matches = [
                [[m for m in found if split in _told(m[1]) or not _told(m[1])] for found in own] for own in matches
            ]
        votes = Counter(base for own in matches for found in own for length, base, _ in found if length)

        usual = set(self._usual(folder, split))

        def rank(match: tuple[int, tuple[str, ...], Path]) -> tuple[int, ...]:
            length, base, path = match
            told = _told(base)
            preference = (split in told) - bool(told - {split})
            is_usual = self.root.joinpath(*base) in usual
            return length, preference, is_usual, votes[base], path.is_relative_to(folder), -len(base)

        best = []
        for own in matches:
            found = next((found for found in own if found), [])
            best.append(max(found, key=rank)[2] if found else None)
        return best


def _told(folders: Iterable[str]) -> set[Split]:
    """The splits that the names of folders tell."""
    return set(filter(None, map(split_of, folders)))


def _matches(name: str, by_name: dict[str, list[Path]], root: Path) -> list[tuple[int, tuple[str, ...], Path]]:
    """Files that agree with the end of a name: in how many parts, the folder that is left, and the file."""
    stated = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    wanted = list(map(alike, stated))
    paths = by_name.get(wanted[-1], []) if wanted else []
    in_folder = Counter(path.parent for path in paths)  # of several in one, only the very name is meant
    found = []
    for path in (path for path in paths if in_folder[path.parent] == 1 or path.name == stated[-1]):
        parts = path.relative_to(root).parts
        pairs = zip(reversed(wanted), map(alike, reversed(parts)), strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        found.append((length, parts[: len(parts) - length], path))
    return found
