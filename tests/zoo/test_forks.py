"""Classifiers of mmdetection's forks for long tails: EQL, EQL v2, group softmax (BAGS), ECM; scores as stated there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet_layout import State, converted, meta, save, small, state_of
from torch import Tensor

from tailseg.checkpoint import load_weights
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.recipes.schema import Recipe
from tailseg.zoo.conversion import convert
from tailseg.zoo.mmdet import read_mmdet

HEAD = "roi_head.bbox_head"


def fork(logits: int, **loss: Tensor) -> State:
    """A small Mask R-CNN of five classes whose classifier has this many rows."""
    state = state_of(small(logits=logits - 5, counts=False))
    return state | {f"{HEAD}.loss_cls.{key}": tensor for key, tensor in loss.items()}


def config(text: str) -> dict[str, Any]:
    return meta(cfg=f"model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict({text}))))")


def scores_of(recipe: Recipe, ours: State, folder: Path, hidden: Tensor) -> Tensor:
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, folder)
    head = detector.eval().stages[0].box_head
    with torch.no_grad():
        return head.classification.scores(head.classifier(hidden))


def logits_of(state: State, hidden: Tensor) -> Tensor:
    return hidden @ state[f"{HEAD}.fc_cls.weight"].t() + state[f"{HEAD}.fc_cls.bias"]


HIDDEN = torch.randn(20, 16, generator=torch.Generator().manual_seed(3)) * 0.4


@pytest.mark.parametrize("said", [True, False])
def test_eql(tmp_path: Path, said: bool) -> None:
    """As many sigmoids as classes."""
    state = fork(5)
    about = config("type='EQL', use_sigmoid=True, lambda_=0.0011, version='v1'") if said else meta()
    recipe, ours = converted({"state_dict": state, **about}, tmp_path)
    assert recipe.classifier.model_dump(include={"loss", "threshold", "normalized"}) == {
        **{"loss": "eql", "threshold": 0.0011, "normalized": False}
    }
    found = scores_of(recipe, ours, tmp_path, HIDDEN)
    assert (found[:, :5] - logits_of(state, HIDDEN).sigmoid()).abs().max() < 1e-6
    assert not found[:, 5].any()


GRADIENTS = {"pos_grad": torch.arange(5.0), "neg_grad": torch.arange(5.0) + 7, "pos_neg": torch.ones(5)}


@pytest.mark.parametrize("stored", [True, False], ids=["gradients in the file", "none"])
def test_eql_v2(tmp_path: Path, stored: bool) -> None:
    state = fork(6, **(GRADIENTS if stored else {}))
    about = meta() if stored else config("type='EQLv2', gamma=11, mu=0.7, alpha=3.5, test_with_obj=True")
    recipe, ours = converted({"state_dict": state, **about}, tmp_path)
    assert recipe.classifier.loss == "eql-v2"
    if not stored:
        assert recipe.classifier.model_dump(include={"gamma", "mu", "alpha"}) == {"gamma": 11, "mu": 0.7, "alpha": 3.5}
    sigmoids = logits_of(state, HIDDEN).sigmoid()
    found = scores_of(recipe, ours, tmp_path, HIDDEN)
    assert (found[:, :5] - sigmoids[:, :5] * (1 - sigmoids[:, 5:])).abs().max() < 1e-6
    for theirs, own in (("pos_grad", "positive_gradients"), ("neg_grad", "negative_gradients")):
        expected = GRADIENTS[theirs] if stored else torch.zeros(5)
        assert torch.equal(ours[f"stages.0.box_head.classification.{own}"], expected)


@pytest.mark.parametrize("said", [True, False])
def test_effective_class_margins(tmp_path: Path, caplog: pytest.LogCaptureFixture, said: bool) -> None:
    """Their scores are those of EQL v2; what the loss knows of the data is not needed."""
    state = fork(6, sample_n=torch.ones(6), detection_cls_weight=torch.ones(6))
    about = config("type='EffectiveClassMarginLoss', use_sigmoid=False") if said else meta()
    recipe, ours = converted({"state_dict": state, **about}, tmp_path)
    assert recipe.classifier.loss == "eql-v2"
    assert "effective class margin loss" in caplog.text
    sigmoids = logits_of(state, HIDDEN).sigmoid()
    found = scores_of(recipe, ours, tmp_path, HIDDEN)
    assert (found[:, :5] - sigmoids[:, :5] * (1 - sigmoids[:, 5:])).abs().max() < 1e-6


INSTANCES = {"cat": 2000, "dog": 3, "stop_sign": 100, "wine_glass": 9, "cup": 99}


def categories(folder: Path, instances: dict[str, int] = INSTANCES) -> Path:
    path = folder / "train.json"
    rows = [{"id": i, "name": name, "instance_count": count} for i, (name, count) in enumerate(instances.items(), 1)]
    path.write_text(json.dumps({"categories": [row | {"frequency": "f", "image_count": 1} for row in rows]}))
    return path


def group_scores(logits: Tensor) -> Tensor:
    """Groups of the classes above by hand: below 10 dog and wine glass, below 100 cup, below 1000 stop sign, then cat.

    In each, the first logit is "others"; the last two are foreground and background.
    """
    scores, start = torch.zeros(len(logits), 5), 0
    foreground = logits[:, -2:].softmax(1)[:, :1]
    for members in ([1, 3], [4], [2], [0]):
        own = logits[:, start : start + len(members) + 1].softmax(1)
        scores[:, members] = own[:, 1:] * foreground
        start += len(members) + 1
    assert start + 2 == logits.shape[1]
    return scores


@pytest.mark.parametrize("said", [True, False])
def test_group_softmax(tmp_path: Path, said: bool) -> None:
    state = fork(11)
    about = config("type='GroupSoftmax', beta=7, bin_split=(10, 100, 1000)") if said else meta()
    recipe, ours = converted({"state_dict": state, **about}, tmp_path, categories=categories(tmp_path))
    assert recipe.classifier.model_dump(include={"loss", "thresholds", "others_ratio"}) == {
        **{"loss": "group-softmax", "thresholds": (10, 100, 1000), "others_ratio": 7 if said else 8}
    }
    found = scores_of(recipe, ours, tmp_path, HIDDEN)
    assert (found[:, :5] - group_scores(logits_of(state, HIDDEN))).abs().max() < 1e-6


def test_group_softmax_without_numbers_of_instances(tmp_path: Path) -> None:
    path = save({"state_dict": fork(11), **meta()}, tmp_path / "m.pth")
    for given in (None, categories(tmp_path, dict.fromkeys(INSTANCES, 0))):
        source = "the checkpoint" if given is None else str(given)
        with pytest.raises(UserError) as caught:
            convert(read_mmdet(path), tmp_path / "o.safetensors", categories=given)
        assert str(caught.value).startswith(f"{path}: has a balanced group softmax")
        assert f"{source} has no instance_count; give" in str(caught.value)


def test_scores_of_eql_v2_without_objectness_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.roi_head\.bbox_head\.loss_cls\.test_with_obj = False"):
        converted({"state_dict": fork(6), **config("type='EQLv2', test_with_obj=False")}, tmp_path)


@pytest.mark.parametrize("kind", ["EQL", "EQLv2", "GroupSoftmax"])
def test_a_loss_that_the_logits_contradict(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"'stages\.0\.box_head\.classifier\.(weight|bias)' has (shape|8 rows)"):
        converted({"state_dict": fork(8), **config(f"type='{kind}'")}, tmp_path, categories=categories(tmp_path))
