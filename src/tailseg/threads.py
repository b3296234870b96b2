"""Work that threads do beside their caller, and the processor cores there are for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def usable_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sharing_cores(processes: int) -> int:
    """Number of a run's processes, on one machine or many, that share the cores which this one may use."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # of torchrun
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if "SLURM_NNODES" in os.environ and "SLURM_NTASKS" in os.environ:
        bound = usable_cores() <= int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
        return 1 if bound else -(-processes // int(os.environ["SLURM_NNODES"]))
    return processes


def read_ahead(read: Callable[[A], T], plan: Iterable[A], threads: int) -> Generator[T, None, None]:
    """``read`` of every part of a plan, in order, up to two parts a thread before they are asked for.

    Threads and not processes: what they read is large, and would have to be handed over in shared memory, of which
    containers have little. The plan itself is walked by the caller's thread.
    """
    if threads == 0:
        yield from map(read, plan)
        return
    parts = iter(plan)
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque[Future[T]] = deque(pool.submit(read, part) for part in islice(parts, 2 * threads))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(read, part) for part in islice(parts, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


def at_once(function: Callable[[A], T], parts: Sequence[A]) -> list[T]:
    """``function`` of each part, by as many threads as there are cores; the first fault in their order is raised."""
    threads = min(usable_cores(), len(parts))
    if threads < 2:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, parts))
