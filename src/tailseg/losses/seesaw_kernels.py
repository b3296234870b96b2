"""Three ways to the same Seesaw losses: plain, fused (CPU) and Triton (CUDA). One function, at the foot, chooses.

With a_j = p · ln N_j, Eq. 2 reads ln S_ij = min(0, a_j - a_i) = min(a_j, a_i) - a_i. The last term is the same for the
whole row and drops out of the softmax, so that Seesaw is a cross-entropy on z_j + min(a_j, a_i): one minimum and one
sum more than without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.layers.triton_support import has_triton
from tailseg.layers.watched import is_batched, is_watched

LARGEST_BY_PROBABILITY = 69.0  # -ln 1e-30: float32 holds smaller ones, with fewer and fewer digits


def shifted_logits(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Logits of Seesaw's softmax: z_j + ln S_ij + a_i.

    Args:
        logits: (N, C) float.
        labels: (N,) int64 in [0, C).
        strengths: (C,) a = p · ln N, float32 or float64.
        q: compensation exponent.
        eps: floor of the label's own probability in the compensation.

    Returns:
        (N, C) in the dtype of ``strengths``; the gradient passes to ``logits`` unchanged, as S carries none.
    """
    with torch.no_grad():
        shift = torch.minimum(strengths, strengths.gather(0, labels).unsqueeze(1))
        if q > 0:
            shift += _compensation(logits.detach(), labels.unsqueeze(1), strengths.dtype, q, eps)
    return shift + logits


def _compensation(logits: Tensor, own: Tensor, dtype: torch.dtype, q: float, eps: float) -> Tensor:
    """Compensation q · ln max(1, σ_j / max(σ_i, eps)), (N, C), of labels (N, 1)."""
    log_prob = logits.to(dtype).log_softmax(dim=1)
    floor = log_prob.gather(1, own).clamp_(min=math.log(eps))
    return log_prob.sub_(floor).clamp_(min=0).mul_(q)


