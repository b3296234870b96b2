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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Times:
    """One call: seconds on the clock, and seconds of processor time over all threads.

    The second hardly minds that others use the processor too, so on a shared machine it is the one to compare.
    """

    clock: float
    processor: float


def in_turn(cases: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[Times]]:
    """Times of every call, the cases taking turns (A B A B ...), so that a busy machine is busy for all of them."""
    times: dict[str, list[Times]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            times[name].append(timed(call, device))
    return times


def timed(call: Callable[[], object], device: torch.device) -> Times:
    """Times of one call, the device's work included."""
    wait(device)
    clock, processor = time.perf_counter(), time.process_time()
    call()
    wait(device)
    return Times(time.perf_counter() - clock, time.process_time() - processor)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times: list[Times], images: int) -> dict[str, Any]:
    """Spread of the calls' times, and images a second at the median."""
    clock = _spread([t.clock for t in times])
    return {
        "seconds": clock,
        "processor_seconds": _spread([t.processor for t in times]),
        "calls": len(times),
        "images_per_second": images / clock["median"],
    }


def speedup(ours: list[Times], theirs: list[Times]) -> dict[str, dict[str, float]]:
    """How many times faster we are, by the clock and by processor time: ratio of the medians, and the smallest and
    largest ratio within a turn."""
    return {
        "clock": _ratios([t.clock for t in ours], [t.clock for t in theirs]),
        "processor": _ratios([t.processor for t in ours], [t.processor for t in theirs]),
    }


def _ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    turns = [b / a for a, b in zip(ours, theirs, strict=True)]
    of_medians = statistics.median(theirs) / statistics.median(ours)
    return {"of_medians": of_medians, "smallest": min(turns), "largest": max(turns)}


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


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
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def _forget_peak() -> None:
    """Reset VmHWM, where the system can: making the model may have taken more than the call will."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
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
