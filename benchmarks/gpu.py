"""Everything there is to measure and test on a CUDA device, by one command and into one JSON.

    python benchmarks/gpu.py [--parts tests rows]

Runs the tests marked ``gpu`` and every benchmark of this folder on the device, asks where a training step waits for it,
and writes benchmarks/results/gpu.json after each part; of a part that is cut off, what there was lies beside it. With
``--parts`` the others are kept as recorded there. Exit code 1 if there is no device, a benchmark fails or a test does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import harness
import torch

if TYPE_CHECKING:
    from throughput import Settings

HERE = Path(__file__).resolve().parent
ENTRY = "table2/10-seesaw"
LARGEST = "74.5"  # GiB: 80 GB
RUNS = {  # name in the JSON -> script and arguments; --out is added
    "rows": ("rows.py", "--device", "cuda", "--precision", "bf16", "--memory", LARGEST),
    "throughput-bf16": ("throughput.py", "--device", "cuda", "--precision", "bf16", "--repeats", "10"),
    "throughput-fp32": ("throughput.py", "--device", "cuda", "--precision", "fp32", "--repeats", "10"),
    "profile-fp32": ("throughput.py", "--device", "cuda", "--profile", "--repeats", "10"),
    "fpg": ("fpg.py", "--device", "cuda", "--precision", "bf16", "--size", "1280", "1280"),
    "graphs": ("graphs.py",),
    "losses": ("losses.py", "--device", "cuda"),
    "nms": ("nms.py", "--device", "cuda", "--repeats", "50"),
    "roi_align": ("roi_align.py", "--device", "cuda", "--precision", "bf16", "--stages", "3", "--repeats", "30"),
    "rle": ("rle.py", "--device", "cuda", "--detections", "600", "--size", "960", "1280"),
    "carafe-fp32": ("carafe.py", "--device", "cuda", "--precision", "fp32"),
    "carafe-bf16": ("carafe.py", "--device", "cuda", "--precision", "bf16"),
    "tsd": ("tsd.py", "--device", "cuda"),
    "htc_lite": ("htc_lite.py", "--device", "cuda"),
    "tta": ("tta.py", "--device", "cuda", "--edges", "1200", "1400", "1600", "1800", "2000"),
    "finetune": ("finetune.py", "--device", "cuda"),
}
PARTS = ("tests", "waits", *RUNS)
WAIT = "synchronizing CUDA operation"  # in what torch's sync debug mode says


def run_benchmark(arguments: tuple[str, ...], extra: tuple[str, ...], out: Path) -> dict[str, Any]:
    """The JSON that a script writes, and what it said when it failed; it stays in ``out`` if this is cut off."""
    out.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / arguments[0]), *arguments[1:], *extra, "--out", str(out)]
    print("$", *command[1:], flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    content: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        content["failed"] = done.stderr[-2000:]
    out.unlink(missing_ok=True)
    return content


def waits(extra: tuple[str, ...]) -> dict[str, Any]:
    """`waiting_points`, in a process of its own: the debug mode holds for a whole process."""
    command = [sys.executable, str(HERE / "gpu.py"), "--waits", *extra]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"failed": done.stderr[-2000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def waiting_points(size: tuple[int, int]) -> dict[str, Any]:
    """By recipe, where a training step waits for the device: in error mode the first place, in warn mode all."""
    from throughput import Settings

    settings = Settings(
        device="cuda",
        batch=2,
        size=size,
        classes=1203,
        precision="fp32",
        pairs=0,
        objects=12,
        overrides=(),
        threads=torch.get_num_threads(),
    )
    return {recipe: _waits_of(recipe, settings) for recipe in ("table1/seesaw", "table2/06-mask-scoring", ENTRY)}


def _waits_of(recipe: str, settings: Settings) -> dict[str, Any]:
    from throughput import our_detector, scene

    detector, _ = our_detector(recipe, settings, 0)
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1e-7, fused=True)
    batch = scene(settings)[0].to("cuda")
    detector.train()

    def step() -> None:
        torch.stack(list(detector(batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # kernels are loaded and constants copied the first time
    torch.cuda.synchronize()
    return {"error_mode": in_error_mode(step), "all_places": _in_warn_mode(step)}


def in_error_mode(step: Callable[[], object]) -> str:
    """Where a step first waits for the device, if it does; it must have run before, so that kernels are loaded."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if WAIT not in str(error):
            raise
        own = [f for f in traceback.extract_tb(error.__traceback__) if "tailseg" in f.filename]
        return f"stopped at {_place(own[-1].filename, own[-1].lineno)}" if own else f"stopped: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "a whole step runs without waiting"


def _in_warn_mode(step: Callable[[], None]) -> list[str]:
    """Each place with the number of its waits."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [_place(w.filename, w.lineno) for w in caught if WAIT in str(w.message)]
    return [f"{place} ({places.count(place)}x)" for place in dict.fromkeys(places)]


def _place(filename: str, line: int | None) -> str:
    parts = Path(filename).parts
    start = parts.index("tailseg") if "tailseg" in parts else max(len(parts) - 3, 0)
    return f"{'/'.join(parts[start:])}:{line}"


def run_tests() -> dict[str, Any]:
    """Outcome counts of `pytest -m gpu`, and the names of what failed or was skipped."""
    # Not all of tests/, which import what a machine with a GPU may lack.
    files = [
        str(path)
        for path in sorted((HERE.parent / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text("utf-8")
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *files]
        print("$", *command[1:], flush=True)
        done = subprocess.run(command, cwd=HERE.parent)
        if not report.is_file():
            return {"exit_code": done.returncode, "failed": ["pytest did not start"]}
        return {"exit_code": done.returncode, **outcomes(report)}


def outcomes(report: Path) -> dict[str, Any]:
    """Counts and names out of a JUnit report."""
    passed: list[str] = []
    failed: list[str] = []
    skipped: list[str] = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        kinds = {child.tag for child in case}
        group = failed if kinds & {"failure", "error"} else skipped if "skipped" in kinds else passed
        group.append(name)
    return {"passed": len(passed), "failed": failed, "skipped": skipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("H", "W"), help="pixels")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "gpu.json")
    parser.add_argument("--waits", action="store_true", help="only say where a training step waits")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device on this machine, so there is nothing for gpu.py to measure.")
    if options.waits:
        print(json.dumps(waiting_points((options.size[0], options.size[1]))))
        return
    size = ("--size", str(options.size[0]), str(options.size[1]))
    kept = options.out.is_file() and set(options.parts) != set(PARTS)
    result: dict[str, Any] = json.loads(options.out.read_text()) if kept else {}
    machine = harness.machine(torch.device("cuda"))
    for part in options.parts:
        start = time.perf_counter()
        if part == "tests":
            found = run_tests()
        elif part == "waits":
            found = waits(size)
        else:
            extra = size if RUNS[part][0] == "throughput.py" else ()
            found = run_benchmark(RUNS[part], extra, options.out.with_name(f"{options.out.stem}-{part}.json"))
        result[part] = {"machine": machine} | found | {"took_seconds": round(time.perf_counter() - start)}
        harness.write_json(options.out, result)
    broken = [part for part in options.parts if result[part].get("failed") or result[part].get("exit_code")]
    if broken:
        sys.exit(f"Failed: {', '.join(broken)}; see {options.out}.")


if __name__ == "__main__":
    main()
