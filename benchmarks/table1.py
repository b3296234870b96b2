"""Table 1 of the report in miniature: every classification loss, the same budget, several seeds, the built-in data.

    python benchmarks/table1.py [--out DIR] [--seeds 3] [--jobs 2] [--methods cross-entropy,seesaw]

Each run is the command ``tailseg train`` with one thread, ``--jobs`` of them at a time, and one ``tailseg eval`` of its
model without a limit that binds; what is complete in DIR is not repeated and interrupted runs go on. Writes
benchmarks/results/table1.json, docs/results/table1.md and its picture. With ``--methods`` the other rows stay as
recorded, if they were made on the same data; so the work can be divided. A run sees 12,000 images: some twenty minutes
of one core, or ten seconds of an H200 that fifteen runs share.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from miniature import (
    METRICS,
    ROOT,
    SEED,
    TITLES,
    Method,
    about,
    collect,
    described,
    differences,
    run_all,
    spread,
    table,
    values,
)

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.sources import SYNTHETIC, open_data

BASELINE = "cross-entropy"
RFS = "-rfs"
ALL = ("--max-dets", "300", "--fixed-ap")  # 2.5 detections a class and image: none is crowded out
STEPS = (  # from one row to the next: what each part of Seesaw Loss is worth
    ("cosine", "cross-entropy"),
    ("seesaw-p0", "cosine"),
    ("seesaw", "seesaw-p0"),
    ("seesaw-q2", "seesaw"),
    ("seesaw", "seesaw-linear"),
    ("seesaw-linear", "cross-entropy"),
    ("eql", "cross-entropy"),
    ("seesaw", "cross-entropy"),
    ("cross-entropy-rfs", "cross-entropy"),
    ("seesaw-p0-rfs", "cross-entropy-rfs"),
    ("seesaw-rfs", "seesaw-p0-rfs"),
    ("seesaw-rfs", "seesaw"),
)
REPORT = {  # Table 1 of the report, LVIS v1 val
    "cross-entropy": (16.9, 16.0, 0.0, 12.3, 27.3),
    "eql": (19.3, 18.4, 1.8, 17.1, 27.1),
    "seesaw": (24.3, 23.3, 13.0, 22.9, 28.2),
}


def methods(train: Annotations) -> dict[str, Method]:
    """The rows; constants that depend on the size of a data set stand where they stand on LVIS v1's curve."""
    instances = np.sort([category.instance_count for category in train.categories])
    images = len(train) - train.report.empty_images
    # EQL spares LVIS's rare and common classes (its λ lies just above 100 images); so does this one.
    common = max(category.image_count for category in train.categories if category.frequency != "f")
    # Groups of 200, 412, 334 and 257 of LVIS's 1203 classes.
    shares = np.cumsum([200, 412, 334]) / 1203
    thresholds = [int(instances[round(share * len(instances))]) for share in shares]
    normalized = "classifier.normalized=true"
    core = {
        "cross-entropy": Method("Cross-entropy"),
        "cosine": Method("Cross-entropy, normalised", (normalized,)),
        "eql": Method("EQL", ("classifier.loss=eql", f"classifier.threshold={(common + 0.5) / images:.6g}")),
        "seesaw-p0": Method("Seesaw with p = 0", ("classifier.p=0",), recipe="demo/seesaw"),
        "seesaw": Method("Seesaw", recipe="demo/seesaw"),
        "seesaw-q2": Method("Seesaw with q = 2", ("classifier.q=2",), recipe="demo/seesaw"),
        "seesaw-linear": Method("Seesaw, linear classifier", ("classifier.normalized=false",), recipe="demo/seesaw"),
    }
    # Classes in less than 2 % of the images are repeated, as in rare.py; no more steps than with the random sampler.
    sampling = ("data.sampler=repeat-factor", "data.repeat_threshold=0.02", f"data.epoch_images={len(train)}")
    repeated = {
        f"{name}{RFS}": replace(
            core[name], title=f"{core[name].title}, RFS", settings=(*core[name].settings, *sampling)
        )
        for name in ("cross-entropy", "cosine", "eql", "seesaw-p0", "seesaw")
    }
    return core | {
        "eql-v2": Method("EQL v2", ("classifier.loss=eql-v2",)),
        "group-softmax": Method(
            "Balanced group softmax", ("classifier.loss=group-softmax", f"classifier.thresholds={thresholds}")
        ),
        # 50 on LVIS, where some 40 classes are present in a step; here some 20 are.
        "federated": Method("Federated loss", ("classifier.loss=federated", "classifier.sampled=25")),
        "class-balanced": Method("Class-balanced loss", ("classifier.loss=class-balanced",)),
        "ldam": Method("LDAM", ("classifier.loss=ldam", normalized)),
        "logit-adjustment": Method("Balanced softmax", ("classifier.loss=logit-adjustment",)),
        "focal": Method("Focal loss", ("classifier.loss=focal",)),
        "tau-norm": Method("Cross-entropy, tau-norm", ("test.tau_norm=1",), tested_from="cross-entropy"),
        **repeated,
    }


