"""Work that may fail in any process, and ends for all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning_fabric import Fabric

from tailseg.errors import UserError
from tailseg.training.distributed import first_trouble, worst

T = TypeVar("T")
DONE, FAILED = 0, 1


class _ElsewhereError(Exception):
    """Another process failed before the meeting, and says why afterwards."""


def attempt(fabric: Fabric, job: Callable[[Callable[[], None]], T]) -> tuple[T | None, str]:
    """Do a job in every process; where it fails in one, it has failed for all.

    Every process takes part in the same two meetings, whatever happens to it, so none waits for one that does not come.

    Args:
        fabric: of the run.
        job: is given a function to call at most once, that waits for all processes; then what it waited for holds.

    Returns:
        What the job gave, and an empty string; or None and what went wrong first, in every process. Ctrl-C is not
        caught.
    """
    met, trouble, result = False, "", None

    def meet() -> None:
        nonlocal met
        met = True
        if worst(fabric, DONE) == FAILED:
            raise _ElsewhereError

    try:
        result = job(meet)
    except _ElsewhereError:
        pass
    except Exception as error:
        trouble = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if trouble and fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    if not met:
        worst(fabric, FAILED if trouble else DONE)
    trouble = first_trouble(fabric, trouble)
    return (None, trouble) if trouble else (result, "")
