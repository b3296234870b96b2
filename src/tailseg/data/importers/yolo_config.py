"""What the files beside YOLO's labels state: `data.yaml` or darknet's `obj.data`, and lists of class names."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from tailseg.data.annotations.image_files import is_hidden
from tailseg.data.importers.foreign import read_object, read_text
from tailseg.data.importers.layouts import Split, split_of, words_of
from tailseg.errors import UserError
from tailseg.wording import short
from tailseg.yaml_files import read_yaml

NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "notes.json")  # labelImg, darknet, Roboflow, Label Studio
YAML_SUFFIXES = (".yaml", ".yml")
MOST_CLASSES = 100_000
MOST_BYTES = 100_000  # of an obj.data
MOST_FOLDERS = 100  # of a folder that are looked into
MOST_DEEP = 4  # folders in one another that hold nothing else
_SPLIT_KEYS = ("train", "training", "val", "valid", "validation", "test", "testing")
_ABSENT = ("", "null", "~", "None")  # as texts


@dataclass(frozen=True, slots=True)
class YoloConfig:
    """The content of a `data.yaml` or `obj.data`."""

    path: Path
    content: dict[str, Any]  # values are texts, or lists and dicts of texts

    @property
    def base(self) -> str | None:
        """The entry `path`: the folder that the others are relative to."""
        base = self.content.get("path")
        return base if isinstance(base, str) and base not in _ABSENT else None

    @property
    def keypoint_numbers(self) -> int:
        """Numbers that describe an object's keypoints, after its box."""
        shape = self.content.get("kpt_shape")
        if isinstance(shape, list) and len(shape) == 2 and all(str(n).isdecimal() and len(str(n)) < 5 for n in shape):
            return int(shape[0]) * int(shape[1])
        return 0

    def entries(self) -> dict[Split, list[str]]:
        """Folders and lists of images of each split that has some, as they are written."""
        found: dict[Split, list[str]] = {}
        for key, value in self.content.items():
            split = split_of(key) if isinstance(key, str) else None
            if split is None or words_of(key)[0] not in _SPLIT_KEYS or len(words_of(key)) > 1:
                continue
            for entry in value if isinstance(value, list) else [value]:
                if not isinstance(entry, str):
                    raise UserError(
                        f"{self.path}: {key} is {short(entry)}; it must be a folder of images or a list of files"
                    )
                if entry not in _ABSENT:
                    found.setdefault(split, []).append(entry)
        return found

    def names(self) -> dict[int, str] | None:
        """The class names by number; None if the file states none."""
        names, count = self.content.get("names"), self.content.get("nc")
        if names is None and count is not None:
            if not isinstance(count, str) or not count.isdecimal() or not 0 < int(count[:9]) <= MOST_CLASSES:
                raise UserError(f"{self.path}: nc is {short(count)}; it must be the number of classes")
            return {number: f"class_{number}" for number in range(int(count))}
        if names is None:
            return None
        if isinstance(names, dict) and all(str(key).isdecimal() and len(str(key)) < 10 for key in names):
            names = {int(key): name for key, name in names.items()}
        elif isinstance(names, list):
            names = dict(enumerate(names))
        if (
            not isinstance(names, dict)
            or not names
            or not all(isinstance(n, int) and isinstance(name, str) and name for n, name in names.items())
        ):
            raise UserError(f"{self.path}: 'names' must be a list of class names, or map 0, 1, 2, ... to them")
        return _distinct({number: names[number] for number in sorted(names)}, self.path)


def find_config(source: Path, deeper: int = MOST_DEEP) -> YoloConfig | None:
    """The file that describes a data set: the one given, or one in the folder, or in the one folder in it that has any.

    A folder that holds nothing but one other, as unpacking makes them, stands for that one.

    Raises:
        UserError: there are several, or the only one is no valid YAML, or a file is of another kind.
    """
    if source.is_file() and source.suffix.lower() not in (*YAML_SUFFIXES, ".data"):
        raise UserError(f"{source}: expected a data.yaml or obj.data; give that file or the folder of the set")
    if source.is_file():
        return _read(source)
    found = _config_in(source)
    if found is None:
        inner = [config for folder in entries_of(source)[0][:MOST_FOLDERS] if (config := _config_of_set(folder))]
        if len(inner) > 1:
            one, other = (config.path.relative_to(source) for config in inner[:2])
            raise UserError(f"{source}: both {one} and {other} describe a data set; name the file to use")
        found = inner[0] if inner else None
    if found is None and deeper > 0:
        folders, files = entries_of(source)
        if len(folders) == 1 and not files:
            return find_config(folders[0], deeper - 1)
    return found


