"""The demo's objects: what is annotated, what was found, and what became of each annotated object."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.model.boxes import pairwise_iou

FOUND_IOU = 0.5
GROUPS = {"r": "rare", "c": "common", "f": "frequent"}
OUTCOMES = ("right", "look-alike", "other class", "missed")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """Objects of one image with full-size masks; the set's images are small."""

    boxes: NDArray[np.float32]  # (N, 4) xyxy
    labels: NDArray[np.int64]  # (N,)
    masks: NDArray[np.bool_]  # (N, H, W)


def annotated_objects(annotations: Annotations) -> dict[int, Objects]:
    """Position in the file -> its annotated objects, for images that have any."""
    truth = {}
    for image in range(len(annotations)):
        rows = annotations.rows(image)
        if len(rows) == 0:
            continue
        height, width = annotations.image_sizes[image].tolist()
        masks = [decode_mask(annotations.segmentation(row), height, width) for row in rows]
        truth[image] = Objects(annotations.boxes[rows], annotations.labels[rows], np.stack(masks))
    return truth


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """(H, W) the mask of an annotation or a detection."""
    counts = segmentation.decode() if isinstance(segmentation, bytes) else segmentation
    decoded: NDArray[np.uint8] = rle.decode({"size": [height, width], "counts": counts})
    return decoded.astype(bool)


def best_detections(annotations: Annotations, path: Path, truth: dict[int, Objects]) -> dict[int, Objects]:
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
        masks = [decode_mask(row["segmentation"]["counts"], height, width) for row in kept]
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), bool)
        best[image] = Objects(boxes, annotations.category_id_to_label(ids), stacked)
    return best


def is_found(objects: Objects, detections: Objects) -> NDArray[np.bool_]:
    """(N,): whether a detection of the object's class overlaps it enough."""
    if len(detections.labels) == 0:
        return np.zeros(len(objects.labels), bool)
    iou = pairwise_iou(torch.from_numpy(objects.boxes), torch.from_numpy(detections.boxes)).numpy()
    same = objects.labels[:, None] == detections.labels[None]
    hit: NDArray[np.bool_] = ((iou >= FOUND_IOU) & same).any(axis=1)
    return hit


# ---------------------------------------------------------------------------------------------------------
# What became of the objects


@dataclass(frozen=True, slots=True, eq=False)
class Fates:
    """Of M annotated objects, in the order of the file."""

    labels: NDArray[np.int64]  # (M,)
    claims: NDArray[np.int64]  # (M,) label of the best detection on it among an image's first ones, -1 if there is none
    scores: NDArray[np.float64]  # (M,) of the best detection of its own class on it, among all; 0 if there is none
    bars: NDArray[np.float64]  # (images,) score of the last detection that the limit admits; 0 where it does not bind


def fates(annotations: Annotations, path: Path, limit: int) -> Fates:
    """Look up every annotated object in a results file, whose rows of an image are in the order of score.

    A detection is on an object if their boxes overlap with an IoU of 0.5.
    """
    rows: dict[int, list[dict[str, Any]]] = {annotations.image_id(i): [] for i in range(len(annotations))}
    for row in orjson.loads(path.read_bytes()):
        rows[row["image_id"]].append(row)
    labels: list[int] = []
    claims: list[int] = []
    scores: list[float] = []
    bars: list[float] = []
    for image in range(len(annotations)):
        own = annotations.rows(image)
        found = rows[annotations.image_id(image)]
        bars.append(found[limit - 1]["score"] if len(found) >= limit else 0.0)
        boxes = np.array([row["bbox"] for row in found], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        named = annotations.category_id_to_label(np.array([row["category_id"] for row in found], np.int64))
        on = pairwise_iou(torch.from_numpy(annotations.boxes[own]), torch.from_numpy(boxes)).numpy() >= FOUND_IOU
        for label, hits in zip(annotations.labels[own].tolist(), on, strict=True):
            places = np.flatnonzero(hits)
            admitted = places[places < limit]
            mine = places[named[places] == label]
            labels.append(label)
            claims.append(int(named[admitted[0]]) if len(admitted) else -1)
            scores.append(found[mine[0]]["score"] if len(mine) else 0.0)
    return Fates(np.array(labels, np.int64), np.array(claims, np.int64), np.array(scores), np.array(bars))


def look_alikes(names: list[str]) -> NDArray[np.bool_]:
    """(C, C) whether two classes of the built-in set differ in one of texture, colour and shape."""
    parts = np.array([name.split("_", 2) for name in names])
    same: NDArray[np.bool_] = (parts[:, None] == parts[None]).sum(axis=2) == 2
    return same


def outcomes(found: Fates, alike: NDArray[np.bool_], groups: list[str]) -> dict[str, Any]:
    """By frequency group: how many objects came to which end, and quantiles of the scores of their own class."""
    of_object = np.array(groups)[found.labels]
    right = found.claims == found.labels
    missed = found.claims < 0
    confused = ~missed & ~right & alike[found.labels, np.maximum(found.claims, 0)]
    ends = dict(zip(OUTCOMES, (right, confused, ~(right | confused | missed), missed), strict=True))
    return {
        "ends": {g: {end: int((of_object == g)[which].sum()) for end, which in ends.items()} for g in GROUPS},
        "scores": {g: _quantiles(found.scores[of_object == g]) for g in GROUPS},
        "bar": float(np.median(found.bars)) if len(found.bars) else 0.0,
    }


def _quantiles(scores: NDArray[np.float64]) -> list[float]:
    return np.quantile(scores, QUANTILES).tolist() if len(scores) else []


def confusion(before: Fates, after: Fates, alike: NDArray[np.bool_], groups: list[str]) -> dict[str, Any] | None:
    """The rare class that one look-alike takes most objects of, and both counts with each method; None without any."""
    pairs = Counter(
        (label, claim)
        for label, claim in zip(before.labels.tolist(), before.claims.tolist(), strict=True)
        if claim >= 0 and alike[label, claim] and groups[label] == "r"
    )
    if not pairs:
        return None
    (label, other), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
    counts = [
        {
            "right": int((f.claims[f.labels == label] == label).sum()),
            "taken": int((f.claims[f.labels == label] == other).sum()),
        }
        for f in (before, after)
    ]
    return {"label": label, "other": other, "objects": int((before.labels == label).sum()), "counts": counts}
