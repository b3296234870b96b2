"""Recipes from names, YAML files and ``key=value`` settings, and back to plain values.

A user's own recipe is a YAML file that may start with ``extends: NAME``, where NAME is a built-in recipe, another file
or a model. An unknown key is an error that names the key, the place and the nearest valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tailseg.errors import UserError
from tailseg.recipes.built_in import BUILT_IN
from tailseg.recipes.model_header import read_header, recipe_in
from tailseg.recipes.schema import CLASSIFIERS, ClassifierRecipe, Recipe


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe as YAML, in the order of its definition."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def diff(one: Recipe, other: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value in one, value in other) wherever two recipes differ, their names left out."""
    a, b = flatten(one.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
    keys = [*a, *(key for key in b if key not in a)]
    return [(k, a.get(k), b.get(k)) for k in keys if k != "name" and a.get(k) != b.get(k)]


def validate(values: dict[str, Any], place: str) -> Recipe:
    """Make a recipe of plain values.

    Raises:
        UserError: a key is unknown or a value is of the wrong type or out of range; names key and ``place``.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{place}: {_sentence(error.errors()[0])}") from error


def _sentence(error: Any) -> str:
    # In a union the second part of the place is the chosen loss, which is no key.
    parts = [part for i, part in enumerate(error["loc"]) if not (i == 1 and error["loc"][0] == "classifier")]
    key = ".".join(str(part) for part in parts)
    if error["type"] == "extra_forbidden":
        return unknown_key(key)
    if error["type"] == "union_tag_invalid":
        return f"{key}.loss: {_nearest(error['ctx']['tag'], CLASSIFIERS, 'loss')}"
    received = repr(error.get("input"))
    shown = received if len(received) < 60 else received[:57] + "..."
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] == "value_error":
        return f"{key or 'recipe'}: {message}"
    return f"{key}: {message}, received {shown}"


def _nearest(name: str, known: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.0)
    return f"unknown {what} '{name}'; did you mean '{near[0]}'? There are {', '.join(known)}"


def unknown_key(key: str) -> str:
    """A sentence that names an unknown dotted key and the nearest valid one."""
    place = next((part for part in key.split(".") if part.isdecimal()), "0")
    known = [known.replace(".0.", f".{place}.") for known in dict.fromkeys(_keys(Recipe))]
    if key in known:  # of another loss
        section, _, name = key.rpartition(".")
        owners = [loss for loss, kind in CLASSIFIERS.items() if name in kind.model_fields]
        return f"key '{key}' belongs to {section}.loss {' or '.join(owners)}; set {section}.loss first"
    same_section = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    near = difflib.get_close_matches(key, same_section, 1, 0.4) or difflib.get_close_matches(key, known, 1, 0.0)
    return f"unknown key '{key}'; the nearest valid key is '{near[0]}'"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        parts = get_args(field.annotation) or (field.annotation,)
        place = f"{name}.0." if Ellipsis in parts else f"{name}."  # of a list of sections the first stands for all
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _keys(part, prefix + place)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with ``key=value`` settings applied, for example ``optimizer.lr=0.01``; values are YAML.

    Raises:
        UserError: a setting is malformed, its key unknown or its value wrong.
    """
    values = recipe.model_dump(mode="json")
    # The loss first: it decides which keys its section has.
    for setting in sorted(settings, key=lambda setting: not setting.startswith("classifier.loss=")):
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise UserError(f"--set {setting}: expected KEY=VALUE, for example optimizer.lr=0.01")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {setting}: the value is not valid YAML") from error
        if isinstance(value, str):
            value = _number(value)
        _assign(values, key, value, f"--set {setting}")
    return validate(values, "--set " + " --set ".join(settings)) if settings else recipe


def _number(text: str) -> Any:
    """YAML reads 1e-4 as a string, for want of a dot; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _assign(values: dict[str, Any], key: str, value: Any, place: str) -> None:
    *path, last = key.split(".")
    target: Any = values
    for part in path:
        if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
            target = target[int(part)]
        elif isinstance(target, dict) and part in target:
            target = target[part]
        elif isinstance(target, list):
            raise UserError(f"{place}: '{'.'.join(path[: path.index(part)])}' has places 0 to {len(target) - 1}")
        else:
            raise UserError(f"{place}: {unknown_key(key)}")
    free_form = path[-2:] == ["backbone", "options"]
    if not isinstance(target, dict) or (last not in target and not free_form):
        raise UserError(f"{place}: {unknown_key(key)}")
    if isinstance(target.get(last), dict) and not isinstance(value, dict):
        raise UserError(
            f"{place}: '{key}' is a section; set one of its keys, such as {key}.{next(iter(target[last]), '')}"
        )
    # A section is merged into, as in a file: what is not named stays.
    merged = merge(target, {last: value})
    target.clear()
    target.update(merged)


def resolve(name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or YAML file, with overrides applied.

    Raises:
        UserError: there is none, or it is faulty.
    """
    return override(_load(name, ()), settings)


def _load(name: str, chain: tuple[Path, ...]) -> Recipe:
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path = Path(name)
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
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML; mend the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of recipe keys; see `tailseg recipes show small/seesaw`")
    parent = values.pop("extends", None)
    merged: dict[str, Any] = {"name": path.stem}
    if parent is not None:
        near = path.parent / str(parent)
        source = str(near) if near.suffix in (".yaml", ".yml", ".safetensors") else str(parent)
        merged = _load(source, (*chain, path.resolve())).model_dump(mode="json") | {"name": path.stem}
    return validate(merge(merged, values), str(path))


def merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``values`` over it, section by section."""
    merged = dict(base)
    loss = values.get("loss")
    if loss != merged.get("loss") and isinstance(loss, str) and loss in CLASSIFIERS:
        # Another loss brings its own keys; what all losses share stays.
        shared = {key: merged[key] for key in ClassifierRecipe.model_fields if key in merged and key != "loss"}
        merged = CLASSIFIERS[loss](loss=loss, **shared).model_dump(mode="json")
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
