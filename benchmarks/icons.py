"""Real pictures of 1,000 classes and more: icons in six styles over photographs, with LVIS's counts.

    python benchmarks/icons.py fetch [--out .icons/icons.npz]               # needs the npm registry and resvg-py
    python benchmarks/icons.py draw DATA --classes 400 --images 8000        # all: --classes 1203 --images 100000
    python benchmarks/icons.py train DATA [--out DIR] [--seeds 3] [--jobs 2]
    python benchmarks/icons.py page

`fetch` renders everything into one file; the other commands need no network. `train` trains cross-entropy, Seesaw with
p = 0 and Seesaw with p = 0.8, a pass over the images each, and tests them on the styles that they saw and on one that
they never did. Runs that are complete in DIR are not repeated and interrupted ones go on. It writes its entry of
benchmarks/results/icons.json, docs/results/icons.md and its picture. No icon is part of the project.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from icon_data import Settings, draw, fewest_val_images
from icon_sets import HELD_OUT, STYLES, attribution, fetch
from miniature import METRICS, ROOT, SEED, TITLES, Method, about, collect, differences, run_all, table, values

from tailseg.data.sources import open_splits
from tailseg.errors import UserError
from tailseg.progress import progress_bar
from tailseg.recipes.resolve import resolve

ARCHIVE = ROOT / ".icons" / "icons.npz"
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "coco128-lvis"
LVIS = ROOT.parent / "shared" / "data" / "lvis_v1_categories.csv"
RESULTS = ROOT / "benchmarks" / "results" / "icons.json"
COLOURS = {"cross-entropy": "#33658a", "seesaw-p0": "#d99a2b", "seesaw": "#c1440e"}
TESTS = {"val": "the styles trained on", "held_out": f"a style never trained on ({HELD_OUT})"}


# ---------------------------------------------------------------------------------------------------------
# Runs


def limit_of(classes: int) -> int:
    """Detections an image: LVIS's 300 for 1,203 classes, scaled by the classes."""
    return max(10, round(300 * classes / 1203))


def shared_settings(classes: int, size: int, settings: tuple[str, ...]) -> tuple[str, ...]:
    """What every recipe gets: one pass over the images, at their size, with the limit of detections."""
    return (
        *(f"test.max_detections={limit_of(classes)}", "schedule.epochs=1", "schedule.milestones=[]"),
        *("training.evaluate_every=1", "optimizer.lr=0.05", "optimizer.clip=1", f"data.short_edges=[{size}]"),
        *(f"data.test_short_edge={size}", f"data.long_edge={size}", *settings),
    )


def methods(folder: Path, common: tuple[str, ...]) -> dict[str, Method]:
    """The rows: three trainings, and a test of each on the style held out."""
    rows = {
        "cross-entropy": Method("Cross-entropy", common, data=str(folder)),
        "seesaw-p0": Method("Seesaw, p = 0", (*common, "classifier.p=0"), recipe="demo/seesaw", data=str(folder)),
        "seesaw": Method("Seesaw, p = 0.8", common, recipe="demo/seesaw", data=str(folder)),
    }
    held_out = str(folder / "heldout.yaml")
    tests = {f"{name}-held-out": Method(row.title, data=held_out, tested_from=name) for name, row in rows.items()}
    return rows | tests


