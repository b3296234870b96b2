"""Prediction on a long stream of pictures: does memory stay where it is, and what do batches bring?

    python benchmarks/predicting.py                       # CPU, some minutes of two cores
    python benchmarks/predicting.py --device cuda
    python benchmarks/predicting.py --photos ../shared/data/coco128-lvis/images      # files instead

Memory: a generator hands `Model.predict` ten thousand small pictures, one after the other, and looks at every result.
The resident set is read at each tenth of the way; what it grew from the first tenth to the highest later reading is
what the stream keeps. Beside it stands what a list of the same results would keep.

Time: batches of ``--batch`` pictures against one at a time, through `Model.predict` in both cases, in turn, on pictures
of one size.

Files: the drawn pictures and the JSON for ``--timed`` photographs, as `tailseg predict` writes them, against a loop
that saves each result of `Model.predict` before it asks for the next one.

The model is `demo/seesaw` with random weights; its threshold is 0, so that every picture has ``--detections`` objects.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import harness
import numpy as np
import torch
from numpy.typing import NDArray

import tailseg
from tailseg.checkpoint import save_model
from tailseg.data.annotations.annotations import Category
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.model.build import build_detector
from tailseg.predict.writing import Request, predict_files
from tailseg.recipes.resolve import resolve

CLASSES = 20


def pictures(count: int, side: int) -> Iterator[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 256, (side, side, 3), np.uint8)


def random_model(options: argparse.Namespace) -> tailseg.Model:
    """By way of a file, as users come by one."""
    torch.manual_seed(0)
    settings = [
        "model.backbone.pretrained=false",
        "model.backbone.frozen_stages=-1",
        "test.score_threshold=0",
        *options.set,
    ]
    recipe = resolve("demo/seesaw", [*settings, f"test.max_detections={options.detections}"])
    categories = tuple(Category(i + 1, f"class {i}", "f", 20, 20) for i in range(CLASSES))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        save_model(path, build_detector(recipe, CLASSES), recipe, categories, step=0)
        return tailseg.load(path, options.device)


def stream_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Resident bytes along a stream."""
    model = random_model(options)
    readings, objects, kept = [], 0, 0
    tenth = max(1, options.pictures // 10)
    for done, found in enumerate(model.predict(pictures(options.pictures, options.side), batch=options.batch), start=1):
        objects += len(found)
        raw = found.raw
        kept += found.picture.nbytes + sum(t.nbytes for t in (raw.boxes, raw.scores, raw.labels, raw.masks))
        if done % tenth == 0:
            readings.append(harness.resident("VmRSS"))
    return {
        "pictures": options.pictures,
        "objects": objects,
        "resident_bytes": readings,
        "growth_bytes": max(readings[1:], default=readings[0]) - readings[0],
        "as_a_list_bytes": kept,
    }


def batch_times(options: argparse.Namespace) -> dict[str, Any]:
    model, device = random_model(options), torch.device(options.device)
    few = list(pictures(options.timed, options.side))
    cases = {
        "batched": lambda: model.predict(few, batch=options.batch),
        "one at a time": lambda: model.predict(few, batch=1),
    }
    harness.in_turn(cases, 1, device)  # the first calls allocate
    times = harness.in_turn(cases, options.repeats, device)
    return {
        **{name: harness.summary(each, options.timed) for name, each in times.items()},
        "speedup": harness.speedup(times["batched"], times["one at a time"]),
    }


def file_times(options: argparse.Namespace) -> dict[str, Any]:
    model, device = random_model(options), torch.device(options.device)
    photos = sorted(str(f) for f in options.photos.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)[: options.timed]
    if not photos:
        sys.exit(f"predicting.py: {options.photos}: holds no picture; name a folder of JPEG or PNG files with --photos")
    with tempfile.TemporaryDirectory() as folder:
        one_by_one, at_once = Path(folder) / "loop", Path(folder) / "files"
        one_by_one.mkdir()

        def loop() -> None:
            for found in model.predict(iter(photos), batch=options.batch):
                stem = one_by_one / Path(str(found.source)).stem
                found.save(stem.with_suffix(".png"))
                found.save(stem.with_suffix(".json"))

        def files() -> None:
            predict_files(model, Request(photos, min_score=0, show=False), at_once)

        cases = {"tailseg predict": files, "a loop that saves": loop}
        harness.in_turn(cases, 1, device)
        differ = [f.name for f in at_once.iterdir() if f.read_bytes() != (one_by_one / f.name).read_bytes()]
        times = harness.in_turn(cases, options.repeats, device)
    return {
        "photos": len(photos),
        "files_that_differ": len(differ),
        **{name: harness.summary(each, len(photos)) for name, each in times.items()},
        "speedup": harness.speedup(times["tailseg predict"], times["a loop that saves"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=64, help="of a picture, in pixels")
    parser.add_argument("--detections", type=int, default=20, help="of a picture")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--timed", type=int, default=64, help="pictures of a timed call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", action="append", default=["data={test_short_edge: 64, long_edge: 64}"])
    parser.add_argument("--photos", type=Path, help="folder of pictures; only files are timed then")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = harness.require_device(options.device)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "photos", "pictures")}
    content: dict[str, Any] = {"machine": harness.machine(device), "settings": settings}
    if options.photos is not None:
        content["files"] = files = file_times(options)
        ratio = files["speedup"]["clock"]
        print(
            f"files of {files['photos']} photographs: x {ratio['of_medians']:.2f} ({ratio['smallest']:.2f}-"
            f"{ratio['largest']:.2f}) as fast as a loop that saves each result "
            f"({files['tailseg predict']['images_per_second']:.1f} pictures/s; {files['files_that_differ']} differ)"
        )
        harness.write_json(options.out or harness.RESULTS / f"predicting-files-{device.type}.json", content)
        return
    content["memory"] = memory = harness.in_own_process(stream_memory, options)
    growth, kept = memory["growth_bytes"], memory["as_a_list_bytes"]
    print(
        f"{memory['pictures']} pictures, {memory['objects']} objects: resident memory grew by {growth / 2**20:.1f} MiB"
    )
    print(f"from the first tenth on; a list of the results would hold {kept / 2**20:.0f} MiB")
    times = batch_times(options)
    ratio = times["speedup"]["clock"]
    print(
        f"batches of {options.batch}: x {ratio['of_medians']:.2f} ({ratio['smallest']:.2f}-{ratio['largest']:.2f}) "
        f"as fast as one at a time ({times['one at a time']['images_per_second']:.1f} pictures/s)"
    )
    content["time"] = times
    harness.write_json(options.out or harness.RESULTS / f"predicting-{device.type}.json", content)


if __name__ == "__main__":
    main()
