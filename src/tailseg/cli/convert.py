"""The `tailseg convert` commands: other projects' checkpoints become models of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailseg.cli.console import SetOption, log, say

if TYPE_CHECKING:
    from tailseg.zoo.conversion import ForeignModel

convert_app = typer.Typer(help="Convert checkpoints of other projects to tailseg models.", no_args_is_help=True)

OutModelArgument = Annotated[
    Path | None,
    typer.Argument(metavar="OUT", help="Model file to write, ending in .safetensors; none with --explain."),
]
CategoriesOption = Annotated[
    Path | None,
    typer.Option("--categories", metavar="ANN.json", help="Annotation file with the classes it was trained on."),
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Print the place of each tensor, and those left over; write nothing.")
]


@convert_app.command("mmdet")
def convert_mmdet(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of mmdetection 2.x or 3.x, .pth.")],
    out: OutModelArgument = None,
    categories: CategoriesOption = None,
    settings: SetOption = None,
    explain: ExplainOption = False,
) -> None:
    """Convert Mask R-CNN or Cascade Mask R-CNN of mmdetection, with cross-entropy or Seesaw Loss."""
    _require_out(out, explain)
    from tailseg.zoo.mmdet import read_mmdet

    _convert(read_mmdet(checkpoint), out, categories, settings)


@convert_app.command("torchvision")
def convert_torchvision(
    source: Annotated[
        str,
        typer.Argument(help="maskrcnn_resnet50_fpn, the same with _v2 (downloaded), or a state dict, .pth."),
    ],
    out: OutModelArgument = None,
    categories: CategoriesOption = None,
    settings: SetOption = None,
    explain: ExplainOption = False,
) -> None:
    """Convert Mask R-CNN R50-FPN of torchvision, version 1 or 2."""
    _require_out(out, explain)
    from tailseg.zoo.torchvision import read_torchvision

    _convert(read_torchvision(source), out, categories, settings)


@convert_app.command("detectron2")
def convert_detectron2(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of detectron2, .pkl or .pth.")],
    out: OutModelArgument = None,
    categories: CategoriesOption = None,
    settings: SetOption = None,
    explain: ExplainOption = False,
) -> None:
    """Convert Mask R-CNN R50-FPN or R101-FPN of detectron2, for COCO or LVIS."""
    _require_out(out, explain)
    from tailseg.zoo.detectron2 import read_detectron2

    _convert(read_detectron2(checkpoint), out, categories, settings)


def _require_out(out: Path | None, explain: bool) -> None:
    if (out is None) != explain:
        raise typer.BadParameter(
            "writes nothing; leave out OUT" if explain else "name the model file to write, or add --explain",
            param_hint="--explain" if explain else "OUT",
        )


def _convert(foreign: ForeignModel, out: Path | None, categories: Path | None, settings: list[str] | None) -> None:
    """Convert to ``out``; where that is None, explain."""
    log(quiet=False)
    if out is None:
        from tailseg.zoo.explanation import explain

        for line in explain(foreign, categories=categories, settings=settings or ()):
            say(line)
        return
    from tailseg.zoo.conversion import convert

    recipe, labels = convert(foreign, out, categories=categories, settings=settings or ())
    stages = {1: "Mask R-CNN", 3: "Cascade Mask R-CNN"}.get(len(recipe.model.stages), "detector")
    say(
        f"{out}: {stages}, {recipe.model.backbone.name}, {len(labels)} classes, classifier {recipe.classifier.loss}; "
        f"its recipe: tailseg recipes show {out}"
    )
