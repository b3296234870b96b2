"""The one key language of recipes: dotted keys, as in ``--set optimizer.lr=0.01``, to change, compare and print them.

An unknown key is an error that names the key, the place and the nearest valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tailseg.errors import UserError
from tailseg.recipes.classifiers import CLASSIFIERS, ClassifierRecipe
from tailseg.recipes.schema import Recipe
from tailseg.recipes.section import TRUE_AS_NUMBER
from tailseg.yaml_files import load_yaml

# Keys whose dict holds no fields of a section but what people like, with an example; and these keys with all dots.
FREE_FORM = {"options": "drop_path_rate", "rates": "backbone"}
FREE_FORM_KEYS = ("model.backbone.options", "optimizer.rates")
MOST_NAMED = 4  # keys that a message about a key without its section offers


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe as YAML, in the order of its definition."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def flatten(values: dict[str, Any], prefix: str = "", *, whole: Collection[str] = ()) -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys.

    Args:
        values: the dicts.
        prefix: what all keys begin with.
        whole: dotted keys whose dicts stay as they are, such as `FREE_FORM_KEYS`, where a key that is gone counts.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and prefix + key not in whole:
            flat |= flatten(value, f"{prefix}{key}.", whole=whole)
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
        raise UserError(f"{place}: {fault_of(error)}") from error


def fault_of(refused: ValidationError) -> str:
    """A sentence that names the first faulty key, what is wrong with it and, of an unknown one, the nearest."""
    error: Any = refused.errors()[0]
    # No keys: in a union the second part of the place, the chosen loss; what follows a dict's faulty key.
    loc = error["loc"]
    parts = [part for i, part in enumerate(loc) if part != "[key]" and not (i == 1 and loc[0] == "classifier")]
    if error["type"] == TRUE_AS_NUMBER:
        parts.append(error["ctx"]["field"])
    key = ".".join(str(part) for part in parts)
    if error["type"] == TRUE_AS_NUMBER:
        received = error["ctx"]["found"]
        return f"{key}: expected a number, received {received}; YAML reads yes, no, on and off as true and false"
    if error["type"] == "extra_forbidden":
        return unknown_key(key)
    if error["type"] == "union_tag_invalid":
        return f"{key}.loss: {_nearest(error['ctx']['tag'], CLASSIFIERS, 'loss')}"
    received = _shown(error.get("input"))
    shown = received if len(received) < 60 else received[:57] + "..."
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] == "value_error":
        return f"{key or 'recipe'}: {message}"
    return f"{key or 'recipe'}: {message}, received {shown}"


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"


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
    last = key.rpartition(".")[2]
    named_so = [k for k in known if k.rpartition(".")[2] == last]
    if "." not in key and 0 < len(named_so) <= MOST_NAMED:
        return f"unknown key '{key}'; did you mean {' or '.join(map(repr, named_so))}?"
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


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values under dotted keys, the same keys as ``--set``.

    ``changed(recipe, {"model.mask_head.upsample": "carafe", "optimizer.clip": 35.0})``; a key that names a section
    takes a dict, and what that does not name stays.

    Raises:
        UserError: a key is unknown or a value is wrong.
    """
    return _changed(recipe, dict(changes), {key: f"{key} = {_shown(value)}" for key, value in changes.items()})


def dotted(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe keys from Python keywords, which write a double underscore for each dot: ``optimizer__lr``."""
    return {key.replace("__", "."): plain(value) for key, value in keywords.items()}


def plain(value: Any) -> Any:
    """A value with Python's own numbers and lists in place of NumPy's and PyTorch's."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with ``key=value`` settings applied, for example ``optimizer.lr=0.01``; values are YAML.

    Raises:
        UserError: a setting is malformed, its key unknown or its value wrong.
    """
    changes: dict[str, Any] = {}
    places: dict[str, str] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        place = "--set " + setting.replace("\n", "\\n")
        if not separator or not key:
            raise UserError(f"{place}: expected KEY=VALUE, for example optimizer.lr=0.01")
        value = load_yaml(text, place, fix="write another value")
        changes.pop(key, None)  # the last of equal keys counts, and comes in its own place
        changes[key] = _number(value) if isinstance(value, str) else value
        places[key] = place
    return _changed(recipe, changes, places)


def _changed(recipe: Recipe, changes: dict[str, Any], places: Mapping[str, str]) -> Recipe:
    """``recipe`` with ``changes``; an error begins with the place of its key, or with all places."""
    if not changes:
        return recipe
    values = recipe.model_dump(mode="json")
    # The loss first: it decides which keys its section has.
    for key in sorted(changes, key=lambda key: key != "classifier.loss"):
        _assign(values, key, changes[key], places[key])
    return validate(values, " ".join(places[key] for key in changes))


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
    free_form = bool(path) and path[-1] in FREE_FORM
    if not isinstance(target, dict) or (last not in target and not free_form):
        raise UserError(f"{place}: {unknown_key(key)}")
    if isinstance(target.get(last), dict) and not isinstance(value, dict):
        example = f"{key}.{next(iter(target[last]), FREE_FORM.get(last, ''))}"
        emptied = ", or empty it with {}" if last in FREE_FORM else ""
        raise UserError(f"{place}: '{key}' is a section; set one of its keys, such as {example}{emptied}")
    # A section is merged into, as in a file: what is not named stays.
    merged = merge(target, {last: value})
    target.clear()
    target.update(merged)


def merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``values`` over it, section by section; an empty dict empties a free-form one."""
    merged = dict(base)
    loss = values.get("loss")
    if loss != merged.get("loss") and isinstance(loss, str) and loss in CLASSIFIERS:
        # Another loss brings its own keys; what all losses share stays.
        shared = {key: merged[key] for key in ClassifierRecipe.model_fields if key in merged and key != "loss"}
        merged = CLASSIFIERS[loss](loss=loss, **shared).model_dump(mode="json")
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and (value or key not in FREE_FORM)
        merged[key] = merge(merged[key], value) if both else value
    return merged