def _config_of_set(folder: Path) -> YoloConfig | None:
    """The file that describes a set in a folder: `data.yaml`, or another one beside images or labels."""
    if any((folder / f"data{end}").is_file() for end in YAML_SUFFIXES):
        return _config_in(folder)
    beside = {path.name.lower() for path in entries_of(folder)[0]}
    return _config_in(folder) if beside & {"images", "labels"} else None


def _config_in(folder: Path) -> YoloConfig | None:
    _, files = entries_of(folder)
    yamls = [path for path in files if path.suffix.lower() in YAML_SUFFIXES]
    yamls = [path for path in yamls if path.stem.lower() == "data"] or yamls
    if len(yamls) == 1:
        config = _read(yamls[0])
        return config if yamls[0].stem.lower() == "data" or {"names", "nc"} & config.content.keys() else None
    described = [config for config in map(_read_or_none, yamls) if config and "names" in config.content]
    if not described:  # darknet's
        others = map(_read_or_none, (path for path in files if path.suffix.lower() == ".data"))
        described = [config for config in others if config and {"train", "names"} <= config.content.keys()]
    if len(described) > 1:
        one, other = (config.path.name for config in described[:2])
        raise UserError(f"{folder}: both {one} and {other} describe a data set; name the file to use")
    return described[0] if described else None


def _read(path: Path) -> YoloConfig:
    if path.suffix.lower() == ".data" and path.stat().st_size < MOST_BYTES:
        pairs = [line.partition("=") for line in read_text(path).splitlines()]
        return YoloConfig(path, {key.strip(): value.strip() for key, _, value in pairs if key.strip()})
    content = read_yaml(path, fix="write the entries train, val and names", texts=True)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected the entries train, val and names; check the file")
    return YoloConfig(path, content)


def _read_or_none(path: Path) -> YoloConfig | None:
    try:
        return _read(path)
    except UserError:  # of something else
        return None


def names_in(path: Path) -> dict[int, str]:
    """The class names by number of a file that lists them, one a line, or of Label Studio's `notes.json`.

    A blank line is a number without a class.

    Raises:
        UserError: it lists no name, or one twice.
    """
    if path.suffix.lower() == ".json":
        rows = read_object(path).get("categories")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        pairs = [(row.get("id"), row.get("name")) for row in rows]
        names = {n: name for n, name in pairs if isinstance(n, int) and isinstance(name, str) and n >= 0}
    else:
        names = {number: line.strip() for number, line in enumerate(read_text(path).splitlines())}
    names = {number: names[number] for number in sorted(names) if names[number]}
    if not names:
        raise UserError(f"{path}: it lists no class names; write one a line")
    return _distinct(names, path)


def find_names(root: Path) -> tuple[Path, dict[int, str]] | None:
    """The file of class names in ``root``, or else in the folders in it, or else in those in them.

    Raises:
        UserError: of several there, two disagree.
    """
    folders = [root]
    for _ in range(3):
        listed = [entries_of(folder) for folder in folders]
        found = [(path, names_in(path)) for _, files in listed for path in files if path.name.lower() in NAME_FILES]
        for path, names in found[1:]:
            if names != found[0][1]:
                raise UserError(f"{path}: its class names are not those of {found[0][0]}; remove the wrong file")
        if found:
            return found[0]
        folders = [path for inner, _ in listed for path in inner]
    return None


def entries_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, sorted, hidden ones left out.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            known = sorted((entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check the path and its rights") from None
    return [folder / name for name, inner in known if inner], [folder / name for name, inner in known if not inner]


def _distinct(names: dict[int, str], path: Path) -> dict[int, str]:
    names = {number: normalize("NFC", name) for number, name in names.items()}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: the class name {repeated[0]!r} occurs more than once; give each class its own")
    return names
