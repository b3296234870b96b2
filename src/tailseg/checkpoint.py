"""Checkpoints: a model is one safetensors file that carries its recipe and its categories.

Nothing here is ever unpickled. A file is written beside its place and moved there when complete, so that a full disk
or a killed process leaves the old one as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tailseg.data.annotations.annotations import Category
from tailseg.errors import UserError
from tailseg.recipes.model_header import read_header, recipe_in, unreadable
from tailseg.recipes.schema import Recipe

VERSION = version("tailseg")
MODEL_KEY = "model."
OPTIMIZER_KEY = "optimizer."
AVERAGE_KEY = "average."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """A model file, read."""

    path: Path
    recipe: Recipe
    categories: tuple[Category, ...]
    step: int
    metrics: dict[str, Any] | None  # of the validation split when it was saved, as in metrics.json
    state: dict[str, Tensor]  # the detector's state dict


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file with JSON metadata, all or nothing.

    Raises:
        UserError: the disk is full or the folder not writable; what stood at ``path`` is untouched.
    """
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(plain, part, {key: json.dumps(value) for key, value in about.items()})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{path}: could not be saved ({reason}); make room and try again (a training goes on with --resume): "
            "what stood there is intact"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of `write_tensors`.

    Raises:
        UserError: the file is missing, is no safetensors file or not one of ours.
    """
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
    return tensors, header


def save_model(
    path: Path,
    detector: nn.Module | Mapping[str, Tensor],
    recipe: Recipe,
    categories: Sequence[Category],
    *,
    step: int,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a detector (or its state dict) with its recipe, its categories and, if known, its metrics."""
    state = detector.state_dict() if isinstance(detector, nn.Module) else detector
    about = {
        "tailseg": VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "categories": [asdict(category) for category in categories],
        "step": step,
        "metrics": metrics,
    }
    write_tensors(path, state, about)


def load_model(path: Path) -> Checkpoint:
    """Read a file of `save_model`.

    Raises:
        UserError: it is missing or not a tailseg model.
    """
    state, about = read_tensors(path)
    try:
        return Checkpoint(
            path=path,
            recipe=recipe_in(about, path),
            categories=tuple(Category(**category) for category in about["categories"]),
            step=int(about["step"]),
            metrics=about["metrics"],
            state=state,
        )
    except (KeyError, TypeError) as error:
        raise unreadable(about, path) from error


def load_weights(detector: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill a detector, every tensor of it.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    own = detector.state_dict()
    wrong = [k for k in own if k not in state or own[k].shape != state[k].shape] + [k for k in state if k not in own]
    if wrong:
        raise UserError(f"{path}: does not fit its recipe, first at '{wrong[0]}'; the file is damaged or was edited")
    detector.load_state_dict(state)


def save_trainer(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
    about: Mapping[str, Any],
) -> None:
    """Write all that a run needs to go on: weights, optimiser, moving average; ``about`` holds step and settings."""
    tensors = {MODEL_KEY + key: value for key, value in model.state_dict().items()}
    if average is not None:
        tensors |= {AVERAGE_KEY + key: value for key, value in average.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER_KEY}{index}.{name}": v for name, v in slots.items() if isinstance(v, Tensor)}
    write_tensors(path, tensors, {"tailseg": VERSION, **about})


def load_trainer(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> dict[str, Any]:
    """Put a file of `save_trainer` back into its objects; returns what was said ``about`` it."""
    tensors, about = read_tensors(path)
    load_weights(model, _part(tensors, MODEL_KEY), path)
    if average is not None:
        load_weights(average, _part(tensors, AVERAGE_KEY), path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _part(tensors, OPTIMIZER_KEY).items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        if value.shape == like.shape:
            # Fused optimisers pair parameter and state in memory order, so both need the same, channels_last or not.
            value = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return about


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
