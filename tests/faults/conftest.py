"""A small set and an undisturbed run on it, to compare disturbed ones with."""

from pathlib import Path

import pytest
from fault_tools import run

from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SyntheticSettings(classes=4, train_images=12, val_images=4, size=64, rarest=3)
    folder = tmp_path_factory.mktemp("set") / "data"
    write_synthetic(folder, settings)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out, data) == 0
    return out
