"""Progress of long work, on stderr: a bar on a terminal, elsewhere a line of the log now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[..., None]  # (units done so far, note shown beside them)

SECONDS = 30.0  # between two lines of work that says nothing but how far it is

logger = logging.getLogger(__name__)


def _silent(done: int, note: str = "") -> None:
    """Progress that nobody watches."""


@contextmanager
def progress_bar(
    title: str, total: int | None, *, show: bool, lines: str = "seconds", console: Console | None = None
) -> Iterator[Advance]:
    """Show how far some work is: a bar on a terminal, a line of the log elsewhere.

    Args:
        title: of the work.
        total: its units, None if nobody knows.
        show: False shows nothing.
        lines: where there is no terminal, ``seconds``: a line every 30 seconds; ``notes``: one for each new note.
        console: stderr by default.
    """
    console = console or Console(stderr=True)
    if not show:
        yield _silent
    elif not console.is_terminal:
        yield _Lines(title, total, each_note=lines == "notes")
    else:
        with _Bar(console) as bar:
            task = bar.add_task(title, total=total)

            def advance(done: int, note: str = "") -> None:
                bar.note = note
                bar.update(task, completed=done)

            yield advance


class _Bar(Progress):
    """A bar as wide as the terminal, with the note on a line of its own."""

    def __init__(self, console: Console) -> None:
        self.note = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and, where there is one, the note."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis")


class _Lines:
    """Lines of the log; the time left is reckoned from the units since the first call."""

    def __init__(self, title: str, total: int | None, *, each_note: bool) -> None:
        self.title, self.total, self.each_note = title, total, each_note
        self.last_note = ""
        self.last_line = time.monotonic()
        self.first: tuple[float, int] | None = None  # time and units of the first call

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        self.first = self.first or (now, done)
        is_new = bool(note) and note != self.last_note
        if not (is_new if self.each_note else now - self.last_line >= SECONDS):
            return
        self.last_note, self.last_line = note, now
        texts = [f"{done}" if self.total is None else f"{done}/{self.total}", note, self._left(now, done)]
        logger.info("%s: %s", self.title, ", ".join(filter(None, texts)))

    def _left(self, now: float, done: int) -> str:
        assert self.first is not None
        began, units = self.first[0], done - self.first[1]
        if self.total is None or units <= 0:
            return ""
        return f"{timedelta(seconds=round((now - began) / units * (self.total - done)))} left"
