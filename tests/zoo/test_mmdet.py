"""Checkpoints of mmdetection by their names and shapes, which are stated here on their own."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet_layout import (
    CASCADE,
    MASK_RCNN,
    NAMES,
    SMALL,
    SMALL_CASCADE,
    Layout,
    State,
    assert_same,
    constants_of,
    converted,
    meta,
    save,
    small,
    state_of,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from tailseg.checkpoint import load_weights
from tailseg.errors import UserError
from tailseg.layers.deform_conv import ModulatedDeformConv2d
from tailseg.model.build import build_detector
from tailseg.recipes import table1
from tailseg.recipes.classifiers import SeesawRecipe
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed
from tailseg.zoo import conversion, pickle_limits
from tailseg.zoo.conversion import convert
from tailseg.zoo.mmdet import read_mmdet


@pytest.fixture(autouse=True)
def room_for_expanded_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of full-size models here hold one number a tensor, which is more than a stranger's file may claim."""
    monkeypatch.setattr(pickle_limits, "SPARE_BYTES", 2**33)


# ---------------------------------------------------------------------------------------------------------
# Full size


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `convert` hands over to be written, which would be 200 MB and more."""
    seen: dict[str, Any] = {}

    def take(path: Path, state: State, recipe: Recipe, categories: Any, *, step: int) -> None:
        seen.update(state=state, recipe=recipe, categories=categories)

    monkeypatch.setattr(conversion, "save_model", take)
    return seen


def lvis_categories(folder: Path) -> Path:
    path = folder / "lvis.json"
    rows = [{"id": i, "name": f"thing {i}", "frequency": "rcf"[i % 3], "image_count": i} for i in range(1, 1204)]
    path.write_text(json.dumps({"categories": rows}))
    return path


@pytest.mark.parametrize(("layout", "keys", "parameters"), [(MASK_RCNN, 361, 50_441_347), (CASCADE, 403, 81_646_739)])
def test_the_table_of_names_is_that_of_the_published_models(layout: Layout, keys: int, parameters: int) -> None:
    rows = layout.rows()
    assert len({theirs for theirs, _, _ in rows}) == len(rows) == keys
    statistics = ("running_mean", "running_var", "num_batches_tracked", "cum_samples")
    assert sum(prod(shape) for theirs, _, shape in rows if not theirs.endswith(statistics)) == parameters


@pytest.mark.parametrize("name", ["model_mask_rcnn", "model_cascade"])
def test_the_table_of_names_is_that_of_the_recorded_models(shared: Path, name: str) -> None:
    state = torch.load(shared / "reference" / f"{name}.pth", weights_only=True)["state_dict"]
    narrow = Layout(base=8, stem=8, neck=32, hidden=64, mask=32, classes=37, cascade=name == "model_cascade")
    assert {theirs: shape for theirs, _, shape in narrow.rows()} == {k: tuple(v.shape) for k, v in state.items()}


def test_full_size_is_the_detector_of_table_1(tmp_path: Path, kept: dict[str, Any]) -> None:
    state = constants_of(MASK_RCNN)
    path = save({"state_dict": state}, tmp_path / "mask_rcnn_r50.pth")
    assert path.stat().st_size < 2**20
    convert(read_mmdet(path), tmp_path / "o.safetensors", categories=lvis_categories(tmp_path))
    assert_same(MASK_RCNN, state, kept["state"])
    with torch.device("meta"):
        wanted = build_detector(table1.seesaw(), 1203).state_dict()
    assert {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in kept["state"].items()}
    recipe = kept["recipe"]
    assert recipe.name == "mmdet/mask_rcnn_r50"
    expected = changed(table1.seesaw(), {"model.backbone.name": "resnet50"})  # its weights are in the file
    assert recipe.model == expected.model
    assert recipe.test == expected.test
    # mmdetection's published models have the compensation of the conference paper, which only training reads.
    assert recipe.classifier == SeesawRecipe(normalized=True, objectness=True, p=0.8, q=2.0)
    assert [(c.id, c.name, c.frequency) for c in kept["categories"][:2]] == [(1, "thing 1", "c"), (2, "thing 2", "f")]


@pytest.mark.parametrize(
    ("layout", "backbone"),
    [
        (replace(CASCADE, blocks=(3, 4, 23, 3)), "resnet101"),
        (replace(CASCADE, blocks=(3, 4, 23, 3), groups=32, base_width=4), "resnext101_32x4d"),
        (replace(CASCADE, blocks=(3, 4, 23, 3), groups=64, base_width=4), "resnext101_64x4d"),
        (replace(MASK_RCNN, groups=32, base_width=4), "resnext50_32x4d"),
        (replace(MASK_RCNN, blocks=(3, 8, 36, 3)), "resnet152"),
    ],
    ids=["cascade-r101", "cascade-x101-32x4d", "cascade-x101-64x4d", "x50-32x4d", "r152"],
)
def test_full_size_of_other_backbones(
    tmp_path: Path, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch, layout: Layout, backbone: str
) -> None:
    # Only names and shapes matter: a look at 100 million numbers that are all the same would take seconds.
    monkeypatch.setattr(conversion.torch, "isfinite", lambda tensor: torch.ones(1, dtype=torch.bool))
    state = constants_of(layout)
    path = save({"state_dict": state}, tmp_path / "m.pth")
    counts = [key for key in state if key.endswith("cum_samples")]
    convert(read_mmdet(path), tmp_path / "o.safetensors", categories=lvis_categories(tmp_path))
    assert len(counts) == (3 if layout.cascade else 1)
    assert_same(layout, state, kept["state"])
    recipe = kept["recipe"]
    assert (recipe.model.backbone.name, recipe.model.backbone.options) == (backbone, {})
    assert recipe.model.backbone.pretrained
    assert recipe.model.box_head.class_agnostic == layout.cascade
    with torch.device("meta"):
        detector = build_detector(recipe, 1203)
    if layout.groups > 1:
        assert detector.backbone.net.layer1[0].conv2.groups == layout.groups


def test_a_cascade_without_configuration_is_trained_as_published(tmp_path: Path) -> None:
    """Spec, sections 5, 6, 7 and 12; only training reads them."""
    model = converted({"state_dict": state_of(SMALL_CASCADE), **meta()}, tmp_path)[0].model
    assert [stage.model_dump(exclude={"tsd"}) for stage in model.stages] == [
        {"iou": 0.5, "stds": (0.1, 0.1, 0.2, 0.2), "weight": 1.0, "mask_weight": 1.0},
        {"iou": 0.6, "stds": (0.05, 0.05, 0.1, 0.1), "weight": 0.5, "mask_weight": 0.5},
        {"iou": 0.7, "stds": (0.033, 0.033, 0.067, 0.067), "weight": 0.25, "mask_weight": 0.25},
    ]
    assert (model.rpn.box_beta, model.rpn.inside_image, model.rpn.post_nms_train) == (1 / 9, True, 2000)
    assert (model.box_head.box_beta, model.box_head.low_quality, model.box_head.class_agnostic) == (1.0, False, True)


# ---------------------------------------------------------------------------------------------------------
# Layouts of the file


@pytest.mark.parametrize("layout", [SMALL, SMALL_CASCADE], ids=["mask-rcnn", "cascade"])
def test_every_tensor_of_a_small_model(tmp_path: Path, layout: Layout) -> None:
    state = state_of(layout)
    recipe, ours = converted({"state_dict": state, **meta(), "optimizer": {"state": {}}}, tmp_path)
    assert_same(layout, state, ours)
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, tmp_path)
    assert recipe.model.backbone.options == {"channels": [4, 8, 16, 32]}
    assert recipe.model.backbone.stem_channels == 8
    assert not recipe.model.backbone.pretrained


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "nested": lambda state: {"state_dict": state},
    "parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "nested parallel": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "meta": {}},
    "twice parallel": lambda state: {"state_dict": {f"module.module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_wrappings(tmp_path: Path, wrapping: str, zipped: bool) -> None:
    state = state_of(SMALL)
    foreign = read_mmdet(save(WRAPPINGS[wrapping](state), tmp_path / "m.pth", zipped=zipped))
    assert not foreign.unknown
    assert_same(SMALL, state, foreign.state)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        folder = tmp_path / str(kind)
        folder.mkdir()
        state = {k: v.to(kind) if v.is_floating_point() else v for k, v in state_of(SMALL).items()}
        counts = "roi_head.bbox_head.loss_cls.cum_samples"
        state[counts] = torch.arange(6, dtype=kind)
        _, ours = converted({"state_dict": state, **meta()}, folder)
        assert_same(SMALL, state, ours)
        weight = ours["stages.0.box_head.fc1.weight"]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, state["roi_head.bbox_head.shared_fcs.0.weight"].float())
        assert {v.dtype for v in ours.values()} == {torch.float32, torch.int64}


def test_tensors_that_share_memory_get_their_own(tmp_path: Path) -> None:
    state = state_of(SMALL)
    whole = torch.randn(2, 8)
    state["neck.fpn_convs.0.conv.bias"] = state["neck.fpn_convs.1.conv.bias"] = whole[0]
    state["neck.fpn_convs.2.conv.bias"] = whole[1]
    _, ours = converted({"state_dict": state, **meta()}, tmp_path)
    assert_same(SMALL, state, ours)


def test_counts_become_whole_numbers_without_background(tmp_path: Path) -> None:
    state = state_of(SMALL)
    state["roi_head.bbox_head.loss_cls.cum_samples"] = torch.tensor([0.0, 1.0, 2.4999, 16777216.0, 3.0001, 9.0])
    _, ours = converted({"state_dict": state, **meta()}, tmp_path)
    counts = ours["stages.0.box_head.classification.seesaw.counts"]
    assert counts.dtype == torch.int64
    assert counts.tolist() == [0, 1, 2, 16777216, 3]


@pytest.mark.parametrize("broken", [[1, 2, -1, 0, 0, 0], [1, 2, float("nan"), 0, 0, 0], [[1, 2, 3, 4, 5, 6]]])
def test_counts_that_cannot_be(tmp_path: Path, broken: Any) -> None:
    state = state_of(SMALL)
    state["roi_head.bbox_head.loss_cls.cum_samples"] = torch.tensor(broken)
    with pytest.raises(UserError, match=r"m\.pth: 'cum_samples' must be a count for every class"):
        read_mmdet(save({"state_dict": state}, tmp_path / "m.pth"))


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"logits": 2, "counts": True}, "seesaw"),
        ({"logits": 2, "counts": False}, "seesaw"),
        ({"logits": 1, "counts": False}, "cross-entropy"),
        ({"agnostic_boxes": True}, "seesaw"),
        ({"agnostic_masks": True}, "seesaw"),
        ({"agnostic_masks": True, "agnostic_boxes": True}, "seesaw"),
        ({"agnostic_masks": True, "agnostic_boxes": True, "counts": False, "logits": 1}, "cross-entropy"),
        ({"cascade": True, "logits": 1, "counts": False}, "cross-entropy"),
        ({"mask": 12, "hidden": 24, "neck": 12}, "seesaw"),
    ],
    ids=str,
)
def test_heads(tmp_path: Path, changes: dict[str, Any], loss: str) -> None:
    layout = small(**changes)
    state = state_of(layout)
    recipe, ours = converted({"state_dict": state, **meta()}, tmp_path)
    assert recipe.classifier.loss == loss
    assert recipe.classifier.normalized == (loss == "seesaw")
    assert recipe.model.box_head.class_agnostic == (layout.agnostic_boxes or layout.cascade)
    assert recipe.model.mask_head.class_agnostic == layout.agnostic_masks
    assert (recipe.model.neck.channels, recipe.model.box_head.width) == (layout.neck, layout.hidden)
    assert recipe.model.mask_head.channels == layout.mask
    if loss == "seesaw" and not layout.counts:  # nothing was counted
        assert ours.pop("stages.0.box_head.classification.seesaw.counts").tolist() == [0] * 5
    assert_same(layout, state, ours)


def test_a_single_mask_head_of_a_cascade_is_the_last_stage_s(tmp_path: Path) -> None:
    """As in HTC-Lite's report and in SCNet: its name has no number."""
    state = {k: v for k, v in state_of(SMALL_CASCADE).items() if ".mask_head.0." not in k and ".mask_head.1." not in k}
    state = {k.replace("mask_head.2.", "mask_head."): v for k, v in state.items()}
    recipe, ours = converted({"state_dict": state, **meta()}, tmp_path)
    assert [stage.mask_weight for stage in recipe.model.stages] == [0.0, 0.0, 0.25]
    own = ours["stages.2.mask_head.predictor.weight"]
    assert torch.equal(own, state["roi_head.mask_head.conv_logits.weight"])
    assert not any(key.startswith("stages.0.mask_head") for key in ours)


