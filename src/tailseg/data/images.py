"""Image files: the one place that opens them, with their size, orientation and pixels."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tailseg.errors import UserError

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB

# Pillow's other formats are left out: EPS would start Ghostscript, and icons, films and maps are no photographs.
# TGA, which has no mark at its beginning, is tried last.
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA"),
)  # fmt: skip
MAX_PIXELS = 178_956_970  # of an image: twice `PIL.Image.MAX_IMAGE_PIXELS`, from where on Pillow refuses to decode

Image.init()  # registers all formats with their suffixes
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from half of MAX_PIXELS on
# A Pillow without libavif has no AVIF; MPO is opened as JPEG.
_OPENED = tuple(name for name in FORMATS if name in Image.OPEN)
# ".jpg", ".png", ...: all that Pillow knows for these formats, in lower case.
IMAGE_SUFFIXES = tuple(suffix for name in FORMATS for suffix, owner in Image.EXTENSION.items() if owner == name)

MOST_SCANS = 500  # of a JPEG: each of its scans, of which a few bytes are enough, takes as long as all of its pixels
_SCAN, _END = 0xDA, 0xD9
# A marker of JPEG that a length follows, or its end: none of those within pixels.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")

EDGE = 4096  # bytes at the end of a file that are looked at, for what a complete file of its format has there
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_FLOATS = "the pixels are floating point numbers; save the image with 8 bits a channel"
_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 0x0102, 0x0153  # tags of TIFF
_SIGNED = 2  # value of the latter
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Beginnings of PNG chunks that may hold an orientation, behind the length: type, and keyword of a text.
_PNG_ORIENTED = re.compile(rb"eXIf|[tzi][ET]Xt(?:Raw profile type exif|XML:com\.adobe\.xmp)\0")


class ImageTooLargeError(UserError):
    """An image has more than `MAX_PIXELS` pixels."""


class _ManyScansError(ValueError):
    """A JPEG has more than `MOST_SCANS`."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The beginning of an image file, known without decoding its pixels."""

    format: str  # one of `FORMATS`
    stored_hw: tuple[int, int]  # pixels, as they are decoded
    orientation: int  # EXIF's, 1 to 8, still to be applied to the decoded pixels

    @property
    def shown_hw(self) -> tuple[int, int]:
        """The size after the camera's orientation is applied."""
        return self.stored_hw[::-1] if self.orientation >= 5 else self.stored_hw


def read_header(path: Path, file: IO[bytes] | None = None) -> ImageHeader:
    """Format, size and orientation of an image file.

    Args:
        path: of the file, for messages; read unless ``file`` is given.
        file: the file itself, if it is open already; it stays open, at any position.

    Raises:
        UserError: the file is missing, empty, a folder, no image, or one of floating point numbers.
        ImageTooLargeError: it has too many pixels.
    """
    try:
        if file is None:
            with path.open("rb") as opened:
                return read_header(path, opened)
        with Image.open(file, formats=_OPENED) as image:
            if image.mode == "F":
                raise UserError(f"{path}: {_FLOATS}")
            stored_hw = (image.height, image.width)
            if image.format != "PNG" or "exif" in image.info or _may_turn_behind_pixels(file):
                return ImageHeader(image.format or "", stored_hw, orientation_of(image))
            # Asked for EXIF that it has not met, Pillow's PNG decodes all pixels to look behind them. None is there.
            return ImageHeader(image.format, stored_hw, _stated_orientation(Image.Image.getexif(image)))
    except Exception as error:
        raise _fault(path, error) from None


def require_whole(path: Path, header: ImageHeader, content: bytes | None = None) -> None:
    """Raise UserError for an image file that is cut off; those that do not end as their format wants are decoded.

    ``content`` is that of an image that is no file of its own.
    """
    with path.open("rb") if content is None else BytesIO(content) as file:
        file.seek(max(file.seek(0, os.SEEK_END) - EDGE, 0))
        if ENDS.get(header.format, b"") in file.read():
            return
    if content is None:
        decode(path)
    else:
        read_content(content, str(path))


