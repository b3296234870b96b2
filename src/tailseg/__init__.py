"""Long-tailed instance segmentation in plain PyTorch: losses, recipes, models, LVIS evaluation."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailseg import hub, losses, recipes
    from tailseg.errors import UserError
    from tailseg.jobs import compare, evaluate, open_data, score, train
    from tailseg.layers.normalized import NormalizedConv2d, NormalizedLinear
    from tailseg.losses.seesaw import SeesawLoss
    from tailseg.outcomes import Compared, Evaluated, Trained
    from tailseg.predict import Model, load
    from tailseg.results.detections import Detections

__version__ = version("tailseg")

_HOMES = {
    "Compared": "tailseg.outcomes",
    "Detections": "tailseg.results.detections",
    "Evaluated": "tailseg.outcomes",
    "Model": "tailseg.predict",
    "NormalizedConv2d": "tailseg.layers.normalized",
    "NormalizedLinear": "tailseg.layers.normalized",
    "SeesawLoss": "tailseg.losses.seesaw",
    "Trained": "tailseg.outcomes",
    "UserError": "tailseg.errors",
    "compare": "tailseg.jobs",
    "evaluate": "tailseg.jobs",
    "hub": "tailseg",
    "load": "tailseg.predict",
    "losses": "tailseg",
    "open_data": "tailseg.jobs",
    "recipes": "tailseg",
    "score": "tailseg.jobs",
    "train": "tailseg.jobs",
}

__all__ = [
    "Compared",
    "Detections",
    "Evaluated",
    "Model",
    "NormalizedConv2d",
    "NormalizedLinear",
    "SeesawLoss",
    "Trained",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "hub",
    "load",
    "losses",
    "open_data",
    "recipes",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line answers --help without waiting for PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module 'tailseg' has no attribute '{name}'; it has {', '.join(__all__)}")
    home = _HOMES[name]
    return import_module(f"tailseg.{name}") if home == "tailseg" else getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
