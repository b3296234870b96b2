"""A frozen model's features of every view of every image, on disk: one safetensors file each (see `finetune`).

A file is complete or not there, so a filling that is killed goes on where it was, and several processes can share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailseg.checkpoint import VERSION, read_tensors, write_tensors
from tailseg.data.annotations.annotations import Annotations
from tailseg.errors import UserError

IN_A_FOLDER = 1000  # images whose files lie in one
ROOM = 1.1  # of what is needed there must be this much: views differ a little in size, and checkpoints come on top
UNITS = ("bytes", "kB", "MB", "GB", "TB")


class FeatureCache:
    """Tensors by (index, seed): a sample of the training set and the seed of all chance in it.

    Args:
        folder: its own; made when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, index: int, seed: int) -> Path:
        """Path of a sample's tensors."""
        return self.folder / str(index // IN_A_FOLDER) / f"{index}-{seed:016x}.safetensors"

    def require(self, about: Mapping[str, Any]) -> None:
        """Raise UserError if the folder holds what was not made with all that ``about`` (JSON values) names."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        try:
            found = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"{self.folder}: its about.json is missing or broken, so nothing tells what these features were made "
                "with; remove the folder, and they are computed again"
            ) from None
        changed = [key for key, value in about.items() if key not in found or found[key] != value]
        if changed:
            raise UserError(
                f"{self.folder}: holds features made with another {changed[0]}; remove the folder, and they are "
                "computed again"
            )

    def claim(self, about: Mapping[str, Any]) -> None:
        """Say what the folder's features are made with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / ".about.json.part"
        part.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.folder / "about.json")

    def missing(self, samples: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The samples (index, seed) that have no file yet."""
        there = {file.name for part in _listed(self.folder) if part.is_dir() for file in _listed(Path(part))}
        return [sample for sample in samples if self.path(*sample).name not in there]

    def write(self, index: int, seed: int, tensors: Mapping[str, Tensor]) -> None:
        """Store a sample's tensors, all or nothing (UserError if the disk is full)."""
        path = self.path(index, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"tailseg": VERSION})

    def read(self, index: int, seed: int, names: Sequence[str]) -> dict[str, Tensor] | None:
        """A sample's tensors; None if the file is missing, is not as it was written or holds other names."""
        try:
            tensors, _ = read_tensors(self.path(index, seed))
        except UserError:
            return None
        return {name: tensors[name] for name in names} if tensors.keys() == set(names) else None

    def remove(self) -> int:
        """Delete the folder, if it is there; returns the bytes that its files had."""
        size = sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return size


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return list(entries)


def require_room(folder: Path, number: int, each: int, free: int) -> None:
    """Raise UserError unless ``number`` samples of ``each`` bytes fit into ``free`` bytes, with some room to spare."""
    needed = int(number * each * ROOM)
    if needed > free:
        raise UserError(
            f"{folder}: finetune.cache needs {needed} bytes ({readable(needed)}) for {number} views of images, "
            f"{readable(each)} each, and {readable(free)} are free; make room, choose an --out on a larger disk, lower "
            "finetune.views or set finetune.cache=false"
        )


def readable(size: int) -> str:
    """A number of bytes with three digits and a unit."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_annotations(annotations: Annotations) -> str:
    """A hash of all that an annotation file says of images and objects, wherever it and the images lie."""
    digest = hashlib.blake2b(digest_size=16)
    for field in fields(annotations):
        value = getattr(annotations, field.name)
        if isinstance(value, np.ndarray) or is_dataclass(value):
            digest.update(field.name.encode())
            _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Put arrays, and those that a dataclass holds, into a hash."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif is_dataclass(value):
        for field in fields(value):
            _feed(digest, getattr(value, field.name))
