"""Changes of pasted masks found by the kernel, run by Triton's interpreter, against those found on the CPU."""

import os
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of

from tailseg.layers import paste
from tailseg.layers.paste import encode_masks

pytest.importorskip("triton")
paste_triton = pytest.importorskip("tailseg.layers.paste_triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a CUDA device."""

    is_cuda = True


BOXES = [
    (1.2, 0.7, 4.9, 6.1),
    (-3.0, -50.0, 3.5, 50.0),  # whole columns, whose runs join
    (2.0, 4.0, 9.0, 12.0),  # beyond the lower and the right edge
    (3.0, 1.0, 3.0, 5.0),  # no area
    (float("nan"), 0.0, 5.0, 5.0),
    (4.6, 0.0, 5.4, 9.0),  # no pixel centre
    (-1e9, -1e9, 1e9, 1e9),
]


def test_codes_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(paste_triton, "ROWS_AT_ONCE", 4)
    probs = torch.rand(len(BOXES), 3, 3, generator=torch.Generator().manual_seed(2))
    probs[::2] = (probs[::2] * 2).round() / 2  # many a sample is 0.5 to the bit
    probs[-1] = 0.9
    boxes, image_hw = torch.tensor(BOXES), (6, 5)
    expected = encode_masks(probs, boxes, image_hw)
    monkeypatch.setattr(paste, "_codes_on_cpu", None)
    assert encode_masks(probs.as_subclass(OnDevice), boxes, image_hw) == expected
    assert len({code["counts"] for code in expected}) >= 4


def test_nothing_to_encode():
    assert encode_masks(torch.zeros(0, 28, 28).as_subclass(OnDevice), torch.zeros(0, 4), (6, 8)) == []
    empty = encode_masks(torch.zeros(1, 3, 3).as_subclass(OnDevice), torch.tensor([[0.0, 0.0, 2.0, 2.0]]), (3, 2))
    assert empty == encode_masks(torch.zeros(1, 3, 3), torch.tensor([[0.0, 0.0, 2.0, 2.0]]), (3, 2))


def test_the_kernel_compiles_for_gpus_and_rounds_each_step():
    lines = lines_of(Path(__file__).with_name("compile_paste.py"))
    assert len(lines) == 4
    assert all(int(size) > 0 and how == "exact" for *_, size, how in lines)