LATER: dict[str, tuple[Layout, dict[str, dict[str, Any]]]] = {
    "mask scoring": (small(mask_iou=True), {"mask_iou": {"weight": 0.5, "channels": 8, "width": 32}}),
    "norm in the neck": (small(neck_norm=True), {"neck": {"norm": True}}),
    "an RPN of three convolutions": (small(rpn_convs=3), {"rpn": {"convs": 3, "width": None}}),
    "an RPN of more channels than the neck": (small(rpn=12), {"rpn": {"convs": 1, "width": 12}}),
    "two convolutions of more channels": (small(rpn=12, rpn_convs=2), {"rpn": {"convs": 2, "width": 12}}),
    "mask scoring of one class": (
        small(mask_iou=True, classes=1, counts=False, logits=1),
        {"mask_iou": {"weight": 0.5}},
    ),
    "CARAFE": (small(carafe=True), {"mask_head": {"upsample": "carafe", "norm": False}}),
    "batch norm in the mask head": (small(mask_norm=True), {"mask_head": {"norm": True, "upsample": "deconv"}}),
    "batch norm and CARAFE": (small(mask_norm=True, carafe=True), {"mask_head": {"norm": True, "upsample": "carafe"}}),
    "4conv1fc": (small(box_convs=4, mask_norm=True), {"box_head": {"convs": 4, "width": 16}}),
    "cascade of 4conv1fc with CARAFE": (
        replace(SMALL_CASCADE, box_convs=4, carafe=True, mask_norm=True),
        {"box_head": {"convs": 4}, "mask_head": {"upsample": "carafe", "norm": True, "convs": 4}},
    ),
    "context": (
        replace(SMALL_CASCADE, context="plain", one_mask_head=True),
        {"context": {"weight": 3.0, "convs": 4, "norm": False, "residual": False}},
    ),
    "context with batch norm": (
        replace(SMALL_CASCADE, context="norm", one_mask_head=True, mask_norm=True, carafe=True),
        {"context": {"convs": 4, "norm": True, "residual": False}, "mask_head": {"norm": True}},
    ),
    "residual context": (
        replace(SMALL_CASCADE, context="residual", agnostic_masks=True),
        {"context": {"convs": 4, "norm": False, "residual": True}},
    ),
    "residual context with batch norm": (
        replace(SMALL_CASCADE, context="residual norm"),
        {"context": {"convs": 4, "norm": True, "residual": True}},
    ),
}


