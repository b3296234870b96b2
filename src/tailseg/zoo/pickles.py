"""A pickle followed without running anything in it.

A pickle is a program: it names functions, which the usual reader imports and calls. Here no name is ever imported: to
`Unpickler` every one is a stand-in of ours. Before any of it is followed, `check_opcodes` looks for what would bring
CPython's unpickler down.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from tailseg.zoo.pickle_limits import (
    LARGEST_KEY,
    MAX_DEPTH,
    MAX_KEY_NODES,
    MAX_NODES,
    NODES_OF_A_NAME,
    Allowance,
    require,
    require_safe,
)
from tailseg.zoo.pickle_stubs import Name, Swallow, stand_in
from tailseg.zoo.pickle_values import STORAGES, Foreign, Later, LazyArray, LazyTensor, Storage

_READS_MEMO = frozenset(("GET", "BINGET", "LONG_BINGET"))
_WRITES_MEMO = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
# Objects that an opcode takes off the stack and puts into the one below; None: all down to the mark.
_FILLS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1, "APPENDS": None, "SETITEMS": None, "ADDITEMS": None}
_REFUSED_OPS = frozenset(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"))  # reach outside of the pickle
# Opcodes by which things are hashed, and of what they take off the stack, every how many is a key.
_HASHES = {"SETITEM": 2, "SETITEMS": 2, "DICT": 2, "ADDITEMS": 1, "FROZENSET": 1}
_JOINS = frozenset(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"))  # whose hash is that of all parts

_Cell = list[int]  # of an object: its depth, and how many values have to be hashed for its own hash
_SCALARS = (
    *(pickletools.pyint, pickletools.pyfloat, pickletools.pybool, pickletools.pynone),
    *(pickletools.pyinteger_or_bool, pickletools.pyunicode, pickletools.pybytes, pickletools.pybytes_or_str),
)


def check_opcodes(file: BinaryIO, allowance: Allowance) -> None:
    """Walk over one pickle without following it, and leave ``file`` at its end.

    CPython's unpickler trusts four things that a damaged or hostile file gets wrong: an index into the memo makes it
    fill a table of that length; a frame makes it allocate that length; a tuple nested a million deep, as the key of a
    dict, overflows the stack of C; a tuple that holds its parts twice each, as a key, takes for ever to hash. Depths
    and numbers of values are upper bounds for all that can be hashed.
    """
    scalar, large = [0, 1], [0, 2]  # shared cells: nothing can be put into what they stand for
    stack: list[_Cell] = []  # the memo shares the cells
    marks: list[int] = []
    memo: dict[int, _Cell] = {}
    operand: Any
    for op, operand, _ in pickletools.genops(file):
        allowance.take_nodes(1)
        name = op.name
        if name in _WRITES_MEMO:
            index = len(memo) if name == "MEMOIZE" else operand
            require(0 <= index <= 2 * len(memo) + 1000, "an index of the pickle is absurd")
            memo[index] = stack[-1]
        elif name in _READS_MEMO:
            stack.append(memo[operand])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _FILLS:
            count = _FILLS[name]
            taken = _take_off(stack, marks.pop() if count is None else len(stack) - count)
            require(stack[-1] is not scalar and stack[-1] is not large, "something is put into a number or a string")
            _count_keys(name, taken, allowance)
            stack[-1][0] = max(stack[-1][0], _depth(taken) + 1)
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif op.stack_after and op.stack_after[0] in _SCALARS:
            stack.append(large if type(operand) is int and abs(operand) > LARGEST_KEY else scalar)
        else:
            require(name not in _REFUSED_OPS, "an opcode has no place in a checkpoint")
            require(name != "FRAME" or operand <= allowance.size, "a frame is longer than the file")
            before = op.stack_before
            taken = _take_off(stack, marks.pop() if pickletools.markobject in before else len(stack) - len(before))
            _count_keys(name, taken, allowance)
            hashed = sum(cell[1] for cell in taken) if name in _JOINS else 0
            if op.stack_after:
                stack.append([_depth(taken) + 1, min(hashed, MAX_KEY_NODES) + 1])


def _take_off(stack: list[_Cell], cut: int) -> list[_Cell]:
    """Remove and return what lies at ``cut`` and above."""
    require(cut >= 0, "the pickle's stack is empty")
    taken = stack[cut:]
    require(_depth(taken) < MAX_DEPTH, "it is nested too deeply")
    del stack[cut:]
    return taken


def _depth(cells: list[_Cell]) -> int:
    return max([cell[0] for cell in cells], default=0)


def _count_keys(name: str, taken: list[_Cell], allowance: Allowance) -> None:
    every = _HASHES.get(name)
    if every is not None:
        for cell in taken[::every]:
            allowance.take_key(cell[1])


class Unpickler(pickle.Unpickler):
    """Follows a pickle that `check_opcodes` has passed; nothing in it is imported or run."""

    def __init__(self, path: Path, file: BinaryIO, allowance: Allowance, *, has_storages: bool = False) -> None:
        super().__init__(file, encoding="latin1")  # for strings of Python 2, some of which are bytes
        self.path = path
        self.allowance = allowance
        self.has_storages = has_storages
        self.storages: dict[str, Storage] = {}  # by key

    def find_class(self, module: str, name: str, /) -> Any:
        """The stand-in for a name; called by the unpickler."""
        self.allowance.take_nodes(NODES_OF_A_NAME)
        return stand_in(self.path, self.allowance, module, name)

    def persistent_load(self, pid: Any, /) -> Any:
        """A reference to something outside the pickle: in files of torch, a storage or the source of a class."""
        require(self.has_storages and type(pid) is tuple, "refers to something outside of the file")
        if pid[0] == "module":
            return pid[1]
        require(pid[0] == "storage" and type(pid[1]) is Name, "refers to something outside of the file")
        _, kind, key, _, count, *view = pid
        storage = Storage(STORAGES[kind.name], key, count, *view)
        self.storages.setdefault(key, storage)
        return storage


_OPEN: tuple[Any, int] = (None, 0)  # stands for a container whose content is being turned


class Plain:
    """Turns what an unpickler returned into plain data, in which what was shared is shared still."""

    def __init__(self, read: Callable[[Storage], Tensor] | None, allowance: Allowance) -> None:
        self.read = read
        self.allowance = allowance
        # By id (all originals live in the one that is being turned): what became of it, and how many values it holds.
        self.done: dict[int, tuple[Any, int]] = {}

    def __call__(self, value: Any) -> Any:
        """The value as plain data."""
        return self._plain(value)[0]

    def _plain(self, value: Any) -> tuple[Any, int]:
        if value is None or type(value) in (str, int, float, bool, bytes):
            return value, 1
        found = self.done.get(id(value))
        require_safe(found is not _OPEN, "something in it holds itself")
        if found is None:
            self.done[id(value)] = _OPEN
            found = self._turn(value)
            require_safe(found[1] <= MAX_NODES, f"it unfolds to more than {MAX_NODES:,} values")
            self.done[id(value)] = found
        return found

    def _items(self, values: Iterable[Any]) -> tuple[list[Any], int]:
        pairs = [self._plain(value) for value in values]
        return [plain for plain, _ in pairs], 1 + sum(nodes for _, nodes in pairs)

    def _turn(self, value: Any) -> tuple[Any, int]:
        match value:
            case dict():  # an OrderedDict's own items() could be an attribute from the file
                keys, of_keys = self._items(dict.keys(value))
                items, of_items = self._items(dict.values(value))
                self.allowance.take_keys(keys)
                return dict(zip(keys, items, strict=True)), of_keys + of_items
            case list():
                return self._items(value)
            case tuple() | set() | frozenset():
                items, nodes = self._items(value)
                return self._joined(type(value), items), nodes
            case Later(kind=kind, content=content):
                items, nodes = self._items(content)
                if kind is complex:
                    return complex(*items), nodes
                self.allowance.take_nodes(len(items))
                return self._joined(kind, items), nodes
            case LazyTensor():
                require(self.read is not None, "refers to something outside of the file")
                assert self.read is not None
                return value.make(self.read, self.allowance), 1
            case LazyArray():
                return value.make(self.allowance), 1
        return self._named(value), 1

    def _joined(self, kind: type, items: list[Any]) -> Any:
        if kind is not tuple:
            self.allowance.take_keys(items)
        return kind(items)

    def _named(self, value: Any) -> Any:
        match value:
            case bytearray():
                return bytes(value)
            case Swallow():
                return Foreign(value.foreign_name)
            case Name():
                return Foreign(value.name)
            case type() if issubclass(value, Swallow):
                return Foreign(value.foreign_name)
            case Storage():
                return Foreign("torch.storage.TypedStorage")
        kind = value if isinstance(value, type) else type(value)
        return Foreign(f"{kind.__module__}.{kind.__qualname__}")
