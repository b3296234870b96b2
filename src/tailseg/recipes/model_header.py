"""The header of a model file: its recipe, categories, step and metrics, without any tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from tailseg.errors import UserError
from tailseg.recipes.backbone_options import reaches_outside
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import fault_of

MODELS = ("best.safetensors", "last.safetensors")  # of a run, in the order of preference


def model_file(path: Path) -> Path:
    """The model that a path stands for: a file itself, of a run's folder its best model, else its last.

    Raises:
        UserError: the folder has neither.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in MODELS if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path}: this folder holds no {' or '.join(MODELS)}; give a run's folder or a model file")
    return found


def read_header(path: Path) -> dict[str, Any]:
    """Read the metadata of a safetensors file that tailseg wrote.

    Raises:
        UserError: the file is missing, is no safetensors file or not one of ours, or its metadata are no JSON.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; give the path of a model, such as runs/seesaw/best.safetensors"
        )
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: is not a tailseg checkpoint (no valid safetensors file); give one that `tailseg train` wrote"
        ) from error
    if "tailseg" not in header:
        raise UserError(
            f"{path}: is a safetensors file but not a tailseg checkpoint (it carries no recipe); give one that "
            "`tailseg train` wrote"
        )
    about: dict[str, Any] = {}
    for key, text in header.items():
        try:
            about[key] = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
            raise UserError(
                f"{path}: its metadata {key[:40]!r} is not valid JSON; the file is damaged or was edited: get it again"
            ) from error
    return about


def recipe_in(header: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe in a header; ``path`` names the file in errors.

    Raises:
        UserError: there is none, this version cannot read it, or its backbone comes from a hub or a folder.
    """
    try:
        recipe = Recipe.model_validate(header["recipe"])
    except KeyError as error:
        raise unreadable(header, path, "there is no recipe") from error
    except ValidationError as error:
        raise unreadable(header, path, fault_of(error)) from error
    name = recipe.model.backbone.name
    if reaches_outside(name):
        raise UserError(
            f"{path}: its backbone {name[:80]!r} comes from a hub or a folder, which a model file may not ask for; "
            "get a model whose model.backbone.name is an architecture, such as resnet50"
        )
    return recipe


def unreadable(header: Mapping[str, Any], path: Path, reason: str) -> UserError:
    """The error for a header that another version of tailseg wrote, or somebody else."""
    version = header["tailseg"]
    by = version if isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version) else "of an unknown version"
    return UserError(
        f"{path}: its recipe or categories cannot be read ({reason}); it was written by tailseg {by}; train or "
        "convert it again with this version"
    )
