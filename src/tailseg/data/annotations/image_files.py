"""Image files on disk, found by the names that annotation files give them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from tailseg.errors import UserError

_SUBFOLDERS = ("", "train2017", "val2017")  # LVIS's val split has files of both COCO splits
_V05_NAME = re.compile(r"COCO_(?:train|val|test)\d{4}_(\d{12}\.jpg)$")
_LOCAL_FILE = re.compile(r"/data/local-files/?\?(?:.*&)?d=([^&]+)")  # a file that Label Studio serves
_DRIVE = re.compile(r"[A-Za-z]:")
MOST_ENTRIES = 5_000_000  # of a folder and the folders in it
_HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")  # left by archives and file managers, as are names with a dot first


def candidate_names(file_name: str | None, coco_url: str | None) -> list[str]:
    """The names an image may have, in the order of preference.

    ``file_name`` (LVIS v0.5 puts ``COCO_train2014_`` before the last 16 characters, which name the file; other tools
    write it as in a URL, ``a%20b.jpg``, or as a whole URL), then the last part and the last two parts of ``coco_url``
    (LVIS v1).
    """
    names: list[str] = []
    if file_name:
        old = _V05_NAME.search(file_name)
        names += [file_name, old.group(1)] if old else [file_name]
        if local := _LOCAL_FILE.search(file_name):
            names.append(unquote(local.group(1)))
        elif "://" in file_name:
            names += _of_url(file_name)
        elif "%" in file_name:
            names.append(unquote(file_name))
    return names + _of_url(coco_url) if coco_url else names


def _of_url(url: str) -> list[str]:
    """The last part and the last two parts of a URL, without what follows a question mark."""
    parts = url.partition("?")[0].split("/")
    if "%" in url:
        parts = list(map(unquote, parts))
    return [parts[-1], "/".join(parts[-2:])]


def parts_below(root: Path, name: str, base: Path | None = None) -> tuple[str, ...] | None:
    """The parts of the path below ``root`` that a name in a file stands for; nothing is looked up on disk.

    Backslashes count as slashes; ``.`` and ``..`` are resolved, also where they climb out of the root and come back.

    Args:
        root: a folder.
        name: as a file states it; relative to ``base``, or absolute.
        base: folder of that file; by default the root.

    Returns:
        At least one part, or None where the name leads out of the root or is the root itself.
    """
    text = name.replace("\\", "/")
    if _DRIVE.match(text) and os.name != "nt":
        return None
    top = os.path.abspath(root)
    path = os.path.normpath(os.path.join(os.path.abspath(base or root), text))
    if os.path.splitdrive(path)[0].lower() != os.path.splitdrive(top)[0].lower():
        return None
    inside = os.path.relpath(path, top).split(os.sep)
    return None if inside[0] in (os.pardir, os.curdir) else tuple(inside)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is no data: ``._x.jpg``, ``.ipynb_checkpoints``, ``__MACOSX``."""
    return name.startswith(".") or name in _HIDDEN


def alike(name: str) -> str:
    """A file's name in one Unicode form, its suffix in lower case: equal for names that differ only in these."""
    stem, dot, suffix = unicodedata.normalize("NFC", name).rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"


class _Folder:
    """The entries of one folder, listed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with os.scandir(path) as entries:
                self.kinds = {
                    entry.name: "link" if entry.is_symlink() else "folder" if entry.is_dir() else "file"
                    for entry in entries
                }
        except OSError:
            self.kinds = {}

    @cached_property
    def _alike(self) -> dict[str, str]:
        """Names by their common form; of several, none."""
        names: dict[str, str] = {}
        twice: set[str] = set()
        for name in self.kinds:
            key = alike(name)
            twice |= {key} & names.keys()
            names[key] = name
        return {key: name for key, name in names.items() if key not in twice}

    def entry(self, name: str) -> str | None:
        """The entry of this name, or else the only one that differs in Unicode form or the case of the suffix."""
        return name if name in self.kinds else self._alike.get(alike(name))


class FileTree:
    """Finds files below a folder, which is listed as far as it is asked for, each folder in it once.

    A file or folder that is a link may lead to places inside the root, and nowhere else, so that somebody else's data
    set cannot name a private file.
    """

    def __init__(self, root: Path, *, also_inside: Sequence[Path] = ()) -> None:
        """Make one.

        Args:
            root: the folder; may itself be a link.
            also_inside: folders that links may lead to as well.
        """
        self.root = root
        self._roots = tuple(path.resolve() for path in (root, *also_inside))
        self._folders: dict[Path, _Folder] = {}

    def find(self, name: str, where: str, base: Path | None = None) -> Path | None:
        """The file that ``name`` stands for (see `parts_below`), or None.

        Letter case of the suffix and Unicode form need not agree, where only one file is meant.

        Raises:
            UserError: the name, or a link on its way, leads out of the root; the sentence opens with ``where``.
        """
        if base is None and self._folder(self.root).kinds.get(name) == "file":
            return self.root / name
        parts = parts_below(self.root, name, base)
        if parts is None:
            raise UserError(f"{where} leads out of the image folder ({name!r}); give a path inside of it")
        return self.at(parts, where)

    def at(self, parts: Sequence[str], where: str) -> Path | None:
        """The file at a path below the root, given by its parts."""
        path, linked = self.root, False
        for place, part in enumerate(parts, start=1):
            folder = self._folder(path)
            entry = folder.entry(part)
            if entry is None:
                return None
            path = path / entry
            kind = folder.kinds[entry]
            linked |= kind == "link"
            last = place == len(parts)
            if kind == ("folder" if last else "file") or (kind == "link" and last and not path.is_file()):
                return None
        if linked and not any(path.resolve().is_relative_to(root) for root in self._roots):
            raise UserError(f"{where}: {path} is a link that leads out of {self.root}; put the file itself there")
        return path

    def _folder(self, path: Path) -> _Folder:
        found = self._folders.get(path)
        if found is None:
            found = self._folders[path] = _Folder(path)
        return found


class ImageFolder:
    """Finds images in a folder of images and its ``train2017`` and ``val2017``; each of the three may be a link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _trees(self) -> list[FileTree]:
        folders = [folder for folder in (self.folder / sub for sub in _SUBFOLDERS) if folder.is_dir()]
        return [FileTree(folder, also_inside=folders) for folder in folders]

    def find(self, names: Sequence[str], where: str, base: Path | None = None) -> Path | None:
        """The first of ``names`` that exists, or None.

        Args:
            names: relative to the folder, or else to ``base``.
            where: file and image; opens the error sentence.
            base: folder of that file.

        Raises:
            UserError: a name climbs out of the folder.
        """
        for name in names:
            for tree in self._trees:
                if (path := tree.find(name, where)) is not None:
                    return path
        for name in names if base else ():
            for tree in self._trees:
                parts = parts_below(tree.root, name, base)
                if parts is not None and (path := tree.at(parts, where)) is not None:
                    return path
        return None


