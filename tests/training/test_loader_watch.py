"""Time spent waiting for images: measured by a clock that the test sets, told once, with a number of workers."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tailseg.training import loader_watch
from tailseg.training.loader_watch import LoaderWatch

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def batches(self, seconds: float) -> Iterator[int]:
        """Batches that take so long to come."""
        number = 0
        while True:
            self.now += seconds
            yield (number := number + 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(loader_watch, "time", made)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return made


def watch(workers: int, *, processes: int = 1, speaks: bool = True, measures: bool = True) -> LoaderWatch:
    return LoaderWatch(CPU, workers, processes, speaks=speaks, measures=measures)


def run(watched: LoaderWatch, clock: Clock, seconds: float, steps: int = 11) -> dict[str, float]:
    """The row after eleven batches, of which the first is not counted, in 25 seconds."""
    batches = clock.batches(seconds)
    assert [watched.next(batches) for _ in range(steps)] == list(range(1, steps + 1))
    return watched.row(40, 25.0)


def test_a_loader_that_keeps_up_is_not_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert run(watch(2), clock, 0.5) == {"waiting": pytest.approx(0.2)}
    assert caplog.text == ""


def test_a_starved_device_is_told_once_with_the_workers_to_try(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    watched = watch(2)
    # Half of the time is waited for two workers: four would deliver twice as much.
    assert run(watched, clock, 1.25) == {"waiting": 0.5}
    assert run(watched, clock, 1.25)["waiting"] > 0.5
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert told.getMessage() == (
        "Step 40: 50 % of the time goes into waiting for images; set data.workers=4 (now 2) and go on with --resume."
    )


@pytest.mark.parametrize(
    ("workers", "processes", "seconds", "fix"),
    [
        (0, 1, 1.0, "set data.workers=1 (now 0)"),  # 40 % of the time is loading, 60 % the rest: one does it meanwhile
        (0, 1, 2.0, "set data.workers=4 (now 0)"),  # 80 % is loading, 20 % the rest
        (4, 1, 2.0, "set data.workers=8 (now 4)"),  # 20 would be wanted, 8 cores are there
        (2, 2, 1.25, "set data.workers=4 (now 2)"),
        (4, 2, 1.25, "data.workers = 4 uses all 4 cores of a process: lower data.short_edges"),
        (8, 1, 1.25, "data.workers = 8 uses all 8 cores of a process"),
    ],
)
def test_workers_to_try(
    workers: int, processes: int, seconds: float, fix: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    run(watch(workers, processes=processes), clock, seconds)
    assert fix in caplog.text


def test_what_is_not_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert run(watch(2, speaks=False), clock, 2.0) == {"waiting": 0.8}
    assert run(watch(2, measures=False), clock, 2.0) == {}
    short = watch(2)
    batches = clock.batches(1.0)
    for _ in range(6):
        short.next(batches)
    assert short.row(20, 6.0) == {"waiting": pytest.approx(5 / 6)}  # six seconds are too few to judge
    assert caplog.text == ""


def test_a_gpu_that_still_works_does_not_wait(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each batch it is asked, without waiting, whether all that was queued is done."""
    answers = iter([True, True, False, True, False, False, True, True])

    class Event:
        def record(self, stream: object) -> None:
            pass

        def query(self) -> bool:
            return next(answers)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    watched = LoaderWatch(torch.device("cuda", 0), 2, 1, speaks=True)
    batches = clock.batches(1.0)
    for _ in range(4):  # the first is not counted; then half, nothing and all of a second
        watched.next(batches)
    assert watched.row(4, 4.0) == {"waiting": 1.5 / 4}
