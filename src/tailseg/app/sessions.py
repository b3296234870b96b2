"""What users have dropped, kept in memory between two clicks, within a bound for all of them together."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from tailseg.app.pictures import Seen

MOST_BYTES = 1 << 30  # of all sessions


class Sessions:
    """Pictures by a key that cannot be guessed; the longest unused go first when there are too many.

    Args:
        most_bytes: of all pictures together; those of one user stay, however large.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, tuple[Seen, ...]] = OrderedDict()
        self._lock = Lock()  # several threads serve the users

    def add(self, pictures: Sequence[Seen]) -> str:
        """Keep pictures; returns their key."""
        key = secrets.token_urlsafe(24)
        with self._lock:
            self._kept[key] = tuple(pictures)
            while len(self._kept) > 1 and self._size() > self._most_bytes:
                self._kept.popitem(last=False)
        return key

    def get(self, key: str | None) -> tuple[Seen, ...]:
        """The pictures of a key; none if they were let go."""
        with self._lock:
            if key is None or key not in self._kept:
                return ()
            self._kept.move_to_end(key)
            return self._kept[key]

    def drop(self, key: str | None) -> None:
        """Let pictures go."""
        with self._lock:
            self._kept.pop(key or "", None)

    def __len__(self) -> int:
        return len(self._kept)

    def _size(self) -> int:
        return sum(seen.size for pictures in self._kept.values() for seen in pictures)
