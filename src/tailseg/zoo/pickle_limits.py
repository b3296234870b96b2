"""Bounds on what a pickle may unfold to: a few bytes can stand for more than any machine holds, or hash for ever."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 1000  # of things in things; pickle itself cannot write more
MAX_NODES = 1_000_000  # values, those that are used in several places counted in each
NODES_OF_A_NAME = 100  # the room that a stand-in for a class takes
MAX_KEY_NODES = 100  # of a tuple that is a key of a dict or an element of a set
MAX_TUPLE_KEYS = 1000  # such tuples: their hashes, unlike those of strings, can be made equal, which makes dicts slow
LARGEST_KEY = 2**61 - 2  # larger whole numbers have the hashes of smaller ones
MAX_SHARING = 8  # bytes of all tensors for each of the file: several may share theirs
SPARE_BYTES = 2**24  # the same, for small files


class UnsafePickleError(pickle.UnpicklingError):
    """A file that is well formed, but made to exhaust whoever reads it."""


def require(holds: bool, otherwise: str) -> None:
    """Raise what becomes "is damaged" unless the file keeps its word."""
    if not holds:
        raise pickle.UnpicklingError(otherwise)


def require_safe(holds: bool, otherwise: str) -> None:
    """Raise what becomes "was not loaded" unless the file stays within the bounds."""
    if not holds:
        raise UnsafePickleError(otherwise)


class Allowance:
    """What may still be made of a file.

    Args:
        size: of the file in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.nodes = MAX_NODES
        self.bytes = MAX_SHARING * size + SPARE_BYTES
        self.tuple_keys = MAX_TUPLE_KEYS

    def take_nodes(self, number: int) -> None:
        """Count values that are made."""
        self.nodes -= number
        require_safe(self.nodes >= 0, f"it unfolds to more than {MAX_NODES:,} values")

    def take_bytes(self, number: int) -> None:
        """Count bytes of strings or numbers that are made or spoken of."""
        self.bytes -= number
        require_safe(self.bytes >= 0, f"its tensors claim more than {MAX_SHARING} times the bytes of the file")

    def take_key(self, nodes: int) -> None:
        """Count a key of a dict or an element of a set, of which tuples are allowed in small numbers and sizes.

        Args:
            nodes: values in the key, itself included.
        """
        if nodes > 1:
            self.tuple_keys -= 1
            require_safe(nodes <= MAX_KEY_NODES, f"a key of a dict is a tuple of more than {MAX_KEY_NODES} values")
            require_safe(self.tuple_keys >= 0, f"more than {MAX_TUPLE_KEYS:,} keys of dicts are tuples or odd numbers")

    def take_keys(self, keys: Iterable[Any]) -> None:
        """Count keys that are there already, before they are hashed."""
        for key in keys:
            self.take_key(nodes_of_key(key))


def nodes_of_key(key: Any) -> int:
    """Values in a key, itself included, at most one more than are allowed; a huge or a complex number counts as two."""
    waiting, nodes = [key], 0
    while waiting and nodes <= MAX_KEY_NODES:
        item = waiting.pop()
        nodes += 1
        if isinstance(item, tuple | frozenset):
            nodes += max(len(item) - MAX_KEY_NODES, 0)
            waiting.extend(item if len(item) <= MAX_KEY_NODES else ())
        elif type(item) is complex or (type(item) is int and abs(item) > LARGEST_KEY):
            nodes += 1
    return nodes
