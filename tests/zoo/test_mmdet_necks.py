"""Necks of mmdetection: FPN with CARAFE and PAFPN against plain statements, FPG against the recording, group norm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet_layout import Layout, State, assert_same, converted, lively, meta, save, small, state_of
from torch import Tensor
from torch.nn import functional as F

from tailseg.checkpoint import load_weights
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.fpg import FPG
from tailseg.zoo.conversion import convert, rename
from tailseg.zoo.mmdet import read_mmdet
from tailseg.zoo.mmdet_necks import neck_names

WIDTHS = (16, 32, 64, 128)


def model_of(layout: Layout, folder: Path) -> tuple[State, Detector]:
    state = lively(layout)
    recipe, ours = converted({"state_dict": state, **meta()}, folder)
    assert_same(layout, state, ours)
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, folder)
    return state, detector.eval()


def maps(height: int, width: int, widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    sizes = [(math.ceil(height / 2**i), math.ceil(width / 2**i)) for i in range(4)]
    return [torch.randn(2, channels, *size) for channels, size in zip(widths, sizes, strict=True)]


def conv(state: State, x: Tensor, name: str, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[2] // 2)


def reassembled(state: State, x: Tensor, name: str) -> Tensor:
    """Twice the size: each cell a weighted sum of the 5 x 5 cells around the one that it lies in."""
    kernels = conv(state, conv(state, x, f"{name}.channel_compressor"), f"{name}.content_encoder")
    kernels = F.pixel_shuffle(kernels, 2).softmax(1)
    around = F.unfold(x, 5, padding=2).unflatten(2, x.shape[2:]).unflatten(1, (-1, 25))
    around = around.repeat_interleave(2, 3).repeat_interleave(2, 4)
    return (around * kernels.unsqueeze(1)).sum(2)


@pytest.mark.parametrize("size", [(32, 48), (26, 35)])
def test_fpn_with_carafe(tmp_path: Path, size: tuple[int, int]) -> None:
    state, detector = model_of(small(neck_kind="FPN_CARAFE"), tmp_path)
    features = maps(*size)
    levels = [conv(state, x, f"neck.lateral_convs.{i}.conv") for i, x in enumerate(features)]
    levels.append(conv(state, features[3], "neck.lateral_convs.4.conv", 2))
    for i in (3, 2, 1, 0):
        height, width = levels[i].shape[2:]
        larger = reassembled(state, levels[i + 1], f"neck.upsample_modules.{i}")
        levels[i] = levels[i] + larger[:, :, :height, :width]
    expected = [conv(state, x, f"neck.fpn_convs.{i}.conv") for i, x in enumerate(levels)]
    with torch.no_grad():
        found = detector.neck(features)
    assert detector.divisor == 64
    for own, theirs in zip(found, expected, strict=True):
        assert (own - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("norm", [False, True])
def test_pafpn(tmp_path: Path, norm: bool) -> None:
    """On sides that no power of two divides."""
    state, detector = model_of(small(neck_kind="PAFPN", neck_norm=norm), tmp_path)

    def normed(x: Tensor, name: str, stride: int = 1) -> Tensor:
        x = conv(state, x, f"{name}.conv", stride)
        parts = (state.get(f"{name}.bn.{part}") for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-5) if norm else x  # type: ignore[arg-type]

    features = maps(26, 35)
    levels = [normed(x, f"neck.lateral_convs.{i}") for i, x in enumerate(features)]
    for i in (2, 1, 0):
        levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[2:])
    levels = [normed(x, f"neck.fpn_convs.{i}") for i, x in enumerate(levels)]
    for i in (0, 1, 2):
        levels[i + 1] = levels[i + 1] + normed(levels[i], f"neck.downsample_convs.{i}", 2)
    expected = [levels[0], *(normed(levels[i + 1], f"neck.pafpn_convs.{i}") for i in (0, 1, 2))]
    expected.append(expected[3][:, :, ::2, ::2])
    with torch.no_grad():
        found = detector.neck(features)
    for own, theirs in zip(found, expected, strict=True):
        assert (own - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_fpg(tmp_path: Path) -> None:
    _, detector = model_of(small(neck_kind="FPG"), tmp_path)
    assert isinstance(detector.neck, FPG)
    assert [sorted(cells) for cells in detector.neck.pathways] == [["4"], ["3", "4"], ["2", "3", "4"]]


def test_recorded_fpg(recorded: Any, check: Any) -> None:
    """By the names of a whole checkpoint."""
    ((case, inputs, state, outputs),) = recorded("neck_fpg")
    build = case["settings"]["build"]
    origins, unknown = rename([f"neck.{key}" for key in state], neck_names())
    assert not unknown
    options = {"pathways": build["stack_times"], "deformable": False, "carafe": False}
    neck = FPG(build["in_channels"], build["out_channels"], **options).eval()
    neck.load_state_dict({ours[5:]: state[theirs[5:]] for ours, theirs in origins.items()})
    with torch.no_grad():
        pyramid = neck([inputs[f"feature{i}"] for i in range(4)])
    for i, out in enumerate(pyramid):
        check(case, f"out{i}", out, outputs[f"out{i}"])


def grid(**changes: Any) -> str:
    parts = {
        "same_up_trans": "dict(type='conv', kernel_size=3, stride=2, padding=1)",
        "across_down_trans": "dict(type='interpolation_conv', mode='nearest', kernel_size=3)",
        "across_skip_trans": "dict(type='conv', kernel_size=1)",
        "paths": "['bu', 'bu', 'bu']",
    }
    return f"model = dict(neck=dict(type='FPG', {', '.join(f'{k}={v}' for k, v in (parts | changes).items())}))"


def test_configurations_of_fpg(tmp_path: Path) -> None:
    state = state_of(small(neck_kind="FPG"))
    recipe, _ = converted({"state_dict": state, **meta(cfg=grid())}, tmp_path)
    assert recipe.model.neck.model_dump() == {
        **{"kind": "fpg", "channels": 8, "norm": False},
        **{"pathways": 3, "deformable": False, "carafe": False},
    }
    for changes, named in (
        ({"paths": "['bu', 'td', 'bu']"}, "model.neck.paths"),
        ({"across_skip_trans": "dict(type='identity')"}, "model.neck.across_skip_trans.type = 'identity'"),
        ({"across_down_trans": "dict(type='interpolation_conv', mode='bilinear')"}, "across_down_trans.mode"),
    ):
        refused = save({"state_dict": state, **meta(cfg=grid(**changes))}, tmp_path / "m.pth")
        with pytest.raises(UserError) as caught:
            convert(read_mmdet(refused), tmp_path / "o.safetensors")
        assert named in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Group norm and weight standardisation

GROUPED: dict[str, Any] = {"base": 32, "stem": 64, "neck": 32, "mask": 32, "group_norm": True}
GROUPED |= {"neck_norm": True, "mask_norm": True, "box_convs": 4}


def grouped(state: State, x: Tensor, name: str) -> Tensor:
    """Mean 0 and deviation 1 in each of 32 groups of a row's channels."""
    groups = x.unflatten(1, (32, -1))
    spread, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
    normed = ((groups - mean) / (spread + 1e-5).sqrt()).flatten(1, 2)
    weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
    return normed * weight + bias


