"""The `tailseg hub` commands: models to the Hugging Face hub and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailseg.cli.console import log, say

hub_app = typer.Typer(help="Push models to the Hugging Face hub, and pull them.", no_args_is_help=True)

RepositoryArgument = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")]


@hub_app.command("push")
def hub_push(
    model: Annotated[Path, typer.Argument(help="A model file, or a run's folder: its best model, else its last.")],
    repository: RepositoryArgument,
    licence: Annotated[
        str, typer.Option("--license", metavar="ID", help="Licence of the weights, such as apache-2.0 or cc-by-4.0.")
    ],
    trained_on: Annotated[
        str | None, typer.Option("--trained-on", metavar="TEXT", help="The training data in a sentence, for the card.")
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="metrics.json of `tailseg eval`, for the card.", show_default="those in the model, if it has any"
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is seen by its owner only.")] = False,
) -> None:
    """Upload a model with a model card; log in first with `hf auth login`."""
    log(quiet=False)
    from tailseg.hub.card import read_metrics
    from tailseg.hub.transfer import push

    found = None if metrics is None else read_metrics(metrics)
    address = push(model, repository, licence=licence, data=trained_on, metrics=found, private=private)
    say(f"{model} is at {address}")


@hub_app.command("pull")
def hub_pull(
    repository: RepositoryArgument,
    out: Annotated[
        Path | None,
        typer.Argument(help="Model file to write, ending in .safetensors.", show_default="NAME.safetensors"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the repository.", show_default="the newest")
    ] = None,
) -> None:
    """Download a model; it is read and checked before it takes its place."""
    log(quiet=False)
    from tailseg.hub.transfer import pull

    path = pull(repository, out, revision=revision)
    say(f"{path}: its recipe: tailseg recipes show {path}")
