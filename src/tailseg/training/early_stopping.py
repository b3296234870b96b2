"""Early stopping: a run ends once its evaluations no longer get better (`training.patience`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lightning_fabric import Fabric

from tailseg.training.distributed import worst
from tailseg.training.run_log import RunLog, better

logger = logging.getLogger(__name__)


def evaluations_since_best(reached: Sequence[float | None]) -> int:
    """Number of evaluations after the one with the largest segm AP; of equal ones, the first.

    Args:
        reached: segm AP of each evaluation, in their order; None where nothing could be measured.
    """
    best, since = None, 0
    for value in reached:
        since = 0 if better(best, value) != best else since + 1
        best = better(best, value)
    return since


def out_of_patience(fabric: Fabric, run_log: RunLog, step: int, limit: int | None) -> bool:
    """Whether the run ends here, since ``limit`` evaluations did not beat the best; the same in all processes."""
    if limit is None:
        return False
    since = evaluations_since_best(run_log.segm_aps(step)) if fabric.global_rank == 0 else 0
    if since >= limit:
        logger.warning(
            "Step %d: stopped early, since %d evaluations did not beat the best segm AP; for more, --resume with a "
            "larger training.patience.", step, since,
        )  # fmt: skip
    return bool(worst(fabric, since >= limit))
