"""What all converters share: the file that is written, the categories, the strict check, what shapes say."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from tailseg.checkpoint import load_model, load_weights
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.recipes.classifiers import CrossEntropyRecipe, SeesawRecipe
from tailseg.recipes.model_section import (
    BackboneRecipe,
    BoxHeadRecipe,
    MaskHeadRecipe,
    ModelRecipe,
    NeckRecipe,
    StageRecipe,
)
from tailseg.recipes.schema import Recipe
from tailseg.zoo import conversion
from tailseg.zoo.architecture import infer_model
from tailseg.zoo.backbones import infer_resnet
from tailseg.zoo.conversion import ForeignModel, change, coco_ids, convert, rename, state_dict_of
from tailseg.zoo.start import READERS

State = dict[str, Tensor]
CLASSES = 4


def recipe_of(backbone: BackboneRecipe | None = None, classifier: Any = None, **model: Any) -> Recipe:
    """A narrow Mask R-CNN; sections are replaced by name."""
    narrow = BackboneRecipe(name="resnet18", pretrained=False, options={"channels": [8, 8, 16, 16]})
    sections: dict[str, Any] = {
        "backbone": backbone or narrow,
        "neck": NeckRecipe(channels=8),
        "box_head": BoxHeadRecipe(width=16),
        "mask_head": MaskHeadRecipe(channels=8, convs=2),
    }
    return Recipe(
        name="x", model=ModelRecipe(**{**sections, **model}), classifier=classifier or SeesawRecipe(normalized=True)
    )


def state_of(recipe: Recipe, classes: int = CLASSES) -> State:
    torch.manual_seed(0)
    return build_detector(recipe, classes).state_dict()


@pytest.fixture(scope="module")
def state() -> State:
    return state_of(recipe_of())


def foreign_of(state: State, **more: Any) -> ForeignModel:
    more.setdefault("names", ["ant", "bee", "cow", "dog"])
    more.setdefault("path", Path("theirs/model.pth"))
    return ForeignModel(project="theirs", state=dict(state), **more)


def annotations(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps({"categories": rows}))
    return path


# ---------------------------------------------------------------------------------------------------------
# OUT


def test_the_file_is_an_ordinary_model(state: State, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folders" / "model.safetensors"
    recipe, labels = convert(foreign_of(state), out)
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]
    model = load_model(out)
    assert (model.recipe, model.categories, model.step, model.metrics) == (recipe, labels, 0, None)
    assert [(c.id, c.name, c.frequency, c.image_count, c.instance_count) for c in labels] == [
        (1, "ant", "f", 0, 0), (2, "bee", "f", 0, 0), (3, "cow", "f", 0, 0), (4, "dog", "f", 0, 0),
    ]  # fmt: skip
    assert model.state.keys() == state.keys()
    assert all(torch.equal(model.state[key], state[key]) for key in state)
    load_weights(build_detector(recipe, CLASSES), model.state, out)
    assert recipe.name == "theirs/model"


@pytest.mark.parametrize("name", ["model.pth", "model", "model.safetensors.bak", ".safetensors"])
def test_out_without_its_ending(state: State, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"a model file ends in \.safetensors") as caught:
        convert(foreign_of(state), tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert not list(tmp_path.iterdir())


def test_out_that_exists_stays_as_it_is(state: State, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="already exists") as caught:
        convert(foreign_of(state), out)
    assert str(caught.value).startswith(f"{out}: ")
    assert out.read_bytes() == b"mine"


def test_out_in_a_folder_that_cannot_be(state: State, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nothing")):
        with pytest.raises(UserError, match="the folder cannot be made") as caught:
            convert(foreign_of(state), folder / "m.safetensors")
        assert str(caught.value).startswith(f"{folder}: ")


def test_a_refused_model_leaves_nothing_behind(state: State, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        convert(foreign_of(state, unknown=["x.y"]), tmp_path / "folder" / "m.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------
# Settings and values


def test_a_setting_goes_over_the_source_and_the_source_over_our_defaults(state: State, tmp_path: Path) -> None:
    values = {"test": {"score_threshold": 0.05, "nms_iou": 0.6}, "data": {"short_edges": [500]}}
    settings = ("test.nms_iou=0.7", "model.stages.0.iou=0.4")
    recipe, _ = convert(foreign_of(state, values=values), tmp_path / "m.safetensors", settings=settings)
    assert (recipe.test.score_threshold, recipe.test.nms_iou, recipe.test.max_detections) == (0.05, 0.7, 300)
    assert recipe.data.short_edges == (500,)
    assert recipe.model.stages[0].iou == 0.4


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("model.neck.channel=3", "model.neck.channels"),
        ("test.nms_iou", "KEY=VALUE"),
        ("test.nms_iou=7", "test.nms_iou"),
        ("model.stages.3.iou=0.5", "places 0 to 0"),
    ],
)
def test_faulty_settings(state: State, tmp_path: Path, setting: str, named: str) -> None:
    with pytest.raises(UserError, match=f"--set {setting}") as caught:
        convert(foreign_of(state), tmp_path / "m.safetensors", settings=[setting])
    assert named in str(caught.value)


def test_a_setting_that_asks_for_another_architecture(state: State, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"theirs/model\.pth: .*'neck\.lateral_convs\.0\.weight' has shape"):
        convert(foreign_of(state), tmp_path / "m.safetensors", settings=["model.neck.channels=16"])


def test_values_that_no_recipe_has(state: State, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^theirs/model\.pth: test\.nms_iou: ") as caught:
        convert(foreign_of(state, values={"test": {"nms_iou": "much"}}), tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classifier", "loss"), [(SeesawRecipe(normalized=True), "seesaw"), (CrossEntropyRecipe(), "cross-entropy")]
)
def test_the_classifier_s_values_are_those_of_its_loss(classifier: Any, loss: str, tmp_path: Path) -> None:
    known = {"seesaw": {"normalized": True, "q": 2.0}, "cross-entropy": {"temperature": 7.0}}
    state = state_of(recipe_of(classifier=classifier))
    recipe, _ = convert(foreign_of(state, classifiers=known), tmp_path / "m.safetensors")
    assert recipe.classifier.loss == loss
    assert {key: getattr(recipe.classifier, key) for key in known[loss]} == known[loss]


# ---------------------------------------------------------------------------------------------------------
# Categories

ROWS = [
    {"id": 9, "name": "Dog", "frequency": "r", "image_count": 1, "instance_count": 2},
    {"id": 2, "name": "ant", "frequency": "c", "image_count": 30, "instance_count": 40},
    {"id": 5, "name": "cow", "frequency": "f", "image_count": 500, "instance_count": 600},
    {"id": 7, "name": "bee", "frequency": "f", "image_count": 700, "instance_count": 800},
]


def test_categories_are_found_by_name(state: State, tmp_path: Path) -> None:
    path = annotations(tmp_path / "a.json", ROWS)
    _, labels = convert(foreign_of(state), tmp_path / "m.safetensors", categories=path)
    assert [(c.id, c.name, c.frequency, c.image_count, c.instance_count) for c in labels] == [
        (2, "ant", "c", 30, 40), (7, "bee", "f", 700, 800), (5, "cow", "f", 500, 600), (9, "Dog", "r", 1, 2),
    ]  # fmt: skip


def test_categories_by_their_order_where_the_file_names_none(state: State, tmp_path: Path) -> None:
    """Labels follow the ids, as they do in every data set of ours."""
    path = annotations(tmp_path / "a.json", [{"id": row["id"], "name": row["name"]} for row in ROWS])
    _, labels = convert(foreign_of(state, names=None), tmp_path / "m.safetensors", categories=path)
    assert [(c.id, c.name) for c in labels] == [(2, "ant"), (5, "cow"), (7, "bee"), (9, "Dog")]
    assert [c.frequency for c in labels] == ["f"] * 4


def test_categories_that_do_not_fit(state: State, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    few = annotations(tmp_path / "few.json", ROWS[:3])
    with pytest.raises(UserError, match=rf"^{few}: has no category 'bee', which the model knows"):
        convert(foreign_of(state), out, categories=few)
    other = annotations(tmp_path / "other.json", [{"id": i, "name": f"thing {i}"} for i in range(4)])
    with pytest.raises(UserError, match=rf"^{other}: has no category 'ant'"):
        convert(foreign_of(state), out, categories=other)
    many = annotations(tmp_path / "many.json", [*ROWS, {"id": 90, "name": "elk"}])
    for path, count in ((few, 3), (many, 5)):
        with pytest.raises(UserError, match=rf"\b{count}\b.*\b4\b") as caught:
            convert(foreign_of(state, names=None), out, categories=path)
        assert str(path) in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "empty"),
        ('{"categories": [{"id": 1', "cut off"),
        ("not json", "not valid JSON"),
        ("[1, 2]", "found a list"),
        ("{}", "'categories' is missing"),
        ('{"categories": 3}', "list of category objects"),
        ('{"categories": [3]}', "must be an object"),
        ('{"categories": [{"id": "x", "name": "a"}]}', "id"),
        ('{"categories": [{"id": 1}]}', "name"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "id"),
    ],
)
def test_broken_annotation_files(state: State, tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        convert(foreign_of(state), tmp_path / "m.safetensors", categories=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_annotation_file_that_is_not_there(state: State, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path / 'no.json'}: no such file"):
        convert(foreign_of(state), tmp_path / "m.safetensors", categories=tmp_path / "no.json")


def test_odd_counts_count_as_none(state: State, tmp_path: Path) -> None:
    path = annotations(tmp_path / "a.json", [row | {"image_count": "many", "instance_count": None} for row in ROWS])
    _, labels = convert(foreign_of(state), tmp_path / "m.safetensors", categories=path)
    assert {(c.image_count, c.instance_count) for c in labels} == {(0, 0)}


def test_coco_s_80_classes_go_without_names(tmp_path: Path) -> None:
    state = state_of(recipe_of(classifier=CrossEntropyRecipe()), 80)
    _, labels = convert(foreign_of(state, names=None), tmp_path / "m.safetensors")
    published = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    expected = [(i, name) for i, name in enumerate(published) if name not in ("N/A", "__background__")]
    assert [(c.id, c.name) for c in labels] == expected
    assert (expected[0], expected[11], expected[-1]) == ((1, "person"), (13, "stop sign"), (90, "toothbrush"))
    assert len(coco_ids()) == 80


def test_names_for_another_number_of_classes(state: State, tmp_path: Path) -> None:
    for names in (["ant"], list("abcde")):
        with pytest.raises(UserError, match=rf"^theirs/model\.pth: .*\b{len(names)}\b.*\b4\b"):
            convert(foreign_of(state, names=names), tmp_path / "m.safetensors")


def test_labels_that_are_ids(state: State, tmp_path: Path) -> None:
    foreign = foreign_of(state, names=None, labels_are_ids=True)
    path = annotations(tmp_path / "a.json", [{"id": 3, "name": "cow"}, {"id": 1, "name": "ant"}])
    _, labels = convert(foreign, tmp_path / "m.safetensors", categories=path)
    assert [(c.id, c.name) for c in labels] == [(1, "ant"), (2, "unused 2"), (3, "cow"), (4, "unused 4")]
    path = annotations(tmp_path / "b.json", [{"id": 5, "name": "elk"}])
    with pytest.raises(UserError, match=rf"^{path}: has a category 5, but the model's go from 1 to 4"):
        convert(foreign, tmp_path / "n.safetensors", categories=path)


# ---------------------------------------------------------------------------------------------------------
# The strict check


def test_what_frozen_networks_never_had_is_filled_in(state: State, tmp_path: Path) -> None:
    ends = ("num_batches_tracked", "seesaw.counts")
    partial = {k: v for k, v in state.items() if not k.endswith(ends)}
    convert(foreign_of(partial), tmp_path / "m.safetensors")
    ours = load_model(tmp_path / "m.safetensors").state
    assert ours.keys() == state.keys()
    filled = [key for key in ours if key not in partial]
    assert len(filled) == 1 + sum(isinstance(m, nn.BatchNorm2d) for m in build_detector(recipe_of(), 4).modules())
    assert all(not ours[key].any() and ours[key].dtype == torch.int64 for key in filled)


def test_left_over_and_missing_are_said_together(state: State, tmp_path: Path) -> None:
    partial = {k: v for k, v in state.items() if k != "rpn.conv.bias"} | {"rpn.extra": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        convert(foreign_of(partial, unknown=["theirs.thing"]), tmp_path / "m.safetensors")
    message = str(caught.value)
    assert "left over: 'theirs.thing', 'rpn.extra' of no part that is known; " in message
    assert "; tensors are missing: 'rpn.conv.bias';" in message
    assert str(caught.value).startswith("theirs/model.pth: ")


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (2, 2), (1, 1, 1, 1), (7, 7, 7, 7, 7)], ids=str)
def test_any_shape_at_any_place_gives_one_sentence(state: State, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Even at those that decide about the architecture."""
    cascade = recipe_of(
        BackboneRecipe(name="resnet50", options={"channels": [4, 4, 4, 4]}, stem_channels=4),
        stages=(StageRecipe(), StageRecipe()),
        box_head=BoxHeadRecipe(width=16, class_agnostic=True),
    )
    faults = []
    for source in (state, state_of(cascade)):
        decisive = [key for key in source if not key.startswith("backbone.net.layer") or "conv" in key]
        for key in decisive:
            try:
                infer_model(source | {key: torch.zeros(shape)}, 4)
            except UserError as error:
                if "\n" in str(error):
                    faults.append(f"{key}: several lines")
            except Exception as error:
                faults.append(f"{key}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


# ---------------------------------------------------------------------------------------------------------
# What shapes say

BACKBONES = [
    BackboneRecipe(name="resnet18"),
    BackboneRecipe(name="resnet34"),
    BackboneRecipe(name="resnet50"),
    BackboneRecipe(name="resnet101"),
    BackboneRecipe(name="resnet152"),
    BackboneRecipe(name="resnext50_32x4d"),
    BackboneRecipe(name="resnext101_32x4d"),
    BackboneRecipe(name="resnext101_32x8d"),
    BackboneRecipe(name="resnext101_64x4d"),
    BackboneRecipe(name="wide_resnet50_2"),
    BackboneRecipe(name="wide_resnet101_2"),
    BackboneRecipe(name="resnet34", options={"channels": [16, 32, 64, 128]}),
    BackboneRecipe(name="resnet50", options={"channels": [8, 16, 32, 64]}, stem_channels=8),
    BackboneRecipe(name="resnet101", options={"channels": [8, 16, 32, 64]}, stem_channels=24),
    BackboneRecipe(name="resnet50", options={"cardinality": 16, "base_width": 8}),
    BackboneRecipe(name="resnet50", options={"channels": [32, 64, 128, 256], "cardinality": 32, "base_width": 4}),
]


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: f"{b.name} {b.options} {b.stem_channels}")
def test_backbones_are_recognised(backbone: BackboneRecipe) -> None:
    """The recipe that shapes lead to builds the network that they came from."""
    with torch.device("meta"):
        wanted = build_detector(recipe_of(backbone), CLASSES)
        found = infer_resnet(wanted.state_dict())
        again = build_detector(recipe_of(BackboneRecipe(**found)), CLASSES)
    assert found["name"] == backbone.name or backbone.options
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}

    def convolutions(detector: nn.Module) -> list[Any]:
        return [(m.groups, m.stride, m.padding) for m in detector.modules() if isinstance(m, nn.Conv2d)]

    assert convolutions(again) == convolutions(wanted)


