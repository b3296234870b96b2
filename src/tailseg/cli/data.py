"""The `tailseg data` commands: make, examine, import, divide and export data."""

from __future__ import annotations

import logging
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from tailseg.cli.console import DATA_HELP, QuietOption, cell, log, print_table, say
from tailseg.errors import UserError
from tailseg.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

    from tailseg.data.diagnosis.dataset_report import DatasetReport
    from tailseg.data.diagnosis.findings import Finding
    from tailseg.data.importers.writer import Part
    from tailseg.data.sources import DataSplits

EXAMPLES = 4  # of a finding on the terminal
FORMATS = ("coco", "yolo", "labelme", "voc", "cvat", "labelstudio", "supervisely", "via")  # that are read

data_app = typer.Typer(help="Make, check, import, split and export data.", no_args_is_help=True)

NewFolderArgument = Annotated[Path, typer.Argument(metavar="OUT", help="New folder: train.json, val.json, images/.")]


@data_app.command("synth")
def data_synth(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 120,
    images: Annotated[int, typer.Option(help="Training images.")] = 6000,
    val_images: Annotated[int, typer.Option(help="Validation images.")] = 400,
    size: Annotated[int, typer.Option(help="Side of the square images in pixels.")] = 128,
    rarest: Annotated[int, typer.Option(help="Training images of the rarest class.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Draw a long-tailed data set in LVIS format."""
    log(quiet)
    from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
    from tailseg.progress import progress_bar

    settings = SyntheticSettings(
        classes=classes, train_images=images, val_images=val_images, size=size, rarest=rarest, seed=seed
    )
    with progress_bar("drawing", images + val_images, show=not quiet) as advance:
        write_synthetic(out, settings, progress=lambda done, _total: advance(done))
    say(f"{images} training and {val_images} validation images of {classes} classes in {out}")


@data_app.command("check")
def data_check(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose resolution and sampling count; by default the one recommended.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Show where this model confidently disagrees with validation labels.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="JSON file for everything that was found.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="HTML file with charts and rare classes.")] = None,
    quiet: QuietOption = False,
) -> None:
    """Check a data set before training; the exit code is 1 only if it cannot be trained on."""
    log(quiet)
    from tailseg.recipes.resolve import resolve

    given = None if recipe is None else resolve(recipe, ())
    from tailseg.data.annotations.frequency import LVIS_LIMITS, GroupRule, require_rule_in_use
    from tailseg.data.sources import open_data
    from tailseg.progress import progress_bar

    rule = LVIS_LIMITS if given is None else GroupRule.of(given.data)
    splits = open_data(data, rule=rule, show=not quiet, examine=True)
    # Imported after the data is there: PyTorch comes with it.
    from tailseg.data.diagnosis.dataset_report import check_data, file_steps, suggest

    require_rule_in_use(rule, splits.train, splits.val)
    logging.getLogger(__name__).info(splits.groups)
    assert splits.train is not None
    resolved = given or resolve(suggest(data, splits.train)["recipe"], ())
    with progress_bar("looking at images", file_steps(splits), show=not quiet) as advance:
        report = check_data(data, splits, resolved, advance)
    if model is not None and report.usable():
        report = report.with_findings(_label_findings(model, splits, show=not quiet))
    for table in check_tables(report):
        print_table(table)
    say(f"To begin: {report.suggestion['command']}\n  ({report.suggestion['reason']})")
    if json is not None:
        write_whole(json, orjson.dumps(report.as_json(), option=orjson.OPT_INDENT_2))
    if page is not None:
        from tailseg.visualize.dataset_page import write_page

        write_page(report, splits.train, page)
    if not report.usable():
        first = report.findings[0]
        raise UserError(f"{data}: cannot be trained on: {first.count} {first.what} ({first.split}); {first.fix}")


def _label_findings(model: Path, splits: DataSplits, *, show: bool) -> list[Finding]:
    """Labels of the validation split, which no model has learned by heart, that a model disagrees with."""
    from tempfile import TemporaryDirectory

    from tailseg.data.dataset import evaluation_dataset
    from tailseg.data.loading import worker_count
    from tailseg.data.sources import known_categories
    from tailseg.evaluation.evaluate import evaluate
    from tailseg.evaluation.suspicious_labels import disagreements, label_findings
    from tailseg.predict import load

    assert splits.val is not None
    loaded = load(model)
    data = loaded.recipe.data
    with TemporaryDirectory() as folder:
        evaluate(
            loaded.detector,
            evaluation_dataset(splits.val, data),
            Path(folder),
            device=loaded.device,
            batch_size=data.batch,
            workers=worker_count(data.workers, loaded.device),
            category_ids=known_categories(splits.val, loaded.categories, str(model)),
            show=show,
        )
        return label_findings(disagreements(splits.val, Path(folder) / "detections.json"), "val", "the model")


def check_tables(report: DatasetReport) -> list[Table]:
    """The report for a terminal: counts, classes by frequency, resolution and sampling, findings."""
    from rich.table import Table

    counts = Table(title="Data")
    counts.add_column("")
    for split in report.splits:
        counts.add_column(split, justify="right")
    for key in report.splits["train"]:
        counts.add_row(key.replace("_", " "), *(f"{row[key]:,}" for row in report.splits.values()))

    groups = Table(title="Classes by training images")
    for head in ("", "classes", "train objects", "val objects"):
        groups.add_column(head, justify="right" if head else "left")
    for name, row in report.groups.items():
        groups.add_row(name, *(f"{value:,}" for value in row.values()))

    scale, sampling, memory = report.scale, report.sampling, report.memory
    under = ", ".join(f"{scale[f'under_{side}']:.1%} under {side}" for side in (8, 16, 32))
    ranked = [row.train_images for row in report.classes]
    curve = ", ".join(f"{ranked[int(share * (len(ranked) - 1))]:,}" for share in (0, 0.25, 0.5, 0.75, 1))
    recipe = Table(title=f"With {report.recipe}", show_header=False)
    rows = {
        "long tail": f"{curve} training images (most frequent class, quartiles, rarest)",
        "object sides": f"median {scale['median_side']:.0f} pixels in {scale['short_edge']:g} x "
        f"{scale['long_edge']:g}; {under}",
        "repeat factors": f"{sampling['repeated_images']:,} of {sampling['images']:,} images repeated, up to "
        f"{sampling['largest_factor']:.2f} times; an epoch has {sampling['epoch_ceil']:,} "
        f"({sampling['epoch_stochastic']:,.0f} by chance)",
        "steps an epoch": f"{sampling['steps_an_epoch']:,}, repeated {sampling['steps_an_epoch_repeated']:,}, "
        f"with {sampling['batch']} images a step",
        "memory": f"annotations {memory['annotations'] / 2**20:,.1f} MiB (columns of both files); a batch at most "
        f"{memory['batch'] / 2**20:,.0f} MiB (pixels and masks, without activations)",
    }
    for key, text in rows.items():
        recipe.add_row(key, text)

    findings = Table(title="Findings")
    for head in ("", "split", "number", "what", "fix"):
        findings.add_column(head, justify="right" if head == "number" else "left")
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in report.findings:
        shown = ", ".join(shorten(text, 100, placeholder=" ...") for text in finding.examples[:EXAMPLES])
        shown += ", ..." if len(finding.examples) > EXAMPLES else ""
        what = finding.what + (f": {shown}" if shown else "")
        severity = f"[{colours[finding.severity]}]{finding.severity}[/]"
        findings.add_row(severity, finding.split, f"{finding.count:,}", cell(what), cell(finding.fix))
    return [counts, groups, recipe, *([findings] if report.findings else [])]


@data_app.command("convert")
def data_convert(
    kind: Annotated[str, typer.Argument(metavar="|".join(FORMATS), help="Format of the source.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder, annotation file or YOLO data.yaml.")],
    out: NewFolderArgument,
    crowds_are_objects: Annotated[
        bool, typer.Option("--crowds-are-objects", help="COCO: iscrowd counts as 0; CVAT writes 1 for drawn masks.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Convert another tool's data set to LVIS format, odd objects repaired or left out; the source stays as it is."""
    log(quiet)
    if kind not in FORMATS:
        raise typer.BadParameter(f"'{kind}' is not one of {', '.join(FORMATS)}", param_hint="FORMAT")
    if crowds_are_objects and kind != "coco":
        raise typer.BadParameter(f"is for coco; {kind} has no crowds", param_hint="--crowds-are-objects")
    from tailseg.data.importers.convert import convert
    from tailseg.progress import progress_bar

    with progress_bar("converting", None, show=not quiet) as advance:
        parts, notes = convert(kind, source, out, crowds_are_objects=crowds_are_objects, progress=advance)
    _tell(parts, notes, out)


@data_app.command("split")
def data_split(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder with train.json and images/, or the file.")],
    out: NewFolderArgument,
    val: Annotated[float, typer.Option(help="Fraction of the images for validation, between 0 and 1.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Split a data set into training and validation parts so that rare classes are in both."""
    log(quiet)
    if not 0 < val < 1:
        raise typer.BadParameter(f"{val:g} is not between 0 and 1", param_hint="--val")
    from tailseg.data.importers.convert import image_note, only_train_note, read_set
    from tailseg.data.importers.split import divide
    from tailseg.data.importers.writer import write_parts

    categories, part, notes = read_set(source)
    division = divide(part, categories, share=val, seed=seed, source=source)
    linked = write_parts(out, categories, division.parts)
    _tell(division.parts, [*notes, *only_train_note(division.only_train), image_note(linked)], out)


@data_app.command("export")
def data_export(
    kind: Annotated[str, typer.Argument(metavar="coco|yolo|voc", help="Format to write.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    quiet: QuietOption = False,
) -> None:
    """Export a data set with its images to the format of COCO, YOLO or Pascal VOC (boxes only)."""
    log(quiet)
    if kind not in ("coco", "yolo", "voc"):
        raise typer.BadParameter(f"'{kind}' is not one of coco, yolo, voc", param_hint="FORMAT")
    from tailseg.data.annotations.annotations import summary
    from tailseg.data.exporters.export import annotated_set, export
    from tailseg.data.sources import open_data, splits_there
    from tailseg.progress import progress_bar

    there = splits_there(data)
    opened = open_data(data, need=there, show=not quiet)
    splits = {split: getattr(opened, split) for split in there}
    with progress_bar("writing", sum(map(len, splits.values())), show=not quiet) as advance:
        exported = export(kind, annotated_set(splits), out, advance)
    counts = (f"{exported.images[split]} {split} images with {exported.objects[split]} objects" for split in there)
    say(f"{out}: {', '.join(counts)}")
    dropped = [summary(part) for part in splits.values() if part.report.dropped]
    for note in (*dropped, *exported.notes):
        say(f"- {note}")


def _tell(parts: dict[str, Part], notes: list[str], out: Path) -> None:
    """Say what was written."""
    train, val = parts["train"], parts["val"]
    say(
        f"{out}: {len(train.images)} training images with {len(train.annotations)} objects, {len(val.images)} "
        f"validation images with {len(val.annotations)}"
    )
    for note in notes:
        say(f"- {note}")
    say(f"Examine it: tailseg data check {out}")
