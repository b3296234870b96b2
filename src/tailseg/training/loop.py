"""Training: `train`, and the run that it makes, read downwards."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from tailseg.checkpoint import save_model
from tailseg.data.dataset import train_dataset
from tailseg.data.loading import LoaderKilledError, worker_count
from tailseg.data.sampling import TrainSampler, epoch_draw
from tailseg.data.sources import DataSplits
from tailseg.errors import UserError
from tailseg.evaluation.metrics import Metrics, Scores
from tailseg.files import writing
from tailseg.model.build import build_detector, stored_recipe
from tailseg.model.detector import Detector
from tailseg.progress import Advance, progress_bar
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import flatten, to_yaml
from tailseg.threads import sharing_cores
from tailseg.training import resumption
from tailseg.training.announcement import announce
from tailseg.training.automatic import settled
from tailseg.training.average import MovingAverage
from tailseg.training.class_statistics import class_statistics
from tailseg.training.distributed import batch_norm_note, first_trouble, launch, worst
from tailseg.training.evaluations import Candidate, Evaluations
from tailseg.training.finetune import Finetuning
from tailseg.training.graphs import GraphedStep, Outcome, cuda_graphs, has_graphs
from tailseg.training.health import Health, LossWatch
from tailseg.training.interrupts import interrupts
from tailseg.training.learner import Learner, WholeDetector, copy_values, losses_of, seed_of_step
from tailseg.training.links import watched
from tailseg.training.loader_watch import LoaderWatch
from tailseg.training.optimizer import build_optimizer, rate_factor, set_rate
from tailseg.training.parts import freeze
from tailseg.training.run_lock import lock_for_all
from tailseg.training.run_log import RunLog
from tailseg.training.schedule_checks import RunLength, require_whole_steps, schedule_warnings
from tailseg.training.step_note import memory_in_use, step_note
from tailseg.training.trackers import Trackers, require_packages
from tailseg.training.weight_init import init_weights, read_init, require_sound_start

BETWEEN_STEPS, COLLECTING, UPDATING = range(3)  # gradients, the weights; only the last is no state to go on from


def train(
    recipe: Recipe,
    data: DataSplits,
    out: Path,
    *,
    seed: int = 0,
    devices: int = 1,
    resume: bool = False,
    init: Path | None = None,
    device: str | int | torch.device | None = None,
    show: bool = True,
) -> Scores | None:
    """Train a recipe; writes recipe.yaml, metrics.jsonl, last, best and trainer checkpoints into ``out``.

    Two runs with equal arguments on one CPU process give bit-identical weights, whether or not they were stopped and
    resumed in between, for any number of loader workers.

    Args:
        recipe: what is trained.
        data: the splits.
        out: folder for all that comes of it.
        seed: of all random numbers.
        devices: processes on this machine.
        resume: go on with the run in ``out``.
        init: model file whose weights the run starts from instead of ImageNet's (see `start_from`).
        device: where it runs (see `find_device`); by default on the GPUs that there are.
        show: show progress.

    Returns:
        The scores of the last evaluation (process 0; None elsewhere).

    Raises:
        UserError: something about data, folder, recipe or checkpoint is the user's to fix.
        KeyboardInterrupt: after Ctrl-C, when everything has been saved.
    """
    require_sound_start(recipe, init, resume=resume)
    require_packages(recipe.training.loggers)
    fabric = launch(devices, device)
    with ExitStack() as stack:
        others = stack.enter_context(watched(fabric, out))
        recipe = settled(recipe, fabric, data, out, resume=resume)
        run = Run(fabric, recipe, data, out, seed, init, resume=resume)
        stop = stack.enter_context(interrupts(tell=run.is_main_process))
        lock_for_all(fabric, out, stack)
        stack.enter_context(run.trackers.closing())
        run.start(resume)
        if not run.prepare(stop, show):
            run.save()
            raise KeyboardInterrupt
        shown = progress_bar("training", run.total_steps, show=show and run.is_main_process, lines="notes")
        advance = stack.enter_context(shown)
        batches = stack.enter_context(closing(run.batches()))  # whatever happens, the workers are sent home
        try:
            run.complete(batches, stop, advance, show)
        except LoaderKilledError:
            run.save_last_step()
            raise
        except torch.OutOfMemoryError as error:
            run.save_last_step()
            raise UserError(run.out_of_memory()) from error
        except Exception as error:
            broken = not isinstance(error, UserError) and others.cause() is not None  # a collective
            if broken and fabric.device.type == "cpu":  # a GPU may have updated with what came of it
                run.save_last_step()
            raise
        if run.is_main_process:
            run.learner.finish()
    return run.evaluations.scores


class Run:
    """The state of a training run: model, optimiser, position. Arguments as of `train`, with ``fabric`` launched."""

    def __init__(
        self, fabric: Fabric, recipe: Recipe, data: DataSplits, out: Path, seed: int,
        init: Path | None = None, *, resume: bool = False,
    ) -> None:  # fmt: skip
        assert data.train is not None
        assert data.val is not None
        self.fabric, self.recipe, self.data, self.out, self.seed = fabric, recipe, data, out, seed
        self.is_main_process = fabric.global_rank == 0
        self.categories = data.train.categories
        self.dataset = train_dataset(data.train, recipe.data)
        self.sampler = TrainSampler(
            self.dataset.aspect_groups,
            recipe.data.batch,
            fabric.global_rank,
            fabric.world_size,
            seed,
            epoch_draw(data.train, self.dataset.image_indices, recipe.data),
            recipe.finetune.views if recipe.finetune.enabled else None,
        )
        self.length = RunLength.of(recipe, self.sampler)
        self.steps_per_epoch, self.total_steps = self.length.steps_per_epoch, self.length.total_steps

        checkpoint = None if init is None else read_init(init, recipe, self.categories)
        torch.manual_seed(seed)
        statistics = class_statistics(data.train, keep_empty=recipe.data.keep_empty)
        self.detector = build_detector(recipe, len(self.categories), statistics)
        self.stored_recipe = stored_recipe(recipe, self.detector)
        self.weights_note = init_weights(self.detector, recipe, self.categories, checkpoint, resume=resume)
        self.detector = self.detector.to(memory_format=torch.channels_last)
        self.frozen = freeze(self.detector, recipe.training.freeze)
        self.learner = self._learner()
        trained = self.learner.trained
        self.norm_note = batch_norm_note(trained, fabric.world_size)
        self.model, self.optimizer = fabric.setup(trained, build_optimizer(trained, recipe.optimizer))
        ema = recipe.training.ema
        self.average = None if ema is None else MovingAverage(trained, ema)
        self.data_keys = resumption.data_keys(data.train, data.val)
        self.about: dict[str, Any] = {"seed": seed, "world_size": fabric.world_size, "data": self.data_keys}
        self.about |= {"recipe": recipe.model_dump(mode="json"), "categories": [c.name for c in self.categories]}
        self.run_log = RunLog(out / "metrics.jsonl", writes=self.is_main_process)
        self.trackers = Trackers()
        self.evaluations = Evaluations(
            fabric, recipe, out, data.val, self.categories, self.learner, self.run_log, self.trackers
        )
        self.health = Health(trained, speaks=self.is_main_process)
        self.loss_watch = LossWatch(
            self.steps_per_epoch, recipe.schedule.warmup_steps, trained=init is not None, speaks=self.is_main_process
        )
        self.loader_watch = LoaderWatch(
            fabric.device, worker_count(recipe.data.workers, fabric.device, fabric.world_size),
            sharing_cores(fabric.world_size), speaks=self.is_main_process, measures=not recipe.finetune.enabled,
        )  # fmt: skip
        self.forward_backward = GraphedStep(self._forward_backward, fabric.device, cuda_graphs(recipe, fabric))
        self.step = self.saved_step = 0
        self.resumed_step: int | None = None
        self.state = BETWEEN_STEPS
        self.is_learning = False  # whether all modules are in the modes of training
        self.buffers = list(trained.buffers())  # counts and batch statistics, which the forward passes of a step change
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.note = ""

    def _learner(self) -> Learner:
        if self.recipe.finetune.enabled:
            detector = self.detector.to(self.fabric.device)  # Fabric moves what is trained, and nothing else
            return Finetuning(detector, self.recipe, self.dataset, self.sampler, self.out)
        pin_memory = self.fabric.device.type == "cuda"
        few_shapes = has_graphs(self.recipe, self.fabric)
        return WholeDetector(
            self.detector, self.recipe, self.dataset, self.sampler, pin_memory=pin_memory, few_shapes=few_shapes
        )

    def start(self, resume: bool) -> None:
        """Make the folder, or take up the run that it holds; says what is about to happen."""
        trainer = self.out / resumption.TRAINER
        if resume:
            if not trainer.is_file():
                raise UserError(f"{self.out}: holds no {trainer.name} to resume from; leave out --resume to start")
            tensors, about = resumption.read_trainer(trainer)
            names, world = self.about["categories"], self.fabric.world_size
            warnings = resumption.require_same_run(
                about, self.out, self.recipe, names, self.seed, world, self.data_keys
            )
            resumption.load_trainer(trainer, tensors, self.detector, self.optimizer, self.average)
            self.step = self.saved_step = self.resumed_step = about["step"]
        elif trainer.is_file():
            raise UserError(f"{self.out}: already holds a run; add --resume to go on with it, or choose another --out")
        else:
            resumption.require_no_best(self.out)
            require_whole_steps(self.recipe, self.length)
            warnings = schedule_warnings(self.recipe, self.length)
        if self.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            with writing(path := self.out / "recipe.yaml"):
                path.write_text(to_yaml(self.recipe), encoding="utf-8")
            cut = self.run_log.cut(self.step)
            parameters = {"seed": self.seed, **flatten(self.recipe.model_dump(mode="json"))}
            self.trackers.open(self.recipe.training.loggers, self.out, self.step, parameters, cut if resume else ())
            announce(
                self.recipe, self.data, self.detector, self.sampler, self.length, self.step,
                out=self.out, weights_note=self.weights_note, norm_note=self.norm_note, warnings=warnings,
            )  # fmt: skip
        self.fabric.barrier()
        if resume:
            self.evaluations.take_up(self.step, about["best"])
        self.run_log.restart_clock()

    def prepare(self, stop: Sequence[int], show: bool) -> bool:
        """Make what has to exist before the first step; False if the run was told to stop meanwhile."""
        accumulate, a_turn = self.recipe.training.accumulate, self.sampler.steps_per_epoch
        epochs = range(self.step * accumulate // a_turn, -(-self.total_steps * accumulate // a_turn))
        complete = self.learner.prepare(epochs, self.fabric, stop, show=show and self.is_main_process)
        self.run_log.restart_clock()
        return complete

    def batches(self) -> Generator[Any, None, None]:
        """The training batches from this step on and without end."""
        return self.learner.batches(self.step * self.recipe.training.accumulate)

    def complete(self, batches: Iterator[Any], stop: Sequence[int], advance: Advance, show: bool) -> None:
        """All steps from here to the end, with saves and evaluations (KeyboardInterrupt once told to ``stop``)."""
        self.evaluate_if_due(show)  # a resumed run may have stopped before or while it evaluated
        while self.step < self.total_steps and not self.evaluations.ends_early:
            self.train_step(batches)
            advance(self.step, self.note)
            if self.step % self.steps_per_epoch == 0 or self.step % self.recipe.training.save_steps == 0:
                self.log()  # before saving: a diverged model must not replace a sound checkpoint
                self.save()
            if self.agreed(stop):
                self.log()
                self.save()
                raise KeyboardInterrupt
            self.evaluate_if_due(show)  # after saving: a kill or a fault meanwhile loses nothing
        last = self.out / "last.safetensors"
        if self.is_main_process and self.step == self.resumed_step and not resumption.holds_step(last, self.step):
            self._save_model(last.name)  # which a finished run had lost

    def train_step(self, batches: Iterator[Any]) -> None:
        """One step of the optimiser."""
        recipe = self.recipe
        # Seeded by position, so that what came before (an evaluation, a resumption) does not matter.
        torch.manual_seed(seed_of_step(self.seed, self.step, self.fabric.global_rank))
        rate = self.length.base_rate * rate_factor(self.step, self.steps_per_epoch, recipe.schedule)
        set_rate(self.optimizer, rate)
        if not self.is_learning:  # not in every step: it walks over all modules, and a GPU would wait for it
            self.model.train()
            for module in self.frozen:
                module.eval()
            self.is_learning = True
        accumulate, collected = recipe.training.accumulate, []
        copy_values(self.buffers, self.buffers_before)
        self.state = COLLECTING
        for micro in range(accumulate):
            batch = self.loader_watch.next(batches)
            with self.fabric.no_backward_sync(self.model, enabled=micro < accumulate - 1):
                losses, signs = self.forward_backward(batch)
            collected.append(losses)
            self.health.add(signs)
        if recipe.optimizer.clip is not None:
            # Divergence is found when losses are read, so that this does not have to wait for the norm.
            norm = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=recipe.optimizer.clip, error_if_nonfinite=False
            )
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.learner.trained.parameters() if p.grad is not None])
        self.health.collect(norm)
        self.state = UPDATING
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.forward_backward.keeps_gradients)
        if self.average is not None:
            self.average.update()
        for losses in collected:
            self.run_log.collect(losses)
        self.step += 1
        self.state = BETWEEN_STEPS
        if self.step % recipe.training.log_steps == 0:
            self.log()

    def _forward_backward(self, batch: Any) -> Outcome:
        """The losses of a batch on the device, whose gradients are added to those there are, and signs of trouble."""
        recipe, device = self.recipe, self.fabric.device
        self.health.clear()
        # Not Fabric's own mixed precision: it would convert the batch as well, boxes included.
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
            losses = losses_of(self.model, batch, recipe.data.batch)
        self.fabric.backward(torch.stack(list(losses.values())).sum() / recipe.training.accumulate)
        return {name: loss.detach() for name, loss in losses.items()}, self.health.taken()

    def log(self, *, alone: bool = False) -> None:
        """Write the mean losses since the last line; this is where the device is waited for.

        Args:
            alone: the other processes are not there to agree that no loss is infinite.
        """
        losses, batches, seconds = self.run_log.means()
        if batches == 0:
            return
        total = sum(losses.values())
        spoilt = None if self.run_log.began_finite() else self.resumed_step
        trouble = resumption.divergence(self.out, self.step, losses, self.recipe.optimizer.lr, spoilt)
        if not alone:
            trouble = first_trouble(self.fabric, trouble)
        if trouble:
            raise UserError(trouble)
        speed = batches * self.length.images_a_step / self.recipe.training.accumulate / seconds
        rate = self.optimizer.param_groups[0]["lr"]
        epoch = -(-self.step // self.steps_per_epoch)
        self.note = step_note(epoch, self.recipe.schedule.epochs, total, rate, speed, self.fabric.device)
        self.loss_watch.look(self.step, losses, self.recipe.optimizer.lr)
        losses = {"loss": total, **losses}
        others = {"lr": rate, "images_per_second": speed} | self.health.row(self.step)
        self.run_log.write({"step": self.step, **losses, **others})
        others |= {f"lr_{part}": rate * factor for part, factor in self.recipe.optimizer.rates.items()}
        others |= self.loader_watch.row(self.step, seconds) | {"memory_gib": memory_in_use(self.fabric.device) / 2**30}
        self.trackers.log_losses(self.step, losses, others)

    def evaluate_if_due(self, show: bool) -> None:
        """Evaluate at the end of an epoch that the recipe wants evaluated, unless that is done."""
        epoch, within = divmod(self.step, self.steps_per_epoch)
        wanted = self.step == self.total_steps or epoch % self.recipe.training.evaluate_every == 0
        if within == 0 and wanted:
            trained = self.learner.trained if self.average is None else self.average.module
            model = Candidate(self.step, epoch, self._saved_detector(), trained)
            self.is_learning = False
            self.evaluations.evaluate_once(model, partial(self._save_model, "best.safetensors"), show=show)

    def save(self, *, alone: bool = False) -> None:
        """Write last.safetensors, then trainer.safetensors, all that resuming needs in one file.

        In this order, since a run is resumed from the trainer's step: what failed before it is written again.

        Args:
            alone: do not wait for the other processes.
        """
        if self.is_main_process:
            self._write_checkpoint()
        if not alone:
            self.fabric.barrier()

    def _write_checkpoint(self) -> None:
        about = {"step": self.step, "best": self.evaluations.best} | self.about
        try:
            self._save_model("last.safetensors")
            resumption.save_trainer(self.out / resumption.TRAINER, self.detector, self.optimizer, self.average, about)
        except UserError as error:
            raise UserError(f"{error}; then {resumption.way_on(self.out)}") from error
        self.saved_step = self.step

    def save_last_step(self) -> None:
        """Save the last complete step, as far as there is one and this process can do so without the others."""
        if self.state == COLLECTING:  # gradients, of which a new start knows nothing
            copy_values(self.buffers_before, self.buffers)
        if self.state != UPDATING and self.step > self.saved_step:
            self.log(alone=True)
            self.save(alone=True)

    def out_of_memory(self) -> str:
        """A sentence on the end of a run whose next step does not fit into the memory of its GPU."""
        graphs = bool(self.forward_backward.recorded)
        return resumption.out_of_memory(self.out, self.step + 1, self.recipe, graphs=graphs)

    def agreed(self, stop: Sequence[int]) -> bool:
        """True if some process was told to stop; with several, asked when losses are logged, for it costs a wait."""
        if self.fabric.world_size > 1 and self.step % self.recipe.training.log_steps:
            return False
        return bool(worst(self.fabric, bool(stop)))

    def _saved_detector(self) -> Detector:
        return self.detector if self.average is None else self.learner.detector_with(self.average.module)

    def _save_model(self, name: str, metrics: Metrics | None = None) -> None:
        model = self._saved_detector()
        save_model(self.out / name, model, self.stored_recipe, self.categories, step=self.step, metrics=metrics)
