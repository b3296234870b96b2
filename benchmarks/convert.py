"""Time and peak memory of converting full-size mmdetection checkpoints (C = 1203), beside reading and writing them.

    python benchmarks/convert.py                      # CPU, a minute

Each checkpoint is written with random weights under mmdetection's names, then `tailseg convert mmdet` and, in turn
with it, a process that only does ``torch.save(torch.load(...))`` run on it. Times are those of whole processes, from
start to end. Memory is a process's largest resident set; what importing alone takes is measured beside it and given
both with and without, for PyTorch with CUDA takes more than these files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch

from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override
from tailseg.zoo.mmdet import part_names

CLASSES = 1203
THREE_STAGES = "[{}, {iou: 0.6, weight: 0.5, mask_weight: 0.5}, {iou: 0.7, weight: 0.25, mask_weight: 0.25}]"
CASCADE = (f"model.stages={THREE_STAGES}", "model.box_head.class_agnostic=true")
CASES = {  # recipe overrides, old file format
    "Mask R-CNN R50": ((), False),
    "Mask R-CNN R50, legacy format": ((), True),
    "Cascade Mask R-CNN R101": (("model.backbone.name=resnet101", *CASCADE), False),
}
TARGETS = {"seconds": 10.0, "memory beyond imports": 1.5}
IMPORTS = "import tailseg.cli.main, tailseg.zoo.mmdet, tailseg.zoo.conversion"
# A process's largest resident set is never less than that of the process which started it, so a small one does.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
COPY = "import sys, torch; torch.save(torch.load(sys.argv[1], weights_only=True), sys.argv[2])"


def write_checkpoint(path: Path, recipe: Recipe, *, legacy: bool) -> None:
    """A checkpoint as mmdetection writes it, with the names of its classes but without its configuration."""
    stages = len(recipe.model.stages)
    theirs = {"backbone.net": "backbone"}
    for name, ours in part_names(stages).items():
        if not name.endswith((".weight", ".bias")):  # of single tensors, as FPG has them
            theirs.setdefault(ours, name)
    state = {}
    for key, tensor in build_detector(recipe, CLASSES).state_dict().items():
        parts = key.split(".")
        length = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in theirs)
        name = ".".join([theirs[".".join(parts[:length])], *parts[length:]])
        state[name] = torch.cat([tensor.float(), torch.zeros(1)]) if name.endswith("cum_samples") else tensor
    meta = {"dataset_meta": {"classes": tuple(f"class {i}" for i in range(CLASSES))}}
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=not legacy)


def run(*command: str) -> tuple[float, int]:
    """Seconds and largest resident set (bytes) of a process, which must succeed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", LAUNCH, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return seconds, int(done.stdout.splitlines()[-1]) * 1024


def measure(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    settings, legacy = CASES[name]
    source, out, copy = folder / "checkpoint.pth", folder / "model.safetensors", folder / "copy.pth"
    harness.in_own_process(_write, source, settings, legacy)
    size = source.stat().st_size
    rows: dict[str, list[tuple[float, int]]] = {"imports": [], "convert": [], "copy": []}
    for _ in range(repeats):
        rows["imports"].append(run(sys.executable, "-c", IMPORTS))
        out.unlink(missing_ok=True)
        rows["convert"].append(run(sys.executable, "-m", "tailseg", "convert", "mmdet", str(source), str(out)))
        rows["copy"].append(run(sys.executable, "-c", COPY, str(source), str(copy)))
    seconds = {key: [row[0] for row in values] for key, values in rows.items()}
    memory = {key: max(row[1] for row in values) for key, values in rows.items()}
    result: dict[str, Any] = {
        "bytes": size,
        "seconds": {key: {"min": min(v), "median": statistics.median(v), "max": max(v)} for key, v in seconds.items()},
        "peak_bytes": memory,
        "ratio_of_time_to_copy": statistics.median(
            ours / theirs for ours, theirs in zip(seconds["convert"], seconds["copy"], strict=True)
        ),
        "peak_in_files": memory["convert"] / size,
        "peak_beyond_imports_in_files": (memory["convert"] - memory["imports"]) / size,
    }
    print(
        f"{name}, {size / 1e6:.0f} MB: {result['seconds']['convert']['median']:.1f} s "
        f"({result['ratio_of_time_to_copy']:.2f} x loading and saving it), peak {memory['convert'] / 1e6:.0f} MB = "
        f"{result['peak_in_files']:.2f} x the file; beyond the {memory['imports'] / 1e6:.0f} MB of importing "
        f"{result['peak_beyond_imports_in_files']:.2f} x"
    )
    return result


def _write(path: Path, settings: tuple[str, ...], legacy: bool) -> None:
    write_checkpoint(path, override(resolve("table1/seesaw"), settings), legacy=legacy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "convert-cpu.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": harness.machine(torch.device("cpu")), "targets": TARGETS, "cases": {}}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            result["cases"][name] = measure(name, Path(folder), options.repeats)
    print(f"targets: {TARGETS['seconds']:.0f} s, {TARGETS['memory beyond imports']} x the file beyond imports")
    harness.write_json(options.out, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
