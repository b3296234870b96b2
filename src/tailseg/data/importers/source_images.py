"""The images of a source: found by what its annotation files say of them, each used once."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from tailseg.data.annotations.image_files import FileTree, alike, files_below, linked_folders, parts_below
from tailseg.data.images import IMAGE_SUFFIXES, MAX_PIXELS, ImageTooLargeError
from tailseg.data.importers.foreign import AnnotatedImage, LeftOut, image_size
from tailseg.data.importers.layouts import Split, by_split, split_of_path
from tailseg.data.importers.path_ends import Parts, PathEnds
from tailseg.errors import UserError

T = TypeVar("T")
# Begin the names of folders of masks: Pascal VOC's, Supervisely's.
_MASKS = ("SegmentationClass", "SegmentationObject", "masks_human", "masks_instances", "masks_machine")


def _stem(name: str) -> str:
    """A name without suffix in the form in which it is compared."""
    return unicodedata.normalize("NFC", name)


def recognised(files: Iterable[Path], is_own: Callable[[Path], bool], kind: str, found: LeftOut) -> list[Path]:
    """The files that a reader takes; the others are counted as ``kind``."""
    taken: list[Path] = []
    for path in files:
        if is_own(path):
            taken.append(path)
        else:
            found.add(kind, str(path))
    return taken


class SourceImages:
    """Finds images, and counts what is odd about them: missing, broken, of another size, used twice, not used at all.

    Nothing outside of the source is found, whatever a file says.
    """

    def __init__(self, root: Path, found: LeftOut, entries: str) -> None:
        """Make one.

        Args:
            root: folder of the source.
            found: where odd things are counted.
            entries: that ask for an image each, as notes call them: "annotation files".
        """
        self.root = root
        self._tree = FileTree(root, also_inside=linked_folders(root))
        self._found = found
        self._entries = entries
        self._used: set[Path] = set()
        self._used_files: set[str] = set()  # without links on the way
        self._asked = 0
        self._faults: list[str] = []

    @cached_property
    def files(self) -> list[Path]:
        """All image files of the source."""
        out: list[Path] = []
        files = list(files_below(self.root, IMAGE_SUFFIXES, leave=out.append))
        self._found.add("links to folders outside of the source: not followed", *map(str, out))
        masks = {folder for folder in {path.parent for path in files} if self._has_masks(folder)}
        return [path for path in files if path.parent not in masks]

    def _has_masks(self, folder: Path) -> bool:
        return any(part.startswith(_MASKS) for part in folder.relative_to(self.root).parts)

    @cached_property
    def _by_name(self) -> PathEnds:
        return PathEnds(self.files, self.root)

    @cached_property
    def _by_stem_alone(self) -> PathEnds:
        return PathEnds(self.files, self.root, lambda path: _stem(path.stem))

    @cached_property
    def _by_stem(self) -> dict[tuple[Path, str], list[Path]]:
        stems: dict[tuple[Path, str], list[Path]] = {}
        for path in self.files:
            stems.setdefault((path.parent, _stem(path.stem)), []).append(path)
        return stems

    def stated(self, name: str, folders: Iterable[Path], where: str) -> Path | None:
        """The file of a name, also one with folders, relative to the first of ``folders`` where there is one.

        Raises:
            UserError: a link on its way leads out of the source.
        """
        for folder in folders:
            if parts_below(self.root, name, folder) is not None:
                path = self._tree.find(name, where, folder)
                if path is not None:
                    return path
        return None

    def of_stem(self, stem: str, folders: Iterable[Path]) -> Path | None:
        """The image file of a name without suffix, in the first of ``folders`` where there is one."""
        paths = next(filter(None, (self._by_stem.get((folder, _stem(stem))) for folder in folders)), None)
        return paths[0] if paths else None

    def anywhere(self, name: str, near: Path) -> Path | None:
        """The image file that agrees with a path in its last parts, the most of them; None if several do, or none.

        Of several, the one whose folders agree with more of those of the file that asks, in the folder ``near``:
        ``json/train/a.json`` means ``images/train/a.jpg``. A name without suffix stands for any.
        """
        ends, end, best = self._agreeing(name)
        return best[0] if len(best) == 1 else ends.nearest(end, best, near)

    def _agreeing(self, name: str) -> tuple[PathEnds, Parts, list[Path]]:
        """The image files that agree with a path in the most of its last parts, at least one; where they are kept."""
        *folders, last = name.split("/")
        above = tuple(map(alike, folders))
        for ends, own in ((self._by_name, alike(last)), (self._by_stem_alone, _stem(last))):
            for end, paths in ends.matching((*above, own)):
                return ends, end, paths
        return self._by_name, (), []

    def absence(self, name: str) -> str:
        """Why no image is found for a path: part of a sentence about it."""
        several = len(self._agreeing(name)[2])
        return f"may be any of {several} files in {self.root}" if several > 1 else f"is not in {self.root}"

    def use(
        self, path: Path, where: str, stated: tuple[int, int] | None, content: bytes | None = None
    ) -> tuple[int, int] | None:
        """The (height, width) of an image, which counts as used from now on; None, and counted, if it cannot be used.

        Args:
            path: as found by this object; or the one that an image without file of its own would have.
            where: the place that asks for it.
            stated: the size that it states there.
            content: of the image without file.
        """
        file = os.path.realpath(path)
        if file in self._used_files:
            self._found.add(f"{self._entries} for an image that is used already: left out", where)
            return None
        self._used.add(path)
        try:
            image_hw = image_size(path, where, stated, content)
        except UserError as error:
            self.fault(self._kind(path, where, content), str(error))
            return None
        self._asked += 1
        self._used_files.add(file)
        return image_hw

    def _kind(self, path: Path, where: str, content: bytes | None) -> str:
        """The kind of an image's fault."""
        try:
            image_size(path, where, None, content)
        except ImageTooLargeError:
            return f"{self._entries} whose image has too many pixels (the limit is {MAX_PIXELS:,}): left out"
        except UserError:
            return f"{self._entries} whose image cannot be read: left out"
        return f"{self._entries} that state another size than their image has: left out"

    def is_used(self, path: Path) -> bool:
        """Return whether an image of this path has been used."""
        return os.path.realpath(path) in self._used_files

    def missing(self, sentence: str) -> None:
        """Count that there is no image for a place; the sentence is that of `fault`."""
        self.fault(f"{self._entries} without image: left out", sentence)

    def fault(self, kind: str, sentence: str) -> None:
        """Count what has no image that can be used.

        Args:
            kind: for `LeftOut.add`.
            sentence: place and fault, which notes show, and behind a semicolon the fix, in case that most are so.
        """
        self._asked += 1
        self._faults.append(sentence)
        self._found.add(kind, sentence.rpartition("; ")[0])

    def read(
        self,
        told: Iterable[tuple[T, Split | None]],
        reader: Callable[[T], AnnotatedImage | None],
        place: Callable[[T], str] = str,
        name: Callable[[T], str] = str,
    ) -> dict[str, list[AnnotatedImage]]:
        """The images of each split, training first, which are those that can be read.

        Args:
            told: annotation files, or other places that describe an image each, and their splits.
            reader: of one; None if it has no image that can be used, which is counted already.
            place: of one, for notes.
            name: of one, or of its image: a path.

        Raises:
            UserError: more than half have no image that can be used.
        """
        told = list(told)
        parts, rest = by_split(told)
        self._found.add(
            f"{self._entries} in neither the training nor the validation split: left out", *map(place, rest)
        )
        read: dict[str, list[AnnotatedImage]] = {}
        for split, items in parts.items():
            read[split] = [image for image in map(reader, items) if image is not None]
        faults = len(self._faults)
        if 2 * faults > self._asked:
            share = f" ({faults:,} of {self._asked:,} {self._entries} are at fault)" if faults > 1 else ""
            raise UserError(self._faults[0] + share)
        empty = [str(image.path) for part in read.values() for image in part if not image.names]
        self._found.add("images without an object: kept, as images that show none of the classes", *empty)
        unused = [path for path in self.files if path not in self._used]
        real = {folder: os.path.realpath(folder) for folder in {path.parent for path in unused}}
        # Images that another path leads to, by a link to their folder.
        unused = [path for path in unused if os.path.join(real[path.parent], path.name) not in self._used_files]
        # Images whose annotations are left out, which is said already.
        told_of = {_stem(PurePosixPath(name(item)).stem) for item in rest}
        unused = [path for path in unused if _stem(path.stem) not in told_of]
        divided = {"train", "val"} <= {split for _, split in told}
        not_meant = ("test", None) if rest and divided else ("test",)
        unused = [path for path in unused if split_of_path(path, self.root) not in not_meant]
        self._found.add("images without annotation: left out", *map(str, unused))
        return read
