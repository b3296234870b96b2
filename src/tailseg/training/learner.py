"""The part of a detector that a run trains, and the batches that it learns from."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from tailseg.data.dataset import DetectionDataset
from tailseg.data.loading import train_loader, worker_count
from tailseg.data.sampling import TrainSampler
from tailseg.errors import UserError
from tailseg.model.detector import Detector
from tailseg.recipes.schema import Recipe
from tailseg.structures import Batch


class Learner(Protocol):
    """Interface to the loop, of `WholeDetector` and of `tailseg.training.finetune.Finetuning`."""

    trained: nn.Module  # called with a batch it gives named scalar losses

    def prepare(self, epochs: range, fabric: Fabric, stop: Sequence[int], *, show: bool) -> bool:
        """Make what these epochs need; False if the run was told to ``stop`` meanwhile (no longer empty)."""

    def batches(self, start_step: int) -> Generator[Any, None, None]:
        """The training batches of this process from a step of the sampler on, without end."""

    def detector_with(self, trained: nn.Module) -> Detector:
        """The detector with another state of what is trained, such as its moving average."""

    def losses_with(self, trained: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Named losses of a batch on the device, with another state of what is trained, in its mode.

        Args:
            trained: that state.
            batch: of images with their objects.
            seed: of the sampling of RoIs.
        """

    def finish(self) -> None:
        """Remove what only an unfinished run needs."""


class WholeDetector:
    """The ordinary case: the detector itself is trained on batches of images.

    Args:
        detector: to train.
        recipe, dataset, sampler: of the run.
        pin_memory: put batches into page-locked memory.
        few_shapes: of batches, see `tailseg.data.batches.collate`.
    """

    def __init__(
        self, detector: Detector, recipe: Recipe, dataset: DetectionDataset, sampler: TrainSampler, *,
        pin_memory: bool, few_shapes: bool = False,
    ) -> None:  # fmt: skip
        self.detector = detector
        self.trained: nn.Module = detector
        self.recipe = recipe
        self.dataset = dataset
        self.sampler = sampler
        self.pin_memory = pin_memory
        self.few_shapes = few_shapes

    def prepare(self, epochs: range, fabric: Fabric, stop: Sequence[int], *, show: bool) -> bool:
        """There is nothing to make."""
        return True

    def batches(self, start_step: int) -> Generator[Any, None, None]:
        """The training batches of this process from a step of the sampler on, without end."""
        workers = worker_count(self.recipe.data.workers, self.detector.pixel_mean.device, self.sampler.world)
        loader = train_loader(
            self.dataset, self.sampler, start_step, workers, pin_memory=self.pin_memory, divisor=self.detector.divisor,
            few_shapes=self.few_shapes,
        )  # fmt: skip
        return iter(loader)

    def detector_with(self, trained: nn.Module) -> Detector:
        """``trained`` itself: it is a whole detector."""
        assert isinstance(trained, Detector)
        return trained

    def losses_with(self, trained: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """The losses of ``trained``, which samples RoIs in its forward pass, by this seed."""
        with random_numbers(seed, batch.images.device):
            losses: dict[str, Tensor] = trained(batch)
        return losses

    def finish(self) -> None:
        """There is nothing to remove."""


@contextmanager
def random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of this seed; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def seed_of_step(seed: int, step: int, rank: int) -> int:
    """One generator seed out of three numbers, without collisions for fewer than 2^20 processes."""
    return (seed * 1_000_003 + step) * (1 << 20) % (1 << 62) + rank


def copy_values(given: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
    """Copy the values of tensors, on one device, into others of the same shapes and types: a launch for each type.

    Tensors of unlike types in one call would be copied one by one, in as many launches.
    """
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(given, taken, strict=True):
        sources, targets = groups.setdefault(source.dtype, ([], []))
        sources.append(source)
        targets.append(target)
    for sources, targets in groups.values():
        torch._foreach_copy_(targets, sources)


def losses_of(model: nn.Module, batch: Any, batch_per_device: int) -> dict[str, Tensor]:
    """Named losses of a batch.

    Raises:
        UserError: a batch norm that learns saw a single value.
    """
    try:
        losses: dict[str, Tensor] = model(batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"data.batch_per_device = {batch_per_device}: a batch norm that learns saw one value, which has no "
            "variance; set data.batch_per_device=2, or larger images, or model.backbone.train_norm=false"
        ) from error
    return losses
