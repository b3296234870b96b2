"""Layers whose logits depend on directions alone (report, Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normalize(x: Tensor, dim: int, eps: float) -> Tensor:
    """X / (‖x‖ + eps) along ``dim``: eps is added to the norm, which matters at tiny norms."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / (norm + eps)


class NormalizedLinear(nn.Module):
    """z = τ · (w / ‖w‖)ᵀ (x / ‖x‖) + b (report, Eq. 3), computed in float32 also under autocast.

    Args:
        in_features: F.
        out_features: K.
        temperature: τ; without bias |z| <= τ.
        eps: added to both norms.

    Shapes: (..., F) -> (..., K).
    """

    def __init__(self, in_features: int, out_features: int, temperature: float = 20.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.temperature = temperature
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., K) of features (..., F)."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.weight.dtype
            direction = normalize(x.to(dtype), -1, self.eps) * self.temperature
            return F.linear(direction, normalize(self.weight, 1, self.eps), self.bias)
