"""Checks of the image files themselves: readable, of the stated size, turned by EXIF, the same as another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.dataset import DetectionDataset
from tailseg.data.diagnosis.jpeg_checks import data_run_out
from tailseg.data.diagnosis.near_duplicates import Thumbnail, thumbnail_of
from tailseg.data.images import EDGE, ENDS, ImageHeader, ImageTooLargeError, decode, read_header, to_rgb
from tailseg.data.transforms import Compose
from tailseg.errors import UserError
from tailseg.threads import usable_cores

T = TypeVar("T")
DECODED = 2000  # images of the sample that is decoded in full; the header and the end of all are read
NO_HEADER = ImageHeader("", (0, 0), 1)  # of a file that has a problem


@dataclass(frozen=True, slots=True, eq=False)
class PixelFacts:
    """Facts about an image that only decoding tells."""

    levels: int  # between the smallest and the largest value of its RGB, 0 to 255
    deep: bool  # greyscale of more than 8 bits in the file
    thumbnail: Thumbnail
    run_out: bool = False  # a JPEG whose data end before its last pixels


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Facts about an image file, most of them known without decoding it."""

    path: Path | None  # None: not found
    problem: str | None = None  # a sentence, if it is missing or broken
    too_large: bool = False  # the problem is its number of pixels
    header: ImageHeader = NO_HEADER
    fingerprint: bytes = b""  # of its length and both ends
    complete: bool = True  # it ends as its format wants; if not, only decoding tells
    pixels: PixelFacts | None = None  # None: not decoded


def file_facts(annotations: Annotations, image: int) -> FileFacts:
    """Look at the file of the ``image``-th image."""
    try:
        path = annotations.image_path(image)
    except UserError as error:
        return FileFacts(None, str(error))
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(EDGE)  # with the other end, the file's fingerprint
            file.seek(max(size - EDGE, 0))
            tail = file.read()
            header = read_header(path, file)
    except OSError as error:
        return FileFacts(path, f"{path}: the image cannot be read ({error.strerror}); check the path and its rights")
    except UserError as error:
        return _unreadable(path, error)
    fingerprint = hashlib.blake2b(size.to_bytes(8, "little") + head + tail, digest_size=16).digest()
    complete = ENDS.get(header.format, b"") in tail
    return FileFacts(path, header=header, fingerprint=fingerprint, complete=complete)


def _unreadable(path: Path, error: UserError) -> FileFacts:
    return FileFacts(path, str(error), too_large=isinstance(error, ImageTooLargeError))


def look_at_files(annotations: Annotations, advance: Callable[[int], None]) -> list[FileFacts]:
    """The facts of all files, read by threads; then a sample, and all that look cut off, decoded in full."""
    with ThreadPoolExecutor(_threads()) as pool:
        found = list(_counted(pool.map(lambda i: file_facts(annotations, i), range(len(annotations))), advance))
        sample = np.random.default_rng(0).permutation(len(found))[:DECODED].tolist()
        doubtful = [i for i, facts in enumerate(found) if not facts.complete]
        chosen = [i for i in sorted({*sample, *doubtful}) if found[i].problem is None]
        decoded = pool.map(lambda i: _with_pixels(found[i]), chosen)
        for image, facts in zip(chosen, _counted(decoded, advance, len(found)), strict=True):
            found[image] = facts
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
    pool = ThreadPoolExecutor(_threads())
    try:
        looked = _counted(pool.map(lambda i: file_facts(annotations, i), images.tolist()), advance)
        for image, facts in zip(images.tolist(), looked, strict=True):
            stated = tuple(annotations.image_sizes[image].tolist())
            if facts.problem or not facts.complete or stated not in (facts.header.shown_hw, facts.header.stored_hw):
                whole[image]
    finally:
        pool.shutdown(cancel_futures=True)  # a fault is told at once, whatever is still to be looked at


def steps(annotations: Annotations) -> int:
    """About how often `look_at_files` advances."""
    return len(annotations) + min(len(annotations), DECODED)


def _threads() -> int:
    return min(16, 2 * usable_cores())


def _counted(items: Iterable[T], advance: Callable[[int], None], start: int = 0) -> Iterator[T]:
    for done, item in enumerate(items, start=start + 1):
        advance(done)
        yield item


def _with_pixels(facts: FileFacts) -> FileFacts:
    """The facts of a file and of its pixels, or what is wrong with them."""
    assert facts.path is not None
    try:
        image, _ = decode(facts.path)
        pixels = to_rgb(image, facts.path, upright=True)
        run_out = data_run_out(facts.path, image)
    except OSError as error:
        return replace(facts, problem=f"{facts.path}: the image cannot be read ({error.strerror}); check the path")
    except UserError as error:
        return _unreadable(facts.path, error)
    levels = int(pixels.max()) - int(pixels.min())
    return replace(facts, pixels=PixelFacts(levels, image.mode.startswith("I"), thumbnail_of(pixels), run_out))


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
