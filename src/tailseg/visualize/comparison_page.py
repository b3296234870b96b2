"""The page of `tailseg compare`: runs side by side, their differences with intervals, and the classes behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tailseg.data.annotations.frequency import GROUPS
from tailseg.evaluation.paired_report import (
    MINUS,
    NOTHING,
    WORDS,
    difference_texts,
    main_kind,
    most_changed,
    percent,
    verdicts,
)
from tailseg.files import write_whole
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
    labels = [_label(number) for number in range(len(content["runs"]))]
    main, fewest = main_kind(content), content["fewest_images"]
    rows = content["kinds"][main]["classes"]
    page = render(
        "comparison.html",
        title=f"{len(labels)} runs on {content['data']}",
        runs={label: run["name"] for label, run in zip(labels, content["runs"], strict=True)},
        verdicts=verdicts(content),
        labels=labels,
        differences=[_minus_first(label) for label in labels[1:]],
        kinds=[
            {
                "name": WORDS[kind].capitalize(),
                "metrics": [_metric(row) for row in tables["metrics"]],
                "chart": _chart(kind, tables["metrics"], labels),
            }
            for kind, tables in content["kinds"].items()
        ],
        confidence=f"{content['confidence']:.0%}",
        sets=f"{content['sets']:,}",
        images=f"{content['images']:,}",
        groups=_groups(content["kinds"][main]["metrics"]),
        changes=[_changes(rows, number, fewest) for number in range(1, len(labels))],
        main=WORDS[main],
        classes=[_class(row) for row in rows],
        few=sum(row["images"] < fewest for row in rows),
        fewest=fewest,
    )
    write_whole(path, page)


def _metric(row: Content) -> dict[str, Any]:
    differences = [_difference(one) for one in row["differences"]]
    return {"metric": row["metric"], "runs": [percent(value) for value in row["runs"]], "differences": differences}


def _difference(difference: Content) -> dict[str, Any]:
    value, ends = difference_texts(difference)
    return {"points": value, "interval": ends, "beyond_chance": difference["beyond_chance"]}


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


def _changes(rows: Sequence[Content], number: int, fewest_images: int) -> list[dict[str, Any]]:
    """The tables of the classes that gain and that lose with one run; a table without rows is left out."""
    label = _label(number)
    sides = []
    for gains, word in ((True, "Gain"), (False, "Lose")):
        found = most_changed(rows, number - 1, fewest_images, gains=gains)
        if found:
            about = {"caption": f"{word} most with {label}.", "label": label, "difference": _minus_first(label)}
            sides.append({**about, "number": number, "rows": [_class(row) for row in found]})
    return sides


def _label(number: int) -> str:
    """A letter for each run: A, B, ..., Z, A1, B1, ..."""
    return f"{chr(ord('A') + number % 26)}{number // 26 or ''}"


def _minus_first(label: str) -> str:
    return f"{label} {MINUS} {_label(0)}"


def _chart(kind: str, metrics: Sequence[Content], labels: Sequence[str]) -> Markup:
    """Differences to the first run with their intervals, a colour a run."""
    shown = [row for row in metrics if row["differences"][0]["value"] is not None]
    height = 0.9 + max(1, len(shown)) * (0.24 + 0.2 * len(labels[1:]))
    with new_figure((5.4, height)) as (figure, axes):
        axes.axvline(0, color="#7f7f7f", lw=1)
        for index, label in enumerate(labels[1:]):
            nudge = 0.6 * ((index + 0.5) / len(labels[1:]) - 0.5)
            colour = COLOURS[index % len(COLOURS)]
            for place, row in enumerate(shown):
                difference = row["differences"][index]
                if difference["interval"] is not None:
                    low, high = (100 * end for end in difference["interval"])
                    axes.plot([low, high], [place + nudge] * 2, color=colour, lw=3, alpha=0.5)
                named = _minus_first(label) if place == 0 and len(labels) > 2 else None
                axes.plot(100 * difference["value"], place + nudge, "o", color=colour, label=named)
        axes.set_yticks(range(len(shown)), [row["metric"] for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("points")
        add_legend(figure, axes)
        alt = f"Differences in AP of {WORDS[kind]} with intervals; their numbers stand in the table above."
        return to_svg(figure, f"differences-{kind}", alt)
