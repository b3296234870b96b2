"""Shifted RoI features against the recording, one point at a time, and torchvision where nothing is shifted."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from tailseg.model.roi_features import pyramid_rows, roi_levels, shifted_roi_align

STRIDES = (4, 8, 16, 32)


def pyramid_of(channels: int = 2, side: int = 32, batch: int = 2) -> list[Tensor]:
    """P2..P6 of images of 4 · side pixels, wider than high, float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, channels, (side >> i) - 1, (side >> i) + 3) for i in range(5)]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def some_rois() -> Tensor:
    """RoIs of every level and both images: some reach beyond the image, two lie outside, one has no extent."""
    sides = torch.tensor([3.0, 20, 111.9, 112, 130, 224, 300, 448, 600, 0, 57], dtype=torch.float64)
    image = torch.arange(len(sides)) % 2
    corner = torch.linspace(-25, 70, len(sides), dtype=torch.float64)
    rois = torch.stack([image, corner, corner / 2, corner + sides, corner / 2 + sides * 0.9], dim=1)
    return torch.cat([rois, torch.tensor([[1.0, 200, 10, 260, 50]], dtype=torch.float64)])


def shifts_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.15


def value_at(plane: Tensor, y: float, x: float) -> float:
    """Bilinear value at a point in feature pixels, nearest edge outside and 0 beyond a pixel from it."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    value = 0.0
    for line, share in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, part in ((left, 1 - (x - left)), (left + 1, x - left)):
            if share * part > 0:
                value += share * part * plane[line, column].item()
    return value


def brute_force(pyramid: list[Tensor], rois: Tensor, shifts: Tensor, size: int, n: int) -> Tensor:
    """The section's formula, one point after the other; shifts (R, 2, size, size)."""
    out = torch.zeros(len(rois), pyramid[0].shape[1], size, size, dtype=torch.float64)
    for row, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        w, h = x2 - x1, y2 - y1
        level = min(max(math.floor(math.log2(math.sqrt(w * h) / 56 + 1e-6)), 0), 3)
        s = 1 / STRIDES[level]
        for channel, i, j in torch.cartesian_prod(*(torch.arange(k) for k in out.shape[1:])).tolist():
            plane, total = pyramid[level][int(image), channel], 0.0
            dx, dy = shifts[row, :, i, j].tolist()
            for a in range(n):
                for b in range(n):
                    y = y1 * s - 0.5 + (i + (a + 0.5) / n) * h * s / size + h * s * dy
                    x = x1 * s - 0.5 + (j + (b + 0.5) / n) * w * s / size + w * s * dx
                    total += value_at(plane, y, x)
            out[row, channel, i, j] = total / n**2
    return out


def torchvisions(pyramid: list[Tensor], rois: Tensor, size: int, n: int) -> Tensor:
    """Each RoI alone from its own level."""
    levels = roi_levels(rois[:, 1:], 4).tolist()
    pooled = [
        roi_align(pyramid[level], roi[None], size, 1 / STRIDES[level], sampling_ratio=n, aligned=True)
        for roi, level in zip(rois, levels, strict=True)
    ]
    return torch.cat(pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["aligned_c_pool", "aligned_r_pool"])
