"""Evaluations of a run on its validation split: scores, losses and pictures, and which model is the best so far."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_fabric import Fabric
from torch import nn

from tailseg.data.annotations.annotations import Annotations, Category
from tailseg.data.dataset import evaluation_dataset
from tailseg.data.loading import worker_count
from tailseg.evaluation.evaluate import evaluate
from tailseg.evaluation.metrics import Metrics, Scores, read_classes
from tailseg.model.detector import Detector
from tailseg.recipes.schema import Recipe
from tailseg.training import resumption
from tailseg.training.agreement import attempt
from tailseg.training.announcement import announce_no_losses, announce_no_scores, announce_scores
from tailseg.training.distributed import summed
from tailseg.training.early_stopping import out_of_patience
from tailseg.training.learner import Learner
from tailseg.training.run_log import RunLog, better
from tailseg.training.sample_pictures import sample_pictures
from tailseg.training.trackers import Trackers
from tailseg.training.validation_loss import validation_sums

logger = logging.getLogger(__name__)

NO_ROWS = 4  # bytes: the most that a results file without a detection has
HIGH_THRESHOLD = 0.01  # test.score_threshold from which on it is the first suspect


@dataclass(frozen=True, slots=True)
class Candidate:
    """The model of a step."""

    step: int
    epoch: int  # that ends with it
    detector: Detector
    trained: nn.Module  # what of it is trained


class Evaluations:
    """Evaluates in all processes; process 0 scores, saves the best and tells.

    Args:
        fabric, recipe, out: of the run.
        val: the split.
        categories: of the training split.
        learner: of the run.
        run_log, trackers: told of each evaluation.
    """

    def __init__(
        self,
        fabric: Fabric,
        recipe: Recipe,
        out: Path,
        val: Annotations,
        categories: Sequence[Category],
        learner: Learner,
        run_log: RunLog,
        trackers: Trackers,
    ) -> None:
        self.fabric, self.recipe, self.out, self.val, self.categories = fabric, recipe, out, val, categories
        self.learner, self.run_log, self.trackers = learner, run_log, trackers
        self.can_be_scored = len(val.labels) > 0
        self.best: float | None = None  # segm AP
        self.evaluated_step = 0  # the last one that was evaluated
        self.ends_early = False
        self.scores: Scores | None = None
        self._told_nothing_found = self._told_no_pictures = False

    @property
    def _is_main_process(self) -> bool:
        return bool(self.fabric.global_rank == 0)

    def take_up(self, step: int, best: float | None) -> None:
        """Go on from the trainer file of a step, which is older than the evaluation of that step, if there was one."""
        self.best = best
        recorded = self.run_log.metrics_at(step)
        if recorded and resumption.is_recorded(self.out, step, best, recorded):
            self.evaluated_step, self.best = step, better(best, recorded["segm"]["AP"])
            if self._is_main_process:
                self.scores = Scores(metrics=recorded, per_category=read_classes(self.out / "classes.csv"))
            self.ends_early = self._out_of_patience(step)

    def evaluate_once(self, model: Candidate, save_best: Callable[[Metrics], None], *, show: bool) -> None:
        """Evaluate the model of a step, unless that is done or nothing can be scored.

        What an evaluation changes is written down by itself (metrics.jsonl, best.safetensors), so the trainer file of
        the same step stays as it was saved before.

        Args:
            model: of that step.
            save_best: called in process 0 if this is the best model so far, with its metrics.
            show: show progress.
        """
        if self.evaluated_step < model.step and self.can_be_scored:
            self._evaluate(model, save_best, show and self._is_main_process)
            self.ends_early = self._out_of_patience(model.step)

    def _out_of_patience(self, step: int) -> bool:
        return out_of_patience(self.fabric, self.run_log, step, self.recipe.training.patience)

    def _evaluate(self, model: Candidate, save_best: Callable[[Metrics], None], show: bool) -> None:
        step, epoch = model.step, model.epoch
        scores, trouble = attempt(self.fabric, lambda meet: self._score(model.detector, meet, show))
        losses = None if trouble else self._losses(model, show)
        self.run_log.restart_clock()
        self.evaluated_step = step
        if trouble:
            self.scores = None  # those of an earlier epoch are not this one's
            resumption.require_still_there(self.out)
            if self._is_main_process:
                announce_no_scores(epoch, trouble, self.out / "last.safetensors")
            return
        if scores is None:
            return
        self.scores = scores
        reached = scores.metrics["segm"]["AP"]
        announce_scores(epoch, reached, scores.metrics["segm"]["APr"], None if losses is None else losses["loss"])
        self._warn_if_nothing_was_found(epoch, step)
        if better(self.best, reached) != self.best:
            self.best = reached
            save_best(scores.metrics)
        validation = {} if losses is None else {"validation": losses}
        # Last: a resumed run does not repeat an evaluation that the log holds.
        self.run_log.write({"step": step, "epoch": epoch, "metrics": scores.metrics} | validation)
        self.trackers.log_evaluation(step, scores.metrics, losses)
        self._show_pictures(step, model.detector)
        self.run_log.restart_clock()

    def _score(self, detector: Detector, meet: Callable[[], None], show: bool) -> Scores | None:
        """Detect and score; a recipe's test-time augmentation is left out: it would take some thirty times as long."""
        return evaluate(
            detector,
            evaluation_dataset(self.val, self.recipe.data),
            self.out,
            device=self.fabric.device,
            batch_size=self.recipe.data.batch,
            workers=worker_count(self.recipe.data.workers, self.fabric.device, self.fabric.world_size),
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
            barrier=meet,
            autocast=self.recipe.training.precision == "bf16",
            train_images={category.id: category.image_count for category in self.categories},
            show=show,
        )

    def _losses(self, model: Candidate, show: bool) -> dict[str, float] | None:
        """Mean losses over the split, of all processes, their sum first; None if not asked for or not to be had."""
        if not self.recipe.training.validation_loss:
            return None
        fabric = self.fabric
        sums, trouble = attempt(
            fabric,
            lambda _meet: validation_sums(
                *(self.learner, model.trained, self.val, self.recipe, model.detector.divisor, fabric.device),
                rank=fabric.global_rank,
                world=fabric.world_size,
                show=show,
            ),
        )
        if sums is None:
            if self._is_main_process:
                announce_no_losses(model.epoch, trouble)
            return None
        totals = summed(fabric, sums)
        images = totals.pop("images")
        means = {name: value / images for name, value in totals.items()}
        return {"loss": sum(means.values()), **means}

    def _warn_if_nothing_was_found(self, epoch: int, step: int) -> None:
        found = self.out / "detections.json"
        if self._told_nothing_found or not found.is_file() or found.stat().st_size > NO_ROWS:
            return
        self._told_nothing_found = True
        threshold = self.recipe.test.score_threshold
        fix = (
            "lower that"
            if threshold >= HIGH_THRESHOLD
            else f"after {step} steps the model has learnt too little: train for more epochs or raise optimizer.lr, "
            "and if its losses do not fall, look at boxes and labels with `tailseg data check`"
        )
        logger.warning(
            "Epoch %d: not one detection on the validation split: all scores are below test.score_threshold = %g; %s.",
            epoch, threshold, fix,
        )  # fmt: skip

    def _show_pictures(self, step: int, detector: Detector) -> None:
        if not self.trackers.take_pictures or self._told_no_pictures:
            return
        was_training = detector.training
        detector.eval()
        try:
            self.trackers.log_pictures(step, sample_pictures(detector, self.val, self.recipe.data, self.fabric.device))
        except Exception as error:
            self._told_no_pictures = True
            logger.warning("Sample pictures cannot be drawn (%s); the run goes on without them.", error)
        detector.train(was_training)
