"""The header of a model file is read without its tensors, and without PyTorch."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tailseg.checkpoint import save_model
from tailseg.errors import UserError
from tailseg.recipes.model_header import read_header, recipe_in, unreadable
from tailseg.recipes.resolve import resolve


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


@pytest.mark.parametrize("rest", [{}, {"recipe": None}, {"recipe": {}}, {"recipe": {"name": "x", "future": 1}}])
def test_a_recipe_of_another_version(rest: dict[str, object]) -> None:
    header = {"tailseg": "99.0", **rest}
    with pytest.raises(UserError) as caught:
        recipe_in(header, Path("m"))
    assert str(caught.value) == str(unreadable(header, Path("m")))
    assert str(caught.value).startswith("m: its recipe or categories cannot be read; it was written by tailseg 99.0; ")
