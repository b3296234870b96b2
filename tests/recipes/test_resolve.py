from pathlib import Path

import pytest
import torch
import yaml
from recipe_stages import THREE_STAGES, plain_stage

from tailseg.checkpoint import save_model
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import diff, flatten, override, to_yaml


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
        ("optimizer: {lr: 2020-13-45}\n", "not valid YAML; fix the file"),
        ("model: &m {}\ndata: *m\n", "line 2 has the alias *m"),
        ("modle: {}\n", "'modle'; the nearest valid key is 'model"),
        ("model: {backbone: {name: 'hf-hub:a/b'}}\n", "its backbone 'hf-hub:a/b' comes from a hub or a folder"),
        ("model: {backbone: {name: ./evil}}\n", "name it on the command line with --set model.backbone.name=..."),
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
    ("name", "near"), [("table1/sesaw", "table1/seesaw"), ("Demo/seesaw", "demo/seesaw"), ("table1/eql.yml2", "eql")]
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name)
    message = str(caught.value)
    assert message.startswith(f"unknown recipe '{name}'; did you mean '")
    assert near in message
    assert "`tailseg recipes` lists them" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"name: \xff\n", "it is not a UTF-8 text; save it as one"),
        (b"a: b: c\n", "not valid YAML at line 1; fix the file"),
        (b"a: [\n", "not valid YAML at line 1; fix the file"),
    ],
)
def test_a_file_that_is_no_yaml_text(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        resolve(str(path))
    assert str(caught.value) == f"{path}: {fault}"


def test_a_file_is_named_after_itself_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo/seesaw\n")
    assert resolve(str(path)).name == "mine"
    path.write_text("extends: demo/seesaw\nname: yours\n")
    assert resolve(str(path)).name == "yours"
    path.write_text("data: {flip: 0}\n")
    assert diff(Recipe(name="x"), resolve(str(path))) == [("data.flip", 0.5, 0.0)]


@pytest.mark.parametrize("name", ["a\0.yaml", "a\0.safetensors", "a\0"])
def test_a_name_with_a_zero_byte(tmp_path: Path, name: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"extends": name}))
    for asked, place in ((str(file), f"{file}: extends "), (name, "")):
        with pytest.raises(UserError) as refused:
            resolve(asked)
        assert str(refused.value).startswith(place)
        assert "cannot be a name, as it has a zero byte; give a recipe, a file or a model" in str(refused.value)
