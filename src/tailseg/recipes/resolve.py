"""From a name to a recipe: a built-in one, a YAML file, or the one that a model carries.

A user's own recipe is a YAML file that may start with ``extends: NAME``, where NAME is a built-in recipe, another file
or a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tailseg.errors import UserError
from tailseg.recipes import own, small, table1, table2
from tailseg.recipes.backbone_options import reaches_outside
from tailseg.recipes.model_header import model_file, read_header, recipe_in
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import merge, override, validate
from tailseg.yaml_files import read_yaml

BUILT_IN: dict[str, Callable[[], Recipe]] = {
    "table1/cross-entropy": table1.cross_entropy,
    "table1/eql": table1.eql,
    "table1/seesaw": table1.seesaw,
    **table2.rows("table2", table2.mask_rcnn),
    "table2/cascade-mask-rcnn": table2.cascade_mask_rcnn,
    "htc": table2.htc,
    "scnet": table2.scnet,
    "own/fast": own.fast,
    "own/accurate": own.accurate,
    "small/cross-entropy": small.cross_entropy,
    "small/seesaw": small.seesaw,
    "demo/cross-entropy": small.demo_cross_entropy,
    "demo/seesaw": small.demo_seesaw,
    **table2.rows("demo-table2", small.demo_mask_rcnn, small.DEMO_STEPS),
}


def resolve(name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or YAML file, with overrides applied.

    Raises:
        UserError: there is none, or it is faulty.
    """
    return override(_load(name, ()), settings)


def _load(name: str, chain: tuple[Path, ...]) -> Recipe:
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if "\0" in name:
        place = f"{chain[-1]}: extends " if chain else ""
        raise UserError(
            f"{place}{name[:80]!r} cannot be a name, as it has a zero byte; give a recipe, a file or a model"
        )
    path = model_file(Path(name))
    if path.suffix == ".safetensors":
        return recipe_in(read_header(path), path)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name, BUILT_IN, 1, 0.0)
        place = f"{chain[-1]}: extends an " if chain else ""
        raise UserError(
            f"{place}unknown recipe '{name}'; did you mean '{near[0]}'? `tailseg recipes` lists them, and a file ends "
            "in .yaml, or a model in .safetensors"
        )
    return _from_file(path, chain)


def _from_file(path: Path, chain: tuple[Path, ...]) -> Recipe:
    if path.resolve() in chain:
        raise UserError(f"{path}: 'extends' leads back to this file; break the circle")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of recipe keys; see `tailseg recipes show small/seesaw`")
    parent = values.pop("extends", None)
    model = values.get("model")
    backbone = model.get("backbone") if isinstance(model, dict) else None
    network = backbone.get("name") if isinstance(backbone, dict) else None
    if isinstance(network, str) and reaches_outside(network):
        raise UserError(
            f"{path}: its backbone {network[:80]!r} comes from a hub or a folder, which a file may not ask for; take "
            "it out of the file and name it on the command line with --set model.backbone.name=..."
        )
    merged: dict[str, Any] = {"name": path.stem}
    if parent is not None:
        near = path.parent / str(parent)
        source = str(near) if near.suffix in (".yaml", ".yml", ".safetensors") else str(parent)
        merged = _load(source, (*chain, path.resolve())).model_dump(mode="json") | {"name": path.stem}
    return validate(merge(merged, values), str(path))
