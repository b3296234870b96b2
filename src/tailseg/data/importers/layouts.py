"""Names of splits: how tools call the files and folders of training, validation and test data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "val", "test"]
_NAMES: dict[Split, frozenset[str]] = {
    "train": frozenset({"train", "training", "trainset"}),
    "val": frozenset({"val", "vals", "valid", "validate", "validation", "valset", "minival", "eval", "evaluation"}),
    "test": frozenset({"test", "testing", "testset", "tests"}),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # digits, signs and a change from lower to upper case end a word


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: ``instances_Val2017`` has instances and val."""
    return [word.lower() for word in _WORD.findall(name)]


def split_of(name: str) -> Split | None:
    """The split that a file's or folder's name tells; None if it tells none, or more than one: ``train_val``."""
    words = set(words_of(name))
    told: list[Split] = [split for split, names in _NAMES.items() if words & names]
    return told[0] if len(told) == 1 else None


def split_folders(root: Path) -> dict[str, Path]:
    """The folders for training and validation directly in ``root``, or ``root`` itself for training if it has none."""
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        split = split_of(path.name)
        if split in ("train", "val") and path.is_dir():
            found.setdefault(split, path)
    return found if "train" in found else {"train": root}


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
