"""The command line: one thin function a command.

Exit codes: 0 done, 1 the input is at fault (one sentence on stderr), 2 usage, 130 stopped by Ctrl-C after saving.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tailseg.cli.compare import compare
from tailseg.cli.console import DATA_HELP, DeviceOption, QuietOption, RecipeArgument, SetOption, say
from tailseg.cli.console import log as _log
from tailseg.cli.console import print_table as _print
from tailseg.cli.convert import convert_app
from tailseg.cli.data import data_app
from tailseg.cli.export import export
from tailseg.cli.hub import hub_app
from tailseg.cli.recipes import recipes_app
from tailseg.cli.run_folder import run_folder
from tailseg.cli.web import app as web_app
from tailseg.errors import UserError
from tailseg.wording import for_terminal, one_line

# Before PyTorch is loaded: by default its threads spin while they wait for each other, and where the cores are shared
# (loader workers, other people's jobs) a step then takes up to twelve times as long. Sleeping costs an idle machine a
# fifth of its speed; whoever has one to themselves sets OMP_WAIT_POLICY=ACTIVE.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(recipes_app, name="recipes")
app.add_typer(hub_app, name="hub")

DataOption = Annotated[str, typer.Option("--data", help=DATA_HELP)]
ModelArgument = Annotated[
    Path, typer.Argument(help="Model file, a run's folder (its best model, else its last), or exported .onnx.")
]
TtaOption = Annotated[
    bool,
    typer.Option("--tta", help="Average over several sizes of each image and their mirror images (test.tta); slow."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"tailseg {metadata.version('tailseg')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Long-tailed instance segmentation: train, evaluate and run models that find rare classes too."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with different random numbers.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Twenty steps each, in a minute: whether everything runs, not who wins.")
    ] = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Train cross-entropy and Seesaw on the built-in data, score both and write a report; minutes on two cores."""
    _log(quiet)
    from tailseg.cli.demo import run_demo
    from tailseg.evaluation.methods import results_markdown, verdict

    results = _stoppable(
        lambda: run_demo(out, seeds=seeds, quick=quick, device=device, show=not quiet),
        lambda: f"Stopped. Remove {out} before the next demo there.",
    )
    say(results_markdown(results))
    say(verdict(results))
    say(f"Report: {out / 'report.html'}")


@app.command()
def train(
    recipe: RecipeArgument,
    data: DataOption,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for models, metrics and detections.", show_default="runs/RECIPE, numbered if taken"),
    ] = None,
    settings: SetOption = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="coco|MODEL",
            help="Start from torchvision's COCO model, a tailseg model, or a checkpoint of another project.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the exact step where OUT stopped.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="Number of GPUs, or of processes on the CPU.")] = 1,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random numbers.")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Train a recipe on a data set."""
    _log(quiet)
    from tailseg.jobs import train as run
    from tailseg.recipes.resolve import resolve

    resolved = resolve(recipe, settings or ())
    folder = run_folder(resolved.name, out, resume=resume)

    def stopped() -> str:
        from tailseg.training.resumption import way_on

        return f"Stopped; {way_on(folder)}."

    job = partial(run, resolved, data, folder, init=init, resume=resume, devices=devices, device=device, seed=seed)
    trained = _stoppable(lambda: job(show=not quiet), stopped)
    if trained.metrics is not None:
        from tailseg.evaluation.metrics import format_table

        _print(format_table(trained.metrics))
        models = f"Models: {trained.best} (best segm AP), {trained.last}"
        say(models if trained.best else f"Model: {trained.last} (no segm AP)")


FixedApOption = Annotated[
    bool,
    typer.Option("--fixed-ap", help="Count the best 10,000 detections of each class, with no limit per image."),
]
BoundaryOption = Annotated[bool, typer.Option("--boundary", help="Add boundary AP, which judges the outlines; slow.")]
AnalyseOption = Annotated[
    bool,
    typer.Option("--analyse", help="Write a page of what lies behind the AP, and thresholds.json for `predict`."),
]


@app.command("eval")
def evaluate(
    model: ModelArgument,
    data: DataOption,
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json and detections.json.", show_default="eval-DATA-SPLIT by the model"),
    ] = None,
    settings: SetOption = None,
    max_dets: Annotated[
        int | None, typer.Option("--max-dets", min=1, help="Detections an image; sets test.max_detections.")
    ] = None,
    tta: TtaOption = False,
    fixed_ap: FixedApOption = False,
    boundary: BoundaryOption = False,
    analyse: AnalyseOption = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Evaluate a model on a split of a data set by the LVIS rules."""
    _log(quiet)
    if split not in ("train", "val"):
        raise typer.BadParameter(f"'{split}' is not one of train, val", param_hint="--split")
    from tailseg.jobs import evaluate as run
    from tailseg.predict import is_exported, load

    limit = [] if max_dets is None or is_exported(model) else [f"test.max_detections={max_dets}"]
    found = run(
        load(model, device, settings=[*limit, *_tta_setting(tta), *(settings or ())]),
        *(data, out),
        split=split,
        max_dets=max_dets or 300,
        fixed_ap=fixed_ap,
        boundary=boundary,
        analyse=analyse,
        show=not quiet,
    )
    if found.metrics:
        from tailseg.evaluation.metrics import format_table

        _print(format_table(found.metrics))
    say(f"Written: {', '.join(str(file) for file in found.files)}")
    if found.page is not None:
        say(f"Analysis: {found.page}")


FORMATS = ("json", "coco", "yolo", "labelme", "cvat")


