"""The command `tailseg app`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tailseg.cli.console import DeviceOption, QuietOption, log, say
from tailseg.errors import UserError


def app(
    model: Annotated[
        Path, typer.Argument(help="A model file, or a run's folder: its best model, else its last (runs/seesaw).")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets every machine in, without a password.")
    ] = "127.0.0.1",
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Show what a model finds on a web page: drop pictures, choose scores and classes, download."""
    log(quiet)
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio; install it with: pip install 'tailseg[app]'")
    from tailseg.predict import load

    loaded = load(model, device)
    from tailseg.app.server import listening, page, serve

    title = f"tailseg: {loaded.recipe.name}"
    with listening(host, port) as opened, page(loaded, title) as served:
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        address = f"[{shown}]" if ":" in shown else shown
        line = f"{model} is at http://{address}:{opened.getsockname()[1]}/ (Ctrl-C ends it)"
        serve(served, opened, lambda: say(line))
