"""How tools name the files and folders of training, validation and test data, and where they put images."""

from __future__ import annotations

import filecmp
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from tailseg.data.annotations.image_files import FileTree, alike, files_below, linked_folders, parts_below
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.path_ends import Parts, PathEnds
from tailseg.data.importers.writer import IMAGE_FOLDERS

T = TypeVar("T")
Split = Literal["train", "val", "test"]
_NAMES: dict[Split, frozenset[str]] = {
    "train": frozenset({"train", "training", "trainset"}),
    "val": frozenset({"val", "vals", "valid", "validate", "validation", "valset", "eval", "evaluation"}),
    "test": frozenset({"test", "testing", "testset", "tests"}),
}
MOST_LOOKED_AT = 100  # files of one name whose sizes are compared
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
        self.rivals: dict[int, list[Path]] = {}  # by place of an image in the last search: files as good as any
        self._tree = FileTree(root, also_inside=linked_folders(root))

    def locate(
        self,
        names: Sequence[Sequence[str]],
        folder: Path,
        split: str,
        *,
        alone: bool = False,
        fits: Callable[[int, Path], bool] = lambda place, path: True,
    ) -> list[Path | None]:
        """The file of each image, or None; also where it may be any of several, which `rivals` has then.

        Args:
            names: of each image, those it may have, in order of preference.
            folder: of the annotation file.
            split: "train" or "val"; where files of one name lie in several folders, those of the split come first.
            alone: there is no annotation file of another split. Otherwise an image that is not in the split's folder,
                where it has one, is not meant to be that of the same name in another split's.
            fits: asked for the place of an image and one of several files that it may be: whether it has the stated
                size.

        Raises:
            UserError: a file is a link that leads out of the root.
        """
        self.rivals = {}
        for base in self._usual(folder, split):
            found = [self._first(candidates, base) for candidates in names]
            if all(found):
                return found
        return self._searched(names, folder, split, alone, fits)

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

    def _searched(
        self,
        names: Sequence[Sequence[str]],
        folder: Path,
        split: str,
        alone: bool,
        fits: Callable[[int, Path], bool],
    ) -> list[Path | None]:
        matches = _Matches(self.root)
        ways = [[matches.of(name) for name in candidates] for candidates in names]
        if not alone:
            matches.keep_apart(split, [way[0] for own in ways for way in own if way])
        # Of each image: of the first name that any file has, the longest end.
        ends = [next((key for way in own for key in way if matches.kept(key)), None) for own in ways]
        votes: Counter[Parts] = Counter()
        for key, count in Counter(filter(None, ends)).items():
            for base, _ in matches.kept(key):
                votes[base] += count
        usual = set(self._usual(folder, split))

        def rank(match: tuple[Parts, Path]) -> tuple[int, ...]:
            base, path = match
            told = _told(base)
            preference = (split in told) - bool(told - {split})
            is_usual = self.root.joinpath(*base) in usual
            of_images = bool(base) and base[-1] in IMAGE_FOLDERS
            return preference, is_usual, votes[base], path.is_relative_to(folder), of_images, -len(base)

        @cache
        def best(key: _Key) -> tuple[list[Path], list[Path]]:
            """The files of the highest rank, and those that are as likely but for votes and depth."""
            ranks = [(rank(match), match[1]) for match in matches.kept(key)]
            highest = max(own for own, _ in ranks)
            tied = [path for own, path in ranks if own == highest]
            return tied, [path for own, path in ranks if own[:2] == highest[:2]]

        found: list[Path | None] = []
        for place, end in enumerate(ends):
            tied, rivals = best(end) if end else ([], [])
            if len(rivals) > 1:
                self.rivals[place] = rivals
            if 1 < len(tied) <= MOST_LOOKED_AT:
                tied = [path for path in tied if fits(place, path)] or tied
                if all(filecmp.cmp(tied[0], path, shallow=False) for path in tied[1:]):  # copies
                    tied = tied[:1]
            found.append(tied[0] if len(tied) == 1 else None)
        return found


@cache
def _told(folders: Parts) -> frozenset[Split]:
    """The splits that the names of folders tell."""
    return frozenset(filter(None, map(split_of, folders)))


_Key = tuple[str, Parts]  # a file's name as it is stated, and the end of the stated path that files have


class _Matches:
    """Files that agree with the ends of names, each with the folders that are left before the end."""

    def __init__(self, root: Path) -> None:
        self._root = root
        files = list(files_below(root, IMAGE_SUFFIXES))
        self._ends = PathEnds(files, root), PathEnds(files, root, lambda path: alike(path.stem))
        self._in_folder = Counter((path.parent, alike(path.name)) for path in files)
        self._paths: dict[Parts, list[Path]] = {}
        self._kept: dict[_Key, list[tuple[Parts, Path]]] = {}
        self._split: str | None = None

    def of(self, name: str) -> list[_Key]:
        """The ends of a name that files have, the longest first. A name without suffix stands for any."""
        stated = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        keys: list[_Key] = []
        for ends in self._ends:
            if not keys:
                for end, paths in ends.matching(tuple(map(alike, stated))):
                    self._paths[end] = paths
                    keys.append((stated[-1], end))
        return keys

    def keep_apart(self, split: str, keys: Iterable[_Key]) -> None:
        """Leave out the files of other splits, if one lies in a folder of this split."""
        if any(split in _told(base) for key in dict.fromkeys(keys) for base, _ in self.kept(key)):
            self._split = split
            self._kept = {}

    def kept(self, key: _Key) -> list[tuple[Parts, Path]]:
        """The files of an end that may be meant; of several alike in one folder, only the very name is."""
        known = self._kept.get(key)
        if known is not None:
            return known
        name, end = key
        found = []
        for path in self._paths[end]:
            if self._in_folder[path.parent, end[-1]] <= 1 or path.name == name:  # 0 of a name without suffix
                base = path.relative_to(self._root).parts[: -len(end)]
                if self._split is None or self._split in _told(base) or not _told(base):
                    found.append((base, path))
        self._kept[key] = found
        return found
