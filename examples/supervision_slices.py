"""The objects of a large picture with supervision's InferenceSlicer, counted and drawn.

    pip install 'tailseg[supervision]' && python examples/supervision_slices.py MODEL PICTURE OUT [--side 640]

`tailseg predict --slices 640` does the same by itself; this is for pipelines that are built on supervision.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
import supervision
from numpy.typing import NDArray
from PIL import Image

import tailseg

Picture = NDArray[np.uint8]  # (H, W, 3) RGB


def slicer(model: tailseg.Model, side: int, score: float = 0.5, overlap: float = 0.2) -> supervision.InferenceSlicer:
    """A function of a picture: ``slicer(model, 640)(picture)``, where ``picture`` is (H, W, 3) uint8 RGB of any size.

    ``side`` is that of a slice in pixels, ``overlap`` the share of it that the next slice shows too.
    """

    def detect(slices: list[Picture]) -> list[supervision.Detections]:
        return [found.to_supervision() for found in model.predict(slices, score=score, batch=len(slices))]

    return supervision.InferenceSlicer(
        detect,
        slice_wh=side,
        overlap_wh=round(overlap * side),
        overlap_filter=supervision.OverlapFilter.NON_MAX_MERGE,  # joins the parts of an object; NMS keeps one
        overlap_metric=supervision.OverlapMetric.IOS,  # overlap by the smaller of two: a part lies inside the whole
        compact_masks=True,  # or every object has a mask of the picture's size
        batch_size=8,  # slices that go through the model together
    )


def main(arguments: list[str] | None = None) -> None:
    """Print how many objects of each class there are and write the drawn picture."""
    parser = argparse.ArgumentParser(description="Objects of a large picture with supervision's InferenceSlicer.")
    parser.add_argument("model", help="a model file of tailseg")
    parser.add_argument("picture", help="an image file")
    parser.add_argument("out", help="the image file to be written")
    parser.add_argument("--side", type=int, default=640, help="of a slice in pixels (default 640)")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score of an object (default 0.5)")
    given = parser.parse_args(arguments)
    picture = np.asarray(Image.open(given.picture).convert("RGB"))
    found = slicer(tailseg.load(given.model), given.side, score=given.score)(picture)
    for name, count in Counter(found.data.get("class_name", [])).most_common():
        print(f"{count:5} {name}")
    drawn = supervision.MaskAnnotator().annotate(picture.copy(), found)
    Image.fromarray(supervision.LabelAnnotator().annotate(drawn, found)).save(given.out)


if __name__ == "__main__":
    main()
