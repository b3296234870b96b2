"""Recipes: the typed schema, values in one key language, and the built-in ones, one file a table.

``tailseg.recipes.names()`` lists the built-in ones, ``get("table1/seesaw", classifier__p=0.6)`` makes one with other
values, ``diff(one, other)`` compares two, and ``to_yaml(recipe)`` prints one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailseg.recipes.resolve import BUILT_IN, resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed, diff, dotted, to_yaml

__all__ = ["Recipe", "diff", "get", "names", "to_yaml"]


def names() -> list[str]:
    """Names of the built-in recipes."""
    return list(BUILT_IN)


def get(recipe: str | Path | Recipe, **settings: Any) -> Recipe:
    """A recipe with other values under some keys.

    Args:
        recipe: name of a built-in one, YAML file, model file, or recipe.
        settings: its keys, a double underscore for each dot: ``optimizer__lr=0.01`` is ``--set optimizer.lr=0.01``.

    Raises:
        UserError: there is none of that name, it is faulty, or a key is unknown or its value wrong.
    """
    return changed(recipe if isinstance(recipe, Recipe) else resolve(str(recipe)), dotted(settings))
