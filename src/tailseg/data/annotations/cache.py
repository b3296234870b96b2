"""The cache of parsed annotation files: one file each, whose columns are mapped into memory.

It is found by the content of the annotation file, so that a changed file is parsed again and a copied one is not.
A second, small file remembers the content that a path had, as long as size, times and inode of the path stay as they
were. Cache files are written under another name and moved into place whole; several processes that parse at once
write the same bytes. What is read is checked: the header by its hash, the columns by their size and their hashes.

    8 bytes  magic: name and version of the format
    8 bytes  length of the header
    16 bytes hash of the header
    header   JSON: columns (name, type, shape, place, hash), their bytes, categories, report
    columns  each at a multiple of 64 bytes
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from tailseg.data.annotations.filtering import Report
from tailseg.data.annotations.oddities import Oddity
from tailseg.data.annotations.parsing import Category, Parsed, parse
from tailseg.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 6  # raise it when the columns or what is dropped from them change
SMALLEST = 16 << 20  # bytes of a file worth a cache: smaller ones are parsed in a fraction of a second
KEPT_DAYS = 30  # a cache that was not opened for longer goes when another is written
_MAGIC = b"tailseg" + bytes([VERSION])
_ALIGNMENT = 64
_ROW = 1 << 16  # bytes hashed at once: they stay in the processor's cache
_ODD = np.uint64(0x9E3779B97F4A7C15)
_SETTLED = 1.0  # seconds: a file younger than this may change without its times showing it


@dataclass(frozen=True, slots=True)
class Stored(Parsed):
    """A parsed file, and the cache that its columns are mapped from, if they are."""

    cache: Path | None


class _NotUsableError(Exception):
    """A cache file is not there, of another version, cut off or changed."""


def cache_folder() -> Path:
    """Folder of everything that can be made again: ``$TAILSEG_CACHE``, else ``~/.cache/tailseg``."""
    root = os.environ.get("TAILSEG_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "tailseg"


def stored_columns(path: Path, *, masks: bool = True, tolerant: bool = False) -> Stored:
    """The columns of an annotation file, from the cache where it has them.

    Where the cache cannot be written, the columns are arrays in memory and a warning says so. A file that is read
    without its ``masks``, or has errors and is read though (``tolerant``, see `parse`), is not cached.

    Raises:
        UserError: the annotation file is missing, broken or contradicts itself.
    """
    try:
        before = path.stat()
        if before.st_size < SMALLEST or not masks:
            return _in_memory(_parsed(path, masks, tolerant))
        folder = cache_folder() / "annotations"
        stamp = folder / (hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest() + ".stamp")
        cache = folder / f"{_remembered(stamp, before) or content_key(path)}.columns"
    except OSError:
        return _in_memory(_parsed(path, masks, tolerant))  # which says what is wrong with the file
    with contextlib.suppress(_NotUsableError, OSError):
        stored = _open(cache)
        _remember(stamp, before, cache.stem)
        return stored
    logger.info("%s: reading the annotations for the first time; this takes some seconds.", path)
    parsed = _parsed(path, masks, tolerant)
    if _identity(path.stat()) != _identity(before):
        raise UserError(f"{path}: the file changed while it was read; try again when it is complete")
    if any(oddity.about.severity == "error" for oddity in parsed.report.oddities):
        return _in_memory(parsed)
    try:
        _write(cache, parsed)
        stored = _open(cache)
    except (OSError, _NotUsableError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning(
            "%s: annotations cannot be cached there (%s): they stay in memory and are parsed again next time.",
            folder, reason,
        )  # fmt: skip
        return _in_memory(parsed)
    _remember(stamp, before, cache.stem)
    return stored


def mapped_columns(cache: Path) -> dict[str, NDArray[Any]]:
    """The columns of a cache file that this process, or the one it came from, has opened before."""
    try:
        return _map(cache)[1]
    except (_NotUsableError, OSError):
        raise UserError(f"{cache}: the cached annotations are gone or broken; start again to rebuild them") from None


def content_key(path: Path) -> str:
    """A name for the content of a file, and for how we read it."""
    digest = hashlib.blake2b(_MAGIC, digest_size=16)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _parsed(path: Path, masks: bool, tolerant: bool) -> Parsed:
    """The file's content, read without looking for garbage: there are millions of objects and no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return parse(path, masks=masks, tolerant=tolerant)
    finally:
        if enabled:
            gc.enable()


def _in_memory(parsed: Parsed) -> Stored:
    return Stored(parsed.columns, parsed.categories, parsed.frequency_stated, parsed.report, cache=None)


# ---------------------------------------------------------------------------------------------------------
# What a path held


