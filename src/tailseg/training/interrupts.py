"""Ctrl-C and termination signals: a run finishes its step, saves and stops."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def interrupts(*, tell: bool = True) -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C or a termination signal has come; a second one stops at once.

    Args:
        tell: say so to the user.
    """
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        if tell:
            logger.warning("Stopping after this step and saving; press Ctrl-C again to stop at once.")

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
