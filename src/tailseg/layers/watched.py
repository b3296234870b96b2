"""Who follows the operations on tensors, so that values cannot be looked at, nor gradients be written by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a function transform of `torch.func` or forward-mode AD are under way."""
    return bool(torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def is_watched() -> bool:
    """Return whether a compiler is, or one of these."""
    return torch.compiler.is_compiling() or is_transformed()


def is_batched(*grads: Tensor | None) -> bool:
    """Return whether gradients stand for several at once, by a transform or by ``is_grads_batched``."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    return is_transformed() or any(grad is not None and batched(grad) for grad in grads)
