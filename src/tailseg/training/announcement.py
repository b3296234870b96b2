"""Words at the start of a run: its data, its model and its learning rate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tailseg.data.annotations.annotations import tell
from tailseg.data.sampling import TrainSampler, largest_factor
from tailseg.data.sources import DataSplits
from tailseg.model.detector import Detector
from tailseg.recipes.schema import Recipe
from tailseg.training.schedule_checks import RunLength

logger = logging.getLogger(__name__)


def announce(
    recipe: Recipe,
    data: DataSplits,
    detector: Detector,
    sampler: TrainSampler,
    length: RunLength,
    step: int,
    *,
    out: Path,
    weights_note: str,
    norm_note: str,
    warnings: Sequence[str],
) -> None:
    """Log all that of a run that goes on from ``step``.

    Args:
        recipe: of the run.
        data: its splits.
        detector: what it trains.
        sampler: of its images.
        length: its numbers.
        step: steps that are done.
        out: its folder.
        weights_note: where its weights come from.
        norm_note: whose batch statistics are learnt; may be empty.
        warnings: on its settings.
    """
    assert data.train is not None
    assert data.val is not None
    logger.info("Folder of the run: %s", out)
    for split in (data.train, data.val):
        tell(split)
        if not len(split.labels):  # training data without any is refused before
            logger.warning("%s: has no annotations, so the run is not evaluated: no best.safetensors.", split.path)
    if data.groups:
        logger.info(data.groups)
    trainable = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    images = len(sampler.aspect_groups)
    logger.info(
        "%s: %d training images, %d classes, %.1f M trainable parameters, %s.",
        recipe.name, images, len(data.train.categories), trainable / 1e6, weights_note,
    )  # fmt: skip
    if norm_note:
        logger.info(norm_note)
    length_of_epoch, factor = sampler.draw.length, largest_factor(sampler.draw)
    if factor is not None:
        logger.info("Repeat factors: %d images make %d an epoch, r up to %.2f.", images, length_of_epoch, factor)
    elif length_of_epoch != images:
        logger.info("An epoch has %d images, drawn from %d.", length_of_epoch, images)
    logger.info(
        "Learning rate %g = %g x %d / %d (images a step / the recipe's reference), %d steps from step %d on.",
        length.base_rate, recipe.optimizer.lr, length.images_a_step, recipe.optimizer.reference_batch,
        length.total_steps, step,
    )  # fmt: skip
    for warning in warnings:
        logger.warning(warning)
    if step >= length.total_steps:
        logger.warning(
            "%s: the run is finished: %d steps of %d, %d epochs; for more, --resume with a larger schedule.epochs.",
            out, step, length.total_steps, recipe.schedule.epochs,
        )  # fmt: skip


def announce_scores(epoch: int, ap: float | None, ap_rare: float | None, loss: float | None) -> None:
    """Log an evaluation: segm AP of all classes and of the rare ones, and the validation loss, if there is one."""
    texts = ["-" if value is None else f"{100 * value:.1f}" for value in (ap, ap_rare)]
    logger.info(
        "Epoch %d: segm AP %s, APr %s%s.", epoch, *texts, "" if loss is None else f", validation loss {loss:.4g}"
    )


def announce_no_losses(epoch: int, trouble: str) -> None:
    """Log that there is no validation loss."""
    logger.warning("Epoch %d: no validation loss (%s); the run goes on without it.", epoch, trouble)


def announce_no_scores(epoch: int, trouble: str, model: Path) -> None:
    """Log that an evaluation failed."""
    logger.warning(
        "Epoch %d: the evaluation failed (%s); nothing is lost: the model is in %s, to be scored with `tailseg eval`.",
        epoch, trouble, model,
    )  # fmt: skip
