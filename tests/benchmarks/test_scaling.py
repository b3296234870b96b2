"""Bytes of a step and time on a ring, as `benchmarks/scaling.py` computes them."""

from pathlib import Path

import pytest
import torch

from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import scaling

    return scaling


def test_bytes_of_a_step(scaling):
    step = scaling.sent("table1/seesaw")
    with torch.device("meta"):
        detector = build_detector(resolve("table1/seesaw"), 1203)
    learning = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    # Float32 gradients and one call for the int64 counts of 1,203 classes; its batch norms are frozen.
    assert step == {"gradients": 4 * learning, "counts": 8 * 1203, "statistics": 0, "calls": 1}


def test_batch_statistics(scaling):
    step = scaling.sent("table2/02-sync-bn")
    # Norms that learn: those of ResNet-50's last three stages (blocks, and a shortcut each) and the mask head's four.
    layers = 4 * 3 + 1 + 6 * 3 + 1 + 3 * 3 + 1 + 4
    channels = 4 * 768 + 512 + 6 * 1536 + 1024 + 3 * 3072 + 2048 + 4 * 256
    # Forward count, sum and sum of squares in float64, backward two sums in float32.
    assert step["statistics"] == 8 * (2 * channels + layers) + 4 * 2 * channels
    assert step["calls"] == 2 * layers
    assert step["counts"] == 0


def test_on_a_ring(scaling):
    step = {"gradients": 800, "counts": 80, "statistics": 160, "calls": 3}
    found = scaling.on_a_ring(step, 4, 100.0, 0.5)
    # Each of four sends 2 * 3/4 of all bytes; a call takes half a second more.
    assert found["waits"] == pytest.approx(240 * 1.5 / 100 + 1.5)
    assert found["all"] == pytest.approx(800 * 1.5 / 100 + 0.5 + found["waits"])