def fixed(rows: dict[str, Method]) -> dict[str, Method]:
    """The models of the rows tested again by fixed AP, with more detections than there are classes."""
    tests = {}
    for name, row in rows.items():
        settings = row.settings if row.tested_from else ()
        tests[f"{name}-fixed"] = Method(row.title, settings, ALL, tested_from=row.tested_from or name)
    return tests


# ---------------------------------------------------------------------------------------------------------
# The page


def opening(found: dict[str, Any], unlimited: dict[str, Any]) -> str:
    """Three sentences."""

    def rare(method: dict[str, Any]) -> str:
        return f"{mean(values(method, 'segm', 'APr')):.1f}"

    plain, p0, full = found[BASELINE], found["seesaw-p0"], found["seesaw"]
    frequent = mean(values(plain, "segm", "APf"))
    gain = differences(full, p0)[2].replace(" [", " points, 95 % interval [")
    return (
        f"Cross-entropy has mask AP {frequent:.1f} on frequent classes and {rare(plain)} on rare ones (in the report: "
        f"27.3 and 0.0). Seesaw Loss without its mitigation factor (p = 0) has APr {rare(p0)}, with it (p = 0.8) "
        f"{rare(full)}: {gain}. Without a limit of detections that binds (fixed AP), cross-entropy has "
        f"{rare(unlimited[BASELINE])} on rare classes and Seesaw {rare(unlimited['seesaw'])}: rare objects are in the "
        "list of detections, below frequent ones that are wrong."
    )