def test_imagenet_weights_are_only_asked_for_where_they_fit(tmp_path: Path) -> None:
    """A recipe for a new training must not fill a narrow network, or one with moved strides, from the hub."""
    narrow = convert(foreign_of(state_of(recipe_of())), tmp_path / "a.safetensors")[0]
    assert not narrow.model.backbone.pretrained
    usual = state_of(recipe_of(BackboneRecipe(name="resnet50")))
    assert convert(foreign_of(usual), tmp_path / "b.safetensors")[0].model.backbone.pretrained
    moved = {"model": {"backbone": {"stride_in_1x1": True}}}
    recipe, _ = convert(foreign_of(usual, values=moved), tmp_path / "c.safetensors")
    assert not recipe.model.backbone.pretrained


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"class_agnostic": False}, 1),
        ({"class_agnostic": True}, 1),
        ({"class_agnostic": True}, 2),
        ({"class_agnostic": True}, 3),
        ({"class_agnostic": True}, 5),
    ],
)
@pytest.mark.parametrize("agnostic_masks", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_heads_are_recognised(options: dict[str, Any], stages: int, agnostic_masks: bool, classes: int) -> None:
    recipe = recipe_of(
        box_head=BoxHeadRecipe(width=16, **options),
        mask_head=MaskHeadRecipe(channels=12, convs=3, class_agnostic=agnostic_masks),
        stages=tuple(StageRecipe(mask_weight=float(t == stages - 1)) for t in range(stages)),
    )
    with torch.device("meta"):
        wanted = build_detector(recipe, classes).state_dict()
        values, found = infer_model(wanted, classes)
        again = recipe_of(**{key: values["model"][key] for key in ("box_head", "mask_head", "stages")})
        own = build_detector(again, classes).state_dict()
    assert found == classes
    assert values["classifier"] == {"loss": "seesaw"}
    assert [stage["mask_weight"] > 0 for stage in values["model"]["stages"]] == [False] * (stages - 1) + [True]
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in wanted.items()}


