"""The header of a model file is read without its tensors, and without PyTorch."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tailseg.checkpoint import save_model
from tailseg.errors import UserError
from tailseg.recipes.model_header import read_header, recipe_in, unreadable
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe


def test_the_header_is_what_was_saved(tmp_path: Path) -> None:
    recipe = resolve("demo/seesaw", ["classifier.p=0.3"])
    path = tmp_path / "m.safetensors"
    save_model(path, {}, recipe, (), step=7, metrics={"segm": {"AP": 0.25, "APr": None}})
    header = read_header(path)
    assert (header["step"], header["metrics"]) == (7, {"segm": {"AP": 0.25, "APr": None}})
    assert recipe_in(header, path) == recipe


@pytest.mark.parametrize("content", [b"", bytes(100), b"noise" * 99, (2**62).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: is not a tailseg checkpoint .no valid safetensors file.; give one"):
        read_header(path)


@pytest.mark.parametrize("about", [None, {"format": "pt"}])
def test_somebody_elses_safetensors_file(about: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": np.ones(1)}, path, about)
    with pytest.raises(UserError, match=f"^{path}: is a safetensors file but not .* .it carries no recipe.; give one"):
        read_header(path)


def test_a_folder_or_nothing_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=f"^{path}: there is no such file; give the path of a model"):
            read_header(path)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ({}, "there is no recipe"),
        ({"recipe": None}, "recipe: input should be"),
        ({"recipe": {}}, "name: field required"),
        ({"recipe": {"name": "x", "future": 1}}, "unknown key 'future'; the nearest valid key is '"),
        (
            {"recipe": {"name": "x", "data": {"test_short_edge": 10**6}}},
            "data.test_short_edge: input should",
        ),
        ({"recipe": {"name": "x", "test": {"tta_long_edges": [10**6]}}}, "test.tta_long_edges.0: input should be less"),
        (
            {"recipe": {"name": "x", "model": {"rpn": {"pre_nms_test": 10**9}}}},
            "model.rpn.pre_nms_test: input",
        ),
        (
            {"recipe": {"name": "x", "model": {"neck": {"channels": 10**6}}}},
            "model.neck.channels: input should",
        ),
        (
            {"recipe": {"name": "x", "model": {"stages": [{}] * 1000}}},
            "model.stages: tuple should have at most 16",
        ),
        (
            {"recipe": {"name": "x", "model": {"backbone": {"options": {"checkpoint_path": "evil.pth"}}}}},
            "model.backbone.",
        ),
    ],
)
def test_a_recipe_of_another_version_or_hand(rest: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_in({"tailseg": "99.0", **rest}, Path("m"))
    assert str(caught.value).startswith(f"m: its recipe or categories cannot be read ({reason}")
    assert str(caught.value).endswith("); it was written by tailseg 99.0; train or convert it again with this version")


@pytest.mark.parametrize("version", [None, 3, "1\x1b[2J", "x" * 50])
def test_a_version_that_is_none_is_not_printed(version: object) -> None:
    message = str(unreadable({"tailseg": version}, Path("m"), "reason"))
    assert "it was written by tailseg of an unknown version; " in message


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:/tmp/evil", "evil/model", "..\\evil"])
def test_a_backbone_from_elsewhere(name: str) -> None:
    recipe = {"name": "x", "model": {"backbone": {"name": name}}}
    with pytest.raises(UserError, match=r"^m: its backbone '.*' comes from a hub or a folder, .* such as resnet50$"):
        recipe_in({"tailseg": "1", "recipe": recipe}, Path("m"))
    assert Recipe.model_validate(recipe).model.backbone.name == name  # as of the command line


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, "1" * 5000, "nil"])
def test_metadata_that_are_no_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": np.ones(1)}, path, {"tailseg": '"1"', "recipe": text})
    with pytest.raises(UserError, match=f"^{path}: its metadata 'recipe' is not valid JSON; the file is damaged"):
        read_header(path)
