"""Table 2 of the report in miniature: its rows one after the other, the same budget, several seeds, the built-in data.

    python benchmarks/table2.py [--out DIR] [--seeds 3] [--jobs 2]

Each run is the command ``tailseg train demo-table2/NN-...`` with one thread, ``--jobs`` of them at a time; runs that
are complete in DIR are not repeated and interrupted ones go on. Then the context encoders are examined
(benchmarks/context.py). Writes benchmarks/results/table2.json and docs/results/table2.md. Eighteen runs: some two hours
on two cores.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from miniature import ROOT, SEED, TITLES, Method, about, collect, described, gains, run_all, table

from tailseg.data.sources import SYNTHETIC, open_source
from tailseg.model.build import build_detector
from tailseg.recipe_values import diff, resolve
from tailseg.recipes.table2 import STEPS

LVIS_CLASSES = 1203
# The context loss is a mean over classes; at its usual weight, 450 steps would hardly move the encoder.
CONTEXT = ("model.context.weight=50",)
REPORT = {  # Table 2 of the report, LVIS v1 val: title, box AP, mask AP, APr, APc, APf
    "01-mask-rcnn": ("Mask R-CNN", 20.1, 18.7, 1.0, 16.1, 29.4),
    "02-sync-bn": ("+ SyncBN", 20.2, 18.9, 0.7, 16.0, 30.3),
    "03-carafe": ("+ CARAFE upsample", 20.4, 19.4, 0.7, 16.5, 30.9),
    "04-htc-lite": ("+ HTC-Lite", 23.6, 21.9, 1.1, 19.8, 33.5),
    "05-tsd": ("+ TSD", 25.5, 23.5, 2.3, 22.3, 34.0),
    "06-mask-scoring": ("+ Mask scoring", 25.6, 23.9, 2.8, 22.4, 35.0),
}


def rows() -> dict[str, Method]:
    """The rows of the table, as commands."""
    settings = {name: CONTEXT if resolve(f"demo-table2/{name}").model.context.weight else () for name in STEPS}
    return {name: Method(REPORT[name][0], settings[name], recipe=f"demo-table2/{name}") for name in STEPS}


def sizes() -> dict[str, dict[str, int]]:
    """Parameters of every row at full size and in miniature, for C = 1203 and 120 classes."""
    counts = {}
    for name in STEPS:
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
    names = list(found)
    for before, name in pairwise(names):
        reported = [
            f"{a - b:+.1f}".replace("-", "−") for a, b in zip(REPORT[name][1:], REPORT[before][1:], strict=True)
        ]
        here = gains(found[name], found[before])
        cells = [f"{theirs} | {ours}" for theirs, ours in zip(reported, here, strict=True)]
        lines.append(f"| {found[name]['title']} | " + " | ".join(cells) + " |")
    return lines


def beside_the_report(found: dict[str, Any]) -> list[str]:
    lines = [f"| report, LVIS v1 val | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    return lines + [
        f"| {REPORT[name][0]} | " + " | ".join(f"{v:.1f}" for v in REPORT[name][1:]) + " |" for name in found
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
    lines, names = [], list(STEPS)
    for before, name in pairwise(names):
        keys = [f"`{key}`" for key, _, _ in diff(resolve(f"table2/{before}"), resolve(f"table2/{name}"))]
        lines.append(f"- **{REPORT[name][0]}**: {', '.join(keys)}")
    return lines


def page(results: dict[str, Any]) -> str:
    found = results["methods"]
    written = (ROOT / "docs/results/table2-tried.md").read_text()
    return "\n".join(
        [
            "# Table 2 in miniature",
            "",
            "<!-- made by benchmarks/table2.py; the last section by hand, in table2-tried.md -->",
            "",
            f"Rows 1 to 6 (the `demo-table2` recipes: the same steps from row to row as `table2/...`, narrow heads, "
            f"EfficientNet-Lite0) on {described(results)}. Every row: {results['images_seen']} images seen, the same "
            f"optimiser, schedule, sampler and seeds ({SEED} to {SEED + results['seeds'] - 1}), on CPU, one process "
            "(batch norm sees its 8 images). Percent, mean ± standard deviation over the seeds.",
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
    arguments = parser.parse_args()
    run_all(rows(), arguments.seeds, arguments.jobs, arguments.out)
    first = arguments.out / f"{next(iter(STEPS))}-{SEED}"
    results = about(open_source(SYNTHETIC, show=False), arguments.seeds, first) | {
        "report": REPORT,
        "parameters": sizes(),
        "methods": collect(rows(), arguments.seeds, arguments.out),
    }
    (ROOT / "benchmarks/results/table2.json").write_text(json.dumps(results, indent=1) + "\n")
    (ROOT / "docs/results/table2.md").write_text(page(results))
    print("\n".join(table(results["methods"])))


if __name__ == "__main__":
    main()
