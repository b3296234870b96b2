"""Signs of a run that goes wrong while its losses are finite: long gradients, and box heads that have gone silent."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from tailseg.model.box_head import BoxHead

logger = logging.getLogger(__name__)

SILENT = 0.5  # share of the RoIs from which on a head is taken for dead; in sound runs it was 0 throughout


class Health:
    """Collects what it needs without waiting for the device; the loop asks when it writes its log.

    Args:
        model: what is trained.
        speaks: whether this process is the one that warns.
    """

    def __init__(self, model: nn.Module, *, speaks: bool) -> None:
        self.heads = [module for module in model.modules() if isinstance(module, BoxHead)]
        self.speaks = speaks
        self.warned = False
        self._norms: list[Tensor] = []

    def collect(self, norm: Tensor | None) -> None:
        """Add the length of one step's gradient, before it was clipped."""
        if norm is not None:
            self._norms.append(norm.detach())

    def row(self, step: int) -> dict[str, float]:
        """For the log: ``gradient`` (mean length, if they are clipped) and ``silent`` (share of RoIs); may warn."""
        row = {"gradient": float(torch.stack(self._norms).mean())} if self._norms else {}
        self._norms = []
        silent = [head.silent for head in self.heads if head.silent is not None]
        if silent:
            row["silent"] = float(torch.stack(silent).max())
            self._warn(step, row["silent"])
        return row

    def _warn(self, step: int, silent: float) -> None:
        if silent <= SILENT or self.warned or not self.speaks:
            return
        self.warned = True
        logger.warning(
            "Step %d: a box head has died: for %.0f %% of the RoIs every unit of its last hidden layer is zero, so it "
            "says the same of all and hardly learns; lower optimizer.lr, raise schedule.warmup_steps or set "
            "optimizer.clip, and start again.", step, 100 * silent,
        )  # fmt: skip
