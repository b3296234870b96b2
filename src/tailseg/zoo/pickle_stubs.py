"""Stand-ins for the names in a pickle: objects of ours that note what was asked for, and do nothing.

Two fences, each enough by itself against a file that wants to run code: stand-ins do nothing, and a name that is
neither data nor a class makes the whole file refused (`stand_in`).
"""

from __future__ import annotations

import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from tailseg.errors import UserError


@dataclass(frozen=True, slots=True)
class Foreign:
    """In place of an object that is neither data nor tensor."""

    name: str  # its class or function, such as "mmengine.logging.history_buffer.HistoryBuffer"


def require(holds: bool, otherwise: str) -> None:
    """Raise what becomes "is damaged" unless the file keeps its word."""
    if not holds:
        raise pickle.UnpicklingError(otherwise)


class _Inert:
    """Base of all that a pickle gets its hands on: no attribute of it can be set (opcode BUILD)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("an object is given a state that has none")


class Name(_Inert):
    """A known, harmless name; calling it (opcode REDUCE) calls a function below, or makes a `Foreign`."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.call = call

    def __call__(self, *args: Any) -> Any:
        """Return a stand-in for the result of the call."""
        return _foreign_class(self.name)() if self.call is None else self.call(*args)


class Swallow:
    """An object of a class that we do not know: takes whatever is done to it and keeps nothing."""

    __slots__ = ()
    foreign_name = ""

    def __new__(cls, *_: object, **__: object) -> Swallow:
        """One more, whatever it is made of."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _take(*_: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _take


def _foreign_class(name: str) -> type[Swallow]:
    return type("Foreign", (Swallow,), {"__slots__": (), "foreign_name": name})


class _Partial(Swallow):
    """``functools.partial``, by which protocol 2 makes objects that need keywords: called, it is one more unknown."""

    __slots__ = ()
    foreign_name = "functools.partial"

    def __call__(self, *_: object) -> Swallow:
        return self


class PlainDict(dict[Any, Any]):
    """An OrderedDict and its kin; those of torch carry an attribute ``_metadata``, which is let go."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class Storage(_Inert):
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


class LazyTensor(_Inert):
    """A tensor, still unread."""

    __slots__ = ("dtype", "made", "offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> None:
        require(type(storage) is Storage and type(shape) is tuple and type(stride) is tuple, "a malformed tensor")
        self.storage: Storage = storage
        self.offset = offset
        self.shape = shape
        self.stride = stride
        self.dtype: torch.dtype = storage.dtype if dtype is None else _DTYPES[dtype.name]
        self.made: Tensor | None = None

    def make(self, read: Callable[[Storage], Tensor]) -> Tensor:
        """The tensor, once every number in its description is found to be true."""
        if self.made is None:
            require(len(self.shape) == len(self.stride), "a tensor has more dimensions than strides")
            for number in (self.offset, *self.shape, *self.stride):
                require(type(number) is int and 0 <= number < 2**62, "a tensor has a size that cannot be")
            storage, itemsize = self.storage, self.dtype.itemsize
            last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
            if prod(self.shape) == 0:
                self.made = torch.empty(self.shape, dtype=self.dtype)
            else:
                first = storage.first * storage.dtype.itemsize
                end = first + storage.count * storage.dtype.itemsize
                require(first + (last + 1) * itemsize <= end, "a tensor reaches beyond its storage")
                flat = read(storage)[first : end - (end - first) % itemsize].view(self.dtype)
                offset = flat.storage_offset() + self.offset
                self.made = flat.as_strided(self.shape, self.stride, offset)
        return self.made


class _Dtype(_Inert):
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


class LazyArray(_Inert):
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

    def make(self) -> Tensor | Foreign:
        """The array as a tensor, if it is one of numbers."""
        if self.made is None:
            require(type(self.dtype) is _Dtype, "an array without a dtype")
            dtype = self.dtype.numpy()
            if dtype is None:
                self.made = Foreign("numpy.ndarray")
            else:
                raw = self.raw if type(self.raw) is bytearray else bytearray(_as_bytes(self.raw))
                require(len(raw) == prod(self.shape) * dtype.itemsize, "an array has another size than its shape")
                array = np.ndarray(self.shape, dtype, raw, order=self.order).astype(dtype.newbyteorder("="), copy=False)
                self.made = torch.from_numpy(array if self.axes is None else array.transpose(self.axes))
            self.raw = None  # lets go of the bytes: of a large file, no two copies
        return self.made


def _as_bytes(value: Any) -> bytes:
    require(type(value) in (bytes, bytearray, str), "bytes are missing")
    return value.encode("latin-1") if type(value) is str else bytes(value)  # Python 2 wrote bytes as strings


def _array(subtype: Any, *_: object) -> Any:
    return (
        LazyArray() if type(subtype) is Name and subtype.name == "numpy.ndarray" else _foreign_class("numpy.ndarray")()
    )


def _array_of_buffer(raw: Any, dtype: Any, shape: Any, order: str, axes: tuple[int, ...] | None = None) -> LazyArray:
    array = LazyArray()
    # Order "K" of recent numpy: written in C order, then its axes permuted.
    array.__setstate__((shape, dtype, order == "F", raw))
    array.axes = axes if order == "K" else None
    return array


def _scalar(dtype: Any, raw: Any = None) -> Any:
    kind = dtype.numpy()
    return _foreign_class("numpy.generic")() if kind is None else np.frombuffer(_as_bytes(raw), kind, 1)[0].item()


def _encode(text: str, encoding: str = "") -> bytes:
    require(encoding in ("latin1", "latin-1"), "text is encoded, not bytes")
    return _as_bytes(text)


def _bytes(content: Any = b"", *_: object) -> bytes:
    return bytes(content) if type(content) is list else _as_bytes(content)


def _reconstruct_object(cls: Any, *_: object) -> Swallow:
    require(isinstance(cls, type) and issubclass(cls, Swallow), "an object of no class")
    made: Swallow = cls()
    return made


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> LazyTensor:
    require(not (len(more) > 2 and more[2]), "tensors marked as conjugate or negative are not read")
    return LazyTensor(storage, offset, shape, stride)


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> LazyTensor:
    _, _, dtype, *metadata = more
    require(not any(metadata), "tensors marked as conjugate or negative are not read")
    return LazyTensor(storage, offset, shape, stride, dtype)


def _tensor_of_class(make: Any, _: object, args: Any, __: object = None) -> Any:
    return make(*args)


def _first(value: Any, *_: object) -> Any:
    return value


_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
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
    }.items()
} | {f"torch.{name}": torch.uint8 for name in ("UntypedStorage", "storage.UntypedStorage", "storage._UntypedStorage")}
_NUMPY_CODES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"))

