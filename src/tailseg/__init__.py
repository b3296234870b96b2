"""Long-tailed instance segmentation in plain PyTorch: losses, recipes, models, LVIS evaluation."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailseg.errors import UserError
    from tailseg.layers.normalized import NormalizedConv2d, NormalizedLinear
    from tailseg.losses.seesaw import SeesawLoss
    from tailseg.predict import Model, load
    from tailseg.results.detections import Detections

__version__ = version("tailseg")

_HOMES = {
    "Detections": "tailseg.results.detections",
    "Model": "tailseg.predict",
    "NormalizedConv2d": "tailseg.layers.normalized",
    "NormalizedLinear": "tailseg.layers.normalized",
    "SeesawLoss": "tailseg.losses.seesaw",
    "UserError": "tailseg.errors",
    "load": "tailseg.predict",
}

__all__ = [
    "Detections",
    "Model",
    "NormalizedConv2d",
    "NormalizedLinear",
    "SeesawLoss",
    "UserError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line answers --help without waiting for PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module 'tailseg' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
