"""Whether Triton kernels can be used."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled: CUDA builds of PyTorch for Linux bring Triton along."""
    return find_spec("triton") is not None
