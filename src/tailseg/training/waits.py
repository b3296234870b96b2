"""Finds operations of a training step whose result the host has to wait for: these cannot be part of a CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Filled from the host: nothing of their copy is seen further below.
FROM_HOST = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
OTHERS = ("torchvision::nms",)  # which no tag tells
PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def waiting_operations() -> Iterator[list[str]]:
    """Collect, with their places, operations on a device other than the CPU that wait for it or copy to or from it.

    Those are operations whose number of results hangs on values (``nonzero``, an index of bools), numbers asked for
    (``item``), and tensors made of Python's numbers, but for those made inside a ``backward`` written in Python. An
    operation is noted before it runs.
    """
    found: list[str] = []
    with _Calls(found), _Operations(found):
        yield found


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FROM_HOST and not result.is_cpu:
            self.found.append(func.__name__ + _place())
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.found.append(func._schema.name.removeprefix("aten::") + _place())
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    name, tensors = func._schema.name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device.type for tensor in tensors}
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if devices <= {"cpu"}:
        return False
    if name in INDEXING:
        is_from_host = any(isinstance(value, Tensor) and value.is_cpu for value in args[2:3])
        return is_from_host or any(i is not None and (i.dtype == torch.bool or i.is_cpu) for i in args[1])
    if name in ("aten::_to_copy", "aten::copy_"):
        return "cpu" in devices
    return name in OTHERS or not WAITING_TAGS.isdisjoint(func.tags)


def _place() -> str:
    """The innermost line of this package, but for this file; a backward pass in C++ has none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and file.startswith(PACKAGE):
            return f" at {Path(file).relative_to(PACKAGE).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
