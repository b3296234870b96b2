"""Runs that are killed at any point come to the end they would have had, bit by bit."""

import random
from pathlib import Path

import pytest
from fault_tools import differences, events_of, run, times


def test_a_run_is_the_same_twice(data: Path, whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", data) == 0
    assert differences(tmp_path / "run", whole) == []
    assert events_of(whole) > 60  # 12 steps, a log line each, six saves, two evaluations


def test_killed_at_any_event(data: Path, whole: Path, tmp_path: Path) -> None:
    """Steps, saves, log lines, evaluations: an event is a step, or an access to a file of the run."""
    total, count = events_of(whole), times(3, 40)
    rng = random.Random(0)
    for number in range(count):
        place = rng.randrange(1 + total * number // count, 1 + total * (number + 1) // count)
        out = tmp_path / f"run-{place}"
        assert run(out, data, fault="killed", at=place) == -9
        assert run(out, data) == 0
        assert differences(out, whole) == [], f"killed at event {place} of {total}"


def test_killed_again_and_again(data: Path, whole: Path, tmp_path: Path) -> None:
    """Every process lives for a few events more than the one before managed."""
    out, rng = tmp_path / "run", random.Random(1)
    deaths = 0
    for _ in range(times(1, 10)):
        lived = rng.randrange(events_of(whole) // 4, events_of(whole) // 2)
        deaths += run(out, data, fault="killed", at=lived) == -9
    assert deaths >= 1
    assert run(out, data) == 0
    assert differences(out, whole) == []


@pytest.mark.skipif(times(0, 1) == 0, reason="in `make soak` only")
def test_killed_at_any_time(data: Path, whole: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    for number in range(10):
        out = tmp_path / f"run-{number}"
        run(out, data, kill_after=rng.uniform(0, 3))
        assert run(out, data) == 0
        assert differences(out, whole) == []
