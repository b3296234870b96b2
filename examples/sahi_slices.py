"""The objects of a large picture with SAHI, and how `slices=` of tailseg compares.

    pip install tailseg && pip install --no-deps sahi && pip install click fire requests shapely tqdm
    python examples/sahi_slices.py MODEL PICTURE [--side 640]

`TailsegModel` is what SAHI's `get_sliced_prediction`, `get_prediction` and `predict` take as their model. SAHI asks for
opencv-python, which would lie over the opencv-python-headless of tailseg; with `--no-deps` it takes that one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sahi.models.base import DetectionModel
from sahi.predict import get_sliced_prediction
from sahi.prediction import ObjectPrediction
from sahi.utils.cv import get_coco_segmentation_from_bool_mask

import tailseg

Picture = NDArray[np.uint8]  # (H, W, 3) RGB


class TailsegModel(DetectionModel):  # type: ignore[misc]  # its types are not read
    """A model file of tailseg for SAHI: ``TailsegModel(model_path="m.safetensors", confidence_threshold=0.3)``.

    Or a loaded one: ``TailsegModel(model=model)``. Categories have the ids of the annotation file.
    """

    def load_model(self) -> None:
        """Read the file."""
        self.set_model(tailseg.load(self.model_path, self.device))

    def set_model(self, model: tailseg.Model, **_: Any) -> None:
        """Take a loaded model, where it is."""
        self.model = model
        self.category_mapping = {str(category.id): category.name for category in model.categories}

    def perform_inference(self, image: Picture) -> None:
        """Detect in one picture."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[Picture]) -> None:
        """Detect in pictures, all at once."""
        found = self.model.predict(images, score=self.confidence_threshold, batch=len(images))
        self._original_predictions = found

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = None, full_shape_list: Any = None
    ) -> None:
        shifts = np.reshape([0, 0] if shift_amount_list is None else shift_amount_list, (-1, 2)).tolist()
        shapes = [list(found.image_hw) for found in self._original_predictions]
        if full_shape_list is not None:
            shapes = np.reshape(full_shape_list, (-1, 2)).tolist()
        self._object_prediction_list_per_image = [
            [_converted(one, shift, shape) for one in found]
            for found, shift, shape in zip(self._original_predictions, shifts, shapes, strict=True)
        ]


def _converted(one: tailseg.Detections, shift: list[int], shape: list[int]) -> ObjectPrediction:
    """One object; a mask in which SAHI sees no outline (too thin) leaves its box."""
    return ObjectPrediction(
        bbox=one.boxes[0].tolist(),
        segmentation=get_coco_segmentation_from_bool_mask(one.masks[0].numpy()) or None,
        category_id=one.category_ids[0],
        category_name=one.names[0],
        score=one.scores.item(),
        shift_amount=shift,
        full_shape=shape,
    )


def main(arguments: list[str] | None = None) -> None:
    """Print how many objects each way finds, and the seconds that it takes."""
    parser = argparse.ArgumentParser(description="Objects of a large picture with SAHI, and with slices of tailseg.")
    parser.add_argument("model", help="a model file of tailseg")
    parser.add_argument("picture", help="an image file")
    parser.add_argument("--side", type=int, default=640, help="of a slice in pixels (default 640)")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score of an object (default 0.5)")
    given = parser.parse_args(arguments)
    model, side = tailseg.load(given.model), given.side
    picture = np.asarray(Image.open(given.picture).convert("RGB"))
    start = time.perf_counter()
    theirs = get_sliced_prediction(
        picture, TailsegModel(model=model, confidence_threshold=given.score), side, side, batch_size=8, verbose=0
    )
    middle = time.perf_counter()
    ours = model.predict(picture, score=given.score, slices=side)
    print(f"SAHI: {len(theirs.object_prediction_list)} objects, {middle - start:.2f} s")
    print(f"tailseg: {len(ours)} objects, {time.perf_counter() - middle:.2f} s")


if __name__ == "__main__":
    main()
