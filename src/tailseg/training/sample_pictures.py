"""Pictures for trackers: a few validation images, what is annotated in them beside what the model finds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.batches import collate
from tailseg.data.dataset import DetectionDataset, evaluation_dataset
from tailseg.data.transforms import Compose
from tailseg.model.detector import Detector
from tailseg.recipes.data_section import DataRecipe
from tailseg.visualize.draw import Picture, contact_sheet, draw_detections, draw_instances

PICTURES = 6
FEWEST_SHOWN, MOST_SHOWN = 5, 30  # detections of an image


def sample_pictures(
    detector: Detector, val: Annotations, recipe: DataRecipe, device: torch.device
) -> Iterator[tuple[str, Picture]]:
    """Up to six images, always the same, spread evenly over those of the split that have objects.

    Shown are an image's best detections, as many as there are objects (but at least 5 and at most 30), whatever their
    scores, which stand beside them: early in a run all are low.

    Args:
        detector: in evaluation mode, on ``device``.
        val: the split.
        recipe: its test transform.
        device: where it runs.

    Yields:
        A name, which has the image's id, and the picture (H, W, 3).
    """
    annotated = DetectionDataset(val, Compose(()), drop_empty=False, mask_grid=recipe.mask_grid)
    seen = evaluation_dataset(val, recipe)
    names = [category.name for category in val.categories]
    with_objects = [image for image in range(len(val)) if len(val.rows(image)) > 0]
    chosen = np.linspace(0, len(with_objects) - 1, min(PICTURES, len(with_objects))).round().astype(int)
    for image in (with_objects[place] for place in chosen.tolist()):
        sample = annotated[image]
        picture = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        (found,) = detector.detect(collate([seen[image]], detector.divisor).to(device))
        shown = min(max(len(sample.instances), FEWEST_SHOWN), MOST_SHOWN)
        best = found[torch.arange(min(shown, len(found)), device=found.scores.device)]
        pair = [draw_instances(picture, sample.instances, names), draw_detections(picture, best, names, min_score=0)]
        yield f"val/{val.stated_id(sample.image_id)}", contact_sheet(pair, ["Annotated", "Found"], columns=2)
