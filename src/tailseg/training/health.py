"""Signs of a run that goes wrong while its losses are finite, each told once, with its likely cause and the fix.

Long gradients, box heads that have gone silent, proposals that meet no object, losses that do not fall. The loader has
a watch of its own (`loader_watch`), and evaluations without a detection are told in `evaluations`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tailseg.model.box_head import BoxHead, RoISampler, RoITargets
from tailseg.model.rpn import RPN

logger = logging.getLogger(__name__)

SILENT = 0.5  # share of the RoIs from which on a head is taken for dead; in sound runs it was 0 throughout
ROI_STEPS = 100  # without a proposal that meets an object, from which on it is told
LOSS_STEPS = 100  # before which nothing is said of losses
SHARE = 0.1  # of these steps, compared at their beginning and their end
FALLEN = 0.95  # of what it was: a loss below it has fallen
SIGNS = ("positives proposed", "objects", "sum of their sides")  # of a batch
RISEN = 1.2  # of what it was: the loss of a run from a trained model, which need not fall


class Health:
    """Collects what it needs without waiting for the device; the loop asks when it writes its log.

    Args:
        model: what is trained.
        speaks: whether this process is the one that warns.
    """

    def __init__(self, model: nn.Module, *, speaks: bool) -> None:
        self.heads = [module for module in model.modules() if isinstance(module, BoxHead)]
        self.proposals = Proposals(model)
        self.speaks = speaks
        self.warned = False
        self._norms: list[Tensor] = []
        self._silent: Tensor | None = None

    def clear(self) -> None:
        """Forget what forward passes have left behind."""
        for head in self.heads:
            head.silent = None
        self.proposals.left.clear()

    def taken(self) -> dict[str, Tensor]:
        """Signs of the forward pass that was just made, named scalars, for `add`; it leaves none behind."""
        silent = [head.silent for head in self.heads if head.silent is not None]
        signs = {"silent": torch.stack(silent).max()} if silent else {}
        signs |= self.proposals.taken()
        self.clear()
        return signs

    def add(self, signs: dict[str, Tensor]) -> None:
        """Add the signs of one batch."""
        self._silent = signs.get("silent", self._silent)
        self.proposals.add(signs)

    def collect(self, norm: Tensor) -> None:
        """Add the length of one step's gradient, before it was clipped."""
        self._norms.append(norm.detach())

    def row(self, step: int) -> dict[str, float]:
        """For the log: ``gradient`` (mean length) and ``silent`` (share of RoIs); may warn."""
        row = {"gradient": float(torch.stack(self._norms).mean())} if self._norms else {}
        self._norms = []
        if self._silent is not None:
            row["silent"] = float(self._silent)
            self._warn(step, row["silent"])
        trouble = self.proposals.trouble(step)
        if trouble and self.speaks:
            logger.warning(trouble)
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


