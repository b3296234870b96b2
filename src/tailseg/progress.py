"""Progress bars with an estimate of the time left: on a terminal only, and never with --quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[..., None]  # (units done so far, note shown beside the bar)


def _silent(done: int, note: str = "") -> None:
    """Progress that nobody watches."""


@contextmanager
def progress_bar(title: str, total: int | None, *, show: bool) -> Iterator[Advance]:
    """A bar of ``total`` units, None if nobody knows; without a terminal, or if ``show`` is False, nothing is drawn."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield _silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield advance
