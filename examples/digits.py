"""Seesaw Loss in a classifier of handwritten digits: ten classes, 120 samples of the most frequent, 2 of the rarest.

    pip install tailseg scikit-learn && python examples/digits.py [--seeds N]

The same network, with the same initial weights, batches, optimiser and number of steps, learns once with
cross-entropy and once with Seesaw Loss. Each seed draws again which digit is frequent and which is rare.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tailseg

CLASSES = 10
MOST, FEWEST = 120, 2  # training samples of the most frequent and of the rarest digit
TEST = 50  # held-out samples of every digit
BATCH, STEPS, LEARNING_RATE = 32, 1000, 3e-3  # chosen for cross-entropy, on seeds 100 to 104

SAMPLES = [round(MOST * (FEWEST / MOST) ** (rank / (CLASSES - 1))) for rank in range(CLASSES)]
GROUPS = {"all": slice(0, 10), "many": slice(0, 3), "few": slice(7, 10)}  # of classes, the most frequent first
CLASSIFIERS = {"linear": nn.Linear, "normalised linear": tailseg.NormalizedLinear}


def long_tailed_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 64), labels (N,), test images (500, 64) and labels (500,); 0 labels the most frequent."""
    images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for digit, samples in zip(torch.randperm(CLASSES, generator=generator), SAMPLES, strict=True):
        own = images[digits == digit].float() / 16
        own = own[torch.randperm(len(own), generator=generator)]
        test.append(own[:TEST])
        train.append(own[TEST : TEST + samples])
    labels = torch.arange(CLASSES)
    train_labels = labels.repeat_interleave(torch.tensor(SAMPLES))
    return torch.cat(train), train_labels, torch.cat(test), labels.repeat_interleave(TEST)


def fit(network: nn.Module, loss: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train ``network`` for STEPS random batches; nothing in here knows which loss it is."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH,))
        value = loss(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def accuracy(loss: nn.Module, classifier: str, seed: int) -> Tensor:
    """(3,) accuracy in percent on all, many and few classes after training with ``loss``."""
    images, labels, test_images, test_labels = long_tailed_digits(seed)
    torch.manual_seed(seed)  # the weights at the start and the batches are those of every other loss
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), CLASSIFIERS[classifier](128, CLASSES))
    fit(network, loss, images, labels)
    with torch.no_grad():
        right = network(test_images).argmax(dim=1) == test_labels
    by_class = right.float().reshape(CLASSES, TEST).mean(dim=1)
    return torch.stack([100 * by_class[classes].mean() for classes in GROUPS.values()])


def compare(classifier: str, seeds: int) -> tuple[Tensor, Tensor]:
    """Accuracies (seeds, 3) of cross-entropy and of Seesaw Loss."""
    plain = [accuracy(nn.CrossEntropyLoss(), classifier, seed) for seed in range(seeds)]
    seesaw = [accuracy(tailseg.SeesawLoss(CLASSES, p=0.8, q=0.0), classifier, seed) for seed in range(seeds)]
    return torch.stack(plain), torch.stack(seesaw)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Seesaw Loss against cross-entropy on long-tailed handwritten digits.")
    parser.add_argument("--seeds", type=int, default=10, help="draws of the data, at least 2 (default 10)")
    seeds = parser.parse_args(arguments).seeds
    if seeds < 2:
        parser.error(f"expected at least 2 seeds, received {seeds}")
    print(f"training samples of the ten classes: {SAMPLES}; held out: {TEST} each")
    print(f"accuracy in percent, mean ± standard deviation of {seeds} seeds\n")
    print(f"{'classifier':18} {'loss':20}" + "".join(f"{group:>14}" for group in GROUPS))
    for classifier in CLASSIFIERS:
        plain, seesaw = compare(classifier, seeds)
        rows = {"cross-entropy": plain, "Seesaw": seesaw, "paired difference": seesaw - plain}
        for name, values in rows.items():
            spreads = zip(values.mean(dim=0).tolist(), values.std(dim=0).tolist(), strict=True)
            cells = "".join(f"{f'{mean:.1f} ± {deviation:.1f}':>14}" for mean, deviation in spreads)
            print(f"{classifier:18} {name:20}{cells}")


if __name__ == "__main__":
    main()
