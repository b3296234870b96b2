"""The Seesaw losses in Triton: a program a row forward, a program a piece of a row backward; no (N, C) temporaries."""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_BLOCK = 1024  # columns read at a time
BACKWARD_BLOCK = 1024


@triton.jit
def _shifted(z, strength, own_strength, log_normaliser, floor, q: tl.constexpr):
    """z_j + min(a_j, a_i), and the compensation q · max(0, ln σ_j - floor)."""
    shifted = z + tl.minimum(strength, own_strength)
    if q > 0:
        shifted += q * tl.maximum(z - log_normaliser - floor, 0.0)
    return shifted


@triton.jit
def _log_sum_exp(
    row, strengths, own_strength, log_normaliser, floor, classes,
    q: tl.constexpr, plain: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The largest of a row's shifted logits, or of its plain ones, and ln Σ_j e^{z_j - largest}, in one pass."""
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, classes, block):
        columns = start + tl.arange(0, block)
        inside = columns < classes
        z = tl.load(row + columns, inside, float("-inf")).to(tl.float32)
        if not plain:
            strength = tl.load(strengths + columns, inside, 0.0)
            z = _shifted(z, strength, own_strength, log_normaliser, floor, q)
        new_top = tl.maximum(top, tl.max(z, 0))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing but classes ruled out so far
        total = total * tl.exp(top - anchor) + tl.sum(tl.exp(z - anchor), 0)
        top = new_top
    return top, tl.log(total)


@triton.jit
def _forward_kernel(
    logits, row_stride, labels, strengths, own_strengths, losses, tops, log_totals, plain_normalisers, classes, log_eps,
    q: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    row = logits + sample * row_stride
    label = tl.load(labels + sample)
    own = tl.load(row + label).to(tl.float32)
    own_strength = tl.load(own_strengths + sample)
    plain_normaliser = tl.zeros((), tl.float32)
    floor = tl.zeros((), tl.float32)
    if q > 0:
        top, log_total = _log_sum_exp(row, strengths, 0.0, 0.0, 0.0, classes, q, True, block)
        plain_normaliser = top + log_total
        floor = tl.maximum(own - plain_normaliser, log_eps)
        tl.store(plain_normalisers + sample, plain_normaliser)
    top, log_total = _log_sum_exp(row, strengths, own_strength, plain_normaliser, floor, classes, q, False, block)
    # Kept apart: their sum would lose the digits of a small loss under a large logit.
    tl.store(tops + sample, top)
    tl.store(log_totals + sample, log_total)
    tl.store(losses + sample, (top - (own + own_strength)) + log_total)


@triton.jit
def _backward_kernel(
    grads, logits, row_stride, labels, strengths, own_strengths, tops, log_totals, plain_normalisers, result, classes,
    log_eps, q: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < classes
    row = logits + sample * row_stride
    label = tl.load(labels + sample)
    z = tl.load(row + columns, inside, 0.0).to(tl.float32)
    strength = tl.load(strengths + columns, inside, 0.0)
    own_strength = tl.load(own_strengths + sample)
    plain_normaliser = tl.zeros((), tl.float32)
    floor = tl.zeros((), tl.float32)
    if q > 0:
        plain_normaliser = tl.load(plain_normalisers + sample)
        floor = tl.maximum(tl.load(row + label).to(tl.float32) - plain_normaliser, log_eps)
    shifted = _shifted(z, strength, own_strength, plain_normaliser, floor, q)
    prob = tl.exp((shifted - tl.load(tops + sample)) - tl.load(log_totals + sample))
    value = (prob - tl.where(columns == label, 1.0, 0.0)) * tl.load(grads + sample).to(tl.float32)
    tl.store(result + sample * classes + columns, value.to(result.dtype.element_ty), inside)


def _rows(logits: Tensor) -> Tensor:
    """The logits with neighbouring columns side by side; rows may be apart (a slice of a wider layer)."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def forward(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> tuple[Tensor, ...]:
    """Losses, and four numbers a sample for `backward`, each (N,) float32; arguments of `shifted_logits`."""
    # Gathered here and not in the kernel: PyTorch's gather refuses a label out of range, which Triton would read.
    own_strengths = strengths.gather(0, labels)
    logits = _rows(logits.detach())
    count, classes = logits.shape
    outputs = torch.empty(4, count, dtype=torch.float32, device=logits.device).unbind()
    if count:
        _forward_kernel[(count,)](
            logits,
            logits.stride(0),
            labels.contiguous(),
            strengths.contiguous(),
            own_strengths,
            *outputs,
            classes,
            math.log(eps),
            q=q,
            block=FORWARD_BLOCK,
        )
    losses, *softmax = outputs
    return losses, own_strengths, *softmax


def backward(
    grads: Tensor,
    logits: Tensor,
    labels: Tensor,
    strengths: Tensor,
    own_strengths: Tensor,
    tops: Tensor,
    log_totals: Tensor,
    plain_normalisers: Tensor,
    q: float,
    eps: float,
) -> Tensor:
    """Gradient (N, C) in the dtype of the logits, given that of the losses (N,) and what `forward` returned."""
    logits = _rows(logits.detach())
    count, classes = logits.shape
    result = torch.empty(count, classes, dtype=logits.dtype, device=logits.device)
    if count:
        _backward_kernel[(count, triton.cdiv(classes, BACKWARD_BLOCK))](
            grads.contiguous(),
            logits,
            logits.stride(0),
            labels.contiguous(),
            strengths.contiguous(),
            own_strengths,
            tops,
            log_totals,
            plain_normalisers,
            result,
            classes,
            math.log(eps),
            q=q,
            block=BACKWARD_BLOCK,
        )
    return result
