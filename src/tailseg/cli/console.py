"""Output that the commands share: the log and tables on the terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

DATA_HELP = (
    "Folder with train.json, val.json and images/; YAML file with these entries; "
    "COCO, YOLO, labelme, VOC or CVAT folder or file; or 'synthetic'."
)
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bar, warnings only.")]


def log(quiet: bool) -> None:
    """Write the log to stderr, warnings only if ``quiet``."""
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    for name in ("lightning_fabric", "lightning.fabric", "PIL", "matplotlib", "timm"):
        logging.getLogger(name).setLevel(logging.WARNING)


def print_table(table: Table) -> None:
    """Print a table to stdout, as wide as the terminal."""
    from rich.console import Console

    Console().print(table)
