"""Seesaw in Triton: labels are counted by one launch, losses with their mean made by one, the gradient by one.

A program has a sample, and the whole row of its logits in registers. What the backward pass needs is computed again
from the logits: read once, they cost no more than a gradient kept since the forward pass, and lose no digits in half
precision. Everything is float32 inside.
"""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailseg.layers.triton_support import Launcher

LABELS_AT_ONCE = 1024  # that a program counts
LOSSES_AT_ONCE = 1024  # that the last program adds up at a time


@triton.jit(
    do_not_specialize=["number", "classes", "last"], do_not_specialize_on_alignment=["labels", "valid", "counts"]
)
def _count_kernel(labels, valid, counts, number, classes, last, has_valid: tl.constexpr, block: tl.constexpr):
    """Add the valid labels below ``classes`` to int64 counts; whole numbers, so that their order does not matter."""
    samples = tl.program_id(0) * block + tl.arange(0, block)
    inside = samples < number
    label = tl.load(labels + samples, inside, 0)
    tl.device_assert((label >= 0) & (label <= last), "Seesaw met a label that is out of range")
    counted = inside & (label >= 0) & (label < classes)
    if has_valid:
        counted = counted & (tl.load(valid + samples, inside, 0) != 0)
    tl.atomic_add(counts + label, tl.full((block,), 1, tl.int64), counted)


@triton.jit
def _shifted(z, strength, own_strength, log_normaliser, floor, q: tl.constexpr):
    """z_j + min(a_j, a_i), and the compensation q · max(0, ln σ_j - floor)."""
    shifted = z + tl.minimum(strength, own_strength)
    if q > 0:
        shifted += q * tl.maximum(z - log_normaliser - floor, 0.0)
    return shifted


