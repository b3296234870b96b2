"""How long a run waits for its loader, and which `data.workers` would make it wait less."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from tailseg.threads import usable_cores

logger = logging.getLogger(__name__)

STARVED = 0.3  # share of the time from which on it is told
SECONDS = 20.0  # that are looked at before anything is told: shorter ones tell of disk caches and other jobs


class LoaderWatch:
    """Measures the time in which the device had nothing to do since the next batch was not there.

    On a GPU, which works on while the CPU waits, waiting counts only from where its work was done. That is asked for
    without waiting: it is known before and after, so that in between half of the time counts.

    Args:
        device: that trains.
        workers: loader processes (`data.workers`).
        processes: of the run, on this machine.
        speaks: whether this process is the one that warns.
        measures: False where making a batch is work of the device itself.
    """

    def __init__(
        self, device: torch.device, workers: int, processes: int, *, speaks: bool, measures: bool = True
    ) -> None:
        self.device, self.workers, self.processes = device, workers, processes
        self.speaks, self.measures = speaks, measures
        self.warned = False
        self._waited = 0.0  # since the last line of the log
        self._first = True
        self._window = [0.0, 0.0]  # seconds waited and passed that are not yet judged

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch."""
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
        idle_before = done is None or done.query()
        started = time.perf_counter()
        batch = next(batches)
        seconds = time.perf_counter() - started
        idle_after = done is None or done.query()
        if not self._first:  # while workers start, everybody waits
            self._waited += seconds * (idle_before + idle_after) / 2
        self._first = False
        return batch

    def row(self, step: int, seconds: float) -> dict[str, float]:
        """For the log: ``waiting``, the share of the seconds since its last line; may warn."""
        if not self.measures:
            return {}
        waited, self._waited = min(self._waited, seconds), 0.0
        self._window[0] += waited
        self._window[1] += seconds
        if self._window[1] >= SECONDS:
            self._judge(step, self._window[0] / self._window[1])
            self._window = [0.0, 0.0]
        return {"waiting": waited / seconds}

    def _judge(self, step: int, share: float) -> None:
        if share <= STARVED or self.warned or not self.speaks:
            return
        self.warned = True
        logger.warning(
            "Step %d: %.0f %% of the time goes into waiting for images; %s.", step, 100 * share, self._fix(share)
        )

    def _fix(self, share: float) -> str:
        # The workers, or this process itself, work all the time and keep the rest busy for 1 - share of it.
        wanted = math.ceil((self.workers or share) / (1 - min(share, 0.9)) - 1e-6)
        room = max(1, usable_cores() // self.processes)
        if self.workers >= room:
            return (
                f"data.workers = {self.workers} uses all {room} cores of a process: lower data.short_edges, "
                "data.copy_paste or data.instaboost, or put the images onto a faster disk"
            )
        return (
            f"set data.workers={min(max(wanted, self.workers + 1), room)} (now {self.workers}) and go on with --resume"
        )
