"""Losses on the validation split (`training.validation_loss`): measured without leaving a trace in the run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.dataset import DetectionDataset
from tailseg.data.loading import eval_loader, worker_count
from tailseg.data.transforms import fit_transform
from tailseg.progress import progress_bar
from tailseg.recipes.schema import Recipe
from tailseg.training.learner import Learner, seed_of_step


@torch.no_grad()
def validation_sums(
    learner: Learner,
    trained: nn.Module,
    val: Annotations,
    recipe: Recipe,
    divisor: int,
    device: torch.device,
    *,
    rank: int,
    world: int,
    show: bool,
) -> dict[str, float]:
    """Losses of this process's share of a split, each summed over its images, and their number as ``images``.

    Images are resized as for an evaluation, and batch norm uses its learnt statistics. The RoIs that the losses look at
    are sampled as in training, by a seed of the batch's own: so two evaluations look at the same priors. Random
    numbers, counts, statistics and the mode of the modules are afterwards as they were.

    Args:
        learner: of the run.
        trained: the state of what it trains that is measured, on its device.
        val: the split; images without objects count too.
        recipe: of the run.
        divisor: images are padded to multiples of it.
        device: of ``trained``.
        rank: this process.
        world: number of processes.
        show: show progress.
    """
    data = recipe.data
    transform = fit_transform(data.test_short_edge, data.long_edge)
    dataset = DetectionDataset(val, transform, drop_empty=False, mask_grid=data.mask_grid)
    # Finetuning samples the RoIs of each image by itself.
    batch_size = 1 if recipe.finetune.enabled else data.batch
    loader = eval_loader(dataset, batch_size, rank, world, worker_count(data.workers, device, world), divisor)
    exact = torch.float32 if device.type == "mps" else torch.float64
    sums: dict[str, Tensor] = {}
    images = 0
    modes = [(module, module.training) for module in trained.modules()]
    trained.eval()
    try:
        with progress_bar("validation loss", len(dataset), show=show) as advance:
            for number, batch in enumerate(loader):
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
                    losses = learner.losses_with(trained, batch.to(device), seed_of_step(0, number, rank))
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.to(exact) * len(batch)
                images += len(batch)
                advance(min(images * world, len(dataset)))
    finally:
        for module, mode in modes:
            module.training = mode
    return {"images": images, **{name: float(value) for name, value in sums.items()}}
