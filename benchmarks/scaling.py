"""Training and evaluation by one, two and four processes on this CPU, and what a step sends, for 8 to 64 GPUs.

    python benchmarks/scaling.py [--processes 1 2 4] [--steps 40] [--rounds 3] [--set KEY=VALUE ...]

Measured: `tailseg.train` of the recipe on the built-in set, an epoch of ``--steps`` steps of eight images, which the
processes divide (gloo; this machine's cores divided too), then the evaluation of its 400 validation images; the numbers
of processes take turns. Images a second, each against one process of the same round; memory of all processes together,
where what they share counts once; how DistributedDataParallel was set and what it packs gradients into; bytes and calls
of every other exchange of a step.

Computed: the bytes that a step of full-size recipes sends, and the time that takes on a ring of GPUs at stated
bandwidths and latencies, next to a step's own time. Gradients travel while backward computes, the counts and batch
statistics do not: the first is the time if nothing overlapped, the second what cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import harness
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tailseg
from tailseg.evaluation.evaluate import evaluate
from tailseg.layers.norm import BatchNorm2d, BatchNormAct2d, synchronize
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.training import evaluations

BATCH, VAL_IMAGES, CLASSES = 8, 400, 1203
FULL_SIZE = ("table1/seesaw", "table2/02-sync-bn", "table2/10-seesaw")
RINGS = (  # GPUs, bytes a second through each, seconds a call: eight in a machine, and machines of eight
    (8, 300e9, 20e-6),  # NVLink of an H100 (450e9 by its data sheet)
    (16, 40e9, 40e-6),  # a network card of 400 Gb/s for each GPU
    (64, 40e9, 80e-6),
)
DDP = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "total_parameter_size_bytes")


# ---------------------------------------------------------------------------------------------------------
# A process of a run


def work(options: argparse.Namespace, processes: int, out: Path) -> None:
    """Train and evaluate; process 0 writes what it saw beside the run."""
    wrapped: list[DistributedDataParallel] = []
    exchanges: dict[str, list[int]] = {}  # element type -> calls and bytes of `all_reduce`, gradients excluded
    seconds: list[float] = []
    begin, exchange, score = DistributedDataParallel.__init__, dist.all_reduce, evaluate

    def remember(self: DistributedDataParallel, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        wrapped.append(self)

    def counted(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        entry = exchanges.setdefault(str(tensor.dtype).removeprefix("torch."), [0, 0])
        entry[0] += 1
        entry[1] += tensor.numel() * tensor.element_size()
        return exchange(tensor, *arguments, **named)

    def clocked(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = score(*arguments, **named)
        seconds.append(time.perf_counter() - start)
        return found

    DistributedDataParallel.__init__ = remember  # type: ignore[method-assign]
    dist.all_reduce = counted
    evaluations.evaluate = clocked  # type: ignore[attr-defined]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    settings = dict(pair.split("=", 1) for pair in options.set)
    tailseg.train(
        *(options.recipe, "synthetic", out),
        devices=processes,
        device="cpu",
        show=False,
        **{
            "data__batch_per_device": BATCH // processes,
            "data__workers": 0,
            "data__epoch_images": BATCH * options.steps,
            "schedule__epochs": 1,
            "training__log_steps": options.steps // 4,
        }
        | {key.replace(".", "__"): value for key, value in settings.items()},
    )
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        seen: dict[str, Any] = {"evaluation_seconds": seconds[-1], "all_reduce": exchanges}
        for wrapper in wrapped:
            found = wrapper._get_ddp_logging_data()
            seen["ddp"] = {key: found.get(key) for key in DDP}
            buckets = found.get("rebuilt_bucket_sizes") or found.get("bucket_sizes")
            seen["ddp"]["bucket_bytes"] = [int(size) for size in str(buckets).split(",")]
        (out / "seen.json").write_text(json.dumps(seen))


# ---------------------------------------------------------------------------------------------------------
# Runs


def run(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """One run: images a second of training past the first quarter and of evaluation, memory, exchanges."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, __file__, *sys.argv[1:], "--work", str(processes), "--out", str(out)]
        running = subprocess.Popen(command, start_new_session=True)
        most = 0
        while running.poll() is None:
            most = max(most, memory(running.pid))
            time.sleep(0.5)
        if running.returncode != 0:
            raise SystemExit(f"{processes} processes: the run failed")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if "images_per_second" in line][1:]
        seen: dict[str, Any] = json.loads((out / "seen.json").read_text())
    seen["train"] = len(rates) / sum(1 / rate for rate in rates)
    seen["evaluate"] = VAL_IMAGES / seen.pop("evaluation_seconds")
    seen["bytes"] = most
    return seen


