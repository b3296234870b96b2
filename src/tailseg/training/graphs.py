"""CUDA graphs of training steps: what forward and backward pass of a batch launch, recorded once for each shape.

A step of the large recipes is thousands of short kernels, which take longer to launch than to run. A graph launches
them in one go. It repeats what was recorded on the same memory: so batches are copied to where the recorded one lay,
gradients are added in place to tensors that stay, and numbers come back as copies. Random numbers go on as they would:
a replay takes them from the default generator, as seeded before it.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import fields
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor

from tailseg.recipes.schema import Recipe
from tailseg.structures import Batch
from tailseg.training.waits import waiting_operations

logger = logging.getLogger(__name__)

# Simulated with image sizes as COCO's: 96 to 99 % of the steps of rows 1 and 10 of Table 2 are replays, about 35 are
# recorded. Were the least recently used graph the one that goes, hundreds would be recorded again and again.
GRAPHS = 32
OFTEN = 2  # times as often as the rarest recorded shape a new one must have come to take its place

Outcome = tuple[dict[str, Tensor], dict[str, Tensor]]  # a batch's losses, and its signs for `Health`; without gradient
Work = Callable[[Batch], Outcome]  # of a batch on the device; adds gradients to those there are


class Graph(Protocol):
    """Work on the device, recorded."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record what ``work`` would do, without doing it; returns the tensor that each replay fills."""

    def replay(self) -> None:
        """Do it."""


class CudaGraph:
    """The real one.

    Args:
        pool: memory that graphs share, as they never run at the same time and nothing of a replay is needed after it
            but what was copied out.
    """

    def __init__(self, pool: Any) -> None:  # of a type that PyTorch keeps to itself
        self.pool = pool
        self.graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record what ``work`` launches on the device.

        Raises:
            RuntimeError: it does what cannot be recorded; random numbers then go on as if nothing had happened.
        """
        gc.collect()  # what is left of an earlier step in cycles would tie its stream to this one
        stream, numbers = torch.cuda.current_stream(), torch.cuda.get_rng_state()
        try:
            # Of this thread alone: others, which put batches into page-locked memory, may call CUDA meanwhile.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                return work()
        except RuntimeError:
            torch.cuda.set_stream(stream)
            # So does the memory allocator, which would then give nothing back to the device; newer releases of
            # PyTorch have told it already, and refuse to do it twice.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(stream.device.index, self.pool)
                torch._C._cuda_releasePool(stream.device.index, self.pool)
            # The generator believes that it is still being recorded, so it gets another state.
            fresh = torch.Generator(stream.device).graphsafe_get_state()
            torch.cuda.default_generators[stream.device.index].graphsafe_set_state(fresh)
            torch.cuda.set_rng_state(numbers)
            raise

    def replay(self) -> None:
        """Launch it."""
        self.graph.replay()


class GraphedStep:
    """Work on batches, replayed for shapes that come often.

    The first batch of a shape is worked on as ever: kernels are loaded, caches filled, and gradients get their tensors.
    The second is recorded and replayed, those after it are replayed. Losses and gradients are the same either way.

    Args:
        work: to be done.
        device: of the work.
        new_graph: makes an empty graph; None: nothing is recorded.
        most: graphs kept. After that a shape takes the place of the rarest one recorded, once it came twice as often.
    """

    def __init__(
        self, work: Work, device: torch.device, new_graph: Callable[[], Graph] | None, *, most: int = GRAPHS
    ) -> None:
        self.work = work
        self.device = device
        self.new_graph = new_graph
        self.most = most
        self.counts: Counter[Hashable] = Counter()  # batches of each shape
        self.recorded: dict[Hashable, _Recorded] = {}
        self.watched = False  # whether a step was looked at for what cannot be recorded

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients must be set to zero in place, as graphs add to them where they lie."""
        return self.new_graph is not None

    def __call__(self, batch: Batch) -> Outcome:
        """Losses and signs of a batch that may still lie on the host; its gradients are added to those there are."""
        if self.new_graph is None:
            return self.work(batch.to(self.device))
        shape = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))
        self.counts[shape] += 1
        if shape not in self.recorded and self._worth(shape):
            if not self.watched:
                return self._watch(batch)
            self._record(self.new_graph, shape, batch)
        recorded = self.recorded.get(shape)
        return self.work(batch.to(self.device)) if recorded is None else recorded(batch)

    def _worth(self, shape: Hashable) -> bool:
        """Whether a shape is to be recorded; makes room for it."""
        if self.counts[shape] == 1:
            return False
        if len(self.recorded) == self.most:
            rarest = min(self.recorded, key=self.counts.__getitem__)
            if self.counts[shape] < OFTEN * self.counts[rarest]:
                return False
            del self.recorded[rarest]
        return True

    def _watch(self, batch: Batch) -> Outcome:
        batch = batch.to(self.device)
        with waiting_operations() as found:
            outcome = self.work(batch)
        self.watched = True
        if found:
            self._stop(f"{found[0]} waits for the device")
        return outcome

    def _record(self, new_graph: Callable[[], Graph], shape: Hashable, batch: Batch) -> None:
        try:
            self.recorded[shape] = _Recorded(new_graph(), self.work, batch, self.device)
        except RuntimeError as error:
            self._stop(str(error).split("\n", 1)[0])

    def _stop(self, why: str) -> None:
        self.new_graph = None
        self.recorded.clear()
        logger.warning("CUDA graphs: none from here on (%s); training goes on without them.", why)