@triton.jit
def _log_sum_exp(z):
    """The largest of a row, 0 where all are ruled out, and ln Σ_j e^{z_j - largest}."""
    top = tl.max(z, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.log(tl.sum(tl.exp(z - top), 0))


@triton.jit
def _strengths_of(counts, places, inside, p, counted: tl.constexpr):
    """Strengths p · ln N of counts, or what was made of them before."""
    values = tl.load(counts + places, inside, 0).to(tl.float32)
    if counted:
        values = p * tl.log(tl.maximum(values, 1.0))
    return values


@triton.jit
def _pair_push(row, classes, is_class):
    """The logit of what is true (object or background) less that of the other."""
    lead = tl.load(row + classes).to(tl.float32) - tl.load(row + classes + 1).to(tl.float32)
    return tl.where(is_class, lead, -lead)


@triton.jit(
    do_not_specialize=["row_stride", "rows", "classes", "last", "p", "log_eps"],
    do_not_specialize_on_alignment=[
        "logits", "labels", "valid", "counts", "strengths", "losses", "kept", "class_mean", "pair_mean", "divisor",
        "ticket",
    ],
)  # fmt: skip
def _loss_kernel(
    logits, row_stride, labels, valid, counts, strengths, losses, kept, class_mean, pair_mean, divisor, ticket,
    rows, classes, last, p, log_eps,
    q: tl.constexpr, counted: tl.constexpr, pair: tl.constexpr, mean: tl.constexpr, select: tl.constexpr,
    has_valid: tl.constexpr, block: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Losses of a sample; with ``mean`` the program that is done last adds up all of them, always in the same order.

    ``kept`` holds rows of as many numbers as there are samples: largest logit, log of the sum, plain normaliser,
    judgement of the pair.
    """
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < classes
    row = logits + sample * row_stride
    label = tl.load(labels + sample)
    tl.device_assert((label >= 0) & (label <= last), "Seesaw met a label that is out of range")
    is_class = label < classes
    own = tl.minimum(tl.maximum(label, 0), classes - 1)
    z = tl.load(row + columns, inside, float("-inf")).to(tl.float32)
    own_logit = tl.load(row + own).to(tl.float32)
    strength = _strengths_of(counts, columns, inside, p, counted)
    own_strength = _strengths_of(counts, own, own >= 0, p, counted)
    if counted:  # noqa: SIM102  (known at compilation; the other is not)
        if sample == 0:
            tl.store(strengths + columns, strength, inside)
    plain_normaliser = tl.zeros((), tl.float32)
    floor = tl.zeros((), tl.float32)
    if q > 0:
        top, log_total = _log_sum_exp(z)
        plain_normaliser = top + log_total
        floor = tl.maximum(own_logit - plain_normaliser, log_eps)
        tl.store(kept + 2 * rows + sample, plain_normaliser)
    top, log_total = _log_sum_exp(_shifted(z, strength, own_strength, plain_normaliser, floor, q))
    # Kept apart: their sum would lose the digits of a small loss under a large logit.
    tl.store(kept + sample, top)
    tl.store(kept + rows + sample, log_total)
    loss = (top - (own_logit + own_strength)) + log_total
    counts_here = is_class
    if has_valid:
        is_valid = tl.load(valid + sample) != 0
        counts_here = counts_here & is_valid
    if mean:
        # A loss that is not a number is seen, unless it belongs to an ignored label.
        loss = tl.where(counts_here, loss, 0.0) if select else loss * counts_here.to(tl.float32)
    tl.store(losses + sample, loss)
    if pair:
        lead = _pair_push(row, classes, is_class)
        judged = tl.maximum(-lead, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(lead)))
        if has_valid:
            judged = judged * is_valid.to(tl.float32)
        tl.store(kept + 3 * rows + sample, judged)
    if mean:
        tl.debug_barrier()  # all that this program wrote, before it says that it is done
        if tl.atomic_add(ticket, 1) == rows - 1:
            tl.debug_barrier()
            total = tl.zeros((at_once,), tl.float32)
            judgements = tl.zeros((at_once,), tl.float32)
            number = tl.zeros((at_once,), tl.float32)
            for start in range(0, rows, at_once):
                samples = start + tl.arange(0, at_once)
                here = samples < rows
                total += tl.load(losses + samples, here, 0.0, cache_modifier=".cg")
                if pair:
                    judgements += tl.load(kept + 3 * rows + samples, here, 0.0, cache_modifier=".cg")
                if has_valid:
                    number += (here & (tl.load(valid + samples, here, 0) != 0)).to(tl.float32)
                else:
                    number += here.to(tl.float32)
            among = tl.maximum(tl.sum(number, 0), 1.0)
            tl.store(class_mean, tl.sum(total, 0) / among)
            if pair:
                tl.store(pair_mean, tl.sum(judgements, 0) / among)
            tl.store(divisor, among)


@triton.jit(
    do_not_specialize=["row_stride", "rows", "classes", "width", "log_eps"],
    do_not_specialize_on_alignment=[
        "grads", "pair_grads", "logits", "labels", "valid", "strengths", "kept", "divisor", "gradient",
    ],
)  # fmt: skip
def _gradient_kernel(
    grads, pair_grads, logits, row_stride, labels, valid, strengths, kept, divisor, gradient, rows, classes, width,
    log_eps, q: tl.constexpr, pair: tl.constexpr, mean: tl.constexpr, has_valid: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A row of the gradient; ``grads`` holds one number a sample, or with ``mean`` one for all."""
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < classes
    row = logits + sample * row_stride
    label = tl.load(labels + sample)
    is_class = label < classes
    own = tl.minimum(tl.maximum(label, 0), classes - 1)
    z = tl.load(row + columns, inside, 0.0).to(tl.float32)
    strength = tl.load(strengths + columns, inside, 0.0)
    own_strength = tl.load(strengths + own)
    plain_normaliser = tl.zeros((), tl.float32)
    floor = tl.zeros((), tl.float32)
    if q > 0:
        plain_normaliser = tl.load(kept + 2 * rows + sample)
        floor = tl.maximum(tl.load(row + own).to(tl.float32) - plain_normaliser, log_eps)
    shifted = _shifted(z, strength, own_strength, plain_normaliser, floor, q)
    prob = tl.exp((shifted - tl.load(kept + sample)) - tl.load(kept + rows + sample))
    if mean:
        share = 1.0 / tl.load(divisor)
        if has_valid:
            share = share * (tl.load(valid + sample) != 0).to(tl.float32)
        weight = tl.load(grads).to(tl.float32) * share * is_class.to(tl.float32)
    else:
        weight = tl.load(grads + sample).to(tl.float32)
    value = (prob - tl.where(columns == own, 1.0, 0.0)) * weight
    out = gradient + sample * width
    tl.store(out + columns, value.to(gradient.dtype.element_ty), inside)
    if pair:
        push = 1.0 / (1.0 + tl.exp(_pair_push(row, classes, is_class)))  # towards what is true
        push = push * tl.load(pair_grads).to(tl.float32) * share
        push = tl.where(is_class, push, -push)
        tl.store(out + classes, (-push).to(gradient.dtype.element_ty))
        tl.store(out + classes + 1, push.to(gradient.dtype.element_ty))


# With assertions, but not those that Triton would add for itself, of overflows.
_count = Launcher(_count_kernel, debug=True, sanitize_overflow=False)
_loss = Launcher(_loss_kernel, debug=True, sanitize_overflow=False)
_gradient = Launcher(_gradient_kernel)


class Forward(NamedTuple):
    """Losses, and what the backward pass needs beside them."""

    losses: Tensor  # (N,) float32
    class_mean: Tensor  # () float32
    pair_mean: Tensor  # () float32
    strengths: Tensor  # (C,) float32
    kept: Tensor  # (4, N) float32
    divisor: Tensor  # () float32


def count(labels: Tensor, valid: Tensor | None, counts: Tensor, last: int) -> None:
    """Add labels (N,) int64 to counts (C,) int64 in place, where ``valid`` (N,) bool; those beyond C are not counted.

    A label outside [0, last] ends in an assertion on the device.
    """
    if len(labels):
        values = (labels.contiguous(), _bytes(valid, labels), counts, len(labels), len(counts), last)
        _count((triton.cdiv(len(labels), LABELS_AT_ONCE),), values, (valid is not None, LABELS_AT_ONCE), warps=4)


def forward(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    source: Tensor,
    p: float | None,
    q: float,
    eps: float,
    *,
    mean: bool,
    select: bool = False,
) -> Forward:
    """Losses of samples, and with ``mean`` and at least one of them their means over the valid ones.

    Args:
        logits: (N, K), K = C or, with objectness, C + 2.
        labels: (N,) int64 in [0, C), with objectness in [0, C]; others end in an assertion on the device.
        valid: (N,) bool; None: all are. Looked at for means only.
        source: (C,), counts of which the strengths are made with ``p``, or float32 strengths and no ``p``.
        p: mitigation exponent.
        q: compensation exponent.
        eps: floor of the label's own probability in the compensation.
        mean: whether to add up the losses.
        select: drop what is not a number where a sample is not valid.
    """
    logits = _rows(logits)
    (number, width), classes = logits.shape, len(source)
    pair, counted = width > classes, p is not None

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    strengths = empty(classes) if counted else source.contiguous()
    made = Forward(empty(number), empty(), empty(), strengths, empty(4, number), empty())
    if number:
        values = (
            logits,
            logits.stride(0),
            labels.contiguous(),
            _bytes(valid, labels),
            source.contiguous(),
            strengths,
            made.losses,
            made.kept,
            made.class_mean,
            made.pair_mean,
            made.divisor,
            torch.zeros(1, dtype=torch.int32, device=logits.device) if mean else made.divisor,
            number,
            classes,
            classes if pair else classes - 1,
            p or 0.0,
            math.log(eps),
        )
        block = triton.next_power_of_2(classes)
        flags = (q, counted, pair, mean, select, valid is not None, block, LOSSES_AT_ONCE)
        _loss((number,), values, flags, warps=_warps(block))
    return made


def backward(
    grads: Tensor,
    pair_grads: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    strengths: Tensor,
    kept: Tensor,
    divisor: Tensor,
    q: float,
    eps: float,
    *,
    mean: bool,
) -> Tensor:
    """Gradient (N, K) in the dtype of the logits, given those of the losses (N,) or of the means ()."""
    logits = _rows(logits)
    (number, width), classes = logits.shape, len(strengths)
    gradient = torch.empty(number, width, dtype=logits.dtype, device=logits.device)
    if number:
        grads = grads.contiguous()
        values = (
            grads,
            grads if pair_grads is None else pair_grads.contiguous(),
            logits,
            logits.stride(0),
            labels.contiguous(),
            _bytes(valid, labels),
            strengths,
            kept,
            divisor,
            gradient,
            number,
            classes,
            width,
            math.log(eps),
        )
        block = triton.next_power_of_2(classes)
        _gradient((number,), values, (q, width > classes, mean, valid is not None, block), warps=_warps(block))
    return gradient


def _bytes(valid: Tensor | None, other: Tensor) -> Tensor:
    """The flags as Triton reads them; something in their place where there are none, which is not read."""
    return other if valid is None else valid.contiguous().view(torch.uint8)


def _rows(logits: Tensor) -> Tensor:
    """The logits with neighbouring columns side by side; rows may be apart (a slice of a wider layer)."""
    logits = logits.detach()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _warps(block: int) -> int:
    """Warps that hold a row of ``block`` numbers: sixteen of them a thread, as far as there are threads."""
    return min(max(block // 512, 4), 32)
