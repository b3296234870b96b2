"""Table 1 of the report in miniature: every classification loss, the same budget, several seeds, the built-in data.

    python benchmarks/table1.py [--out DIR] [--seeds 3] [--jobs 2]

Each run is the command ``tailseg train`` with one thread, ``--jobs`` of them at a time; runs that are complete in
DIR are not repeated and interrupted ones go on. Writes benchmarks/results/table1.json, docs/results/table1.md and its
picture. Thirty-odd runs of some 3,600 images seen: an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from tailseg.data.annotations import Annotations
from tailseg.data.sources import SYNTHETIC, open_source
from tailseg.evaluation.comparison import number

ROOT = Path(__file__).resolve().parents[1]
SEED = 1  # the first; the budget was chosen with seed 0, for all methods alike
BASELINE = "cross-entropy"
METRICS = (("bbox", "AP"), ("segm", "AP"), ("segm", "APr"), ("segm", "APc"), ("segm", "APf"))
TITLES = ("box AP", "mask AP", "APr", "APc", "APf")
REPORT = {  # Table 1 of the report, LVIS v1 val
    "cross-entropy": (16.9, 16.0, 0.0, 12.3, 27.3),
    "eql": (19.3, 18.4, 1.8, 17.1, 27.1),
    "seesaw": (24.3, 23.3, 13.0, 22.9, 28.2),
}


@dataclass(frozen=True, slots=True)
class Method:
    """A row: what is trained, or how another row's models are tested."""

    title: str
    settings: tuple[str, ...] = ()
    recipe: str = "demo/cross-entropy"
    tested_from: str | None = None  # a row whose models are evaluated anew with `settings`


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
    return {
        "cross-entropy": Method("Cross-entropy"),
        "eql": Method("EQL", ("classifier.loss=eql", f"classifier.threshold={(common + 0.5) / images:.6g}")),
        "seesaw": Method("Seesaw", recipe="demo/seesaw"),
        "seesaw-p0": Method("Seesaw with p = 0", ("classifier.p=0",), recipe="demo/seesaw"),
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
    }


# ---------------------------------------------------------------------------------------------------------
# Runs


def command(method: Method, name: str, seed: int, out: Path) -> list[str]:
    """The command line of one run; its metrics land in ``out/NAME-SEED/metrics.json``."""
    folder = out / f"{name}-{seed}"
    settings = [part for setting in method.settings for part in ("--set", setting)]
    tailseg = [str(Path(sys.executable).with_name("tailseg"))]
    if method.tested_from is not None:
        model = out / f"{method.tested_from}-{seed}" / "last.safetensors"
        return [*tailseg, "eval", str(model), "--data", SYNTHETIC, "--out", str(folder), "--quiet", *settings]
    resume = ["--resume"] if (folder / "trainer.safetensors").is_file() else []
    return [
        *(*tailseg, "train", method.recipe, "--data", SYNTHETIC, "--out", str(folder), "--seed", str(seed), "--quiet"),
        *("--set", "data.workers=0", *settings, *resume),
    ]


