"""Files found by the last parts of their paths, also among many files of one name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from tailseg.data.annotations.image_files import alike

Parts = tuple[str, ...]  # of a path, each in the form in which it is compared


class PathEnds:
    """The files below a root by the ends of their paths.

    Ends of two parts and more are kept for names that several files have, when they are first asked for; so the work
    grows with the number of files and not with its square.
    """

    def __init__(
        self, files: Iterable[Path], root: Path, last: Callable[[Path], str] = lambda path: alike(path.name)
    ) -> None:
        """Make one.

        Args:
            files: below the root.
            root: a folder.
            last: the last part of a file's path, as it is compared; the folders are compared as `alike`.
        """
        self._root, self._last = root, last
        self._folders: dict[Path, Parts] = {}
        self._by_last: dict[str, list[Path]] = {}
        for path in files:
            self._by_last.setdefault(last(path), []).append(path)
        self._by_end: dict[Parts, list[Path]] = {}
        self._ended: set[str] = set()  # last parts whose ends are kept
        self._by_sides: dict[Parts, dict[tuple[Parts, Parts], list[Path]]] = {}
        self._deepest = 1

    def matching(self, wanted: Parts) -> Iterator[tuple[Parts, list[Path]]]:
        """The ends of a path that files have, the longest first, and these files."""
        paths = self._by_last.get(wanted[-1], []) if wanted else []
        if len(paths) == 1:
            pairs = zip(reversed(wanted), reversed(self._parts(paths[0])), strict=False)
            length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            yield wanted[-length:], paths
        elif paths:
            self._keep_ends(wanted[-1])
            for length in range(min(len(wanted), self._deepest), 0, -1):
                if found := self._by_end.get(wanted[-length:]):
                    yield wanted[-length:], found

    def nearest(self, end: Parts, paths: Sequence[Path], folder: Path) -> Path | None:
        """Of the files of an end, the one whose folders agree with most of a folder's, counted from both sides.

        None if that is so of several.

        Args:
            end: as `matching` gives it, with ``paths``.
            paths: all files of this end.
            folder: below the root.
        """
        by_sides = self._by_sides.get(end)
        if by_sides is None:
            by_sides = self._by_sides[end] = {}
            for path in paths:
                for sides in _sides(self._folder(path.parent)):
                    by_sides.setdefault(sides, []).append(path)
        best: set[Path] = set()
        most = 0
        for start, stop in sorted(_sides(self._folder(folder)), key=lambda sides: -len(sides[0]) - len(sides[1])):
            if len(start) + len(stop) < most:
                break
            if found := by_sides.get((start, stop)):
                most = len(start) + len(stop)
                if len(found) > 1:
                    return None
                best.add(found[0])
        return best.pop() if len(best) == 1 else None

    def _keep_ends(self, last: str) -> None:
        if last not in self._ended:
            self._ended.add(last)
            for path in self._by_last[last]:
                parts = self._parts(path)
                self._deepest = max(self._deepest, len(parts))
                for length in range(1, len(parts) + 1):
                    self._by_end.setdefault(parts[-length:], []).append(path)

    def _parts(self, path: Path) -> Parts:
        return (*self._folder(path.parent), self._last(path))

    def _folder(self, folder: Path) -> Parts:
        """The parts of a folder, looked up once."""
        known = self._folders.get(folder)
        if known is None:
            known = self._folders[folder] = tuple(map(alike, folder.relative_to(self._root).parts))
        return known


def _sides(parts: Parts) -> list[tuple[Parts, Parts]]:
    """All pairs of a path's beginning and end."""
    places = range(len(parts) + 1)
    return [(parts[:first], parts[last:]) for first in places for last in places]