def files_below(
    folder: Path,
    suffixes: Sequence[str],
    *,
    inside: Path | None = None,
    leave: Callable[[Path], None] = lambda link: None,
) -> Iterator[Path]:
    """The files with one of ``suffixes`` (lower case) in a folder and the folders in it, sorted by path.

    Hidden files and folders are no data (see `is_hidden`).

    Args:
        folder: to look in.
        suffixes: of the files.
        inside: links may lead anywhere in this folder and its `linked_folders`, and nowhere else. By default links to
            files stay in the folder that they lie in, and links to folders are followed as `walk` does.
        leave: called with each link to a folder that `walk` does not follow.

    Raises:
        UserError: a link leads elsewhere.
    """
    tops = [folder.resolve(), *([inside.resolve(), *linked_folders(inside)] if inside else [])]

    def require_inside(link: Path) -> None:
        if not any(link.resolve().is_relative_to(top) for top in tops):
            what = "folder" if link.is_dir() else "file"
            raise UserError(f"{link} is a link that leads out of {inside or folder}; put the {what} itself there")

    def follow(link: Path) -> None:
        if inside:
            require_inside(link)
        else:
            tops.append(link.resolve())

    found: list[Path] = []
    for entry in walk(folder, follow, leave, anywhere=inside is not None):
        if entry.name.lower().endswith(tuple(suffixes)):
            path = Path(entry.path)
            if entry.is_symlink():
                require_inside(path)
            found.append(path)
    yield from sorted(found)


def linked_folders(root: Path) -> list[Path]:
    """The folders that links directly in a folder lead to: ``images`` may lie on another disk."""
    links = [path for path in root.iterdir() if path.is_symlink() and path.is_dir()] if root.is_dir() else []
    return [path.resolve() for path in links]


def walk(
    folder: Path,
    follow: Callable[[Path], None] = lambda link: None,
    leave: Callable[[Path], None] = lambda link: None,
    *,
    anywhere: bool = False,
) -> Iterator[os.DirEntry[str]]:
    """The files in a folder and the folders in it, as `files_below` looks at them, in any order.

    Links to folders that lie directly in the folder may lead anywhere, as people link to a disk of images. Those
    further below are followed if they stay in the folder, or in what such a link leads to. Each is followed once, and
    none that leads to a folder that it lies in.

    Args:
        folder: where to begin.
        follow: called with each link to a folder before its files come.
        leave: called with each link to a folder that is not followed, since it leads out.
        anywhere: all links may lead anywhere.

    Raises:
        UserError: a folder cannot be listed, or there are more than `MOST_ENTRIES` files and folders.
    """
    waiting = [(folder, os.path.realpath(folder), 0)]
    followed: set[str] = set()
    count = 0
    while waiting:
        path, home, depth = waiting.pop()
        try:
            entries = [entry for entry in os.scandir(path) if not is_hidden(entry.name)]
        except OSError as error:
            raise UserError(f"{path}: cannot be listed ({error.strerror}); check its rights") from None
        count += len(entries)
        if count > MOST_ENTRIES:
            raise UserError(f"{folder}: holds more than {MOST_ENTRIES:,} files; name the folder of the data itself")
        for entry in entries:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                continue
            if is_folder and entry.is_symlink():
                link, target = os.path.join(os.path.realpath(path), entry.name), os.path.realpath(entry.path)
                loop, inner = _is_in(link, target), _is_in(target, home)
                if not (inner or anywhere) and (loop or depth):
                    leave(Path(entry.path))
                elif link not in followed:
                    followed.add(link)
                    follow(Path(entry.path))
                    if not loop:
                        waiting.append((Path(entry.path), home if inner else target, depth + 1))
            elif is_folder:
                waiting.append((Path(entry.path), home, depth + 1))
            elif is_file:
                yield entry


def _is_in(path: str, folder: str) -> bool:
    """Return whether a path is a folder or lies in it; both without links."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