def test_an_unknown_number_of_blocks(state: State) -> None:
    shorter = {k: v for k, v in state.items() if "layer3.1." not in k}
    with pytest.raises(UserError, match=r"its backbone has \(2, 2, 1, 2\) basic blocks a stage"):
        infer_model(shorter, CLASSES)


def test_sources_that_disagree_about_the_classes(state: State) -> None:
    with pytest.raises(UserError, match="is not clear") as caught:
        infer_model(state, 5)
    assert "5 by its own list of classes" in str(caught.value)
    assert "4 by 'stages.0.mask_head.predictor.weight'" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Small parts


def test_rename_takes_the_longest_beginning() -> None:
    names = ("a.b.weight", "a.c.weight", "a.bb.weight", "d.x")
    ours, unknown = rename(names, {"a": "A", "a.b": "B", "d.x": "D"})
    assert ours == dict(zip(("B.weight", "A.c.weight", "A.bb.weight", "D"), names, strict=True))
    assert unknown == []
    ours, unknown = rename(names, {"a.b": "B", "a.c.weight.more": "C", "": "E"})
    assert list(ours) == ["B.weight"]
    assert unknown == ["a.c.weight", "a.bb.weight", "d.x"]


def test_of_two_names_for_one_place_the_second_is_left_over() -> None:
    assert rename(("a.x", "b.x", "a.y"), {"a": "A", "b": "A"}) == ({"A.x": "a.x", "A.y": "a.y"}, ["b.x"])


