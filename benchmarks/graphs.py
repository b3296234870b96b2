"""Training steps with CUDA graphs and without, on batches of one shape: images a second, memory, the same losses.

    python benchmarks/graphs.py [--rows 01-mask-rcnn 10-seesaw]

Both are steps of rows of Table 2 at full size, on models of the same weights, with the optimiser, timed in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from rows import RATE, batch_of, detector_of, recipe_of
from throughput import Settings
from torch import Tensor

from tailseg.recipes.ladder import REPORT
from tailseg.recipes.values import changed
from tailseg.structures import Batch
from tailseg.training.graphs import CudaGraph, Graph, GraphedStep, Outcome
from tailseg.training.optimizer import build_optimizer

ROWS = ("01-mask-rcnn", "06-mask-scoring", "10-seesaw")
NewGraph = Callable[[], Graph]


def training_step(row: str, settings: Settings, new_graph: NewGraph | None) -> Callable[[int], dict[str, Tensor]]:
    """A function of a seed that makes a step and returns its losses."""
    recipe = recipe_of(row, settings)
    detector = detector_of(recipe, settings).train()
    optimizer = build_optimizer(detector, changed(recipe, {"optimizer.lr": RATE}).optimizer)
    batch = batch_of(settings, settings.batch)

    def work(batch: Batch) -> Outcome:
        with settings.autocast():
            losses = detector(batch)
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.detach() for name, loss in losses.items()}, {}

    graphed = GraphedStep(work, torch.device(settings.device), new_graph)

    def step(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        losses, _ = graphed(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graphed.keeps_gradients)
        return losses

    return step


def several(step: Callable[[int], object], seeds: Iterable[int]) -> None:
    for seed in seeds:
        step(seed)


def taken_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call adds at its peak: on CUDA what PyTorch takes from the device, the pool of graphs included."""
    if device.type != "cuda":
        return harness.peak_memory(call, device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_reserved(device) - before


def measured(row: str, settings: Settings, repeats: int, new_graph: NewGraph | None) -> dict[str, Any]:
    """Times of both in turn, memory that each adds at its peak, and by how much their losses differ."""
    device = torch.device(settings.device)
    steps, peaks, seconds = {}, {}, {}
    for name, maker in (("without", None), ("with graphs", new_graph)):
        steps[name] = training_step(row, settings, maker)
        started = time.perf_counter()
        peaks[name] = taken_memory(partial(several, steps[name], range(3)), device)
        seconds[name] = time.perf_counter() - started
    pairs = [[step(seed) for step in steps.values()] for seed in (3, 4)]
    differences = [
        abs(float(other[name]) - float(value)) / max(abs(float(value)), 1e-6)
        for one, other in pairs
        for name, value in one.items()
    ]
    times = harness.in_turn({name: partial(step, 5) for name, step in steps.items()}, repeats, device)
    found = {
        name: harness.summary(times[name], settings.batch)
        | {"peak_bytes": peaks[name], "seconds_of_first_three": seconds[name]}
        for name in steps
    }
    ratio = harness.speedup(times["with graphs"], times["without"])
    return found | {"times_as_fast": ratio, "largest_relative_difference_of_losses": max(differences)}


def on_device(row: str, settings: Settings, repeats: int) -> dict[str, Any]:
    """`measured` with real graphs, for a process of its own."""
    pool = torch.cuda.graph_pool_handle()
    return measured(row, settings, repeats, lambda: CudaGraph(pool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda",))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each, after five that are not")
    parser.add_argument("--batch", type=int, default=2, help="images of a step")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 1280), metavar=("H", "W"), help="pixels")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=list(REPORT), metavar="ROW")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the recipes")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "graphs-cuda.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    settings = Settings(
        device=options.device,
        batch=options.batch,
        size=(options.size[0], options.size[1]),
        classes=1203,
        precision=options.precision,
        pairs=0,
        objects=12,
        overrides=tuple(options.set),
        threads=torch.get_num_threads(),
    )
    result: dict[str, Any] = {"machine": harness.machine(device), "settings": asdict(settings), "rows": {}}
    for row in options.rows:
        found = harness.in_own_process(on_device, row, settings, options.repeats)
        result["rows"][row] = found
        harness.write_json(options.out, result)
        rates = [f"{name} {found[name]['images_per_second']:.2f} images/s" for name in ("with graphs", "without")]
        print(f"{row:18}{', '.join(rates)}, x {found['times_as_fast']['clock']['of_medians']:.2f}", flush=True)


if __name__ == "__main__":
    main()