def test_recorded_features_and_gradients(recorded, check, name, dtype):
    case, inputs, _, outputs = next(case for case in recorded("tsd") if case[0]["name"] == name)
    about = case["settings"]
    feature = inputs["feature"].to(dtype).requires_grad_()
    delta = inputs["delta"].to(dtype).requires_grad_()
    shifts = delta * about["trans_std"]
    if about["kind"] == "c":
        shifts = shifts.view(-1, 2, about["out_size"], about["out_size"])
    rows = pyramid_rows([feature], [round(1 / about["spatial_scale"])])
    out = shifted_roi_align(rows, inputs["rois"].to(dtype), shifts, about["out_size"], samples=about["samples"])
    (out.square().sum() / 2).backward()
    for key, ours in (("out", out), ("grad.feature", feature.grad), ("grad.delta", delta.grad)):
        assert ours.dtype == dtype
        check(case, key, ours, outputs[key])
        if dtype == torch.float64:
            torch.testing.assert_close(ours, outputs[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_point_by_brute_force(n):
    pyramid, rois, shifts = pyramid_of(), some_rois(), shifts_of(12, 2, 3, 3)
    assert sorted(set(roi_levels(rois[:, 1:], 4).tolist())) == [0, 1, 2, 3]
    expected = brute_force(pyramid, rois, shifts, 3, n)
    out = shifted_roi_align(pyramid_rows(pyramid), rois, shifts, 3, samples=n)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    assert not out[[0, -1]].any()  # outside
    assert out[1:8].flatten(1).any(dim=1).all()


@given(
    corner=st.tuples(st.integers(-150, 300), st.integers(-150, 300)),
    sides=st.tuples(st.integers(0, 700), st.integers(0, 700)),
    shift=st.tuples(st.integers(-64, 64), st.integers(-64, 64)),
    image=st.integers(0, 1),
)
def test_any_box_and_shift_by_brute_force(corner, sides, shift, image):
    pyramid = pyramid_of(channels=1)
    x, y = (c + math.pi for c in corner)  # so that no point lies where values jump to 0, which roundings would decide
    rois = torch.tensor([[image, x, y, x + sides[0], y + sides[1]]], dtype=torch.float64)
    shifts = torch.tensor([shift], dtype=torch.float64) / 64
    every_cell = shifts[:, :, None, None].expand(-1, -1, 2, 2)
    out = shifted_roi_align(pyramid_rows(pyramid), rois, shifts, 2)
    torch.testing.assert_close(out, brute_force(pyramid, rois, every_cell, 2, 2), rtol=0, atol=1e-9)
    assert torch.equal(out, shifted_roi_align(pyramid_rows(pyramid), rois, every_cell, 2))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_without_shifts_it_is_torchvisions(n):
    pyramid, rois = pyramid_of(channels=3), some_rois()
    upstream = torch.randn(12, 3, 7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = ([f.clone().requires_grad_() for f in pyramid] for _ in range(2))
    for shifts in (torch.zeros(12, 2), torch.zeros(12, 2, 7, 7)):
        out = shifted_roi_align(pyramid_rows(ours), rois, shifts, 7, samples=n)
        expected = torchvisions(theirs, rois, 7, n)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        gradients = torch.autograd.grad((out * upstream).sum(), ours[:4])
        wanted = torch.autograd.grad((expected * upstream).sum(), theirs[:4])
        torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-9)


def test_single_precision_without_shifts_is_torchvisions_to_1e_5():
    """Features as smooth as a network's: between neighbours they differ by a tenth, as coordinates are rounded."""
    pyramid = [f.float() * 0.1 for f in pyramid_of()]
    rois = some_rois().float()
    out = shifted_roi_align(pyramid_rows(pyramid), rois, torch.zeros(12, 2), 7)
    torch.testing.assert_close(out, torchvisions(pyramid, rois, 7, 2), rtol=0, atol=1e-5)


def test_a_shift_of_a_whole_roi_is_a_roi_elsewhere():
    pyramid, rois, shifts = pyramid_of(), some_rois(), shifts_of(12, 2)
    moved = rois.clone()
    moved[:, 1:] += (shifts * (rois[:, 3:] - rois[:, 1:3])).repeat(1, 2)
    rows = pyramid_rows(pyramid)
    out = shifted_roi_align(rows, rois, shifts, 7)
    torch.testing.assert_close(out, shifted_roi_align(rows, moved, torch.zeros(12, 2), 7), rtol=0, atol=1e-9)


def test_x_comes_first_and_cells_move_alone():
    ramp = torch.arange(20.0, dtype=torch.float64).expand(1, 1, 20, 20)
    rows = pyramid_rows([ramp, ramp.mT], (4, 4))  # levels of one stride: values are x on the first, y on the second
    rois = torch.tensor([[0.0, 20, 20, 52, 44], [0.0, 0, 0, 80, 160]], dtype=torch.float64)
    shifts = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    shifts[0, 0, 0, 1] = 0.25  # of 32 pixels: 2 pixels of the map
    shifts[1, 1, 0, 0] = 0.1  # of 160 pixels: 4 pixels of the map
    out = shifted_roi_align(rows, rois, shifts, 2)
    torch.testing.assert_close(out[0, 0], torch.tensor([[6.5, 12.5], [6.5, 10.5]], dtype=torch.float64))
    # Cells of 20 lines each: their points at 4.5 and 14.5 go to 8.5 and 18.5; those at 24.5 and 34.5 lie outside.
    torch.testing.assert_close(out[1, 0], torch.tensor([[13.5, 9.5], [0.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 2), (5, 2, 2, 2)])
def test_gradcheck(shape):
    pyramid = [f[:, :1, :4, :4].clone().requires_grad_() for f in pyramid_of(side=64)[:2]]
    rois = torch.tensor(
        [[0.0, 1, 1, 9, 12], [1, -3.3, 2, 20, 30], [0, 4, 5, 150, 117], [1, 6, 6, 7, 8], [0, 90, 0, 95, 9]],
        dtype=torch.float64,
    )
    assert roi_levels(rois[:, 1:], 2).tolist() == [0, 0, 1, 0, 0]
    shifts = shifts_of(*shape).requires_grad_()

    def pool(*inputs: Tensor) -> Tensor:
        return shifted_roi_align(pyramid_rows(inputs[:2], (4, 8)), rois, inputs[2], 2)

    assert torch.autograd.gradcheck(pool, (*pyramid, shifts))


def test_no_gradient_to_the_rois():
    rois, shifts = some_rois().requires_grad_(), shifts_of(12, 2).requires_grad_()
    shifted_roi_align(pyramid_rows(pyramid_of()), rois, shifts, 3).sum().backward()
    assert rois.grad is None
    assert shifts.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 2), (0, 2, 7, 7)])