@pytest.mark.parametrize("what", LATER)
def test_every_tensor_of_later_parts(tmp_path: Path, what: str) -> None:
    layout, sections = LATER[what]
    state = state_of(layout)
    names = {"dataset_meta": {"classes": NAMES[: layout.classes]}}
    recipe, ours = converted({"state_dict": state, "meta": names}, tmp_path)
    if not layout.counts:
        assert not any(key.endswith("counts") for key in ours)
    assert_same(layout, state, ours)
    load_weights(build_detector(recipe, layout.classes), ours, tmp_path)
    model = recipe.model.model_dump()
    for section, values in sections.items():
        assert {key: model[section][key] for key in values} == values
    for part in ("mask_iou", "context"):
        assert (model[part]["weight"] > 0) == (part in sections)


PARTS = {
    "mask scoring": (small(mask_iou=True, carafe=True), ("model.mask_iou={weight: 0.5, channels: 8, width: 32}",)),
    "4conv1fc": (small(box_convs=4, mask_norm=True), ("model.box_head.convs=4",)),
    "context": (
        replace(SMALL_CASCADE, context="residual norm", carafe=True, mask_norm=True, one_mask_head=True),
        (
            "model.box_head.class_agnostic=true",
            "model.stages=[{mask_weight: 0}, {mask_weight: 0}, {}]",
            "model.context={weight: 3.0, residual: true, norm: true}",
        ),
    ),
}


