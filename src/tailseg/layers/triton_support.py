"""Check for Triton, and launches of its kernels that keep what was compiled."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the check is asked for where PyTorch need not be loaded
    from torch import Tensor

INT32 = range(-(2**31), 2**31)


@cache
def has_triton() -> bool:
    """Return whether kernels can be compiled: CUDA builds of PyTorch for Linux bring Triton along."""
    return find_spec("triton") is not None


class Launcher:
    """Launches of one kernel, whose compiled forms are kept by device, types and constants.

    Triton looks at every argument of every launch, its alignment and its divisors too, which takes longer than a small
    kernel runs. So the kernel must not be specialised on values (``do_not_specialize`` for numbers,
    ``do_not_specialize_on_alignment`` for tensors): what was compiled once then serves all that look alike here.

    Args:
        kernel: a function under `triton.jit`.
        options: of its compilation.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = options
        self.compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int],
        values: tuple[Tensor | int | float, ...],
        constants: tuple[bool | int | float, ...],
        warps: int,
    ) -> None:
        """Run the kernel on the device of its first argument, a tensor.

        Args:
            grid: programs.
            values: arguments of the kernel, in its order.
            constants: its ``constexpr`` arguments, which follow those.
            warps: of each program.
        """
        from torch import cuda

        key = (values[0].device, warps, constants, *map(_look, values))  # type: ignore[union-attr]
        compiled = self.compiled.get(key)
        with cuda.device_of(values[0]):  # Triton launches on the current device, wherever the tensors are
            if compiled is None:
                # Under Triton's interpreter there is nothing to keep: None.
                self.compiled[key] = self.kernel[grid](*values, *constants, num_warps=warps, **self.options)
            else:
                compiled[*grid, 1, 1](*values, *constants)


def _look(value: Tensor | int | float) -> Hashable:
    """What a kernel compiled without specialisation depends on."""
    if isinstance(value, int):
        return value in INT32
    return float if isinstance(value, float) else value.dtype