def _identity(status: os.stat_result) -> list[int]:
    """Properties that change when a file does: size, times (of content and of inode, in ns), inode and device."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _remembered(stamp: Path, status: os.stat_result) -> str | None:
    """The content key of a path, if the path has not changed since it was written down."""
    try:
        row = orjson.loads(stamp.read_bytes())
        known, key = row["identity"], row["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = known == _identity(status) and isinstance(key, str) and key.isalnum()
    return key if sound else None


def _remember(stamp: Path, status: os.stat_result, key: str) -> None:
    """Write down what a path holds, unless it was changed just now and may be changing still."""
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED and _remembered(stamp, status) != key:
        with contextlib.suppress(OSError), _replacing(stamp) as file:
            file.write(orjson.dumps({"identity": _identity(status), "key": key}))


# ---------------------------------------------------------------------------------------------------------
# One cache file


def _write(cache: Path, parsed: Parsed) -> None:
    """Put a cache file in place, whole or not at all, and remove those that nobody uses."""
    columns, place = [], 0
    arrays = {name: np.ascontiguousarray(array) for name, array in parsed.columns.items()}
    for name, array in arrays.items():
        about = {"name": name, "type": array.dtype.str, "shape": array.shape, "place": place}
        columns.append(about | {"hash": hash_of(array.reshape(-1).view(np.uint8))})
        place += _padded(array.nbytes)
    content = {
        "columns": columns,
        "bytes": place,
        "categories": [asdict(category) for category in parsed.categories],
        "frequency_stated": parsed.frequency_stated,
        "report": asdict(parsed.report),
    }
    header = orjson.dumps(content)
    start = _MAGIC + len(header).to_bytes(8, "little") + hashlib.blake2b(header, digest_size=16).digest() + header
    cache.parent.mkdir(parents=True, exist_ok=True)
    _remove_unused(cache.parent)
    with _replacing(cache) as file:
        file.write(start.ljust(_padded(len(start)), b"\0"))
        for array in arrays.values():
            file.write(array.reshape(-1).view(np.uint8).data)
            file.write(bytes(_padded(array.nbytes) - array.nbytes))


def _open(cache: Path) -> Stored:
    """The content of a cache file, checked."""
    content, columns, body = _map(cache)
    for column in content["columns"]:
        size = columns[column["name"]].nbytes
        if hash_of(body[column["place"] : column["place"] + _padded(size)]) != column["hash"]:
            raise _NotUsableError("its content has changed")
    with contextlib.suppress(OSError):
        os.utime(cache)  # it is in use
    categories = tuple(Category(**row) for row in content["categories"])
    return Stored(columns, categories, content["frequency_stated"], _report(content["report"]), cache=cache)


def _report(row: dict[str, Any]) -> Report:
    oddities = (Oddity(odd["kind"], odd["count"], tuple(odd["places"])) for odd in row["oddities"])
    return Report(**{**row, "oddities": tuple(oddities)})


def _map(cache: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]], NDArray[np.uint8]]:
    """The header, the columns and all bytes of the columns of a cache file; its header and size are checked."""
    with cache.open("rb") as file:
        try:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except ValueError:
            raise _NotUsableError("it is empty") from None
    length = int.from_bytes(mapped[8:16].tobytes(), "little")
    header = mapped[32 : 32 + length].tobytes()
    sound = mapped[:8].tobytes() == _MAGIC
    if not sound or hashlib.blake2b(header, digest_size=16).digest() != mapped[16:32].tobytes():
        raise _NotUsableError("its header is broken")
    content = orjson.loads(header)
    body = mapped[_padded(32 + length) :]
    if len(body) != content["bytes"]:
        raise _NotUsableError("it is cut off")
    columns = {}
    for column in content["columns"]:
        kind, shape = np.dtype(column["type"]), tuple(column["shape"])
        stop = column["place"] + kind.itemsize * int(np.prod(shape, dtype=np.int64))
        columns[column["name"]] = body[column["place"] : stop].view(kind).reshape(shape)
    return content, columns, body


def hash_of(values: NDArray[np.uint8]) -> str:
    """A hash of bytes, nearly as fast as they can be read; zeros behind them, up to a multiple of 64, change nothing.

    They are laid out in rows of 64-bit numbers, and each place of a row is hashed down the rows. Each step can be
    undone, so a changed number changes the hash; the step also brings the upper bits down, so an exchange of two does.
    """
    whole = len(values) // _ROW * _ROW
    last = np.zeros(_ROW, np.uint8)
    last[: len(values) - whole] = values[whole:]
    state = np.full(_ROW // 8, _ODD)
    upper = np.empty_like(state)
    for row in (*values[:whole].view(np.uint64).reshape(-1, _ROW // 8), last.view(np.uint64)):
        np.bitwise_xor(state, row, out=state)
        np.multiply(state, _ODD, out=state)
        np.right_shift(state, np.uint64(32), out=upper)
        np.bitwise_xor(state, upper, out=state)
    return hashlib.blake2b(state.data, digest_size=16).hexdigest()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when all of it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _remove_unused(folder: Path) -> None:
    """Delete caches, and pieces left by processes that were killed, which nobody touched for a month."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - KEPT_DAYS * 24 * 3600:
                path.unlink()
