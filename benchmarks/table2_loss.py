"""Row 9 to row 10 of Table 2, Seesaw Loss, one change at a time, in the report's regime.

    python benchmarks/table2_loss.py [--out DIR] [--seeds 3] [--jobs 2]

Each run is the command ``tailseg train demo-table2/...`` with one thread, ``--jobs`` of them at a time, on the built-in
data, a pass over its images each. What is complete in DIR is not repeated and interrupted runs go on. Each run is
written into benchmarks/results/table2_loss.json when it is complete, and what that holds of the same data is not
repeated either: the work can be divided between machines and days. When all runs are there, docs/results/table2-loss.md
and its picture are made. Fifteen runs: some three hours on two cores.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from miniature import (
    BATCH,
    ROOT,
    SEED,
    TITLES,
    Method,
    about,
    about_data,
    collect,
    described,
    differences,
    run_all,
    table,
    values,
)
from table2 import CONTEXT

from tailseg.data.sources import SYNTHETIC, DataSplits, open_data
from tailseg.recipes.ladder import REPORT

RESULTS = ROOT / "benchmarks" / "results" / "table2_loss.json"
COMMON = (*CONTEXT, "schedule.epochs=1")
GROUPS = {"APr": ("rare", "#c1440e"), "APc": ("common", "#d99a2b"), "APf": ("frequent", "#33658a")}


def rows() -> dict[str, Method]:
    """Row 9, then what row 10 changes, a change a row."""
    before, after, constrained = "demo-table2/09-backbone", "demo-table2/10-seesaw", "model.tsd.constrain_classes=true"
    return {
        "backbone": Method("Row 9: cross-entropy", COMMON, recipe=before),
        "normalized": Method("+ normalised classifiers", (*COMMON, "classifier.normalized=true"), recipe=before),
        "objectness": Method("+ objectness branch", (*COMMON, constrained, "classifier.p=0"), recipe=after),
        "factor": Method("+ Seesaw's factor S", (*COMMON, constrained), recipe=after),
        "seesaw": Method("Row 10: no constraint on classes", COMMON, recipe=after),
    }


def sentences(found: dict[str, Any]) -> str:
    """Three sentences: the two rows, where the gain comes from, the report."""
    rare = {name: mean(values(method, "segm", "APr")) for name, method in found.items()}
    parts = [f"{rare[after] - rare[before]:+.1f}".replace("-", "−") for before, after in pairwise(rare)]
    reported = REPORT["10-seesaw"].metrics[2], REPORT["09-backbone"].metrics[2]
    return (
        f"From row 9 to row 10 of Table 2, APr goes from {rare['backbone']:.1f} to {rare['seesaw']:.1f} (in the report "
        f"from {reported[1]} to {reported[0]}). Of this, {parts[0]} come with classifiers that divide by the length of "
        f"features and weights, {parts[1]} with the objectness branch, {parts[2]} with Seesaw's factor S, and "
        f"{parts[3]} with leaving out TSD's constraint on classes."
    )


def steps(found: dict[str, Any]) -> list[str]:
    lines = [f"| | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    for before, after in (*pairwise(found), ("backbone", "seesaw")):
        title = found[after]["title"] if before != "backbone" or after != "seesaw" else "Row 10 − row 9"
        lines.append(f"| {title} | {' | '.join(differences(found[after], found[before]))} |")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """A dot a seed, and the means as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
    for metric, (name, colour) in GROUPS.items():
        numbers = [values(method, "segm", metric) for method in found.values()]
        axis.plot(range(len(found)), [mean(row) for row in numbers], "-", color=colour, label=f"{name} classes")
        for x, row in enumerate(numbers):
            axis.plot([x] * len(row), row, "o", color=colour, alpha=0.5, markersize=4, markeredgewidth=0)
    titles = [method["title"].replace(": ", ":\n").replace(" on ", "\non ") for method in found.values()]
    axis.set_xticks(range(len(found)), titles, fontsize=9)
    axis.set_ylabel("mask AP, %")
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color="#dddddd")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0)
    axis.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(results: dict[str, Any]) -> str:
    found, data = results["methods"], results["data"]
    return "\n".join(
        [
            "# Where row 10 of Table 2 gains",
            "",
            "<!-- made by benchmarks/table2_loss.py -->",
            "",
            "![Mask AP of rare, common and frequent classes, from row 9 to row 10.](../images/table2-loss.png)",
            "",
            sentences(found),
            "",
            f"The `demo-table2` recipes on {described(results)}, with {data['fewest_images']} to "
            f"{data['most_images']:,} training images and {data['fewest_objects']} to {data['most_objects']:,} objects "
            f"a class: the [version](table1.md) in which the limit of detections binds and the tail is deep, not that "
            f"of [the whole table](table2.md). Every row: {results['images_seen']:,} images seen, the same optimiser, "
            f"schedule, sampler and seeds ({SEED} to {SEED + results['seeds'] - 1}), 30 detections an image. Percent, "
            "mean ± standard deviation over the seeds.",
            "",
            *table(found),
            "",
            "What each change is worth: mean difference of runs with the same seed, and its 95 % interval (Student's "
            "t):",
            "",
            *steps(found),
            "",
            "The rows:",
            "",
            *(f"- **{method['title']}**: `{method['command']}`" for method in found.values()),
            "",
            f"Made by `python benchmarks/table2_loss.py --seeds {results['seeds']}` on {results['machine']}.",
            "",
        ]
    )


def take_up(recorded: dict[str, Any], data: dict[str, Any], out: Path) -> None:
    """Put what is recorded of the same data where runs are looked for, unless one was begun there."""
    if recorded.get("data") != data:
        return
    for name, method in recorded["methods"].items():
        for seed, run in zip(method["seeds"], method["runs"], strict=True):
            folder = out / f"{name}-{seed}"
            if not folder.exists():
                folder.mkdir(parents=True)
                (folder / "metrics.jsonl").write_text(json.dumps({"step": recorded["images_seen"] // BATCH}) + "\n")
                (folder / "metrics.json").write_text(json.dumps(run) + "\n")


def record(data: DataSplits, seeds: int, out: Path) -> dict[str, Any]:
    """Write down the runs that are complete, and return that."""
    found = collect(rows(), seeds, out)
    if not found:
        return {"methods": found}
    name, method = next(iter(found.items()))
    results = about(data, seeds, out / f"{name}-{method['seeds'][0]}") | {"methods": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "table2-loss", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1 or arguments.out.is_file():
        parser.error("--seeds and --jobs are at least 1, and --out is a folder")
    data = open_data(SYNTHETIC, show=False)
    take_up(json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}, about_data(data), arguments.out)
    record(data, arguments.seeds, arguments.out)
    run_all(
        rows(),
        arguments.seeds,
        arguments.jobs,
        arguments.out,
        after=lambda: record(data, arguments.seeds, arguments.out),
    )
    results = record(data, arguments.seeds, arguments.out)
    draw(results["methods"], ROOT / "docs" / "images" / "table2-loss.png")
    (ROOT / "docs" / "results" / "table2-loss.md").write_text(page(results))
    print("\n".join(table(results["methods"])))


if __name__ == "__main__":
    main()