def test_group_norm(tmp_path: Path) -> None:
    """In backbone, neck and heads; the first block, the neck and the box head against a plain statement."""
    state, detector = model_of(small(**GROUPED), tmp_path)
    net = detector.backbone.net
    x = torch.randn(2, 64, 24, 20)
    first, shortcut = x, "backbone.layer1.0.downsample"
    for i in (1, 2, 3):
        first = grouped(state, conv(state, first, f"backbone.layer1.0.conv{i}"), f"backbone.layer1.0.gn{i}")
        first = F.relu(first) if i < 3 else first
    first = F.relu(first + grouped(state, conv(state, x, f"{shortcut}.0"), f"{shortcut}.1"))
    features = maps(16, 24, (128, 256, 512, 1024))
    lateral = grouped(state, conv(state, features[3], "neck.lateral_convs.3.conv"), "neck.lateral_convs.3.gn")
    top = grouped(state, conv(state, lateral, "neck.fpn_convs.3.conv"), "neck.fpn_convs.3.gn")
    seen = torch.randn(3, 32, 7, 7)
    hidden = seen
    for i in range(4):
        name = f"roi_head.bbox_head.shared_convs.{i}"
        hidden = F.relu(grouped(state, conv(state, hidden, f"{name}.conv"), f"{name}.gn"))
    with torch.no_grad():
        assert (net.layer1[0](x) - first).abs().max() < 1e-4
        assert (detector.neck(features)[3] - top).abs().max() < 1e-4
        found = detector.stages[0].box_head(lambda _rois: seen, torch.zeros(3, 5))
    assert (found.class_features - hidden.flatten(1)).abs().max() < 1e-4


