"""Table 2 of the report in miniature: its rows one after the other, the same budget, several seeds, the built-in data.

    python benchmarks/table2.py [--out DIR] [--seeds 3] [--jobs 2] [--rows 07-augmentation,08-neck]

Each run is the command ``tailseg train demo-table2/NN-...`` (row 12: ``tailseg eval``) with one thread, ``--jobs`` of
them at a time; runs that are complete in DIR are not repeated and interrupted ones go on. With ``--rows`` the others
are kept as recorded; ``09-normalized`` and ``11-larger`` are runs between two rows. Writes
benchmarks/results/table2.json and docs/results/table2.md. Forty-two runs: some six hours on two cores.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from miniature import ROOT, SEED, TITLES, Method, about, collect, described, gains, run_all, table

from tailseg.data.sources import SYNTHETIC, open_data
from tailseg.evaluation.tta import view_edges
from tailseg.model.build import build_detector
from tailseg.recipes.ladder import REPORT
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import diff

LVIS_CLASSES = 1203
# The context loss is a mean over classes; at its usual weight, 450 steps would hardly move the encoder.
CONTEXT = ("model.context.weight=50",)


def rows() -> dict[str, Method]:
    """The rows of the table, as commands."""
    recipes = {name: resolve(f"demo-table2/{name}") for name in REPORT}
    methods = {
        name: Method(REPORT[name].title, CONTEXT if recipe.model.context.weight else (), recipe=recipe.name)
        for name, recipe in recipes.items()
    }
    methods["11-finetune"] = replace(methods["11-finetune"], init_from="10-seesaw")
    views = ("test.tta=true", f"test.tta_long_edges={list(view_edges(recipes['12-tta']))}")
    methods["12-tta"] = Method(REPORT["12-tta"].title, views, tested_from="11-finetune")
    return methods


def aside() -> dict[str, Method]:
    """What is no row of the table, but takes two of them apart."""
    normalized, larger = "classifier.normalized=true", ("data.test_short_edge=160", "data.long_edge=160")
    return {
        "09-normalized": replace(
            rows()["09-backbone"], title="row 9, classifiers normalised", settings=(*CONTEXT, normalized)
        ),
        "11-larger": Method("row 11, pictures of 160 px", larger, tested_from="11-finetune"),
    }


def sizes() -> dict[str, dict[str, int]]:
    """Parameters of every row at full size and in miniature, for C = 1203 and 120 classes."""
    counts: dict[str, dict[str, int]] = {}
    for name in REPORT:
        counts[name] = {}
        for table_name, classes in (("table2", LVIS_CLASSES), ("demo-table2", 120)):
            with torch.device("meta"):
                detector = build_detector(resolve(f"{table_name}/{name}"), classes)
            counts[name][table_name] = sum(p.numel() for p in detector.parameters())
    return counts


def steps(found: dict[str, Any]) -> list[str]:
    """What each row adds to the one before it, seed by seed, beside what it added in the report."""
    lines = [
        "| minus the row before | " + " | ".join(f"{t}: report | here" for t in TITLES) + " |",
        "|---|" + "---:|" * (2 * len(TITLES)),
    ]
    for before, name in pairwise(REPORT):
        if before not in found or name not in found:
            continue
        pairs = zip(REPORT[name].metrics, REPORT[before].metrics, strict=True)
        reported = [f"{a - b:+.1f}".replace("-", "−") for a, b in pairs]
        here = gains(found[name], found[before])
        cells = [f"{theirs} | {ours}" for theirs, ours in zip(reported, here, strict=True)]
        lines.append(f"| {found[name]['title']} | " + " | ".join(cells) + " |")
    return lines


APART = (  # a row, what is between it and the row before, and what the two steps are
    (
        "10-seesaw",
        "09-normalized",
        ("normalised classifiers", "Seesaw Loss, objectness branch, no constraint on classes"),
    ),
    ("12-tta", "11-larger", ("larger pictures", "other sizes and mirrored pictures, averaged")),
)


def taken_apart(found: dict[str, Any], between: dict[str, Any]) -> list[str]:
    """Two steps of the table as two steps each, seed by seed; nothing if there are no such runs."""
    lines = [f"| of row | | {' | '.join(TITLES)} |", "|---|---|" + "---:|" * len(TITLES)]
    names = list(REPORT)
    for after, middle, whats in APART:
        before = names[names.index(after) - 1]
        if middle not in between or before not in found or after not in found:
            continue
        for what, ours, theirs in zip(
            whats, (between[middle], found[after]), (found[before], between[middle]), strict=True
        ):
            lines.append(f"| {after[:2]} | {what} | {' | '.join(gains(ours, theirs))} |")
    if len(lines) == 2:
        return []
    return ["Two of these steps taken apart, by runs between the rows, of the same seeds:", "", *lines, ""]


def beside_the_report(found: dict[str, Any]) -> list[str]:
    lines = [f"| report, LVIS v1 val | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    return lines + [
        f"| {REPORT[name].title} | " + " | ".join(f"{v:.1f}" for v in REPORT[name].metrics) + " |" for name in found
    ]


def size_table(counts: dict[str, dict[str, int]]) -> list[str]:
    lines = ["| recipe | parameters, C = 1203 | more than the row before | in miniature |", "|---|---:|---:|---:|"]
    before = None
    for name, count in counts.items():
        full = count["table2"]
        more = "" if before is None else f"{full - before:+,}".replace("-", "−")
        lines.append(f"| `table2/{name}` | {full:,} | {more} | {count['demo-table2']:,} |")
        before = full
    return lines


def changed_keys() -> list[str]:
    """For every row the recipe keys that it changes in the row before."""
    lines, names = [], list(REPORT)
    for before, name in pairwise(names):
        keys = [f"`{key}`" for key, _, _ in diff(resolve(f"table2/{before}"), resolve(f"table2/{name}"))]
        lines.append(f"- **{REPORT[name].title}**: {', '.join(keys)}")
    return lines


def page(results: dict[str, Any]) -> str:
    found = results["methods"]
    written = (ROOT / "docs/results/table2-tried.md").read_text()
    missing = ", ".join(REPORT[name].title.removeprefix("+ ") for name in REPORT if name not in found)
    return "\n".join(
        [
            "# Table 2 in miniature",
            "",
            "<!-- made by benchmarks/table2.py; the last section by hand, in table2-tried.md -->",
            "",
            f"The rows{missing and f' (not yet: {missing})'}, from the `demo-table2` recipes (the same "
            "steps from row to row as `table2/...`, narrow heads, EfficientNet-Lite0, then Lite2 as the better "
            f"backbone) on {described(results)}. Every row: {results['images_seen']} images "
            f"seen, the same optimiser, schedule, sampler and seeds ({SEED} to {SEED + results['seeds'] - 1}), on CPU, "
            "one process (batch norm sees its 8 images); finetuning sees 1880 more, rare classes more often, and "
            "test-time augmentation trains nothing. Percent, mean ± standard deviation over the seeds.",
            "",
            *table(found),
            "",
            "The same rows in the report (ResNet-50, 2x; other data, so the order is what can be compared):",
            "",
            *beside_the_report(found),
            "",
            "What each row adds to the one before it, each seed against the same seed:",
            "",
            *steps(found),
            "",
            *taken_apart(found, results.get("aside", {})),
            "## What a row changes",
            "",
            *changed_keys(),
            "",
            *size_table(results["parameters"]),
            "",
            written.rstrip(),
            "",
            f"Made by `python benchmarks/table2.py --seeds {results['seeds']}` on {results['machine']}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "table2", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--rows", help="some rows only, separated by commas; the others are kept as recorded")
    arguments = parser.parse_args()
    known = rows() | aside()
    wanted = arguments.rows.split(",") if arguments.rows else list(known)
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {name: row for name, row in known.items() if name in wanted}
    path = ROOT / "benchmarks/results/table2.json"
    recorded = json.loads(path.read_text()) if arguments.rows else {}
    run_all(chosen, arguments.seeds, arguments.jobs, arguments.out)
    trained = next((name for name, row in chosen.items() if not (row.tested_from or row.init_from)), None)
    found = recorded.get("methods", {}) | recorded.get("aside", {}) | collect(chosen, arguments.seeds, arguments.out)
    if trained is None:  # what starts from another row says nothing of the budget
        results = recorded
    else:
        first_run = arguments.out / f"{trained}-{SEED}"
        results = about(open_data(SYNTHETIC, show=False), arguments.seeds, first_run) | {"parameters": sizes()}
    results |= {
        "methods": {n: found[n] for n in REPORT if n in found},
        "aside": {n: found[n] for n in aside() if n in found},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    (ROOT / "docs/results/table2.md").write_text(page(results))
    print("\n".join(table(results["methods"])))


if __name__ == "__main__":
    main()
