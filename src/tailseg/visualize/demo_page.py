"""The report of `tailseg demo`: one HTML page with everything inside, from the content of `results.json`."""

from __future__ import annotations

import logging
import mimetypes
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailseg.errors import UserError
from tailseg.evaluation.methods import KINDS, NOTHING, Stat, number, table, verdict
from tailseg.files import write_whole
from tailseg.visualize.demo_charts import (
    GROUPS,
    class_chart,
    curve_chart,
    curve_names,
    fate_chart,
    frequency_chart,
    method_colour,
    score_chart,
)
from tailseg.visualize.page import data_uri, render

log = logging.getLogger(__name__)

PICTURE_KINDS = {
    "comparison": "Side by side",
    "only-seesaw": "Found by Seesaw only",
    "only-cross-entropy": "Found by cross-entropy only",
    "both": "Found by both",
}


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """Write the report page.

    Args:
        results: the content of the demo's `results.json`.
        out: the HTML file, or a folder that gets `report.html`; pictures are looked up from that folder on.

    Raises:
        UserError: a part of the results is missing.
    """
    _require(results)
    path = out / "report.html" if out.is_dir() else out
    methods, rows = results["methods"], table(results)
    named = {key: {"title": method["title"], "colour": method_colour(methods, key)} for key, method in methods.items()}
    seeds = max(len(method["runs"]) for method in methods.values())
    titles = [method["title"] for method in reversed(methods.values())]
    page = render(
        "demo.html",
        title=f"{' against '.join([titles[0], *map(str.lower, titles[1:])])} on long-tailed data",
        verdict=verdict(results),
        methods=list(named.values()),
        metrics={name: [row for row in rows if row.kind == name] for name in KINDS.values()},
        spread=f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "a single seed",
        frequency_charts=_frequency_charts(results, seeds),
        classes=_classes(methods),
        why=_why(results),
        curves=[
            {"chart": curve_chart(methods, name), "caption": name.replace("_", " ")} for name in curve_names(methods)
        ],
        pictures=_pictures(results.get("pictures", []), path.parent),
        command=results["command"],
        facts=_facts(results),
        runs=[
            {
                "method": named[key],
                "numbers": [
                    run["seed"],
                    *(_percent(run["metrics"].get("segm", {}).get(metric)) for metric in ("AP", "APr")),
                    _duration(run.get("seconds")),
                ],
                "weights": run.get("checkpoint") or NOTHING,
            }
            for key, method in methods.items()
            for run in method["runs"]
        ],
    )
    write_whole(path, page)


def _require(results: Mapping[str, Any]) -> None:
    missing = [key for key in ("version", "command", "dataset", "budget", "seeds", "methods") if key not in results]
    if missing:
        raise UserError(f"results.json has no {missing[0]!r}: write it again with `tailseg demo`.")
    if not results["methods"]:
        raise UserError("results.json names no method under 'methods': write it again with `tailseg demo`.")
    for key, method in results["methods"].items():
        if not method.get("runs"):
            raise UserError(f"results.json has no runs of {key!r}: write it again with `tailseg demo`.")


def _frequency_charts(results: Mapping[str, Any], seeds: int) -> list[dict[str, object]]:
    groups = results["dataset"].get("frequency_classes", {})
    dots = " Dots are the single seeds." if seeds > 1 else ""
    return [
        {
            "chart": frequency_chart(results["methods"], groups),
            "caption": f"Mask AP by class frequency.{dots}",
        },
        {
            "chart": class_chart(results["methods"]),
            "caption": "Mask AP of each class against the number of training images that show it. Lines are "
            "smoothed; points of single classes scatter widely where the validation set has few of them.",
        },
    ]


def _why(results: Mapping[str, Any]) -> dict[str, object] | None:
    """What the limit of detections does, and what became of the objects; None for results without these."""
    if "why" not in results:
        return None
    methods, why, limit = results["methods"], results["why"], results["limit"]
    rows = [
        {
            "method": {"title": method["title"], "colour": method_colour(methods, key)},
            "detections": limit[which],
            "numbers": [
                Stat(tuple(100 * ap for run in method["runs"] if (ap := number(run[name]["segm"][metric])) is not None))
                for metric in GROUPS
            ],
        }
        for key, method in methods.items()
        for which, name in (("detections", "metrics"), ("beyond", "beyond"))
    ]
    return {
        "rows": rows,
        "metrics": [f"Mask {metric}" for metric in GROUPS],
        "limit": limit,
        "charts": [
            {
                "chart": fate_chart(methods, why["outcomes"]),
                "caption": f"What the best detection on each annotated object says, among the {limit['detections']} of "
                "its image (first seed). A look-alike is a class that differs in texture, colour or shape only.",
            },
            {
                "chart": score_chart(methods, why["outcomes"]),
                "caption": "Scores of the objects' own classes (first seed): a tenth of the objects lie below the thin "
                f"line, a quarter below the bar, half below the dot. Dashed: the score that it takes to be among the "
                f"{limit['detections']} detections of an image (median). The scales of two losses differ; what counts "
                "is where a group lies against its own dashed line.",
            },
        ],
        "example": _example(why["example"], methods),
    }


