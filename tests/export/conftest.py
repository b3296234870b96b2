"""A tiny model, its ONNX file for pictures of any size, and the folder of both."""

from pathlib import Path

import numpy as np
import pytest
from exported import made_model
from PIL import Image
from tiny import assert_done, tailseg


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    return made_model(folder / "model.safetensors", "demo-table2/01-mask-rcnn")


@pytest.fixture(scope="session")
def onnx_file(model: Path) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = model.with_name("model.onnx")
    done = tailseg("export", model, "--format", "onnx", "--dynamic", "--out", out)
    assert_done(done)
    assert f"Written: {out} (" in done.stdout
    return out


@pytest.fixture(scope="session")
def photo(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((240, 180)).save(folder / "photo.png")
    return folder / "photo.png"