@pytest.mark.parametrize("what", PARTS)
def test_a_model_of_ours_goes_there_and_back(tmp_path: Path, what: str) -> None:
    """Its weights under their names and back again: the same to the bit, and so is the architecture."""
    layout, settings = PARTS[what]
    narrow = (
        "model.backbone={name: resnet50, stem_channels: 8, options: {channels: [4, 8, 16, 32]}, pretrained: false}",
        "model.neck.channels=8",
        "model.box_head.width=16",
        "model.mask_head.channels=8",
        *(["model.mask_head.norm=true"] if layout.mask_norm else []),
        *(["model.mask_head.upsample=carafe"] if layout.carafe else []),
        *settings,
    )
    recipe = resolve("table1/seesaw", narrow)
    torch.manual_seed(0)
    own = build_detector(recipe, 5).state_dict()
    theirs = {theirs: own[ours] for theirs, ours, _ in layout.rows()}
    assert len(theirs) == len(own)
    counts = {key: torch.cat([value.float(), torch.zeros(1)]) for key, value in theirs.items() if "cum_samples" in key}
    found, ours = converted({"state_dict": theirs | counts, **meta()}, tmp_path)
    assert ours.keys() == own.keys()
    assert all(torch.equal(ours[key], value) for key, value in own.items())
    for section in ("backbone", "neck", "box_head", "mask_head", "mask_iou", "context"):
        wanted, got = getattr(recipe.model, section), getattr(found.model, section)
        training = {"low_quality", "box_beta"}  # a cascade's own
        assert got.model_dump(exclude=training) == wanted.model_dump(exclude=training)


@pytest.mark.parametrize("residual", [False, True])
def test_a_configuration_adds_to_what_tensors_show(tmp_path: Path, residual: bool) -> None:
    layout = replace(SMALL_CASCADE, context="residual" if residual else "plain", one_mask_head=True)
    roi_head = "type='SCNetRoIHead', stage_loss_weights=[1, 0.5, 0.25], glbctx_head=dict(loss_weight=2.0)"
    text = f"model = dict(backbone=dict(norm_eval=False), roi_head=dict({roi_head}))"
    recipe, _ = converted({"state_dict": state_of(layout), **meta(cfg=text)}, tmp_path)
    context = recipe.model.context
    assert (context.weight, context.convs, context.residual) == (2.0, 4, residual)
    assert [stage.mask_weight for stage in recipe.model.stages] == [0, 0, 1.75]
    assert recipe.model.backbone.train_norm


def test_a_configuration_of_mask_scoring(tmp_path: Path) -> None:
    text = "model = dict(roi_head=dict(mask_iou_head=dict(loss_iou=dict(type='MSELoss', loss_weight=0.4))))"
    recipe, _ = converted({"state_dict": state_of(small(mask_iou=True)), **meta(cfg=text)}, tmp_path)
    assert recipe.model.mask_iou.model_dump() == {"weight": 0.4, "channels": 8, "width": 32}


@pytest.mark.parametrize(
    ("layout", "theirs", "shape", "named"),
    [
        (small(carafe=True), "roi_head.mask_head.upsample.content_encoder.weight", (36, 64, 3, 3), "upsample.encoder"),
        (small(carafe=True), "roi_head.mask_head.upsample.content_encoder.weight", (100, 64, 5, 5), "upsample.encoder"),
        (small(carafe=True), "roi_head.mask_head.upsample.channel_compressor.bias", (32,), "upsample.compressor"),
        (small(mask_iou=True), "roi_head.mask_iou_head.fcs.0.weight", (32, 8 * 196), "mask_iou.fc1"),
        (small(box_convs=4), "roi_head.bbox_head.shared_convs.0.conv.weight", (12, 8, 3, 3), "box_head.convs.0"),
    ],
)
def test_other_sizes_of_later_parts(tmp_path: Path, layout: Layout, theirs: str, shape: Any, named: str) -> None:
    state = state_of(layout)
    assert theirs in state
    with pytest.raises(UserError, match=rf"model\.pth: '[\w.]*{named}\.\w+' has shape {re.escape(str(shape))}, but "):
        converted({"state_dict": state | {theirs: torch.zeros(shape)}, **meta()}, tmp_path)


def test_a_mask_iou_head_of_other_classes(tmp_path: Path) -> None:
    state = state_of(small(mask_iou=True))
    state["roi_head.mask_iou_head.fc_mask_iou.weight"] = torch.zeros(7, 32)
    with pytest.raises(
        UserError, match=r"the number of classes is not clear \(.*, 7 by 'mask_iou\.predictor\.weight',"
    ):
        converted({"state_dict": state, **meta()}, tmp_path)


def recorded_part(recorded: Any, file: str, name: str, prefix: str) -> tuple[Any, State, State, State]:
    """A recorded case, its state under the names of a whole checkpoint."""
    case, inputs, state, outputs = next(c for c in recorded(file) if c[0]["name"] == name)
    return case, inputs, {f"roi_head.{prefix}.{key}": value for key, value in state.items()}, outputs


def detector_of(layout: Layout, part: State, folder: Path) -> Any:
    """The converted detector of a checkpoint with some tensors of a recording, all of which it must have had."""
    state = state_of(layout)
    assert {key: value.shape for key, value in part.items()} == {key: state[key].shape for key in part}
    names = {"dataset_meta": {"classes": [f"thing {i}" for i in range(layout.classes)]}}
    recipe, ours = converted({"state_dict": state | part, "meta": names}, folder)
    detector = build_detector(recipe, layout.classes)
    load_weights(detector, ours, folder)
    return detector.eval()


def test_recorded_mask_iou_head(recorded: Any, check: Any, tmp_path: Path) -> None:
    case, inputs, part, outputs = recorded_part(recorded, "head_mask_scoring", "forward", "mask_iou_head")
    detector = detector_of(small(mask_iou=True, classes=37), part, tmp_path)
    masks = inputs["mask_logits"].sigmoid()
    with torch.no_grad():
        iou = [detector.mask_iou(inputs["features"], masks, torch.full((len(masks),), label)) for label in range(37)]
    check(case, "iou", torch.stack(iou, dim=1), outputs["iou"])