class Proposals:
    """Watches whether proposals meet objects; the annotated boxes, which are put among them, always do.

    Args:
        model: what is trained; nothing is watched where that has no first stage.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sampler = next((module for module in model.modules() if isinstance(module, RoISampler)), None)
        self.rpn = next((module for module in model.modules() if isinstance(module, RPN)), None)
        self.told = False
        self.left: list[Tensor] = []  # (3,) each, of `SIGNS`, of calls of a forward pass
        self._batches: list[Tensor] = []  # (3,) each, of batches
        self._steps, self._sums = 0, torch.zeros(3, dtype=torch.float64)
        if self.sampler is not None:
            self.sampler.register_forward_hook(self._collect)

    def _collect(self, sampler: nn.Module, _inputs: object, targets: RoITargets) -> None:
        if not sampler.training or self.told:
            return
        width, height = (targets.boxes[:, 2:] - targets.boxes[:, :2]).clamp(min=0).unbind(1)
        own = targets.positive & targets.is_ground_truth
        found = (targets.positive & ~targets.is_ground_truth).sum()
        self.left.append(torch.stack([found.float(), own.sum().float(), ((width * height).sqrt() * own).sum()]))

    def taken(self) -> dict[str, Tensor]:
        """`SIGNS` of the forward pass that was just made."""
        return dict(zip(SIGNS, torch.stack(self.left).sum(0).unbind(), strict=True)) if self.left else {}

    def add(self, signs: dict[str, Tensor]) -> None:
        """Add those of one batch, if it has them."""
        if not self.told and SIGNS[0] in signs:
            self._batches.append(torch.stack([signs[name] for name in SIGNS]))

    def trouble(self, step: int) -> str:
        """A sentence if no proposal met an object for many batches; empty otherwise, and once it was told."""
        if not self._batches or self.sampler is None or self.rpn is None:
            return ""
        self._sums += torch.stack(self._batches).sum(0).cpu().double()
        self._steps += len(self._batches)
        self._batches = []
        found, objects, sides = self._sums.tolist()
        if found > 0:
            self._steps, self._sums = 0, torch.zeros(3, dtype=torch.float64)
        if found > 0 or objects == 0 or self._steps < ROI_STEPS:
            return ""
        self.told = True
        corners = self.rpn.base_anchors.flatten(0, 1)
        anchors = (corners[:, 2:] - corners[:, :2]).prod(1).sqrt().tolist()
        side, least, most = sides / objects, min(anchors), max(anchors)
        if side < least / 2:
            fix = "raise data.short_edges and data.long_edge, or lower model.rpn.anchor_scale"
        elif side > 2 * most:
            fix = "lower data.short_edges, or raise model.rpn.anchor_scale"
        else:
            fix = "these fit, so look at the boxes with `tailseg data check`, then try another optimizer.lr"
        return (
            f"Step {step}: in {self._steps} batches no proposal overlapped an object by "
            f"{self.sampler.matcher.positive_iou:g} or more (no positive RoIs): objects are {side:.0f} pixels wide on "
            f"average as the network sees them, anchors {least:.0f} to {most:.0f}; {fix}."
        )


class LossWatch:
    """Compares the losses of the end of the first epoch with those of its beginning.

    Args:
        steps: of an epoch; a short one is looked at together with those after it.
        warmup: steps, at the end of which the loss may not have begun to fall.
        trained: whether the run starts from a trained model.
        speaks: whether this process is the one that warns.
    """

    def __init__(self, steps: int, warmup: int, *, trained: bool, speaks: bool) -> None:
        self.until = max(steps, LOSS_STEPS, 2 * warmup)
        self.trained = trained
        self._lines: list[tuple[int, dict[str, float]]] = []
        self._watches = speaks

    def look(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        """Warn, once there are enough steps, if the losses have not fallen.

        Args:
            step: of the line of the log.
            losses: means of the steps since the line before.
            rate: `optimizer.lr`.
        """
        if not self._watches:
            return
        self._lines.append((step, dict(losses)))
        began = self._lines[0][0]
        if began > self.until / 3:  # resumed, or lines too rare to compare
            self._watches = False
        elif step >= self.until:
            self._watches = False
            self._compare(step, max(round(SHARE * step), began), rate)

    def _compare(self, step: int, count: int, rate: float) -> None:
        """Compare the first and the last ``count`` steps."""
        first = _means([own for at, own in self._lines if at <= count])
        last = _means([own for at, own in self._lines if at > step - count])
        before, after = sum(first.values()), sum(last.values())
        fallen = sum(last[name] < FALLEN * value for name, value in first.items())
        if after < (RISEN if self.trained else 1) * before or 3 * fallen >= len(first):
            return
        logger.warning(
            "Step %d: the loss has not fallen: %.4g in the first %d steps, %.4g in the last %d; most likely "
            "optimizer.lr = %g is far too low or too high: try a tenth and ten times of it, and if neither helps, look "
            "at boxes and labels with `tailseg data check`.", step, before, count, after, count, rate,
        )  # fmt: skip


def _means(lines: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(line[name] for line in lines) / len(lines) for name in lines[0]}
