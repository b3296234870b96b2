"""Opening an annotation file of LVIS v1 train's size: time, peak memory, and what eight workers add.

    python benchmarks/annotations.py                     # CPU, some minutes; 1.1 GB on the disk, 0.6 GB of cache
    python benchmarks/annotations.py --lvis-scale 1      # lvis-api on the whole file too: needs some 10 GB of memory

A generated file (`lvis_size.py`) is opened by ``load_annotations`` with an empty cache, then again in new processes,
and by ``lvis.LVIS`` of lvis-api in turn with that. By default lvis-api gets a part of the images, and we open the same
part beside it: ratios are within that part. Each measurement is a process of its own; seconds are those of the call,
memory is the process's largest resident set, imports included. Before a first open the cache folder is removed; the
JSON itself is in the system's page cache.

Workers are forked, as `torch.utils.data.DataLoader` does on Linux, or spawned with the data set pickled to them. Each
reads the annotations of 5,000 random images; private memory is ``Private_Dirty`` of ``/proc/self/smaps_rollup``,
beyond that of a worker which does nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import harness
import lvis_size
import numpy as np
import torch

TARGETS = {"first_open_seconds": 25.0, "peak_bytes": 2.5e9, "later_open_seconds": 0.5, "private_bytes": 40e6}
WORKERS, SAMPLES = 8, 5000
# A process's largest resident set is never less than that of the process which started it, so a small one does.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
CALLS = {
    "tailseg": (
        "from tailseg.data.annotations.annotations import load_annotations; from pathlib import Path",
        "load_annotations(Path(sys.argv[1]), Path('.'))",
    ),
    "lvis-api": ("import logging, lvis", "lvis.LVIS(sys.argv[1])"),
}
TIMED = """
import json, sys, time
{imports}
start, processor = time.perf_counter(), time.process_time()
data = {call}
print(json.dumps([time.perf_counter() - start, time.process_time() - processor]))
"""


def opened(what: str, path: Path) -> dict[str, float]:
    """Seconds of opening a file in a new process, and the process's largest resident set."""
    imports, call = CALLS[what]
    code = TIMED.format(imports=imports, call=call)
    command = [sys.executable, "-I", "-S", "-c", LAUNCH, sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} on {path} failed:\n{done.stderr}")
    times, memory = done.stdout.splitlines()[-2:]
    seconds, processor = json.loads(times)
    return {"seconds": seconds, "processor_seconds": processor, "peak_bytes": int(memory) * 1024}


def first_open(path: Path) -> dict[str, float]:
    shutil.rmtree(os.environ["TAILSEG_CACHE"], ignore_errors=True)
    return opened("tailseg", path)


def private_bytes() -> int:
    """Memory that only this process has, and has written to."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def worker(data: Any, seed: int, samples: int, ready: Barrier, answer: Connection) -> None:
    """Read the annotations of random images and say what memory that took."""
    rng = np.random.default_rng(seed)
    touched = 0
    for image in rng.integers(0, len(data), samples) if samples else ():
        for row in data.rows(image):
            touched += len(data.segmentation(row)) + int(data.labels[row]) + int(data.boxes[row].sum())
    ready.wait()
    answer.send(private_bytes())
    answer.close()
    ready.wait()


def workers(path: Path, method: Literal["fork", "spawn"]) -> dict[str, list[int]]:
    """Private memory of eight workers that have read annotations, and of eight that have not."""
    from tailseg.data.annotations.annotations import load_annotations

    data = load_annotations(path, Path())
    context: ForkContext | SpawnContext
    context = multiprocessing.get_context("fork") if method == "fork" else multiprocessing.get_context("spawn")
    result = {}
    for name, samples in (("idle", 0), ("reading", SAMPLES)):
        ready = context.Barrier(WORKERS)
        pipes = [context.Pipe(duplex=False) for _ in range(WORKERS)]
        group = [
            context.Process(target=worker, args=(data, seed, samples, ready, pipe[1]))
            for seed, pipe in enumerate(pipes)
        ]
        for process in group:
            process.start()
        result[name] = [pipe[0].recv() for pipe in pipes]
        for process in group:
            process.join()
    return result


def beyond_idle(path: Path, method: str) -> dict[str, Any]:
    """`workers` from a process of their own, and the most that a reading one has beyond an idle one."""
    code = f"import json, sys, annotations as a; print(json.dumps(a.workers(a.Path(sys.argv[1]), {method!r})))"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"beyond_idle": max(found["reading"]) - min(found["idle"])}


def spread(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        key: {"min": min(v), "median": statistics.median(v), "max": max(v)}
        for key in runs[0]
        for v in [[run[key] for run in runs]]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--lvis-scale", type=float, default=0.25, help="share of the images that lvis-api gets")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "annotations-cpu.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": harness.machine(torch.device("cpu")), "targets": TARGETS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TAILSEG_CACHE"] = str(folder / "cache")
        large, part = folder / "train.json", folder / "part.json"
        lvis_size.write(large, options.scale)
        lvis_size.write(part, options.lvis_scale)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "ours, part": [], "lvis-api, part": []}
        for _ in range(options.repeats):
            runs["lvis-api, part"].append(opened("lvis-api", part))
            runs["ours, part"].append(first_open(part))
            runs["ours"].append(first_open(large))
        runs["ours, later"] = [opened("tailseg", large) for _ in range(max(5, options.repeats))]
        result["bytes"] = {"file": large.stat().st_size, "part": part.stat().st_size}
        result["part"] = {"share_of_images": options.lvis_scale}
        result["opens"] = {key: spread(values) for key, values in runs.items()}
        pairs = list(zip(runs["lvis-api, part"], runs["ours, part"], strict=True))
        result["ratios_on_part"] = spread([{key: b[key] / a[key] for key in a} for b, a in pairs])
        result["private_bytes"] = {method: beyond_idle(large, method) for method in ("fork", "spawn")}
    for key, values in result["opens"].items():
        seconds, memory = values["seconds"], values["peak_bytes"]["max"]
        about = f"{seconds['median']:.2f} s ({seconds['min']:.2f} to {seconds['max']:.2f})"
        processor = values["processor_seconds"]["median"]
        print(f"{key}: {about}, processor {processor:.2f} s, peak {memory / 1e9:.2f} GB")
    ratios = result["ratios_on_part"]
    print(f"lvis-api takes {ratios['seconds']['median']:.1f} x our time, {ratios['peak_bytes']['median']:.1f} x memory")
    for method, values in result["private_bytes"].items():
        print(f"{WORKERS} workers by {method}: at most {values['beyond_idle'] / 1e6:.1f} MB beyond an idle one")
    print(f"targets: {TARGETS}")
    harness.write_json(options.out, result)


if __name__ == "__main__":
    main()
