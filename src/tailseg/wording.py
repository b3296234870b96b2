"""Values and names from files as messages show them: bounded in length, and without what a terminal would obey."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

LONGEST_WORD = 500  # letters without a space
LONGEST_LINE = 4000  # letters of a message

# C0 and C1 controls but for tab and line end, line separators, marks that turn the direction of writing, and halves
# of surrogate pairs, which no terminal can print.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def short(value: object, limit: int = 60) -> str:
    """The ``repr`` of a value from a file, cut behind ``limit`` letters; of a deep or huge one no more is looked at."""
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            return text[: limit - 3] + "..."
    return text


def _pieces(value: object, limit: int) -> Iterator[str]:
    if type(value) is list:
        yield "["
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(item, limit)
        yield "]"
    elif type(value) is dict:
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key, limit)
            yield ": "
            yield from _pieces(item, limit)
        yield "}"
    else:
        yield repr(value[: limit + 1] if isinstance(value, str | bytes) else value)


def printable(name: str) -> str:
    r"""The name of a file as JSON may hold it: bytes that are not UTF-8 become ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def score_text(score: float) -> str:
    """A score with two decimals; below 0.1 with two digits, or low ones would all read 0.00."""
    return f"{score:.2g}" if 0 < abs(score) < 0.1 else f"{score:.2f}"


def controls_escaped(text: str) -> str:
    """A text with its control characters escaped, but for line ends and tabs."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def for_terminal(text: str) -> str:
    """A message that may be printed: control characters are escaped, long words and lines cut in their middle.

    Line ends and tabs stay. So names from files neither move the cursor, nor change colours or titles, nor turn the
    direction of writing, nor fill the screen.
    """
    text = _LONG_WORD.sub(lambda match: _cut(match[0], LONGEST_WORD), controls_escaped(text))
    return "\n".join(_cut(line, LONGEST_LINE) for line in text.split("\n"))


def one_line(text: str) -> str:
    """`for_terminal` of a message that is one sentence: line ends and tabs are escaped too."""
    return for_terminal(text.replace("\n", "\\n").replace("\t", "\\t"))


def _cut(text: str, limit: int) -> str:
    """A text of at most ``limit`` letters: beginning and end, with " ... " between."""
    if len(text) <= limit:
        return text
    begin = limit * 3 // 4
    return f"{text[:begin]} ... {text[begin + 5 - limit :]}"