def orientation_of(image: Image.Image) -> int:
    """The turn, 1 to 8 as EXIF counts them, by which an image has to be turned to stand as people see it.

    It is 1 for a TIFF: Pillow turns it on decoding, and states the turned size before.
    """
    return 1 if image.format == "TIFF" else _stated_orientation(image.getexif())


def _stated_orientation(exif: Image.Exif) -> int:
    stated = exif.get(_ORIENTATION, 1)
    return stated if stated in _TURNS else 1


def _may_turn_behind_pixels(file: IO[bytes]) -> bool:
    """Return whether a PNG has a chunk behind its pixels that may hold an orientation; nothing is decoded."""
    place, behind = 8, False
    while True:
        file.seek(place)
        head = file.read(40)
        kind = head[4:8]
        if len(kind) < 4 or kind == b"IEND":
            return False
        if behind and _PNG_ORIENTED.match(head, 4):
            return True
        behind |= kind == b"IDAT"
        place += 12 + int.from_bytes(head[:4], "big")


def page_count(path: Path) -> int:
    """Pages or frames of an image file, of which only the first is read; previews in a JPEG, as of phones, are none."""
    try:
        with path.open("rb") as file, Image.open(file, formats=_OPENED) as image:
            return 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))
    except Exception:  # of many types, by files that are told as faulty when they are read
        return 1


def read_image(path: Path, name: Path | str | None = None) -> Pixels:
    """An image file as (H, W, 3) uint8 RGB; see `to_rgb`. Of several frames or pages it is the first.

    Args:
        path: of the file.
        name: opens the sentences of errors; by default the path.

    Raises:
        UserError: the file is missing, empty, a folder, broken, cut off or no image; or see `to_rgb`.
        ImageTooLargeError: it has too many pixels.
    """
    return to_rgb(decode(path, name=name)[0], path if name is None else name, upright=True)


def decode(path: Path, reduction: int = 1, name: Path | str | None = None) -> tuple[Image.Image, int]:
    """The decoded image, in the mode and orientation of the file, and by how much it is reduced.

    That is ``reduction`` (1, 2, 4 or 8) for a JPEG whose sides are multiples of it, else 1.

    Raises:
        UserError: the file is missing, empty, a folder, broken, cut off or no image.
        ImageTooLargeError: it has too many pixels.
    """
    try:
        # Opened as a file: by its name, Pillow would map some formats, and garble grey TIFFs that are to be turned.
        with path.open("rb") as file:
            return _decoded(file, reduction)
    except Exception as error:
        raise _fault(path, error, name=name) from None


