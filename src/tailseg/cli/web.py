"""The command `tailseg app`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from tailseg.cli.console import DATA_HELP, DeviceOption, QuietOption, log, say
from tailseg.errors import UserError

if TYPE_CHECKING:
    from tailseg.app.browser import Browser
    from tailseg.predict import Model


def app(
    model: Annotated[
        Path, typer.Argument(help="Model file, a run's folder (its best model, else its last), or exported .onnx.")
    ],
    data: Annotated[
        str | None, typer.Option("--data", help=f"Show its validation set, too: truth beside prediction. {DATA_HELP}")
    ] = None,
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
    with listening(host, port) as opened:
        browser = None if data is None else _browser(loaded, data, show=not quiet)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        address = f"[{shown}]" if ":" in shown else shown
        line = f"{model} is at http://{address}:{opened.getsockname()[1]}/ (Ctrl-C ends it)"
        only_here = opened.getsockname()[0] in ("127.0.0.1", "::1")
        with page(loaded, title, browser, only_here=only_here) as served:
            serve(served, opened, lambda: say(line))


def _browser(model: Model, data: str, *, show: bool) -> Browser:
    from tailseg.app.validation import open_browser

    with TemporaryDirectory(prefix="tailseg-app-") as scratch:
        return open_browser(model, data, Path(scratch), show=show)
