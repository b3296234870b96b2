import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tailseg


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("sklearn")
    path = Path(__file__).resolve().parents[2] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("example_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_training_part_is_long_tailed_and_the_test_part_balanced(digits):
    images, labels, test_images, test_labels = digits.long_tailed_digits(seed=0)
    assert labels.bincount().tolist() == digits.SAMPLES == [120, 76, 48, 31, 19, 12, 8, 5, 3, 2]
    assert test_labels.bincount().tolist() == [50] * 10
    assert images.shape == (324, 64)
    assert test_images.shape == (500, 64)
    assert images.min() == 0
    assert images.max() == 1


def test_no_test_image_is_trained_on(digits):
    from sklearn.datasets import load_digits

    everything = [tuple(row) for row in (load_digits(return_X_y=True)[0] / 16).tolist()]
    assert len(set(everything)) == len(everything)  # so equal pixels mean the same sample
    images, _, test_images, _ = digits.long_tailed_digits(seed=1)
    assert not {tuple(row) for row in images.tolist()} & {tuple(row) for row in test_images.tolist()}


def test_each_seed_makes_another_digit_the_most_frequent(digits):
    from sklearn.datasets import load_digits

    pixels, names = load_digits(return_X_y=True)
    name_of = {tuple(row): name for row, name in zip((pixels / 16).tolist(), names.tolist(), strict=True)}
    first = []
    for seed in range(10):
        images, labels, _, _ = digits.long_tailed_digits(seed)
        of_rank_0 = {name_of[tuple(row)] for row in images[labels == 0].tolist()}
        assert len(of_rank_0) == 1
        first.append(of_rank_0.pop())
    assert len(set(first)) >= 5


def test_the_counts_are_the_training_labels_seen(digits, monkeypatch):
    monkeypatch.setattr(digits, "STEPS", 20)
    seen = torch.zeros(10, dtype=torch.int64)

    class Watched(tailseg.SeesawLoss):
        def forward(self, logits, labels):
            seen.index_add_(0, labels, torch.ones_like(labels))
            return super().forward(logits, labels)

    loss = Watched(10)
    digits.accuracy(loss, "linear", seed=0)
    assert seen.sum() == 20 * digits.BATCH
    assert torch.equal(loss.counts, seen)


def test_equal_losses_give_equal_accuracy(digits, monkeypatch):
    monkeypatch.setattr(digits, "STEPS", 50)
    plain = digits.accuracy(torch.nn.CrossEntropyLoss(), "linear", seed=2)
    without_mitigation = digits.accuracy(tailseg.SeesawLoss(10, p=0), "linear", seed=2)
    assert torch.allclose(plain, without_mitigation, atol=0.5)  # percent: the sums round differently


@pytest.mark.parametrize("classifier", ["linear", "normalised linear"])
def test_seesaw_finds_more_of_the_few_and_loses_little_of_the_many(digits, monkeypatch, classifier):
    monkeypatch.setattr(digits, "STEPS", 400)
    plain, seesaw = digits.compare(classifier, seeds=3)
    assert plain.shape == seesaw.shape == (3, 3)
    overall, many, few = (seesaw - plain).mean(dim=0).tolist()
    # Ten seeds: few +15.5 ± 5.1 and +8.5 ± 4.1 and up in each, many -0.2 and -0.1, all +4.9 and +2.9. After the
    # example's 1000 steps: few +9.5 ± 4.0 and +7.4 ± 2.7 and up in each, many -0.2 and -0.1, all +3.1 and +2.4.
    assert few > 2
    assert many > -3
    assert overall > 0


def test_the_table_has_a_row_for_each_loss_and_the_difference(digits, monkeypatch, capsys):
    monkeypatch.setattr(digits, "STEPS", 5)
    digits.main(["--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert "[120, 76, 48, 31, 19, 12, 8, 5, 3, 2]" in lines[0]
    assert [" ".join(line.split()[:-9]) for line in lines[4:]] == [
        f"{classifier} {row}"
        for classifier in ("linear", "normalised linear")
        for row in ("cross-entropy", "Seesaw", "paired difference")
    ]


def test_one_seed_is_refused(digits, capsys):
    with pytest.raises(SystemExit) as exit_info:
        digits.main(["--seeds", "1"])
    assert exit_info.value.code == 2
    assert "at least 2 seeds, received 1" in capsys.readouterr().err
