"""The arithmetic of a run, with numbers worked by hand."""

from typing import Any

import numpy as np
import pytest

from tailseg.data.sampling import TrainSampler
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.training.schedule_checks import RunLength, require_whole_steps, schedule_warnings

SOUND = {"epochs": 3, "milestones": [2], "warmup_steps": 2, "warmup_factor": 0.1}


def checked(images: int, batch: int = 4, accumulate: int = 1, world: int = 1, **schedule: Any) -> list[str]:
    settings = [f"schedule.{key}={value}" for key, value in (SOUND | schedule).items()]
    settings += [f"data.batch_per_device={batch}", f"training.accumulate={accumulate}", "optimizer.lr=0.08"]
    recipe = resolve("small/seesaw", [*settings, "optimizer.reference_batch=16"])
    sampler = TrainSampler(np.zeros(images, np.bool_), batch, 0, world)
    length = RunLength.of(recipe, sampler)
    require_whole_steps(recipe, length)
    return schedule_warnings(recipe, length)


def test_a_sound_schedule_says_nothing() -> None:
    assert checked(12) == []
    assert checked(12, accumulate=3, warmup_steps=0) == []


@pytest.mark.parametrize(("world", "batch", "accumulate"), [(1, 1, 8), (2, 4, 1), (2, 2, 2), (8, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize("images", [1, 7, 8, 9, 100])
def test_the_steps_of_an_epoch_depend_on_the_images_of_a_step_alone(
    images: int, world: int, batch: int, accumulate: int
) -> None:
    recipe = resolve("small/seesaw", [f"training.accumulate={accumulate}", "schedule.epochs=5"])
    length = RunLength.of(recipe, TrainSampler(np.zeros(images, np.bool_), batch, 0, world))
    assert (length.steps_per_epoch, length.images_a_step) == (-(-images // 8), 8)
    assert length.total_steps == 5 * -(-images // 8)


def test_accumulation_over_more_than_an_epoch_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"^training\.accumulate = 50: a step takes 50 batches, and an epoch of 12 images has 3; "
        r"set training\.accumulate=3 or less$",
    ):
        checked(12, accumulate=50)
    assert checked(12, accumulate=3, warmup_steps=0) == []  # as advised


def test_an_epoch_that_is_no_whole_number_of_steps() -> None:
    (warning,) = checked(12, accumulate=2)
    assert "An epoch has 3 batches, no multiple of training.accumulate = 2" in warning
    assert "counted as 2 steps, 1 batches more" in warning


def test_a_warm_up_longer_than_the_run() -> None:
    (warning,) = checked(12, milestones=[], warmup_steps=100)
    # 9 steps; the last has index 8: 0.1 + 0.9 * 8 / 100 = 0.172 of 0.08 * 4 / 16 = 0.02.
    assert "warm-up of 100 steps is no shorter than the run of 9: the rate ends at 0.00344 and never" in warning
    assert "reaches 0.02; set schedule.warmup_steps=0" in warning
    assert checked(12, milestones=[], warmup_steps=0) == []  # as advised
    assert len(checked(12, milestones=[], warmup_steps=9)) == 1
    assert checked(12, milestones=[], warmup_steps=8) == []  # the last step has the whole rate


def test_a_warm_up_into_the_first_milestone() -> None:
    (warning,) = checked(12, warmup_steps=6)  # the milestone is at step 6
    assert "warm-up of 6 steps is no shorter than the 6 before the first milestone: the rate never reaches" in warning
    assert checked(12, warmup_steps=5) == []


def test_milestones_beyond_the_end() -> None:
    (warning,) = checked(12, milestones=[2, 3, 11])
    assert "The run has 3 epochs, so that the rate never falls at schedule.milestones = 3, 11" in warning
    assert "set schedule.milestones=[2]" in warning
    assert checked(12, milestones=[2]) == []  # as advised


def test_fewer_images_than_a_step_takes() -> None:
    (warning,) = checked(6, batch=4, world=2, warmup_steps=0)
    assert warning.startswith("A step takes 8 images and an epoch has 6: every step shows some more than once")
    assert checked(6, batch=3, world=2, warmup_steps=0) == []


@pytest.mark.parametrize("name", ["table1/cross-entropy", "table1/eql", "table1/seesaw"])
def test_built_in_schedules_are_sound_on_lvis(name: str) -> None:
    recipe = resolve(name)
    assert schedule_warnings(recipe, RunLength.of(recipe, TrainSampler(np.zeros(99_388, np.bool_), 2, 0, 8))) == []
