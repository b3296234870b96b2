"""What the feature cache of finetuning saves: whole runs and single steps, with the cache and without.

    python benchmarks/finetune.py                     # trains a small row 6 with Seesaw Loss on the built-in set first
    python benchmarks/finetune.py MODEL --data DATA --set data.workers=8

A second classification branch is finetuned on a frozen model (report, section 2.2) for the recipe's schedule, once
computing the frozen part in every step (plain) and once filling a cache with it first (cached). Both ways see the same
views of the same images; they take turns, each turn a whole run from the same start. A whole run is the filling, if
any, and all steps; evaluation and checkpoints, the same for both, are left out. Of the single steps the first of each
run is left out, in which memory is allocated. At the end of each turn all weights must be the same bits.

A ratio is that of the medians, its spread the smallest and largest within a turn: by the clock and by processor time
over all threads, which hardly minds that others use the processor too (but does not see loader processes).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import harness
import torch
from harness import Times
from torch import Tensor

from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override
from tailseg.training.distributed import launch
from tailseg.training.feature_cache import readable
from tailseg.training.loop import Run, train

PLAIN, CACHED = "plain", "cached"
SMALL = (  # no loader processes: their time would not be counted
    "classifier.loss=seesaw",
    "classifier.normalized=true",
    "model.tsd.constrain_classes=false",
    "data.workers=0",
)


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A run that is over."""

    whole: Times  # filling and steps
    filling: Times
    steps: list[Times]
    images: int  # of all steps, repetitions counted
    views: int  # in the cache
    cache_bytes: int
    state: dict[str, Tensor]


def finetuned(recipe: Recipe, data: DataSplits, init: Path, out: Path, device: torch.device) -> Finetuned:
    """All steps of a run, without evaluation and checkpoints."""
    shutil.rmtree(out, ignore_errors=True)
    run = Run(launch(1), recipe, data, out, 0, init)
    run.start(resume=False)
    filling = harness.timed(lambda: run.prepare([], show=False), device)
    files = list((out / "features").rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    with closing(run.batches()) as batches:
        steps = [harness.timed(lambda: run.train_step(batches), device) for _ in range(run.total_steps)]
    run.learner.finish()
    whole = Times(
        filling.clock + sum(step.clock for step in steps), filling.processor + sum(step.processor for step in steps)
    )
    images = run.total_steps * run.length.images_a_step
    return Finetuned(whole, filling, steps[1:], images, len(files), size, run.detector.state_dict())


def small_model(folder: Path, options: argparse.Namespace) -> tuple[Path, DataSplits]:
    """A model of row 6 with Seesaw Loss, trained for one epoch on a built-in set of that size."""
    settings = SyntheticSettings(train_images=options.images, val_images=2, size=options.size)
    data = open_data(str(write_synthetic(folder / "data", settings)), show=False)
    edges = f"short_edges: [{options.size}], test_short_edge: {options.size}, long_edge: {options.size}"
    sizes = f"data={{{edges}, batch_per_device: {options.batch}}}"
    short = "schedule={epochs: 1, milestones: [], warmup_steps: 4}"
    recipe = resolve("demo-table2/06-mask-scoring", [*SMALL, sizes, short, *options.set])
    train(recipe, data, folder / "model", show=False)
    return folder / "model" / "last.safetensors", data


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def show(name: str, ratios: dict[str, dict[str, float]]) -> None:
    texts = ["{:.2f} ({:.2f}-{:.2f})".format(*ratios[kind].values()) for kind in ("clock", "processor")]
    print(f"  {name:30}{texts[0]:22}{texts[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="trained without second branches; a small one by default")
    parser.add_argument("--data", help="as for tailseg train; needed with MODEL")
    parser.add_argument("--epochs", type=int, default=12, help="of the schedule; 12 is 1x")
    parser.add_argument("--views", type=int, default=1, help="augmentations of each image")
    parser.add_argument("--images", type=int, default=24, help="of the small model's set")
    parser.add_argument("--size", type=int, default=192, help="pixels of their sides")
    parser.add_argument("--batch", type=int, default=4, help="images a step of the small model")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the recipe")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/finetune-DEVICE.json")
    options = parser.parse_args()
    if options.model is not None and options.data is None:
        parser.error("with MODEL, name its data by --data")
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            init, data = small_model(folder, options)
        else:
            init, data = options.model, open_data(options.data)
        schedule = f"schedule={{epochs: {options.epochs}, milestones: [], warmup_steps: 4}}"
        section = f"finetune={{enabled: true, views: {options.views}}}"
        recipe = override(resolve(str(init)), ["data.sampler=repeat-factor", schedule, section, *options.set])
        recipes = {PLAIN: recipe, CACHED: override(recipe, ["finetune.cache=true"])}
        turns: dict[str, list[Finetuned]] = {name: [] for name in recipes}
        for _ in range(options.repeats):
            for way, own in recipes.items():
                turns[way].append(finetuned(own, data, init, folder / way, device))
            if not same_bits(turns[PLAIN][-1].state, turns[CACHED][-1].state):
                assert device.type != "cpu", "the cached run did not end in the same weights"
                print("  the weights differ in their last bits (a GPU's sums have no fixed order)")
    result = results(turns, options, device)
    harness.write_json(options.out or harness.RESULTS / f"finetune-{options.device}.json", result)


def results(turns: dict[str, list[Finetuned]], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What was measured, also printed."""
    plain, cached = turns[PLAIN], turns[CACHED]
    equal = all(same_bits(a.state, b.state) for a, b in zip(cached, plain, strict=True))
    whole = harness.speedup([run.whole for run in cached], [run.whole for run in plain])
    steps = {way: [median(run.steps) for run in runs] for way, runs in turns.items()}  # of each turn
    step = harness.speedup(steps[CACHED], steps[PLAIN])
    filling, images = [run.filling for run in cached], plain[0].images
    filled = cached[-1]
    each = filled.cache_bytes / filled.views
    share = median(filling).clock / median([run.whole for run in cached]).clock
    count = len(filled.steps) + 1
    print(f"{count} steps of {images // count} images; {filled.views} views in the cache, {readable(int(each))} each")
    print(f"  {'plain / cached':30}{'clock':22}processor time")
    show("whole run, filling included", whole)
    show("step, cache filled", step)
    print(f"  filling is {share:.0%} of a cached run; final weights the same bits: {equal}")
    return {
        "machine": harness.machine(device) | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "steps": count,
        "images_a_step": images // count,
        "views": filled.views,
        "bytes_per_view": each,
        "same_bits": equal,
        "speedup_of_a_run": whole,
        "speedup_of_a_step": step,
        "runs": {way: harness.summary([run.whole for run in runs], images) for way, runs in turns.items()},
        "filling": harness.summary(filling, filled.views),
        "median_steps": {way: harness.summary(own, images // count) for way, own in steps.items()},
    }


def median(times: list[Times]) -> Times:
    return Times(statistics.median(t.clock for t in times), statistics.median(t.processor for t in times))


if __name__ == "__main__":
    main()
