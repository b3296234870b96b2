"""The command `tailseg export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailseg.cli.console import QuietOption, SetOption, log, say


def export(
    model: Annotated[Path, typer.Argument(help="A model file, or a run's folder: its best model, else its last.")],
    out: Annotated[Path, typer.Option(help="The file: .onnx, .pt2 (torch) or .xml (openvino).")],
    kind: Annotated[str, typer.Option("--format", metavar="onnx|torch|openvino", help="What it is for.")] = "onnx",
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="H W", help="Pixels of the input; pictures are fitted into it and padded."),
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Pictures of any size, as `tailseg predict` has them; so without --size.")
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in 16 bits: half the size.")] = False,
    settings: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write a model for other runtimes: the whole detector, from a picture to boxes, classes and masks."""
    log(quiet)
    if dynamic and size is not None:
        raise typer.BadParameter("states one size, --dynamic any; give one of them", param_hint="--size")
    from tailseg.export.job import export as run
    from tailseg.predict import load

    files = run(load(model, "cpu", settings=settings or ()), kind, out, size=size, half=half)
    say(f"Written: {', '.join(f'{file} ({file.stat().st_size / 1e6:.1f} MB)' for file in files)}")