def test_recorded_mask_head_with_carafe(recorded: Any, check: Any, tmp_path: Path) -> None:
    case, inputs, part, outputs = recorded_part(recorded, "carafe", "mask_head", "mask_head")
    head = detector_of(small(carafe=True, classes=11), part, tmp_path).stages[0].mask_head
    features = inputs["features"].float()
    with torch.no_grad():
        logits = [head(features, torch.full((len(features),), label)) for label in range(11)]
    check(case, "out0", torch.stack(logits, dim=1), outputs["out0"])


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_recorded_context_head(recorded: Any, check: Any, tmp_path: Path, kind: str) -> None:
    case, inputs, part, outputs = recorded_part(recorded, "head_global_context", kind, "glbctx_head")
    detector = detector_of(replace(SMALL_CASCADE, context=kind, neck=16, classes=37), part, tmp_path)
    feature = inputs["feature"]
    with torch.no_grad():
        logits, context = detector.context(feature, torch.tensor([feature.shape[2:]] * len(feature)) * 64)
    check(case, "logits", logits, outputs["logits"])
    check(case, "context", context[:, :, None, None], outputs["context"])


@pytest.mark.parametrize("rows", [27, 18])
def test_deformable_convolutions_are_told_by_their_tensors(tmp_path: Path, rows: int) -> None:
    """DCNv1's get nine rows more, under which every tap counts 1."""
    layout = small(deformable=rows)
    state = state_of(layout)
    recipe, ours = converted({"state_dict": state, **meta()}, tmp_path)
    assert recipe.model.backbone.deformable_stages == (2, 3, 4)
    for theirs in [key for key in state if ".conv_offset." in key and rows == 18]:
        weight = theirs.endswith("weight")
        rest = torch.zeros(9, *state[theirs].shape[1:]) if weight else torch.full((9,), 30.0)
        state[theirs] = torch.cat([state[theirs], rest])
    assert_same(layout, state, ours)


def test_old_names_of_deformable_convolutions(tmp_path: Path) -> None:
    layout = small(deformable=27)
    state = state_of(layout)
    old = {key.replace(".conv2.conv_offset.", ".conv2_offset."): value for key, value in state.items()}
    assert old.keys() != state.keys()
    assert_same(layout, state, converted({"state_dict": old, **meta()}, tmp_path)[1])


def test_recorded_backbone_with_deformable_convolutions(recorded: Any, check: Any, tmp_path: Path) -> None:
    ((case, inputs, state, outputs),) = recorded("backbone_resnet_dcn")
    part = {f"backbone.{key}": value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    backbone = detector_of(small(deformable=27, base=8), part, tmp_path).backbone
    with torch.no_grad():
        features = backbone(inputs["image"])
    for i, feature in enumerate(features):
        check(case, f"out{i}", feature, outputs[f"out{i}"])


def test_first_generation_deformable_convolutions_give_the_same_features(tmp_path: Path) -> None:
    """Against torchvision's operator without modulation, in each of the 13 places; also with gradients."""
    state = state_of(small(deformable=18))
    for key in state:
        if ".conv_offset." in key:
            state[key] *= 0.1 if key.endswith("weight") else 0.5  # shifts of about a cell
        elif key.startswith("backbone") and state[key].dim() == 4:
            state[key] /= state[key][0].numel() ** 0.5
        elif "running_var" in key:
            state[key] = state[key].abs() + 1
    recipe, ours = converted({"state_dict": state, **meta()}, tmp_path)
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, tmp_path)
    layers = [m for m in detector.modules() if isinstance(m, ModulatedDeformConv2d)]
    assert len(layers) == 4 + 6 + 3
    plain = build_detector(recipe, 5).backbone
    load_weights(plain, {k.removeprefix("backbone."): v for k, v in ours.items() if k[:8] == "backbone"}, tmp_path)
    replaced = 0
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, ModulatedDeformConv2d):
            theirs = name.replace("net.", "backbone.")
            steered = [state[f"{theirs}.{part}"].double() for part in ("weight", *(f"conv_offset.{p}" for p in WB))]
            parent, _, child = name.rpartition(".")
            first = FirstGeneration(*steered, layer.stride)
            setattr(plain.get_submodule(parent), child, first)
            replaced += 1
    assert replaced == 13
    image = torch.randn(1, 3, 96, 128)
    backbone = detector.backbone.eval()
    backbone(image)[3].square().sum().backward()
    for own, expected in zip(backbone.double()(image.double()), plain.eval().double()(image.double()), strict=True):
        assert (own - expected).abs().max() <= 1e-9 * expected.abs().max()
    for layer in layers:
        assert layer.conv_offset.bias.grad[:18].any()
        assert not layer.conv_offset.weight.grad[18:].any()  # so training leaves it unmodulated
        assert not layer.conv_offset.bias.grad[18:].any()


WB = ("weight", "bias")


class FirstGeneration(nn.Module):
    """DCNv1 by torchvision's operator."""

    def __init__(self, weight: Tensor, offset_weight: Tensor, offset_bias: Tensor, stride: tuple[int, int]) -> None:
        super().__init__()
        self.weight, self.offset, self.stride = weight, (offset_weight, offset_bias), stride

    def forward(self, x: Tensor) -> Tensor:
        shifts = F.conv2d(x, *self.offset, stride=self.stride, padding=1)
        return deform_conv2d(x, shifts, self.weight, stride=self.stride, padding=1)


@pytest.mark.parametrize("rows", [3, 36, 54, 108])
def test_deformable_convolutions_in_groups(tmp_path: Path, rows: int) -> None:
    state = state_of(small(deformable=rows))
    with pytest.raises(UserError) as caught:
        converted({"state_dict": state, **meta()}, tmp_path)
    named = "'backbone.layer2.0.conv2.conv_offset.weight'"
    assert str(caught.value).startswith(f"{tmp_path / 'model.pth'}: {named} has {rows} rows; deformable")


def test_deformable_convolutions_in_some_blocks_of_a_stage(tmp_path: Path) -> None:
    """As with ``fallback_on_stride=True``."""
    state = {k: v for k, v in state_of(small(deformable=27)).items() if "layer3.0.conv2.conv_offset" not in k}
    with pytest.raises(UserError, match=r"model\.pth: 5 of the 6 bottlenecks of stage 3 have deformable convolutions"):
        converted({"state_dict": state, **meta()}, tmp_path)


