"""What a recipe leaves to the machine (``auto``): the images of a batch and the precision."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.batches import coarser, rounded_rows
from tailseg.data.images import fitted_size
from tailseg.data.sources import DataSplits
from tailseg.errors import UserError
from tailseg.losses.equalization import EqualizationV2Classification
from tailseg.losses.seesaw import SeesawLoss
from tailseg.model.build import build_detector
from tailseg.recipes.data_section import DataRecipe
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed
from tailseg.structures import Batch
from tailseg.training.class_statistics import class_statistics
from tailseg.training.distributed import first_trouble, worst
from tailseg.training.graphs import has_graphs

logger = logging.getLogger(__name__)

ON_A_CPU = 4  # images of a batch
SHARE = 0.85  # of the free memory; the rest is for the optimiser's temporaries and what falls between blocks
STATES = {"sgd": 1, "adamw": 2}  # tensors that an optimiser keeps of each parameter
Measure = Callable[[int], int | None]  # bytes that a step with so many images takes; None: more than there are


def settled(recipe: Recipe, fabric: Fabric, data: DataSplits, out: Path, *, resume: bool) -> Recipe:
    """The recipe with numbers in place of ``auto``, the same in all processes.

    A run that is resumed keeps what it began with. The batch is the largest whose step fits into the free memory of
    every GPU, of no more images than `optimizer.reference_batch` in all, for which the learning rate was chosen.

    Args:
        recipe: as asked for.
        fabric: launched.
        data: the splits.
        out: the run's folder.
        resume: it holds the run.

    Raises:
        UserError: not even one image fits into a GPU.
    """
    assert data.train is not None
    wanted = {"data.batch_per_device": recipe.data.batch_per_device, "training.precision": recipe.training.precision}
    keys = [key for key, value in wanted.items() if value == "auto"]
    if not keys:
        return recipe
    path = out / "recipe.yaml"
    if resume and path.is_file():
        before = resolve(str(path))
        found = {
            "data.batch_per_device": before.data.batch_per_device,
            "training.precision": before.training.precision,
        }
        return changed(recipe, {key: found[key] for key in keys})
    on_gpu, speaks = fabric.device.type == "cuda", fabric.global_rank == 0
    if "training.precision" in keys:
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        recipe = changed(recipe, {"training.precision": precision})
        if speaks:
            logger.info("Precision: %s (training.precision=auto).", precision)
    if "data.batch_per_device" in keys:
        turns = fabric.world_size * recipe.training.accumulate
        most = max(1, min(recipe.optimizer.reference_batch // turns, len(data.train)))
        batch = min(ON_A_CPU, most)
        if on_gpu:
            free = torch.cuda.mem_get_info(fabric.device)[0]
            with_one = StepMemory(recipe, data.train, fabric.device, graphs=has_graphs(recipe, fabric))
            trouble = ""
            try:
                batch = largest_batch(with_one, most, int(SHARE * free), with_one.place)
            except UserError as error:
                trouble = str(error)
            if trouble := first_trouble(fabric, trouble):
                raise UserError(trouble)
            batch = -worst(fabric, -batch)
        recipe = changed(recipe, {"data.batch_per_device": batch})
        if speaks:
            how = ", the largest that fits" if on_gpu and batch < most else ""
            bound = f"at most {most}, so that a step has no more than optimizer.reference_batch"
            logger.info("Batch: %d images a process%s (data.batch_per_device=auto; %s).", batch, how, bound)
    return recipe


def largest_batch(memory: Measure, most: int, budget: int, place: str = "") -> int:
    """The largest number of images, up to ``most``, whose step takes no more than ``budget`` bytes.

    Memory is nearly linear in the images, so two measurements say where to look and a third one makes sure.

    Raises:
        UserError: one image takes more; begins with ``place``.
    """

    def fits(number: int) -> int | None:
        taken = memory(number)
        return taken if taken is not None and taken <= budget else None

    one = fits(1)
    if one is None:
        raise UserError(
            f"{place}: a training step with one image does not fit into the free memory of the GPU "
            f"({budget / SHARE / 2**30:.1f} GiB); lower data.short_edges and data.long_edge, or set "
            "model.backbone.checkpointing=true"
        )
    two = fits(2) if most > 1 else None
    if two is None:
        return 1
    number = most if two <= one else min(most, 1 + (budget - one) // (two - one))
    while number > 2 and fits(number) is None:
        number -= max(1, number // 8)
    return number


class StepMemory:
    """Bytes that a training step takes on a GPU, by the number of its images; the worst case of a data set.

    Images are the largest of the set at the recipe's largest size, each with as many objects as the fullest has.

    Args:
        recipe: of the run.
        train: the training split.
        device: a CUDA GPU.
        graphs: batches have the few shapes of CUDA graphs, whose memory lies beside that of a step without.
    """

    def __init__(self, recipe: Recipe, train: Annotations, device: torch.device, *, graphs: bool = False) -> None:
        self.recipe = recipe
        self.device = device
        self.place = recipe.name
        self.classes = len(train.categories)
        self.statistics = class_statistics(train, keep_empty=recipe.data.keep_empty)
        starts = np.concatenate([[0], np.cumsum(train.trained)])[train.first_annotation]
        objects = int(np.diff(starts).max(initial=1))
        self.objects = rounded_rows(objects) if graphs else objects
        self.graphs = graphs
        self.image_hw = largest_hw(train, recipe.data)

    def __call__(self, number: int) -> int | None:
        """The peak of a step; None where it ran out of memory."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            self._step(number)
            taken = torch.cuda.max_memory_allocated(self.device) - before
            return 2 * taken if self.graphs else taken
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def _step(self, number: int) -> None:
        detector = build_detector(self.recipe, self.classes, self.statistics).to(self.device)
        detector = detector.to(memory_format=torch.channels_last).train()
        for part in detector.modules():
            if isinstance(part, SeesawLoss | EqualizationV2Classification):
                part.sync_counts = False  # each process measures for itself, and no two as often
        trained = [p for p in detector.parameters() if p.requires_grad]
        copies = STATES[self.recipe.optimizer.name] + (self.recipe.training.ema is not None)
        kept = [torch.empty_like(p) for p in trained for _ in range(copies)]
        divisor = coarser(detector.divisor) if self.graphs else detector.divisor
        batch = full_batch(number, self.image_hw, divisor, self.objects, self.classes, self.recipe.data)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.training.precision == "bf16"):
            losses = detector(batch.to(self.device))
        torch.stack(list(losses.values())).sum().backward()
        del kept


