"""A pickle followed without running anything in it.

A pickle is a program: it names functions, which the usual reader imports and calls. Here no name is ever imported: to
`Unpickler` every one is a stand-in of ours. Before any of it is followed, `check_opcodes` looks for what would bring
CPython's unpickler down.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tailseg.zoo.pickle_stubs import STORAGES, Foreign, LazyArray, LazyTensor, Name, Storage, Swallow, require, stand_in

MAX_DEPTH = 1000  # of things in things; pickle itself cannot write more

_READS_MEMO = frozenset(("GET", "BINGET", "LONG_BINGET"))
_WRITES_MEMO = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
# Objects that an opcode takes off the stack and puts into the one below; None: all down to the mark.
_FILLS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1, "APPENDS": None, "SETITEMS": None, "ADDITEMS": None}
_REFUSED_OPS = frozenset(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"))  # reach outside of the pickle


def check_opcodes(file: BinaryIO, size: int) -> None:
    """Walk over one pickle without following it, and leave ``file`` at its end.

    CPython's unpickler trusts three things that a damaged file gets wrong: an index into the memo makes it fill a
    table of that length; a frame makes it allocate that length; a tuple nested a million deep, as the key of a dict,
    overflows the stack of C. Depths are upper bounds for all that can be hashed.
    """
    stack: list[list[int]] = []  # per object, its depth in a cell, which the memo shares
    marks: list[int] = []
    memo: dict[int, list[int]] = {}
    operand: Any
    for op, operand, _ in pickletools.genops(file):
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
            taken = _FILLS[name]
            inside = _take_off(stack, marks.pop() if taken is None else len(stack) - taken)
            stack[-1][0] = max(stack[-1][0], inside + 1)
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            require(name not in _REFUSED_OPS, "an opcode has no place in a checkpoint")
            require(name != "FRAME" or operand <= size, "a frame is longer than the file")
            before = op.stack_before
            inside = _take_off(stack, marks.pop() if pickletools.markobject in before else len(stack) - len(before))
            if op.stack_after:
                stack.append([inside + 1])


def _take_off(stack: list[list[int]], cut: int) -> int:
    """Remove what lies at ``cut`` and above; returns the depth of the deepest."""
    require(cut >= 0, "the pickle's stack is empty")
    inside = max(stack[cut:], default=[0])[0]
    require(inside < MAX_DEPTH, "it is nested too deeply")
    del stack[cut:]
    return inside


class Unpickler(pickle.Unpickler):
    """Follows a pickle that `check_opcodes` has passed; nothing in it is imported or run."""

    def __init__(self, path: Path, file: BinaryIO, *, has_storages: bool = False) -> None:
        super().__init__(file, encoding="latin1")  # for strings of Python 2, some of which are bytes
        self.path = path
        self.has_storages = has_storages
        self.storages: dict[str, Storage] = {}  # by key

    def find_class(self, module: str, name: str, /) -> Any:
        """The stand-in for a name; called by the unpickler."""
        return stand_in(self.path, module, name)

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


class Plain:
    """Turns what an unpickler returned into plain data; shared and cyclic containers stay so."""

    def __init__(self, read: Callable[[Storage], Tensor] | None) -> None:
        self.read = read
        self.done: dict[int, Any] = {}  # by id: all originals live in the one that is being turned

    def __call__(self, value: Any) -> Any:
        """The value as plain data."""
        if value is None or type(value) in (str, int, float, bool, bytes, complex):
            return value
        if id(value) not in self.done:
            if isinstance(value, dict | list):
                self._fill(value)
            else:
                self.done[id(value)] = self._turn(value)
        return self.done[id(value)]

    def _fill(self, value: dict[Any, Any] | list[Any]) -> None:
        if isinstance(value, list):
            items = self.done[id(value)] = []
            for item in value:
                items.append(self(item))
        else:
            pairs = self.done[id(value)] = {}
            for key, item in dict.items(value):  # an OrderedDict's own could be an attribute from the file
                pairs[self(key)] = self(item)

    def _turn(self, value: Any) -> Any:
        match value:
            case tuple():
                return tuple([self(item) for item in value])
            case set() | frozenset():
                return type(value)(self(item) for item in value)
            case bytearray():
                return bytes(value)
            case LazyTensor():
                assert self.read is not None
                return value.make(self.read)
            case LazyArray():
                return value.make()
            case Tensor():
                # Quantized and nested tensors are not checked by torch as thoroughly as the ordinary.
                is_plain = value.device.type == "cpu" and value.layout == torch.strided and not value.is_nested
                return value.detach() if is_plain and not value.is_quantized else Foreign("torch.Tensor")
            case Swallow():
                return Foreign(value.foreign_name)
            case Name():
                return Foreign(value.name)
            case type() if issubclass(value, Swallow):
                return Foreign(value.foreign_name)
            case torch.dtype():
                return Foreign(str(value))
            case Storage():
                return Foreign("torch.storage.TypedStorage")
        kind = value if isinstance(value, type) else type(value)
        return Foreign(f"{kind.__module__}.{kind.__qualname__}")