def test_change_touches_only_its_ending() -> None:
    state = {"a.weight": torch.ones(2), "b.weight": torch.ones(2), "a.bias": torch.ones(2)}
    change(state, Path("m.pth"), "a.weight", lambda tensor: tensor * 3)
    assert {key: value.sum().item() for key, value in state.items()} == {"a.weight": 6, "b.weight": 2, "a.bias": 2}


def test_state_dict_of() -> None:
    one, path = torch.ones(1), Path("m.pth")
    nests = ("model", "state_dict")
    for content in (
        {"x": one},
        {"model": {"x": one}, "state_dict": {"y": one}},
        {"state_dict": {"x": one, "epoch": 3}},
        {"module.x": one},
        {"model": {"module.module.x": one}},
    ):
        assert list(state_dict_of(content, path, nests)) == ["x"]
    # A prefix that only some have is part of a name.
    assert list(state_dict_of({"module.x": one, "y": one}, path, nests)) == ["module.x", "y"]
    for content in ({}, {"model": {}}, [one], one, None, "text", {"model": {"x": 3}}):
        with pytest.raises(UserError, match=r"^m\.pth: holds no tensors by name, at its top or under 'model' or"):
            state_dict_of(content, path, nests)


def test_names_of_tensors_are_bounded() -> None:
    one, path, longest = torch.ones(1), Path("m.pth"), "a." * 500
    assert list(state_dict_of({longest: one}, path, ())) == [longest]
    for name in (longest + "b", 3, 2**20000, None, ("x",)):
        with pytest.raises(UserError, match=r"^m\.pth: a tensor has a name that is no text of at most 1,000 letters"):
            state_dict_of({"x": one, name: one}, path, ())
    assert list(state_dict_of({3: "no tensor", "x": one}, path, ())) == ["x"]
    # Wrappers are taken off four times.
    assert list(state_dict_of({"module." * 4 + "x": one}, path, ())) == ["x"]
    assert list(state_dict_of({"module." * 6 + "x": one}, path, ())) == ["module.module.x"]


