"""The arithmetic of a run: settings that cannot mean what they say on a data set of this size."""

from __future__ import annotations

from dataclasses import dataclass

from tailseg.data.sampling import TrainSampler
from tailseg.errors import UserError
from tailseg.recipes.schema import Recipe
from tailseg.training.optimizer import rate_factor, scaled_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """Numbers of a run."""

    images: int  # of an epoch, repetitions counted
    images_a_step: int  # of all processes and accumulated batches
    batches_per_epoch: int  # of all processes together
    steps_per_epoch: int
    total_steps: int
    base_rate: float

    @staticmethod
    def of(recipe: Recipe, sampler: TrainSampler) -> RunLength:
        """The numbers of a run with this plan of batches."""
        images_a_step = sampler.batch_size * sampler.world * recipe.training.accumulate
        # Rounded up, so that it depends on the images of a step and not on how they are shared out.
        steps_per_epoch = -(-sampler.steps_per_epoch // recipe.training.accumulate)
        return RunLength(
            images=sampler.draw.length,
            images_a_step=images_a_step,
            batches_per_epoch=sampler.steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            total_steps=recipe.schedule.epochs * steps_per_epoch,
            base_rate=scaled_rate(recipe.optimizer, images_a_step),
        )


def require_whole_steps(recipe: Recipe, length: RunLength) -> None:
    """Raise UserError where one step takes more batches than an epoch has."""
    accumulate = recipe.training.accumulate
    if accumulate > length.batches_per_epoch:
        raise UserError(
            f"training.accumulate = {accumulate}: a step takes {accumulate} batches, and an epoch of {length.images} "
            f"images has {length.batches_per_epoch}; set training.accumulate={length.batches_per_epoch} or less"
        )


def schedule_warnings(recipe: Recipe, length: RunLength) -> list[str]:
    """Sentences on what a run will not do as its settings say."""
    schedule, total = recipe.schedule, length.total_steps
    found = []
    if length.images < length.images_a_step:
        found.append(
            f"A step takes {length.images_a_step} images and an epoch has {length.images}: every step shows some more "
            "than once; lower data.batch_per_device."
        )
    over = length.steps_per_epoch * recipe.training.accumulate - length.batches_per_epoch
    if over > 0:
        found.append(
            f"An epoch has {length.batches_per_epoch} batches, no multiple of training.accumulate = "
            f"{recipe.training.accumulate}: it is counted as {length.steps_per_epoch} steps, {over} batches more."
        )
    milestones = [m for m in schedule.milestones if m < schedule.epochs]
    first = milestones[0] * length.steps_per_epoch if milestones else total
    if schedule.warmup_steps >= total:
        last = length.base_rate * rate_factor(total - 1, length.steps_per_epoch, schedule)
        found.append(
            f"The warm-up of {schedule.warmup_steps} steps is no shorter than the run of {total}: the rate ends at "
            f"{last:.3g} and never reaches {length.base_rate:.3g}; set schedule.warmup_steps={total // 10}, for "
            "instance."
        )
    elif schedule.warmup_steps >= first:
        found.append(
            f"The warm-up of {schedule.warmup_steps} steps is no shorter than the {first} before the first milestone: "
            f"the rate never reaches {length.base_rate:.3g}; set schedule.warmup_steps={first // 10}, for instance."
        )
    beyond = [m for m in schedule.milestones if m >= schedule.epochs]
    if beyond and schedule.gamma < 1:
        found.append(
            f"The run has {schedule.epochs} epochs, so that the rate never falls at schedule.milestones = "
            f"{', '.join(map(str, beyond))}; set schedule.milestones={milestones} if that is meant."
        )
    return found
