"""Finetuning a second classification branch in each stage of a frozen model (report, section 2.2).

All but the branches is in evaluation mode and gets no gradient: a step computes the RoIs' class features as training
does, and the branches learn from those alone. The frozen part takes the images one by one, each padded for itself and
with random numbers of its own: so what the branches see of a sample depends on its image and its seed, not on what
else is in the batch (whose size would change padding, random numbers, and with the order of sums the last digits).
That is what lets `finetune.cache` keep it. The branches then see the RoIs of all images of the process at once.

Letters: R RoIs, F class features.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from tailseg.data.batches import collate
from tailseg.data.dataset import DetectionDataset
from tailseg.data.loading import Pairs, TrainPlan, plan_loader, worker_count
from tailseg.data.sampling import TrainSampler
from tailseg.errors import UserError
from tailseg.model.box_head import ClassBranch
from tailseg.model.detector import Detector, Stage
from tailseg.model.ignored_regions import IgnoredRegions
from tailseg.progress import progress_bar
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import flatten
from tailseg.structures import Batch
from tailseg.threads import read_ahead
from tailseg.training.distributed import first_trouble, worst
from tailseg.training.feature_cache import (
    FeatureCache,
    digest_of_annotations,
    digest_of_tensors,
    readable,
    require_room,
)
from tailseg.training.learner import random_numbers

logger = logging.getLogger(__name__)

GOING_ON, STOPPED, IN_TROUBLE = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassInputs:
    """Inputs and labels of one branch."""

    features: Tensor  # (R, F) float32, or bfloat16 where the branches compute in it
    labels: Tensor  # (R,) int64 in [0, C], C = background
    valid: Tensor  # (R,) bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BranchInputs:
    """Inputs and labels of the branches, stage by stage."""

    stages: tuple[ClassInputs, ...]

    def to(self, device: torch.device | str) -> BranchInputs:
        """The same on ``device``; from pinned memory the copies do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> BranchInputs:
        """The same in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> BranchInputs:
        changed = (
            ClassInputs(features=change(own.features), labels=change(own.labels), valid=change(own.valid))
            for own in self.stages
        )
        return BranchInputs(stages=tuple(changed))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as in a file of the cache."""
        return {f"{n}.{name}": getattr(own, name) for n, own in enumerate(self.stages) for name in NAMES}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> BranchInputs:
        """The inputs of such tensors: the inverse of `tensors`."""
        count = len(tensors) // len(NAMES)
        return BranchInputs(
            stages=tuple(ClassInputs(**{name: tensors[f"{n}.{name}"] for name in NAMES}) for n in range(count))
        )


NAMES = ("features", "labels", "valid")


def join(parts: Sequence[BranchInputs]) -> BranchInputs:
    """The RoIs of all parts, at least one, in one."""
    joined = (
        ClassInputs(**{name: torch.cat([getattr(own, name) for own in stage]) for name in NAMES})
        for stage in zip(*(part.stages for part in parts), strict=True)
    )
    return BranchInputs(stages=tuple(joined))


class Branches(nn.Module):
    """The second branches of all stages, the part of a detector that finetuning trains.

    Args:
        detector: with second branches; they stay its own too.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_branch(stage) for stage in _stages(detector))
        self.weights = [stage.weight for stage in _stages(detector)]

    def forward(self, inputs: BranchInputs) -> dict[str, Tensor]:
        """Named scalar losses: those of each classification, times its stage's weight."""
        losses: dict[str, Tensor] = {}
        for number, (branch, weight, own) in enumerate(zip(self.branches, self.weights, inputs.stages, strict=True), 1):
            assert isinstance(branch, ClassBranch)
            prefix = f"stage{number}." if len(self.weights) > 1 else ""
            found = branch.classification.loss(branch(own.features), own.labels, own.valid)
            losses |= {prefix + name: value * weight for name, value in found.items()}
        return losses


