"""The main job on the built-in data: cross-entropy and Seesaw trained alike, scored, compared and shown."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from hotcoco import mask as rle
from numpy.typing import NDArray
from PIL import Image

from tailseg.checkpoint import VERSION
from tailseg.data.annotations.annotations import Annotations
from tailseg.data.images import read_image
from tailseg.data.sources import SYNTHETIC, DataSplits, open_source
from tailseg.errors import UserError
from tailseg.evaluation.metrics import write_json
from tailseg.model.boxes import pairwise_iou
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.training.loop import train
from tailseg.visualize.comparison_page import write_report
from tailseg.visualize.draw import contact_sheet, draw_objects

logger = logging.getLogger(__name__)

METHODS = {"cross-entropy": "Cross-entropy", "seesaw": "Seesaw"}
IN_SENTENCE = {"cross-entropy": "cross-entropy", "seesaw": "Seesaw"}
PICTURES = 6  # of what only one method found, for each method
FOUND_IOU = 0.5


def run_demo(out: Path, *, seeds: int = 1, show: bool = True, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Train both methods with the same seeds and budget; write results.json, report.html and pictures into ``out``.

    Args:
        out: folder, which must not hold a demo yet.
        seeds: runs of each method.
        show: draw progress bars.
        settings: recipe overrides, the same for both methods.

    Returns:
        The content of results.json.

    Raises:
        UserError: ``out`` holds a demo already or cannot be written.
    """
    if (out / "results.json").exists() or (out / "runs").exists():
        raise UserError(f"{out}: already holds a demo; remove it or choose another --out")
    started = time.perf_counter()
    data = open_source(SYNTHETIC, show=show)
    recipes = {method: resolve(f"demo/{method}", settings) for method in METHODS}
    methods: dict[str, Any] = {method: {"title": title, "runs": []} for method, title in METHODS.items()}
    for seed in range(seeds):
        for method, recipe in recipes.items():
            folder = out / "runs" / f"{method}-{seed}"
            logger.info("%s, seed %d", METHODS[method], seed)
            methods[method]["runs"].append(_run(recipe, data, folder, seed, show))
    results = {
        "version": VERSION,
        "command": f"tailseg demo --seeds {seeds}",
        "dataset": _describe(data, recipes["seesaw"]),
        "budget": {},
        "seeds": list(range(seeds)),
        "methods": methods,
        "pictures": _pictures(data, {m: methods[m]["runs"][0]["detections"] for m in METHODS}, out),
    }
    results["budget"] = _budget(recipes["seesaw"], methods, time.perf_counter() - started)
    write_json(out / "results.json", results)
    write_report(results, out)
    return results


def _run(recipe: Recipe, data: DataSplits, folder: Path, seed: int, show: bool) -> dict[str, Any]:
    """Train and score one method with one seed."""
    started = time.perf_counter()
    scores = train(recipe, data, folder, seed=seed, show=show)
    if scores is None:
        raise UserError(f"{folder}: its last evaluation failed, as said above; remove {folder} and start again")
    assert data.train is not None
    images, instances = _training_counts(data.train)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "metrics": scores.metrics,
        "per_category": [
            {**row, "train_images": images[row["id"]], "train_instances": instances[row["id"]]}
            for row in scores.per_category
        ],
        "curves": [
            {key: value for key, value in row.items() if key not in ("lr", "images_per_second")}
            for row in rows
            if "loss" in row
        ],
        "seconds": time.perf_counter() - started,
        "checkpoint": str(folder / "last.safetensors"),
        "detections": str(folder / "detections.json"),
    }


def _training_counts(train: Annotations) -> tuple[dict[int, int], dict[int, int]]:
    """Training images and instances of each category id."""
    return (
        {category.id: category.image_count for category in train.categories},
        {category.id: category.instance_count for category in train.categories},
    )


def _describe(data: DataSplits, recipe: Recipe) -> dict[str, Any]:
    assert data.train is not None
    assert data.val is not None
    groups = [category.frequency for category in data.train.categories]
    return {
        "name": data.name,
        "classes": len(groups),
        "train_images": len(data.train),
        "val_images": len(data.val),
        "image_size": recipe.data.test_short_edge,
        "frequency_classes": {group: groups.count(group) for group in ("r", "c", "f")},
    }