def steps(found: dict[str, Any]) -> list[str]:
    """Differences between rows, seed by seed: what the seeds have in common is gone."""
    lines = [f"| | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    for ours, theirs in STEPS:
        if ours in found and theirs in found:
            title = f"{found[ours]['title']} − {found[theirs]['title']}"
            lines.append(f"| {title} | {' | '.join(differences(found[ours], found[theirs]))} |")
    return lines


def fixed_table(unlimited: dict[str, Any]) -> list[str]:
    lines = [f"| | {' | '.join(TITLES)} | seeds |", "|---|" + "---:|" * (len(TITLES) + 1)]
    for method in unlimited.values():
        cells = [spread(values(method, *metric)) for metric in METRICS]
        lines.append(f"| {method['title']} | {' | '.join(cells)} | {', '.join(map(str, method['seeds']))} |")
    return lines


def beside_the_report(found: dict[str, Any]) -> list[str]:
    lines = ["| | " + " | ".join(f"{t}: report | here" for t in TITLES) + " |", "|---|" + "---:|" * (2 * len(TITLES))]
    for name, numbers in REPORT.items():
        ours = [mean(values(found[name], *m)) for m in METRICS]
        cells = [f"{theirs:.1f} | {here:.1f}" for theirs, here in zip(numbers, ours, strict=True)]
        lines.append(f"| {found[name]['title']} | " + " | ".join(cells) + " |")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """A dot a seed for rare, common and frequent classes, the methods in order of their mask AP."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    order = sorted(found.values(), key=lambda method: mean(values(method, "segm", "AP")))
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.32 * len(order) + 1.1), sharey=True, layout="constrained")
    groups = {"APr": "rare classes", "APc": "common classes", "APf": "frequent classes"}
    for axis, (metric, title) in zip(axes, groups.items(), strict=True):
        for height, method in enumerate(order):
            numbers = values(method, "segm", metric)
            colour = "#c1440e" if method["title"].startswith("Seesaw") else "#33658a"
            axis.plot(
                numbers,
                [height] * len(numbers),
                "o",
                color=colour,
                alpha=0.55,
                markersize=5,
                markeredgewidth=0,
                clip_on=False,
            )
            axis.plot(mean(numbers), height, "|", color=colour, markersize=14, markeredgewidth=2)
        axis.set_title(f"mask {metric}, {title}", fontsize=10)
        axis.set_xlim(left=0)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set_yticks(range(len(order)), [method["title"] for method in order])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(results: dict[str, Any]) -> str:
    found, data = results["methods"], results["data"]
    tried = (ROOT / "docs/results/table1-tried.md").read_text()
    missing = "; ".join(results["not_run"])
    return "\n".join(
        [
            "# Table 1 in miniature",
            "",
            "<!-- made by benchmarks/table1.py; the last section by hand, in table1-tried.md -->",
            "",
            "![A dot a seed for rare, common and frequent classes.](../images/table1.png)",
            "",
            opening(found, results["fixed"]),
            "",
            f"Mask R-CNN (the `demo` recipes) on {described(results)}, with {data['fewest_images']} to "
            f"{data['most_images']:,} training images and {data['fewest_objects']} to {data['most_objects']:,} objects "
            f"a class. Every method: {results['images_seen']:,} images seen, the same optimiser, schedule, sampler "
            f"and seeds ({SEED} to {SEED + results['seeds'] - 1}); only `classifier` differs, and the sampler in rows "
            "with RFS. An image may have 30 detections: LVIS's 300 for 1,203 classes, scaled. Percent, mean ± standard "
            "deviation over the seeds.",
            "",
            *table(found),
            "",
            *([f"Not run on this set yet: {missing}.", ""] if missing else []),
            "What each step is worth: mean difference of runs with the same seed, and its 95 % interval (Student's t):",
            "",
            *steps(found),
            "",
            "The same models with 300 detections an image and fixed AP (the best 10,000 of each class over all images; "
            "arXiv 2102.01066), where no class can crowd out another:",
            "",
            *fixed_table(results["fixed"]),
            "",
            "Beside the report (LVIS v1 val, ResNet-50, 1x; other data, so the order is what can be compared):",
            "",
            *beside_the_report(found),
            "",
            "## The rows",
            "",
            *(f"- **{method['title']}**: `{method['command']}`" for method in found.values()),
            "",
            tried.rstrip(),
            "",
            f"Made by `python benchmarks/table1.py --seeds {results['seeds']}` on {machines(found)}.",
            "",
        ]
    )


def machines(found: dict[str, Any]) -> str:
    """Where the rows were trained; all machines but the first with their rows."""
    titles: dict[str, list[str]] = {}
    for method in found.values():
        titles.setdefault(method["machine"], []).append(method["title"])
    (most, _), *others = titles.items()
    return ". ".join([most, *(f"On {machine}: {'; '.join(rows)}" for machine, rows in others)])


def merged(results: dict[str, Any], recorded: dict[str, Any], rows: dict[str, Method]) -> dict[str, Any]:
    """Results with what was recorded of other rows, if that was made on the same data with the same budget."""
    alike = all(results[key] == recorded.get(key) for key in ("data", "seeds", "images_seen"))
    for made in (recorded, results):
        machine = made.pop("machine", "")
        for method in made["methods"].values():
            method.setdefault("machine", machine)
    for key in ("methods", "fixed"):
        both = (recorded[key] if alike else {}) | results[key]
        results[key] = {name: both[name] for name in rows if name in both}
    results["not_run"] = [row.title for name, row in rows.items() if name not in results["methods"]]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "table1", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--methods", help="some rows only, separated by commas; the others stay as recorded")
    parser.add_argument("--machine", help="of the runs, if they were made elsewhere")
    arguments = parser.parse_args()
    data = open_data(SYNTHETIC, show=False)
    assert data.train is not None
    rows = methods(data.train)
    chosen = arguments.methods.split(",") if arguments.methods else list(rows)
    unknown = sorted(set(chosen) - set(rows))
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(rows)}")
    picked = {name: rows[name] for name in chosen}
    if not arguments.machine:
        run_all(picked | fixed(picked), arguments.seeds, arguments.jobs, arguments.out, REPORT)
    results = about(data, arguments.seeds, arguments.out / f"{chosen[0]}-{SEED}") | {
        "report": REPORT,
        "methods": {
            name: row
            for name, row in collect(picked, arguments.seeds, arguments.out).items()
            if len(row["seeds"]) == arguments.seeds
        },
        "fixed": {
            name.removesuffix("-fixed"): row
            for name, row in collect(fixed(picked), arguments.seeds, arguments.out).items()
        },
    }
    results["machine"] = arguments.machine or results["machine"]
    file = ROOT / "benchmarks/results/table1.json"
    results = merged(results, json.loads(file.read_text()), rows)
    file.write_text(json.dumps(results, indent=1) + "\n")
    draw(results["methods"], ROOT / "docs/images/table1.png")
    (ROOT / "docs/results/table1.md").write_text(page(results))
    print("\n".join(table(results["methods"])))


if __name__ == "__main__":
    main()
