"""Pages that are made of the program: the command line, the recipes with their keys, and the Python interface."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, Literal, Union

import typer
import yaml
from pydantic import BaseModel

import tailseg
from tailseg.cli.main import app
from tailseg.losses import CLASSIFICATIONS
from tailseg.recipes.ladder import REPORT, ladder_lines
from tailseg.recipes.resolve import BUILT_IN
from tailseg.recipes.schema import Recipe

# The public names, by page; what `tailseg.losses` holds follows on the second.
API = {
    "api/models.md": ("Models and results", ("load", "Model", "Detections")),
    "api/losses.md": ("Losses and layers", ("SeesawLoss", "NormalizedLinear", "NormalizedConv2d", "losses")),
    "api/jobs.md": (
        "Training and scoring",
        ("train", "Trained", "evaluate", "Evaluated", "score", "compare", "Compared", "open_data", "UserError"),
    ),
    "api/others.md": ("Recipes, exported models and the hub", ("recipes", "runtime", "hub")),
}


def pages() -> dict[str, str]:
    """Every page by its place on the site."""
    return {
        "command-line.md": command_line(),
        "built-in-recipes.md": built_in_recipes(),
        "recipe-keys.md": recipe_keys(),
        **{place: api_page(title, names) for place, (title, names) in API.items()},
    }


def command_line() -> str:
    """All commands with their arguments and options, as `--help` states them."""
    parts = [
        "# Command line",
        "Made from the commands themselves: `tailseg COMMAND --help` says the same. Exit codes: 0 done, 1 the input is "
        "at fault (one sentence on stderr), 2 a mistake in the command line, 130 stopped by Ctrl-C after saving.",
    ]
    for words, command in _commands(["tailseg"], typer.main.get_command(app)):
        parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
        parts += [f"## {' '.join(words)}", f"```\n{_usage(words, parameters)}\n```", _sentence(command.help or "")]
        rows = [_row(parameter) for parameter in parameters]
        if rows:
            parts.append("\n".join(["| | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _commands(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield words, command
    for name, found in inner.items():
        yield from _commands([*words, name], found)


def _is_argument(parameter: Any) -> bool:  # Typer's classes and their attributes change from version to version
    return not parameter.opts[0].startswith("-")


def _metavar(parameter: Any) -> str:
    if _is_argument(parameter):
        return str(parameter.metavar or parameter.name.upper())
    if parameter.is_flag:
        return ""
    number = isinstance(parameter.default, int | float) or getattr(parameter, "min", None) is not None
    return str(parameter.metavar or ("N" if number else parameter.opts[0].lstrip("-").upper()))


def _usage(words: list[str], parameters: list[Any]) -> str:
    line = [*words]
    for parameter in sorted(parameters, key=_is_argument, reverse=True):
        name = _metavar(parameter)
        if _is_argument(parameter):
            text = name + ("..." if parameter.nargs == -1 else "")
        elif parameter.required:
            text = f"{parameter.opts[0]} {name}"
        else:
            continue
        line.append(text if parameter.required else f"[{text}]")
    return " ".join(line) + (" [OPTIONS]" if any(not _is_argument(p) and not p.required for p in parameters) else "")


def _row(parameter: Any) -> str:
    name = _metavar(parameter)
    term = f"`{name}`" if _is_argument(parameter) else f"`{' '.join([*parameter.opts[:1], name]).strip()}`"
    shown = parameter.show_default
    default = parameter.default() if callable(parameter.default) else parameter.default
    if parameter.required:
        value = "required"
    elif isinstance(shown, str):
        value = shown
    elif default is None or default == [] or getattr(parameter, "is_flag", False):
        value = ""
    else:
        value = f"`{default}`"
    return f"| {term.replace('|', chr(92) + '|')} | {value} | {_sentence(parameter.help or '')} |"


def _sentence(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def built_in_recipes() -> str:
    """The recipes that come with tailseg."""
    ladder = [f"table2/{row}" for row in REPORT]
    rows = [
        f"| `{name}` | {_sentence((function.__doc__ or '').splitlines()[0])} |"
        for name, function in BUILT_IN.items()
        if name not in ladder
    ]
    parts = [
        "# Built-in recipes",
        "Made from the program: `tailseg recipes list` prints the same, `tailseg recipes show NAME` a recipe in full.",
        "\n".join(["| recipe | |", "|---|---|", *rows]),
        "## Table 2",
        "Each row is the one before and one thing more:",
        "```text\n" + "\n".join(ladder_lines()) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def recipe_keys() -> str:
    """Every key of a recipe with its type, default and meaning."""
    parts = [
        "# Recipe keys",
        "Made from the typed recipe: every key that `--set` and YAML files take, with its default outside of the "
        "built-in recipes. Lists hold several sections of a kind: `model.stages.0.iou`.",
    ]
    for prefix, section in _sections("", Recipe):
        own = {key: field for key, field in section.model_fields.items() if not _inner(field.annotation)}
        rows = [
            f"| `{prefix}{key}` | {_type(f.annotation)} | {_default(f)} | {_sentence(f.description or '')} |"
            for key, f in own.items()
        ]
        if rows:
            kind = section.model_fields.get("loss") if prefix == "classifier." else None
            title = (prefix.rstrip(".") or "the recipe") + (f", {kind.default}" if kind is not None else "")
            parts += [f"## {title}", "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _inner(annotation: Any) -> list[tuple[str, type[BaseModel]]]:
    """Sections in a field's type, with what follows the key: several kinds of classifier, lists of stages."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [("", annotation)]
    found = [pair for part in getattr(annotation, "__args__", ()) for pair in _inner(part)]
    return [("N.", kind) for _, kind in found] if getattr(annotation, "__origin__", None) is tuple else found


def _sections(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, section
    for key, field in section.model_fields.items():
        for suffix, inner in _inner(field.annotation):
            yield from _sections(f"{prefix}{key}.{suffix}", inner)


def _type(annotation: Any) -> str:
    return f"`{_plain_type(annotation)}`".replace("|", "\\|")


def _plain_type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _plain_type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_plain_type, inner))
    if origin in (tuple, list):
        kinds = [_plain_type(kind) for kind in inner if kind is not Ellipsis]
        return f"list of {kinds[0]}" if len(set(kinds)) == 1 else f"[{', '.join(kinds)}]"
    if origin is dict:
        return "mapping"
    names = {str: "text", bool: "true | false", float: "number", int: "whole number", type(None): "null"}
    return names.get(annotation) or str(annotation)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`".replace("|", "\\|")


def api_page(title: str, names: tuple[str, ...]) -> str:
    """A page of the Python interface, which mkdocstrings fills from the docstrings."""
    parts = [f"# {title}"]
    for name in names:
        if name == "losses":
            parts += ["## tailseg.losses", "The classifications of a recipe, each also a criterion for any model."]
            parts += [f"::: {_path(kind)}" for kind in CLASSIFICATIONS.values()]
        elif name in ("recipes", "runtime", "hub"):
            module = import_module(f"tailseg.{name}")
            public = [part for part in module.__all__ if callable(getattr(module, part))]
            parts += [f"## tailseg.{name}", str(module.__doc__).splitlines()[0]]
            parts += [f"::: {_path(getattr(module, part))}" for part in public]
        else:
            parts.append(f"::: {_path(getattr(tailseg, name))}")
    return "\n\n".join(parts) + "\n"


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