@app.command()
def predict(
    model: ModelArgument,
    sources: Annotated[
        list[str],
        typer.Argument(help="Images, folders, patterns such as 'new/*.jpg', http(s) addresses, videos."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder: a picture and a JSON file per image, or the set of --format.")
    ] = Path("predictions"),
    score: Annotated[float | None, typer.Option(min=0, max=1, help="Lowest score shown.", show_default="0.5")] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option("--thresholds", help="Lowest scores by class: thresholds.json of `tailseg eval --analyse`."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most pictures.")] = None,
    kind: Annotated[
        str | None,
        typer.Option("--format", metavar="|".join(FORMATS), help="JSON without pictures, or a set to correct by hand."),
    ] = None,
    slices: Annotated[
        int | None, typer.Option(min=1, help="Look at larger pictures in slices of so many pixels, too.")
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(min=0, max=0.9, help="Share of a slice that the next shows too.", show_default="0.2"),
    ] = None,
    settings: SetOption = None,
    tta: TtaOption = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Detect the objects in pictures, draw them and write them down."""
    _log(quiet)
    if kind not in (None, *FORMATS):
        raise typer.BadParameter(f"'{kind}' is not one of {', '.join(FORMATS)}", param_hint="--format")
    if overlap is not None and slices is None:
        raise typer.BadParameter("is of slices; add --slices 1024, for example", param_hint="--overlap")
    if score is not None and thresholds is not None:
        raise typer.BadParameter("states the lowest scores, as --score does; give one", param_hint="--thresholds")
    from tailseg.predict import load
    from tailseg.predict.writing import Request, export_predictions, predict_files

    loaded = load(model, device, settings=[*_tta_setting(tta), *(settings or ())])
    share = 0.2 if overlap is None else overlap
    request = Request(
        sources,
        min_score=0.5 if score is None else score,
        thresholds=thresholds,
        limit=limit,
        slices=slices,
        overlap=share,
        show=not quiet,
    )
    if kind in (None, "json"):
        tally = _stoppable(
            lambda: predict_files(loaded, request, out, pictures=kind is None),
            lambda: f"Stopped. What was written until then is in {out}.",
        )
        written = [f"{'Pictures and JSON' if kind is None else 'JSON'} in {out}"]
    else:
        exported, tally = _stoppable(
            lambda: export_predictions(loaded, request, out, kind),
            lambda: f"Stopped. {out} was not made: a set is written whole or not at all.",
        )
        written = [f"{kind} set in {out}", *(f"- {note}" for note in exported.notes)]
    if tally.pictures or not tally.faults:
        say("\n".join([tally.sentence(), *written]))
    if tally.faults:
        raise tally.fault()


def _tta_setting(tta: bool) -> list[str]:
    return ["test.tta=true"] if tta else []


@app.command()
def score(
    annotations: Annotated[Path, typer.Argument(help="LVIS or COCO annotation file, .json or .json.gz.")],
    detections: Annotated[Path, typer.Argument(help="Results in LVIS format, .json or .json.gz.")],
    iou: Annotated[str, typer.Option(help="bbox, segm or both, separated by a comma.")] = "bbox,segm",
    out: Annotated[Path | None, typer.Option(help="JSON file for the metrics; NAME.classes.csv beside it.")] = None,
    max_dets: Annotated[int, typer.Option("--max-dets", min=1, help="Best detections of an image that count.")] = 300,
    fixed_ap: FixedApOption = False,
    boundary: BoundaryOption = False,
    analyse: AnalyseOption = False,
) -> None:
    """Score any results file exactly as lvis-api does.

    As there, small, medium and large are told by the area of the boxes, for masks too, if the results have boxes.
    """
    _log(quiet=False)
    if analyse and out is None:
        raise typer.BadParameter("is written beside the metrics; name their file with --out", param_hint="--analyse")
    from tailseg.evaluation.metrics import format_table
    from tailseg.jobs import score as run

    types = tuple(part.strip() for part in iou.split(",") if part.strip())
    scores = run(
        *(annotations, detections),
        iou_types=types,
        out=out,
        max_dets=max_dets,
        fixed_ap=fixed_ap,
        boundary=boundary,
        analyse=analyse,
    )
    _print(format_table(scores.metrics))
    if analyse and out is not None:
        say(f"Analysis: {out.with_suffix('.analysis.html')}")


app.command()(compare)
app.command()(export)
app.command("app")(web_app)


def _stoppable(job: Callable[[], T], message: Callable[[], str]) -> T:
    """Run a long job; after Ctrl-C it has saved what it could, and the command ends with ``message`` and 130."""
    try:
        return job()
    except KeyboardInterrupt:
        typer.echo(for_terminal(message()), err=True)
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point; a `UserError`, a file that cannot be written, a full GPU: one sentence each, and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        with suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")  # a pipe on Windows has a code page without our signs
    try:
        app()
    except UserError as error:
        print(one_line(f"tailseg: {error}"), file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which may not even be loaded
            raise
        print(
            "tailseg: the memory of the GPU is too small for this, or taken by other programs; free it, choose another "
            "device with --device, or, in eval and predict, lower data.test_short_edge, data.long_edge or "
            "test.max_detections with --set",
            file=sys.stderr,
        )
        sys.exit(1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.filename is None and not full:
            raise  # no file of the user's: a fault of ours, whose traceback is wanted
        gone = error.errno == errno.ENOENT
        fix = "make room" if full else "make its folder" if gone else "choose another path or change its rights"
        print(one_line(f"tailseg: {error.filename or 'a file'}: {error.strerror}; {fix}"), file=sys.stderr)
        sys.exit(1)
