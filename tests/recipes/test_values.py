import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from tailseg.checkpoint import save_model
from tailseg.errors import UserError
from tailseg.layers.carafe import CarafeUpsample
from tailseg.losses import CLASSIFICATIONS, NEED_STATISTICS, ClassStatistics
from tailseg.model.build import build_detector
from tailseg.model.tsd import TsdBoxHead
from tailseg.recipes.ladder import REPORT
from tailseg.recipes.resolve import BUILT_IN, resolve
from tailseg.recipes.schema import CLASSIFIERS, ClassifierRecipe, Recipe
from tailseg.recipes.values import changed, diff, flatten, override, to_yaml, unknown_key, validate
from tailseg.structures import Batch

CLASSES = 5


def batch() -> Batch:
    """Two images of 64 pixels, with two objects and with none."""
    side = 30
    return Batch(
        images=torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        image_hws=torch.full((2, 2), 64),
        original_hws=torch.full((2, 2), 128),
        image_ids=torch.tensor([1, 2]),
        boxes=torch.tensor([[[4.0, 4, 40, 40], [30, 30, 60, 60]], [[0, 0, 0, 0], [0, 0, 0, 0]]]),
        labels=torch.tensor([[0, 4], [0, 0]]),
        valid=torch.tensor([[True, True], [False, False]]),
        masks=torch.full((2, 2, side, side), 255, dtype=torch.uint8),
        mask_frames=torch.tensor([[[4.0, 4, 40, 40], [30, 30, 60, 60]], [[0, 0, 1, 1], [0, 0, 1, 1]]]),
        absent=torch.tensor([[False, True, False, False, False], [True] * 5]),
    )


NARROW = [
    "model.backbone={name: resnet18, pretrained: false, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.box_head.width=16",
    "model.mask_head={channels: 8, convs: 1}",
]


STATISTICS = ClassStatistics(
    num_images=2000, images=torch.tensor([1, 5, 20, 300, 1500]), instances=torch.tensor([1, 9, 40, 700, 4000])
)
EVERY_LOSS = [(name, ()) for name in BUILT_IN if "table2" not in name] + [  # those are in test_table2.py
    ("demo/cross-entropy", (f"classifier.loss={n}",)) for n in CLASSIFIERS
]


@pytest.mark.parametrize(("name", "settings"), EVERY_LOSS)
def test_recipe_trains_and_detects(name: str, settings: tuple[str, ...]) -> None:
    small = ["model.backbone.pretrained=false", "test.max_detections=7", "model.rpn.post_nms_test=50"]
    if name.startswith("table1"):  # at full size these are row 1 of table 2 with another classifier
        small += ["model.box_head.rois=32", "model.box_head.max_positive=8", "model.neck.channels=64"]
    recipe = resolve(name, [*settings, *small])
    torch.manual_seed(0)
    detector = build_detector(recipe, CLASSES, STATISTICS)
    losses = detector.train()(batch())
    seesaw = recipe.classifier.loss == "seesaw"
    names = {"rpn_objectness", "rpn_box", "classes", "box", "mask"} | ({"objectness"} if seesaw else set())
    assert set(losses) == names
    assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    gradients = [p.grad is not None and bool(p.grad.isfinite().all()) for p in detector.parameters() if p.requires_grad]
    assert all(gradients)
    classification = detector.stages[0].box_head.classification
    assert isinstance(classification, CLASSIFICATIONS[recipe.classifier.loss])
    assert bool((detector.stages[0].box_head.classifier.bias == classification.initial_bias).all())
    found = detector.eval().detect(batch())
    assert [f.image_hw for f in found] == [(128, 128)] * 2
    for detections in found:
        assert 0 < len(detections) <= 7
        assert detections.boxes.shape == (len(detections), 4)
        assert detections.masks.shape == (len(detections), 28, 28)
        assert int(detections.labels.max()) < CLASSES
        assert torch.equal(detections.scores, detections.scores.sort(descending=True).values)


@pytest.mark.parametrize("loss", CLASSIFIERS)
def test_a_model_of_every_loss_is_complete_in_its_state(loss: str) -> None:
    recipe = resolve("demo/cross-entropy", [f"classifier.loss={loss}", *NARROW])
    trained = build_detector(recipe, CLASSES, STATISTICS).train()
    trained(batch())
    loaded = build_detector(recipe, CLASSES)
    buffers = loaded.stages[0].box_head.classification.buffers()
    unknown = [b for b in buffers if b.is_floating_point() and bool(b.isnan().all())]
    assert bool(unknown) == (CLASSIFICATIONS[loss] in NEED_STATISTICS)
    loaded.load_state_dict(trained.state_dict())
    for ours, theirs in zip(loaded.train()(batch()).values(), trained(batch()).values(), strict=True):
        assert bool(torch.isfinite(ours))
        assert bool(torch.isfinite(theirs))
    pairs = zip(loaded.eval().detect(batch()), trained.eval().detect(batch()), strict=True)
    assert all(torch.equal(ours.scores, theirs.scores) for ours, theirs in pairs)


