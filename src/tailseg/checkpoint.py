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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tailseg.data.annotations.annotations import Category
from tailseg.errors import UserError
from tailseg.recipes.model_header import read_header, recipe_in, unreadable
from tailseg.recipes.schema import Recipe

VERSION = version("tailseg")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """A model file, read."""

    path: Path
    recipe: Recipe
    categories: tuple[Category, ...]
    step: int
    metrics: dict[str, Any] | None  # of the validation split, as in metrics.json; only best models have them
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
