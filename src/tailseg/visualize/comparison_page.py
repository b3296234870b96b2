"""The report of a comparison: one HTML page with everything inside, from the content of `results.json`.

The page needs no network and no JavaScript, follows the reader's light or dark setting, and fits a phone.
"""

from __future__ import annotations

import base64
import html
import logging
import mimetypes
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailseg.errors import UserError
from tailseg.evaluation.comparison import (
    KINDS,
    NOTHING,
    Row,
    Stat,
    number,
    results_markdown,
    summary,
    table,
    verdict,
)
from tailseg.visualize.charts import (
    class_chart,
    curve_chart,
    curve_names,
    frequency_chart,
    method_colour,
)

__all__ = ["results_markdown", "summary", "verdict", "write_report"]

log = logging.getLogger(__name__)

PICTURE_KINDS = {
    "comparison": "Side by side",
    "only-seesaw": "Found by Seesaw only",
    "only-cross-entropy": "Found by cross-entropy only",
    "both": "Found by both",
}
MEANINGS = {
    "AP": "average precision, from 0 (nothing found) to 100 (everything found, outlined exactly, and no "
    "false finds ranked above true ones): the mean over classes and over ten demands on the overlap with the "
    "annotation, 50% to 95%",
    "AP50, AP75": "the same where an overlap of 50%, or of 75%, is enough",
    "APr, APc, APf": "the same over the rare, the common and the frequent classes, told apart by the number "
    "of training images in which they occur",
    "Mask and box": "whether the overlap is measured between outlines or between rectangles",
    "±": "the standard deviation over the seeds, that is over repetitions that differ only in their random numbers",
    "Difference": "Seesaw minus cross-entropy in percentage points; bold where it is beyond the spread of "
    "the seeds, here twice the standard deviation that the difference of two single runs has by chance (root "
    "of the sum of both methods' squared standard deviations); one seed shows no spread",
    NOTHING: "no value: the validation set has no annotated class of this kind",
}
CSS = """
:root { color-scheme: light dark;
  --ink: #1c1f23; --soft: #5a626b; --page: #fff; --plate: #f3f5f7; --line: #d5dadf }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaed; --soft: #a3acb5; --page: #14171a; --plate: #1f2429; --line: #3a424a }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 64rem; padding: 1rem 1.2rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.2rem 0 .6rem }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; border-top: 1px solid var(--line); padding-top: 1.2rem }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem }
p, dd { max-width: 44rem }
.verdict { font-size: 1.2rem; line-height: 1.45; background: var(--plate); border-left: 5px solid #d55e00;
  padding: .9rem 1.1rem; border-radius: 4px; max-width: none }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption, figcaption, .note { text-align: left; color: var(--soft); font-size: .92rem }
caption { padding-bottom: .4rem }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th:first-child, .runs th:last-child, td.text { text-align: left }
tbody th { font-weight: normal }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em }
.charts, .small, .pictures { display: grid; gap: 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)) }
.pictures { grid-template-columns: 1fr }
figure { margin: 0; min-width: 0 }
figure svg { width: 100%; height: auto; display: block }
figure svg text { font-family: system-ui, sans-serif !important }
img { max-width: 100%; height: auto; display: block; border-radius: 3px }
.missing { border: 1px dashed var(--soft); border-radius: 3px; padding: 2rem 1rem; margin: 0;
  color: var(--soft); overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .35rem 1.2rem; margin: 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
code { font-size: .92em } summary { cursor: pointer; margin: 1rem 0 .5rem }
"""


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write the report page.

    Args:
        results: the content of the demo's `results.json`.
        out: the HTML file, or a folder that gets `report.html`; pictures are looked up from that folder on.

    Raises:
        UserError: a part of the results is missing.
    """
    _require(results)
    page = out / "report.html" if out.is_dir() else out
    methods = results["methods"]
    groups = results["dataset"].get("frequency_classes", {})
    sections = [
        _numbers(results),
        _charts(methods, groups),
        _pictures(results.get("pictures", []), page.parent),
        _making(results),
        _section("What the numbers mean", _definitions((key, _text(text)) for key, text in MEANINGS.items())),
    ]
    titles = [method["title"] for method in reversed(methods.values())]
    title = f"{' against '.join([titles[0], *map(str.lower, titles[1:])])} on long-tailed data"
    page.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n"
        f"<style>{CSS}</style>\n</head>\n<body>\n<header>\n<h1>{_text(title)}</h1>\n"
        f'<p class="verdict">{_text(verdict(results))}</p>\n</header>\n<main>\n{"".join(sections)}</main>\n'
        f"</body>\n</html>\n",
        encoding="utf-8",
    )


def _require(results: Mapping[str, Any]) -> None:
    missing = [key for key in ("version", "command", "dataset", "budget", "seeds", "methods") if key not in results]
    if missing:
        raise UserError(f"results.json has no {missing[0]!r}: write it anew with `tailseg demo`.")
    if not results["methods"]:
        raise UserError("results.json names no method under 'methods': write it anew with `tailseg demo`.")
    for key, method in results["methods"].items():
        if not method.get("runs"):
            raise UserError(f"results.json has no runs of {key!r}: write it anew with `tailseg demo`.")


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>\n"


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """A description list; the second of each pair is HTML."""
    return "<dl>" + "".join(f"<dt>{_text(key)}</dt><dd>{value}</dd>\n" for key, value in pairs) + "</dl>"


def _heading(methods: Mapping[str, Any], key: str) -> str:
    """A method's name with the colour it has in the charts."""
    colour = method_colour(methods, key)
    return f'<span class="key" style="background:{colour}"></span>{_text(methods[key]["title"])}'


