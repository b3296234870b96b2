"""Stand-ins for the names in a pickle: objects of ours that note what was asked for, and do nothing.

Two fences, each enough by itself against a file that wants to run code: stand-ins do nothing, and a name that is
neither data nor a class makes the whole file refused (`stand_in`).
"""

from __future__ import annotations

import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tailseg.errors import UserError
from tailseg.zoo.pickle_limits import Allowance, require
from tailseg.zoo.pickle_values import DTYPES, STORAGES, Dtype, Inert, Later, LazyArray, LazyTensor, PlainDict, as_bytes


class Name(Inert):
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


@lru_cache(1024)
def _foreign_class(name: str) -> type[Swallow]:
    return type("Foreign", (Swallow,), {"__slots__": (), "foreign_name": name})


class _Partial(Swallow):
    """``functools.partial``, by which protocol 2 makes objects that need keywords: called, it is one more unknown."""

    __slots__ = ()
    foreign_name = "functools.partial"

    def __call__(self, *_: object) -> Swallow:
        return self


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


def _scalar(allowance: Allowance, dtype: Any, raw: Any = None) -> Any:
    kind = dtype.numpy()
    if kind is None:
        return _foreign_class("numpy.generic")()
    value = np.frombuffer(as_bytes(allowance, raw), kind, 1)[0].item()
    return Later(complex, value.real, value.imag) if type(value) is complex else value


def _encode(allowance: Allowance, text: str, encoding: str = "") -> bytes:
    require(encoding in ("latin1", "latin-1"), "text is encoded, not bytes")
    return as_bytes(allowance, text)


def _bytes(allowance: Allowance, content: Any = b"", *_: object) -> bytes:
    if type(content) is list:
        allowance.take_bytes(len(content))
        return bytes(content)
    return as_bytes(allowance, content)


def _list(allowance: Allowance, content: Any = ()) -> list[Any]:
    require(type(content) in (list, tuple, set), "a list is made of no items")
    allowance.take_nodes(len(content))
    return list(content)


def _set(allowance: Allowance, content: Any = ()) -> set[Any]:
    items = _list(allowance, content)
    allowance.take_keys(items)
    return set(items)


def _default_dict(allowance: Allowance, _factory: object = None, *content: Any) -> PlainDict:
    return PlainDict(allowance, *content)


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


def _parameter(value: Any, *_: object) -> Any:
    require(isinstance(value, LazyTensor | Swallow), "a parameter is no tensor")
    return value


def _other_tensor(*_: object) -> Swallow:
    return _foreign_class("torch.Tensor")()


_CALLS: dict[str, Callable[..., Any]] = {
    "builtins.complex": partial(Later, complex),
    "builtins.frozenset": partial(Later, frozenset),
    "builtins.tuple": partial(Later, tuple),
    "copyreg.__newobj__": _reconstruct_object,
    "copyreg.__newobj_ex__": _reconstruct_object,
    "copyreg._reconstructor": _reconstruct_object,
    "functools.partial": _Partial,
    "numpy.dtype": Dtype,
    "torch.Size": partial(Later, tuple),
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
}
for _kind in (  # sparse, quantized and other tensors that no detector has
    *("sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage", "wrapper_subclass"),
    *("device_tensor_from_cpu_tensor", "device_tensor_from_numpy"),
):
    _CALLS[f"torch._utils._rebuild_{_kind}"] = _other_tensor
# Those that copy what they are given: how much, the file's `Allowance` counts.
_COPYING_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.dict": PlainDict,
    "builtins.list": _list,
    "builtins.set": _set,
    "collections.Counter": PlainDict,
    "collections.OrderedDict": PlainDict,
    "collections.defaultdict": _default_dict,
}
for _core in ("numpy.core", "numpy._core"):
    _CALLS[f"{_core}.multiarray._reconstruct"] = _array
    _CALLS[f"{_core}.numeric._frombuffer"] = _array_of_buffer
    _COPYING_CALLS[f"{_core}.multiarray.scalar"] = _scalar

# Names of the standard library, torch and numpy that may occur, and of which nothing is kept but the name.
_KEPT_AS_NAME = re.compile(
    r"""argparse\.Namespace | types\.SimpleNamespace | typing\.Any | collections\.deque
    | builtins\.(object|int|float|str|bool|slice|range)
    | datetime\.(date|datetime|time|timedelta|timezone) | decimal\.Decimal | fractions\.Fraction | uuid\.UUID
    | pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path
    | numpy\.(bool_?|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|str_|bytes_)
    | numpy\.random\._pickle\.__(randomstate|generator|bit_generator)_ctor
    | torch\.(device|Tensor|Generator|_tensor\.Tensor|serialization\._get_layout|storage\._?TypedStorage)
    | torch\.per_(tensor|channel)_\w+ | torch\.(cuda\.)?(sparse\.)?[A-Z][A-Za-z0-9]*Tensor
    | torch\.nn\.(parameter\.)?(Parameter|Buffer) | torch\.(nn\.modules|optim)\.[\w.]*\.[A-Z]\w*""",
    re.VERBOSE,
)
_OWN_WORLD = sys.stdlib_module_names | {"torch", "numpy"}


def stand_in(path: Path, allowance: Allowance, module: str, name: str) -> Any:
    """The stand-in for a name; a name that could only be there to be run makes the whole file refused.

    Harmless are the names listed above and, of third parties, those spelt as a class.
    """
    asked = f"{module}.{name}"
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
    full = f"{module}.{name}"
    if full in _CALLS:
        return Name(full, _CALLS[full])
    if full in _COPYING_CALLS:
        return Name(full, partial(_COPYING_CALLS[full], allowance))
    if full == "builtins.getattr":
        return Name(full, partial(_attribute, path))
    if full in STORAGES or full in DTYPES or full == "numpy.ndarray":
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
