"""Three ways to the same Seesaw losses: plain, fused (CPU) and Triton (CUDA). One function, at the foot, chooses.

With a_j = p · ln N_j, Eq. 2 reads ln S_ij = min(0, a_j - a_i) = min(a_j, a_i) - a_i. The last term is the same for the
whole row and drops out of the softmax, so that Seesaw is a cross-entropy on z_j + min(a_j, a_i): one minimum and one
sum more than without it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.layers.triton_support import has_triton

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
    own = labels.unsqueeze(1)
    with torch.no_grad():
        shift = torch.minimum(strengths, strengths.gather(0, labels).unsqueeze(1))
        if q > 0:
            log_prob = logits.to(strengths.dtype).log_softmax(dim=1)
            floor = log_prob.gather(1, own).clamp_(min=math.log(eps))
            shift += log_prob.sub_(floor).clamp_(min=0).mul_(q)
    # In place only where nobody follows the gradient: the buffer is then the only one of its size.
    return shift + logits if torch.is_grad_enabled() and logits.requires_grad else shift.add_(logits)


def plain_seesaw(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Losses (N,) in ordinary operations: for compilers and function transforms, and to test the others against."""
    return F.cross_entropy(shifted_logits(logits, labels, strengths, q, eps), labels, reduction="none")


def _gradient(grad: Tensor, logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """The gradient computed again from the logits, itself differentiable: for second derivatives and second passes."""
    prob = shifted_logits(logits, labels, strengths, q, eps).softmax(dim=1)
    weight = grad.to(prob.dtype).unsqueeze(1)
    return (prob * weight).scatter_add(1, labels.unsqueeze(1), -weight).to(logits.dtype)


class _FusedSeesaw(torch.autograd.Function):
    """Keeps one (N, C) buffer, the probabilities, which become the gradient in place; few passes, for small batches."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
        own = labels.unsqueeze(1)
        shifted = shifted_logits(logits, labels, strengths, q, eps)
        prob = shifted.softmax(dim=1)
        own_prob = prob.gather(1, own)
        losses = own_prob.log().neg_()
        # A probability that has run out of digits has no logarithm to speak of; then it takes another pass.
        if not logits.is_cpu or (len(labels) and not float(losses.max()) <= LARGEST_BY_PROBABILITY):
            losses = shifted.log_softmax(dim=1).gather(1, own).neg_()
        ctx.save_for_backward(logits, labels, strengths)
        ctx.options = q, eps
        ctx.prob = prob if ctx.needs_input_grad[0] else None
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        logits, labels, strengths = ctx.saved_tensors
        prob, ctx.prob = ctx.prob, None
        if prob is None or torch.is_grad_enabled():
            return _gradient(grad, logits, labels, strengths, *ctx.options), None, None, None, None
        weight = grad.to(prob.dtype).unsqueeze(1)
        prob.mul_(weight).scatter_add_(1, labels.unsqueeze(1), -weight)
        return prob.to(logits.dtype), None, None, None, None


class _TritonSeesaw(torch.autograd.Function):
    """Keeps four numbers a sample and makes one (N, C) buffer, the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
        from tailseg.losses import seesaw_triton

        losses, *kept = seesaw_triton.forward(logits, labels, strengths, q, eps)
        ctx.save_for_backward(logits, labels, strengths, *kept)
        ctx.options = q, eps
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        logits, labels, strengths, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradient(grad, logits, labels, strengths, *ctx.options), None, None, None, None
        from tailseg.losses import seesaw_triton

        result = seesaw_triton.backward(grad, logits, labels, strengths, *kept, *ctx.options)
        return result, None, None, None, None


def fused_seesaw(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Losses (N,) with the gradient written by hand; any device."""
    losses: Tensor = _FusedSeesaw.apply(logits, labels, strengths, q, eps)
    return losses


def triton_seesaw(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Losses (N,) by Triton kernels: CUDA, or any device under ``TRITON_INTERPRET=1``."""
    losses: Tensor = _TritonSeesaw.apply(logits, labels, strengths, q, eps)
    return losses


def soft_seesaw(logits: Tensor, soft: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """Losses (N,) of soft labels: Σ_c t_c · L_c, where L_c is the loss that the label c would have.

    With q = 0, Σ_j e^{z_j + min(a_j, a_c)} is a sum over the classes no stronger than c, of e^{z + a}, and one over the
    stronger ones, of e^z: running sums over the classes in the order of their strengths, (N, C) each. The largest
    logit, subtracted, keeps both in range: a >= 0, so that its own term is at least 1. The compensation follows another
    order, that of the logits, so with q > 0 all (N, C, C) terms are made.

    Args:
        logits: (N, C) float.
        soft: (N, C) t, each class's share of the label; classes may be weighted.
        strengths: (C,) a = p · ln N >= 0, float32 (up to 88) or float64.
        q: compensation exponent.
        eps: floor of the label's own probability in the compensation.
    """
    logits = logits.to(strengths.dtype)
    if q > 0:
        with torch.no_grad():
            log_prob = logits.log_softmax(dim=1)
            floor = log_prob.clamp(min=math.log(eps)).unsqueeze(2)
            shift = q * (log_prob.unsqueeze(1) - floor).clamp_(min=0)  # (N, label, class)
            shift += torch.minimum(strengths.unsqueeze(1), strengths)
        normalizers = (logits.unsqueeze(1) + shift).logsumexp(dim=2)
    else:
        order = strengths.argsort()
        logits, soft, strengths = logits[:, order], soft[:, order], strengths[order]
        logits = logits - logits.detach().amax(dim=1, keepdim=True)
        weaker = (logits + strengths).exp().cumsum(dim=1)  # and the class itself
        stronger = F.pad(logits[:, 1:].exp().flip(1).cumsum(dim=1).flip(1), (0, 1))
        normalizers = (weaker + strengths.exp() * stronger).log()
    return (soft * (normalizers - strengths - logits)).sum(dim=1)


def seesaw_losses(logits: Tensor, labels: Tensor, strengths: Tensor, q: float, eps: float) -> Tensor:
    """The fastest of the three that will do; arguments of `shifted_logits`, losses (N,)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return plain_seesaw(logits, labels, strengths, q, eps)
    if logits.is_cuda and strengths.dtype == torch.float32 and has_triton():
        return triton_seesaw(logits, labels, strengths, q, eps)
    return fused_seesaw(logits, labels, strengths, q, eps)
