"""Resumption: the trainer file, which holds all that a run needs to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailseg.checkpoint import VERSION, load_weights, read_tensors, write_tensors
from tailseg.errors import UserError
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import flatten

MODEL_KEY = "model."
OPTIMIZER_KEY = "optimizer."
AVERAGE_KEY = "average."


def require_same_run(
    about: Mapping[str, Any], out: Path, recipe: Recipe, categories: Sequence[str], seed: int, world_size: int
) -> None:
    """Raise UserError unless a run goes on with the recipe, data and processes that it began with.

    Args:
        about: of its trainer file.
        out: its folder, for messages.
        recipe: with which it is to go on.
        categories: their names, by label.
        seed: of all random numbers.
        world_size: number of processes.
    """
    new = flatten(recipe.model_dump(mode="json"))
    defaults = flatten(Recipe(name="").model_dump(mode="json"))
    old = defaults | flatten(about["recipe"])  # a run of an earlier version knows nothing of newer keys
    free = {"data.workers", "schedule.epochs", "schedule.milestones"}
    free |= {key for key in new if key.startswith("training.") and key.endswith(("_steps", "_every"))}
    changed = [key for key in new if key not in free and old.get(key) != new[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{out}: cannot resume with {key} = {new[key]}, the run began with {old.get(key)}; set it back or "
            "choose another --out"
        )
    if about["categories"] != list(categories):
        raise UserError(f"{out}: the run began with other categories than the data has; choose another --out")
    for key, value in (("seed", seed), ("world_size", world_size)):
        if about[key] != value:
            raise UserError(f"{out}: cannot resume with {key} {value}, the run began with {about[key]}")


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