def train(folder: Path, out: Path, seeds: int, jobs: int, settings: tuple[str, ...]) -> None:
    """Run what is not complete in ``out``, then write the results, the page and the picture."""
    data = open_splits(folder)  # which also reads the annotations into the cache, once for all runs
    open_splits(folder / "heldout.yaml")
    assert data.train is not None
    classes, size = len(data.train.categories), int(data.train.image_sizes.max())
    common = shared_settings(classes, size, settings)
    rows = methods(folder.resolve(), common)
    run_all(rows, seeds, jobs, out)
    first = out / f"cross-entropy-{SEED}"
    steps = json.loads((first / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    recipe = resolve(rows["cross-entropy"].recipe, rows["cross-entropy"].settings)
    made = about(data, seeds, first)
    made |= {"settings": common, "set": settings}
    made |= {"images_seen": steps * recipe.data.batch_per_device, "max_detections": recipe.test.max_detections}
    found = collect(rows, seeds, out)
    made["val"] = {name: row for name, row in found.items() if rows[name].tested_from is None}
    made["held_out"] = {row.tested_from: found[name] for name, row in rows.items() if row.tested_from is not None}
    recorded = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    recorded[str(classes)] = made
    RESULTS.write_text(json.dumps({key: recorded[key] for key in sorted(recorded, key=int)}, indent=1) + "\n")
    write_page(recorded)
    for test, title in TESTS.items():
        print(f"{title}:", *table(made[test]), sep="\n")


# ---------------------------------------------------------------------------------------------------------
# The page


def picture(results: dict[str, Any], path: Path) -> None:
    """A dot a seed for rare, common and frequent classes: a row a set, a column a test."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shape = (len(results), len(TESTS))
    figure, grid = plt.subplots(
        *shape, figsize=(9, 2.9 * len(results)), sharey="row", squeeze=False, layout="constrained"
    )
    for axes, made in zip(grid, results.values(), strict=True):
        for axis, (test, title) in zip(axes, TESTS.items(), strict=True):
            for shift, (name, method) in enumerate(made[test].items()):
                for group, metric in enumerate(("APr", "APc", "APf")):
                    numbers = values(method, "segm", metric)
                    x = group + (shift - 1) * 0.24
                    label = method["title"] if group == 0 else None
                    axis.bar(x, mean(numbers), 0.2, color=COLOURS[name], alpha=0.35, label=label)
                    axis.plot([x] * len(numbers), numbers, "o", color=COLOURS[name], markersize=4, markeredgewidth=0)
            axis.set_title(f"{made['data']['classes']:,} classes: {title}", fontsize=10)
            axis.set_xticks(range(3), ["rare", "common", "frequent"])
            axis.grid(axis="y", color="#dddddd")
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(length=0)
        axes[0].set_ylabel("mask AP, %")
        axes[0].set_ylim(bottom=0)
    grid[0][0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sentences(made: dict[str, Any]) -> str:
    """Three sentences: the data, the rare classes, the style held out."""

    def rare(test: str) -> list[str]:
        means = {name: mean(values(method, "segm", "APr")) for name, method in made[test].items()}
        return ["no number" if math.isnan(means[name]) else f"{means[name]:.1f}" for name in COLOURS]

    data = made["data"]
    seen, unseen = rare("val"), rare("held_out")
    return (
        f"Icons of {data['classes']:,} classes, in {len(STYLES) - 1} styles, lie over photographs with LVIS's own "
        f"counts, {data['fewest_images']:,} to {data['most_images']:,} images a class. On rare classes cross-entropy "
        f"has mask AP {seen[0]}, Seesaw without its mitigation factor (p = 0) {seen[1]} and with it (p = 0.8) "
        f"{seen[2]}. Drawn in a style that no training picture had, they are found with {unseen[0]}, {unseen[1]} and "
        f"{unseen[2]}."
    )


def section(made: dict[str, Any]) -> list[str]:
    """The tables of a set."""
    data = made["data"]
    groups = data["classes_by_frequency"]
    lines = [
        f"## {data['classes']:,} classes",
        "",
        f"{groups['r']} rare, {groups['c']} common, {groups['f']} frequent; {data['train_images']:,} training images "
        f"of {data['size']} px with {data['objects']:,} objects, {data['fewest_objects']:,} to "
        f"{data['most_objects']:,} a class; {data['val_images']:,} validation images of each kind. Every method: "
        f"{made['images_seen']:,} images seen; {made['max_detections']} detections an image, LVIS's 300 scaled by "
        f"the classes; {made['seeds']} seeds. Percent, mean ± standard deviation.",
    ]
    for test, title in TESTS.items():
        found = made[test]
        lines += [
            "",
            f"On {title}:",
            "",
            *table(found),
            "",
            "Differences, seed by seed, with their 95 % intervals (Student's t):",
            "",
        ]
        lines += [f"| | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(METRICS)]
        for ours, theirs in (("seesaw-p0", "cross-entropy"), ("seesaw", "seesaw-p0"), ("seesaw", "cross-entropy")):
            title = f"{found[ours]['title']} minus {found[theirs]['title'].lower().replace('seesaw', 'Seesaw')}"
            lines.append(f"| {title} | {' | '.join(differences(found[ours], found[theirs]))} |")
    common = shlex.join(part for setting in made["settings"] for part in ("--set", setting))
    lines += ["", f"Every method, with `{common}`:", ""]
    for method in made["val"].values():
        lines.append(f"- **{method['title']}**: `{method['command'].replace(f' {common}', '')}`")
    return [*lines, "", f"On {made['machine']}.", ""]


def commands(key: str, made: dict[str, Any]) -> list[str]:
    """How the set of so many classes is drawn and trained on."""
    data = made["data"]
    numbers = f"--images {data['train_images']} --val-images {data['val_images']} --size {data['size']}"
    settings = "".join(f" --set {shlex.quote(setting)}" for setting in made["set"])
    run = f"runs/icons-{key}"
    return [
        f"python benchmarks/icons.py draw {run}/data --classes {key} {numbers}",
        f"python benchmarks/icons.py train {run}/data --out {run} --seeds {made['seeds']}{settings}",
    ]


def page(results: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"# Real pictures, {int(max(results, key=int)):,} classes",
            "",
            "<!-- made by benchmarks/icons.py -->",
            "",
            "![A dot a seed for rare, common and frequent classes.](../images/icons.png)",
            "",
            sentences(results[max(results, key=int)]),
            "",
            "One pass over the images is little for so many classes, so the level is low for all; what can be compared "
            "is what the losses make of the same pass.",
            "",
            *(line for made in results.values() for line in section(made)),
            "## How it is made",
            "",
            "A class is a name that at least three sets of icons draw, each in its own way; of two names that a set "
            "draws alike one is left out. Each object is turned, stretched, mirrored and lit at random, lies over a "
            "photograph, and is partly covered by others and by pieces of other photographs; masks are the visible "
            "pixels. The photographs of training and validation differ.",
            "",
            f"Icons, fetched from npm and no part of this project: {attribution()}. Changes: rendered, and drawn as "
            "said above; CC-BY-4.0 is at https://creativecommons.org/licenses/by/4.0/. Photographs: 128 of COCO 2017, "
            "by way of Flickr, of their photographers; no part of this project either.",
            "",
            "```bash",
            "pip install resvg-py",
            "python benchmarks/icons.py fetch",
            *(line for key, made in results.items() for line in commands(key, made)),
            "```",
            "",
        ]
    )


def write_page(results: dict[str, Any]) -> None:
    picture(results, ROOT / "docs" / "images" / "icons.png")
    (ROOT / "docs" / "results" / "icons.md").write_text(page(results))


# ---------------------------------------------------------------------------------------------------------
# The commands


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fetch", help="download and render the icons, into one file")
    command.add_argument("--out", type=Path, default=ARCHIVE)
    command.add_argument("--photographs", type=Path, default=PHOTOGRAPHS, help="a data set in LVIS format")
    command = commands.add_parser("draw", help="draw a data set")
    command.add_argument("data", type=Path, help="the folder to make")
    command.add_argument("--icons", type=Path, default=ARCHIVE, help="what fetch wrote")
    command.add_argument("--lvis", type=Path, default=LVIS, help="LVIS's categories and counts (CSV)")
    command.add_argument("--classes", type=int, default=400)
    command.add_argument("--images", type=int, default=8000, help="of training")
    command.add_argument("--val-images", type=int, help="of each validation split")
    command.add_argument("--size", type=int, default=128, help="pixels")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--jobs", type=int, default=os.cpu_count())
    command = commands.add_parser("train", help="train and test on a drawn data set")
    command.add_argument("data", type=Path, help="the folder that draw made")
    command.add_argument("--out", type=Path, default=ROOT / "runs" / "icons", help="folder of the runs")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--jobs", type=int, default=2, help="runs at a time")
    command.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe")
    commands.add_parser("page", help="write page and picture again, of the recorded results")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    try:
        if arguments.command == "fetch":
            print(*fetch(arguments.out, arguments.photographs), sep="\n")
        elif arguments.command == "draw":
            val_images = arguments.val_images or fewest_val_images(arguments.classes)
            settings = Settings(
                classes=arguments.classes,
                train_images=arguments.images,
                val_images=val_images,
                size=arguments.size,
                seed=arguments.seed,
            )
            total = arguments.images + 2 * val_images
            with progress_bar("drawing", total, show=True) as advance:
                lines = draw(
                    arguments.icons, arguments.lvis, settings, arguments.data, jobs=arguments.jobs, progress=advance
                )
            print(*lines, sep="\n")
        elif arguments.command == "train":
            if arguments.device == "cpu":
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            train(arguments.data, arguments.out, arguments.seeds, arguments.jobs, tuple(arguments.set))
        elif not RESULTS.is_file():
            raise UserError(f"{RESULTS}: no results are recorded yet; make them with `icons.py train`")
        else:
            write_page(json.loads(RESULTS.read_text()))
    except UserError as error:
        sys.exit(f"icons.py: {error}")


if __name__ == "__main__":
    main()
