"""RoIAlign's kernel, run by Triton's interpreter, against points one by one in float64 and against torchvision."""

import math
import os
from pathlib import Path

import pytest
import torch
from gpu_code import lines_of
from tiny import made
from torch import Tensor
from torchvision.ops import roi_align

from tailseg.model import roi_align as joined
from tailseg.model import roi_features
from tailseg.model.roi_align import Sampling, SharedMaps, takes_triton
from tailseg.model.roi_features import ImageFeatures, RoIPooler, roi_levels

roi_align_triton = pytest.importorskip("tailseg.model.roi_align_triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without CUDA"
)
STRIDES = (4, 8, 16, 32)
NAN = float("nan")
ROIS = torch.tensor(
    [
        [0.0, 3, 5, 23, 11],  # of P2
        [1, 40, 8, 108, 122],  # wide for P2
        [1, -60, -40, 40, 79.5],  # of P2, in part outside of the image
        [0, 10, 4, 122, 116],  # 112 pixels a side: the smallest of P3
        [1, 20.5, 30, 260, 200],  # of P3, beyond the image
        [0, 5, 0, 233, 240],  # of P4
        [1, -50, -20, 480, 460],  # of P5
        [0, 30, 30, 30, 30],  # no extent
        [1, 60, 10, 60, 90],  # no width
        [1, 300, 400, 380, 410],  # outside
        [0, 50, 60, 40, 20],  # its corners the wrong way round
    ]
)


@pytest.fixture
def whole_rois(monkeypatch):
    """All cells of a RoI in one program: the interpreter takes as long for one cell as for many."""
    monkeypatch.setattr(roi_align_triton, "CELL_BLOCK", 256)


def pyramid_of(channels: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Two images of 128 pixels; the last map is P6, which nothing is pooled from."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, channels, 128 // s, 128 // s, generator=generator).to(dtype).requires_grad_()
        for s in (*STRIDES, 64)
    ]


def axis_weights(start: float, extent: float, size: int, side: int, samples: int) -> Tensor:
    """Weights (S, size) float64 of an axis' pixels in the mean of each cell, point by point."""
    weights = torch.zeros(side, size, dtype=torch.float64)
    points = samples or max(math.ceil(extent / side), 0)
    for cell in range(side):
        for point in range(points):
            place = start + (cell + (point + 0.5) / points) * extent / side
            if -1 <= place <= size:
                place = min(max(place, 0.0), size - 1.0)
                before = math.floor(place)
                weights[cell, before] += (1 - place + before) / points
                weights[cell, min(before + 1, size - 1)] += (place - before) / points
    return weights


def by_points(pyramid: list[Tensor], rois: Tensor, how: Sampling) -> Tensor:
    """Features (R, channels, S, S) float64 of one RoI after the other."""
    rows = []
    for image, *box in rois.double().tolist():
        area = max((box[2] - box[0]) * (box[3] - box[1]), 0)
        level = sum(math.sqrt(area) >= bound for bound in (112, 224, 448)[: len(how.strides) - 1])
        x1, y1, x2, y2 = (corner / how.strides[level] - 0.5 * how.aligned for corner in box)
        across, down = x2 - x1, y2 - y1
        if not how.aligned:
            across, down = max(across, 1.0), max(down, 1.0)
        maps = pyramid[level][int(image)].double()
        weights = [
            axis_weights(start, extent, size, how.output_size, how.sampling_ratio)
            for start, extent, size in ((y1, down, maps.shape[1]), (x1, across, maps.shape[2]))
        ]
        rows.append(torch.einsum("ih,jw,chw->cij", *weights, maps))
    return torch.stack(rows)


