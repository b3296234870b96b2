import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tailseg


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("sklearn")
    examples = Path(__file__).resolve().parents[2] / "examples"
    spec = importlib.util.spec_from_file_location("example_timm_digits", examples / "timm_digits.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(examples))  # it imports its neighbour
        spec.loader.exec_module(module)
    return module


def test_targets_are_soft_and_counted_for_their_largest_share(example, monkeypatch):
    monkeypatch.setattr(example, "STEPS", 3)
    seen = []

    class Watched(tailseg.SeesawLoss):
        def forward(self, logits, labels):
            seen.append(labels)
            return super().forward(logits, labels)

    loss = Watched(10)
    example.accuracy(loss, seed=0)
    soft = torch.cat(seen)
    assert soft.shape == (3 * example.BATCH, 10)
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft)))
    assert (soft > 0).all()  # label smoothing
    assert torch.equal(loss.counts, soft.argmax(1).bincount(minlength=10))


def test_without_mitigation_it_is_timms_loss(example):
    logits = torch.randn(6, 10)
    soft = torch.rand(6, 10)
    soft /= soft.sum(1, keepdim=True)
    ours = tailseg.SeesawLoss(10, p=0)(logits, soft)
    torch.testing.assert_close(ours, example.SoftTargetCrossEntropy()(logits, soft))


@pytest.mark.nightly
def test_seesaw_finds_more_of_the_few_and_loses_little_of_the_many(example, monkeypatch):
    monkeypatch.setattr(example, "STEPS", 100)
    plain = example.accuracy(example.SoftTargetCrossEntropy(), seed=0)
    seesaw = example.accuracy(tailseg.SeesawLoss(10), seed=0)
    overall, many, few = (seesaw - plain).tolist()
    assert few > 2
    assert many > -5
    assert overall > 0


def test_one_seed_is_refused(example, capsys):
    with pytest.raises(SystemExit) as exit_info:
        example.main(["--seeds", "1"])
    assert exit_info.value.code == 2
    assert "at least 2 seeds, received 1" in capsys.readouterr().err
