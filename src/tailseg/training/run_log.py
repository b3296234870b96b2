"""The log of a run: metrics.jsonl, and the losses since its last line."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailseg.files import writing

logger = logging.getLogger(__name__)

Logged = tuple[int, bool]  # a line by its step, and whether it is that of an evaluation


class RunLog:
    """Collects losses without waiting for the device, and writes a line of JSON now and then.

    Args:
        path: metrics.jsonl.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._first: Tensor | None = None  # the total of the first batch
        self._started = time.perf_counter()

    def metrics_at(self, step: int) -> dict[str, Any] | None:
        """The metrics of the evaluation at this step; None if there was none, or the run stopped before its end."""
        found = [row["metrics"] for row, _ in self._rows() if row and row["step"] == step and "metrics" in row]
        return found[-1] if found and _are_metrics(found[-1]) else None

    def segm_aps(self, step: int) -> list[float | None]:
        """Segm AP of the evaluations up to this step, in their order."""
        rows = (row for row, _ in self._rows() if row and row["step"] <= step)
        return [row["metrics"]["segm"]["AP"] for row in rows if _are_metrics(row.get("metrics"))]

    def cut(self, step: int) -> set[Logged]:
        """Drop lines that were written after the checkpoint of this step, from which the run goes on.

        What a kill left of a line goes too, whatever the byte that it came at.

        Returns:
            The lines that were dropped.
        """
        if not self.writes:
            return set()
        rows = list(self._rows())
        broken = sum(row is None and bool(line) for row, line in rows)
        if broken:
            logger.info("%s: dropped %d lines that a kill cut short.", self.path, broken)
        kept = "".join(line + "\n" for row, line in rows if row is not None and row["step"] <= step)
        part = self.path.with_name(f".{self.path.name}.part")
        with writing(self.path):
            part.write_text(kept, encoding="utf-8")
        os.replace(part, self.path)  # a kill at this moment leaves the old file or the new one
        return {(row["step"], "metrics" in row) for row, _ in rows if row is not None and row["step"] > step}

    def _rows(self) -> Iterator[tuple[dict[str, Any] | None, str]]:
        """Lines with their values; None for what is no complete line."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
                row = None
            yield (row if isinstance(row, dict) and type(row.get("step")) is int else None), line

    def collect(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one batch."""
        for name, value in losses.items():
            detached = value.detach()
            self._sums[name] = self._sums[name] + detached if name in self._sums else detached
        if self._first is None:
            self._first = torch.stack([value.detach() for value in losses.values()]).sum()
        self._batches += 1

    def means(self) -> tuple[dict[str, float], int, float]:
        """Mean losses since the last call, the batches they are of, and the seconds; waits for the device."""
        names, batches = list(self._sums), self._batches
        means = (torch.stack([self._sums[name] for name in names]) / batches).tolist() if batches else []
        seconds = time.perf_counter() - self._started
        self._sums, self._batches = {}, 0
        self.restart_clock()
        return dict(zip(names, means, strict=True)), batches, seconds

    def began_finite(self) -> bool:
        """Whether the losses of the first batch were finite, before any step of this process; waits for the device."""
        return self._first is None or bool(self._first.isfinite())

    def restart_clock(self) -> None:
        """Count seconds from now on: what took time was not training."""
        self._started = time.perf_counter()

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        if self.writes:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def better(one: float | None, other: float | None) -> float | None:
    """The larger of two APs, of which either may be missing."""
    return max((value for value in (one, other) if value is not None), default=None)


def _are_metrics(value: Any) -> bool:
    """Whether a value of the log, which may be damaged, has the segm AP."""
    found = value.get("segm") if isinstance(value, dict) else None
    return isinstance(found, dict) and isinstance(found.get("AP", ""), float | int | None)