def memory(session: int) -> int:
    """Bytes of all processes of a session; a page that several hold is divided among them (Linux)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):  # ended meanwhile
            continue
    return total


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Of every number of processes: its runs, and its rates against one process in the same round."""
    runs: dict[int, list[dict[str, Any]]] = {processes: [] for processes in options.processes}
    for number in range(options.rounds):
        for processes, found in runs.items():
            found.append(run(options, processes))
            rates = " ".join(f"{key} {found[-1][key]:.1f} images/s" for key in ("train", "evaluate"))
            print(
                f"round {number + 1}, {processes} processes: {rates}, {found[-1]['bytes'] / 2**30:.2f} GiB", flush=True
            )
    results: dict[str, Any] = {}
    for processes, found in runs.items():
        ratios = {
            key: sorted(mine[key] / one[key] for mine, one in zip(found, runs[options.processes[0]], strict=True))
            for key in ("train", "evaluate")
        }
        results[str(processes)] = {"runs": found, "against_the_first": ratios}
    return results


# ---------------------------------------------------------------------------------------------------------
# What a step sends


def sent(recipe_name: str) -> dict[str, Any]:
    """Bytes of a step of a full-size recipe: gradients; counts of classes; batch statistics, and in how many calls."""
    recipe = resolve(recipe_name)
    with torch.device("meta"):
        detector = build_detector(recipe, CLASSES)
    gradients = sum(p.numel() * p.element_size() for p in detector.parameters() if p.requires_grad)
    synchronize(detector)
    detector.train()
    channels = [
        part.num_features
        for part in detector.modules()
        if isinstance(part, BatchNorm2d | BatchNormAct2d) and part.training
    ]
    # Forward: count, sum, sum of squares in float64; backward: two sums in float32 (tailseg.layers.norm).
    statistics = sum(8 * (2 * c + 1) + 4 * 2 * c for c in channels)
    counts = [
        buffer.numel() * buffer.element_size()
        for name, buffer in detector.named_buffers()
        if name.split(".")[-1] == "counts"
    ]
    return {
        "gradients": gradients,
        "counts": sum(counts),
        "statistics": statistics,
        "calls": 2 * len(channels) + len(counts),
    }


def on_a_ring(step: dict[str, Any], gpus: int, bandwidth: float, latency: float) -> dict[str, float]:
    """Seconds: of everything, if nothing overlapped; and of what cannot overlap with computing."""
    share = 2 * (gpus - 1) / gpus / bandwidth
    waits = (step["counts"] + step["statistics"]) * share + step["calls"] * latency
    return {"all": step["gradients"] * share + latency + waits, "waits": waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo/seesaw")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="that divide steps of eight images")
    parser.add_argument("--steps", type=int, default=40, help="of a run, at least 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "scaling.json")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)  # one process of a run
    options = parser.parse_args()
    if options.work:
        work(options, options.work, options.out)
        return
    if options.steps < 8 or any(BATCH % processes for processes in options.processes):
        parser.error("--steps is at least 8, and --processes are divisors of 8")
    steps = {name: sent(name) for name in FULL_SIZE}
    results: dict[str, Any] = {
        "machine": harness.machine(torch.device("cpu")),
        "recipe": [options.recipe, *options.set],
        "processes": measured(options),
        "sent_by_a_step": {
            name: step
            | {f"{gpus}_gpus": on_a_ring(step, gpus, bandwidth, latency) for gpus, bandwidth, latency in RINGS}
            for name, step in steps.items()
        },
        "rings": [dict(zip(("gpus", "bytes_per_second", "seconds_per_call"), ring, strict=True)) for ring in RINGS],
    }
    harness.write_json(options.out, results)
    for name, step in results["sent_by_a_step"].items():
        ms = ", ".join(
            f"{g} GPUs {1e3 * step[f'{g}_gpus']['all']:.2f} ({1e3 * step[f'{g}_gpus']['waits']:.2f})" for g, *_ in RINGS
        )
        print(f"{name}: {step['gradients'] / 1e6:.0f} MB of gradients, {step['calls']} other calls; ms: {ms}")


if __name__ == "__main__":
    main()
