"""Time and memory of comparing two runs with paired bootstrap intervals, beside scoring every resampled set.

    python benchmarks/comparing.py                  # CPU, 2,000 images x 300 detections, minutes, 1 GB of disk

Annotations and detections are generated as for scoring.py; the second run has other scores in every third row. The
named alternative is to repeat the images of each set and to run `tailseg score` on them, once a set and run; its time
is that of scoring one run once, times their number. Times and largest resident sets are of whole processes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from convert import run
from scoring import JUDGED, generate

from tailseg.evaluation.results import merge_results

TARGETS = {"peak_bytes_at_20_000_images": 4e9}
SCORE = re.compile(rb'"score":0\.(\d)\d')


def prepare(folder: Path, images: int, per_image: int) -> None:
    """``annotations.json``, ``first.json`` and ``second.json``."""
    generate(folder, images, per_image, JUDGED)
    merge_results([folder / f"part.{i}.json" for i in (0, 1)], folder / "first.json")
    with (folder / "first.json").open("rb") as first, (folder / "second.json").open("wb") as second:
        for number, line in enumerate(first):
            digit = b"%d" % (number // 3 % 10)
            second.write(line if number % 3 else SCORE.sub(rb'"score":0.\g<1>' + digit, line))


def measure(folder: Path, images: int, per_image: int) -> dict[str, Any]:
    """Comparing, and scoring once."""
    harness.in_own_process(prepare, folder, images, per_image)
    annotations, first, second = (str(folder / f"{name}.json") for name in ("annotations", "first", "second"))
    command = (sys.executable, "-m", "tailseg")
    scored = run(*command, "score", annotations, first, "--out", str(folder / "scores.json"))
    compared = run(*command, "compare", first, second, "--annotations", annotations, "--out", str(folder / "out"))
    content = json.loads((folder / "out" / "comparison.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    differences = [
        abs((row["runs"][0] or 0) - (scores[kind][row["metric"]] or 0))
        for kind, tables in content["kinds"].items()
        for row in tables["metrics"]
    ]
    alternative = 2 * content["sets"] * scored[0]
    return {
        **{"images": images, "detections": images * per_image, "runs": 2, "sets": content["sets"]},
        "compare": {"seconds": compared[0], "peak_bytes": compared[1]},
        "score": {"seconds": scored[0], "peak_bytes": scored[1]},
        "scoring_every_set": {"seconds": alternative},
        "speedup": alternative / compared[0],
        "largest_difference_to_score": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--detections", type=int, default=300, help="of each image")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "comparing-cpu.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": harness.machine(torch.device("cpu")), "targets": TARGETS}
    with tempfile.TemporaryDirectory() as folder:
        result |= measure(Path(folder), options.images, options.detections)
    print(
        f"{options.images} images, {result['sets']} sets: {result['compare']['seconds']:.0f} s, peak "
        f"{result['compare']['peak_bytes'] / 1e9:.2f} GB; {result['speedup']:.0f} x faster than scoring every set"
    )
    harness.write_json(options.out, result)


if __name__ == "__main__":
    main()
