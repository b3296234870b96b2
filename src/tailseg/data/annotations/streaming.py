"""Reads the lists of a JSON file piece by piece: a file of many gigabytes never stands in memory as objects.

A block of bytes is searched for the places where an element of the list ends, with numpy: brackets outside of
strings, and their depth. What lies before the last such place is parsed at once. Blocks are small, since objects
that stay in the processor's cache are parsed several times faster than those that do not.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tailseg.data.annotations.packed import open_unpacked
from tailseg.errors import UserError

BLOCK = 1 << 18  # bytes read at once
_MARKS = bytes(byte in b'"\\[]{}' for byte in range(256))
NOT_A_NUMBER = re.compile(rb"-?(NaN|Infinity)")  # which Python's own writer makes
_OUTSIDE = re.compile(rb'"(?:[^"\\]|\\.)*+"|-?(?:NaN|Infinity)', re.DOTALL)  # the same, or a whole string
_SCALAR = re.compile(rb'[^\s,:\[\]{}"]*')
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def read_lists(path: Path, keys: Collection[str], block: int = BLOCK) -> Iterator[tuple[str, int, Any]]:
    """The lists under ``keys`` of the object that a JSON file holds, in the file's order.

    Args:
        path: the file; it may be packed with gzip, whatever its name.
        keys: whose lists are wanted; the values of others are checked and left out.
        block: bytes read at once.

    NaN and Infinity, which are no JSON but what Python's own writer makes of such numbers, count as null.

    Yields:
        ``(key, first, rows)``: some elements of the list under ``key``, the number of the first of them. Each list
        begins with ``first == 0``, also where it is empty. Where the value is no list, ``rows`` is that value.

    Raises:
        UserError: the file is missing, unreadable, empty, cut off, not valid JSON, not an object, or unpacks too far.
    """
    with _Source(path, block) as source:
        if source.peek() == b"":
            raise UserError(f"{path}: the file is empty; write or download it again")
        if source.peek() != b"{":
            kind = "list" if source.peek() == b"[" else type(source.value()).__name__
            raise UserError(f"{path}: expected an object with images, annotations and categories, found a {kind}")
        source.drop(1)
        following = source.peek()
        while following != b"}":
            if source.peek() != b'"':
                raise source.unexpected("the name of an entry")
            key = source.value()
            source.expect(b":")
            if source.peek() == b"[":
                for first, rows in source.elements():
                    if key in keys:
                        yield key, first, rows
            else:
                value = source.value()
                if key in keys:
                    yield key, 0, value
            following = source.peek()
            if following != b"}":
                source.expect(b",", "',' or '}'")
        source.drop(1)
        if source.peek():
            raise source.unexpected("the end of the file")


class _Source:
    """The bytes of a file from a place on; ``buffer`` holds the next of them."""

    def __init__(self, path: Path, block: int) -> None:
        self.path = path
        self.block = block
        self.offset = 0  # of the buffer in the file
        try:
            self.file = open_unpacked(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; check the path") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
        self.buffer = b""
        self.more()
        if self.buffer.startswith(b"\xef\xbb\xbf"):  # the mark that some editors put first
            self.drop(3)
        if self.buffer.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: the text is UTF-16; save it as UTF-8")

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def more(self) -> bool:
        """Read on, as much again as there is; False at the end of the file."""
        try:
            read = self.file.read(max(self.block, len(self.buffer)))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: not a whole gzip file ({error}); write or download it again") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); copy or download it again") from None
        self.buffer += read
        return bool(read)

    def drop(self, count: int) -> None:
        """Go on by ``count`` bytes."""
        self.buffer = self.buffer[count:]
        self.offset += count

    def peek(self) -> bytes:
        """The next byte that is not white space, which is now the first of the buffer; empty at the end."""
        while True:
            rest = self.buffer.lstrip(b" \t\n\r")
            self.drop(len(self.buffer) - len(rest))
            if rest or not self.more():
                return self.buffer[:1]

    def expect(self, byte: bytes, name: str | None = None) -> None:
        """Go past ``byte``, which must be the next."""
        if self.peek() != byte:
            raise self.unexpected(name or f"'{byte.decode()}'")
        self.drop(1)

    def value(self) -> Any:
        """The next value, whatever it is."""
        first = self.peek()
        if first in (b"{", b"["):
            end = self._end(in_list=False)
        elif first == b'"':
            while not (match := _STRING.match(self.buffer)):
                self._grow()
            end = match.end()
        else:
            while (end := _SCALAR.match(self.buffer).end()) == len(self.buffer) and self.more():  # type: ignore[union-attr]
                pass
        value = self._parse(self.buffer[:end])
        self.drop(end)
        return value

    def elements(self) -> Iterator[tuple[int, list[Any]]]:
        """The elements of the list that comes next, with the number of the first."""
        self.expect(b"[")
        first = 0
        if self.peek() == b"]":
            yield 0, []
        while self.peek() != b"]":
            if len(self.buffer) < self.block:
                self.more()
            end = self._end(in_list=True)
            rows = self._parse(self.buffer[:end], in_list=True)
            yield first, rows
            first += len(rows)
            self.drop(end)
            if self.peek() != b"]":
                self.expect(b",", "',' or ']'")
                if self.peek() == b"]":
                    raise self.unexpected("another element")
        self.drop(1)

    def _end(self, *, in_list: bool) -> int:
        """Find the end of the value in front; in a list: of the buffer's last complete element, or of all of them."""
        while True:
            places, depths = brackets(self.buffer)
            if in_list and (closed := np.flatnonzero(depths < 0)).size:
                return int(places[closed[0]])
            ends = np.flatnonzero(depths == 0)
            if ends.size:
                return int(places[ends[-1 if in_list else 0]]) + 1
            self._grow()

    def _grow(self) -> None:
        """Read on, where the buffer ends within a value; a fault in what there is of it is raised now."""
        text = self.buffer.decode("utf-8", "ignore")
        try:
            _loads(("[" + text).encode())
        except orjson.JSONDecodeError as error:
            if "end of data" not in error.msg and error.pos < len(text) - 16:
                raise self._fault(len(text[: error.pos - 1].encode()), f"not valid JSON: {error.msg}") from None
        if not self.more():
            raise self._fault(len(self.buffer), "the file is cut off")

    def _parse(self, text: bytes, *, in_list: bool = False) -> Any:
        try:
            return _loads(b"[" + text + b"]" if in_list else text)
        except orjson.JSONDecodeError as error:
            try:
                characters = text.decode()
            except UnicodeDecodeError as undecoded:
                raise self._fault(undecoded.start, "not UTF-8 text") from None
            at = len(characters[: max(error.pos - in_list, 0)].encode())
            if at >= len(self.buffer) and not self.more():
                raise self._fault(at, "the file is cut off") from None
            raise self._fault(at, f"not valid JSON: {error.msg}") from None

    def unexpected(self, expected: str) -> UserError:
        """The error for what comes next, which should be something else."""
        if not self.buffer:
            return self._fault(0, "the file is cut off")
        return self._fault(0, f"not valid JSON: expected {expected}")

    def _fault(self, at: int, problem: str) -> UserError:
        """The error at byte ``at`` of the buffer."""
        place = self.offset + at
        lines, last, done = 1, 0, 0  # `last`: where the line begins
        with open_unpacked(self.path) as file:
            while done < place and (part := file.read(min(1 << 20, place - done))):
                lines += part.count(b"\n")
                last = done + part.rfind(b"\n") + 1 if b"\n" in part else last
                done += len(part)
        where = f"line {lines}, column {place - last + 1} (byte {place})"
        return UserError(f"{self.path}: {problem} at {where}; write or download it again")


