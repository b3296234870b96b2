import re
from pathlib import Path

import pytest
import yaml
from recipe_stages import THREE_STAGES

from tailseg.errors import UserError
from tailseg.recipes.resolve import BUILT_IN, resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed, flatten, merge, override, to_yaml, unknown_key, validate


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


@pytest.mark.parametrize("name", BUILT_IN)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = BUILT_IN[name]()
    assert recipe.name == name
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert resolve(str(path)) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optimizer.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("optimizer.lr=[1", "not valid YAML"),
        ("optimizer.lr=2020-13-45", "not valid YAML; write another value"),
        ("optimizer.lr=" + "9" * 5000, "not valid YAML; write another value"),
        ("optimizer.lr=" + "[" * 60 + "]" * 60, "more than 50 lists or mappings in each other"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, received -1"),
        ("optimizer.lr=nan", "optimizer.lr: input should be a finite number, received nan"),
        ("schedule.epochs=1.5", "schedule.epochs: input should be a valid integer"),
        ("optimizer=3", "'optimizer' is a section; set one of its keys, such as optimizer.name"),
        ("optimzer.lr=3", "unknown key 'optimzer.lr'; the nearest valid key is 'optimizer.lr'"),
        ("optimizer.lr.x=3", "unknown key 'optimizer.lr.x'"),
        ("lr=3", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("nms_iou=3", "unknown key 'nms_iou'; did you mean 'model.rpn.nms_iou' or 'test.nms_iou'?"),
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


def test_a_free_form_section_is_added_to_and_emptied(tmp_path: Path) -> None:
    base = resolve("own/accurate")
    assert base.model.backbone.options == {"drop_path_rate": 0.2}
    assert override(base, ["model.backbone.options={}"]).model.backbone.options == {}
    assert changed(base, {"model.backbone.options": {}}).model.backbone.options == {}
    assert override(base, ["model.backbone={options: {}}"]).model.backbone.options == {}
    rated = override(resolve("demo/seesaw"), ["optimizer.rates.backbone=0.1", "optimizer.rates.neck=0.5"])
    assert rated.optimizer.rates == {"backbone": 0.1, "neck": 0.5}
    assert override(rated, ["optimizer.rates={}"]).optimizer.rates == {}
    assert override(rated, ["optimizer={}"]) == rated
    (tmp_path / "own.yaml").write_text("extends: own/accurate\nmodel: {backbone: {options: {}}}\n")
    assert resolve(str(tmp_path / "own.yaml")).model.backbone.options == {}
    for key, example in (("optimizer.rates", "backbone"), ("model.backbone.options", "drop_path_rate")):
        with pytest.raises(UserError) as error:
            override(resolve("demo/seesaw"), [f"{key}=null"])
        sentence = f"'{key}' is a section; set one of its keys, such as {key}.{example}, or empty it with {{}}"
        assert str(error.value) == f"--set {key}=null: {sentence}"
    with pytest.raises(UserError, match=r"optimizer\.rates\.head.*'box_heads'"):
        override(rated, ["optimizer.rates.head=0.1"])


@pytest.mark.parametrize(
    "setting",
    [
        "data.flip=true",
        "optimizer.lr=yes",
        "optimizer.clip=on",
        "optimizer.rates.backbone=true",
        "training.patience=true",
        "schedule.epochs=on",
        "schedule.milestones=[true]",
        "data.short_edges=[64, no]",
        "model.neck.channels=no",
        "model.stages.0.iou=true",
        "classifier.p=false",
    ],
)
def test_true_is_no_number(setting: str) -> None:
    with pytest.raises(UserError) as error:
        resolve("demo/seesaw", [setting])
    key = setting.partition("=")[0].removesuffix(".backbone")  # the section's own
    received = "False" if "no" in setting or "false" in setting else "True"
    why = f"expected a number, received {received}; YAML reads yes, no, on and off as true and false"
    assert str(error.value) == f"--set {setting}: {key}: {why}"


def test_true_where_it_has_a_meaning() -> None:
    recipe = resolve(
        "demo/seesaw",
        ["model.neck.norm=true", "model.box_head.norm=yes", "test.tta=on", "model.backbone.options={avg_down: true}"],
    )
    assert (recipe.model.neck.norm, recipe.model.box_head.norm, recipe.test.tta) == (True, True, True)
    assert recipe.model.backbone.options == {"avg_down": True}
    assert resolve("demo/seesaw", ["model.neck.norm=group", "data.flip=1"]).data.flip == 1


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


def test_sections_are_merged_and_values_replaced() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}
    assert merge(base, {"a": {"c": {"f": 3}}, "e": [3]}) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [3]}
    assert merge(base, {"a": 4}) == {"a": 4, "e": [1, 2]}
    assert merge(base, {}) == base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}  # left as it was
    other = merge({"loss": "seesaw", "normalized": True, "temperature": 9.0, "p": 0.1}, {"loss": "eql"})
    assert other == {"loss": "eql", "normalized": True, "temperature": 9.0, "threshold": 0.0011}
    assert merge(other, {"loss": "eql", "threshold": 0.5})["threshold"] == 0.5


def test_numbers_that_python_does_not_write() -> None:
    with pytest.raises(UserError, match=r"received a number of thousands of digits$"):
        changed(Recipe(name=""), {"schedule.epochs": -(10**5000)})
    with pytest.raises(UserError, match=r"^--set optimizer\.lr=0xf+: not valid YAML; write another value$"):
        override(Recipe(name=""), ["optimizer.lr=0x" + "f" * 5000])
