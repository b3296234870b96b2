"""The one exception that is the user's to fix, and faults of the disk that name their file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