def _example(example: Mapping[str, Any] | None, methods: Mapping[str, Any]) -> str | None:
    """A rare class and the look-alike that takes its objects, in a sentence."""
    if example is None:
        return None
    name, other = (example[key].replace("_", " ") for key in ("label", "other"))
    few, many = example["train_images"]
    told = "; ".join(
        f"{method['title']} calls {counts['taken']} of them {other} and {counts['right']} by their name"
        for method, counts in zip(methods.values(), example["counts"], strict=True)
    )
    return (
        f"For example {name} ({_images(few)}) and its look-alike {other} ({_images(many)}): of {example['objects']} "
        f"{name}s in the validation images, {told}."
    )


def _images(count: int) -> str:
    return f"{count:,} training image{'' if count == 1 else 's'}"


def _classes(methods: Mapping[str, Any]) -> list[dict[str, object]]:
    """Every class, the frequent ones first, with its mask AP by each method."""
    found: dict[int, dict[str, list[float]]] = {}
    about: dict[int, Mapping[str, Any]] = {}
    for key, method in methods.items():
        for run in method["runs"]:
            for row in run.get("per_category", []):
                about[row["id"]] = row
                value = number(row["segm_AP"])
                found.setdefault(row["id"], {}).setdefault(key, []).extend([] if value is None else [100 * value])
    return [
        {
            "name": row["name"].replace("_", " "),
            "group": row["frequency"],
            "numbers": [
                row["train_images"],
                row["train_instances"],
                *(Stat(tuple(found[ident].get(key, []))) for key in methods),
            ],
        }
        for ident, row in sorted(about.items(), key=lambda item: (-item[1]["train_images"], item[0]))
    ]


def _pictures(pictures: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, object]]:
    """The kinds of pictures that there are, each with its pictures."""
    kinds = dict.fromkeys([*PICTURE_KINDS, *(picture["kind"] for picture in pictures)])
    shown = {kind: [_picture(picture, folder) for picture in pictures if picture["kind"] == kind] for kind in kinds}
    return [{"title": PICTURE_KINDS.get(kind, kind), "pictures": found} for kind, found in shown.items() if found]


def _picture(picture: Mapping[str, Any], folder: Path) -> dict[str, str | None]:
    path = folder / picture["file"]
    try:
        source = data_uri(path.read_bytes(), mimetypes.guess_type(path.name)[0] or "image/png")
    except OSError as error:
        log.warning("picture %s is left out of the report: %s", path, error.strerror)
        source = None
    return {"file": picture["file"], "caption": picture["caption"], "source": source}


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    data, budget = results["dataset"], results["budget"]
    groups = data.get("frequency_classes", {})
    counts = ", ".join(
        f"{groups.get(key, 0)} {name}" for key, name in zip("rcf", ("rare", "common", "frequent"), strict=True)
    )
    return {
        "Data": f"{data['name']}: {data['train_images']:,} training and {data['val_images']:,} validation images "
        f"of {data['image_size']} pixels, {data['classes']:,} classes ({counts})",
        "Budget": f"{budget['epochs']:g} epochs, {budget['steps']:,} steps, {budget['images_seen']:,} images a run",
        "Device": f"{budget['device']}, {_duration(budget['seconds'])} in all",
        "Seeds": ", ".join(map(str, results["seeds"])),
        "Versions": f"tailseg {results['version']}; report written with Python {platform.python_version()}, "
        f"PyTorch {version('torch')}, hotcoco {version('hotcoco')}",
    }


def _percent(value: object) -> str:
    found = number(value)
    return NOTHING if found is None else f"{100 * found:.1f}"


def _duration(seconds: object) -> str:
    found = number(seconds)
    if found is None:
        return NOTHING
    minutes, rest = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
