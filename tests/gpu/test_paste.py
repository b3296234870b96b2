"""Run-length codes of masks on CUDA are those of the CPU, to the bit."""

import pytest
import torch

from tailseg.layers.paste import encode_masks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rounded", [False, True])
def test_codes_equal_those_of_the_cpu(rounded):
    generator = torch.Generator().manual_seed(0)
    height, width = 480, 640
    probs = torch.rand(300, 28, 28, generator=generator)
    if rounded:  # many a sample is 0.5 to the bit
        probs = (probs * 4).round() / 4
    centres = torch.rand(300, 2, generator=generator) * torch.tensor([width, height])
    sizes = (torch.rand(300, 2, generator=generator) * 6.5).exp()
    boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)
    boxes[:3] = torch.tensor([[0.0, 0.0, width, height], [5.0, -9.0, 90.0, 999.0], [torch.nan, 0.0, 5.0, 5.0]])
    assert encode_masks(probs.cuda(), boxes.cuda(), (height, width)) == encode_masks(probs, boxes, (height, width))
