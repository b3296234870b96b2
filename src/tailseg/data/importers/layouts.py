"""Names of splits: how tools call the files and folders of training, validation and test data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

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