def _budget(recipe: Recipe, methods: dict[str, Any], seconds: float) -> dict[str, Any]:
    steps = methods["seesaw"]["runs"][0]["curves"][-1]["step"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "epochs": recipe.schedule.epochs,
        "steps": steps,
        "images_seen": steps * recipe.data.batch_per_device * recipe.training.accumulate,
        "device": device,
        "seconds": seconds,
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Objects:
    """Objects of one image with full-size masks; the set's images are small."""

    boxes: NDArray[np.float32]  # (N, 4) xyxy
    labels: NDArray[np.int64]  # (N,)
    masks: NDArray[np.bool_]  # (N, H, W)


def _pictures(data: DataSplits, detections: dict[str, str], out: Path) -> list[dict[str, Any]]:
    """Pictures of objects that one method found and the other did not, rarest classes first.

    Scores of the two losses are not on one scale. So an image with n annotated objects shows the n best detections
    of each method, and an object is found if one of them has its class and overlaps its box with an IoU of 0.5.
    """
    assert data.train is not None
    assert data.val is not None
    val = data.val
    truth = _annotated(val)
    found = {method: _best_detections(val, Path(path), truth) for method, path in detections.items()}
    counts = np.array([category.image_count for category in data.train.categories])
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for method, other in (("seesaw", "cross-entropy"), ("cross-entropy", "seesaw")):
        gains = []
        for image, objects in truth.items():
            mine = _is_found(objects, found[method][image])
            theirs = _is_found(objects, found[other][image])
            gains += [(counts[objects.labels[i]], image, i) for i in np.flatnonzero(mine & ~theirs)]
        shown: set[int] = set()  # classes, for variety
        for count, image, index in sorted(gains):
            label = int(truth[image].labels[index])
            if label in shown or len(shown) == PICTURES:
                continue
            shown.add(label)
            category = data.train.categories[label]
            name = f"only-{method}-{len(shown)}.jpg"
            _draw_panels(val, image, truth[image], {m: found[m][image] for m in METHODS}, folder / name)
            caption = (
                f"Only {IN_SENTENCE[method]} found the {category.name.replace('_', ' ')}, "
                f"a class of {count} training image{'s' if count != 1 else ''}. "
                f"Of all {sum(map(len, (o.labels for o in truth.values())))} objects, "
                f"{len(gains)} were found by {IN_SENTENCE[method]} alone."
            )
            pictures.append({"file": f"pictures/{name}", "caption": caption, "kind": f"only-{method}"})
    return pictures


def _annotated(annotations: Annotations) -> dict[int, _Objects]:
    """Position in the file -> its annotated objects, for images that have any."""
    truth = {}
    for image in range(len(annotations)):
        rows = annotations.rows(image)
        if len(rows) == 0:
            continue
        height, width = annotations.image_sizes[image].tolist()
        masks = [_decode(annotations.segmentation(row), height, width) for row in rows]
        truth[image] = _Objects(annotations.boxes[rows], annotations.labels[rows], np.stack(masks))
    return truth


def _decode(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    counts = segmentation.decode() if isinstance(segmentation, bytes) else segmentation
    decoded: NDArray[np.uint8] = rle.decode({"size": [height, width], "counts": counts})
    return decoded.astype(bool)


def _best_detections(annotations: Annotations, path: Path, truth: dict[int, _Objects]) -> dict[int, _Objects]:
    """The n best detections of each image, n being the number of its annotated objects."""
    position = {annotations.image_id(i): i for i in range(len(annotations))}
    rows: dict[int, list[dict[str, Any]]] = {image: [] for image in truth}
    for row in orjson.loads(path.read_bytes()):  # in the order of score within an image
        image = position[row["image_id"]]
        if image in truth and len(rows[image]) < len(truth[image].labels):
            rows[image].append(row)
    best = {}
    for image, kept in rows.items():
        height, width = annotations.image_sizes[image].tolist()
        boxes = np.array([row["bbox"] for row in kept], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ids = np.array([row["category_id"] for row in kept], np.int64)
        masks = [_decode(row["segmentation"]["counts"], height, width) for row in kept]
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), bool)
        best[image] = _Objects(boxes, annotations.category_id_to_label(ids), stacked)
    return best


def _is_found(objects: _Objects, detections: _Objects) -> NDArray[np.bool_]:
    """(N,): whether a detection of the object's class overlaps it enough."""
    if len(detections.labels) == 0:
        return np.zeros(len(objects.labels), bool)
    iou = pairwise_iou(torch.from_numpy(objects.boxes), torch.from_numpy(detections.boxes)).numpy()
    same = objects.labels[:, None] == detections.labels[None]
    hit: NDArray[np.bool_] = ((iou >= FOUND_IOU) & same).any(axis=1)
    return hit


def _draw_panels(annotations: Annotations, image: int, truth: _Objects, found: dict[str, _Objects], path: Path) -> None:
    """Annotation, cross-entropy and Seesaw side by side."""
    names = [category.name for category in annotations.categories]
    picture = read_image(annotations.image_path(image))
    panels = {"Annotated": truth, **{METHODS[method]: objects for method, objects in found.items()}}
    drawn = [draw_objects(picture, o.boxes, o.labels, o.masks, names) for o in panels.values()]
    Image.fromarray(contact_sheet(drawn, list(panels), columns=3)).save(path, quality=88)
