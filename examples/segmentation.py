"""Seesaw Loss in semantic segmentation: every pixel is a sample, and pixels between two regions are ignored.

    pip install tailseg && python examples/segmentation.py [--seeds N]

Pictures are generated: regions with stripes in one of ten directions, their class, under noise. In training the most
frequent class has 60 times the regions of the rarest; held-out pictures have as many of each. The same small network,
from the same weights and with the same batches, learns once with cross-entropy and once with Seesaw Loss.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tailseg

CLASSES, IGNORED = 10, 255
SIZE, REGIONS = 40, 8  # pixels a side; regions of a picture
PICTURES, HELD_OUT = 80, 60
SHARES = 60.0 ** -(torch.arange(CLASSES) / (CLASSES - 1))  # of regions, the most frequent class first
BATCH, STEPS, LEARNING_RATE = 8, 400, 1e-2  # chosen for cross-entropy, on seeds 100 and 101
GROUPS = {"all": slice(0, 10), "many": slice(0, 3), "few": slice(7, 10)}


def pictures(count: int, shares: Tensor, directions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, SIZE, SIZE) and labels (count, SIZE, SIZE), IGNORED where regions meet."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)  # (SIZE, SIZE, 2)
    centres = torch.rand(count, REGIONS, 2, generator=generator) * SIZE
    distances = (grid[None, :, :, None] - centres[:, None, None]).norm(dim=-1)  # (count, SIZE, SIZE, REGIONS)
    nearest = distances.topk(2, largest=False)
    classes = shares.multinomial(count * REGIONS, replacement=True, generator=generator).view(count, REGIONS)
    labels = classes.gather(1, nearest.indices[..., 0].flatten(1)).view(count, SIZE, SIZE)
    angles = directions[labels] * (math.pi / CLASSES)
    phases = (grid * torch.stack([angles.sin(), angles.cos()], dim=-1)).sum(-1) * 1.2
    noise = torch.randn(phases.shape, generator=generator)
    labels[nearest.values[..., 1] - nearest.values[..., 0] < 1] = IGNORED
    return (phases.sin() + noise).unsqueeze(1), labels


def network() -> nn.Sequential:
    """Logits (N, CLASSES, SIZE, SIZE) of pictures (N, 1, SIZE, SIZE)."""
    layers: list[nn.Module] = []
    for channels, dilation in ((1, 1), (24, 1), (24, 2), (24, 2)):
        layers += [nn.Conv2d(channels, 24, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(*layers, tailseg.NormalizedConv2d(24, CLASSES, 1))


def intersection_over_union(found: Tensor, labels: Tensor) -> Tensor:
    """(CLASSES,) in percent, over all pixels that are not ignored."""
    judged = labels != IGNORED
    truth, answer = (F.one_hot(one[judged], CLASSES).bool() for one in (labels, found))
    return 100 * (truth & answer).sum(0) / (truth | answer).sum(0).clamp(min=1)


def result(loss: nn.Module, seed: int) -> Tensor:
    """(3,) mean intersection over union in percent of all, many and few classes after training with ``loss``."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randperm(CLASSES, generator=generator)  # another class is rare with each seed
    images, labels = pictures(PICTURES, SHARES, directions, generator)
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        batch = torch.randint(PICTURES, (BATCH,))
        value = loss(model(images[batch]), labels[batch])  # (N, C, H, W) and (N, H, W), as F.cross_entropy
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    images, labels = pictures(HELD_OUT, torch.ones(CLASSES), directions, generator)
    with torch.no_grad():
        found = model.eval()(images).argmax(dim=1)
    by_class = intersection_over_union(found, labels)
    return torch.stack([by_class[classes].mean() for classes in GROUPS.values()])


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Seesaw Loss against cross-entropy in segmentation.")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the data, at least 2 (default 3)")
    seeds = parser.parse_args(arguments).seeds
    if seeds < 2:
        parser.error(f"expected at least 2 seeds, received {seeds}")
    print(f"intersection over union in percent, mean ± standard deviation of {seeds} seeds\n")
    print(f"{'loss':20}" + "".join(f"{group:>14}" for group in GROUPS))
    plain = torch.stack([result(nn.CrossEntropyLoss(ignore_index=IGNORED), seed) for seed in range(seeds)])
    seesaw = torch.stack([result(tailseg.SeesawLoss(CLASSES, ignore_index=IGNORED), seed) for seed in range(seeds)])
    for name, values in {"cross-entropy": plain, "Seesaw": seesaw, "paired difference": seesaw - plain}.items():
        spreads = zip(values.mean(dim=0).tolist(), values.std(dim=0).tolist(), strict=True)
        print(f"{name:20}" + "".join(f"{f'{mean:.1f} ± {deviation:.1f}':>14}" for mean, deviation in spreads))


if __name__ == "__main__":
    main()
