"""What the benchmarks share: timing in turn, peak memory in a process of its own, the machine, JSON."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

RESULTS = Path(__file__).resolve().parent / "results"


def in_turn(
    cases: dict[str, Callable[[], object]], repeats: int, device: torch.device, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, the cases taking turns (A B A B ...), so that a busy machine is busy for all of them."""
    for _ in range(warmups):
        for call in cases.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            seconds[name].append(timed(call, device))
    return seconds


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: list[float], images: int) -> dict[str, Any]:
    """Spread of the calls' times, and images a second at the median."""
    median = statistics.median(seconds)
    return {
        "seconds": {"min": min(seconds), "median": median, "max": max(seconds)},
        "calls": len(seconds),
        "images_per_second": images / median,
    }


def speedup(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times faster we are: ratio of the medians, and the extremes of the ratios within a turn."""
    turns = [b / a for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(theirs) / statistics.median(ours)
    return {"of_medians": ratio, "smallest_of_a_turn": min(turns), "largest_of_a_turn": max(turns)}


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """The value of ``function(*args)`` computed in a fresh process: what it allocates is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes at its peak: allocated by torch on CUDA (what was there before included), growth of
    the resident set over what was there before on CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    _forget_peak()
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _forget_peak() -> None:
    """Let VmHWM begin anew, where the system can: making the model may have taken more than the call will."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status. Elsewhere than on Linux: the peak so far, for want of the present."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        about |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return about


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def require_device(name: str) -> torch.device:
    """The device, or an end with one sentence where there is none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device on this machine; run with --device cpu.")
    return device


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
