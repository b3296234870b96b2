"""Check for Triton."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Return whether kernels can be compiled: CUDA builds of PyTorch for Linux bring Triton along."""
    return find_spec("triton") is not None
