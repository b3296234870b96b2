"""The loaders of training and evaluation: batches in the order of a plan, made by worker processes."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Generic, Literal, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from tailseg.data.batches import collate
from tailseg.data.dataset import DetectionDataset
from tailseg.data.sampling import TrainSampler
from tailseg.errors import UserError
from tailseg.structures import Batch
from tailseg.threads import sharing_cores, usable_cores

WORKERS_ON_A_CPU, MOST_WORKERS = 2, 8

Pairs = list[tuple[int, int]]  # (index, seed) of each sample of a batch


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """The batches of `TrainSampler.iterate` from a step on, as often as they are asked for."""

    sampler: TrainSampler
    start_step: int

    def __iter__(self) -> Iterator[Pairs]:
        """The pairs of this process, batch by batch, without end."""
        return self.sampler.iterate(self.start_step)


T = TypeVar("T")  # an item of a data set
B = TypeVar("B")  # what is made of the items of a step


class _Guarded(Dataset[T | UserError]):
    """A data set that returns a UserError as an item: raised in a worker, it would arrive as a traceback."""

    def __init__(self, dataset: Dataset[T]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, int]) -> T | UserError:
        try:
            return self.dataset[item]
        except UserError as error:
            return error


def _collate_guarded(items: list[T | UserError], join: Callable[[list[T]], B]) -> B | UserError:
    good: list[T] = []
    for item in items:
        if isinstance(item, UserError):
            return item
        good.append(item)
    return join(good)


class LoaderKilledError(UserError):
    """A loader process was ended by the system."""


class _DeathNotice:
    """What PyTorch does when a loader process ends, put off until a batch is waited for.

    PyTorch's own handler of SIGCHLD raises wherever the main process happens to be: in the middle of a step, that is,
    whose state could then not be saved.
    """

    def __init__(self) -> None:
        self._raises: Callable[[int, FrameType | None], object] | None = None  # PyTorch's handler
        self._waiting = False
        self._put_off = False

    def take_over(self) -> None:
        """Put ourselves in the place of the handler that PyTorch sets with its first loader in the main thread."""
        if not hasattr(signal, "SIGCHLD"):
            return  # Windows has no such signal, and PyTorch asks for dead processes while it waits
        current = signal.getsignal(signal.SIGCHLD)
        if getattr(current, "__module__", "") == "torch.utils.data._utils.signal_handling":
            assert callable(current)
            self._raises = current
            signal.signal(signal.SIGCHLD, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waiting and self._raises is not None:
            self._raises(number, frame)
        self._put_off = self._put_off or not self._waiting

    def heard(self, wait: Callable[[], T]) -> T:
        """Wait for something, and raise what was put off, and what comes meanwhile, as a LoaderKilledError."""
        self._waiting = True
        try:
            if self._put_off and self._raises is not None:
                self._put_off = False
                self._raises(signal.SIGCHLD, None)
            return wait()
        except (RuntimeError, ConnectionError, EOFError) as error:
            # A process that dies while it hands over a batch breaks the connection, which comes first.
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
        finally:
            self._waiting = False
        # Raised here and without ``wait``: the frames of the error above, and those of this one's traceback, would keep
        # the loader alive, and PyTorch would count its dead processes as those of the next one.
        del wait
        spawned = " (a script needs `if __name__ == '__main__':` around what it does, since each process imports it)"
        raise LoaderKilledError(
            "a loader process was killed, most often since memory or shared memory (/dev/shm) ran out; lower "
            "data.workers, and in Docker raise --shm-size, such as --shm-size=8g"
            + ("" if multiprocessing.get_start_method() == "fork" else spawned)
        )


_notice = _DeathNotice()


class BatchLoader(Generic[B]):
    """Batches in the order of a plan, made by worker processes; a UserError arrives as it was raised."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Generator[B, None, None]:
        """Start the plan from its first batch (LoaderKilledError if a worker is ended by the system)."""
        batches = _notice.heard(lambda: iter(self._loader))
        if threading.current_thread() is threading.main_thread():
            _notice.take_over()
        try:
            while True:
                batch = _notice.heard(partial(next, batches, None))
                if batch is None:  # a batch never is
                    return
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            del batches  # which a traceback would keep

    def __len__(self) -> int:
        """The number of batches (TypeError where the plan has no end)."""
        return len(self._loader)


def worker_count(workers: int | Literal["auto"], device: torch.device, processes: int = 1) -> int:
    """Loader processes of each of a run's ``processes``; ``auto`` keeps a GPU fed: its share of the cores, up to 8."""
    if workers != "auto":
        return workers
    if device.type == "cpu":
        return WORKERS_ON_A_CPU
    return min(MOST_WORKERS, max(1, usable_cores() // sharing_cores(processes)))


GRACE_SECONDS = 30  # that a worker outlives a termination signal, for the main process to finish its step and save


def _start_worker(_worker: int) -> None:
    gc.freeze()  # a collection that walked over the parent's objects would copy the pages they lie in
    cv2.setNumThreads(0)  # the workers are the parallel ones; torch limits itself
    # Ctrl-C and a batch system's signal reach the whole group; the main process decides, and saves first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: signal.alarm(GRACE_SECONDS))


def plan_loader(
    dataset: Dataset[T],
    plan: Iterable[Pairs],
    join: Callable[[list[T]], B],
    workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader[B]:
    """Load the items of each batch of a plan, and join them.

    Args:
        dataset: gives an item for an (index, seed).
        plan: the pairs of each batch; may be without end.
        join: makes a batch of at least one item, in the worker.
        workers: processes.
        pin_memory: put tensors, and objects that can do it themselves, into page-locked memory.
    """
    # Forked workers share the annotations' memory; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork") if workers and sys.platform == "linux" else None
    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_sampler=plan,  # any iterable of lists will do, also one without end
        num_workers=workers,
        collate_fn=partial(_collate_guarded, join=join),
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=context,
        generator=torch.Generator(),  # its own: the global one must not move with each loader
    )
    return BatchLoader(loader)


def train_loader(
    dataset: DetectionDataset,
    sampler: TrainSampler,
    start_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    divisor: int = 32,
    *,
    few_shapes: bool = False,
) -> BatchLoader[Batch]:
    """The training batches of this process, without end, from ``start_step``; ``few_shapes`` as of `collate`.

    They are the same for any number of workers.
    """
    join = partial(collate, divisor=divisor, few_shapes=few_shapes)
    return plan_loader(dataset, TrainPlan(sampler, start_step), join, workers, pin_memory)


def eval_loader(
    dataset: DetectionDataset,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    divisor: int = 32,
) -> BatchLoader[Batch]:
    """Every image exactly once over all processes, in batches of images of one padded size.

    So no image is padded for the sake of another, and what is found in it does not depend on its batch. Batches come
    when they are full, the others last.
    """
    plan: list[list[tuple[int, int]]] = []
    waiting: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for index in range(rank, len(dataset), world):
        size = tuple(-(-side // divisor) for side in dataset.size(index))
        waiting.setdefault(size, []).append((index, 0))
        if len(waiting[size]) == batch_size:
            plan.append(waiting.pop(size))
    plan += waiting.values()
    return plan_loader(dataset, plan, partial(collate, divisor=divisor), workers)
