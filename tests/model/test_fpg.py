"""The grid against the recording and a float64 statement of its graph; its cells, sizes, weights and gradients."""

import math

import pytest
import torch
from tiny import made
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from tailseg.layers import norm
from tailseg.layers.carafe import CarafeDownsample
from tailseg.layers.deform_conv import ModulatedDeformConv2d
from tailseg.model.fpg import FPG
from tailseg.model.fpn import FPN

IN_CHANNELS, CHANNELS = (3, 4, 5, 6), 4
ENHANCED = {"deformable": True, "carafe": True}
FORMS = [{}, {"deformable": True}, {"carafe": True}, ENHANCED]
# The cells of nine pathways by hand, from level 0 to level 4.
ACTIVE = ["....x", "...xx", "..xxx", ".xxxx", *["xxxxx"] * 5]


def own(name: str) -> str:
    """Our name of a recorded parameter or buffer."""
    for theirs, ours in (
        ("fpn_transitions", "pathways"),
        ("across_down.conv.", "across_down."),
        (".bn.", ".norm."),
        ("output_transition", "output_convs"),
        (".conv_out.conv", ""),
    ):
        name = name.replace(theirs, ours)
    return name


def features(size: tuple[int, int], count: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """C2..C5 of images whose C2 has that size; each is half of the finer, rounded up."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for channels in IN_CHANNELS:
        maps.append(torch.randn(count, channels, *size, generator=generator, dtype=torch.float64).to(dtype))
        size = tuple(-(-side // 2) for side in size)
    return maps


def lively(neck: FPG) -> FPG:
    """Weights that make every part count: shifts, kernels that are no averages, statistics, scales."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in neck.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(-1, 1, generator=generator)
            if name.endswith("running_var") or ".norm." in name:
                tensor.abs_().add_(0.5)
            elif tensor.ndim == 4 and "conv_offset" not in name and "encoder" not in name:
                tensor.mul_(2 / math.sqrt(tensor[0].numel()))
    return neck


def normalized(x: Tensor, state: dict[str, Tensor], name: str, train: bool) -> Tensor:
    mean, var = state[f"{name}.norm.running_mean"], state[f"{name}.norm.running_var"]
    if train:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    shape = (1, -1, 1, 1)
    scale = state[f"{name}.norm.weight"] / (var + 1e-5).sqrt()
    return (x - mean.view(shape)) * scale.view(shape) + state[f"{name}.norm.bias"].view(shape)


def halved(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """CARAFE's sums over 5 x 5, by unfolding."""
    compressed = F.conv2d(x, state[f"{name}.compressor.weight"], state[f"{name}.compressor.bias"])
    logits = F.conv2d(compressed, state[f"{name}.encoder.weight"], state[f"{name}.encoder.bias"], 2, 1)
    patches = F.unfold(x, 5, padding=2, stride=2).view(*x.shape[:2], 25, *logits.shape[2:])
    return (patches * logits.softmax(1).unsqueeze(1)).sum(2)


def doubled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : size[0], : size[1]]


def deformed(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    told = F.conv2d(x, state[f"{name}.conv_offset.weight"], state[f"{name}.conv_offset.bias"], padding=1)
    return deform_conv2d(x, told[:, :18], state[f"{name}.weight"], padding=1, mask=told[:, 18:].sigmoid())


def stated(neck: FPG, maps: list[Tensor], *, train: bool) -> list[Tensor]:
    """The graph as the specification says it, with the weights of ours, ReLU before every convolution of the grid."""
    state = dict(neck.named_parameters()) | dict(neck.named_buffers())
    levels = [
        F.conv2d(x, state[f"lateral_convs.{i}.weight"], state[f"lateral_convs.{i}.bias"]) for i, x in enumerate(maps)
    ]
    levels.append(levels[3][:, :, ::2, ::2])
    columns = [levels]
    for s in range(len(neck.pathways)):
        column: list[Tensor] = []
        for i in range(5):
            if s + i < 4:
                column.append(columns[-1][i])
                continue
            cell = f"pathways.{s}.{i}"
            skip = F.conv2d(F.relu(levels[i]), state[f"{cell}.across_skip.conv.weight"])
            lateral = F.conv2d(F.relu(columns[-1][i]), state[f"{cell}.across_lateral.conv.weight"])
            terms = {"across_skip": skip, "across_lateral": lateral}
            if i > 0:
                name = f"{cell}.same_up"
                finer, stride = F.relu(column[i - 1]), 2
                if f"{name}.shrink.encoder.weight" in state:
                    finer, stride = halved(finer, state, f"{name}.shrink"), 1
                terms["same_up"] = F.conv2d(finer, state[f"{name}.conv.weight"], stride=stride, padding=1)
            if i < 4:
                name = f"{cell}.across_down.conv"
                enlarged = F.relu(doubled(columns[-1][i + 1], levels[i].shape[2:]))
                if f"{name}.conv_offset.weight" in state:
                    terms["across_down"] = deformed(enlarged, state, name)
                else:
                    terms["across_down"] = F.conv2d(enlarged, state[f"{name}.weight"], padding=1)
            column.append(sum(normalized(x, state, f"{cell}.{term}", train) for term, x in terms.items()))
        columns.append(column)
    return [
        F.conv2d(F.relu(x), state[f"output_convs.{i}.weight"], state[f"output_convs.{i}.bias"], padding=1)
        for i, x in enumerate(columns[-1])
    ]


def test_recorded(recorded, check):
    (case, inputs, state, outputs), *others = recorded("neck_fpg")
    assert not others
    build = case["settings"]["build"]
    neck = made(FPG, build["in_channels"], build["out_channels"], pathways=build["stack_times"]).eval()
    neck.load_state_dict({own(key): value for key, value in state.items()})
    maps = [inputs[f"feature{i}"].clone().requires_grad_() for i in range(4)]
    pyramid = neck(maps)
    for i, out in enumerate(pyramid):
        check(case, f"out{i}", out, outputs[f"out{i}"])
    sum((out**2).sum() / 2 for out in pyramid).backward()
    for i, feature in enumerate(maps):
        check(case, f"grad.feature{i}", feature.grad, outputs[f"grad.feature{i}"])
    parameters = dict(neck.named_parameters())
    norms = torch.stack([parameters[own(name)].grad.double().norm() for name in case["settings"]["parameters"]])
    check(case, "param_grad_norms", norms, outputs["param_grad_norms"])
    assert len(parameters) == len(norms)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "train"), [((32, 16), True), ((16, 16), False), ((19, 26), False), ((33, 9), True)])