def test_another_loss_brings_its_own_keys_and_keeps_the_shared_ones() -> None:
    base = resolve("demo/seesaw", ["classifier.temperature=16"])
    changed = override(base, ["classifier.threshold=0.02", "classifier.loss=eql"]).classifier  # in any order
    assert changed.model_dump() == {"loss": "eql", "normalized": True, "temperature": 16.0, "threshold": 0.02}
    assert override(base, ["classifier={loss: focal, gamma: 1}"]).classifier.model_dump() == {
        "loss": "focal",
        "normalized": True,
        "temperature": 16.0,
        "gamma": 1.0,
        "alpha": 0.25,
    }
    assert override(base, ["classifier.loss=seesaw", "classifier.p=0.5"]).classifier.model_dump()["p"] == 0.5


@pytest.mark.parametrize("settings", [["classifier.normalized=true"], ["classifier.loss=group-softmax"]])
def test_tau_norm_needs_one_plain_row_a_class(settings: list[str]) -> None:
    assert resolve("demo/cross-entropy", ["test.tau_norm=0.7"]).test.tau_norm == 0.7
    with pytest.raises(UserError, match=r"recipe: test.tau_norm = 0.7 does not go with .*; set it to 0"):
        resolve("demo/cross-entropy", ["test.tau_norm=0.7", *settings])


