"""What the tables in miniature share: runs of `tailseg train`, a row and a seed each, and how metrics are laid out."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy.stats import t

from tailseg.data.sources import SYNTHETIC, DataSplits
from tailseg.evaluation.methods import number

ROOT = Path(__file__).resolve().parents[1]
SEED = 1  # the first; the budget was chosen with seed 0, for all methods alike
BATCH = 8  # of the demo recipes
METRICS = (("bbox", "AP"), ("segm", "AP"), ("segm", "APr"), ("segm", "APc"), ("segm", "APf"))
TITLES = ("box AP", "mask AP", "APr", "APc", "APf")


@dataclass(frozen=True, slots=True)
class Method:
    """A row: what is trained, or how another row's models are tested."""

    title: str
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # further words of the command
    recipe: str = "demo/cross-entropy"
    data: str = SYNTHETIC  # what stands behind --data
    tested_from: str | None = None  # a row whose models are evaluated again with `settings`
    init_from: str | None = None  # a row whose models training starts from


def command(method: Method, name: str, seed: int, out: Path) -> list[str]:
    """The command line of one run; its metrics land in ``out/NAME-SEED/metrics.json``."""
    folder = out / f"{name}-{seed}"
    settings = [part for setting in method.settings for part in ("--set", setting)]
    tailseg = [str(Path(sys.executable).with_name("tailseg"))]
    if method.tested_from is not None:
        model = out / f"{method.tested_from}-{seed}" / "last.safetensors"
        start = [*tailseg, "eval", str(model), "--data", method.data, "--out", str(folder), "--quiet"]
        return [*start, *method.options, *settings]
    start = [] if method.init_from is None else ["--init", str(out / f"{method.init_from}-{seed}" / "last.safetensors")]
    resume = ["--resume"] if (folder / "trainer.safetensors").is_file() else start
    return [
        *(*tailseg, "train", method.recipe, "--data", method.data, "--out", str(folder)),
        *("--seed", str(seed), "--quiet", *method.options, "--set", "data.workers=0", *settings, *resume),
    ]


def run_all(
    rows: dict[str, Method],
    seeds: int,
    jobs: int,
    out: Path,
    first: Iterable[str] = (),
    after: Callable[[], object] = lambda: None,
) -> None:
    """Train what is not trained yet, ``jobs`` runs at a time, rows in ``first`` before others; ``after`` each run."""
    out.mkdir(parents=True, exist_ok=True)
    order = sorted(
        ((name, seed) for name in rows for seed in range(SEED, SEED + seeds)),
        key=lambda run: (_source(rows[run[0]]) is not None, run[0] not in first, run[1]),
    )

    def complete(name: str, seed: int) -> bool:
        return (out / f"{name}-{seed}" / "metrics.json").is_file()

    waiting = [run for run in order if not complete(*run)]
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
            after()
        # A row that is made of another one's models waits until these are trained.
        sources = {run: (_source(rows[run[0]]), run[1]) for run in waiting}
        ready = [
            r
            for r, (name, seed) in sources.items()
            if name is None or (complete(name, seed) and (name, seed) not in running)
        ]
        if not (ready or running or not waiting):
            raise SystemExit(
                f"{waiting[0][0]}-{waiting[0][1]} is made of {sources[waiting[0]][0]}; train that row first"
            )
        while ready and len(running) < jobs:
            name, seed = ready.pop(0)
            waiting.remove((name, seed))
            with (out / f"{name}-{seed}.log").open("wb") as log:
                arguments = command(rows[name], name, seed, out)
                running[name, seed] = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
        time.sleep(0.5)


def _source(method: Method) -> str | None:
    """The row whose models a row is made of."""
    return method.tested_from or method.init_from


def collect(rows: dict[str, Method], seeds: int, out: Path) -> dict[str, Any]:
    """How each row was made, and the metrics of its runs that are complete; rows without any are left out."""
    found = {}
    for name, method in rows.items():
        files = {seed: out / f"{name}-{seed}" / "metrics.json" for seed in range(SEED, SEED + seeds)}
        runs = {seed: json.loads(file.read_text()) for seed, file in files.items() if file.is_file()}
        source = method.tested_from
        how = f"test of {source}" if source else f"tailseg train {method.recipe}"
        words = shlex.join([*method.options, *(part for setting in method.settings for part in ("--set", setting))])
        if runs:
            about = {"title": method.title, "command": f"{how} {words}".strip()}
            found[name] = about | {"seeds": list(runs), "runs": list(runs.values())}
    return found