class _Recorded:
    """Work on a batch of one shape, recorded."""

    def __init__(self, graph: Graph, work: Work, batch: Batch, device: torch.device) -> None:
        self.graph = graph
        self.batch = Batch(
            **{
                field.name: getattr(batch, field.name).to(device, non_blocking=True, copy=True)
                for field in fields(batch)
            }
        )
        self.names: tuple[list[str], list[str]] = ([], [])
        self.values = graph.record(lambda: self._packed(work))

    def __call__(self, batch: Batch) -> Outcome:
        for kept, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            kept.copy_(given, non_blocking=True)
        self.graph.replay()
        values = iter(self.values.clone().unbind())  # the next replay overwrites them
        losses, signs = ({name: next(values) for name in names} for names in self.names)
        return losses, signs

    def _packed(self, work: Work) -> Tensor:
        """All scalars in one tensor, so that a single copy takes them out."""
        losses, signs = work(self.batch)
        self.names = (list(losses), list(signs))
        return torch.stack([*losses.values(), *signs.values()])


def _tensors(batch: Batch) -> list[Tensor]:
    return [getattr(batch, field.name) for field in fields(batch)]


def why_none(recipe: Recipe, device: torch.device, processes: int) -> str:
    """Why a run cannot have CUDA graphs; empty if it can."""
    if device.type != "cuda":
        return f"they need a CUDA GPU, and this run is on '{device}'"
    if processes > 1:
        return f"they work for a single process, and this run has {processes}"
    if recipe.finetune.enabled:
        return "finetuning takes its features from outside of the step"
    if recipe.model.backbone.checkpointing:
        return "model.backbone.checkpointing asks for the state of random numbers within the step"
    return ""


def has_graphs(recipe: Recipe, fabric: Fabric) -> bool:
    """Whether a run has CUDA graphs."""
    return recipe.training.cuda_graphs and not why_none(recipe, fabric.device, fabric.world_size)


def cuda_graphs(recipe: Recipe, fabric: Fabric) -> Callable[[], Graph] | None:
    """The maker of a run's graphs, which share their memory; None if it has none. Says so if it was asked for some."""
    speaks = recipe.training.cuda_graphs and fabric.global_rank == 0
    if not has_graphs(recipe, fabric):
        if speaks:
            why = why_none(recipe, fabric.device, fabric.world_size)
            logger.warning("CUDA graphs: none (training.cuda_graphs=true, but %s).", why)
        return None
    if speaks:
        logger.info("CUDA graphs: shapes of batches that come more than once are recorded, up to %d.", GRAPHS)
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)
