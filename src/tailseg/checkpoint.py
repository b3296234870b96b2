"""Checkpoints: a model is one safetensors file that carries its recipe and its categories.

Nothing here is ever unpickled. A file is written beside its place and moved there when complete, so that a full disk
or a killed process leaves the old one as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from tailseg.recipes.model_header import model_file, read_header, recipe_in, unreadable
from tailseg.recipes.schema import Recipe
from tailseg.runtime.about import fault_of_class

VERSION = version("tailseg")
CHECKSUM = "checksum"  # its key among the metadata


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
    """Write a safetensors file with JSON metadata and a checksum of both, all or nothing.

    Raises:
        UserError: the disk is full or the folder not writable; what stood at ``path`` is untouched.
    """
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        whole = {**about, CHECKSUM: checksum(plain, about)}
        save_file(plain, part, {key: json.dumps(value) for key, value in whole.items()})
        with part.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # nothing can be removed either from a folder that became read-only
            part.unlink(missing_ok=True)
        raise UserError(_not_saved(path, error)) from error


def _not_saved(path: Path, error: OSError | SafetensorError) -> str:
    if not path.parent.is_dir():
        return f"{path}: could not be saved: its folder is not there; make it, or name another"
    reason = error.strerror if isinstance(error, OSError) else str(error)
    fix = "make room" if os.access(path.parent, os.W_OK) else "make the folder writable"
    return f"{path}: could not be saved ({reason}), and what stood there is intact; {fix}"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of `write_tensors`; those of earlier versions carry no checksum.

    Raises:
        UserError: the file is missing, is no safetensors file or not one of ours, or is not as it was written.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError, AttributeError, RuntimeError) as error:  # of types that this torch has not
        raise UserError(f"{path}: its tensors cannot be read; the file is damaged: get it again") from error
    expected = header.pop(CHECKSUM, None)
    if expected is not None and expected != checksum(tensors, header):
        raise UserError(
            f"{path}: is not as it was written (its checksum differs): it is damaged or was edited; get it again"
        )
    return tensors, header


def checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """One number for names, types, shapes and bytes of all tensors (contiguous, on the CPU) and for the metadata.

    It finds damage; a forger can compute it too.
    """
    digest = hashlib.sha256()
    for key in sorted(about):
        digest.update(f"{key} {json.dumps(about[key])}\n".encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        content = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {content}\n".encode())
    return digest.hexdigest()


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
    """Read a file of `save_model`; of a run's folder its best model, else its last.

    Raises:
        UserError: it is missing, not a tailseg model or not as it was written, or a weight is not finite.
    """
    path = model_file(path)
    state, about = read_tensors(path)
    recipe = recipe_in(about, path)
    missing = [key for key in ("categories", "step", "metrics") if key not in about]
    if missing:
        raise unreadable(about, path, f"there is no {missing[0]!r}")
    step, metrics = about["step"], about["metrics"]
    if type(step) is not int or not isinstance(metrics, dict | None):
        raise unreadable(about, path, "step or metrics are of another type")
    categories = _categories(about, path)
    require_finite(state, path)
    return Checkpoint(path=path, recipe=recipe, categories=categories, step=step, metrics=metrics, state=state)


def _categories(about: Mapping[str, Any], path: Path) -> tuple[Category, ...]:
    rows = about["categories"]
    for place, row in enumerate(rows if isinstance(rows, list) else [None]):
        if fault := fault_of_class(row):
            raise unreadable(about, path, f"category {place} {fault}")
    return tuple(Category(**row) for row in rows)


def require_finite(state: Mapping[str, Tensor], path: Path, way_out: str = "give another checkpoint") -> None:
    """Raise UserError if a weight is NaN or infinite: such a model would find nothing, and not say why."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise UserError(
                f"{path}: '{key}' holds values that are not finite: the model had diverged, or the file is damaged; "
                f"{way_out}"
            )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # of which torch can compute little
        tensor = tensor.float()
    least, most = tensor.aminmax()  # NaN if there is one; many times as fast as torch.isfinite
    return bool(torch.isfinite(least) & torch.isfinite(most))


def require_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Compare names, shapes and types of a file's tensors with those of a detector's, which may be on `meta`.

    Raises:
        UserError: a tensor is missing, left over, or of another shape or type.
    """
    wrong = [k for k in expected if k not in state or expected[k].shape != state[k].shape]
    wrong += [k for k in state if k not in expected]
    if wrong:
        raise UserError(f"{path}: does not fit its recipe, first at '{wrong[0]}'; the file is damaged or was edited")
    for key, tensor in state.items():
        require_type(key, expected[key], tensor, path)


def require_type(key: str, expected: Tensor, tensor: Tensor, path: Path) -> None:
    """Raise UserError unless a tensor of a file has the type that the detector's has."""
    if tensor.dtype != expected.dtype:
        ours, theirs = (str(t.dtype).removeprefix("torch.") for t in (expected, tensor))
        raise UserError(
            f"{path}: '{key}' is of type {theirs}, but {ours} was expected; give the file that `tailseg train` or "
            "`tailseg convert` wrote"
        )


def load_weights(detector: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill a detector, every tensor of it.

    Raises:
        UserError: a tensor is missing, left over, or of another shape or type.
    """
    require_fit(detector.state_dict(), state, path)
    detector.load_state_dict(state)