def run_all(rows: dict[str, Method], seeds: int, jobs: int, out: Path) -> None:
    """Train what is not trained yet, ``jobs`` runs at a time, the report's three rows first."""
    out.mkdir(parents=True, exist_ok=True)
    order = sorted(
        ((name, seed) for name in rows for seed in range(SEED, SEED + seeds)),
        key=lambda run: (rows[run[0]].tested_from is not None, run[0] not in REPORT, run[1]),
    )
    waiting = [run for run in order if not (out / f"{run[0]}-{run[1]}" / "metrics.json").is_file()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    while waiting or running:
        for run, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[run]
            if process.returncode != 0:
                raise SystemExit(f"{run[0]}-{run[1]} failed; see {out / f'{run[0]}-{run[1]}.log'}")
            print(f"{time.strftime('%H:%M')} {run[0]}-{run[1]}: {len(waiting)} waiting", flush=True)
        # A row that is tested from another one waits until that is trained.
        ready = [r for r in waiting if rows[r[0]].tested_from is None or not running]
        while ready and len(running) < jobs:
            name, seed = ready.pop(0)
            waiting.remove((name, seed))
            with (out / f"{name}-{seed}.log").open("wb") as log:
                arguments = command(rows[name], name, seed, out)
                running[name, seed] = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
        time.sleep(0.5)


def collect(rows: dict[str, Method], seeds: int, out: Path) -> dict[str, Any]:
    """Every run's metrics and per-class AP, and how it was made."""
    found = {}
    for name, method in rows.items():
        runs = [json.loads((out / f"{name}-{seed}" / "metrics.json").read_text()) for seed in range(SEED, SEED + seeds)]
        source = method.tested_from
        how = f"test of {source}" if source else f"tailseg train {method.recipe}"
        settings = shlex.join(part for setting in method.settings for part in ("--set", setting))
        found[name] = {"title": method.title, "command": f"{how} {settings}".strip(), "runs": runs}
    return found


# ---------------------------------------------------------------------------------------------------------
# The page


def values(method: dict[str, Any], kind: str, metric: str) -> list[float]:
    """A metric of every seed, in percent; NaN where the set has no such class."""
    numbers = [number(run[kind][metric]) for run in method["runs"]]
    return [math.nan if value is None else 100 * value for value in numbers]


def spread(numbers: Sequence[float]) -> str:
    return f"{mean(numbers):.1f} ± {stdev(numbers):.1f}" if len(numbers) > 1 else f"{numbers[0]:.1f}"


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"| | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    for method in found.values():
        lines.append(f"| {method['title']} | " + " | ".join(spread(values(method, *m)) for m in METRICS) + " |")
    return lines


def paired(found: dict[str, Any]) -> list[str]:
    """Differences to the baseline, seed by seed: what the seeds have in common is gone."""
    lines = [f"| minus {found[BASELINE]['title'].lower()} | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    for name, method in found.items():
        if name == BASELINE:
            continue
        cells = []
        for kind, metric in METRICS:
            pairs = zip(values(method, kind, metric), values(found[BASELINE], kind, metric), strict=True)
            gains = [ours - theirs for ours, theirs in pairs]
            sign = "+" if mean(gains) >= 0 else ""
            cells.append((sign + spread(gains)).replace("-", "−"))
        lines.append(f"| {method['title']} | " + " | ".join(cells) + " |")
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
            axis.plot(numbers, [height] * len(numbers), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
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
    groups = data["classes_by_frequency"]
    tried = (ROOT / "docs/results/table1-tried.md").read_text()
    return "\n".join(
        [
            "# Table 1 in miniature",
            "",
            "<!-- made by benchmarks/table1.py; the last section by hand, in table1-tried.md -->",
            "",
            f"Mask R-CNN (the `demo` recipes) on the built-in set: {data['classes']} classes ({groups['r']} rare, "
            f"{groups['c']} common, {groups['f']} frequent), {data['train_images']} training and {data['val_images']} "
            f"validation images of {data['size']} px. Every method: {results['images_seen']} images seen, the same "
            f"optimiser, schedule, sampler and seeds ({SEED} to {SEED + results['seeds'] - 1}); only `classifier` "
            "differs. Percent, mean ± standard deviation over the seeds.",
            "",
            *table(found),
            "",
            "![A dot a seed for rare, common and frequent classes.](../images/table1.png)",
            "",
            "Paired differences, each seed against cross-entropy with the same seed:",
            "",
            *paired(found),
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
            f"Made by `python benchmarks/table1.py --seeds {results['seeds']}` on {results['machine']}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "table1", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--methods", help="some rows only, separated by commas; no page is written then")
    arguments = parser.parse_args()
    data = open_source(SYNTHETIC, show=False)
    assert data.train is not None
    assert data.val is not None
    rows = methods(data.train)
    if arguments.methods:
        chosen = arguments.methods.split(",")
        unknown = sorted(set(chosen) - set(rows))
        if unknown:
            parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(rows)}")
        run_all({name: rows[name] for name in chosen}, arguments.seeds, arguments.jobs, arguments.out)
        return
    run_all(rows, arguments.seeds, arguments.jobs, arguments.out)
    lines = (arguments.out / f"{BASELINE}-{SEED}" / "metrics.jsonl").read_text().splitlines()
    batch = 8  # of the demo recipes
    frequencies = [category.frequency for category in data.train.categories]
    results = {
        "data": {
            "classes": len(frequencies),
            "classes_by_frequency": {group: frequencies.count(group) for group in "rcf"},
            "train_images": len(data.train),
            "val_images": len(data.val),
            "size": int(data.train.image_hws.max()),
        },
        "seeds": arguments.seeds,
        "images_seen": batch * json.loads(lines[-1])["step"],
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "report": REPORT,
        "methods": collect(rows, arguments.seeds, arguments.out),
    }
    (ROOT / "benchmarks/results/table1.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results["methods"], ROOT / "docs/images/table1.png")
    (ROOT / "docs/results/table1.md").write_text(page(results))
    print("\n".join(table(results["methods"])))


if __name__ == "__main__":
    main()
