"""Backbones of mmdetection: names of their tensors, stated here; features as in plain statements or recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmdet_layout import State, converted, meta, norm_rows, save, small, state_of
from torch import Tensor
from torch.nn import functional as F

from tailseg.checkpoint import load_weights
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.schema import Recipe
from tailseg.zoo.mmdet import read_mmdet


def checkpoint(backbone: State, channels: tuple[int, ...]) -> State:
    """A small Mask R-CNN with this backbone, whose four maps have so many channels."""
    state = {key: value for key, value in state_of(small()).items() if not key.startswith("backbone.")}
    for level, width in enumerate(channels):
        state[f"neck.lateral_convs.{level}.conv.weight"] = torch.randn(8, width, 1, 1)
    return state | {f"backbone.{key}": value for key, value in backbone.items()}


def model_of(backbone: State, channels: tuple[int, ...], folder: Path, *settings: str) -> tuple[Recipe, Detector]:
    recipe, ours = converted({"state_dict": checkpoint(backbone, channels), **meta()}, folder, *settings)
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, folder)
    return recipe, detector.eval()


class Made(dict[str, Tensor]):
    """A state dict that grows: convolutions whose responses neither vanish nor explode, and lively batch norms."""

    def conv(self, name: str, *shape: int, bias: bool = False) -> None:
        fan = torch.Size(shape)[1:].numel()
        self[f"{name}.weight"] = torch.randn(shape) * (2 / fan) ** 0.5
        if bias:
            self[f"{name}.bias"] = torch.randn(shape[0]) * 0.1

    def norm(self, name: str, width: int) -> None:
        for key, _, shape in norm_rows(name, name, width):
            self[key] = torch.rand(shape) + 0.5 if shape else torch.tensor(7)
        self[f"{name}.bias"] -= 1
        self[f"{name}.running_mean"] -= 1


def normed(state: State, x: Tensor, name: str) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def conv_norm(state: State, x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
    weight = state[f"{conv}.weight"]
    return normed(state, F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, groups), norm)


def assert_features(detector: Detector, expected: list[Tensor], image: Tensor) -> None:
    with torch.no_grad():
        found = detector.backbone(image)
    for own, theirs in zip(found, expected, strict=True):
        assert own.shape == theirs.shape
        assert theirs.std() > 1e-3
        assert (own - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ---------------------------------------------------------------------------------------------------------
# Deep stems


def deep_stem(width: int) -> Made:
    state = Made()
    for place, (inward, outward) in zip((0, 3, 6), ((3, width), (width, width), (width, 2 * width)), strict=True):
        state.conv(f"stem.{place}", outward, inward, 3, 3)
        state.norm(f"stem.{place + 1}", outward)
    return state


def averaging_shortcut(state: Made, name: str, inward: int, outward: int) -> None:
    state.conv(f"{name}.downsample.1", outward, inward, 1, 1)
    state.norm(f"{name}.downsample.2", outward)


def stem_features(state: State, image: Tensor) -> Tensor:
    x = image
    for place in (0, 3, 6):
        x = F.relu(conv_norm(state, x, f"stem.{place}", f"stem.{place + 1}", 2 if place == 0 else 1))
    return F.max_pool2d(x, 3, 2, 1)


def shortcut(state: State, x: Tensor, name: str, stride: int) -> Tensor:
    if f"{name}.downsample.1.weight" not in state:
        return x
    pooled = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
    return conv_norm(state, pooled, f"{name}.downsample.1", f"{name}.downsample.2")


BASE, WIDTHS = 8, (32, 64, 128, 256)
BLOCKS = (3, 4, 6, 3)


def res2net(parts: int = 4, width: int = 26) -> Made:
    torch.manual_seed(0)
    state, inward = deep_stem(8), 16
    for stage, count in enumerate(BLOCKS):
        planes = BASE * 2**stage
        part = planes * width // 64
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            state.conv(f"{name}.conv1", part * parts, inward, 1, 1)
            state.norm(f"{name}.bn1", part * parts)
            for i in range(parts - 1):
                state.conv(f"{name}.convs.{i}", part, part, 3, 3)
                state.norm(f"{name}.bns.{i}", part)
            state.conv(f"{name}.conv3", 4 * planes, part * parts, 1, 1)
            state.norm(f"{name}.bn3", 4 * planes)
            if block == 0:
                averaging_shortcut(state, name, inward, 4 * planes)
            inward = 4 * planes
    return state


def res2net_features(state: State, image: Tensor) -> list[Tensor]:
    """As mmdetection computes them: where the first block of a stage has no stride, its last part is passed on."""
    x, features = stem_features(state, image), []
    for stage, count in enumerate(BLOCKS):
        for block in range(count):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
            *parts, rest = F.relu(conv_norm(state, x, f"{name}.conv1", f"{name}.bn1")).chunk(4, dim=1)
            seen: list[Tensor] = []
            for i, part in enumerate(parts):
                whole = part if i == 0 or block == 0 else seen[-1] + part
                seen.append(F.relu(conv_norm(state, whole, f"{name}.convs.{i}", f"{name}.bns.{i}", stride)))
            seen.append(F.avg_pool2d(rest, 3, stride, 1) if stride > 1 else rest)
            out = conv_norm(state, torch.cat(seen, dim=1), f"{name}.conv3", f"{name}.bn3")
            x = F.relu(out + shortcut(state, x, name, stride))
        features.append(x)
    return features


def test_res2net(tmp_path: Path) -> None:
    state = res2net()
    recipe, detector = model_of(state, WIDTHS, tmp_path)
    backbone = recipe.model.backbone
    assert (backbone.name, backbone.pretrained, backbone.res2net_pool) == ("res2net50d", False, False)
    assert backbone.options == {"channels": [8, 16, 32, 64], "stem_width": 8}
    image = torch.randn(1, 3, 72, 104)
    assert_features(detector, res2net_features(state, image), image)


def test_res2net_of_other_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its Res2Net has 6 parts of 3 channels; 4 of 3 are converted"):
        model_of(res2net(6, 24), WIDTHS, tmp_path)


def test_only_a_res2net_has_that_pool(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.backbone\.res2net_pool: 'resnet50' is no Res2Net; leave it out"):
        converted({"state_dict": state_of(small()), **meta()}, tmp_path, "model.backbone.res2net_pool=false")


def resnet_d() -> Made:
    torch.manual_seed(0)
    state, inward = deep_stem(8), 16
    for stage, count in enumerate(BLOCKS):
        planes = BASE * 2**stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            for i, shape in enumerate(((planes, inward, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)), 1):
                state.conv(f"{name}.conv{i}", *shape)
                state.norm(f"{name}.bn{i}", shape[0])
            if block == 0:
                averaging_shortcut(state, name, inward, 4 * planes)
            inward = 4 * planes
    return state


def resnet_d_features(state: State, image: Tensor) -> list[Tensor]:
    x, features = stem_features(state, image), []
    for stage, count in enumerate(BLOCKS):
        for block in range(count):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
            out = F.relu(conv_norm(state, x, f"{name}.conv1", f"{name}.bn1"))
            out = F.relu(conv_norm(state, out, f"{name}.conv2", f"{name}.bn2", stride))
            out = conv_norm(state, out, f"{name}.conv3", f"{name}.bn3")
            x = F.relu(out + shortcut(state, x, name, stride))
        features.append(x)
    return features


def test_a_resnet_with_a_deep_stem(tmp_path: Path) -> None:
    state = resnet_d()
    recipe, detector = model_of(state, WIDTHS, tmp_path)
    backbone = recipe.model.backbone
    assert (backbone.name, backbone.options["stem_width"], backbone.res2net_pool) == ("resnet50d", 8, True)
    image = torch.randn(1, 3, 72, 104)
    assert_features(detector, resnet_d_features(state, image), image)


def test_a_deep_stem_of_no_known_depth(tmp_path: Path) -> None:
    state = {key: value for key, value in resnet_d().items() if not key.startswith("layer3.5.")}
    with pytest.raises(
        UserError, match=r"is a ResNet with a deep stem of \(3, 4, 5, 3\) bottlenecks a stage; those of"
    ):
        model_of(state, WIDTHS, tmp_path)


def test_recorded_resnest(recorded: Any, check: Any, tmp_path: Path) -> None:
    ((case, inputs, state, outputs),) = recorded("backbone_resnest")
    recipe, detector = model_of(state, WIDTHS, tmp_path)
    backbone = recipe.model.backbone
    assert (backbone.name, backbone.options) == ("resnest50d", {"channels": [8, 16, 32, 64], "stem_width": 8})
    with torch.no_grad():
        features = detector.backbone(inputs["image"])
    for i, feature in enumerate(features):
        check(case, f"out{i}", feature, outputs[f"out{i}"])


def test_a_resnest_of_another_radix(recorded: Any, tmp_path: Path) -> None:
    ((_, _, state, _),) = recorded("backbone_resnest")
    state = dict(state) | {"layer1.0.conv2.conv.weight": torch.randn(32, 2, 3, 3)}
    with pytest.raises(UserError, match=r"its ResNeSt has a radix of 4; one of 2 is converted"):
        model_of(state, WIDTHS, tmp_path)


# ---------------------------------------------------------------------------------------------------------
# GCNet


def gcnet() -> Made:
    """A ResNet-50 with context blocks in its last three stages."""
    torch.manual_seed(0)
    state = Made({key[9:]: value for key, value in state_of(small()).items() if key.startswith("backbone.")})
    for key in [key for key in state if state[key].dim() == 4]:
        state[key] *= (2 / state[key][0].numel()) ** 0.5
    for key in [key for key in state if key.endswith("running_var")]:
        state[key] = state[key].abs() + 0.5
    for stage, count in ((2, 4), (3, 6), (4, 3)):
        for block in range(count):
            name, width = f"layer{stage}.{block}.context_block", 16 * 2 ** (stage - 1)
            state.conv(f"{name}.conv_mask", 1, width, 1, 1, bias=True)
            state.conv(f"{name}.channel_add_conv.0", width // 4, width, 1, 1, bias=True)
            state[f"{name}.channel_add_conv.1.weight"] = torch.rand(width // 4, 1, 1) + 0.5
            state[f"{name}.channel_add_conv.1.bias"] = torch.randn(width // 4, 1, 1)
            state.conv(f"{name}.channel_add_conv.3", width, width // 4, 1, 1, bias=True)
    return state


def with_context(state: State, x: Tensor, name: str) -> Tensor:
    def conv(maps: Tensor, layer: str) -> Tensor:
        return F.conv2d(maps, state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"])

    weights = conv(x, "conv_mask").flatten(2).softmax(2)
    mean = (x.flatten(2) * weights).sum(2)[:, :, None, None]
    hidden = conv(mean, "channel_add_conv.0")
    spread, centre = torch.var_mean(hidden, dim=1, correction=0, keepdim=True)
    hidden = (hidden - centre) / (spread + 1e-5).sqrt()
    hidden = hidden * state[f"{name}.channel_add_conv.1.weight"] + state[f"{name}.channel_add_conv.1.bias"]
    return x + conv(F.relu(hidden), "channel_add_conv.3")


def gcnet_features(state: State, image: Tensor) -> list[Tensor]:
    x = F.max_pool2d(F.relu(conv_norm(state, image, "conv1", "bn1", 2)), 3, 2, 1)
    features = []
    for stage, count in enumerate(BLOCKS):
        for block in range(count):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
            out = F.relu(conv_norm(state, x, f"{name}.conv1", f"{name}.bn1"))
            out = F.relu(conv_norm(state, out, f"{name}.conv2", f"{name}.bn2", stride))
            out = conv_norm(state, out, f"{name}.conv3", f"{name}.bn3")
            out = with_context(state, out, f"{name}.context_block") if stage > 0 else out
            own = conv_norm(state, x, f"{name}.downsample.0", f"{name}.downsample.1", stride) if block == 0 else x
            x = F.relu(out + own)
        features.append(x)
    return features


def test_gcnet(tmp_path: Path) -> None:
    state = gcnet()
    recipe, detector = model_of(state, (16, 32, 64, 128), tmp_path)
    backbone = recipe.model.backbone
    assert (backbone.context_stages, backbone.context_ratio) == ((2, 3, 4), 0.25)
    image = torch.randn(2, 3, 72, 104)
    assert_features(detector, gcnet_features(state, image), image)


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        ("cfg=dict(type='ContextBlock', ratio=0.25), position='after_conv2'", "plugins.position = 'after_conv2'"),
        ("cfg=dict(type='NonLocal2d'), position='after_conv3'", "plugins.cfg.type = 'NonLocal2d'"),
        ("cfg=dict(type='ContextBlock', fusion_types=['channel_mul'])", "plugins.cfg.fusion_types = ['channel_mul']"),
    ],
)
def test_other_plugins(tmp_path: Path, plugin: str, named: str) -> None:
    text = f"model = dict(backbone=dict(type='ResNet', plugins=[dict({plugin})]))"
    with pytest.raises(UserError) as caught:
        converted({"state_dict": state_of(small()), **meta(cfg=text)}, tmp_path)
    assert named in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# RegNet, HRNet, Swin Transformer, ConvNeXt

REGNET_DEPTHS, REGNET_WIDTHS = (1, 2, 7, 12), (32, 64, 160, 384)


def regnet() -> Made:
    """RegNetX of 400 MF: groups of 16 channels, no wider inside than outside."""
    torch.manual_seed(0)
    state, inward = Made(), 32
    state.conv("conv1", 32, 3, 3, 3)
    state.norm("bn1", 32)
    for stage, (count, width) in enumerate(zip(REGNET_DEPTHS, REGNET_WIDTHS, strict=True), start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            for i, shape in enumerate(((width, inward, 1, 1), (width, 16, 3, 3), (width, width, 1, 1)), start=1):
                state.conv(f"{name}.conv{i}", *shape)
                state.norm(f"{name}.bn{i}", width)
            if block == 0:
                state.conv(f"{name}.downsample.0", width, inward, 1, 1)
                state.norm(f"{name}.downsample.1", width)
            inward = width
    return state


def regnet_features(state: State, image: Tensor) -> list[Tensor]:
    x = F.relu(conv_norm(state, image, "conv1", "bn1", 2))
    features = []
    for stage, (count, width) in enumerate(zip(REGNET_DEPTHS, REGNET_WIDTHS, strict=True), start=1):
        for block in range(count):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 else 1
            out = F.relu(conv_norm(state, x, f"{name}.conv1", f"{name}.bn1"))
            out = F.relu(conv_norm(state, out, f"{name}.conv2", f"{name}.bn2", stride, width // 16))
            out = conv_norm(state, out, f"{name}.conv3", f"{name}.bn3")
            own = conv_norm(state, x, f"{name}.downsample.0", f"{name}.downsample.1", stride) if block == 0 else x
            x = F.relu(out + own)
        features.append(x)
    return features


def test_regnet(tmp_path: Path) -> None:
    state = regnet()
    recipe, detector = model_of(state, REGNET_WIDTHS, tmp_path)
    assert (recipe.model.backbone.name, recipe.model.backbone.pretrained) == ("regnetx_004", True)
    image = torch.randn(1, 3, 72, 104)
    assert_features(detector, regnet_features(state, image), image)


@pytest.mark.parametrize("family", ["regnet", "deep stem", "swin", "convnext"])
def test_the_order_of_colours(tmp_path: Path, family: str) -> None:
    """The first convolution's channels are turned round where the network takes B, G, R."""
    make, channels, first = {
        "regnet": (regnet, REGNET_WIDTHS, "conv1"),
        "deep stem": (resnet_d, WIDTHS, "stem.0"),
        "swin": (swin, SWIN_WIDTHS, "patch_embed.projection"),
        "convnext": (convnext, CONVNEXT_WIDTHS, "downsample_layers.0.0"),
    }[family]
    state = make()
    text = "img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], to_rgb=False)"
    text += "\nmodel = dict()"
    content = {"state_dict": checkpoint(state, channels), **meta(cfg=text)}
    foreign = read_mmdet(save(content, tmp_path / "m.pth"))
    turned = [tensor for tensor in foreign.state.values() if torch.equal(tensor, state[f"{first}.weight"].flip(1))]
    assert len(turned) == 1
    assert foreign.values["model"]["pixel_mean"] == [123.675, 116.28, 103.53]


