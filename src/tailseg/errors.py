"""The one exception that is the user's to fix; files written whole, and faults of the disk that name their file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(ValueError):
    """Input is at fault: the message is one sentence that names the file, the place and the fix.

    The command line prints the message on stderr, without a traceback, and exits with code 1.
    """


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While a file is written, an OSError that names none (a full disk) gets its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, all or nothing: beside its place, from where it is moved there when complete.

    So a full disk or a killed process leaves what stood there. What is no file, such as ``/dev/stdout``, is written
    to as it is. Text is written in UTF-8.

    Raises:
        OSError: it cannot be written; it names ``path``.
    """
    data = content.encode() if isinstance(content, str) else content
    place = path.resolve()  # what a link leads to
    if place.exists() and not place.is_file():
        with writing(path):
            path.write_bytes(data)
        return
    part = place.with_name(f".{place.name[:50]}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, place)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
