"""An exported model in the place of a detector: what `tailseg predict` and `tailseg eval` run of an ONNX file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from tailseg.data.annotations.annotations import Category
from tailseg.errors import UserError
from tailseg.model.detector import EVERYTHING, Wanted
from tailseg.recipes.model_header import recipe_in
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed
from tailseg.runtime import OnnxModel
from tailseg.structures import Batch, RawDetections


class ExportedModel:
    """Detections of an ONNX file by onnxruntime, with the entrances of `Detector` that predicting and scoring use.

    Thresholds and limits are those of its export: detections can be chosen among what it finds, no more of them found.
    """

    training = False

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.divisor = model.about.divisor
        self.size = model.about.size
        self.nms_iou = model.about.nms_iou
        self.max_detections = model.about.max_detections
        self.device = torch.device("cpu")

    def eval(self) -> ExportedModel:
        """Nothing to switch: it never trains."""
        return self

    def train(self, mode: bool = True) -> ExportedModel:
        """Likewise."""
        assert not mode
        return self

    def detect(self, batch: Batch, wanted: Wanted = EVERYTHING) -> list[RawDetections]:
        """Detections of each image, in pixels of the image file, best score first."""
        found = []
        for image, image_hw, original in zip(batch.images, batch.image_sizes, batch.original_sizes, strict=True):
            height, width = image_hw.tolist()
            pixels = image.numpy() if self.size is None else self.model.padded(image[:, :height, :width].numpy())
            boxes, scores, labels, masks, *own = map(torch.from_numpy, self.model.run(pixels, (height, width)))
            raw = RawDetections(
                image_hw=(int(original[0]), int(original[1])),
                boxes=boxes * (original / image_hw).flip(0).repeat(2),
                scores=scores,
                labels=labels,
                masks=masks,
                mask_scores=own[0] if own else None,
            )
            found.append(_chosen(raw, wanted))
        return found


def _chosen(raw: RawDetections, wanted: Wanted) -> RawDetections:
    kept = torch.ones(len(raw), dtype=torch.bool)
    if wanted.threshold is not None:
        kept &= raw.scores > wanted.threshold
    if wanted.class_scores is not None:
        kept &= raw.scores >= raw.scores.new_tensor(wanted.class_scores)[raw.labels]
    if wanted.labels is not None:
        kept &= torch.isin(raw.labels, torch.tensor(wanted.labels))
    return raw[kept.nonzero().squeeze(1)[: wanted.limit]]


def is_exported(model: str | Path) -> bool:
    """Whether the path of a model is that of an ONNX file."""
    return Path(model).suffix.lower() == ".onnx"


def load_exported(path: Path) -> tuple[ExportedModel, Recipe, tuple[Category, ...]]:
    """An ONNX file with the recipe and the categories that it carries; views are not looked at.

    Raises:
        UserError: it is missing, damaged, or none that `tailseg export` wrote.
    """
    model = OnnxModel(path)
    header = {"tailseg": model.about.version, **asdict(model.about)}
    recipe = recipe_in(header, path)
    edges = {"data.test_short_edge": model.about.short_edge, "data.long_edge": model.about.long_edge}
    if (recipe.data.test_short_edge, recipe.data.long_edge) != tuple(edges.values()):
        raise UserError(f"{path}: its metadata contradict each other; it was edited: export it again")
    categories = tuple(Category(**row) for row in model.about.classes)
    return ExportedModel(model), changed(recipe, {"test.tta": False}), categories
