"""A validation set of coloured discs, evaluated: what is right and wrong in it can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from colour_model import CATEGORIES, drawn
from hotcoco import mask as rle
from PIL import Image

from tailseg.data.annotations.annotations import load_annotations
from tailseg.evaluation.metrics import ScoreOptions, score, write_scores

FORK, CUP, OWL = (category.id for category in CATEGORIES)
# Of each image: annotated and found discs, x, y, radius, label; scores of the found ones. The best threshold is 0.8.
IMAGES = {
    3: ([(30, 30, 20, 0), (90, 60, 20, 2)], [(30, 30, 20, 0), (90, 60, 20, 2)], [0.9, 0.8]),  # all right
    5: ([(30, 30, 20, 0), (90, 60, 20, 1)], [(30, 30, 20, 2), (90, 20, 10, 0)], [0.9, 0.7]),  # an owl on a fork
    9: ([], [(60, 50, 20, 2)], [0.85]),
}


def write_set(folder: Path) -> None:
    """Write val.json, images/, and the evaluation's folder `saved`."""
    (folder / "images").mkdir(parents=True)
    images, annotations, rows = [], [], []
    for image_id, (truth, found, scores) in IMAGES.items():
        name = f"{image_id}.png"
        Image.fromarray(drawn(96, 128, truth)).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": 96, "width": 128})
        for disc in truth:
            mask, box = mask_of(disc)
            own = {"id": len(annotations) + 1, "image_id": image_id, "category_id": CATEGORIES[disc[3]].id}
            annotations.append(own | {"segmentation": mask, "bbox": box, "area": int(rle.area(mask)), "iscrowd": 0})
        for disc, value in zip(found, scores, strict=True):
            mask, box = mask_of(disc)
            own = {"image_id": image_id, "category_id": CATEGORIES[disc[3]].id, "score": value}
            rows.append(own | {"segmentation": mask, "bbox": box})
    categories = [
        {"id": one.id, "name": one.name, "frequency": one.frequency, "image_count": one.image_count}
        for one in CATEGORIES
    ]
    val = folder / "val.json"
    val.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    saved = folder / "saved"
    saved.mkdir()
    (saved / "detections.json").write_text(json.dumps(rows))
    options = ScoreOptions(analyse=True)
    scores_ = score(load_annotations(val, folder / "images"), saved / "detections.json", options=options)
    write_scores(scores_, saved / "metrics.json")


def mask_of(disc: tuple[int, int, int, int]) -> tuple[dict[str, object], list[int]]:
    """Run-length code and box, x, y, width, height."""
    x, y, radius, _ = disc
    grey = drawn(96, 128, [])
    bitmap = np.asfortranarray((drawn(96, 128, [disc]) != grey).any(2).astype(np.uint8))
    code = rle.encode(bitmap)
    counts = code["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    return {"size": [96, 128], "counts": text}, [x - radius, y - radius, 2 * radius + 1, 2 * radius + 1]
