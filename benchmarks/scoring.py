"""Time and memory of scoring a run of LVIS val's size, boxes and masks, beside lvis-api on a tenth of it.

    python benchmarks/scoring.py                  # CPU, ten minutes, 4 GB of disk

Annotations and detections are generated: 20,000 images x 300 detections, 1,203 classes, written as two processes would
write them, merged, and scored by `tailseg score`. The named alternative is lvis-api 0.5.3, in turn with ours on a
tenth of the images; its time for all of them is ten times that, for it takes longer than one wants to wait, and more
memory than there may be. Times and largest resident sets are of whole processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import orjson
import torch
from convert import run
from rle import detections as shapes

from tailseg.layers.paste import encode_masks

CLASSES = 1203
SIZE = (480, 640)
FAMILIES, MEMBERS = 400, 12
JUDGED = 0.3
TARGETS = {"speedup": 10.0, "peak_bytes": 8e9, "difference": 1e-9}
MERGE = """
import sys
from pathlib import Path
from tailseg.evaluation.results import merge_results
merge_results([Path(part) for part in sys.argv[2:]], Path(sys.argv[1]))
"""
OFFICIAL = """
import json, sys
import numpy as np
np.float = float  # lvis-api is older than NumPy 1.24
from lvis import LVIS, LVISEval, LVISResults
metrics = {}
truth = LVIS(sys.argv[1])
for kind in ("bbox", "segm"):
    evaluation = LVISEval(truth, LVISResults(truth, sys.argv[2]), kind)
    evaluation.run()
    metrics[kind] = {name.replace("@", ""): float(value) for name, value in evaluation.results.items()}
json.dump(metrics, open(sys.argv[3], "w"))
"""


def generate(folder: Path, images: int, per_image: int, judged: float, seed: int = 0) -> None:
    """``annotations.json``, and results of two processes, ``part.0.json`` and ``part.1.json``.

    Shapes come from a pool of families: annotations take the first of a family, the detections of an object others of
    the same family, so that they overlap. An image has about 12 objects of 4 classes, and 8 classes verified absent.

    Args:
        folder: where to write.
        images: how many.
        per_image: detections of each image.
        judged: of the detections that are not of an object, the share of a class annotated or verified absent in
            the image; the others are left out by the rules of LVIS.
        seed: of all random numbers.
    """
    rng = np.random.default_rng(seed)
    texts, polygons = _pool(seed)
    common = 1 / np.arange(1, CLASSES + 1)
    common /= common.sum()
    order = rng.permutation(CLASSES) + 1
    image_rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    scores = [b"%.6f" % value for value in np.linspace(0, 1, 100_001)]
    with (folder / "part.0.json").open("wb") as even, (folder / "part.1.json").open("wb") as odd:
        even.write(b"[")
        odd.write(b"[")
        for image_id in range(1, images + 1):
            classes = np.unique(order[rng.choice(CLASSES, 4, p=common)])
            absent = np.setdiff1d(order[rng.choice(CLASSES, 8, p=common)], classes)
            image_rows.append(
                {
                    "id": image_id, "height": SIZE[0], "width": SIZE[1],
                    "neg_category_ids": absent.tolist(), "not_exhaustive_category_ids": classes[:1].tolist(),
                }
            )  # fmt: skip
            objects = rng.integers(0, FAMILIES, rng.poisson(12) + 1)
            labels = rng.choice(classes, len(objects))
            for family, label in zip(objects.tolist(), labels.tolist(), strict=True):
                place = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label}
                annotations.append(place | polygons[family])
            looked_for = np.concatenate([classes, absent])
            picks = rng.integers(0, len(objects), per_image)
            right = rng.random(per_image) < 0.15
            found = np.where(
                right, labels[picks],
                np.where(
                    rng.random(per_image) < judged,
                    rng.choice(looked_for, per_image),
                    rng.integers(1, CLASSES + 1, per_image),
                ),
            )  # fmt: skip
            families = np.where(right, objects[picks], rng.integers(0, FAMILIES, per_image))
            shape = families * MEMBERS + rng.integers(1, MEMBERS, per_image)
            # Few scores are high; right ones are higher. Five digits: ties happen.
            value = (1e5 * rng.beta(np.where(right, 2, 0.6), 3)).astype(int)
            start = b'{"image_id":%d,"category_id":' % image_id
            rows = [
                b'%b%d,%b,"score":%b}' % (start, label, texts[i], scores[s])
                for label, i, s in zip(found.tolist(), shape.tolist(), value.tolist(), strict=True)
            ]
            file = odd if image_id % 2 else even
            file.write((b"\n" if image_id <= 2 else b",\n") + b",\n".join(rows))
        even.write(b"\n]\n")
        odd.write(b"\n]\n")
    categories = [
        {"id": int(c), "name": f"class {c}", "frequency": "f" if place < 400 else "c" if place < 860 else "r"}
        for place, c in enumerate(order)
    ]
    categories.sort(key=lambda row: row["id"])
    content = {"images": image_rows, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_bytes(orjson.dumps(content))


def _pool(seed: int) -> tuple[list[bytes], list[dict[str, Any]]]:
    """For each of the shapes the JSON of box and mask; for each family an annotation's box, polygon and area."""
    probs, base = shapes(FAMILIES, SIZE, seed)
    rng = torch.Generator().manual_seed(seed)
    sides = (base[:, 2:] - base[:, :2]).repeat(1, 2)
    jitter = torch.randn(FAMILIES, MEMBERS, 4, generator=rng) * 0.06
    jitter[:, 0] = 0
    boxes = (base[:, None] + jitter * sides[:, None]).flatten(0, 1).clamp(min=0)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    codes = encode_masks(probs.repeat_interleave(MEMBERS, 0), boxes, SIZE)
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).numpy()
    texts = [
        orjson.dumps({"bbox": box, "segmentation": code}, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        for box, code in zip(xywh, codes, strict=True)
    ]
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1) * 0.45 + 0.5
    polygons = []
    for x, y, w, h in xywh[::MEMBERS].tolist():
        points = ring * [w, h] + [x, y]
        area = float(np.pi * 0.45**2 * w * h)
        polygons.append({"bbox": [x, y, w, h], "area": area, "segmentation": [points.round(2).ravel().tolist()]})
    return texts, polygons