def _html_table(caption: str, head: Sequence[str], body: str) -> str:
    """A table that scrolls sideways in itself; ``head`` and ``body`` are HTML."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="wide"><table><caption>{_text(caption)}</caption>'
        f"<thead><tr>{columns}</tr></thead>\n{body}</table></div>\n"
    )


def _numbers(results: Mapping[str, Any]) -> str:
    methods, rows = results["methods"], table(results)
    head = ["Metric", *(_heading(methods, key) for key in methods)]
    head += ["Difference"] if rows[0].difference else []
    most = max(len(method["runs"]) for method in methods.values())
    over = f"mean ± standard deviation of {most} seeds" if most > 1 else "a single seed"
    tables = [
        _html_table(
            f"{name} metrics on the validation set, percent, {over}.",
            head,
            "<tbody>" + "".join(_metric_row(row) for row in rows if row.kind == name) + "</tbody>",
        )
        for name in KINDS.values()
    ]
    return _section("The numbers", f'<div class="charts">{"".join(tables)}</div>')


def _metric_row(row: Row) -> str:
    cells = "".join(f"<td>{stat}</td>" for stat in row.stats)
    if row.difference:
        clear = row.difference.outcome in ("gain", "loss")
        cells += f"<td><strong>{row.difference}</strong></td>" if clear else f"<td>{row.difference}</td>"
    return f'<tr><th scope="row">{row.metric}</th>{cells}</tr>\n'


def _charts(methods: Mapping[str, Any], groups: Mapping[str, int]) -> str:
    seeds = max(len(method["runs"]) for method in methods.values())
    dots = " Dots are the single seeds." if seeds > 1 else ""
    figures = [
        (frequency_chart(methods, groups), f"Mask AP by class frequency.{dots}"),
        (
            class_chart(methods),
            "Mask AP of each class against the number of training images that show it. Lines are smoothed; "
            "points of single classes scatter widely where the validation set has few of them.",
        ),
    ]
    parts = [_section("By class frequency", _figures(figures) + _classes(methods))]
    if curve_names(methods):
        note = (
            "Losses during training. Thin lines are runs, thick lines their smoothed mean. Where the methods "
            "minimise different functions, the heights of their curves cannot be compared."
        )
        curves = [(curve_chart(methods, name), name.replace("_", " ")) for name in curve_names(methods)]
        parts.append(_section("Training", f'<p class="note">{_text(note)}</p>\n{_figures(curves, "small")}'))
    return "".join(parts)


def _figures(figures: Iterable[tuple[str, str]], layout: str = "charts") -> str:
    inner = "".join(
        f"<figure>{chart}<figcaption>{_text(caption)}</figcaption></figure>\n" for chart, caption in figures
    )
    return f'<div class="{layout}">{inner}</div>\n'


def _classes(methods: Mapping[str, Any]) -> str:
    """A folded table of every class, the frequent ones first."""
    found: dict[int, dict[str, list[float]]] = {}
    about: dict[int, Mapping[str, Any]] = {}
    for key, method in methods.items():
        for run in method["runs"]:
            for row in run.get("per_category", []):
                about[row["id"]] = row
                value = number(row["segm_AP"])
                found.setdefault(row["id"], {}).setdefault(key, []).extend([] if value is None else [100 * value])
    if not about:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{_text(row["name"].replace("_", " "))}</th>'
        f'<td class="text">{_text(row["frequency"])}</td>'
        f"<td>{row['train_images']}</td><td>{row['train_instances']}</td>"
        + "".join(f"<td>{Stat(tuple(found[ident].get(key, [])))}</td>" for key in methods)
        + "</tr>\n"
        for ident, row in sorted(about.items(), key=lambda item: (-item[1]["train_images"], item[0]))
    )
    head = [
        "Class",
        "Group",
        "Training images",
        "Training objects",
        *(_heading(methods, key) for key in methods),
    ]
    body = _html_table("Mask AP of each class, percent; r rare, c common, f frequent.", head, f"<tbody>{lines}</tbody>")
    return f"<details><summary>All {len(about)} classes in numbers</summary>{body}</details>\n"


def _pictures(pictures: Sequence[Mapping[str, Any]], folder: Path) -> str:
    parts = []
    kinds = dict.fromkeys([*PICTURE_KINDS, *(picture["kind"] for picture in pictures)])
    for kind in kinds:
        figures = [_picture(picture, folder) for picture in pictures if picture["kind"] == kind]
        if figures:
            title = PICTURE_KINDS.get(kind, kind)
            parts.append(f'<h3>{_text(title)}</h3>\n<div class="pictures">{"".join(figures)}</div>\n')
    if not parts:
        return ""
    note = '<p class="note">Pictures show single, chosen cases; the tables above count.</p>\n'
    return _section("Pictures", note + "".join(parts))


def _picture(picture: Mapping[str, Any], folder: Path) -> str:
    path, caption = folder / picture["file"], _text(picture["caption"])
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        log.warning("picture %s is left out of the report: %s", path, error.strerror)
        shown = f'<p class="missing">The picture {_text(picture["file"])} is missing.</p>'
    else:
        kind = mimetypes.guess_type(path.name)[0] or "image/png"
        shown = f'<img src="data:{kind};base64,{data}" alt="{caption}" loading="lazy">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>\n"


def _making(results: Mapping[str, Any]) -> str:
    data, budget = results["dataset"], results["budget"]
    groups = data.get("frequency_classes", {})
    counts = ", ".join(
        f"{groups.get(key, 0)} {name}" for key, name in zip("rcf", ("rare", "common", "frequent"), strict=True)
    )
    facts = {
        "Command": f"<code>{_text(results['command'])}</code>",
        "Data": _text(
            f"{data['name']}: {data['train_images']:,} training and {data['val_images']:,} validation images "
            f"of {data['image_size']} pixels, {data['classes']:,} classes ({counts})"
        ),
        "Budget": _text(
            f"{budget['epochs']:g} epochs, {budget['steps']:,} steps, {budget['images_seen']:,} images a run"
        ),
        "Device": _text(f"{budget['device']}, {_duration(budget['seconds'])} in all"),
        "Seeds": _text(", ".join(map(str, results["seeds"]))),
        "Versions": _text(
            f"tailseg {results['version']}; report written with Python {platform.python_version()}, "
            f"PyTorch {version('torch')}, hotcoco {version('hotcoco')}"
        ),
    }
    return _section("How it was made", _definitions(facts.items()) + _runs(results["methods"]))


def _runs(methods: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{_heading(methods, key)}</th><td>{run["seed"]}</td>'
        + "".join(f"<td>{_percent(run['metrics'].get('segm', {}).get(metric))}</td>" for metric in ("AP", "APr"))
        + f"<td>{_duration(run.get('seconds'))}</td>"
        f'<td class="text"><code>{_text(run.get("checkpoint") or NOTHING)}</code></td></tr>\n'
        for key, method in methods.items()
        for run in method["runs"]
    )
    head = ["Run", "Seed", "Mask AP", "Mask APr", "Training and scoring", "Weights"]
    runs = _html_table("Every run that enters the means.", head, f"<tbody>{lines}</tbody>")
    return f'<h3>Runs</h3>\n<div class="runs">{runs}</div>'


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
