"""A model and a picture."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from predictions import rectangles, save_random_model

import tailseg


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of random weights."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_random_model(path)
    return path


@pytest.fixture(scope="session")
def model(path: Path) -> tailseg.Model:
    return tailseg.load(path, "cpu")


@pytest.fixture
def picture() -> NDArray[np.uint8]:
    return rectangles()
