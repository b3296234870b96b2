"""The map that `--explain` prints, of a checkpoint that is converted and of others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.zoo.conversion import ForeignModel
from tailseg.zoo.explanation import explain


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    narrow = (
        "model.backbone={name: resnet18, pretrained: false, options: {channels: [8, 8, 16, 16]}}",
        "model.neck.channels=8",
        "model.box_head.width=16",
        "model.mask_head={channels: 8, convs: 2}",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_detector(resolve("table1/seesaw", narrow), 4).state_dict()


def foreign_of(state: dict[str, Tensor], **more: Any) -> ForeignModel:
    names = ["ant", "bee", "cow", "dog"]
    return ForeignModel(project="theirs", path=Path("theirs/model.pth"), state=dict(state), names=names, **more)


def lines_of(foreign: Any) -> tuple[list[str], str | None]:
    """The lines, and the error after them."""
    lines = []
    try:
        for line in explain(foreign, categories=None, settings=()):
            lines.append(line)
    except UserError as error:
        return lines, str(error)
    return lines, None


def test_every_tensor_has_a_line(state: dict[str, Tensor]) -> None:
    origins = {ours: f"their.{ours}" for ours in state}
    lines, error = lines_of(foreign_of(state, origins=origins, unused=["mean"], remarks=["An assumption."]))
    assert error is None
    for ours, line in zip(state, lines, strict=False):
        assert line.split() == [f"their.{ours}", "->", ours, *str(tuple(state[ours].shape)).split()]
    assert lines[len(state) :] == [
        f"theirs/model.pth: {len(state)} tensors with a place, 0 left over, 0 missing, 1 not needed (mean).",
        "An assumption.",
        "It can be converted: resnet18, 4 classes, loss seesaw.",
    ]


def test_left_over_and_missing_tensors(state: dict[str, Tensor]) -> None:
    partial = {k: v for k, v in state.items() if k != "rpn.conv.bias"} | {"rpn.extra": torch.zeros(1)}
    foreign = replace(
        foreign_of(partial, origins={"rpn.extra": "rpn_head.more"}, unknown=["roi_head.semantic_head.x"]),
        project="mmdet",
    )
    lines, error = lines_of(foreign)
    assert not any("rpn.extra" in line for line in lines)
    assert lines[len(state) - 1 :] == [
        f"theirs/model.pth: {len(state) - 1} tensors with a place, 2 left over, 1 missing.",
        "Left over, of HTC's semantic branch, on no cascade:",
        "  roi_head.semantic_head.x",
        "Left over, of another RPN than that of Faster R-CNN:",
        "  rpn_head.more",
        "Missing (counters are filled in):",
        "  rpn.conv.bias",
    ]
    assert error is not None
    assert "tensors are left over: 'roi_head.semantic_head.x' of HTC's" in error


def test_another_kind_of_model(state: dict[str, Tensor]) -> None:
    """No architecture can be told, so that of missing tensors nothing is said."""
    rest = {key: value for key, value in state.items() if not key.startswith("stages")}
    lines, error = lines_of(foreign_of(rest, unknown=["bbox_head.x"]))
    assert lines[len(rest)] == f"theirs/model.pth: {len(rest)} tensors with a place, 1 left over."
    assert lines[len(rest) + 1 :] == ["Left over, of no part that is known:", "  bbox_head.x"]
    assert error is not None
    assert error.startswith("theirs/model.pth: no box head was found")


def test_a_refused_configuration_comes_last(state: dict[str, Tensor]) -> None:
    lines, error = lines_of(foreign_of(state, refusal="theirs/model.pth: has a neck of its own"))
    assert error == "theirs/model.pth: has a neck of its own"
    assert len(lines) == len(state) + 1


def test_no_tensors(tmp_path: Path) -> None:
    lines, error = lines_of(foreign_of({}))
    assert lines == ["theirs/model.pth: 0 tensors with a place, 0 left over."]
    assert error is not None