_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.complex": complex,
    "builtins.dict": PlainDict,
    "builtins.frozenset": frozenset,
    "builtins.list": list,
    "builtins.set": set,
    "builtins.tuple": tuple,
    "collections.Counter": PlainDict,
    "collections.OrderedDict": PlainDict,
    "collections.defaultdict": lambda _factory=None, *items: PlainDict(*items),
    "copyreg.__newobj__": _reconstruct_object,
    "copyreg.__newobj_ex__": _reconstruct_object,
    "copyreg._reconstructor": _reconstruct_object,
    "functools.partial": _Partial,
    "numpy.dtype": _Dtype,
    "torch.Size": tuple,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
}
for _core in ("numpy.core", "numpy._core"):
    _CALLS[f"{_core}.multiarray._reconstruct"] = _array
    _CALLS[f"{_core}.multiarray.scalar"] = _scalar
    _CALLS[f"{_core}.numeric._frombuffer"] = _array_of_buffer

# Names of the standard library, torch and numpy that may occur, and of which nothing is kept but the name.
_KEPT_AS_NAME = re.compile(
    r"""argparse\.Namespace | types\.SimpleNamespace | typing\.Any | collections\.deque
    | builtins\.(object|int|float|str|bool|slice|range)
    | datetime\.(date|datetime|time|timedelta|timezone) | decimal\.Decimal | fractions\.Fraction | uuid\.UUID
    | pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path
    | numpy\.(bool_?|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|str_|bytes_)
    | numpy\.random\._pickle\.__(randomstate|generator|bit_generator)_ctor
    | torch\.(device|Tensor|Generator|_tensor\.Tensor|serialization\._get_layout|storage\._?TypedStorage)
    | torch\.nn\.(parameter\.)?(Parameter|Buffer) | torch\.(nn\.modules|optim)\.[\w.]*\.[A-Z]\w*""",
    re.VERBOSE,
)
_OWN_WORLD = sys.stdlib_module_names | {"torch", "numpy"}


def stand_in(path: Path, module: str, name: str) -> Any:
    """The stand-in for a name; a name that could only be there to be run makes the whole file refused.

    Harmless are the names listed above and, of third parties, those spelt as a class.
    """
    asked = f"{module}.{name}"
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
    full = f"{module}.{name}"
    if full in _CALLS:
        return Name(full, _CALLS[full])
    if full == "builtins.getattr":
        return Name(full, partial(_attribute, path))
    if full in STORAGES or full in _DTYPES or full == "numpy.ndarray":
        return Name(full)
    if _KEPT_AS_NAME.fullmatch(full) or (_is_third_party(full) and _is_class_name(name)):
        return _foreign_class(full)
    _refuse(path, asked)


def _is_third_party(full: str) -> bool:
    return full.split(".")[0] not in _OWN_WORLD


def _is_class_name(name: str) -> bool:
    return name.split(".")[-1].lstrip("_")[:1].isupper()


def _attribute(path: Path, owner: Any = None, name: Any = None, *_: object) -> Any:
    """``getattr(Class, "name")``, the form that protocol 2 gives to the mere mention of a method or an inner class."""
    if not (isinstance(owner, type) and issubclass(owner, Swallow) and _is_third_party(owner.foreign_name)):
        _refuse(path, "builtins.getattr")
    full = f"{owner.foreign_name}.{name}"
    return _foreign_class(full) if _is_class_name(full) else Name(full, partial(_refuse, path, full))


def _refuse(path: Path, name: str, *_: object) -> NoReturn:
    raise UserError(
        f"{path}: tries to run {name!r} when it is opened; it was not loaded: get the checkpoint from a source that "
        "you trust"
    )