def values(method: dict[str, Any], kind: str, metric: str) -> list[float]:
    """A metric of every seed, in percent; NaN where the set has no such class."""
    numbers = [number(run[kind][metric]) for run in method["runs"]]
    return [math.nan if value is None else 100 * value for value in numbers]


def spread(numbers: Sequence[float]) -> str:
    return f"{mean(numbers):.1f} ± {deviation(numbers):.1f}" if len(numbers) > 1 else f"{numbers[0]:.1f}"


def deviation(numbers: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN where a number is, at which `statistics.stdev` breaks."""
    return math.sqrt(sum((number - mean(numbers)) ** 2 for number in numbers) / (len(numbers) - 1))


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"| | {' | '.join(TITLES)} |", "|---|" + "---:|" * len(TITLES)]
    for method in found.values():
        lines.append(f"| {method['title']} | " + " | ".join(spread(values(method, *m)) for m in METRICS) + " |")
    return lines


def gains(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Differences of every metric, seed by seed: what the seeds have in common is gone."""
    cells = []
    for kind, metric in METRICS:
        pairs = zip(values(ours, kind, metric), values(theirs, kind, metric), strict=True)
        differences = [a - b for a, b in pairs]
        sign = "+" if mean(differences) >= 0 else ""
        cells.append((sign + spread(differences)).replace("-", "−"))
    return cells


def paired(ours: dict[str, Any], theirs: dict[str, Any], kind: str, metric: str) -> tuple[float, float]:
    """Mean difference of a metric, seed by seed, and half of its 95 % interval by Student's t (infinite for one)."""
    found = [a - b for a, b in zip(values(ours, kind, metric), values(theirs, kind, metric), strict=True)]
    if len(found) < 2:
        return mean(found), math.inf
    return mean(found), float(t.ppf(0.975, len(found) - 1)) * deviation(found) / math.sqrt(len(found))


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Mean difference of every metric, seed by seed, with its 95 % interval by Student's t."""
    cells = []
    for kind, metric in METRICS:
        middle, half = paired(ours, theirs, kind, metric)
        interval = f" [{middle - half:.1f}, {middle + half:.1f}]" if half < math.inf else ""
        cells.append(f"{middle:+.1f}{interval}".replace("-", "−"))
    return cells


def about(data: DataSplits, seeds: int, first_run: Path) -> dict[str, Any]:
    """What the runs of a table have in common: the data, the seeds, the images seen, the machine."""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", CPU"
    lines = (first_run / "metrics.jsonl").read_text().splitlines()
    return {
        "data": about_data(data),
        "seeds": seeds,
        "images_seen": BATCH * json.loads(lines[-1])["step"],
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}{device}",
    }


def about_data(data: DataSplits) -> dict[str, Any]:
    """Sizes of a set: images, classes, and how many images and objects these have."""
    assert data.train is not None
    assert data.val is not None
    frequencies: list[str] = [category.frequency for category in data.train.categories]
    images = [category.image_count for category in data.train.categories]
    objects = [category.instance_count for category in data.train.categories]
    return {
        "classes": len(frequencies),
        "classes_by_frequency": {group: frequencies.count(group) for group in "rcf"},
        "train_images": len(data.train),
        "val_images": len(data.val),
        "size": int(data.train.image_sizes.max()),
        **{"objects": sum(objects), "fewest_images": min(images), "most_images": max(images)},
        **{"fewest_objects": min(objects), "most_objects": max(objects)},
    }


def described(results: dict[str, Any]) -> str:
    """The same in words."""
    data = results["data"]
    groups = data["classes_by_frequency"]
    return (
        f"the built-in set: {data['classes']} classes ({groups['r']} rare, {groups['c']} common, {groups['f']} "
        f"frequent), {data['train_images']} training and {data['val_images']} validation images of {data['size']} px"
    )