class Frozen:
    """All of a detector but its second branches: in evaluation mode and without gradients from now on.

    Args:
        detector: on its device; changed in place.
        bf16: compute in bfloat16.
    """

    def __init__(self, detector: Detector, *, bf16: bool) -> None:
        self.detector = detector.requires_grad_(False).eval()
        self.device = detector.pixel_mean.device
        self.bf16 = bf16

    @torch.no_grad()
    def __call__(self, batch: Batch, seed: int) -> BranchInputs:
        """Compute the branches' inputs of one image: proposals, sampled RoIs and refined boxes as in training.

        Args:
            batch: of one image.
            seed: of the sampling.
        """
        with random_numbers(seed, self.device), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return BranchInputs(stages=tuple(self._stages(batch)))

    def _stages(self, batch: Batch) -> Iterator[ClassInputs]:
        detector = self.detector
        features = detector.extract_features(batch)
        proposals = detector.rpn.propose(detector.rpn(features.pyramid), batch.image_sizes, training=True)
        ignored = IgnoredRegions(batch.ignored)
        for number, stage in enumerate(_stages(detector), start=1):
            targets = stage.sampler(proposals, batch.boxes, batch.labels, batch.valid, ignored)
            prediction = stage.box_head(features.pool(detector.box_pooler), targets.rois, targets.valid)
            seen = prediction.class_features
            # Under autocast the branch's first layer would round its input anyway; so a cache is half as large.
            seen = seen.bfloat16() if self.bf16 else seen
            yield ClassInputs(features=seen, labels=targets.labels, valid=targets.valid)
            if number < len(detector.stages):
                proposals = detector.refine_proposals(stage, prediction, targets, batch)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SingleImage:
    """A sample as a batch of its own, with its seed."""

    batch: Batch
    seed: int

    def pin_memory(self) -> SingleImage:
        """The same in page-locked memory (called by the data loader)."""
        return replace(self, batch=self.batch.pin_memory())


class SingleImages(Dataset[SingleImage]):
    """The samples of a data set, each as a batch of its own.

    Args:
        dataset: gives the samples.
        divisor: see `collate`.
    """

    def __init__(self, dataset: DetectionDataset, divisor: int) -> None:
        self.dataset = dataset
        self.divisor = divisor

    def __getitem__(self, item: tuple[int, int]) -> SingleImage:
        """The sample of (index, seed)."""
        return SingleImage(batch=collate([self.dataset[item]], self.divisor), seed=item[1])


