"""Video files: their frames one at a time, and a new file of drawn frames."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from tailseg.data.images import MAX_PIXELS
from tailseg.errors import UserError

# Read by OpenCV when it opens its first video: what FFmpeg has to say about a faulty one is told in a sentence.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ogv", ".3gp", ".mts")
USUAL_FPS = 25.0  # taken where a file does not state its own
# What video files begin with, at which byte; QuickTime's may have any of these first.
_BEGINNINGS = (
    *((4, box) for box in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")),
    *((0, mark) for mark in (b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x30\x26\xb2\x75")),  # Matroska, WMV
    *((0, b"\0\0\x01" + kind) for kind in (b"\xba", b"\xb3")),  # MPEG
)
_NO_VIDEO = "not a video that can be decoded; convert it to H.264 in an .mp4 file"
_SLACK = 0.05  # share of the frames that a container may state too many: some only estimate


@dataclass(frozen=True, slots=True)
class Video:
    """A video file that can be decoded; see `open_video`."""

    path: Path
    fps: float  # frames a second; `USUAL_FPS` where the file states none
    stated_frames: int  # 0 where the file does not say
    place: Path  # the absolute path: the same file wherever the program goes

    def frames(self) -> Iterator[Picture]:
        """The frames, each (H, W, 3) uint8 RGB, upright, decoded as they are asked for.

        A warning says so if the file ends before all frames came that it states.
        """
        count = 0
        capture = _open(self.place)
        try:
            while True:
                good, frame = capture.read()
                if not good:
                    break
                count += 1
                yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), dtype=np.uint8)
        finally:
            capture.release()
        if count < math.floor(self.stated_frames * (1 - _SLACK)):
            logger.warning(
                "%s: only the first %d of %d frames can be decoded; copy or convert it again",
                self.path, count, self.stated_frames,
            )  # fmt: skip


def is_video(path: Path) -> bool:
    """Return whether a name ends like a video's."""
    return path.name.lower().endswith(VIDEO_SUFFIXES)


def open_video(path: Path) -> Video:
    """A video file, known to be there and to have a first frame.

    Raises:
        UserError: it cannot be decoded.
    """
    capture = _open(path)
    try:
        good, _ = capture.read()
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        stated = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    if not good:
        raise UserError(f"{path}: no frame of the video can be decoded; convert it to H.264 in an .mp4 file")
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        logger.warning("%s: does not state its frames a second; taken as %g", path, USUAL_FPS)
        fps = USUAL_FPS
    frames = int(stated) if math.isfinite(stated) and 0 < stated < 1e9 else 0
    return Video(path, fps, frames, path.absolute())


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise UserError(f"{path}: no such video; check the path")
    if not _is_utf_8(str(path)):
        raise UserError(f"{path}: the name of a video must be UTF-8, and this is not; rename the file or its folder")
    if not _begins_like_a_video(path):
        raise UserError(f"{path}: {_NO_VIDEO}")
    with _quiet():
        # By its absolute name, in which FFmpeg sees no protocol, and by FFmpeg alone: another of OpenCV's readers takes
        # names for patterns of files.
        capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise UserError(f"{path}: {_NO_VIDEO}")
    pixels = capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
    if not pixels <= MAX_PIXELS:
        capture.release()
        raise UserError(
            f"{path}: the frames are too large ({pixels:,.0f} pixels, the limit is {MAX_PIXELS:,}); make them smaller"
        )
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
    return capture


def _is_utf_8(text: str) -> bool:
    """OpenCV ends the process over a name that is not."""
    try:
        os.path.abspath(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def _begins_like_a_video(path: Path) -> bool:
    """Return whether a file is in itself a video: FFmpeg takes lists of files for videos, too, and plays these."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise UserError(f"{path}: the video cannot be read ({error.strerror}); check its rights") from None
    # Each packet of an MPEG transport stream has 188 bytes and begins with G; cameras put four bytes before each.
    packets = any(head[at : at + 1] == head[at + step : at + step + 1] == b"G" for at, step in ((0, 188), (4, 192)))
    avi = head[:4] == b"RIFF" and head[8:11] == b"AVI"
    return packets or avi or any(head.startswith(mark, at) for at, mark in _BEGINNINGS)


@contextmanager
def _quiet() -> Iterator[None]:
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


class VideoFile:
    """A new .mp4 file (MPEG-4 Part 2), which has the size of its first frame. As a context, it closes the file.

    The writer tells of no fault, of a full disk for instance. So the file is ``STEM.partial.mp4`` until the block ends
    and all frames are found in it; otherwise that is a UserError, and what stood at ``path`` is left.

    Args:
        path: of the file; what is there is replaced.
        fps: frames a second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self._partial = path.with_name(f"{path.stem}.partial.mp4")
        self._writer: cv2.VideoWriter | None = None
        self._frames = 0

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        if self._is_whole():
            os.replace(self._partial, self.path)
            return
        self._partial.unlink(missing_ok=True)
        if kind is None:
            raise self._unwritten()

    def _is_whole(self) -> bool:
        try:
            return open_video(self._partial).stated_frames == self._frames
        except UserError:
            return False

    def _unwritten(self) -> UserError:
        return UserError(f"{self.path}: the video could not be written; make room or choose another --out")

    def add(self, frame: Picture) -> None:
        """Append a frame (H, W, 3) uint8 RGB; an odd side gets a row or column more, as the format wants even ones.

        Raises:
            UserError: the file cannot be written.
        """
        height, width = frame.shape[:2]
        even = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            self._writer = self._begin((even.shape[1], even.shape[0]))
        with _quiet():  # of a full disk OpenCV would print a line a frame; it is told at the end
            self._writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
        self._frames += 1

    def _begin(self, size: tuple[int, int]) -> cv2.VideoWriter:
        with _quiet():
            code = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(os.path.abspath(self._partial), cv2.CAP_FFMPEG, code, self.fps, size)
        if not writer.isOpened():
            raise self._unwritten()
        return writer
