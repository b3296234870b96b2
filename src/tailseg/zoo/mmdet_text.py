"""The configuration that mmdetection stores in a checkpoint, read as data.

It is Python text made of ``dict(...)`` calls and literals. It is parsed, never run; whatever is neither is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from tailseg.errors import UserError

Config = Mapping[str, Any]


def read_config(meta: Mapping[str, Any]) -> Config | None:
    """The configuration in a checkpoint's ``meta`` (``cfg`` in 3.x, ``config`` in 2.x); None where none can be read."""
    text = meta.get("cfg", meta.get("config"))
    if not isinstance(text, str):
        return None
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = {
        target.id: _value(line.value)
        for line in body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }
    return found if isinstance(found.get("model"), dict) else None


def _value(node: ast.expr) -> Any:
    """A literal, or a ``dict(...)`` of literals; None for all else."""
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.Tuple(parts) | ast.List(parts):
            return [_value(part) for part in parts]
        case ast.Dict(keys, values):
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if isinstance(k, ast.Constant)}
        case ast.Call(ast.Name("dict"), [], keywords):
            return {word.arg: _value(word.value) for word in keywords if word.arg is not None}
    return None


def section(config: Any, key: str) -> dict[str, Any]:
    """The dict under a key; an empty one where there is none."""
    found = config.get(key) if isinstance(config, Mapping) else None
    return found if isinstance(found, dict) else {}


def per_stage(config: Config, key: str, stages: int) -> list[dict[str, Any]]:
    """A dict for each stage, from a list of them or one for all."""
    found = config.get(key)
    rows = found if isinstance(found, list) else [found]
    rows = [row if isinstance(row, dict) else {} for row in rows] or [{}]
    return [*rows, *[rows[-1]] * stages][:stages]


def known(**values: Any) -> dict[str, Any]:
    """The entries that are not None."""
    return {key: value for key, value in values.items() if value is not None}


def require(key: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value that would give other detections."""
    if value is not None and value not in allowed:
        only = f" (only {' or '.join(map(repr, allowed))})" if allowed else ""
        raise UserError(f"its configuration has {key} = {value!r}, which tailseg has not{only}; it is not converted")