def largest_hw(train: Annotations, recipe: DataRecipe) -> tuple[int, int]:
    """Sides (height, width) in pixels that the largest batch of training images has: of portraits, or of landscapes."""
    short, long = max(recipe.short_edges), recipe.long_edge
    if recipe.long_edges is not None:
        short = long = recipe.long_edges[1]
    sizes = {(int(h), int(w)) for h, w in np.unique(train.image_sizes, axis=0)}
    limit = recipe.crop or max(short, long)
    shapes = [tuple(min(side, limit) for side in fitted_size(hw, short, long)) for hw in sizes]
    tall = [shape for hw, shape in zip(sizes, shapes, strict=True) if hw[1] < hw[0]]
    wide = [shape for hw, shape in zip(sizes, shapes, strict=True) if hw[1] >= hw[0]]
    together = [(max(h for h, _ in group), max(w for _, w in group)) for group in (tall, wide) if group]
    return max(together, key=lambda hw: hw[0] * hw[1])


def full_batch(
    number: int, image_hw: tuple[int, int], divisor: int, objects: int, classes: int, recipe: DataRecipe
) -> Batch:
    """A batch of black images of one size, each with so many objects, that takes as much memory as any real one."""
    height, width = (-(-side // divisor) * divisor for side in image_hw)
    sizes = torch.tensor([image_hw]).expand(number, 2).contiguous()
    boxes = torch.tensor([0.0, 0.0, image_hw[1] / 2, image_hw[0] / 2]).expand(number, objects, 4).contiguous()
    return Batch(
        images=torch.zeros(number, 3, height, width, dtype=torch.uint8),
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=torch.arange(number),
        boxes=boxes,
        labels=torch.zeros(number, objects, dtype=torch.int64),
        valid=torch.ones(number, objects, dtype=torch.bool),
        masks=torch.zeros(number, objects, recipe.mask_grid + 2, recipe.mask_grid + 2, dtype=torch.uint8),
        mask_frames=boxes,
        absent=torch.zeros(number, classes, dtype=torch.bool),
        ignored=torch.zeros(number, 0, 0, dtype=torch.uint8),
    )
