"""Options that the commands share, and their output: the log and tables on the terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tailseg.wording import for_terminal

if TYPE_CHECKING:
    from rich.table import Table

DATA_HELP = (
    "Folder with train.json, val.json and images/; YAML file with these entries; "
    "COCO, YOLO, labelme, VOC, CVAT, Label Studio, Supervisely or VIA folder or file; or 'synthetic'."
)
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.")
]
RecipeArgument = Annotated[
    str, typer.Argument(help="Built-in recipe (see `tailseg recipes`), YAML file, or model (its recipe).")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, warnings only.")]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda:1|mps", help="Where it runs; auto: a GPU if there is one.")
]


class _Formatter(logging.Formatter):
    """Messages as a terminal may get them."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def say(text: str) -> None:
    """Print a line to stdout; names from files in it can do no harm there."""
    typer.echo(for_terminal(text))


def cell(text: str) -> str:
    """A text from files as a table may hold it, without rich's markup and what a terminal would obey."""
    from rich.markup import escape

    return escape(for_terminal(text))


def log(quiet: bool) -> None:
    """Write the log to stderr, warnings only if ``quiet``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler], force=True)
    for name in ("PIL", "matplotlib", "timm", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def print_table(table: Table) -> None:
    """Print a table to stdout, as wide as the terminal."""
    from rich.console import Console

    Console().print(table)
