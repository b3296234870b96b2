"""Sampling and augmentation for rare classes: one change each to Seesaw Loss, one number of steps, several seeds.

    python benchmarks/rare.py [--out DIR] [--seeds 3] [--jobs 2] [--rows seesaw,rfs]

The regime is that of table1.py: the built-in set, the `demo` recipes, 30 detections an image. Every row makes the same
number of steps of eight images: samplers that repeat images would make epochs longer, so `data.epoch_images` gives
every row epochs of as many images as the set has, of which a sampler then shows a random part. What is complete in DIR
is not repeated and interrupted runs go on. With ``--rows`` the other rows stay as recorded, if they were made on the
same data with the same seeds; so the work can be divided. A run sees 12,000 images: some twenty minutes of one core.
Writes benchmarks/results/rare.json and docs/results/rare.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from miniature import (
    ROOT,
    SEED,
    TITLES,
    Method,
    about,
    collect,
    described,
    differences,
    paired,
    run_all,
    table,
)

from tailseg.data.dataset import trained_images
from tailseg.data.sources import SYNTHETIC, open_data

BASELINE, RECIPE = "seesaw", "demo/seesaw"
# As in the finetuning of the demo recipes: 0.001, LVIS's, would repeat the classes in up to 6 of 6,000 images.
THRESHOLD = "data.repeat_threshold=0.02"
PASTE, RFS = "data.copy_paste=0.5", "data.sampler=repeat-factor"


def rows_for(images: int, data: str = SYNTHETIC) -> dict[str, Method]:
    """The rows, each with epochs of ``images`` images; ``data`` stands behind --data."""
    rows = {
        BASELINE: Method("Seesaw"),
        "rfs": Method("+ repeat factors", (RFS, THRESHOLD)),
        "irfs": Method("+ instance-aware repeat factors", ("data.sampler=irfs", THRESHOLD)),
        "copy-paste": Method("+ Copy-Paste, rare classes first", (PASTE, THRESHOLD)),
        "copy-paste-uniform": Method("+ Copy-Paste, all objects alike", (PASTE, "data.copy_paste_draw=uniform")),
        # 0.1 times 128 pixels is below the smallest edge that a recipe may ask for, 32.
        "lsj": Method("+ large-scale jitter (0.25 to 2)", ("data.long_edges=[32,256]", "data.crop=128")),
        "colour": Method("+ colour jitter", ("data.colour_jitter=0.4",)),
        "rfs-copy-paste": Method("+ repeat factors and Copy-Paste, rare classes first", (RFS, PASTE, THRESHOLD)),
    }
    shared = f"data.epoch_images={images}"
    return {n: replace(row, recipe=RECIPE, data=data, settings=(shared, *row.settings)) for n, row in rows.items()}


# ---------------------------------------------------------------------------------------------------------
# The page


def gain_table(found: dict[str, Any]) -> list[str]:
    """What each row adds to the first, seed by seed, the largest gain on rare classes first."""
    lines = [f"| | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    for name in by_gain(found):
        lines.append(f"| {found[name]['title']} | " + " | ".join(differences(found[name], found[BASELINE])) + " |")
    return lines


def gain(found: dict[str, Any], name: str, metric: str = "APr") -> tuple[float, float]:
    """Mean difference of a row to the first one and half of its 95 % interval; NaN where the set has no such class."""
    return paired(found[name], found[BASELINE], "segm", metric)


def by_gain(found: dict[str, Any]) -> list[str]:
    """All rows but the first, by what they add on rare classes; those without a number last."""
    others = [name for name in found if name != BASELINE]
    gains = {name: gain(found, name)[0] for name in others}
    return sorted(others, key=lambda name: math.inf if math.isnan(gains[name]) else -gains[name])


def advice(found: dict[str, Any]) -> list[str]:
    """What to switch on first, by the intervals alone."""
    better = [name for name in by_gain(found) if gain(found, name)[0] - gain(found, name)[1] > 0]
    worse = [name for name in found if name != BASELINE and sum(gain(found, name)) < 0]
    rest = [name for name in by_gain(found) if name not in (*better, *worse)]

    def told(name: str) -> str:
        rare, frequent = (f"{gain(found, name, metric)[0]:+.1f}".replace("-", "−") for metric in ("APr", "APf"))
        return f"{found[name]['title'].removeprefix('+ ')} (APr {rare}, APf {frequent})"

    def listed(names: list[str]) -> str:
        return "; ".join(told(name) for name in names) or "none"

    return [
        f"- **Rare classes gain** (the 95 % interval of APr lies above 0), the largest gain first: {listed(better)}.",
        f"- **No difference that these seeds can show**: {listed(rest)}.",
        f"- **Rare classes lose** (the interval lies below 0): {listed(worse)}.",
    ]


def page(results: dict[str, Any]) -> str:
    found, data = results["rows"], results["data"]
    seeds = results["seeds"]
    base = [run["segm"]["APr"] for run in found[BASELINE]["runs"]]
    rare = "no rare class" if None in base else f"APr {100 * mean(base):.1f}"
    missing = ", ".join(results["not_run"])
    return "\n".join(
        [
            "# Rare classes: what to switch on first",
            "",
            "<!-- made by benchmarks/rare.py -->",
            "",
            f"Seesaw Loss alone has {rare} here. One change each, or two in the last row:",
            "",
            *advice(found),
            "",
            f"Mask R-CNN (`{RECIPE}`) on {described(results)}, with {data['fewest_images']} to {data['most_images']:,} "
            f"training images a class. Every row: {results['images_seen']:,} images seen in steps of eight, the same "
            f"optimiser, schedule and seeds ({SEED} to {SEED + seeds - 1}). Samplers that repeat images make no more "
            "steps: `data.epoch_images` is the size of the set for all, and a sampler shows a random part of what it "
            "would. An image may have 30 detections. Percent, mean ± standard deviation over the seeds.",
            "",
            *table(found),
            "",
            *([f"Not run on this set yet: {missing}.", ""] if missing else []),
            "Mean difference to the first row of runs with the same seed, and its 95 % interval (Student's t):",
            "",
            *gain_table(found),
            "",
            "Drawn objects are not photographs: pasted ones look here as the set's own do, whose objects lie anywhere "
            "and overlap; colour tells classes apart, and a scene has no context that pasting could break.",
            "",
            "## The rows",
            "",
            *(f"- **{row['title']}**: `{row['command']}`" for row in found.values()),
            "",
            f"Made by `python benchmarks/rare.py --seeds {seeds}` on {results['machine']}.",
            "",
        ]
    )


def merged(results: dict[str, Any], recorded: dict[str, Any], rows: dict[str, Method]) -> dict[str, Any]:
    """Results with what was recorded of other rows, if the data, the budget and the number of seeds are the same."""
    alike = all(results[key] == recorded.get(key) for key in ("data", "seeds", "images_seen"))
    both = (recorded["rows"] if alike else {}) | results["rows"]
    found = {name: both[name] for name in rows if name in both}
    return results | {"rows": found, "not_run": [row.title for name, row in rows.items() if name not in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "rare", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--rows", help="some rows only, separated by commas; the others stay as recorded")
    parser.add_argument("--data", default=SYNTHETIC, help="another data set; give other files to write, too")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "rare.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "rare.md")
    parser.add_argument("--machine", help="of the runs, if they were made elsewhere")
    options = parser.parse_args()
    data = open_data(options.data, show=False)
    assert data.train is not None
    rows = rows_for(len(trained_images(data.train)), options.data)
    chosen = options.rows.split(",") if options.rows else list(rows)
    unknown = sorted(set(chosen) - set(rows))
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(rows)}")
    picked = {name: rows[name] for name in chosen}
    if not options.machine:
        run_all(picked, options.seeds, options.jobs, options.out, (BASELINE,))
    complete = {
        n: row for n, row in collect(picked, options.seeds, options.out).items() if len(row["seeds"]) == options.seeds
    }
    results = about(data, options.seeds, options.out / f"{chosen[0]}-{SEED}") | {"rows": complete}
    results["machine"] = options.machine or results["machine"]
    recorded = json.loads(options.json.read_text()) if options.json.is_file() else {}
    results = merged(results, recorded, rows)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results["rows"])))
    if BASELINE in results["rows"]:  # all else is told beside it
        options.page.write_text(page(results))


if __name__ == "__main__":
    main()