def test_the_graph(form, size, train):
    neck = lively(made(FPG, IN_CHANNELS, CHANNELS, **form).double()).train(train)
    leaves = [*(feature.requires_grad_() for feature in features(size)), *neck.parameters()]
    exact = stated(neck, leaves[:4], train=train)  # first, since training moves the statistics
    ours = neck(leaves[:4])
    expected = [tuple(math.ceil(side / 2**i) for side in size) for i in range(5)]
    assert [tuple(out.shape[2:]) for out in ours] == expected
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
        assert theirs.std() > 1e-2
    upstream = [torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double() for out in ours]
    grads = torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(exact, leaves, upstream)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7 * theirs.abs().max().item())


def test_active_cells_and_their_terms():
    neck = made(FPG, IN_CHANNELS, CHANNELS)
    found = ["".join("x" if str(level) in cells else "." for level in range(5)) for cells in neck.pathways]
    assert found == ACTIVE
    assert "".join(found).count("x") == 35
    terms = [name.rsplit(".", 1)[1] for name, module in neck.named_modules() if hasattr(module, "shrink")]
    counts = {term: terms.count(term) for term in set(terms)}
    assert counts == {"same_up": 30, "across_lateral": 35, "across_down": 26, "across_skip": 35}


def test_a_signal_goes_up_within_a_pathway_and_down_from_one_to_the_next():
    """Where all terms pass on what they get, ones at C2 reach all levels with the first pathway that has a level 1, and
    ones at C5 go down by one level a pathway, each of which has a cell just there."""
    neck = made(FPG, (1, 1, 1, 1), channels=1, pathways=9).eval()
    for conv in (m for m in neck.modules() if isinstance(m, nn.Conv2d)):
        nn.init.zeros_(conv.weight)
        nn.init.ones_(conv.weight[..., conv.weight.shape[-1] // 2, conv.weight.shape[-1] // 2])
    zeros = [torch.zeros(1, 1, 64 >> i, 64 >> i) for i in range(4)]

    def reached(level: int, pathways: int) -> list[bool]:
        maps = [x + (i == level) for i, x in enumerate(zeros)]
        neck.pathways = whole[:pathways]
        return [bool(out.any()) for out in neck(maps)]

    whole = neck.pathways
    with torch.no_grad():
        assert reached(0, 3) == [True, False, False, False, False]
        assert reached(0, 4) == [True, True, True, True, True]
        assert reached(3, 1) == [False, False, False, True, True]  # level 4 is subsampled level 3
        assert reached(3, 2) == [False, False, False, True, True]
        assert reached(3, 3) == [False, False, True, True, True]
        assert reached(3, 4) == [False, True, True, True, True]
        assert reached(3, 5) == [True, True, True, True, True]


def test_parameters():
    sizes = (256, 512, 1024, 2048)
    with torch.device("meta"):
        counts = {tuple(form): sum(p.numel() for p in made(FPG, sizes, **form).parameters()) for form in FORMS}
    offsets = 256 * 27 * 9 + 27
    carafe = 256 * 64 + 64 + 64 * 25 * 9 + 25
    # By hand: lateral convolutions; terms of 1x1 and of 3x3 with a norm each; output convolutions.
    terms = 70 * (256 * 256 + 512) + 56 * (9 * 256 * 256 + 512)
    plain = sum(c * 256 + 256 for c in sizes) + terms + 5 * (9 * 256 * 256 + 256)
    assert plain == 41_616_640
    assert counts == {
        (): plain,
        ("deformable",): plain + 26 * offsets,
        ("carafe",): plain + 30 * carafe,
        ("deformable", "carafe"): plain + 26 * offsets + 30 * carafe,
    }
    assert counts["deformable", "carafe"] == 44_160_940


def test_initial_weights():
    torch.manual_seed(0)
    neck = made(FPG, (16, 16, 16, 16), 16, **ENHANCED)
    deformable = {name: m for name, m in neck.named_modules() if isinstance(m, ModulatedDeformConv2d)}
    shrinking = {name: m for name, m in neck.named_modules() if isinstance(m, CarafeDownsample)}
    assert len(deformable) == 26
    assert len(shrinking) == 30
    assert all(".across_down." in name for name in deformable)
    assert all(".same_up." in name for name in shrinking)
    for layer in deformable.values():
        assert not any(p.any() for p in layer.conv_offset.parameters())
        assert 0.9 / 12 < layer.weight.abs().max() <= 1 / 12  # 1 / sqrt(16 · 9)
    for layer in shrinking.values():
        assert layer.encoder.weight.std().item() == pytest.approx(0.001, rel=0.05)
        assert not any(bias.any() for bias in (layer.encoder.bias, layer.compressor.bias))
    inside = tuple(f"{name}." for name in (*deformable, *shrinking))
    plain = [m for name, m in neck.named_modules() if isinstance(m, nn.Conv2d) and not name.startswith(inside)]
    assert len(plain) == 4 + 70 + 30 + 5
    for conv in plain:
        bound = math.sqrt(3 / conv.weight[0].numel())  # Caffe2's Xavier: uniform of variance 1 / fan-in
        assert 0.9 * bound < conv.weight.abs().max() <= bound
        assert conv.bias is None or not conv.bias.any()
    assert all((m.weight == 1).all() for m in neck.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("form", [{}, ENHANCED])
@pytest.mark.parametrize("pathways", [1, 3, 9])
def test_every_parameter_learns(form, pathways):
    torch.manual_seed(0)
    neck = made(FPG, IN_CHANNELS, CHANNELS, pathways=pathways, **form)
    sum(out.square().sum() for out in neck(features((32, 48), dtype=torch.float32))).backward()
    assert all(p.grad is not None and p.grad.any() for p in neck.parameters())
    shifts = [m.conv_offset.weight for m in neck.modules() if isinstance(m, ModulatedDeformConv2d)]
    assert not any(weight.any() for weight in shifts)  # also while they are zero
    assert len(shifts) == ({1: 0, 3: 1 + 2, 9: 26}[pathways] if form else 0)


@pytest.mark.parametrize("form", [{}, ENHANCED])
def test_layout_and_low_precision(form):
    neck = made(FPG, IN_CHANNELS, CHANNELS, **form).to(memory_format=torch.channels_last)
    maps = [x.contiguous(memory_format=torch.channels_last) for x in features((32, 48), dtype=torch.float32)]
    laid_out = []
    for part in neck.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_hook(lambda _, inputs, out: laid_out.extend([inputs[0], out]))
    exact = neck(maps)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in [*exact, *laid_out])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = neck([x.bfloat16() for x in maps])
    sum(out.float().square().sum() for out in low).backward()
    for ours, theirs in zip(low, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).abs().mean() < 0.1 * theirs.std()
    assert {p.grad.dtype for p in neck.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in neck.parameters())


def test_the_grid_stays_in_low_precision_where_autocast_interpolates_in_float32(monkeypatch):
    """As it does on CUDA: float32 once in the grid would be float32, and twice the memory, from there on."""
    plain = F.interpolate

    def as_on_cuda(x: Tensor, **how: object) -> Tensor:
        return plain(x.float() if torch.is_autocast_enabled("cpu") else x, **how)

    monkeypatch.setattr(F, "interpolate", as_on_cuda)
    neck, seen = made(FPG, IN_CHANNELS, CHANNELS, **ENHANCED), []
    for part in neck.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        neck([x.bfloat16() for x in features((32, 48), dtype=torch.float32)])
    assert set(seen) == {torch.bfloat16}


def test_its_norms_can_count_over_processes():
    neck = made(FPG, IN_CHANNELS, CHANNELS, **ENHANCED)
    norm.synchronize(neck)
    assert norm.count_learning(neck) == 126
    assert neck.channels == CHANNELS


@pytest.mark.parametrize("form", [{}, ENHANCED])
def test_no_images(form):
    neck = made(FPG, IN_CHANNELS, CHANNELS, **form).eval()
    pyramid = neck(features((32, 48), count=0, dtype=torch.float32))
    assert [tuple(out.shape) for out in pyramid] == [(0, CHANNELS, 32 >> i, 48 >> i) for i in range(5)]
    sum(out.sum() for out in pyramid).backward()
    assert all(not p.grad.any() for p in neck.parameters())


def test_images_are_padded_so_that_all_levels_halve_exactly():
    """P6 is the fifth level: a side is a multiple of 2^5 for an FPN that rounds up, of 2^6 for the grid."""
    assert (FPN.divisor, FPG.divisor) == (32, 64)
