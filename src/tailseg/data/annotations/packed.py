"""Files that may be packed with gzip, unpacked within bounds: a megabyte of them can hold a gigabyte of zeros."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import IO, cast

from tailseg.errors import UserError

FREE = 64 << 20  # bytes unpacked of any file
EXPANSION = 200  # and times its size of a larger one: annotations and results shrink to a fourth or a twentieth
MARK = b"\x1f\x8b"  # that gzip files begin with


def open_unpacked(path: Path) -> IO[bytes]:
    """The content of a file, unpacked if it is packed, whatever its name; closing it closes the file.

    Reading raises OSError, EOFError or zlib.error where the file is damaged, and UserError where it unpacks to more
    than `FREE` bytes and more than `EXPANSION` times its size.
    """
    file = path.open("rb", buffering=0)
    packed = file.read(len(MARK)) == MARK
    file.seek(0)
    return cast("IO[bytes]", _Bounded(path, file) if packed else file)


class _Bounded(gzip.GzipFile):
    """A gzip file that ends in an error where it grows too large."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        super().__init__(fileobj=file, mode="rb")
        self.myfileobj = file  # type: ignore[assignment]  # closed with this
        self._path = path
        self._most = max(FREE, EXPANSION * os.fstat(file.fileno()).st_size)

    def read(self, size: int | None = -1) -> bytes:
        left = self._most + 1 - self.tell()
        content = super().read(left if size is None or size < 0 else min(size, left))
        if self.tell() > self._most:
            raise UserError(
                f"{self._path}: unpacks to more than {self._most >> 20:,} MB, over {EXPANSION} times its size, "
                "which no annotations do; unpack it yourself if you trust it"
            )
        return content
