"""The log of a run: metrics.jsonl, and the losses since its last line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
        self._started = time.perf_counter()

    def metrics_at(self, step: int) -> dict[str, Any] | None:
        """The metrics of the evaluation at this step; None if there was none, or the run stopped before its end."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        found = [row["metrics"] for row in map(json.loads, lines) if row["step"] == step and "metrics" in row]
        return found[-1] if found else None

    def cut(self, step: int) -> None:
        """Drop lines that were written after the checkpoint of this step, from which the run goes on."""
        if not self.writes:
            return
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the run was killed in the middle of its last line
            if row["step"] <= step:
                kept.append(line)
        self.path.write_text("".join(line + "\n" for line in kept))

    def collect(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one batch."""
        for name, value in losses.items():
            detached = value.detach()
            self._sums[name] = self._sums[name] + detached if name in self._sums else detached
        self._batches += 1

    def means(self) -> tuple[dict[str, float], int, float]:
        """Mean losses since the last call, the batches they are of, and the seconds; waits for the device."""
        names, batches = list(self._sums), self._batches
        means = (torch.stack([self._sums[name] for name in names]) / batches).tolist() if batches else []
        seconds = time.perf_counter() - self._started
        self._sums, self._batches = {}, 0
        self.restart_clock()
        return dict(zip(names, means, strict=True)), batches, seconds

    def restart_clock(self) -> None:
        """Count seconds from now on: what took time was not training."""
        self._started = time.perf_counter()

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
