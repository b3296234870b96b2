"""The main job on the built-in data: cross-entropy and Seesaw trained alike, scored, compared and shown."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tailseg.checkpoint import VERSION
from tailseg.cli.demo_objects import (
    Objects,
    annotated_objects,
    best_detections,
    confusion,
    fates,
    is_found,
    look_alikes,
    outcomes,
)
from tailseg.data.annotations.annotations import Annotations
from tailseg.data.images import read_image
from tailseg.data.sources import SYNTHETIC, DataSplits, draw_synthetic, open_data
from tailseg.data.synthetic.generate import SyntheticSettings
from tailseg.devices import find_device
from tailseg.errors import UserError
from tailseg.evaluation.metrics import ScoreOptions, score, write_json
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override
from tailseg.training.loop import train
from tailseg.visualize.demo_page import write_report
from tailseg.visualize.draw import contact_sheet, draw_objects

logger = logging.getLogger(__name__)

METHODS = {"cross-entropy": "Cross-entropy", "seesaw": "Seesaw"}
IN_SENTENCE = {"cross-entropy": "cross-entropy", "seesaw": "Seesaw"}
PICTURES = 6  # of what only one method found, for each method
# Smaller than what `--data synthetic` means, and so are the heads: two runs in minutes on two cores.
DATA = SyntheticSettings(train_images=4000, val_images=300, size=96)
QUICK_DATA = SyntheticSettings(classes=12, train_images=160, val_images=40, size=96)  # 20 steps: all of it runs
BUDGET = (
    *("schedule.epochs=1", "training.evaluate_every=1"),
    *(f"data.short_edges=[{DATA.size}]", f"data.test_short_edge={DATA.size}", f"data.long_edge={DATA.size}"),
    *("model.neck.channels=32", "model.mask_head.channels=32"),
    *("model.box_head.rois=32", "model.box_head.max_positive=8"),
)
BEYOND = 4  # times the limit of detections that the recipes set are kept, to show what the limit does


def run_demo(
    out: Path,
    *,
    seeds: int = 1,
    quick: bool = False,
    device: str = "auto",
    show: bool = True,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Train both methods with the same seeds and budget; write results.json, report.html and pictures into ``out``.

    Args:
        out: folder, which must not hold a demo yet.
        seeds: runs of each method.
        quick: train on 160 pictures only, to see whether everything runs.
        device: where they train (see `find_device`).
        show: show progress.
        settings: recipe overrides, the same for both methods.

    Returns:
        The content of results.json.

    Raises:
        UserError: ``out`` holds a demo already or cannot be written, or there is no such device.
    """
    where = find_device(device)
    if (out / "results.json").exists() or (out / "runs").exists():
        raise UserError(f"{out}: already holds a demo; remove it or choose another --out")
    started = time.perf_counter()
    data = replace(open_data(draw_synthetic(QUICK_DATA if quick else DATA, show=show), show=show), name=SYNTHETIC)
    warmup = ["schedule.warmup_steps=5"] if quick else []
    recipes = {method: resolve(f"demo/{method}", (*BUDGET, *warmup, *settings)) for method in METHODS}
    limit = recipes["seesaw"].test.max_detections
    recipes = {m: override(recipe, [f"test.max_detections={BEYOND * limit}"]) for m, recipe in recipes.items()}
    methods: dict[str, Any] = {method: {"title": title, "runs": []} for method, title in METHODS.items()}
    for seed in range(seeds):
        for method, recipe in recipes.items():
            folder = out / "runs" / f"{method}-{seed}"
            logger.info("%s, seed %d", METHODS[method], seed)
            methods[method]["runs"].append(_run(recipe, data, folder, seed, limit, where, show))
    results = {
        "version": VERSION,
        "command": f"tailseg demo --seeds {seeds}{' --quick' if quick else ''}",
        "quick": quick,
        "dataset": _describe(data, recipes["seesaw"]),
        "budget": {},
        "seeds": list(range(seeds)),
        "limit": {"detections": limit, "beyond": BEYOND * limit},
        "methods": methods,
        "why": _why(data, methods, limit),
        "pictures": _pictures(data, {m: methods[m]["runs"][0]["detections"] for m in METHODS}, out),
    }
    results["budget"] = _budget(recipes["seesaw"], methods, time.perf_counter() - started, where)
    write_json(out / "results.json", results)
    write_report(results, out)
    return results