class Finetuning:
    """The parts of a run that only recipes with `finetune.enabled` have: a frozen model, and perhaps a cache.

    Args:
        detector: with second branches, on its device; all but those is frozen from now on.
        recipe: of the run.
        dataset, sampler: of the run.
        out: folder of the run.
    """

    def __init__(
        self, detector: Detector, recipe: Recipe, dataset: DetectionDataset, sampler: TrainSampler, out: Path
    ) -> None:
        self.frozen = Frozen(detector, bf16=recipe.training.precision == "bf16")
        self.branches = Branches(detector).requires_grad_(True)
        self.trained: nn.Module = self.branches
        self.recipe = recipe
        self.sampler = sampler
        self.workers = worker_count(recipe.data.workers, self.frozen.device, sampler.world)
        self.images = SingleImages(dataset, detector.divisor)
        self.cache = FeatureCache(out / "features") if recipe.finetune.cache else None

    def prepare(self, epochs: range, fabric: Fabric, stop: Sequence[int], *, show: bool) -> bool:
        """Fill the cache, if there is one, with what these epochs need; False if the run was told to stop."""
        return self.cache is None or not epochs or self.fill(epochs, fabric, stop, show=show)

    def finish(self) -> None:
        """Remove the cache."""
        size = self.cache.remove() if self.cache is not None else 0
        if size:
            logger.info("Removed the feature cache (%s); a longer schedule would fill it again.", readable(size))

    def batches(self, start_step: int) -> Generator[BranchInputs, None, None]:
        """The branches' inputs of the training batches of this process, without end, from ``start_step``."""
        plan = TrainPlan(self.sampler, start_step)
        if self.cache is not None:
            yield from self._cached_batches(self.cache, plan)
            return
        loader = plan_loader(self.images, plan, list, self.workers, self._pins)
        with closing(iter(loader)) as steps:  # whatever happens, the workers are sent home
            for images in steps:
                yield join([self.frozen(image.batch.to(self.frozen.device), image.seed) for image in images])

    def _cached_batches(self, cache: FeatureCache, plan: TrainPlan) -> Generator[BranchInputs, None, None]:
        """The batches of a plan from the cache; damaged files are computed and written again."""
        damaged: list[Path] = []
        try:
            with closing(read_ahead(partial(self._cached, cache), plan, self.workers)) as steps:
                for pairs, inputs in steps:
                    if inputs is None:  # here and not in a reading thread, which would share the random numbers
                        parts = []
                        for index, seed in pairs:
                            part = self._read(cache, index, seed)
                            if part is None:
                                damaged.append(cache.path(index, seed))
                                image = self.images[index, seed]
                                part = self.frozen(image.batch.to(self.frozen.device), seed).to("cpu")
                                cache.write(index, seed, part.tensors())
                            parts.append(part)
                        yield join(parts)
                    else:
                        yield inputs
        finally:
            if damaged:
                logger.warning(
                    "Feature cache: %d files were missing or not as they were written, such as %s; they were computed "
                    "again.", len(damaged), damaged[0],
                )  # fmt: skip

    def _cached(self, cache: FeatureCache, pairs: Pairs) -> tuple[Pairs, BranchInputs | None]:
        """The inputs of a batch; None if a file of it is damaged."""
        parts = [self._read(cache, index, seed) for index, seed in pairs]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            return pairs, None
        return pairs, join(whole).pin_memory() if self._pins else join(whole)

    def _read(self, cache: FeatureCache, index: int, seed: int) -> BranchInputs | None:
        names = [f"{n}.{name}" for n in range(len(self.branches.weights)) for name in NAMES]
        tensors = cache.read(index, seed, names)
        return None if tensors is None else BranchInputs.of(tensors)

    @property
    def _pins(self) -> bool:
        return self.frozen.device.type == "cuda"

    def fill(self, epochs: range, fabric: Fabric, stop: Sequence[int], *, show: bool) -> bool:
        """Compute and keep what the branches will see in these epochs, as far as the cache does not hold it yet.

        Every process does its share.

        Args:
            epochs: whose samples are wanted.
            fabric: of the run.
            stop: no longer empty when the run shall stop.
            show: draw a progress bar.

        Returns:
            Whether the cache is complete; it is not if the run was stopped.

        Raises:
            UserError: the cache is of another model or data, there is not room enough, or an image is faulty.
        """
        cache, rank, world = self.cache, fabric.global_rank, fabric.world_size
        assert cache is not None
        about = self.about()
        cache.require(about)
        wanted = self.sampler.all_views(epochs)
        missing = cache.missing(wanted)
        fabric.barrier()  # all have looked before the first one writes
        if rank == 0:
            cache.claim(about)
        mine = missing[rank::world]
        loader = plan_loader(self.images, [[sample] for sample in mine], list, self.workers, self._pins)
        with closing(iter(loader)) as images, progress_bar("computing features", len(missing), show=show) as advance:
            for done in range(0, len(missing), world):
                trouble: UserError | None = None
                try:
                    if done + rank < len(missing):
                        self._keep(cache, mine[done // world], next(images)[0], len(missing) - done)
                except UserError as error:
                    trouble = error
                state = worst(fabric, IN_TROUBLE if trouble else STOPPED if stop else GOING_ON)
                if state == IN_TROUBLE:
                    raise UserError(first_trouble(fabric, str(trouble or "")))
                if state == STOPPED:
                    return False
                advance(min(done + world, len(missing)))
        fabric.barrier()
        if rank == 0:
            each = cache.path(*wanted[0]).stat().st_size
            logger.info(
                "Feature cache: %d views of %d images, %s each, about %s in %s until the run is complete.",
                len(wanted),
                len({index for index, _ in wanted}),
                readable(each),
                readable(each * len(wanted)),
                cache.folder,
            )
        return True

    def _keep(self, cache: FeatureCache, sample: tuple[int, int], image: SingleImage, left: int) -> None:
        """Compute and store one sample, if there is room for all that are ``left``, so that no disk is filled up."""
        tensors = self.frozen(image.batch.to(self.frozen.device), image.seed).tensors()
        each = sum(tensor.nbytes for tensor in tensors.values())
        require_room(cache.folder, left, each, shutil.disk_usage(cache.folder.parent).free)
        try:
            cache.write(*sample, tensors)
        except UserError as error:
            needed = left * each
            raise UserError(f"{error}, and the cache needs {needed} bytes ({readable(needed)}) more") from error

    def about(self) -> dict[str, Any]:
        """All that the features of a sample depend on, but its image file, by name."""
        state = self.frozen.detector.state_dict()
        flat = flatten(self.recipe.model_dump(mode="json"))
        others = {f"data.{name}" for name in self.recipe.data.not_of_a_sample}
        kept = {
            key: value
            for key, value in flat.items()
            if key.startswith(("model.", "data.", "training.precision")) and key not in others
        }
        frozen = {key: value for key, value in state.items() if ".second_branch." not in key}
        return {
            "frozen model": digest_of_tensors(frozen),
            "annotation file": digest_of_annotations(self.images.dataset.annotations),
            **kept,
        }

    def losses_with(self, trained: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """The losses of other second branches."""
        losses: dict[str, Tensor] = trained(self.frozen(batch, seed))
        return losses

    def detector_with(self, trained: nn.Module) -> Detector:
        """The detector with other second branches; all else is shared with this one."""
        assert isinstance(trained, Branches)
        detector, branches = self.frozen.detector, trained
        parts = {id(part): part for name, part in detector.named_children() if name != "stages"}
        for stage, branch in zip(_stages(detector), branches.branches, strict=True):
            parts |= {id(part): part for part in stage.children()} | {id(stage.second_branch): branch}
        return copy.deepcopy(detector, parts)  # of the parts named here it takes what they are to become


def _stages(detector: Detector) -> Iterator[Stage]:
    for stage in detector.stages:
        assert isinstance(stage, Stage)
        yield stage


def _branch(stage: Stage) -> ClassBranch:
    assert stage.second_branch is not None
    return stage.second_branch