def plain_seesaw(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Losses (N,) in ordinary operations: for compilers and function transforms, and to test the others against."""
    return F.cross_entropy(shifted_logits(logits, labels, strengths, q, eps), labels, reduction="none")


def plain_parts(
    logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Losses (N,) over the classes and, where two logits lie behind those, the judgement object or background, (N,).

    Args:
        logits: (N, K) float, K = C, or K = C + 2 with those of ``object`` and ``background``.
        labels: (N,) int64 in [0, C), with K = C + 2 in [0, C], where C is background and its first loss has no meaning.
        strengths: (C,) as of `shifted_logits`, and so are the rest.
        q: compensation exponent.
        eps: floor of the label's own probability in the compensation.

    Returns:
        Both losses of each sample, the second None where K = C.
    """
    classes = len(strengths)
    if logits.shape[1] == classes:
        return plain_seesaw(logits, labels, strengths, q, eps), None
    # Split and not sliced: the gradients of the parts are then put together in one go.
    own, pair = logits.split([classes, 2], dim=1)
    losses = plain_seesaw(own, labels.clamp(max=classes - 1), strengths, q, eps)
    return losses, F.cross_entropy(pair.to(strengths.dtype), (labels == classes).long(), reduction="none")


def _gradient(
    grads: Sequence[Tensor], logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float
) -> Tensor:
    """The gradient computed again from the logits, itself differentiable: for second derivatives and second passes."""
    classes = len(strengths)
    own = labels.clamp(max=classes - 1)
    prob = shifted_logits(logits[:, :classes], own, strengths, q, eps).softmax(dim=1)
    weight = grads[0].to(prob.dtype).unsqueeze(1)
    result = (prob * weight).scatter_add(1, own.unsqueeze(1), -weight)
    if logits.shape[1] > classes:
        is_class = labels < classes
        lead = (logits[:, -2] - logits[:, -1]).to(prob.dtype)
        push = torch.sigmoid(-lead.where(is_class, -lead)) * grads[1]
        pair = torch.stack([-push, push], dim=1)
        result = torch.cat([result, pair.where(is_class.unsqueeze(1), -pair)], dim=1)
    return result.to(logits.dtype)


class _FusedSeesaw(torch.autograd.Function):
    """Keeps one (N, K) buffer, the probabilities, which become the gradient in place; few passes, for small batches."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        classes = len(strengths)
        has_pair = logits.shape[1] > classes
        own = (labels.clamp(max=classes - 1) if has_pair else labels).unsqueeze(1)
        # The pair's columns get a probability of 0, and are spared a copy of the logits without them.
        weights = F.pad(strengths, (0, logits.shape[1] - classes), value=-math.inf) if has_pair else strengths
        shift = torch.minimum(weights, strengths.gather(0, own.squeeze(1)).unsqueeze(1))
        if q > 0:
            shift[:, :classes] += _compensation(logits[:, :classes], own, strengths.dtype, q, eps)
        shifted = shift.add_(logits)
        prob = shifted.softmax(dim=1)
        losses = prob.gather(1, own).log_().neg_()
        # A probability that has run out of digits has no logarithm to speak of; then it takes another pass.
        if not logits.is_cpu or (len(labels) and not float(losses.max()) <= LARGEST_BY_PROBABILITY):
            losses = shifted.log_softmax(dim=1).gather(1, own).neg_()
        judged = push = None
        if has_pair:
            lead = (logits[:, -2] - logits[:, -1]).to(strengths.dtype)
            towards_truth = lead.where(labels < classes, -lead)
            judged, push = -F.logsigmoid(towards_truth), torch.sigmoid(-towards_truth)
        ctx.save_for_backward(logits, labels, strengths)
        ctx.options = q, eps
        ctx.kept = (prob, own, push) if ctx.needs_input_grad[0] else None
        return losses.squeeze(1), judged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, strengths = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if kept is None or torch.is_grad_enabled() or is_batched(*grads):
            return _gradient(grads, logits, labels, strengths, *ctx.options), None, None, None, None
        prob, own, push = kept
        weight = grads[0].to(prob.dtype).unsqueeze(1)
        prob.mul_(weight).scatter_add_(1, own, -weight)
        if push is not None:
            push = push.mul_(grads[1])
            torch.where(labels < len(strengths), -push, push, out=prob[:, -2])
            torch.neg(prob[:, -2], out=prob[:, -1])
        return prob.to(logits.dtype), None, None, None, None


class _TritonSeesaw(torch.autograd.Function):
    """Keeps a few numbers a sample and makes one (N, C) buffer, the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
        from tailseg.losses import seesaw_triton

        made = seesaw_triton.forward(logits, labels, None, strengths, None, q, eps, mean=False)
        ctx.save_for_backward(logits, labels, strengths, made.kept, made.divisor)
        ctx.options = q, eps
        return made.losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, strengths, kept, divisor = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(*grads):
            return _gradient(grads, logits, labels, strengths, *ctx.options), None, None, None, None
        from tailseg.losses import seesaw_triton

        known = logits, labels, None, strengths, kept, divisor, *ctx.options
        return seesaw_triton.backward(grads[0], None, *known, mean=False), None, None, None, None


class _TritonMeans(torch.autograd.Function):
    """The means of the same losses, by the kernel that makes these."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        valid: Tensor | None,
        counts: Tensor,
        p: float,
        q: float,
        eps: float,
        select: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from tailseg.losses import seesaw_triton

        made = seesaw_triton.forward(logits, labels, valid, counts, p, q, eps, mean=True, select=select)
        ctx.save_for_backward(logits, labels, valid, made.strengths, made.kept, made.divisor)
        ctx.options = q, eps
        return made.class_mean, made.pair_mean if logits.shape[1] > len(counts) else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, valid, strengths, kept, divisor = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(*grads):
            share = torch.ones_like(labels, dtype=strengths.dtype) if valid is None else valid.to(strengths.dtype)
            share = share / divisor
            upstream = (
                grads[0] * share * (labels < len(strengths)),
                grads[1] if grads[1] is None else grads[1] * share,
            )
            result = _gradient(upstream, logits, labels, strengths, *ctx.options)
        else:
            from tailseg.losses import seesaw_triton

            known = logits, labels, valid, strengths, kept, divisor, *ctx.options
            result = seesaw_triton.backward(grads[0], grads[1], *known, mean=True)
        return result, *[None] * 7


def fused_seesaw(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Losses (N,) with the gradient written by hand; any device."""
    return fused_parts(logits, labels, strengths, q, eps)[0]


def fused_parts(
    logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`plain_parts` with the gradient written by hand; any device."""
    parts: tuple[Tensor, Tensor | None] = _FusedSeesaw.apply(logits, labels, strengths, q, eps)
    return parts


def triton_seesaw(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Losses (N,) by Triton kernels: CUDA, or any device under ``TRITON_INTERPRET=1``."""
    losses: Tensor = _TritonSeesaw.apply(logits, labels, strengths, q, eps)
    return losses


def triton_means(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    counts: Tensor,
    p: float,
    q: float,
    eps: float,
    *,
    select: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Means over the valid ones of N >= 1 samples of `plain_parts`; the same devices.

    Args:
        logits: (N, K) float, not float64.
        labels: (N,) int64.
        valid: (N,) bool; None: all are.
        counts: (C,) samples seen of each class, from which the strengths are made.
        p: mitigation exponent.
        q: compensation exponent.
        eps: floor of the label's own probability in the compensation.
        select: drop a loss that is not a number where its sample is not valid; else it is seen.

    Returns:
        The losses over the classes summed over valid samples that are not background, and the judgements (None where
        K = C) over all valid ones; both divided by the number of the latter, at least 1.
    """
    means: tuple[Tensor, Tensor | None] = _TritonMeans.apply(logits, labels, valid, counts, p, q, eps, select)
    return means


def count_labels(labels: Tensor, valid: Tensor | None, counts: Tensor, *, background: bool) -> None:
    """Add labels (N,) to counts (C,) int64 in place by Triton, where ``valid``; with ``background`` C is no class."""
    from tailseg.losses import seesaw_triton

    seesaw_triton.count(labels, valid, counts, len(counts) if background else len(counts) - 1)


def takes_triton(logits: Tensor) -> bool:
    """Return whether Triton's kernels are the way for these logits."""
    return bool(logits.is_cuda and logits.dtype != torch.float64 and has_triton() and not is_watched())


def soft_seesaw(
    logits: Tensor, soft: Tensor, strengths: Tensor, q: float, eps: float, *, steep: bool = False
) -> Tensor:
    """Losses (N,) of soft labels: Σ_c t_c · L_c, where L_c is the loss that the label c would have.

    With q = 0, Σ_j e^{z_j + min(a_j, a_c)} is a sum over the classes no stronger than c, of e^{z + a}, and one over the
    stronger ones, of e^z: running sums over the classes in the order of their strengths, (N, C) each. The largest
    logit, subtracted, keeps both in range: a >= 0, so that its own term is at least 1. The compensation follows another
    order, that of the logits, so with q > 0 all (N, C, C) terms are made.

    Args:
        logits: (N, C) float.
        soft: (N, C) t, each class's share of the label; classes may be weighted.
        strengths: (C,) a = p · ln N >= 0, float32 or float64.
        q: compensation exponent.
        eps: floor of the label's own probability in the compensation.
        steep: e^a may be more than the dtype holds (float32: a of 88); the sums are then kept as logarithms.
    """
    logits = logits.to(strengths.dtype)
    if q > 0:
        with torch.no_grad():  # which forward-mode AD does not heed
            log_prob = logits.detach().log_softmax(dim=1)
            floor = log_prob.clamp(min=math.log(eps)).unsqueeze(2)
            shift = q * (log_prob.unsqueeze(1) - floor).clamp_(min=0)  # (N, label, class)
            shift += torch.minimum(strengths.unsqueeze(1), strengths)
        normalizers = (logits.unsqueeze(1) + shift).logsumexp(dim=2)
        return (soft * (normalizers - strengths - logits)).sum(dim=1)
    order = strengths.argsort()
    logits, soft, strengths = logits[:, order], soft[:, order], strengths[order]
    if steep:
        weaker = _running_logsumexp(logits + strengths)
        stronger = _running_logsumexp(logits.flip(1)).flip(1)[:, 1:] + strengths[:-1]
        both = torch.stack([weaker[:, :-1], stronger]).logsumexp(dim=0)
        normalizers = torch.cat([both, weaker[:, -1:]], dim=1)
    else:
        logits = logits - logits.detach().amax(dim=1, keepdim=True)
        weaker = (logits + strengths).exp().cumsum(dim=1)  # and the class itself
        stronger = F.pad(logits[:, 1:].exp().flip(1).cumsum(dim=1).flip(1), (0, 1))
        normalizers = (weaker + strengths.exp() * stronger).log()
    return (soft * (normalizers - strengths - logits)).sum(dim=1)


def _running_logsumexp(values: Tensor) -> Tensor:
    """Logarithms of the running sums of e^values along (N, C), by doubling."""
    step = 1
    while step < values.shape[1]:
        further = torch.stack([values[:, step:], values[:, :-step]]).logsumexp(dim=0)
        values, step = torch.cat([values[:, :step], further], dim=1), 2 * step
    return values


def seesaw_losses(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """The fastest of the three that will do; arguments of `shifted_logits`, losses (N,)."""
    if is_watched():
        return plain_seesaw(logits, labels, strengths, q, eps)
    if takes_triton(logits):
        return triton_seesaw(logits, labels, strengths, q, eps)
    return fused_seesaw(logits, labels, strengths, q, eps)