def _run(
    recipe: Recipe, data: DataSplits, folder: Path, seed: int, limit: int, device: torch.device, show: bool
) -> dict[str, Any]:
    """Train one method with one seed, and score it with the limit of detections and beyond."""
    started = time.perf_counter()
    beyond = train(recipe, data, folder, seed=seed, device=device, show=show)
    if beyond is None:
        raise UserError(f"{folder}: its last evaluation failed, as said above; remove {folder} and start again")
    assert data.train is not None
    assert data.val is not None
    images, instances = _training_counts(data.train)
    scores = score(data.val, folder / "detections.json", options=ScoreOptions(max_dets=limit), mask_areas=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seed": seed,
        "metrics": scores.metrics,
        "beyond": beyond.metrics,
        "per_category": [
            {**row, "train_images": images[row["id"]], "train_instances": instances[row["id"]]}
            for row in scores.per_category
        ],
        "curves": [
            {key: value for key, value in row.items() if key not in ("lr", "images_per_second", "gradient", "silent")}
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


def _why(data: DataSplits, methods: dict[str, Any], limit: int) -> dict[str, Any]:
    """What became of the validation objects with each method's first run."""
    assert data.train is not None
    assert data.val is not None
    names = [category.name for category in data.train.categories]
    groups: list[str] = [category.frequency for category in data.train.categories]
    alike = look_alikes(names)
    found = {m: fates(data.val, Path(method["runs"][0]["detections"]), limit) for m, method in methods.items()}
    example = confusion(found["cross-entropy"], found["seesaw"], alike, groups)
    if example is not None:
        counts = [data.train.categories[example[key]].image_count for key in ("label", "other")]
        example |= {"label": names[example["label"]], "other": names[example["other"]], "train_images": counts}
    return {"outcomes": {m: outcomes(of_method, alike, groups) for m, of_method in found.items()}, "example": example}


def _budget(recipe: Recipe, methods: dict[str, Any], seconds: float, device: torch.device) -> dict[str, Any]:
    steps = methods["seesaw"]["runs"][0]["curves"][-1]["step"]
    names = {"cuda": lambda: torch.cuda.get_device_name(device), "mps": lambda: "Apple GPU"}
    name = names.get(device.type, lambda: f"CPU, {torch.get_num_threads()} threads")()
    return {
        "epochs": recipe.schedule.epochs,
        "steps": steps,
        "images_seen": steps * recipe.data.batch * recipe.training.accumulate,
        "device": name,
        "seconds": seconds,
    }


def _pictures(data: DataSplits, detections: dict[str, str], out: Path) -> list[dict[str, Any]]:
    """Pictures of objects that one method found and the other did not, rarest classes first.

    Scores of the two losses are not on one scale. So an image with n annotated objects shows the n best detections
    of each method, and an object is found if one of them has its class and overlaps its box with an IoU of 0.5.
    """
    assert data.train is not None
    assert data.val is not None
    val = data.val
    truth = annotated_objects(val)
    found = {method: best_detections(val, Path(path), truth) for method, path in detections.items()}
    counts = np.array([category.image_count for category in data.train.categories])
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for method, other in (("seesaw", "cross-entropy"), ("cross-entropy", "seesaw")):
        gains = []
        for image, objects in truth.items():
            mine = is_found(objects, found[method][image])
            theirs = is_found(objects, found[other][image])
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


def _draw_panels(annotations: Annotations, image: int, truth: Objects, found: dict[str, Objects], path: Path) -> None:
    """Annotation, cross-entropy and Seesaw side by side."""
    names = [category.name for category in annotations.categories]
    picture = read_image(annotations.image_path(image))
    panels = {"Annotated": truth, **{METHODS[method]: objects for method, objects in found.items()}}
    drawn = [draw_objects(picture, o.boxes, o.labels, o.masks, names) for o in panels.values()]
    Image.fromarray(contact_sheet(drawn, list(panels), columns=3)).save(path, quality=88)
