"""Work of threads: in order, no further ahead than allowed, faults in their turn."""

import os
import threading
from contextlib import closing
from itertools import islice

import pytest

from tailseg import threads
from tailseg.errors import UserError
from tailseg.threads import at_once, read_ahead, sharing_cores


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reading_ahead_keeps_the_order_and_tells_faults_in_their_turn(threads: int) -> None:
    def read(part: int) -> int:
        if part == 20:
            raise UserError("the twentieth")
        return part * part

    assert list(read_ahead(read, range(20), threads)) == [n * n for n in range(20)]
    assert list(read_ahead(read, [], threads)) == []
    endless = iter(range(10**9))
    with closing(read_ahead(read, endless, threads)) as parts:
        assert list(islice(parts, 20)) == [n * n for n in range(20)]  # the fault that lies ahead is nobody's yet
        with pytest.raises(UserError, match="the twentieth"):
            next(parts)
    assert next(endless) <= 20 + 2 * threads + 1


def test_all_at_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    together = threading.Barrier(3, timeout=60)  # which only three threads at a time get past

    def square(number: int) -> int:
        together.wait()
        return number * number

    assert at_once(square, range(6)) == [0, 1, 4, 9, 16, 25]
    assert at_once(abs, []) == []


@pytest.mark.parametrize("cores", [1, 4])
def test_the_first_fault_is_told(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)

    def fail(number: int) -> int:
        if number in (2, 3):
            raise UserError(f"number {number}")
        return number

    with pytest.raises(UserError, match="number 2"):
        at_once(fail, range(5))


def test_one_thing_needs_no_thread() -> None:
    assert at_once(lambda _: threading.current_thread(), [0]) == [threading.current_thread()]


@pytest.mark.parametrize(
    ("surroundings", "cores", "sharing"),
    [
        ({}, 16, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 16, 4),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS": "8"}, 16, 4),
        ({"SLURM_NNODES": "3", "SLURM_NTASKS": "8"}, 16, 3),  # 3, 3 and 2
        ({"SLURM_NNODES": "2", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "4"}, 4, 1),  # bound to its own
        ({"SLURM_NNODES": "2", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "4"}, 16, 4),
    ],
)
def test_who_shares_the_cores(
    monkeypatch: pytest.MonkeyPatch, surroundings: dict[str, str], cores: int, sharing: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    assert sharing_cores(8) == sharing
