"""Batch norm's kernels, run by Triton's interpreter, against the plain way in float64."""

import os
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of
from torch import Tensor

from tailseg.layers import norm
from tailseg.layers.norm import batch_norm

pytest.importorskip("triton")
norm_triton = pytest.importorskip("tailseg.layers.norm_triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)
EPS = 1e-3


@pytest.fixture(autouse=True)
def kernels_in_small_pieces(monkeypatch):
    """Float32 and less take the kernels, in several shares of several tiles; float64 takes the plain way."""
    monkeypatch.setattr(norm, "takes_triton", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(norm_triton, "SHARE", 16)
    monkeypatch.setattr(norm_triton, "TILES", {False: (8, 2), True: (4, 4)})


def learnt(dtype: torch.dtype, memory_format: torch.memory_format, rows: Tensor | None, **options) -> list[Tensor]:
    """Output, gradients and running statistics; with ``affine`` there are a scale and a shift."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(5, 3, 2, 4, generator=generator) * 2 + 3 for _ in range(2))
    # Both ways get what the narrower type holds.
    x, upstream = (each.to(options["narrow"]).to(dtype).to(memory_format=memory_format) for each in (x, upstream))
    kept = torch.full((3,), 0.5), torch.full((3,), 2.0)
    weight, bias = torch.tensor([1.5, -0.5, 2.0]), torch.tensor([0.1, 0.2, -3.0])
    inputs = [x, weight, bias] if options["affine"] else [x]
    wide = torch.promote_types(dtype, torch.float32)
    kept = [each.to(wide) for each in kept]
    leaves = [x.requires_grad_(), *(each.to(wide).requires_grad_() for each in inputs[1:])]
    scales = leaves[1:] or (None, None)
    tracked = kept if options["tracked"] else (None, None)
    y = batch_norm(leaves[0], *scales, *tracked, momentum=0.3, eps=EPS, rows=rows, over_processes=options["joined"])
    assert y.stride() == x.stride()
    grads = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
    assert grads[0].stride() == x.stride()
    return [y.detach(), *grads, *kept]


def both(narrow: torch.dtype, memory_format: torch.memory_format, rows: Tensor | None, **options) -> None:
    options = {"affine": True, "tracked": True, "joined": False, "narrow": narrow} | options
    found = learnt(narrow, memory_format, rows, **options)
    exact = learnt(torch.float64, memory_format, rows, **options)
    loose = {"rtol": 1e-5, "atol": 2e-5} if narrow == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
    assert found[0].dtype == found[1].dtype == narrow
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, **loose)


LAYOUTS = [torch.contiguous_format, torch.channels_last]
SOME = torch.tensor([True, False, True, True, False])


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("rows", [None, SOME, torch.zeros(5, dtype=torch.bool)])
def test_output_gradients_and_statistics_are_those_of_the_plain_way(memory_format, rows):
    both(torch.float32, memory_format, rows)


def test_without_scale_shift_and_running_statistics():
    both(torch.float32, torch.channels_last, SOME, affine=False, tracked=False)
    both(torch.float32, torch.contiguous_format, torch.zeros(5, dtype=torch.bool), affine=False, tracked=False)


def test_half_precision():
    both(torch.bfloat16, torch.channels_last, SOME)


def test_over_processes(monkeypatch):
    """As with another process that has the same values."""
    monkeypatch.setattr(norm, "several_processes", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda totals: totals.mul_(2))
    both(torch.float32, torch.contiguous_format, SOME, joined=True)


def test_a_process_without_kernels_exchanges_the_same(monkeypatch):
    """One that has no rows takes the plain way, and must not wait for other numbers than the rest."""
    sent: list[tuple[torch.dtype, int]] = []
    monkeypatch.setattr(norm, "several_processes", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda totals: sent.append((totals.dtype, totals.numel())))
    for kernels in (True, False):
        monkeypatch.setattr(norm, "takes_triton", lambda x, kernels=kernels: kernels)
        x = torch.randn(3, 5, 2, 2).requires_grad_()
        batch_norm(x, None, None, None, None, momentum=0.1, eps=EPS, over_processes=True).sum().backward()
    assert sent == [(torch.float64, 15), (torch.float64, 10)] * 2


def test_what_rows_left_out_hold_does_not_matter_to_the_others():
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([True, False, True])
    bad = x.clone()
    bad[1] = torch.nan
    one, other = (batch_norm(each, None, None, None, None, momentum=0.1, eps=EPS, rows=rows) for each in (x, bad))
    assert torch.equal(one[rows], other[rows])
    assert other[1].isnan().all()
    assert batch_norm(bad, None, None, torch.zeros(2), torch.ones(2), momentum=0.1, eps=EPS).isnan().all()


def test_a_large_offset_does_not_cancel():
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)) + 1000
    mean, var = torch.zeros(2), torch.ones(2)
    batch_norm(x, None, None, mean, var, momentum=1.0, eps=EPS)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_kernels_compile_for_an_h100():
    lines = lines_of(Path(__file__).with_name("compile_norm.py"))
    assert len(lines) == 8
    assert all(int(size) > 0 for *_, size in lines)