def test_a_regnet_with_deformable_convolutions(tmp_path: Path) -> None:
    """In the last three stages; shifts of nothing leave the features as they are."""
    state, image = regnet(), torch.randn(1, 3, 72, 104)
    for stage, (count, width) in enumerate(zip(REGNET_DEPTHS[1:], REGNET_WIDTHS[1:], strict=True), start=2):
        for block in range(count):
            name = f"layer{stage}.{block}.conv2.conv_offset"
            state[f"{name}.weight"], state[f"{name}.bias"] = torch.zeros(27, width, 3, 3), torch.zeros(27)
            state[f"{name}.bias"][18:] = 30.0  # each tap counts 1
    recipe, detector = model_of(state, REGNET_WIDTHS, tmp_path)
    assert recipe.model.backbone.deformable_stages == (2, 3, 4)
    assert_features(detector, regnet_features(state, image), image)


def test_a_regnet_of_no_known_size(tmp_path: Path) -> None:
    state = {key: value for key, value in regnet().items() if not key.startswith("layer4.11.")}
    with pytest.raises(UserError, match=r"is a RegNet of \(1, 2, 7, 11\) blocks a stage; RegNetX of 0.4 to 12 GF"):
        model_of(state, REGNET_WIDTHS, tmp_path)


def test_hrnet(tmp_path: Path) -> None:
    """mmdetection's names are timm's; its neck against a plain statement."""
    torch.manual_seed(0)
    net = timm.create_model("hrnet_w18", features_only=True, feature_location="", out_indices=(1, 2, 3, 4)).eval()
    widths = (18, 36, 72, 144)
    state = checkpoint(dict(net.state_dict()), widths)
    state = {key: value for key, value in state.items() if not key.startswith("neck.lateral")}
    state |= {"neck.reduction_conv.conv.weight": torch.randn(8, 270, 1, 1) * 0.1}
    state |= {"neck.reduction_conv.conv.bias": torch.randn(8), "neck.fpn_convs.4.conv.bias": torch.randn(8)}
    state |= {"neck.fpn_convs.4.conv.weight": torch.randn(8, 8, 3, 3)}
    recipe, ours = converted({"state_dict": state, **meta()}, tmp_path)
    backbone = recipe.model.backbone
    assert (backbone.name, backbone.options, backbone.frozen_stages) == ("hrnet_w18", {"feature_location": ""}, -1)
    detector = build_detector(recipe, 5).eval()
    load_weights(detector, ours, tmp_path)
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        features = net(image)
        assert_features(detector, features, image)
        pyramid = detector.neck(features)
    larger = [F.interpolate(x, scale_factor=2**i, mode="bilinear") for i, x in enumerate(features)]
    whole = F.conv2d(torch.cat(larger, 1), *(state[f"neck.reduction_conv.conv.{part}"] for part in ("weight", "bias")))
    for i, own in enumerate(pyramid):
        pooled = F.avg_pool2d(whole, 2**i)
        conv = (state[f"neck.fpn_convs.{i}.conv.{part}"] for part in ("weight", "bias"))
        expected = F.conv2d(pooled, *conv, padding=1)
        assert own.shape == expected.shape
        assert (own - expected).abs().max() <= 1e-5 * expected.abs().max()


