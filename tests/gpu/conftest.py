"""What comparing a CUDA device with the CPU takes."""

import math

import pytest
import torch
from torch import Tensor

from tailseg.model import matching


@pytest.fixture
def full_float32():
    """Compare in float32, not in TF32, which keeps ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def same_lottery(monkeypatch):
    """Draw by position instead of by chance, so that both devices sample the same priors."""

    def lottery(shape: torch.Size, *, device: torch.device) -> Tensor:
        count = math.prod(shape)
        # A stride that is prime to the count visits every place once: distinct and well mixed.
        mixed = torch.arange(count, dtype=torch.int64) * 7919 % (count + (count % 7919 == 0))
        return (mixed.float() / (count + 1)).view(shape).to(device)

    class Lottery:
        rand = staticmethod(lottery)

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(matching, "torch", Lottery())
