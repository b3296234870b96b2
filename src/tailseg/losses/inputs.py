"""Inputs of losses, in the shapes of `torch.nn.functional.cross_entropy`: their checks, and how they are flattened.

Shape letters: N samples of a batch, K logits and C classes of each, M = N · d1 · d2 · ... samples once flattened.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tailseg.layers.watched import is_watched


class FlatTargets(NamedTuple):
    """Logits and targets of a batch with one row a sample."""

    logits: Tensor  # (M, C)
    labels: Tensor  # (M,) int64 in [0, C): the class that a sample is counted for; 0 where it is ignored
    soft: Tensor | None  # (M, C) soft labels; None: labels are hard
    counted: (
        Tensor | None
    )  # (M,) bool, False where a label is ignored or a soft label holds only zeros; None: all count
    shape: torch.Size  # of the losses before they were flattened


def flat_targets(name: str, logits: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> FlatTargets:
    """Check logits and labels of the loss ``name``, and flatten them.

    Args:
        name: of the loss, for messages.
        logits: (N, C), (N, C, d1, ...) or (C,) float.
        labels: int64 or uint8 in [0, C) or ``ignore_index``, in the shape of the logits without the class dimension;
            or soft labels, float in [0, 1] in the shape of the logits.
        num_classes: C.
        ignore_index: label of samples without a loss.

    Raises:
        ValueError: a shape, a type or (on CPU) a label is not as described.
    """
    labels = whole_labels(labels)
    if labels.is_floating_point() and labels.shape == logits.shape:
        shape = require_shapes(name, logits, None, num_classes)
        _require_shares(name, labels)
        soft = flat_logits(labels)
        largest, own = soft.max(dim=1)
        return FlatTargets(flat_logits(logits), own, soft, largest > 0, shape)
    shape = require_shapes(name, logits, labels, num_classes)
    none_ignored = require_labels(name, labels, num_classes, ignore_index=ignore_index)
    flat = labels.flatten()
    if none_ignored:
        return FlatTargets(flat_logits(logits), flat, None, None, shape)
    counted = flat != ignore_index
    return FlatTargets(flat_logits(logits), flat * counted, None, counted, shape)


def whole_labels(labels: Tensor) -> Tensor:
    """Labels as int64 where they are uint8, which images of labels hold, as in `torch.nn.functional.cross_entropy`."""
    return labels.long() if labels.dtype == torch.uint8 else labels


def flat_logits(logits: Tensor) -> Tensor:
    """(M, K) of logits (N, K), (N, K, d1, ...) or (K,); a copy where there are dimensions behind the classes."""
    if logits.dim() == 2:
        return logits
    return logits.unsqueeze(0) if logits.dim() == 1 else logits.movedim(1, -1).flatten(end_dim=-2)


def require_shapes(name: str, logits: Tensor, labels: Tensor | None, width: int) -> torch.Size:
    """Shape of the logits without their class dimension, which is that of the losses and of hard labels.

    Raises:
        ValueError: there are not ``width`` logits a sample, labels have another shape, or logits are no floats.
    """
    classes_at = min(logits.dim(), 2) - 1
    shape = logits.shape[: max(classes_at, 0)] + logits.shape[2:]
    if classes_at < 0 or logits.shape[classes_at] != width or (labels is not None and labels.shape != shape):
        received = tuple(logits.shape if labels is None else labels.shape)
        raise ValueError(
            f"{name} expected logits (N, {width}) or (N, {width}, ...) and labels (N,) or (N, ...), "
            f"received {tuple(logits.shape)} and {received}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"{name} expected floating logits, received {logits.dtype}")
    return torch.Size(shape)


def require_labels(
    name: str, labels: Tensor, num_classes: int, *, background: bool = False, ignore_index: int | None = None
) -> bool:
    """Raise ValueError unless labels are int64 and, on the CPU, in [0, C) or ignored; C too where it is background.

    Labels are looked at on the CPU only: elsewhere that would stall every step. Compilers and function transforms see
    the type alone.

    Returns:
        Whether it is known that no label is ``ignore_index``.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"{name} expected int64 labels, received {labels.dtype}; pass labels.long()")
    if not labels.numel():
        return True
    if not _may_look(labels):
        return ignore_index is None
    least, largest = (int(value) for value in torch.aminmax(labels))
    last = num_classes if background else num_classes - 1
    if least >= 0 and largest <= last and (ignore_index is None or not least <= ignore_index <= largest):
        return True
    wrong = (labels < 0) | (labels > last)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if not wrong.any():
        return False
    allowed = f"[0, {last}] ({last} is background)" if background else f"[0, {num_classes})"
    if ignore_index is not None:
        allowed += f" or {ignore_index} (ignored)"
    raise ValueError(f"{name} expected labels in {allowed}, received {_first(labels, wrong)}")


def _require_shares(name: str, soft: Tensor) -> None:
    """Raise ValueError unless soft labels are in [0, 1]; looked at on the CPU only."""
    if not soft.numel() or not _may_look(soft):
        return
    least, largest = torch.aminmax(soft)
    if not (float(least) >= 0 and float(largest) <= 1):  # not a number either
        found = _first(soft, ~((soft >= 0) & (soft <= 1)))
        raise ValueError(f"{name} expected soft labels in [0, 1], received {found}")


def _may_look(tensor: Tensor) -> bool:
    return tensor.is_cpu and not is_watched()


def _first(values: Tensor, wrong: Tensor) -> str:
    """The first wrong value and its position, a number in one dimension and else a tuple."""
    position = tuple(wrong.nonzero()[0].tolist())
    return f"{values[position].item()} at position {position[0] if len(position) == 1 else position}"
