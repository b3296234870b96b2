"""What can happen to a run from outside, at any of its events: `fault_tools.run` makes it happen in its process."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir")


def happens(fault: str | None, out: Path, event: int | None) -> Callable[[], int]:
    """Make a fault happen at an event of this process, which should be a run in ``out``.

    An event is a step (the function that is returned is to be called at each) or an access to a file of the run.

    Returns:
        A function that counts a step, and gives the number of events so far.
    """
    events, busy = 0, False

    def happen() -> int:
        nonlocal events, busy
        if busy:
            return events
        events += 1
        if fault is not None and event is not None and (events == event or (fault == TWICE and events == event + 1)):
            busy = True
            try:
                FAULTS[fault](out)
            finally:
                busy = False
        return events

    def heard(name: str, arguments: tuple[Any, ...]) -> None:
        if name in FILE_EVENTS and any(str(out) in str(argument) for argument in arguments[:2]):
            happen()

    sys.addaudithook(heard)
    return happen


def _signal(number: signal.Signals) -> Callable[[Path], None]:
    return lambda _: os.kill(os.getpid(), number)


def _full(_: Path) -> None:
    """From now on no file can grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _read_only(out: Path) -> None:
    _obey_rights()
    set_rights(out, writable=False)


def set_rights(out: Path, *, writable: bool) -> None:
    """Let a folder and all in it be written to, or not."""
    if out.exists():
        for path in (out, *out.iterdir()):
            path.chmod((0o755 if path.is_dir() else 0o644) if writable else (0o555 if path.is_dir() else 0o444))


def _obey_rights() -> None:
    """Let this process, which may be root's, no longer go past the rights of files."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if library.capget(header, sets) == 0:
        sets[0] &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        library.capset(header, sets)


def _set_clock_back(_: Path) -> None:
    year = 365 * 24 * 3600
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - year  # type: ignore[assignment]
    time.time_ns = lambda: now_ns() - year * 10**9  # type: ignore[assignment]


TWICE = "two interrupts"
FAULTS: dict[str, Callable[[Path], None]] = {
    "killed": _signal(signal.SIGKILL),
    "terminated": _signal(signal.SIGTERM),
    "interrupt": _signal(signal.SIGINT),
    TWICE: _signal(signal.SIGINT),
    "full disk": _full,
    "read-only": _read_only,
    "deleted": lambda out: shutil.rmtree(out, ignore_errors=True),
    "clock set back": _set_clock_back,
}
