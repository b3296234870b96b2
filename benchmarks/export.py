"""Exported models beside PyTorch: the largest differences, file sizes and processor seconds, all in one run.

Weights are random (of a seed), with classifiers whose scores spread; photographs are those given.

    python benchmarks/export.py table2/04-htc-lite table1/seesaw --photos ../shared/data/coco128-lvis/images/val2017
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tailseg.checkpoint import VERSION
from tailseg.data.annotations.annotations import Category
from tailseg.data.batches import batch_of
from tailseg.data.images import IMAGE_SUFFIXES, read_image
from tailseg.data.transforms import fit_transform
from tailseg.errors import UserError
from tailseg.export.job import about_model, export, write_openvino
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.predict.model import Model
from tailseg.recipes.resolve import resolve
from tailseg.runtime import OnnxModel
from tailseg.structures import Batch

Arrays = list[NDArray[Any]]


def spread(detector: Detector) -> None:
    """Scores that differ clearly, as those of a trained model do: larger weights of the classifiers and masks."""
    for name, part in detector.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and name.rpartition(".")[2] in ("classifier", "predictor"):
            nn.init.normal_(part.weight, std=0.15)


def compared(found: Arrays, expected: Arrays) -> dict[str, float]:
    """Largest differences of the detections that both have, found by class and box, and the number of the others."""
    differences, alone = {"box": 0.0, "score": 0.0, "mask": 0.0}, 0
    for i in range(len(expected[0])):
        same = np.flatnonzero(found[2] == expected[2][i])
        gaps = np.abs(found[0][same] - expected[0][i]).max(axis=1, initial=0)
        if not len(same) or gaps.min() > 1:
            alone += 1
            continue
        j = same[gaps.argmin()]
        pairs = {"box": (found[0][j], expected[0][i]), "score": (found[1][j], expected[1][i])}
        pairs["mask"] = (found[3][j], expected[3][i])
        for name, (one, other) in pairs.items():
            differences[name] = max(differences[name], float(np.abs(one - other).max()))
    return {**differences, "found": len(expected[0]), "alone": alone}


def timed(run: Callable[[Batch], Arrays], batches: list[Batch]) -> tuple[list[Arrays], float]:
    """Results for each picture, and the fewest processor seconds after a first run: other programs hardly count."""
    results, times = [run(batches[0])], []
    for batch in batches:
        start = time.process_time()
        results.append(run(batch))
        times.append(time.process_time() - start)
    return results[1:], min(times)


def measure(
    name: str, settings: list[str], classes: int, size: tuple[int, int] | None, photos: list[Path]
) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    recipe = resolve(name, ["model.backbone.pretrained=false", "test.tta=false", *settings])
    detector = build_detector(recipe, classes).eval()
    spread(detector)
    categories = tuple(Category(i + 1, f"class {i}", "c", 1, 1) for i in range(classes))
    model = Model(detector, recipe, categories)
    transform = fit_transform(recipe.data.test_short_edge, recipe.data.long_edge, size)
    pictures = [read_image(photo) for photo in photos]
    batches = [batch_of(picture, transform, detector.divisor) for picture in pictures]
    row: dict[str, Any] = {"recipe": name, "size": size or "any", "classes": classes}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        out = Path(folder) / "model.onnx"
        start = time.process_time()
        export(model, "onnx", out, size=size)
        row |= {"export_s": time.process_time() - start, "onnx_MB": out.stat().st_size / 1e6}
        onnx_model = OnnxModel(out)
        if size is not None:
            batches = [_padded(batch, onnx_model) for batch in batches]
        expected, row["torch_s"] = timed(lambda batch: _of_torch(detector, batch), batches)
        found, row["onnxruntime_s"] = timed(lambda batch: onnx_model.run(*_inputs(batch)), batches)
        row["onnxruntime"] = _worst([compared(*pair) for pair in zip(found, expected, strict=True)])
        import openvino

        try:
            write_openvino(out, out.with_suffix(".xml"), about_model(model, size), half=False)
        except UserError as error:
            return row | {"openvino": str(error)}
        compiled = openvino.Core().compile_model(
            out.with_suffix(".xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        )

        def by_openvino(batch: Batch) -> Arrays:
            image, image_hw = _inputs(batch)
            answer = compiled([image, np.array(image_hw)])
            return [answer[key].copy() for key in ("boxes", "scores", "labels", "masks")]

        found, row["openvino_s"] = timed(by_openvino, batches)
        row["openvino"] = _worst([compared(*pair) for pair in zip(found, expected, strict=True)])
    return row


def _padded(batch: Batch, model: OnnxModel) -> Batch:
    return replace(batch, images=torch.from_numpy(model.padded(batch.images[0].numpy()))[None])


def _inputs(batch: Batch) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    height, width = batch.image_sizes[0].tolist()
    return batch.images[0].numpy(), (height, width)


def _of_torch(detector: Detector, batch: Batch) -> Arrays:
    (raw,) = detector.detect(replace(batch, original_sizes=batch.image_sizes))
    return [value.numpy() for value in (raw.boxes, raw.scores, raw.labels, raw.masks)]


def _worst(rows: list[dict[str, float]]) -> dict[str, float]:
    sums = {key: sum(row[key] for row in rows) for key in ("found", "alone")}
    return {key: max(row[key] for row in rows) for key in ("box", "score", "mask")} | sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--number", type=int, default=2, help="of pictures")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--size", type=int, nargs=2, help="height and width; without it, any")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    options = parser.parse_args()
    photos = sorted(f for f in options.photos.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)[: options.number]
    size = None if options.size is None else (options.size[0], options.size[1])
    for name in options.recipes:
        row = measure(name, options.settings, options.classes, size, photos)
        line = json.dumps({**row, "version": VERSION, "threads": torch.get_num_threads()})
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
