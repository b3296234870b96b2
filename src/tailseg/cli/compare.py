"""The command `tailseg compare`, and the tables that it prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailseg.cli.console import DATA_HELP, QuietOption, cell, log, print_table, say

if TYPE_CHECKING:
    from rich.table import Table

Content = Mapping[str, Any]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: folders that `tailseg eval` wrote, runs' folders, results files. The others are "
            "compared with the first."
        ),
    ],
    data: Annotated[str | None, typer.Option("--data", help=DATA_HELP)] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="Instead of --data: annotation file, as for `tailseg score`.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
    out: Annotated[Path, typer.Option(help="Folder for comparison.json and comparison.html.")] = Path("comparison"),
    quiet: QuietOption = False,
) -> None:
    """Compare evaluations on the same images: differences, and whether they are beyond chance."""
    log(quiet)
    if (data is None) == (annotations is None):
        raise typer.BadParameter("give either --data or --annotations", param_hint="--data")
    if split not in ("train", "val"):
        raise typer.BadParameter(f"'{split}' is not one of train, val", param_hint="--split")
    from tailseg.evaluation.paired_report import verdicts
    from tailseg.jobs import compare as run

    compared = run(runs, data, out, annotations=annotations, split=split, show=not quiet)
    content = compared.content
    print_table(metrics_table(content))
    for number in range(1, len(content["runs"])):
        table = classes_table(content, number)
        if table is not None:
            print_table(table)
    for sentence in verdicts(content):
        say(sentence)
    say(f"Written: {', '.join(str(file) for file in compared.files)}")


def metrics_table(content: Content) -> Table:
    """The metrics of all runs, with their differences to the first; * marks what is beyond chance."""
    from rich.table import Table

    from tailseg.evaluation.paired_report import MINUS, WORDS, percent

    names = [cell(run["name"]) for run in content["runs"]]
    differences = ["difference"] if len(names) == 2 else [f"{name} {MINUS} first" for name in names[1:]]
    table = Table("%", *names, *differences, caption="* beyond chance: the interval does not hold 0")
    for kind, tables in content["kinds"].items():
        for row in tables["metrics"]:
            values = [percent(value) for value in row["runs"]]
            table.add_row(f"{WORDS[kind]} {row['metric']}", *values, *map(_marked, row["differences"]))
    return table


def classes_table(content: Content, number: int) -> Table | None:
    """The classes that gain and lose most with a run; None where none does."""
    from rich.table import Table

    from tailseg.evaluation.paired_report import NOTHING, WORDS, main_kind, most_changed, percent

    kind = main_kind(content)
    fewest, classes = content["fewest_images"], content["kinds"][kind]["classes"]
    rows = most_changed(classes, number - 1, fewest, gains=True, count=5)
    rows += reversed(most_changed(classes, number - 1, fewest, gains=False, count=5))
    if not rows:
        return None
    names = [cell(content["runs"][i]["name"]) for i in (0, number)]
    table = Table(f"{WORDS[kind]}, AP in %", "group", "images", "objects", *names, "difference")
    for row in rows:
        numbers = [row["frequency"] or NOTHING, f"{row['images']:,}", f"{row['instances']:,}"]
        values = [percent(row["runs"][i]) for i in (0, number)]
        table.add_row(cell(row["name"]), *numbers, *values, _marked(row["differences"][number - 1]))
    return table


def _marked(difference: Content) -> str:
    from tailseg.evaluation.paired_report import difference_texts

    return " ".join(filter(None, difference_texts(difference))) + (" *" if difference["beyond_chance"] else "")
