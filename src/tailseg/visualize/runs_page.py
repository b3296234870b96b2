"""The page of `tailseg compare`: runs side by side, their differences with intervals, and the classes behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tailseg.data.annotations.frequency import GROUPS
from tailseg.errors import writing
from tailseg.evaluation.paired_report import (
    MINUS,
    NOTHING,
    WORDS,
    interval,
    main_kind,
    most_changed,
    percent,
    points,
    verdicts,
)
from tailseg.visualize.charts import add_legend, new_figure, to_svg
from tailseg.visualize.page import render

COLOURS = ("#3a87c8", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#7f7f7f")

Content = Mapping[str, Any]


def write_page(content: Content, path: Path) -> None:
    """Write the page.

    Args:
        content: as `tailseg.evaluation.paired.compare_runs` returns it.
        path: the HTML file.
    """
    names = [run["name"] for run in content["runs"]]
    main, fewest = main_kind(content), content["fewest_images"]
    rows = content["kinds"][main]["classes"]
    page = render(
        "runs.html",
        title=f"{' and '.join(names) if len(names) == 2 else f'{len(names)} runs'} on {content['data']}",
        verdicts=verdicts(content),
        names=names,
        differences=["Difference"] if len(names) == 2 else [f"{name} {MINUS} first" for name in names[1:]],
        kinds=[
            {"name": WORDS[kind].capitalize(), "metrics": [_metric(row) for row in tables["metrics"]]}
            for kind, tables in content["kinds"].items()
        ],
        charts=[
            {"chart": _chart(kind, content), "caption": f"AP of {WORDS[kind]}: differences to {names[0]}, in points."}
            for kind in content["kinds"]
        ],
        confidence=f"{content['confidence']:.0%}",
        sets=f"{content['sets']:,}",
        images=f"{content['images']:,}",
        groups=_groups(content["kinds"][main]["metrics"]),
        changes=[_changes(content, rows, number) for number in range(1, len(names))],
        main=WORDS[main].capitalize(),
        classes=[_class(row) for row in rows],
        few=sum(row["images"] < fewest for row in rows),
        fewest=fewest,
    )
    with writing(path):
        path.write_text(page, encoding="utf-8")


def _metric(row: Content) -> dict[str, Any]:
    differences = [_difference(one) for one in row["differences"]]
    return {"metric": row["metric"], "runs": [percent(value) for value in row["runs"]], "differences": differences}


def _difference(difference: Content) -> dict[str, Any]:
    return {
        "points": points(difference["value"]),
        "interval": interval(difference["interval"]),
        "beyond_chance": difference["beyond_chance"],
    }


def _class(row: Content) -> dict[str, Any]:
    return {
        **{"name": row["name"], "group": GROUPS.get(row["frequency"], NOTHING)},
        **{"images": f"{row['images']:,}", "objects": f"{row['instances']:,}"},
        "runs": [percent(value) for value in row["runs"]],
        "differences": [_difference(one) for one in row["differences"]],
    }


def _groups(metrics: Sequence[Content]) -> str:
    """The numbers of classes with objects in each frequency group, if there are groups."""
    counts = {row["metric"][2]: row["classes"] for row in metrics if row["metric"] in ("APr", "APc", "APf")}
    if not any(counts.values()):
        return ", which this data does not tell"
    return f" ({', '.join(str(count) for count in counts.values())} of them have objects here)"


def _changes(content: Content, rows: Sequence[Content], number: int) -> list[dict[str, Any]]:
    """The tables of the classes that gain and that lose with one run; a table without rows is left out."""
    name = content["runs"][number]["name"]
    sides = []
    for gains, word in ((True, "Gain"), (False, "Loss")):
        found = most_changed(rows, number - 1, content["fewest_images"], gains=gains)
        if found:
            caption = f"{word} with {name}, AP in percent."
            sides.append({"caption": caption, "run": name, "number": number, "rows": [_class(row) for row in found]})
    return sides


def _chart(kind: str, content: Content) -> Markup:
    """Differences to the first run with their intervals, a colour a run."""
    runs = content["runs"][1:]
    metrics = [row for row in content["kinds"][kind]["metrics"] if row["differences"][0]["value"] is not None]
    with new_figure((5.4, 0.9 + max(1, len(metrics)) * (0.24 + 0.2 * len(runs)))) as (figure, axes):
        axes.axvline(0, color="#7f7f7f", lw=1)
        for index, run in enumerate(runs):
            nudge = 0.6 * ((index + 0.5) / len(runs) - 0.5)
            colour = COLOURS[index % len(COLOURS)]
            for place, row in enumerate(metrics):
                difference = row["differences"][index]
                if difference["interval"] is not None:
                    low, high = (100 * end for end in difference["interval"])
                    axes.plot([low, high], [place + nudge] * 2, color=colour, lw=3, alpha=0.5)
                label = run["name"].replace("_", " ").replace("$", "") if place == 0 and len(runs) > 1 else None
                axes.plot(100 * difference["value"], place + nudge, "o", color=colour, label=label)
        axes.set_yticks(range(len(metrics)), [row["metric"] for row in metrics])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("points")
        add_legend(figure, axes)
        alt = f"Differences in AP of {WORDS[kind]} with intervals; their numbers stand in the table below."
        return to_svg(figure, f"differences-{kind}", alt)
