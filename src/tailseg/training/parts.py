"""Parts of a detector by name, for `training.freeze` and `optimizer.rates`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tailseg.errors import UserError
from tailseg.model.detector import Detector


def modules_of(detector: Detector, part: str, key: str) -> list[nn.Module]:
    """The modules of a part: ``box_heads`` are those of all stages.

    Args:
        detector: whose.
        part: its name.
        key: of the recipe, for messages.

    Raises:
        UserError: this detector has no such part.
    """
    if part in ("box_heads", "mask_heads"):
        found = [getattr(stage, part.removesuffix("s")) for stage in detector.stages]
    else:
        found = [getattr(detector, part)]
    modules = [module for module in found if module is not None]
    if not modules:
        raise UserError(f"{key}: this model has no part {part}; leave it out")
    return modules


def freeze(detector: Detector, parts: Sequence[str]) -> list[nn.Module]:
    """Take the parts out of training; the modules that have to be put into evaluation mode in every step.

    Raises:
        UserError: this detector has no such part, or nothing would be left to train.
    """
    frozen = [module for part in parts for module in modules_of(detector, part, "training.freeze")]
    for module in frozen:
        module.requires_grad_(False)
    if not any(p.requires_grad for p in detector.parameters()):
        raise UserError(f"training.freeze: {', '.join(parts)} is all that could be trained; leave some of it out")
    return frozen