def gradients(features: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((features * upstream).sum(), maps, materialize_grads=True)


@interpreted
@pytest.mark.usefixtures("whole_rois")
@pytest.mark.parametrize(
    ("how", "dtype", "rows"),
    [
        (Sampling(14, STRIDES, 0, aligned=True), torch.float32, [1, 2, 3, 5, 6, 7]),
        (Sampling(5, STRIDES, 2, aligned=True), torch.bfloat16, [3, 7]),
        (Sampling(14, STRIDES, 0, aligned=False), torch.float16, [0, 8, 10]),
        (Sampling(5, STRIDES[1:2], 1, aligned=False), torch.float32, [4, 7, 9]),
    ],
)
def test_features_and_gradients_equal_points_one_by_one(how, dtype, rows):
    ours, exact, rois = pyramid_of(dtype=dtype), pyramid_of(dtype=dtype), ROIS[list(rows)]
    found, expected = SharedMaps(ours).pool(rois, how), by_points(exact, rois, how)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    rounded = torch.finfo(dtype).eps
    for one, other in zip(gradients(found, ours), gradients(expected, exact), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other.double(), rtol=2 * rounded, atol=1e-4 + rounded)


@interpreted
def test_features_and_gradients_equal_torchvisions(monkeypatch):
    """In blocks of cells and channels, some of which are not full."""
    monkeypatch.setattr(roi_align_triton, "CELL_BLOCK", 128)
    monkeypatch.setattr(roi_align_triton, "CHANNEL_BLOCK", 4)
    rois = torch.tensor([[0.0, 3, 5, 23, 11], [1, 10, 4, 122, 117]])
    ours, theirs = pyramid_of(), pyramid_of()
    found = SharedMaps(ours).pool(rois, Sampling(14, STRIDES, 0, aligned=True))
    expected = torch.cat([roi_align(theirs[i], rois[i : i + 1], 14, 0.25 / 2**i, 0, True) for i in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(found, ours), gradients(expected, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.usefixtures("whole_rois")
@pytest.mark.parametrize("levels", [2, 4])
def test_every_box_comes_from_its_level(levels):
    """The maps hold their level's number everywhere, so that what is pooled tells where it came from."""
    sides = torch.tensor([0.0, 112, 224, 447, 448, 2000, NAN])
    sides = torch.cat([sides, torch.nextafter(sides[[1, 2]], torch.tensor(0.0))])
    rois = torch.stack([sides * 0, sides * 0 + 20, sides * 0 + 20, 20 + sides, 20 + sides], dim=1).nan_to_num(NAN)
    rois[:, 0] = 0
    maps = [torch.full((1, 1, 1024 // s, 1024 // s), float(i)) for i, s in enumerate(STRIDES[:levels])]
    found = SharedMaps(maps).pool(rois, Sampling(1, STRIDES[:levels], 1, aligned=True)).flatten()
    inside = sides < 2000
    assert torch.equal(found[inside].long(), roi_levels(rois[inside, 1:], levels))
    assert found[sides.isnan()].isnan().all()


@interpreted
@pytest.mark.usefixtures("whole_rois")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_boxes_that_are_nowhere_are_seen_in_their_features():
    """As on the CPU: a model that has diverged shows in its losses; and nothing runs for ever."""
    rois = torch.tensor([[0.0, NAN, 0, 9, 9], [0, 4, 4, float("inf"), 50], [1, NAN, NAN, NAN, NAN], [1, 5, 5, 30, 20]])
    found = SharedMaps(pyramid_of()).pool(rois, Sampling(3, STRIDES, 0, aligned=True))
    assert found.isfinite().flatten(1).all(1).tolist() == [False, False, False, True]


@pytest.fixture
def launches(monkeypatch) -> list[tuple[bool, int]]:
    """Whether each launch of the kernel goes backward, and where its first map lies."""
    seen: list[tuple[bool, int]] = []
    plain = roi_align_triton.launch

    def counted(maps: list[Tensor], *args: object, backward: bool, **how: object) -> None:
        seen.append((backward, maps[0].data_ptr()))
        plain(maps, *args, backward=backward, **how)

    monkeypatch.setattr(roi_align_triton, "launch", counted)
    return seen


@interpreted
@pytest.mark.usefixtures("whole_rois")
class TestSharedMaps:
    HOW = Sampling(4, STRIDES, 1, aligned=True)

    def test_several_poolings_have_one_gradient_buffer(self, launches):
        ours, theirs = pyramid_of(), pyramid_of()
        shared = SharedMaps(ours)
        first, second = shared.pool(ROIS[:2], self.HOW), shared.pool(ROIS[1:4], self.HOW._replace(output_size=2))
        (first.sum() + 2 * second.sum() + 3 * ours[0].sum()).backward()
        exact = by_points(theirs, ROIS[:2], self.HOW).sum()
        exact += 2 * by_points(theirs, ROIS[1:4], self.HOW._replace(output_size=2)).sum()
        (exact + 3 * theirs[0].sum()).backward()
        for one, other in zip(ours[:4], theirs[:4], strict=True):
            torch.testing.assert_close(one.grad, other.grad if other.grad is not None else one.grad * 0)
        assert [backward for backward, _ in launches] == [False, False, True, True]
        assert launches[2][1] == launches[3][1]

    def test_a_second_backward_pass_begins_with_nothing(self):
        ours = pyramid_of()
        total = SharedMaps(ours).pool(ROIS[:2], self.HOW).sum()
        once, again = (torch.autograd.grad(total, ours[0], retain_graph=True)[0] for _ in range(2))
        assert (once != 0).any()
        assert torch.equal(once, again)

    def test_maps_without_gradient_cost_nothing(self, launches):
        pool = SharedMaps([maps.detach() for maps in pyramid_of()]).pool
        assert not pool(ROIS[:1], self.HOW).requires_grad
        with torch.no_grad():
            assert not SharedMaps(pyramid_of()).pool(ROIS[:1], self.HOW).requires_grad
        some = pyramid_of()
        some[1].requires_grad_(False)
        SharedMaps(some).pool(ROIS[:1], self.HOW).sum().backward()
        assert [maps.grad is None for maps in some] == [False, True, False, False, True]
        assert [backward for backward, _ in launches] == [False, False, False, True]

    def test_no_rois(self):
        ours = pyramid_of()
        found = SharedMaps(ours).pool(torch.zeros(0, 5), self.HOW)
        assert found.shape == (0, 5, 4, 4)
        found.sum().backward()
        assert all((maps.grad == 0).all() for maps in ours[:4])

    def test_maps_of_any_layout(self):
        plain, spread = pyramid_of(), [maps.detach().repeat(1, 2, 1, 2)[:, ::2, :, ::2] for maps in pyramid_of()]
        held = [maps.detach().copy_(p) for maps, p in zip(spread, pyramid_of(), strict=True)]
        expected = SharedMaps(plain).pool(ROIS[:2], self.HOW)
        assert torch.equal(SharedMaps(held).pool(ROIS[:2].t().contiguous().t(), self.HOW), expected)

    def test_under_autocast_features_have_the_dtype_of_the_maps(self):
        maps = pyramid_of(dtype=torch.bfloat16)
        wide = SharedMaps(maps).pool(ROIS[:1], self.HOW)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = SharedMaps(maps).pool(ROIS[:1], self.HOW)
        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=0)  # the interpreter cuts bits off


@interpreted
@pytest.mark.usefixtures("whole_rois")
def test_poolers_and_image_features_take_the_kernel(launches, monkeypatch):
    context, pooler = torch.randn(2, 5, generator=torch.Generator().manual_seed(2)), made(RoIPooler, 14)
    expected = ImageFeatures(pyramid_of(), context).pool(pooler)(ROIS[:2])
    monkeypatch.setattr(roi_features, "pooled_by_table", lambda rois: False)
    monkeypatch.setattr(roi_features, "takes_triton", lambda maps: True)
    features = ImageFeatures(pyramid_of(), context).pool(pooler)(ROIS[:2])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(features, pooler(pyramid_of(), ROIS[:2]) + context[:, :, None, None])
    assert [backward for backward, _ in launches] == [False] * 2


def test_maps_on_cuda_go_to_the_kernel_unless_sums_must_be_repeatable(monkeypatch):
    assert not takes_triton(pyramid_of())
    kind = type("OnDevice", (Tensor,), {"is_cuda": True})
    on_device = [maps.detach().as_subclass(kind) for maps in pyramid_of()]
    assert takes_triton(on_device)
    assert not takes_triton([on_device[0].double()])
    assert not takes_triton([*on_device, on_device[0].half()])
    torch.use_deterministic_algorithms(True)
    try:
        assert not takes_triton(on_device)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(joined, "has_triton", lambda: False)
    assert not takes_triton(on_device)


def test_the_kernel_compiles_for_an_h100():
    lines = lines_of(Path(__file__).with_name("compile_kernels.py"))
    assert [(name, width) for name, _, width in lines[:2]] == [("forward", "wide"), ("backward", "narrow")]
    assert all(int(size) > 0 for _, size, _ in lines)
