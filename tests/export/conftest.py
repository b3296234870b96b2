"""A tiny model, its ONNX file for pictures of any size, and the folder of both."""

import os
from pathlib import Path

import numpy as np
import pytest
from exported import made_model
from filelock import FileLock
from PIL import Image
from tiny import assert_done, tailseg


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def between_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder in all of pytest's processes: exporting takes too long to be done in each."""
    own = tmp_path_factory.getbasetemp()
    found = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exported"
    found.mkdir(exist_ok=True)
    return found


@pytest.fixture(scope="session")
def model(between_workers: Path) -> Path:
    out = between_workers / "model.safetensors"
    with FileLock(between_workers / "model.lock"):
        return out if out.is_file() else made_model(out, "demo-table2/01-mask-rcnn")


@pytest.fixture(scope="session")
def onnx_file(model: Path) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = model.with_name("model.onnx")
    with FileLock(model.with_name("onnx.lock")):
        if not out.is_file():
            done = tailseg("export", model, "--format", "onnx", "--dynamic", "--out", out)
            assert_done(done)
            assert f"Written: {out} (" in done.stdout
    return out


@pytest.fixture(scope="session")
def photo(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((240, 180)).save(folder / "photo.png")
    return folder / "photo.png"
