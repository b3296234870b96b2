"""Samples to batches, and the loaders of training and evaluation."""

from __future__ import annotations

import gc
import math
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
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tailseg.data.dataset import DetectionDataset
from tailseg.data.sampling import TrainSampler
from tailseg.data.transforms import Compose, Image
from tailseg.errors import UserError
from tailseg.structures import IGNORED_CELL, Batch, Instances, Sample
from tailseg.threads import sharing_cores, usable_cores

FEW_SHAPES_DIVISOR = 128  # pixels
FEW_SHAPES_ROWS, FEW_SHAPES_FACTOR = 32, 4


def collate(samples: list[Sample], divisor: int = 32, *, few_shapes: bool = False) -> Batch:
    """One batch of at least one sample.

    Images are padded right and bottom with 0 to the largest height and width, rounded up to multiples of
    ``divisor``. Objects are padded with zero rows to those of the fullest image, at least one row.

    With ``few_shapes`` a data set makes batches of few shapes: sides are multiples of 128, too, and rows of objects 32,
    128, 512 and so on.
    """
    if few_shapes:
        divisor = coarser(divisor)
    hws = [(int(s.image.shape[1]), int(s.image.shape[2])) for s in samples]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*hws, strict=True))
    images = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8)
    for image, sample, (h, w) in zip(images, samples, hws, strict=True):
        image[:, :h, :w] = sample.image
    rows = max(1, *(len(s.instances) for s in samples))
    rows = rounded_rows(rows) if few_shapes else rows
    valid = torch.zeros((len(samples), rows), dtype=torch.bool)
    for flags, sample in zip(valid, samples, strict=True):
        flags[: len(sample.instances)] = True
    return Batch(
        images=images,
        image_sizes=torch.tensor(hws),
        original_sizes=torch.tensor([s.original_hw for s in samples]),
        image_ids=torch.tensor([s.image_id for s in samples]),
        boxes=_padded([s.instances.boxes for s in samples], rows),
        labels=_padded([s.instances.labels for s in samples], rows),
        valid=valid,
        masks=_padded([s.instances.masks for s in samples], rows),
        mask_frames=_padded([s.instances.mask_frames for s in samples], rows),
        absent=torch.stack([s.absent for s in samples]),
        ignored=_ignored([s.ignored for s in samples], (height, width)),
    )


def coarser(divisor: int) -> int:
    """Multiple of a divisor that sides are padded to where shapes shall be few, in pixels."""
    return math.lcm(divisor, FEW_SHAPES_DIVISOR)


def rounded_rows(rows: int) -> int:
    """Rows of objects where shapes shall be few: 32, 128, 512, ..."""
    rounded = FEW_SHAPES_ROWS
    while rounded < rows:
        rounded *= FEW_SHAPES_FACTOR
    return rounded


def _ignored(parts: list[Tensor], image_hw: tuple[int, int]) -> Tensor:
    """(B, H / 4, W / 4) uint8 of the maps of the images, some of which may have none; (B, 0, 0) if all have none."""
    if all(part.numel() == 0 for part in parts):
        return torch.zeros((len(parts), 0, 0), dtype=torch.uint8)
    maps = torch.zeros((len(parts), *(-(-side // IGNORED_CELL) for side in image_hw)), dtype=torch.uint8)
    for target, part in zip(maps, parts, strict=True):
        target[: part.shape[0], : part.shape[1]] = part
    return maps


def _padded(parts: list[Tensor], rows: int) -> Tensor:
    """(N_i, ...) for each image -> (B, rows, ...), zero beyond N_i."""
    padded = parts[0].new_zeros((len(parts), rows, *parts[0].shape[1:]))
    for target, part in zip(padded, parts, strict=True):
        target[: len(part)] = part
    return padded


def batch_of(picture: Image, transform: Compose, divisor: int) -> Batch:
    """One picture (H, W, 3) uint8 RGB as a batch, without objects, after a transform in which nothing is chance.

    Args:
        picture: of at least one pixel.
        transform: applied to it.
        divisor: the batch is padded to multiples of this.
    """
    nothing = Instances(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 1, 1, dtype=torch.uint8),
        mask_frames=torch.zeros(0, 4),
    )
    pixels, instances = transform(picture, nothing, np.random.default_rng(0))
    sample = Sample(
        image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        instances=instances,
        absent=torch.zeros(0, dtype=torch.bool),
        image_id=0,
        original_hw=(picture.shape[0], picture.shape[1]),
    )
    return collate([sample], divisor)


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