def read_content(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The content of an image file as (H, W, 3) uint8 RGB, exactly as `read_image` reads the file.

    Args:
        content: the bytes of the file.
        name: opens the sentences of errors.
        max_pixels: of the image, at most `MAX_PIXELS`; one with more is not decoded.

    Raises:
        UserError, ImageTooLargeError: as in `read_image`.
    """
    if not content:
        raise UserError(f"{name}: there are no bytes in it; give those of a JPEG or PNG file")
    try:
        image, _ = _decoded(BytesIO(content), 1, max_pixels)
    except Exception as error:
        raise _fault(name, error, max_pixels) from None
    return to_rgb(image, name, upright=True)


def _decoded(file: IO[bytes], reduction: int, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, int]:
    with Image.open(file, formats=_OPENED) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise Image.DecompressionBombError(f"{width * height} pixels")
        if image.format in ("JPEG", "MPO"):
            file.seek(0)
            _require_few_scans(file.read())
        if reduction > 1 and width % reduction == 0 and height % reduction == 0:
            image.draft(None, (width // reduction, height // reduction))
        image.load()
        return image, width // image.width


def _require_few_scans(content: bytes) -> None:
    """Raise _ManyScansError if a JPEG has more than `MOST_SCANS`."""
    if content.count(b"\xff\xda") <= MOST_SCANS:  # also in what is no scan: a small picture in it, a film behind it
        return
    scans = place = 0
    while (marker := _MARKER.search(content, place)) and marker[1][0] != _END:
        place = marker.end()
        place += int.from_bytes(content[place : place + 2], "big")
        scans += marker[1][0] == _SCAN
        if scans > MOST_SCANS:
            raise _ManyScansError


def open_content(content: bytes, kind: str) -> Image.Image:
    """The image that some bytes are, in a format of `FORMATS`; its pixels are not decoded yet.

    Raises:
        Exception: of many types, if it is none.
    """
    return Image.open(BytesIO(content), formats=[kind])


def to_rgb(image: Image.Image, path: Path | str, *, upright: bool) -> Pixels:
    """A Pillow image of any mode as (H, W, 3) uint8 RGB, which may be written to.

    Transparent pixels are shown on white. Greyscale of 9 to 16 bits keeps its upper 8 bits. Greyscale of 32 bits has
    no known largest value: it is scaled so that the image's own becomes 255; values below 0 count as 0.

    Args:
        image: of any mode.
        path: names it in errors.
        upright: apply the camera's orientation.

    Raises:
        UserError: its pixels are floating point numbers.
    """
    turn = _TURNS.get(orientation_of(image)) if upright else None
    if image.mode == "F":
        raise UserError(f"{path}: {_FLOATS}")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        image = Image.fromarray(_grey_of_8_bits(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(
        image if image.mode == "RGB" else image.convert("RGB")
    )  # a copy: torch wants memory that can be written to


def fitted_size(
    image_hw: tuple[int, int], short: int, long: int, within: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The largest (height, width) of the same shape with sides of at most ``short`` and ``long`` pixels.

    factor = min(long / max(h, w), short / min(h, w)); a side becomes int(side · factor + 0.5), at least 1. ``within``
    is a height and a width that are not exceeded either.
    """
    height, width = image_hw
    factor = min(long / max(height, width), short / min(height, width))
    if within is not None:
        factor = min(factor, within[0] / height, within[1] / width)
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def _grey_of_8_bits(image: Image.Image) -> Pixels:
    """Greyscale of more than 8 bits, in whole numbers, as (H, W) uint8."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if image.mode == "I" and not tags and image.format not in ("PNG", "PPM"):
        bits = 32  # from memory
    values = np.asarray(image)
    if bits <= 16:
        return np.asarray((values >> (bits - 8)).clip(0, 255), np.uint8)
    if tags and tags.get(_SAMPLE_FORMAT, (1,))[0] != _SIGNED:
        values = values.view(np.uint32)
    grey = values.clip(0).astype(np.int64)
    return np.asarray(grey * 255 // max(int(grey.max()), 1), np.uint8)


def _fault(
    path: Path | str, error: Exception, max_pixels: int = MAX_PIXELS, name: Path | str | None = None
) -> Exception:
    """The user's error that a failure to open or decode a file stands for; Pillow's decoders raise many types."""
    name = path if name is None else name
    if isinstance(error, UserError | MemoryError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UserError(f"{name}: no such image; check the path")
    if isinstance(path, Path) and os.path.isdir(path):  # unlike `Path.is_dir`, it never raises
        return UserError(f"{name}: it is a folder; give an image file")
    if isinstance(error, OSError) and error.errno:  # Pillow's own have none
        return UserError(f"{name}: the image cannot be read ({error.strerror}); check the path and its rights")
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        found = f"{int(pixels[0]):,} pixels" if pixels else str(error)
        return ImageTooLargeError(
            f"{name}: the image is too large ({found}, the limit is {max_pixels:,}); shrink it or cut it into pieces"
        )
    if isinstance(error, _ManyScansError):
        scans = f"more than {MOST_SCANS} scans of its pixels, which would take too long to decode"
        return UserError(f"{name}: the JPEG file has {scans}; save it again with another program")
    if isinstance(error, UnidentifiedImageError):
        empty = isinstance(path, Path) and path.is_file() and path.stat().st_size == 0
        problem = "the file is empty" if empty else "not an image that can be read"
        return UserError(f"{name}: {problem}; replace it by a JPEG or PNG file")
    message = f"{name}: the image is broken or cut off ({error}); copy or download it again"
    return UserError(message.replace("\n", " "))