@pytest.mark.parametrize("named", [False, True], ids=["configuration", "name of the file"])
def test_weight_standardisation(tmp_path: Path, caplog: pytest.LogCaptureFixture, named: bool) -> None:
    layout = small(**GROUPED)
    state, ws = state_of(layout), "conv_cfg=dict(type='ConvWS'), norm_cfg=dict(type='GN', num_groups=32)"
    parts = f"backbone=dict({ws}), neck=dict({ws}), roi_head=dict(bbox_head=dict({ws}), mask_head=dict({ws}))"
    about = meta() if named else meta(cfg=f"model = dict({parts})")
    name = "mask_rcnn_r50_fpn_gn_ws-all_2x_coco.pth" if named else "model.pth"
    recipe, ours = converted({"state_dict": state, **about}, tmp_path, name=name)
    assert recipe.model.backbone.options["norm_layer"] == "groupnorm"
    assert "weight standardisation, which was worked into the weights" in caplog.text
    changed = 0
    for theirs, own, shape in layout.rows():
        expected = state[theirs].double()
        plain = ("rpn_head.", "roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits")
        if len(shape) == 4 and not theirs.startswith(plain):
            filters = expected.flatten(1)
            deviation = ((filters - filters.mean(1, True)) ** 2).sum(1, True) / (filters.shape[1] - 1)
            expected = ((filters - filters.mean(1, True)) / (deviation.sqrt() + 1e-5)).view(shape)
            changed += 1
        elif theirs.endswith("cum_samples"):
            expected = expected[:-1]
        assert (ours[own].double() - expected).abs().max() < 1e-4, own
    assert changed == 53 + 8 + 4 + 4


def test_weight_standardisation_in_parts_only(tmp_path: Path) -> None:
    layout = small(**GROUPED)
    state = state_of(layout)
    about = meta(cfg="model = dict(neck=dict(conv_cfg=dict(type='ConvWS')))")
    _, ours = converted({"state_dict": state, **about}, tmp_path)
    same = {theirs for theirs, own, _ in layout.rows() if torch.equal(ours[own].flatten(), state[theirs].flatten())}
    assert {f"neck.lateral_convs.{i}.conv.weight" for i in range(4)}.isdisjoint(same)
    assert {theirs for theirs, _, _ in layout.rows() if not theirs.startswith(("neck", "roi_head.bbox"))} <= same


def test_another_kind_of_convolution(tmp_path: Path) -> None:
    about = meta(cfg="model = dict(neck=dict(conv_cfg=dict(type='DCN')))")
    with pytest.raises(UserError, match=r"model\.neck\.conv_cfg\.type = 'DCN'"):
        converted({"state_dict": state_of(small()), **about}, tmp_path)


def test_group_norm_of_no_32_groups(tmp_path: Path) -> None:
    text = "model = dict(neck=dict(norm_cfg=dict(type='GN', num_groups=16)))"
    with pytest.raises(UserError, match=r"model\.neck\.norm_cfg\.num_groups = 16"):
        converted({"state_dict": state_of(small(**GROUPED)), **meta(cfg=text)}, tmp_path)
    with pytest.raises(UserError, match="group norm needs a multiple of 32 channels, got 8"):
        converted({"state_dict": state_of(small()), **meta()}, tmp_path, "model.neck.norm=group")


def test_a_box_head_of_convolutions_without_norm(tmp_path: Path) -> None:
    layout = small(box_convs=4)
    state = {key: value for key, value in state_of(layout).items() if ".shared_convs." not in key}
    for i in range(4):
        state[f"roi_head.bbox_head.shared_convs.{i}.conv.weight"] = torch.randn(8, 8, 3, 3) * 0.1
        state[f"roi_head.bbox_head.shared_convs.{i}.conv.bias"] = torch.randn(8)
    recipe, ours = converted({"state_dict": state, **meta()}, tmp_path)
    assert (recipe.model.box_head.convs, recipe.model.box_head.norm) == (4, False)
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, tmp_path)
    seen = torch.randn(3, 8, 7, 7)
    hidden = seen
    for i in range(4):
        hidden = F.relu(conv(state, hidden, f"roi_head.bbox_head.shared_convs.{i}.conv"))
    with torch.no_grad():
        found = detector.eval().stages[0].box_head(lambda _rois: seen, torch.zeros(3, 5))
    assert (found.class_features - hidden.flatten(1)).abs().max() < 1e-4
