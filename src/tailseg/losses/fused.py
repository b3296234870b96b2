"""Losses whose gradient is made with them, for CPUs: what costs there is each pass over the (R, K) logits.

A loss that has such a way says its definition too, in ordinary operations. That one serves other devices, compilers and
function transforms, logits too large for e^z, and second derivatives. Shape letters: R RoIs, K logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.layers.watched import is_watched

LARGEST_LOGIT = 70.0  # float32 holds the sum of a million of e^70

Definition = Callable[[Tensor], Tensor]  # of logits (R, K) to losses (R,)


def may_fuse(logits: Tensor) -> bool:
    """Return whether e^z of all logits (R, K) can be taken, and looking at them costs no wait."""
    return logits.is_cpu and logits.numel() > 0 and not is_watched() and float(logits.detach().amax()) <= LARGEST_LOGIT


class _WithGradient(torch.autograd.Function):
    """Keeps the gradient of the losses, and only weighs it in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, losses: Tensor, gradient: Tensor, definition: Definition) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, gradient)
            ctx.definition = definition
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        logits, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            return *torch.autograd.grad(ctx.definition(logits), logits, grad, create_graph=True), None, None, None
        return gradient * grad.unsqueeze(1), None, None, None


def with_gradient(logits: Tensor, losses: Tensor, gradient: Tensor, definition: Definition) -> Tensor:
    """Losses that backpropagate into the logits by a gradient that is known already.

    Args:
        logits: (R, K) float.
        losses: (R,).
        gradient: (R, K) of the losses, in the dtype of the logits.
        definition: makes the same losses of the logits in operations that can be differentiated twice.

    Returns:
        The losses, with a gradient.
    """
    attached: Tensor = _WithGradient.apply(logits, losses, gradient, definition)
    return attached


class Entropies(NamedTuple):
    """Weighted binary cross-entropies of RoIs and what they are made of."""

    losses: Tensor  # (R,), summed over the logits
    gradient: Tensor  # (R, K) of the losses
    own: Tensor  # (R,), |σ - 1| times its weight at the label; 0 where the label is no logit
    others: Tensor  # (K,), σ times its weight, summed over the counted RoIs with other labels


@torch.no_grad()
def binary_entropies(
    logits: Tensor, labels: Tensor, negative: Tensor, positive: Tensor, counted: Tensor, kinds: Tensor | None = None
) -> Entropies:
    """Sigmoid losses Σ_j w_rj · BCE(z_rj, t_rj) with their gradient; one exponential and one logarithm a logit.

    Args:
        logits: (R, K) float for which `may_fuse` holds.
        labels: (R,) int64 in [0, K]; K is no logit's.
        negative: (K,) float, w where the logit is not the label's; or (G, K), one row for each kind of RoI.
        positive: (K,) float, w where it is.
        counted: (R,) bool, RoIs that ``others`` sums over.
        kinds: (R,) int64 in [0, G), with ``negative`` (G, K).
    """
    width, dtype = logits.shape[1], logits.dtype
    negative, positive = negative.to(dtype), positive.to(dtype)
    place = labels.clamp(max=width - 1).unsqueeze(1)
    is_own = (labels < width).unsqueeze(1)
    exponentials = logits.exp()
    softplus = exponentials.log1p()
    gradient = exponentials.div_(exponentials + 1).mul_(negative if kinds is None else negative[kinds])
    for each in (softplus, gradient):  # the label's own is another's
        each.scatter_(1, place, each.gather(1, place).masked_fill_(is_own, 0))
    with torch.autocast("cpu", enabled=False):  # it would sum in half precision
        if kinds is None:
            losses = softplus.mv(negative)
        else:
            sums = torch.stack([softplus.mv(weights) for weights in negative], dim=1)
            losses = sums.gather(1, kinds.unsqueeze(1)).squeeze(1)
        others = gradient.t().mv(counted.to(dtype))
    own_logit, weight = logits.gather(1, place), positive[place] * is_own
    own = weight * (-own_logit).sigmoid()
    gradient.scatter_add_(1, place, -own)
    losses -= (weight * F.logsigmoid(own_logit)).squeeze(1)
    return Entropies(losses, gradient, own.squeeze(1), others)
