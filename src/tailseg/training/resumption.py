"""Resumption: the trainer file, which holds all that a run needs to go on exactly where it stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailseg.checkpoint import VERSION, load_weights, read_tensors, require_finite, write_tensors
from tailseg.data.annotations.annotations import Annotations
from tailseg.errors import UserError
from tailseg.recipes.model_header import read_header
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import FREE_FORM_KEYS, flatten
from tailseg.training.feature_cache import digest_of_annotations
from tailseg.training.run_log import better

TRAINER = "trainer.safetensors"
MODEL_KEY = "model."
OPTIMIZER_KEY = "optimizer."
AVERAGE_KEY = "average."

# What a trainer file says of its run.
ABOUT: dict[str, type | tuple[type, ...]] = {
    **{"step": int, "seed": int, "world_size": int, "recipe": dict, "categories": list},
    "best": (float, int, type(None)),
    "data": (dict, type(None)),  # a run of an earlier version did not say
}

# Keys that may change, without and with a word about it.
FREE = {"data.workers", "schedule.epochs", "schedule.milestones", "training.patience"}
FREE |= {"training.loggers", "training.validation_loss"}
FREE_WITH_WARNING = {"optimizer.lr", "optimizer.clip", "training.cuda_graphs", "model.backbone.checkpointing"}
OF_A_STEP = ("data.batch_per_device", "training.accumulate")  # free where images a step stay the same


def way_on(out: Path) -> str:
    """Advice for whoever has corrected what ended the run in a folder."""
    return "go on with --resume" if (out / TRAINER).is_file() else "start again: nothing was saved yet"


def require_still_there(out: Path) -> None:
    """Raise UserError if the trainer file of a run that has saved one is gone."""
    if not (out / TRAINER).is_file():
        raise UserError(f"{out}: what was saved there has been removed; {way_on(out)}")


def afresh(out: Path, before: int | None = None) -> str:
    """Advice for whoever cannot go on with what the run in a folder saved, but maybe from its best model.

    Args:
        out: the folder.
        before: the best model is of no use unless its step is an earlier one.
    """
    best = out / "best.safetensors"
    step = _header_of(best).get("step")
    useful = isinstance(step, int) and (before is None or step < before)
    return f"start again with another --out{f' and --init {best}' if useful else ''}, and no --resume"


def _header_of(model: Path) -> dict[str, Any]:
    """The header of a model file; empty where there is none, or a damaged one."""
    try:
        return read_header(model)
    except UserError:
        return {}


def require_no_best(out: Path) -> None:
    """Raise UserError if a folder without a trainer file has a best model, which a new run would take for its own.

    What a run leaves that was ended before its first checkpoint does not matter.
    """
    best = out / "best.safetensors"
    if best.exists():
        fix = "move it elsewhere to start a new one here, or choose another --out"
        raise UserError(f"{best}: is of an earlier run; {fix}")


def holds_step(model: Path, step: int) -> bool:
    """Whether a model file is there, undamaged and of this step."""
    try:
        return read_tensors(model)[1].get("step") == step
    except UserError:
        return False


def divergence(out: Path, step: int, losses: Mapping[str, float], rate: float, spoilt: int | None = None) -> str:
    """A sentence on the end of a run whose losses are not finite; empty if they are.

    Args:
        out: its folder.
        step: that was just made.
        losses: means over the last steps.
        rate: `optimizer.lr`.
        spoilt: step at which the run was resumed with weights whose very first losses were not finite; no setting
            helps them.
    """
    if math.isfinite(sum(losses.values())):
        return ""
    name, value = next(((n, v) for n, v in losses.items() if not math.isfinite(v)), ("total", math.inf))
    if spoilt is not None:
        return (
            f"step {step}: the loss '{name}' is {value}, and was not finite as soon as the run was resumed: the "
            f"weights saved at step {spoilt} have diverged; {afresh(out, spoilt)}, with a lower optimizer.lr than they "
            "were trained with, or optimizer.clip set"
        )
    return (
        f"step {step}: the loss '{name}' is {value}: training diverged; lower optimizer.lr (now {rate:g}) or set "
        f"optimizer.clip, then {way_on(out)}"
    )


def out_of_memory(out: Path, step: int, recipe: Recipe, *, graphs: bool) -> str:
    """A sentence on the end of a run for whose next ``step`` its GPU has too little memory.

    Args:
        out: its folder.
        step: counted from 1.
        recipe: of the run.
        graphs: it holds CUDA graphs, which take memory of their own.
    """
    what = f"{out}: step {step} does not fit into the memory of the GPU"
    batch, accumulate = recipe.data.batch, recipe.training.accumulate
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), 1)
    if graphs:
        fix = "set training.cuda_graphs=false"
    elif parts > 1:
        fix = f"set data.batch_per_device={batch // parts} and training.accumulate={accumulate * parts}"
    elif not recipe.model.backbone.checkpointing:
        fix = "set model.backbone.checkpointing=true"
    else:
        return (
            f"{what}, not even with one image; free it of other programs, or train with smaller data.short_edges and "
            "data.long_edge in another --out"
        )
    return f"{what}; free it of other programs or {fix}, then {way_on(out)}"


def data_keys(train: Annotations, val: Annotations) -> dict[str, dict[str, Any]]:
    """What a trainer file says of the data of its run, by split: a hash of the content, images, objects."""
    return {
        split: {"content": digest_of_annotations(found), "images": len(found), "objects": len(found.labels)}
        for split, found in (("train", train), ("val", val))
    }


def require_same_run(
    about: Mapping[str, Any],
    out: Path,
    recipe: Recipe,
    categories: Sequence[str],
    seed: int,
    world_size: int,
    data: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Raise UserError unless a run goes on with the recipe, data and processes that it began with.

    Args:
        about: of its trainer file.
        out: its folder, for messages.
        recipe: with which it is to go on.
        categories: their names, by label.
        seed: of all random numbers.
        world_size: number of processes.
        data: of `data_keys`.

    Returns:
        Sentences on what is another now, so that the run is no longer the one that it would have been.
    """
    new = flatten(recipe.model_dump(mode="json"), whole=FREE_FORM_KEYS)
    defaults = flatten(Recipe(name="").model_dump(mode="json"), whole=FREE_FORM_KEYS)
    # A run of an earlier version knows nothing of newer keys.
    old = defaults | flatten(about["recipe"], whole=FREE_FORM_KEYS)
    free = FREE | FREE_WITH_WARNING | set(OF_A_STEP)
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
    _require_same_data(about, out, data)
    if about["seed"] != seed:
        began = about["seed"]
        raise UserError(f"{out}: cannot resume with seed {seed}, the run began with {began}; set --seed {began}")
    warnings = [
        f"{out}: goes on with {key} = {new[key]} instead of {old.get(key)}: no longer the run that it began as."
        for key in sorted(FREE_WITH_WARNING | ({"schedule.epochs"} if new["schedule.kind"] == "cosine" else set()))
        if old.get(key) != new[key]
    ]
    return warnings + _changes_of_a_step(out, old, new, about["world_size"], world_size)


