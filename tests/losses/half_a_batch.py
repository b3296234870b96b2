"""One of two processes: half of a batch through every loss that keeps counts; writes what came out.

Run as ``python half_a_batch.py RANK RENDEZVOUS OUT``; `test_two_processes.py` compares.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tailseg.losses import EqualizationV2Classification, SeesawClassification, SeesawLoss

STEPS, ROWS, CLASSES, FEATURES = 3, 24, 9, 5


def batches() -> list[tuple[Tensor, Tensor]]:
    """Whole batches of features (ROWS, FEATURES) and labels; every half has as many RoIs."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES + 1, (ROWS,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def learn(loss: nn.Module, rows: slice, average: bool) -> dict[str, Tensor]:
    """A few SGD steps of a linear classifier; returns losses, last gradient, weights and the loss's state."""
    torch.manual_seed(0)
    alone = isinstance(loss, SeesawLoss)
    linear = nn.Linear(FEATURES, CLASSES if alone else loss.num_logits).double()
    values = []
    for features, labels in batches():
        features, labels = features[rows], labels[rows]
        if alone:
            total = loss(linear(features), labels % CLASSES)
        else:
            total = torch.stack(
                list(loss.loss(linear(features), labels, torch.ones_like(labels).bool()).values())
            ).sum()
        linear.zero_grad()
        total.backward()
        value = total.detach().clone()
        if average:  # as distributed training does
            for tensor in (value, *(p.grad for p in linear.parameters())):
                dist.all_reduce(tensor)
                tensor /= 2
        values.append(value)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter -= 0.5 * parameter.grad
    return {
        "losses": torch.stack(values),
        "grad": linear.weight.grad,
        "weight": linear.weight.data,
        **loss.state_dict(),
    }


def kinds() -> dict[str, nn.Module]:
    return {
        "seesaw": SeesawLoss(CLASSES),
        "compensated": SeesawLoss(CLASSES, q=2.0),
        "classification": SeesawClassification(CLASSES),
        "eql-v2": EqualizationV2Classification(CLASSES),
        "unsynchronised": SeesawLoss(CLASSES, sync_counts=False),
    }


if __name__ == "__main__":
    rank, rendezvous, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    alone = [dist.new_group([each]) for each in range(2)][rank]
    losses = kinds() | {"group of one": SeesawLoss(CLASSES, process_group=alone)}
    torch.save({name: learn(loss, half, average=True) for name, loss in losses.items()}, out)
    dist.destroy_process_group()