ODD_TENSORS: dict[str, dict[str, Any]] = {
    "no side at all": {"state_dict": {"backbone.conv1.weight": torch.tensor(1.0)}},
    "no side of a patch": {
        "state_dict": {
            "backbone.patch_embed.projection.weight": torch.zeros(2, 2),
            "backbone.stages.0.downsample.norm.weight": torch.tensor(1.0),
        }
    },
    "a version of 6000 digits": {"meta": {"mmdet_version": 2**20000}, "state_dict": {"a": torch.zeros(1)}},
    "one side": {"model": {"backbone.bottom_up.res2.0.conv2.weight": torch.ones(3)}},
    "a scale of three": {
        "model": {
            "roi_heads.box_predictor.cls_score.weight": torch.zeros(2, 2),
            "roi_heads.box_predictor.scale": torch.ones(3),
        }
    },
    "a bias without sides": {"model": {"roi_heads.box_predictor.cls_score.bias": torch.tensor(1.0)}},
    "none": {"model": {"roi_heads.box_predictor.cls_score.weight": torch.tensor(1.0), "x": torch.zeros(0)}},
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_tensors_give_one_sentence_about_the_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.pth"
    torch.save(ODD_TENSORS[kind], path)
    for reader in READERS.values():
        with pytest.raises(UserError) as caught:
            convert(reader(path), tmp_path / "out.safetensors")
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        assert "config.yaml" not in str(caught.value)


def test_weights_that_overflow_are_not_taken(state: State, tmp_path: Path) -> None:
    """Finite in float64, infinite in float32."""
    wide = dict(state)
    wide["rpn.conv.bias"] = torch.full_like(wide["rpn.conv.bias"], 1e300, dtype=torch.float64)
    assert math.isinf(wide["rpn.conv.bias"].float()[0].item())
    with pytest.raises(UserError, match=r"theirs/model\.pth: 'rpn\.conv\.bias' holds values that are not finite"):
        convert(replace(foreign_of(state), state=wide), tmp_path / "m.safetensors")


def test_converting_needs_no_training() -> None:
    """No module that the converters import, at any distance, is of the training stack."""
    package = Path(conversion.__file__).parents[1]
    waiting, seen = ["zoo.mmdet", "zoo.detectron2", "zoo.torchvision", "zoo.explanation"], set()
    while waiting:
        module = waiting.pop()
        file = package.joinpath(*module.split(".")).with_suffix(".py")
        if module in seen or not file.is_file():
            continue
        seen.add(module)
        text = file.read_text()
        waiting += re.findall(r"^ *(?:from|import) tailseg\.([\w.]+)", text, re.MULTILINE)
        waiting += [f"{base}.{name}" for base, name in re.findall(r"^from tailseg\.([\w.]+) import (\w+)", text, re.M)]
        assert not re.search(r"^(from|import) (lightning_fabric|tensorboard|matplotlib|pandas)", text, re.MULTILINE)
    assert len(seen) > 30
    assert not {module for module in seen if module.startswith(("training", "predict", "evaluation", "jobs"))}
