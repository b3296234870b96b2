"""Less memory for more time: a module's inner maps, computed again in the backward pass (arXiv:1604.06174).

`torch.utils.checkpoint` alone would let batch norm count every image twice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module) -> None:
    """Let a module keep nothing for the backward pass but its inputs, and compute the rest again there.

    Outputs, gradients and running statistics stay what they were: the second time, parts in training mode work on
    copies of their buffers. Where no gradient is wanted the module works as before. It stays the same object, with the
    same parameters, buffers, hooks and state-dict keys.

    Args:
        module: a residual block, say; changed in place. It must not change its input in place. Nothing happens to one
            that is recomputed already.
    """
    if not isinstance(module, _Recomputed):
        kind: Any = type(module)
        module.__class__ = _recomputed(kind)


@cache
def _recomputed(kind: Any) -> Any:
    """The class of recomputed modules of a class."""
    return type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})


class _Recomputed(nn.Module):
    """Stands before a kind of module among the bases of a class."""

    def forward(self, *inputs: Tensor) -> Any:
        forward = super().forward
        if not torch.is_grad_enabled():
            return forward(*inputs)

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            return nullcontext(), _CopiedBuffers(self)

        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


class _CopiedBuffers:
    """While entered, parts in training mode have copies of their buffers; may be entered again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        parts = [part for part in self.module.modules() if part.training]
        self.kept = [(part, name, buffer) for part in parts for name, buffer in part.named_buffers(recurse=False)]
        for part, name, buffer in self.kept:
            setattr(part, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for part, name, buffer in self.kept:
            setattr(part, name, buffer)
        self.kept = []