def score(annotations: Path, detections: Path, out: Path) -> tuple[float, int]:
    """Seconds and peak bytes of `tailseg score`."""
    command = ("-m", "tailseg", "score", str(annotations), str(detections), "--out", str(out))
    return run(sys.executable, *command)


def measure(folder: Path, images: int, per_image: int, repeats: int, *, official: bool) -> dict[str, Any]:
    """Merging and scoring a generated run, in turn with lvis-api if ``official``."""
    harness.in_own_process(generate, folder, images, per_image, JUDGED)
    annotations, detections, ours = folder / "annotations.json", folder / "detections.json", folder / "ours.json"
    parts = [str(folder / f"part.{i}.json") for i in (0, 1)]
    rows: dict[str, list[tuple[float, int]]] = {"ours": [], "lvis-api": []}
    merged = run(sys.executable, "-c", MERGE, str(detections), *parts)
    theirs = folder / "theirs.json"
    for _ in range(repeats):
        rows["ours"].append(score(annotations, detections, ours))
        if official:
            files = (str(annotations), str(detections), str(theirs))
            rows["lvis-api"].append(run(sys.executable, "-c", OFFICIAL, *files))
    result: dict[str, Any] = {
        "images": images,
        "detections": images * per_image,
        "bytes": detections.stat().st_size,
        "merging": {"seconds": merged[0], "peak_bytes": merged[1]},
    }
    for name, values in rows.items():
        if values:
            seconds = [value[0] for value in values]
            result[name] = {
                "seconds": {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)},
                "peak_bytes": max(value[1] for value in values),
            }
            print(
                f"{images} images, {name}: {_range(seconds)} s, peak {result[name]['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    if official:
        result["difference"] = largest_difference(json.loads(ours.read_text()), json.loads(theirs.read_text()))
        print(f"largest difference of a metric: {result['difference']:.1e}")
    return result


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Over all metrics; where nothing was measured ours is None and theirs -1."""
    largest: float = max(
        abs((-1 if ours[kind][name] is None else ours[kind][name]) - value)
        for kind in theirs
        for name, value in theirs[kind].items()
    )
    return largest


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--detections", type=int, default=300, help="of each image")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "scoring-cpu.json")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": harness.machine(torch.device("cpu")), "targets": TARGETS}
    for name, images in (("tenth", options.images // 10), ("all", options.images)):
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measure(Path(folder), images, options.detections, options.repeats, official=name == "tenth")
    theirs = [result["tenth"]["lvis-api"]["seconds"][key] for key in ("min", "median", "max")]
    ours = [result["all"]["ours"]["seconds"][key] for key in ("max", "median", "min")]
    smallest, median, largest = (10 * a / b for a, b in zip(theirs, ours, strict=True))
    result["speedup"] = {"smallest": smallest, "of_medians": median, "largest": largest}
    merging = result["all"]["merging"]
    print(
        f"{median:.0f} x faster ({smallest:.0f} to {largest:.0f}), lvis-api taken as ten times a tenth; "
        f"merging {merging['seconds']:.0f} s, peak {merging['peak_bytes'] / 1e9:.2f} GB"
    )
    harness.write_json(options.out, result)


if __name__ == "__main__":
    main()