SWIN_WIDTHS, HEADS, WINDOW = (24, 48, 96, 192), (3, 6, 12, 24), 7


def linear(state: Made, name: str, outward: int, inward: int) -> None:
    state[f"{name}.weight"] = torch.randn(outward, inward) / inward**0.5
    state[f"{name}.bias"] = torch.randn(outward) * 0.1


def layer_norm(state: Made, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width) * 0.1


def swin() -> Made:
    torch.manual_seed(0)
    state = Made()
    state.conv("patch_embed.projection", 24, 3, 4, 4, bias=True)
    layer_norm(state, "patch_embed.norm", 24)
    for stage, (count, width, heads) in enumerate(zip((2, 2, 6, 2), SWIN_WIDTHS, HEADS, strict=True)):
        for block in range(count):
            name = f"stages.{stage}.blocks.{block}"
            table = f"{name}.attn.w_msa.relative_position_bias_table"
            state[table] = torch.randn((2 * WINDOW - 1) ** 2, heads)
            state[f"{name}.attn.w_msa.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
            for layer, outward, inward in (
                *(("attn.w_msa.qkv", 3 * width, width), ("attn.w_msa.proj", width, width)),
                *(("ffn.layers.0.0", 4 * width, width), ("ffn.layers.1", width, 4 * width)),
            ):
                linear(state, f"{name}.{layer}", outward, inward)
            for norm in ("norm1", "norm2"):
                layer_norm(state, f"{name}.{norm}", width)
        if stage < 3:
            layer_norm(state, f"stages.{stage}.downsample.norm", 4 * width)
            state[f"stages.{stage}.downsample.reduction.weight"] = torch.randn(2 * width, 4 * width) / width**0.5
        layer_norm(state, f"norm{stage}", width)
    return state


def of(state: State, name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def normed_channels(state: State, x: Tensor, name: str, eps: float) -> Tensor:
    """Of maps (B, h, w, channels)."""
    return F.layer_norm(x, x.shape[-1:], *of(state, name), eps)


def attended(state: State, x: Tensor, name: str, heads: int, shift: int) -> Tensor:
    """Attention of each place to those of its window, cell by cell: maps are padded, then shifted, then cut."""
    _, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW)).roll((-shift, -shift), (1, 2))
    rows, columns = x.shape[1:3]
    cell = torch.arange(WINDOW)
    y, z = cell.repeat_interleave(WINDOW), cell.repeat(WINDOW)
    place = (y[:, None] - y + WINDOW - 1) * (2 * WINDOW - 1) + z[:, None] - z + WINDOW - 1
    bias = state[f"{name}.relative_position_bias_table"][place].permute(2, 0, 1)
    out = torch.zeros_like(x)
    for top in range(0, rows, WINDOW):
        for left in range(0, columns, WINDOW):
            window = x[:, top : top + WINDOW, left : left + WINDOW].reshape(1, -1, channels)
            qkv = F.linear(window, *of(state, f"{name}.qkv")).view(1, 49, 3, heads, -1).permute(2, 0, 3, 1, 4)
            scores = qkv[0] @ qkv[1].transpose(2, 3) * (channels // heads) ** -0.5 + bias
            if shift:  # what the shift brought together from both ends of the maps does not see each other
                wrapped = (top + y >= rows - shift).long() * 2 + (left + z >= columns - shift).long()
                scores = scores + (wrapped[:, None] != wrapped) * -100.0
            seen = (scores.softmax(3) @ qkv[2]).transpose(1, 2).reshape(1, 49, channels)
            seen = F.linear(seen, *of(state, f"{name}.proj")).view(1, WINDOW, WINDOW, channels)
            out[:, top : top + WINDOW, left : left + WINDOW] = seen
    return out.roll((shift, shift), (1, 2))[:, :height, :width]


def swin_features(state: State, image: Tensor) -> list[Tensor]:
    x = F.conv2d(image, *of(state, "patch_embed.projection"), stride=4).permute(0, 2, 3, 1)
    x, features = normed_channels(state, x, "patch_embed.norm", 1e-5), []
    for stage, (count, heads) in enumerate(zip((2, 2, 6, 2), HEADS, strict=True)):
        for block in range(count):
            name = f"stages.{stage}.blocks.{block}"
            own = normed_channels(state, x, f"{name}.norm1", 1e-5)
            x = x + attended(state, own, f"{name}.attn.w_msa", heads, WINDOW // 2 if block % 2 else 0)
            own = normed_channels(state, x, f"{name}.norm2", 1e-5)
            hidden = F.gelu(F.linear(own, *of(state, f"{name}.ffn.layers.0.0")))
            x = x + F.linear(hidden, *of(state, f"{name}.ffn.layers.1"))
        features.append(normed_channels(state, x, f"norm{stage}", 1e-5).permute(0, 3, 1, 2))
        if stage < 3:
            patches = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
            patches = normed_channels(state, patches, f"stages.{stage}.downsample.norm", 1e-5)
            merged = F.linear(patches, state[f"stages.{stage}.downsample.reduction.weight"])
            x = merged.view(1, x.shape[1] // 2, x.shape[2] // 2, -1)
    return features


def test_swin_transformer(tmp_path: Path) -> None:
    state = swin()
    recipe, detector = model_of(state, SWIN_WIDTHS, tmp_path)
    backbone = recipe.model.backbone
    assert (backbone.name, backbone.output_norm, backbone.frozen_stages) == ("swin_tiny_patch4_window7_224", True, -1)
    assert backbone.options == {"strict_img_size": False, "always_partition": True, "embed_dim": 24}
    image = torch.randn(1, 3, 96, 128)
    assert_features(detector, swin_features(state, image), image)


def test_a_swin_transformer_of_no_known_size(tmp_path: Path) -> None:
    state = {key: value for key, value in swin().items() if not key.startswith("stages.2.blocks.5.")}
    with pytest.raises(UserError, match=r"is a Swin Transformer of 5 blocks in stage 3; 6 or 18 are converted"):
        model_of(state, SWIN_WIDTHS, tmp_path)


CONVNEXT_WIDTHS = (8, 16, 32, 64)


def convnext() -> Made:
    torch.manual_seed(0)
    state, inward = Made(), 3
    for stage, (count, width) in enumerate(zip((3, 3, 9, 3), CONVNEXT_WIDTHS, strict=True)):
        side, places = (4, (0, 1)) if stage == 0 else (2, (1, 0))
        state.conv(f"downsample_layers.{stage}.{places[0]}", width, inward, side, side, bias=True)
        layer_norm(state, f"downsample_layers.{stage}.{places[1]}", width if stage == 0 else inward)
        for block in range(count):
            name = f"stages.{stage}.{block}"
            state.conv(f"{name}.depthwise_conv", width, 1, 7, 7, bias=True)
            layer_norm(state, f"{name}.norm", width)
            linear(state, f"{name}.pointwise_conv1", 4 * width, width)
            linear(state, f"{name}.pointwise_conv2", width, 4 * width)
            state[f"{name}.gamma"] = torch.rand(width)
        layer_norm(state, f"norm{stage}", width)
        inward = width
    return state


def convnext_features(state: State, image: Tensor) -> list[Tensor]:
    def norm(x: Tensor, name: str) -> Tensor:
        return normed_channels(state, x.permute(0, 2, 3, 1), name, 1e-6).permute(0, 3, 1, 2)

    x, features = image, []
    for stage, count in enumerate((3, 3, 9, 3)):
        down = f"downsample_layers.{stage}"
        if stage == 0:
            x = norm(F.conv2d(x, *of(state, f"{down}.0"), stride=4), f"{down}.1")
        else:
            x = F.conv2d(norm(x, f"{down}.0"), *of(state, f"{down}.1"), stride=2)
        for block in range(count):
            name = f"stages.{stage}.{block}"
            own = F.conv2d(x, *of(state, f"{name}.depthwise_conv"), padding=3, groups=x.shape[1])
            own = norm(own, f"{name}.norm").permute(0, 2, 3, 1)
            own = F.linear(
                F.gelu(F.linear(own, *of(state, f"{name}.pointwise_conv1"))), *of(state, f"{name}.pointwise_conv2")
            )
            x = x + (own * state[f"{name}.gamma"]).permute(0, 3, 1, 2)
        features.append(norm(x, f"norm{stage}"))
    return features


def test_convnext(tmp_path: Path) -> None:
    state = convnext()
    recipe, detector = model_of(state, CONVNEXT_WIDTHS, tmp_path)
    backbone = recipe.model.backbone
    assert (backbone.name, backbone.output_norm, backbone.frozen_stages) == ("convnext_tiny", True, -1)
    assert backbone.options == {"dims": [8, 16, 32, 64]}
    image = torch.randn(1, 3, 64, 96)
    assert_features(detector, convnext_features(state, image), image)
