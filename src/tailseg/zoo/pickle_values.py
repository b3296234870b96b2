"""What the stand-ins of a pickle make: dicts, tensors and arrays that are read later, once all is known to be true."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tailseg.zoo.pickle_limits import Allowance, require

MOST_SIDES = 64  # of a tensor or an array, as numpy and PyTorch have them


@dataclass(frozen=True, slots=True)
class Foreign:
    """In place of an object that is neither data nor tensor."""

    name: str  # its class or function, such as "mmengine.logging.history_buffer.HistoryBuffer"


class Inert:
    """Base of all that a pickle gets its hands on: no attribute of it can be set (opcode BUILD)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("an object is given a state that has none")


class PlainDict(dict[Any, Any]):
    """An OrderedDict and its kin; those of torch carry an attribute ``_metadata``, which is let go."""

    __slots__ = ("allowance",)

    def __init__(self, allowance: Allowance, *content: Any) -> None:
        super().__init__()
        self.allowance = allowance
        require(len(content) <= 1, "a dict is made of two things")
        for items in content:
            pairs = dict.items(items) if isinstance(items, dict) else items
            require(type(pairs) in (list, tuple) or isinstance(items, dict), "a dict is made of no pairs")
            allowance.take_nodes(2 * len(items))
            for key, value in pairs:
                self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.allowance.take_keys((key,))
        super().__setitem__(key, value)

    def __setstate__(self, state: object) -> None:
        pass


class Later(Inert):
    """A tuple, frozenset or complex number that a call makes: made when all is read, so never hashed before."""

    __slots__ = ("content", "kind")

    def __init__(self, kind: type, *content: Any) -> None:
        parts = (list, tuple, set) if kind is not complex else (int, float)
        require(len(content) <= 2 and all(type(part) in parts for part in content), "a value is made of odd parts")
        self.kind = kind
        self.content: Any = content if kind is complex else content[0] if content else ()


class Storage(Inert):
    """A stretch of a file's numbers, still unread; sizes in elements."""

    __slots__ = ("count", "dtype", "first", "key", "total")

    def __init__(self, dtype: torch.dtype, key: str, total: int, view: tuple[Any, int, int] | None = None) -> None:
        _, self.first, self.count = view or (None, 0, total)
        self.dtype = dtype
        self.key = key
        self.total = total
        for number in (self.first, self.count, total):
            require(type(number) is int and number >= 0, "a storage has no size")
        require(type(key) is str and self.first + self.count <= total, "a storage is larger than itself")


class LazyTensor(Inert):
    """A tensor, still unread."""

    __slots__ = ("dtype", "made", "offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> None:
        require(type(storage) is Storage and type(shape) is tuple and type(stride) is tuple, "a malformed tensor")
        self.storage: Storage = storage
        self.offset = offset
        self.shape = shape
        self.stride = stride
        self.dtype: torch.dtype = storage.dtype if dtype is None else DTYPES[dtype.name]
        self.made: Tensor | None = None

    def make(self, read: Callable[[Storage], Tensor], allowance: Allowance) -> Tensor:
        """The tensor, once every number in its description is found to be true."""
        if self.made is None:
            require(len(self.shape) == len(self.stride), "a tensor has more dimensions than strides")
            require(len(self.shape) <= MOST_SIDES, "a tensor has too many dimensions")
            for number in (self.offset, *self.shape, *self.stride):
                require(type(number) is int and 0 <= number < 2**62, "a tensor has a size that cannot be")
            storage, itemsize = self.storage, self.dtype.itemsize
            last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
            if prod(self.shape) == 0:
                self.made = torch.empty(self.shape, dtype=self.dtype)
            else:
                allowance.take_bytes(prod(self.shape) * itemsize)  # of an expanded one, more than its storage has
                first = storage.first * storage.dtype.itemsize
                end = first + storage.count * storage.dtype.itemsize
                require(first + (last + 1) * itemsize <= end, "a tensor reaches beyond its storage")
                flat = read(storage)[first : end - (end - first) % itemsize].view(self.dtype)
                offset = flat.storage_offset() + self.offset
                self.made = flat.as_strided(self.shape, self.stride, offset)
        return self.made


class Dtype(Inert):
    """A numpy dtype."""

    __slots__ = ("code", "is_plain", "order")

    def __init__(self, code: Any, *_: object) -> None:
        self.code = code.decode("ascii") if type(code) is bytes else code
        self.is_plain = type(self.code) is str and self.code in _NUMPY_CODES
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        _, self.order, *parts = state  # of which the first three describe a structured dtype
        require(self.order in ("<", ">", "=", "|"), "a dtype without a byte order")
        self.is_plain &= all(part is None for part in parts[:3])

    def numpy(self) -> np.dtype[Any] | None:
        """The dtype if it is one of plain numbers."""
        return np.dtype(("<" if self.order == "|" else self.order) + self.code) if self.is_plain else None


class LazyArray(Inert):
    """A numpy array, still bytes; anything but numbers is let go."""

    __slots__ = ("axes", "dtype", "made", "order", "raw", "shape")

    def __init__(self, *_: object) -> None:
        self.dtype: Any = None
        self.axes: tuple[int, ...] | None = None
        self.order: Literal["C", "F"] = "C"
        self.made: Tensor | Foreign | None = None

    def __setstate__(self, state: Any) -> None:
        *_, self.shape, self.dtype, is_fortran, self.raw = state
        self.order = "F" if is_fortran else "C"

    def make(self, allowance: Allowance) -> Tensor | Foreign:
        """The array as a tensor, if it is one of numbers."""
        if self.made is None:
            require(type(self.dtype) is Dtype, "an array without a dtype")
            require(type(self.shape) is tuple and len(self.shape) <= MOST_SIDES, "an array has too many dimensions")
            for number in self.shape:
                require(type(number) is int and 0 <= number < 2**62, "an array has a size that cannot be")
            dtype = self.dtype.numpy()
            if dtype is None:
                self.made = Foreign("numpy.ndarray")
            else:
                raw = self.raw if type(self.raw) is bytearray else bytearray(as_bytes(allowance, self.raw))
                require(len(raw) == prod(self.shape) * dtype.itemsize, "an array has another size than its shape")
                array = np.ndarray(self.shape, dtype, raw, order=self.order).astype(dtype.newbyteorder("="), copy=False)
                self.made = torch.from_numpy(array if self.axes is None else array.transpose(self.axes))
            self.raw = None  # lets go of the bytes: of a large file, no two copies
        return self.made


def as_bytes(allowance: Allowance, value: Any) -> bytes:
    """The content of bytes, in whatever form they were written."""
    require(type(value) in (bytes, bytearray, str), "bytes are missing")
    allowance.take_bytes(len(value))
    return value.encode("latin-1") if type(value) is str else bytes(value)  # Python 2 wrote bytes as strings


DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {
    f"{module}.{kind}Storage": dtype
    for module in ("torch", "torch.cuda")
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "QInt8": torch.int8,  # quantized tensors are let go, but their storages take up room
        "QUInt8": torch.uint8,
        "QUInt4x2": torch.uint8,
        "QUInt2x4": torch.uint8,
        "QInt32": torch.int32,
    }.items()
} | {f"torch.{name}": torch.uint8 for name in ("UntypedStorage", "storage.UntypedStorage", "storage._UntypedStorage")}
_NUMPY_CODES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"))