def test_no_rois(shape):
    pyramid = [f.requires_grad_() for f in pyramid_of()]
    shifts = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = shifted_roi_align(pyramid_rows(pyramid), torch.zeros(0, 5, dtype=torch.float64), shifts, 7)
    assert out.shape == (0, 2, 7, 7)
    out.sum().backward()
    assert all((f.grad == 0).all() for f in pyramid[:4])
    assert shifts.grad.shape == shape


def test_boxes_and_shifts_that_are_no_numbers_show_without_a_crash():
    rows = pyramid_rows(pyramid_of())
    rois, shifts = some_rois(), shifts_of(12, 2).requires_grad_()
    good = shifted_roi_align(rows, rois, shifts, 3)
    with torch.no_grad():
        rois[1, 1], rois[3, 4], shifts[5, 0] = torch.nan, torch.inf, -torch.inf
    rois[7, 1:] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    out = shifted_roi_align(rows, rois, shifts, 3)
    assert out[1].isnan().all()
    untouched = [0, 2, 4, 6, 8, 9, 10, 11]
    assert torch.equal(out[untouched], good[untouched])
    out.sum().backward()


def test_low_precision_is_pooled_in_float32_also_under_autocast():
    pyramid = [f.bfloat16().contiguous(memory_format=torch.channels_last) for f in pyramid_of()]
    rois, shifts = some_rois().float(), shifts_of(12, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shifted_roi_align(pyramid_rows(pyramid), rois, shifts, 7)
    assert out.dtype == torch.float32
    expected = shifted_roi_align(pyramid_rows([f.float() for f in pyramid]), rois, shifts.float(), 7)
    assert torch.equal(out, expected)


def test_rows_hold_the_levels_that_have_a_stride():
    pyramid = pyramid_of(channels=3)
    rows = pyramid_rows(pyramid)
    assert rows.levels[:, 3].tolist() == [4, 8, 16, 32]
    assert len(rows.table) == sum(f[:, 0].numel() for f in pyramid[:4])
    for features, (height, width, first, _) in zip(pyramid, rows.levels.tolist(), strict=False):
        assert (height, width) == features.shape[2:]
        assert torch.equal(rows.table[first + (1 * height + 2) * width + 1], features[1, :, 2, 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_equals_the_cpu_without_waiting():
    shifts = shifts_of(12, 2, 7, 7).float()
    found = {}
    for device in ("cpu", "cuda"):
        leaves = [leaf.float().to(device).requires_grad_() for leaf in (*pyramid_of(), shifts)]
        rois = some_rois().float().to(device)

        def step(leaves: list[Tensor] = leaves, rois: Tensor = rois) -> list[Tensor]:
            out = shifted_roi_align(pyramid_rows(leaves[:5]), rois, leaves[5], 7)
            return [out, *torch.autograd.grad(out.square().sum(), [*leaves[:4], leaves[5]])]

        if device == "cuda":
            step()  # kernels are loaded the first time
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            results = step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found[device] = [result.detach().cpu() for result in results]
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-4, atol=1e-4)