def test_every_loss_has_one_home_for_its_defaults() -> None:
    for loss, kind in CLASSIFIERS.items():
        own = kind().model_dump(exclude=set(ClassifierRecipe.model_fields))
        signature = inspect.signature(CLASSIFICATIONS[loss]).parameters
        given = {name: p.default for name, p in signature.items() if name not in ("num_classes", "statistics")}
        assert own == given


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("classifier.loss=seesow", "classifier.loss: unknown loss 'seesow'; did you mean 'seesaw'? There are "),
        ("classifier.p=0.5", "key 'classifier.p' belongs to classifier.loss seesaw; set classifier.loss first"),
        ("classifier.alpha=1", "belongs to classifier.loss eql-v2 or focal"),
        ("classifier={loss: seesaw, threshold: 1}", "key 'classifier.threshold' belongs to classifier.loss eql"),
        ("classifier={loss: seesaw, p: -1}", "classifier.p: input should be greater than or equal to 0, received -1"),
        ("classifier={loss: eql, threshold: 2}", "classifier.threshold: input should be less than or equal to 1"),
        ("classifier={loss: eql-v2, mu: -1}", "classifier.mu: input should be greater than or equal to 0, received -1"),
        ("classifier={loss: seesaw, p: .inf}", "classifier.p: input should be a finite number, received inf"),
        ("classifier={loss: group-softmax, thresholds: [9, 3]}", "classifier: thresholds must be rising numbers"),
        ("test={tau_norm: -1}", "test.tau_norm: input should be greater than or equal to 0, received -1"),
        ("classifier={loss: seesaw, pp: 1}", "unknown key 'classifier.pp'; the nearest valid key is 'classifier.p'"),
    ],
)
def test_mistakes_about_losses_are_named(setting: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        resolve("demo/cross-entropy", [setting])
    assert sentence in str(error.value)


def test_the_spec_of_table_1() -> None:
    """Spec, sections 2, 5, 6, 22 and 24, and the report's section 1.1."""
    flat = flatten(resolve("table1/seesaw").model_dump())
    expected = {
        "model.backbone.name": "resnet50",
        "model.backbone.frozen_stages": 1,
        "classifier.loss": "seesaw",
        "classifier.normalized": True,
        "classifier.temperature": 20.0,
        "classifier.objectness": True,
        "classifier.p": 0.8,
        "classifier.q": 0.0,
        "data.short_edges": (640, 672, 704, 736, 768, 800),
        "data.test_short_edge": 800,
        "data.long_edge": 1333,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.02,
        "optimizer.reference_batch": 16,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-4,
        "optimizer.clip": None,
        "schedule.epochs": 12,
        "schedule.milestones": (8, 11),
        "schedule.gamma": 0.1,
        "schedule.warmup_steps": 500,
        "schedule.warmup_factor": 0.001,
        "training.precision": "fp32",
        "training.ema": None,
        "test.score_threshold": 1e-4,
        "test.nms_iou": 0.5,
        "test.max_detections": 300,
    }
    assert {key: flat[key] for key in expected} == expected


def test_equalization_loss_in_table_1() -> None:
    """Spec, sections 9 and 26: a plain linear layer, and λ for LVIS v1."""
    found = diff(resolve("table1/cross-entropy"), resolve("table1/eql"))
    assert found == [("classifier.loss", "cross-entropy", "eql"), ("classifier.threshold", None, 0.0011)]
    assert not resolve("table1/eql").classifier.normalized


def test_pairs_differ_in_the_classifier_only() -> None:
    for family in ("table1", "small", "demo"):
        found = diff(resolve(f"{family}/cross-entropy"), resolve(f"{family}/seesaw"))
        assert found == [
            ("classifier.loss", "cross-entropy", "seesaw"),
            ("classifier.normalized", False, True),
            ("classifier.objectness", None, True),
            ("classifier.p", None, 0.8),
            ("classifier.q", None, 0.0),
        ]
    assert diff(resolve("demo/seesaw"), resolve("demo/seesaw")) == []


THREE_STAGES = """
extends: demo/seesaw
model:
  box_head: {class_agnostic: true}
  stages:
  - {}
  - {iou: 0.6, stds: [0.05, 0.05, 0.1, 0.1], weight: 0.5}
  - {iou: 0.7, weight: 0.25, mask_weight: 0}
"""


def plain_stage(**changes: object) -> dict[str, object]:
    return {"iou": 0.5, "stds": [0.1, 0.1, 0.2, 0.2], "tsd": False, "weight": 1.0, "mask_weight": 1.0} | changes


def test_stages_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cascade.yaml"
    path.write_text(THREE_STAGES)
    recipe = resolve(str(path))
    stages = [
        plain_stage(),
        plain_stage(iou=0.6, stds=[0.05, 0.05, 0.1, 0.1], weight=0.5),
        plain_stage(iou=0.7, weight=0.25, mask_weight=0.0),
    ]
    assert recipe.model_dump(mode="json")["model"]["stages"] == stages
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert resolve(str(tmp_path / "again.yaml")) == recipe
    # A list is a value: it is shown and compared whole, and replaced whole by a file that extends this one.
    assert flatten(recipe.model_dump(mode="json"))["model.stages"] == stages
    assert diff(resolve("demo/seesaw"), recipe) == [("model.stages", [plain_stage()], stages)]
    assert diff(recipe, override(recipe, ["model.stages.2.mask_weight=0"])) == []
    (tmp_path / "two.yaml").write_text("extends: cascade.yaml\nmodel: {stages: [{iou: 0.4}, {weight: 2}]}\n")
    two = resolve(str(tmp_path / "two.yaml"))
    assert two.model_dump(mode="json")["model"]["stages"] == [plain_stage(iou=0.4), plain_stage(weight=2.0)]
    assert two.model.box_head == recipe.model.box_head


def test_one_stage_is_set_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "cascade.yaml"
    path.write_text(THREE_STAGES)
    base = resolve(str(path))
    changed = resolve(str(path), ["model.stages.1.iou=0.55", "model.stages.2.stds=[1, 1, 1, 1]"])
    assert [stage.iou for stage in changed.model.stages] == [0.5, 0.55, 0.7]
    assert [stage.stds for stage in changed.model.stages] == [
        (0.1, 0.1, 0.2, 0.2),
        (0.05, 0.05, 0.1, 0.1),
        (1.0, 1.0, 1.0, 1.0),
    ]
    assert [stage.weight for stage in changed.model.stages] == [1.0, 0.5, 0.25]
    assert base == resolve(str(path))
    assert len(override(base, ["model.stages=[{}]"]).model.stages) == 1
    assert override(base, ["model.stages.0.iou=0.3"]).model.stages[0].iou == 0.3


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.stages.3.iou=0.6", "'model.stages' has places 0 to 2"),
        ("model.stages.-1.iou=0.6", "'model.stages' has places 0 to 2"),
        ("model.stages.first.iou=0.6", "'model.stages' has places 0 to 2"),
        ("model.stages.1.iuo=0.6", "unknown key 'model.stages.1.iuo'; the nearest valid key is 'model.stages."),
        ("model.stages.1=0.6", "unknown key 'model.stages.1'"),
        ("model.stages.1.iou.x=0.6", "unknown key 'model.stages.1.iou.x'"),
        ("model.stages.1.iou=1.5", "model.stages.1.iou: input should be less than or equal to 1, received 1.5"),
        ("model.stages.2.weight=-1", "model.stages.2.weight: input should be greater than or equal to 0"),
        ("model.stages.2.stds=[1, 1]", "model.stages.2.stds"),
        ("model.stages=[]", "model.stages: tuple should have at least 1 item"),
        ("model.stages=[{iou: 0.5, weigth: 1}]", "unknown key 'model.stages.0.weigth'; the nearest valid key is 'mod"),
        ("model.stages={iou: 0.5}", "model.stages: input should be a valid tuple"),
        ("data.short_edges.0.x=1", "unknown key 'data.short_edges.0.x'"),
    ],
)
def test_mistakes_about_stages_are_named(setting: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "cascade.yaml"
    path.write_text(THREE_STAGES)
    with pytest.raises(UserError) as caught:
        resolve(str(path), [setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {stages: [{}, {iuo: 0.6}]}", "unknown key 'model.stages.1.iuo'; the nearest valid key is 'model.st"),
        ("model: {stages: [{}, 3]}", "model.stages.1: input should be "),
        ("model: {stages: [{}, {iou: 0}]}", "model.stages.1.iou: input should be greater than 0, received 0"),
        (
            "model: {stages: [{}, {}], box_head: {class_agnostic: false}}",
            "2 stages refine one box a RoI; set model.box_head.class_agnostic=true, or leave one",
        ),
        (
            "model: {stages: [{mask_weight: 0}, {mask_weight: 0}]}",
            "no stage has a mask head; set the mask_weight of one, such as model.stages.0.mask_weight=1",
        ),
    ],
)
def test_stages_of_a_file_at_fault(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: demo/seesaw\n{text}\n")
    with pytest.raises(UserError) as caught:
        resolve(str(path))
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_stage_needs_no_class_agnostic_boxes_but_a_mask_head() -> None:
    assert not resolve("table1/seesaw").model.box_head.class_agnostic
    assert len(resolve("table1/seesaw").model.stages) == 1
    with pytest.raises(UserError, match="no stage has a mask head"):
        resolve("table1/seesaw", ["model.stages.0.mask_weight=0"])
    with pytest.raises(UserError, match="3 stages refine one box a RoI"):
        resolve("table1/seesaw", ["model.stages=[{}, {}, {}]"])


def test_the_recipe_of_a_model(tmp_path: Path) -> None:
    """A model file stands for the recipe that it carries, by itself and as what a file extends."""
    stored = resolve("demo/seesaw", ["model.stages=[{}, {iou: 0.6}]", "classifier.p=0.3"])
    model = tmp_path / "deep" / "best.safetensors"
    model.parent.mkdir()
    save_model(model, {"x": torch.zeros(1)}, stored, (), step=3)
    assert resolve(str(model)) == stored
    assert resolve(str(model), ["classifier.p=0.5"]) == override(stored, ["classifier.p=0.5"])
    path = tmp_path / "mine.yaml"
    path.write_text("extends: deep/best.safetensors\nclassifier: {q: 1}\n")
    assert resolve(str(path)).name == "mine"
    assert diff(stored, resolve(str(path))) == [("classifier.q", 0.0, 1.0)]
    path.write_text(f"extends: {model}\n")
    assert diff(stored, resolve(str(path))) == []
    for name, sentence in (("gone", "there is no such file"), ("text", "is not a tailseg checkpoint")):
        (tmp_path / "text.safetensors").write_text("none")
        path.write_text(f"extends: {name}.safetensors\n")
        for start in (str(tmp_path / f"{name}.safetensors"), str(path)):
            with pytest.raises(UserError, match=rf"{name}\.safetensors: {sentence}"):
                resolve(start)


@pytest.mark.parametrize("name", BUILT_IN)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = BUILT_IN[name]()
    assert recipe.name == name
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert resolve(str(path)) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_extends_in_a_chain(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("extends: small/seesaw\nclassifier: {p: 0.6}\noptimizer: {lr: 0.001}\n")
    (tmp_path / "deep" / "top.yaml").write_text("extends: ../base.yaml\noptimizer: {clip: null}\n")
    recipe = resolve(str(tmp_path / "deep" / "top.yaml"), ["schedule.epochs=3", "schedule.milestones=[2]"])
    assert recipe.name == "top"
    assert diff(resolve("small/seesaw"), recipe) == [
        ("classifier.p", 0.8, 0.6),
        ("optimizer.lr", 0.0005, 0.001),
        ("optimizer.clip", 10.0, None),
        ("schedule.epochs", 40, 3),
        ("schedule.milestones", [28, 36], [2]),
    ]
    (tmp_path / "bare.yaml").write_text("classifier: {loss: seesaw}\n")
    assert diff(resolve("table1/cross-entropy"), resolve(str(tmp_path / "bare.yaml"))) == [
        ("classifier.loss", "cross-entropy", "seesaw"),
        ("classifier.objectness", None, True),
        ("classifier.p", None, 0.8),
        ("classifier.q", None, 0.0),
    ]


def test_extends_at_fault(tmp_path: Path) -> None:
    for name, parent in (("a", "b.yaml"), ("b", "c.yaml"), ("c", "a.yaml"), ("self", "self.yaml"), ("d", "gone.yaml")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {parent}\n")
    for name in ("a", "self"):
        with pytest.raises(UserError, match=rf"{name}\.yaml: 'extends' leads back"):
            resolve(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read"):
        resolve(str(tmp_path / "d.yaml"))
    (tmp_path / "e.yaml").write_text("extends: table1/sesaw\n")
    with pytest.raises(UserError, match=r"e\.yaml: extends an unknown recipe 'table1/sesaw'.*'table1/seesaw'"):
        resolve(str(tmp_path / "e.yaml"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "expected a mapping"),
        ("- 1\n", "expected a mapping"),
        ("model: [1,\n", "not valid YAML"),
        ("modle: {}\n", "'modle'; the nearest valid key is 'model"),
        ("model: {backbone: {nam: x}}\n", "'model.backbone.nam'; the nearest valid key is 'model.backbone.name'"),
        ("data: {flip: 2}\n", "data.flip: input should be less than or equal to 1, received 2"),
        ("optimizer: null\n", "optimizer: "),
        ("optimizer: {name: lamb}\n", "optimizer.name: input should be 'sgd' or 'adamw', received 'lamb'"),
        ("schedule: {milestones: [3, 2]}\n", "milestones must be rising"),
    ],
)
def test_yaml_at_fault(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        resolve(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optimizer.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("optimizer.lr=[1", "not valid YAML"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, received -1"),
        ("optimizer.lr=nan", "optimizer.lr: input should be a finite number, received nan"),
        ("schedule.epochs=1.5", "schedule.epochs: input should be a valid integer"),
        ("optimizer=3", "'optimizer' is a section; set one of its keys, such as optimizer.name"),
        ("optimzer.lr=3", "unknown key 'optimzer.lr'; the nearest valid key is 'optimizer.lr'"),
        ("optimizer.lr.x=3", "unknown key 'optimizer.lr.x'"),
        ("lr=3", "unknown key 'lr'; the nearest valid key is '"),
    ],
)
def test_override_at_fault(setting: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve("demo/seesaw", [setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert named in str(caught.value)


def test_override() -> None:
    base = resolve("demo/seesaw")
    assert override(base, ()) is base
    changed = override(
        base,
        [
            "optimizer.lr=1e-4",
            "optimizer.clip=null",
            "data.short_edges=[64, 96]",
            "model.backbone.options={drop_rate: 0.1}",
            "model.backbone.options.drop_path_rate=0.2",
            "model.backbone.pretrained=no",
            "optimizer.lr=2e-4",
        ],
    )
    assert (changed.optimizer.lr, changed.optimizer.clip) == (2e-4, None)
    assert changed.data.short_edges == (64, 96)
    assert changed.model.backbone.options == {"drop_rate": 0.1, "drop_path_rate": 0.2}
    assert changed.model.backbone.pretrained is False
    assert base == resolve("demo/seesaw")
    section = override(base, ["optimizer={lr: 0.1}", "optimizer.clip=3", "data={workers: 0}"])
    assert section.optimizer == base.optimizer.model_copy(update={"lr": 0.1, "clip": 3.0})
    assert section.data == base.data.model_copy(update={"workers": 0})


def test_flatten_and_validate() -> None:
    assert flatten({}) == {}
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    with pytest.raises(UserError, match=r"^here: name: field required"):
        validate({}, "here")
    assert unknown_key("schedule.epoch").endswith("'schedule.epochs'")
    assert yaml.safe_load(to_yaml(resolve("table1/seesaw")))["schedule"]["milestones"] == [8, 11]


def test_a_misspelt_key_of_a_stage_is_corrected_at_its_place() -> None:
    with pytest.raises(UserError, match=r"nearest valid key is 'model\.stages\.1\.iou'"):
        resolve(
            "table1/seesaw",
            ["model.box_head.class_agnostic=true", "model.stages=[{}, {}]", "model.stages.1.iuo=0.6"],
        )


CASCADE = [
    plain_stage(mask_weight=0.0),
    plain_stage(iou=0.6, stds=[0.05, 0.05, 0.1, 0.1], weight=0.5, mask_weight=0.0),
    plain_stage(iou=0.7, stds=[0.033, 0.033, 0.067, 0.067], weight=0.25),
]
TSD = [stage | {"tsd": True} for stage in CASCADE]


def steps(proposals: int, *, full_size: bool) -> dict[str, list[tuple[str, object, object]]]:
    """What each row of table 2 changes of the one before (spec, sections 12 to 15, 20, 21 and 27).

    The miniature has class-agnostic boxes and a bound on its gradients from the start.
    """
    return {
        "02-sync-bn": [("model.backbone.train_norm", False, True), ("model.mask_head.norm", False, True)],
        "03-carafe": [("model.mask_head.upsample", "deconv", "carafe")],
        "04-htc-lite": [
            ("model.rpn.post_nms_train", proposals, 2 * proposals),
            ("model.rpn.box_beta", 0.0, pytest.approx(1 / 9)),
            ("model.rpn.inside_image", False, True),
            *([("model.box_head.class_agnostic", False, True)] if full_size else []),
            ("model.box_head.box_beta", 0.0, 1.0),
            ("model.box_head.low_quality", True, False),
            ("model.context.weight", 0.0, 3.0),
            ("model.context.norm", False, True),
            ("model.stages", [plain_stage()], CASCADE),
        ],
        "05-tsd": [("model.stages", CASCADE, TSD), *([("optimizer.clip", None, 35.0)] if full_size else [])],
        "06-mask-scoring": [("model.mask_iou.weight", 0.0, 0.5)],
        "08-neck": [
            ("model.neck.kind", "fpn", "fpg"),
            *([] if full_size else [("model.neck.pathways", 9, 5)]),
            ("model.neck.deformable", False, True),
            ("model.neck.carafe", False, True),
        ],
        "10-seesaw": [
            ("model.tsd.constrain_classes", True, False),
            ("classifier.loss", "cross-entropy", "seesaw"),
            ("classifier.normalized", False, True),
            ("classifier.objectness", None, True),
            ("classifier.p", None, 0.8),
            ("classifier.q", None, 0.0),
        ],
        **(LARGE if full_size else SMALL),
    }


LARGE = {
    "07-augmentation": [
        ("data.test_short_edge", 800, 1280),
        ("data.long_edge", 1333, 1280),
        ("data.long_edges", None, [768, 1792]),
        ("data.crop", None, 1280),
        ("data.instaboost", 0.0, 0.5),
        ("schedule.epochs", 24, 45),
        ("schedule.milestones", [16, 22], [30, 40]),
    ],
    "09-backbone": [
        ("model.backbone.name", "resnet50", "resnest200e"),
        ("model.backbone.deformable_stages", [], [2, 3, 4]),
        ("model.pixel_mean", [123.675, 116.28, 103.53], [123.68, 116.779, 103.939]),
        ("model.pixel_std", [58.395, 57.12, 57.375], [58.393, 57.12, 57.375]),
    ],
    "11-finetune": [
        ("data.sampler", "random", "repeat-factor"),
        ("schedule.epochs", 45, 12),
        ("schedule.milestones", [30, 40], [8, 11]),
        ("finetune.enabled", False, True),
    ],
    "12-tta": [("test.tta", False, True)],
}
SMALL = {
    "07-augmentation": [
        ("data.long_edges", None, [77, 179]),
        ("data.crop", None, 128),
        ("data.instaboost", 0.0, 0.5),
    ],
    "09-backbone": [
        ("model.backbone.name", "tf_efficientnet_lite0", "tf_efficientnet_lite2"),
    ],
    "11-finetune": [
        ("data.sampler", "random", "repeat-factor"),
        ("data.repeat_threshold", 0.001, 0.02),
        ("schedule.epochs", 3, 1),
        ("schedule.milestones", [2], []),
        ("finetune.enabled", False, True),
    ],
    "12-tta": [
        ("test.tta", False, True),
        ("test.tta_long_edges", [1200, 1400, 1600, 1800, 2000], [120, 140, 160, 180, 200]),
    ],
}


@pytest.mark.parametrize(
    ("table", "expected"),
    [("table2", steps(1000, full_size=True)), ("demo-table2", steps(200, full_size=False))],
)
def test_every_row_of_table_2_is_one_step(table: str, expected: dict[str, list[tuple[str, object, object]]]) -> None:
    names = [name.split("/")[1] for name in BUILT_IN if name.startswith((f"{table}/0", f"{table}/1"))]
    assert names == ["01-mask-rcnn", *sorted(expected)]
    assert names == list(REPORT)
    for before, name in pairwise(names):
        assert diff(resolve(f"{table}/{before}"), resolve(f"{table}/{name}")) == expected[name], name


def test_where_the_rows_of_table_2_start() -> None:
    """Mask R-CNN with cross-entropy, trained twice as long; in miniature with narrow heads for what comes."""
    assert diff(resolve("table1/cross-entropy"), resolve("table2/01-mask-rcnn")) == [
        ("schedule.epochs", 12, 24),
        ("schedule.milestones", [8, 11], [16, 22]),
    ]
    changed = {key for key, _, _ in diff(resolve("demo/cross-entropy"), resolve("demo-table2/01-mask-rcnn"))}
    narrow = {"model.tsd.shift_width", "model.mask_iou.channels", "model.mask_iou.width"}
    assert changed == narrow | {"optimizer.lr", "optimizer.clip"}
    for table in ("table2", "demo-table2"):
        model = resolve(f"{table}/01-mask-rcnn").model
        assert [model.mask_iou.weight, model.context.weight] == [0, 0]
        assert [stage.tsd for stage in model.stages] == [False]


def test_the_cascade_of_public_checkpoints() -> None:
    """Row 4 without a context encoder, and with a mask head in every stage that weighs as much as the stage."""
    recipe = resolve("table2/cascade-mask-rcnn")
    stages = [stage | {"mask_weight": stage["weight"]} for stage in CASCADE]
    found = diff(resolve("table2/01-mask-rcnn"), recipe)
    assert [key for key, _, _ in found] == [
        *("model.rpn.post_nms_train", "model.rpn.box_beta", "model.rpn.inside_image"),
        *("model.box_head.class_agnostic", "model.box_head.box_beta", "model.box_head.low_quality"),
        "model.stages",
    ]
    assert found[-1] == ("model.stages", [plain_stage()], stages)
    detector = build_detector(override(recipe, NARROW), CLASSES)
    assert [stage.mask_head is not None for stage in detector.stages] == [True] * 3
    assert [(stage.weight, stage.mask_weight) for stage in detector.stages] == [(1, 1), (0.5, 0.5), (0.25, 0.25)]
    assert [detector.context, detector.mask_iou] == [None, None]
    losses = detector.train()(batch())
    assert {name for name in losses if "mask" in name} == {f"stage{t}.mask" for t in (1, 2, 3)}


def test_settings_reach_the_parts_of_table_2() -> None:
    settings = [
        "model.context={weight: 2, convs: 6, residual: true, norm: false, unlabelled: ignored}",
        "model.mask_iou={weight: 0.75, channels: 6, width: 10}",
        "model.mask_head.class_agnostic=true",
        "model.tsd={shift_width: 9, gamma: 0.2, class_margin: 0.1, box_margin: 0.4, constrain_classes: false}",
        "model.tsd.zero_init_shifts=true",
        "model.tsd.detach_targets=true",
        "model.stages.1.tsd=false",
        "classifier={normalized: true, temperature: 7}",
    ]
    detector = build_detector(resolve("table2/06-mask-scoring", [*NARROW, *settings]), CLASSES)
    context, scoring = detector.context, detector.mask_iou
    assert context is not None
    assert scoring is not None
    assert (detector.context_weight, len(context.convs), context.residual, len(context.norms)) == (2, 6, True, 0)
    assert (context.unlabelled, context.classifier.weight.shape) == ("ignored", (CLASSES, 16))
    assert (detector.mask_iou_weight, scoring.convs[0].weight.shape) == (0.75, (6, 17, 3, 3))
    assert (scoring.fc2.weight.shape, scoring.predictor.weight.shape) == ((10, 10), (1, 10))
    assert scoring.class_agnostic
    assert [isinstance(stage.box_head, TsdBoxHead) for stage in detector.stages] == [True, False, True]
    for head in (detector.stages[0].box_head, detector.stages[2].box_head):
        assert (head.gamma, head.class_margin, head.box_margin) == (0.2, 0.1, 0.4)
        assert (head.constrain_classes, head.detach_targets, head.box_beta) == (False, True, 1.0)
        assert head.shared[0].weight.shape == (9, 16 * 49)
        assert all((shift[-1].weight == 0).all() for shift in (head.class_shift, head.box_shift))
        assert head.classifier.temperature == head.sibling_classifier.temperature == 7
        assert head.regressor.out_features == head.sibling_regressor.out_features == 4
    assert [stage.box_head.stds for stage in detector.stages] == [tuple(stage["stds"]) for stage in CASCADE]
    mask_head = detector.stages[2].mask_head
    assert (mask_head.class_agnostic, len(mask_head.norms)) == (True, 1)
    assert isinstance(mask_head.upsample, CarafeUpsample)
    plain = build_detector(resolve("table2/06-mask-scoring", NARROW), CLASSES)
    assert (plain.context_weight, len(plain.context.norms), plain.context.unlabelled) == (3, 4, "negative")
    assert (plain.mask_iou_weight, plain.mask_iou.predictor.weight.shape) == (0.5, (CLASSES, 1024))
    head = plain.stages[0].box_head
    assert (head.gamma, head.class_margin, head.box_margin, head.constrain_classes) == (0.1, 0.3, 0.3, True)


def test_a_part_without_weight_is_not_there() -> None:
    settings = ["model.context.weight=0", "model.mask_iou.weight=0"]
    detector = build_detector(resolve("table2/06-mask-scoring", [*NARROW, *settings]), CLASSES)
    assert [detector.context, detector.mask_iou] == [None, None]
    assert not any(name.startswith(("context", "mask_iou")) for name in detector.state_dict())


def test_convolutions_of_the_box_heads_are_in_every_stage() -> None:
    detector = build_detector(resolve("table2/04-htc-lite", [*NARROW, "model.box_head.convs=4"]), CLASSES)
    for stage in detector.stages:
        assert (len(stage.box_head.convs), len(stage.box_head.norms), stage.box_head.fc2) == (4, 4, None)


NO_CONVOLUTIONS = "model: a TSD head has no convolutions; set model.box_head.convs=0, or no stage's tsd"


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        (
            "table2/06-mask-scoring",
            ["model.stages.2.mask_weight=0", "model.stages.1.mask_weight=1"],
            "model: mask_iou judges the masks of the last stage, which has no mask head; "
            "set model.stages.2.mask_weight=1",
        ),
        ("table2/05-tsd", ["model.box_head.convs=4"], NO_CONVOLUTIONS),
        ("table2/04-htc-lite", ["model.box_head.convs=1", "model.stages.1.tsd=true"], NO_CONVOLUTIONS),
        (
            "table2/04-htc-lite",
            ["model.context={residual: true, convs: 3}"],
            "model.context: residual needs an even number of convs, received 3",
        ),
        (
            "table2/04-htc-lite",
            ["model.box_head.class_agnostic=false"],
            "model: 3 stages refine one box a RoI; set model.box_head.class_agnostic=true, or leave one",
        ),
        ("table2/04-htc-lite", ["model.context.weight=-1"], "greater than or equal to 0, received -1"),
        ("table2/04-htc-lite", ["model.context.unlabelled=absent"], "'negative' or 'ignored', received 'absent'"),
        ("table2/03-carafe", ["model.mask_head.upsample=nearest"], "'deconv' or 'carafe', received 'nearest'"),
        ("table2/05-tsd", ["model.tsd.gama=1"], "unknown key 'model.tsd.gama'; the nearest valid key is 'model.tsd."),
        ("table2/05-tsd", ["model.stages.1.tds=true"], "the nearest valid key is 'model.stages.1."),
        ("table2/06-mask-scoring", ["model.mask_iou=1"], "'model.mask_iou' is a section; set one of its keys"),
        (
            "table2/06-mask-scoring",
            ["model.neck.carafe=true", "model.neck.pathways=3"],
            "model.neck: an FPN has no pathways, carafe; set model.neck.kind=fpg, or leave out pathways, carafe",
        ),
        ("table2/08-neck", ["model.neck.kind=pafpn"], "'fpn' or 'fpg', received 'pafpn'"),
        ("table2/11-finetune", ["finetune.cache=true"], "cannot be cached; set finetune.views, for example to 1"),
        ("table2/12-tta", ["test.tta_long_edges=[]"], "test.tta_long_edges: tuple should have at least 1 item"),
        ("table2/12-tta", ["test.tta_long_edges=[1200, 8]"], "greater than or equal to 32, received 8"),
        ("table2/07-augmentation", ["data.instaboost=1.5"], "less than or equal to 1, received 1.5"),
    ],
)
def test_mistakes_about_the_parts_of_table_2_are_named(name: str, settings: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name, settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changed_speaks_the_keys_of_set() -> None:
    base = resolve("small/seesaw")
    changes = {"model.mask_head.upsample": "carafe", "classifier.p": 0.6, "schedule.milestones": (3, 5)}
    by_key = changed(base, changes)
    assert by_key == override(
        base, ["model.mask_head.upsample=carafe", "classifier.p=0.6", "schedule.milestones=[3,5]"]
    )
    assert changed(base, {}) is base
    # The loss may come last: it still decides which keys its section has.
    assert changed(base, {"classifier.threshold": 0.01, "classifier.loss": "eql"}).classifier.loss == "eql"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schedul": {"epochs": 3}}, "unknown key 'schedul'; the nearest valid key is 'schedule'"),
        ({"schedule.epoch": 3}, "unknown key 'schedule.epoch'; the nearest valid key is 'schedule.epochs'"),
        ({"schedule.epochs": 0}, "schedule.epochs = 0"),
        ({"model.neck.carafe": True}, "an FPN has no carafe"),
        ({"model.stages.3.tsd": True}, "places 0 to 0"),
    ],
)
def test_changed_refuses_what_set_refuses(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        changed(resolve("table1/seesaw"), changes)
