"""Files and folders written whole, and faults of the disk that name their file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tailseg.errors import UserError


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


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block ends well and vanishes when it does not.

    Raises:
        UserError: ``out`` is not empty or cannot be made.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already and is not empty; name a new folder or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"no folder can be made at {out}: {error.strerror}; choose another place") from None
    try:
        content = scratch / "content"  # unlike the scratch folder itself, readable for others
        content.mkdir()
        yield content
        if out.is_dir():
            out.rmdir()  # empty, as was seen; Windows puts nothing in the place of a folder
        content.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
