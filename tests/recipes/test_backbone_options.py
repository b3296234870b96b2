import inspect
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch

from tailseg.errors import UserError
from tailseg.recipes.backbone_options import KNOWN, reaches_outside
from tailseg.recipes.model_section import BackboneRecipe
from tailseg.recipes.resolve import resolve


@pytest.mark.parametrize(
    "options",
    [
        {"channels": [8, 16, 24, 32], "zero_init_last": False},
        {"cardinality": 32, "base_width": 4},
        {"drop_path_rate": 0.2, "act_layer": "silu", "norm_layer": None},
    ],
)
def test_what_shapes_a_network_is_allowed(options: dict[str, object]) -> None:
    assert BackboneRecipe(options=options).options == options


@pytest.mark.parametrize(
    "option",
    [
        "checkpoint_path=evil.pth",
        "pretrained_cfg={file: evil.pth}",
        "pretrained_cfg_overlay={url: evil}",
        "pretrained=true",
        "cache_dir=/tmp",
        "features_only=false",
        "in_chans=4",
        "scriptable=true",
    ],
)
def test_what_opens_files_is_refused(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(UserError, match=f"model.backbone.options: '{name}' is no option that a recipe may"):
        resolve("demo/seesaw", [f"model.backbone.options.{option}"])


@pytest.mark.parametrize(
    "option",
    ["channels=1000000000", "channels=[[1]]", "channels={a: 1}", "drop_rate=x", "act_layer=os.system", "dims=[.inf]"],
)
def test_values_of_another_kind(option: str) -> None:
    with pytest.raises(UserError, match=r"model\.backbone\.options: \w+ must be a"):
        resolve("demo/seesaw", [f"model.backbone.options.{option}"])


def test_no_option_is_one_that_timm_itself_takes() -> None:
    assert not KNOWN & inspect.signature(timm.create_model).parameters.keys()


def test_names_that_reach_outside() -> None:
    assert [reaches_outside(name) for name in ("resnet50", "resnet50.a1_in1k", "hf-hub:a/b", "a/b", "a\\b")] == [
        *(False, False),
        *(True, True, True),
    ]


def test_timm_loads_weights_only(tmp_path: Path) -> None:
    """The lower bound in pyproject.toml is the first release that does."""
    assert tuple(int(part) for part in version("timm").split(".")[:3]) >= (1, 0, 26)
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> object:
            return subprocess.call, (["touch", str(marker)],)

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model("resnet18", checkpoint_path=str(tmp_path / "evil.pth"))
    assert not marker.exists()
