import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tailseg


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "segmentation.py"
    spec = importlib.util.spec_from_file_location("example_segmentation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_long_tailed_and_regions_are_apart(example):
    generator = torch.Generator().manual_seed(0)
    images, labels = example.pictures(60, example.SHARES, torch.randperm(10, generator=generator), generator)
    assert images.shape == (60, 1, 40, 40)
    assert labels.shape == (60, 40, 40)
    counts = labels[labels != example.IGNORED].bincount(minlength=10)
    assert counts.min() > 0
    assert counts[0] > 10 * counts[9]
    # Neighbouring pixels of two classes never both have a label.
    left, right = labels[..., :-1], labels[..., 1:]
    assert not ((left != right) & (left != 255) & (right != 255)).any()
    assert 0.02 < (labels == 255).float().mean() < 0.4


def test_intersection_over_union_by_hand(example):
    labels = torch.tensor([[[0, 0, 1, 255]]])
    found = torch.tensor([[[0, 1, 1, 0]]])
    result = example.intersection_over_union(found, labels)
    assert result[:2].tolist() == [50, 50]
    assert (result[2:] == 0).all()


def test_pixels_that_are_not_ignored_are_counted(example, monkeypatch):
    monkeypatch.setattr(example, "STEPS", 3)
    seen = torch.zeros(10, dtype=torch.int64)

    class Watched(tailseg.SeesawLoss):
        def forward(self, logits, labels):
            seen.add_(labels[labels != 255].bincount(minlength=10))
            return super().forward(logits, labels)

    loss = Watched(10, ignore_index=255)
    example.result(loss, seed=0)
    assert torch.equal(loss.counts, seen)
    assert 0 < seen.sum() < 3 * example.BATCH * example.SIZE**2


def test_equal_losses_give_equal_results(example, monkeypatch):
    monkeypatch.setattr(example, "STEPS", 10)
    plain = example.result(torch.nn.CrossEntropyLoss(ignore_index=255), seed=1)
    without_mitigation = example.result(tailseg.SeesawLoss(10, p=0, ignore_index=255), seed=1)
    torch.testing.assert_close(plain, without_mitigation, rtol=0, atol=1.0)  # percent: sums round differently


@pytest.mark.nightly
def test_seesaw_finds_more_of_the_few(example, monkeypatch):
    monkeypatch.setattr(example, "STEPS", 120)
    plain = example.result(torch.nn.CrossEntropyLoss(ignore_index=255), seed=0)
    seesaw = example.result(tailseg.SeesawLoss(10, ignore_index=255), seed=0)
    assert seesaw[2] > plain[2]
    assert seesaw[0] > plain[0]