def _require_same_data(about: Mapping[str, Any], out: Path, data: Mapping[str, Mapping[str, Any]]) -> None:
    for split, began in (about.get("data") or {}).items():
        now = data[split]
        if began == now:
            continue
        counts = [f"{keys['images']} images with {keys['objects']} objects" for keys in (began, now)]
        if counts[0] == counts[1]:
            difference = f"holds {counts[0]} as it did when the run began, but with other content"
        else:
            difference = f"had {counts[0]} when the run began, and has {counts[1]} now"
        raise UserError(
            f"{out}: the {split} split {difference}; go on with the data of before, or train on the new with "
            f"--init {out / 'last.safetensors'}, another --out and no --resume"
        )


def _changes_of_a_step(
    out: Path, old: Mapping[str, Any], new: Mapping[str, Any], old_world: int, new_world: int
) -> list[str]:
    """At most one sentence on another share-out of the same images of a step; UserError for another number of them."""
    before, after = ((world, *(keys[key] for key in OF_A_STEP)) for world, keys in ((old_world, old), (new_world, new)))
    if before == after:
        return []
    texts = ["{} process(es) x data.batch_per_device {} x training.accumulate {}".format(*f) for f in (before, after)]
    if math.prod(before) == math.prod(after):
        return [
            f"{out}: goes on with {texts[1]} instead of {texts[0]}: as many images a step, but the rest of the run is "
            "no longer the same to the bit."
        ]
    raise UserError(
        f"{out}: cannot resume with {texts[1]}, which is {math.prod(after)} images a step, the run began with "
        f"{texts[0]}; set data.batch_per_device and training.accumulate so that the product is {math.prod(before)}"
    )


def is_recorded(out: Path, step: int, best: float | None, metrics: Mapping[str, Any]) -> bool:
    """Whether an evaluation of which the log has the metrics agrees with the best model, and need not be repeated.

    A model that was better than all before was saved before the log was written; the log has no checksum, models have.

    Args:
        out: folder of the run.
        step: that was evaluated.
        best: segm AP, the best before it.
        metrics: of the log.
    """
    header = _header_of(out / "best.safetensors")
    if better(best, metrics["segm"]["AP"]) != best:
        return header.get("step") == step and header.get("metrics") == metrics
    return header.get("step") != step


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


def read_trainer(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file of `save_trainer`, and what was said ``about`` it.

    Raises:
        UserError: it is missing, damaged or no trainer file, or a value in it is not finite.
    """
    try:
        tensors, about = read_tensors(path)
    except UserError as error:
        raise UserError(f"{path}: is damaged or was edited; {afresh(path.parent)}") from error
    for key, kind in ABOUT.items():
        if not isinstance(about.get(key), kind):
            raise UserError(
                f"{path}: does not say with which {key} the run goes on: it is no trainer file, or was edited; "
                f"{afresh(path.parent)}"
            )
    require_finite(tensors, path, afresh(path.parent))
    return tensors, about


def load_trainer(
    path: Path,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
) -> None:
    """Put the tensors of a file of `save_trainer` back into its objects.

    Raises:
        UserError: they are those of other objects.
    """
    load_weights(model, _part(tensors, MODEL_KEY), path)
    if average is not None:
        load_weights(average, _part(tensors, AVERAGE_KEY), path)
    parameters = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _part(tensors, OPTIMIZER_KEY).items():
        index, _, name = key.partition(".")
        like = parameters.get(index)
        if like is None or value.shape not in (like.shape, ()):
            raise UserError(f"{path}: '{OPTIMIZER_KEY}{key}' is of another model; the file was edited: get it again")
        if value.shape == like.shape:
            # Fused optimisers pair parameter and state in memory order, so both need the same, channels_last or not.
            value = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
        else:
            value = value.clone()  # the file is mapped, and on Windows nothing may take its place until all is copied
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