def test_mean_and_deviation_among_the_tensors_are_let_be(tmp_path: Path) -> None:
    state = state_of(SMALL) | {"data_preprocessor.mean": torch.ones(3, 1, 1), "data_preprocessor.std": torch.ones(3)}
    recipe, _ = converted({"state_dict": state, **meta()}, tmp_path)
    assert recipe.model.pixel_mean == (123.675, 116.28, 103.53)


# ---------------------------------------------------------------------------------------------------------
# What stands in meta


@pytest.mark.parametrize(
    "about",
    [
        {"mmdet_version": "2.28.2", "CLASSES": NAMES, "config": "model = dict(type='MaskRCNN')\n"},
        {"mmdet_version": "2.3.0", "CLASSES": list(NAMES)},
        {"cfg": "model = dict(type='MaskRCNN')\n", "dataset_meta": {"classes": NAMES, "palette": None}},
        {"dataset_meta": {"CLASSES": NAMES}},  # early 3.0
    ],
)
def test_class_names(tmp_path: Path, about: dict[str, Any]) -> None:
    path = save({"state_dict": state_of(SMALL), "meta": about}, tmp_path / "m.pth")
    _, labels = convert(read_mmdet(path), tmp_path / "o.safetensors")
    assert [label.name for label in labels] == list(NAMES)
    assert [label.id for label in labels] == [17, 18, 13, 46, 47]  # all of them are names of COCO


def test_names_that_are_not_all_of_coco_are_numbered(tmp_path: Path) -> None:
    names = ("cat", "dog", "stop sign", "wine glass", "aardvark")
    path = save({"state_dict": state_of(SMALL), "meta": {"CLASSES": names}}, tmp_path / "m.pth")
    _, labels = convert(read_mmdet(path), tmp_path / "o.safetensors")
    assert [(label.id, label.name) for label in labels] == list(enumerate(names, start=1))


def test_the_list_of_names_must_have_the_model_s_length(tmp_path: Path) -> None:
    path = save({"state_dict": state_of(SMALL), "meta": {"CLASSES": NAMES[:4]}}, tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"^.*m\.pth: the number of classes is not clear \(4 by .*, 5 by "):
        convert(read_mmdet(path), tmp_path / "o.safetensors")


@pytest.mark.parametrize("version", ["1.0rc1", "1.2.0"])
def test_version_1_is_refused(tmp_path: Path, version: str) -> None:
    path = save({"state_dict": state_of(SMALL), **meta(mmdet_version=version)}, tmp_path / "m.pth")
    with pytest.raises(UserError, match=rf"^.*m\.pth: was written by mmdetection {re.escape(version)}, .*background"):
        read_mmdet(path)


def test_what_is_assumed_without_a_configuration_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    converted({"state_dict": state_of(SMALL), **meta()}, tmp_path)
    assert str(tmp_path / "model.pth") in caplog.text
    assert caplog.text.count("carries no configuration") == 1
    assert "--set" in caplog.text


