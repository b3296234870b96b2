"""Backbones of mmdetection: names of their tensors, stated here; features as in plain statements or recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet_layout import State, converted, meta, norm_rows, small, state_of
from torch import Tensor
from torch.nn import functional as F

from tailseg.checkpoint import load_weights
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.schema import Recipe


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
