"""Layers whose logits depend on directions alone (report, Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normalize(x: Tensor, dim: int | tuple[int, ...], eps: float) -> Tensor:
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


class NormalizedConv2d(nn.Module):
    """A convolution whose features and weights are normalised (report, Eq. 3, at every place), in float32 as above.

    Features are normalised over their channels at every place; weights over their input channels at every place of the
    kernel, so that each of its places is a cosine of its own and without bias |z| <= τ · kernel_size², or with
    ``norm_over_kernel`` over the whole kernel.

    Args:
        in_channels: F.
        out_channels: K.
        kernel_size: S, of both sides.
        padding: zeros on each side.
        temperature: τ.
        eps: added to both norms.
        norm_over_kernel: one norm a row instead of one a row and place of the kernel.

    Shapes: (N, F, H, W) -> (N, K, H + 2 · padding - S + 1, W + 2 · padding - S + 1); channels_last stays so.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: int = 0,
        temperature: float = 20.0,
        eps: float = 1e-6,
        norm_over_kernel: bool = False,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.temperature = temperature
        self.eps = eps
        self.norm_over_kernel = norm_over_kernel
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of features, shapes as above."""
        with torch.autocast(x.device.type, enabled=False):
            dims = (1, 2, 3) if self.norm_over_kernel else 1
            # The temperature goes to the weights, of which there are far fewer than features.
            weight = normalize(self.weight, dims, self.eps) * self.temperature
            return F.conv2d(normalize(x.to(weight.dtype), 1, self.eps), weight, self.bias, padding=self.padding)
