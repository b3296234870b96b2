"""The header of a model file: its recipe, categories, step and metrics, without any tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from tailseg.errors import UserError
from tailseg.recipes.schema import Recipe


def read_header(path: Path) -> dict[str, Any]:
    """Read the metadata of a safetensors file that tailseg wrote.

    Raises:
        UserError: the file is missing, is no safetensors file or not one of ours.
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
    return {key: json.loads(value) for key, value in header.items()}


def recipe_in(header: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe in a header; ``path`` names the file in errors.

    Raises:
        UserError: there is none, or this version cannot read it.
    """
    try:
        return Recipe.model_validate(header["recipe"])
    except (KeyError, ValidationError) as error:
        raise unreadable(header, path) from error


def unreadable(header: Mapping[str, Any], path: Path) -> UserError:
    """The error for a header that another version of tailseg wrote."""
    return UserError(
        f"{path}: its recipe or categories cannot be read; it was written by tailseg {header['tailseg']}; train or "
        "convert it again with this version"
    )