def test_the_recordings_carry_their_configuration(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(read_mmdet(shared / "reference" / "model_cascade.pth"), tmp_path / "o.safetensors")
    assert not caplog.text


# ---------------------------------------------------------------------------------------------------------
# The normalised mask predictor, which has no tensor of its own

NORMED = "model = dict(roi_head=dict(mask_head=dict(predictor_cfg=dict(type='NormedConv2d', tempearture=20))))"
PLAIN = "model = dict(roi_head=dict(mask_head=dict(type='FCNMaskHead', predictor_cfg=dict(type='Conv'))))"


@pytest.mark.parametrize(
    ("name", "text", "settings", "expected"),
    [
        ("mask_rcnn_r50_seesaw_loss_normed_mask-a1b2.pth", None, (), True),
        ("mask-rcnn_r50_seesaw-loss_normed-mask_ms-2x_lvis-v1.pth", None, (), True),
        ("mask-rcnn_r50_seesaw-loss_ms-2x_lvis-v1.pth", None, (), False),
        ("m.pth", None, ("model.mask_head.normalized=true",), True),
        ("normed-mask.pth", None, ("model.mask_head.normalized=false",), False),
        ("m.pth", NORMED, (), True),
        ("normed-mask.pth", PLAIN, (), False),  # the configuration knows better than the name
    ],
)
def test_normalised_mask_predictor(
    tmp_path: Path, name: str, text: str | None, settings: tuple[str, ...], expected: bool
) -> None:
    about = meta() if text is None else meta(cfg=text)
    recipe, _ = converted({"state_dict": state_of(SMALL), **about}, tmp_path, *settings, name=name)
    assert recipe.model.mask_head.normalized is expected
    assert recipe.model.mask_head.temperature == 20


@pytest.mark.parametrize("normed", [False, True])
def test_normed_masks_of_a_cascade_by_name(tmp_path: Path, normed: bool) -> None:
    """The name adds to what a cascade has."""
    name = "cascade_normed-mask.pth" if normed else "cascade.pth"
    recipe, _ = converted({"state_dict": state_of(SMALL_CASCADE), **meta()}, tmp_path, name=name)
    assert recipe.model.mask_head.normalized is normed
    assert [stage.iou for stage in recipe.model.stages] == [0.5, 0.6, 0.7]


def test_the_normalised_predictor_compares_directions(tmp_path: Path) -> None:
    """20 cos of a cell and its row, stated in float64."""
    recipe, ours = converted({"state_dict": state_of(SMALL), **meta()}, tmp_path, name="normed-mask.pth")
    head = build_detector(recipe, 5).stages[0].mask_head
    head.load_state_dict({k.removeprefix("stages.0.mask_head."): v for k, v in ours.items() if ".mask_head." in k})
    seen = []
    head.upsample.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        logits = head(torch.randn(1, 8, 14, 14), torch.tensor([3]))
    cell = seen[0].relu()[0, :, 5, 7].double()
    row, bias = (head.predictor.weight[3].flatten().double(), head.predictor.bias[3].double())
    expected = 20 * (cell @ row) / (cell.norm() * row.norm()) + bias
    assert abs(logits[0, 5, 7] - expected) < 1e-4


# ---------------------------------------------------------------------------------------------------------
# Refusals


LEFT_OVER = {
    "HTC's semantic branch, on no cascade": (SMALL, "roi_head.semantic_head.convs.0.conv.weight", (8, 8, 3, 3)),
    "a mask IoU head": (SMALL, "roi_head.mask_iou_head.convs.0.conv.weight", (8, 9, 3, 3)),
    "a mask IoU head of another form": (SMALL_CASCADE, "roi_head.mask_iou_head.fc_mask_iou.weight", (5, 16)),
    "deformable convolutions outside": (SMALL, "backbone.layer2.0.conv3.conv_offset.weight", (27, 8, 1, 1)),
    "a global context of another form": (SMALL, "roi_head.glbctx_head.fc.weight", (5, 8)),
    "SCNet's feature relay, on no cascade": (SMALL, "roi_head.feat_relay_head.fc.weight", (8, 8)),
    "norm in HTC's semantic branch": (SMALL_CASCADE, "roi_head.semantic_head.convs.0.bn.weight", (8,)),
    "HTC's flow of masks": (SMALL_CASCADE, "roi_head.mask_head.0.conv_res.bn.weight", (8,)),
    "group norm in some layers only": (SMALL, "roi_head.bbox_head.fc_cls.gn.weight", (8,)),
    "CARAFE in the neck": (SMALL, "neck.upsample_modules.0.upsample.content_encoder.weight", (100, 64, 3, 3)),
    "further levels of the pyramid": (SMALL, "neck.fpn_convs.4.conv.weight", (8, 8, 3, 3)),
    "another box head": (SMALL, "roi_head.bbox_head.shared_fcs.2.weight", (16, 16)),
}


@pytest.mark.parametrize("what", LEFT_OVER)
def test_left_over_tensors_are_named(tmp_path: Path, what: str) -> None:
    layout, key, shape = LEFT_OVER[what]
    state = state_of(layout) | {key: torch.zeros(shape)}
    with pytest.raises(UserError) as caught:
        converted({"state_dict": state, **meta()}, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model.pth'}: tensors are left over: ")
    assert f"left over: '{key}' of {what}" in message
    assert "missing" not in message
    assert "\n" not in message


def test_many_left_over_tensors_are_counted(tmp_path: Path) -> None:
    state = state_of(SMALL) | {f"roi_head.semantic_head.convs.{i}.weight": torch.zeros(1) for i in range(50)}
    with pytest.raises(UserError, match=r"semantic_head\.convs\.7\.weight' and 42 more of HTC's semantic branch, on"):
        converted({"state_dict": state, **meta()}, tmp_path)
    assert not (tmp_path / "converted.safetensors").exists()


@pytest.mark.parametrize(
    ("layout", "theirs", "named"),
    [
        (SMALL, "backbone.layer3.5.bn2.running_var", "backbone.net.layer3.5.bn2.running_var"),
        (SMALL, "neck.fpn_convs.3.conv.bias", "neck.output_convs.3.bias"),
        (SMALL, "rpn_head.rpn_reg.weight", "rpn.deltas.weight"),
        (SMALL, "roi_head.mask_head.upsample.bias", "stages.0.mask_head.upsample.bias"),
        (SMALL, "roi_head.bbox_head.fc_cls.weight", "stages.0.box_head.classifier.weight"),
        (SMALL, "roi_head.bbox_head.fc_reg.weight", "stages.0.box_head.regressor.weight"),
        (SMALL, "neck.lateral_convs.0.conv.weight", "neck.lateral_convs.0.weight"),
        (SMALL, "backbone.conv1.weight", "backbone.net.conv1.weight"),
        (SMALL_CASCADE, "roi_head.bbox_head.1.fc_cls.bias", "stages.1.box_head.classifier.bias"),
        (SMALL_CASCADE, "roi_head.mask_head.1.convs.2.conv.weight", "stages.1.mask_head.convs.2.weight"),
    ],
)
def test_missing_tensors_are_named(tmp_path: Path, layout: Layout, theirs: str, named: str) -> None:
    state = state_of(layout)
    del state[theirs]
    with pytest.raises(UserError) as caught:
        converted({"state_dict": state, **meta()}, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'model.pth'}: ")
    assert f"'{named}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layout",
    [
        SMALL_CASCADE,
        small(mask_iou=True, box_convs=2, carafe=True),
        replace(SMALL_CASCADE, context="residual", one_mask_head=True, mask_norm=True),
    ],
    ids=["cascade", "mask scoring", "context"],
)
def test_without_any_one_tensor_a_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    """In one sentence; but for what a frozen network or an uncounted loss never had."""
    monkeypatch.setattr(conversion, "save_model", lambda *_, **__: None)
    foreign = read_mmdet(save({"state_dict": state_of(layout), **meta()}, tmp_path / "m.pth"))
    blocks = [
        f"backbone.net.layer{i}.0.{part}" for i in (1, 4) for part in ("conv1.weight", "conv2.weight", "conv3.weight")
    ]
    keys = [*blocks, *(key for key in foreign.state if not key.startswith("backbone.net.layer"))]
    if layout != SMALL_CASCADE:  # all others are the same
        later = ("mask_iou.", "context.", ".upsample.", ".convs.0.", ".norms.0.")
        keys = [key for key in keys if any(part in key for part in later)]
    for key in keys:
        partial = replace(foreign, state={k: v for k, v in foreign.state.items() if k != key})
        if key.endswith(("num_batches_tracked", "seesaw.counts")):
            convert(partial, tmp_path / "o.safetensors")
            continue
        with pytest.raises(UserError) as caught:
            convert(partial, tmp_path / "o.safetensors")
        assert str(caught.value).startswith(f"{tmp_path / 'm.pth'}: "), key
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_cascade_without_one_of_its_box_heads(tmp_path: Path, stage: int) -> None:
    state = {k: v for k, v in state_of(SMALL_CASCADE).items() if f"bbox_head.{stage}." not in k}
    with pytest.raises(UserError, match=r"^.*model\.pth: ") as caught:
        converted({"state_dict": state, **meta()}, tmp_path)
    assert "\n" not in str(caught.value)


def test_another_kind_of_detector(tmp_path: Path) -> None:
    state = {k: v for k, v in state_of(SMALL).items() if not k.startswith("roi_head")}
    state |= {f"bbox_head.{name}.weight": torch.zeros(4) for name in ("retina_cls", "retina_reg")}
    with pytest.raises(UserError, match=r"no box head was found.*not understood: 'bbox_head\.retina_cls\.weight'"):
        converted({"state_dict": state, **meta()}, tmp_path)
    state = {k: v for k, v in state_of(SMALL).items() if "mask_head" not in k}
    with pytest.raises(UserError, match="no mask head was found"):
        converted({"state_dict": state, **meta()}, tmp_path)


def test_shapes_that_disagree(tmp_path: Path) -> None:
    for theirs, shape, named in (
        ("roi_head.bbox_head.shared_fcs.1.weight", (16, 17), "stages.0.box_head.fc2.weight"),
        ("neck.fpn_convs.1.conv.weight", (8, 8, 1, 1), "neck.output_convs.1.weight"),
        ("backbone.layer2.1.bn2.running_mean", (9,), "backbone.net.layer2.1.bn2.running_mean"),
        ("rpn_head.rpn_cls.weight", (9, 8, 1, 1), "rpn.objectness.weight"),
    ):
        state = state_of(SMALL) | {theirs: torch.zeros(shape)}
        with pytest.raises(UserError) as caught:
            converted({"state_dict": state, **meta()}, tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'model.pth'}: '{named}' has shape {shape}, but (")


@pytest.mark.parametrize(
    ("theirs", "value", "named"),
    [
        ("neck.lateral_convs.2.conv.bias", float("nan"), "neck.lateral_convs.2.bias"),
        ("roi_head.bbox_head.fc_reg.weight", float("inf"), "stages.0.box_head.regressor.weight"),
        ("backbone.layer1.0.bn1.running_var", float("-inf"), "backbone.net.layer1.0.bn1.running_var"),
    ],
)
def test_weights_that_are_no_numbers(tmp_path: Path, theirs: str, value: float, named: str) -> None:
    state = state_of(SMALL)
    state[theirs].view(-1)[-1] = value
    with pytest.raises(UserError, match=rf"model\.pth: '{re.escape(named)}' holds values that are not finite"):
        converted({"state_dict": state, **meta()}, tmp_path)


def test_a_softmax_of_no_known_width(tmp_path: Path) -> None:
    for logits in (-1, 3, 7):
        state = state_of(small(logits=logits))
        with pytest.raises(UserError, match=rf"model\.pth: its classifier has {5 + logits} logits for 5 classes"):
            converted({"state_dict": state, **meta()}, tmp_path)


def test_no_classes_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.pth: does not name its classes; name them with --categories"):
        converted({"state_dict": state_of(SMALL)}, tmp_path)
    layout = small(agnostic_masks=True, agnostic_boxes=True, counts=False, logits=1)
    with pytest.raises(UserError, match=r"model\.pth: its tensors do not say how many classes.*--categories"):
        converted({"state_dict": state_of(layout)}, tmp_path)


@pytest.mark.parametrize("content", [{}, [], {"state_dict": {}}, {"state_dict": {"a": 1}}, {"meta": {}}, None, 3])
def test_a_file_without_tensors(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"m\.pth: holds no tensors by name"):
        read_mmdet(save(content, tmp_path / "m.pth"))


@pytest.mark.parametrize("about", [None, 3, "text", [1], {"cfg": 3, "CLASSES": 5, "dataset_meta": "x"}])
def test_odd_meta_is_as_good_as_none(tmp_path: Path, about: Any) -> None:
    foreign = read_mmdet(save({"state_dict": state_of(SMALL), "meta": about}, tmp_path / "m.pth"))
    assert foreign.names is None
    assert len(foreign.remarks) == 1


CONFIGURED = {
    "box loss": ("bbox_head=dict(loss_bbox=dict(type='MyLoss'))", "roi_head.bbox_head.loss_bbox.type = 'MyLoss'"),
    "sigmoid": (
        "bbox_head=dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True))",
        "loss_cls.use_sigmoid = True",
    ),
    "focal": ("bbox_head=dict(loss_cls=dict(type='FocalLoss'))", "loss_cls.type = 'FocalLoss'"),
    "generic extractor": ("bbox_roi_extractor=dict(type='GenericRoIExtractor')", "bbox_roi_extractor.type"),
}


@pytest.mark.parametrize("what", CONFIGURED)
def test_a_configuration_that_we_have_not(tmp_path: Path, what: str) -> None:
    part, named = CONFIGURED[what]
    path = save({"state_dict": state_of(SMALL), **meta(cfg=f"model = dict(roi_head=dict({part}))")}, tmp_path / "m.pth")
    with pytest.raises(UserError) as caught:
        convert(read_mmdet(path), tmp_path / "o.safetensors")
    message = str(caught.value)
    assert message.startswith(f"{path}: its configuration has model.")
    assert named in message
    assert "tailseg has not" in message