def _loads(text: bytes) -> Any:
    """The value of a JSON text, null for NaN and Infinity (JSONDecodeError if it is none)."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if not NOT_A_NUMBER.search(text):
            raise
        orjson.loads(_OUTSIDE.sub(lambda found: _instead(found[0], b'""'), text))  # of equal length: for errors' places
        return orjson.loads(_OUTSIDE.sub(lambda found: _instead(found[0], b"null"), text))


def _instead(found: bytes, value: bytes) -> bytes:
    return found if found.startswith(b'"') else value.ljust(len(found))


def brackets(text: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the brackets outside of strings, and the number open after each; ``text`` begins outside of one."""
    places = np.flatnonzero(np.frombuffer(text.translate(_MARKS), np.bool_))
    kinds = np.frombuffer(text, np.uint8)[places]
    if b"\\" in text:
        slashes = places[kinds == ord("\\")]
        starts = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # of runs of backslashes
        lengths = np.diff(starts, append=len(slashes))
        escaped = (slashes[starts] + lengths)[lengths % 2 == 1]
        real = (kinds != ord("\\")) & ~np.isin(places, escaped)
        places, kinds = places[real], kinds[real]
    quotes = kinds == ord('"')
    outside = ~quotes & (np.cumsum(quotes) % 2 == 0)
    places, kinds = places[outside], kinds[outside]
    return places, np.cumsum((kinds & 2).astype(np.int64) - 1)  # bit 1 is set in '[' and '{' only
