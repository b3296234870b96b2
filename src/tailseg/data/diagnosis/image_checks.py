"""Checks of the image files themselves: readable, of the stated size, turned by EXIF, the same as another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.dataset import DetectionDataset, read_image
from tailseg.data.importers.foreign import ORIENTATION
from tailseg.data.transforms import Compose
from tailseg.errors import UserError

T = TypeVar("T")
DECODED = 2000  # images of the sample that is decoded in full; the header and the end of all are read
EDGE = 4096  # bytes at either end of a file that make its fingerprint
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what a complete file has near its end


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Facts about an image file that are known without decoding it."""

    path: Path | None  # None: not found
    problem: str | None = None  # a sentence, if it is missing or broken
    stored_hw: tuple[int, int] = (0, 0)
    orientation: int = 1  # EXIF's, 1 to 8
    fingerprint: bytes = b""  # of its length and both ends
    complete: bool = True  # it ends as its format wants; if not, only decoding tells

    @property
    def shown_hw(self) -> tuple[int, int]:
        """The size after the camera's orientation is applied."""
        return self.stored_hw[::-1] if self.orientation in (5, 6, 7, 8) else self.stored_hw


def file_facts(annotations: Annotations, image: int) -> FileFacts:
    """Look at the file of the ``image``-th image."""
    try:
        path = annotations.image_path(image)
    except UserError as error:
        return FileFacts(None, str(error))
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(EDGE)
            file.seek(max(size - EDGE, 0))
            tail = file.read()
            file.seek(0)
            with Image.open(file) as opened:
                # Asked for EXIF that it has not met yet, Pillow decodes a whole PNG to look behind the pixels.
                known = opened.format != "PNG" or "exif" in opened.info
                turned = opened.getexif().get(ORIENTATION, 1) if known else 1
                stored, end = (opened.height, opened.width), ENDS.get(opened.format or "", b"")
    except Exception as error:  # Pillow's readers raise many types on broken files
        reason = "the file is empty" if path.is_file() and path.stat().st_size == 0 else f"cannot be read ({error})"
        return FileFacts(path, f"{path}: {reason}; replace it".replace("\n", " "))
    fingerprint = hashlib.blake2b(size.to_bytes(8, "little") + head + tail, digest_size=16).digest()
    return FileFacts(path, None, stored, turned if turned in range(1, 9) else 1, fingerprint, end in tail)


def look_at_files(annotations: Annotations, advance: Callable[[int], None]) -> list[FileFacts]:
    """The facts of all files, read by threads; then a sample, and all that look cut off, decoded in full."""
    with ThreadPoolExecutor(_threads()) as pool:
        found = list(_counted(pool.map(lambda i: file_facts(annotations, i), range(len(annotations))), advance))
        sample = np.random.default_rng(0).permutation(len(found))[:DECODED].tolist()
        doubtful = [i for i, facts in enumerate(found) if not facts.complete]
        chosen = [i for i in sorted({*sample, *doubtful}) if found[i].problem is None]
        decoded = pool.map(lambda i: _decoding_problem(found[i]), chosen)
        for image, problem in zip(chosen, _counted(decoded, advance, len(found)), strict=True):
            if problem:
                found[image] = FileFacts(found[image].path, problem)
    return found


def require_sound_files(
    annotations: Annotations, *, at_most: int | None = None, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Raise the UserError with which training or evaluation would stop at an image file.

    Looks at the header and both ends of every file. Those that cannot be read, look cut off or have another size than
    stated are opened as training opens them, in the file's order; that decides. A fault in the middle of a file is
    not found.

    Args:
        annotations: whose images all exist.
        at_most: look at this many images, drawn at random but the same ones each time.
        advance: called with the number of files looked at.
    """
    images = np.random.default_rng(0).permutation(len(annotations))[:at_most]
    images.sort()
    whole = DetectionDataset(annotations, Compose(()), drop_empty=False, with_objects=False)
    with ThreadPoolExecutor(_threads()) as pool:
        looked = _counted(pool.map(lambda i: file_facts(annotations, i), images.tolist()), advance)
        for image, facts in zip(images.tolist(), looked, strict=True):
            stated = tuple(annotations.image_sizes[image].tolist())
            if facts.problem or not facts.complete or stated not in (facts.shown_hw, facts.stored_hw):
                whole[image]


def steps(annotations: Annotations) -> int:
    """About how often `look_at_files` advances."""
    return len(annotations) + min(len(annotations), DECODED)


def _threads() -> int:
    return min(16, 2 * (os.cpu_count() or 1))


def _counted(items: Iterable[T], advance: Callable[[int], None], start: int = 0) -> Iterator[T]:
    for done, item in enumerate(items, start=start + 1):
        advance(done)
        yield item


def _decoding_problem(facts: FileFacts) -> str | None:
    assert facts.path is not None
    try:
        read_image(facts.path)
    except UserError as error:
        return str(error)
    return None


def same_content(groups: dict[str, list[FileFacts]]) -> dict[bytes, list[tuple[str, int]]]:
    """Files with equal bytes: digest -> (split, image), only digests of more than one file.

    Fingerprints find the candidates; only these are read in full.
    """
    candidates: dict[bytes, list[tuple[str, int]]] = {}
    for split, files in groups.items():
        for image, facts in enumerate(files):
            if facts.fingerprint:
                candidates.setdefault(facts.fingerprint, []).append((split, image))
    equal: dict[bytes, list[tuple[str, int]]] = {}
    for places in candidates.values():
        if len(places) > 1:
            for split, image in places:
                path = groups[split][image].path
                assert path is not None
                with path.open("rb") as file:
                    equal.setdefault(hashlib.file_digest(file, "sha256").digest(), []).append((split, image))
    return {digest: places for digest, places in equal.items() if len(places) > 1}
