"""The objects of a folder of pictures in FiftyOne, to look at, search and compare there.

    pip install tailseg fiftyone && python examples/fiftyone_results.py MODEL FOLDER [--name tailseg]

FiftyOne stores data sets in MongoDB, which its installation downloads; or in yours, named by FIFTYONE_DATABASE_URI.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import fiftyone

import tailseg


def detections(found: tailseg.Detections) -> fiftyone.Detections:
    """The objects of a picture as FiftyOne keeps them: boxes relative to the picture, masks inside their boxes.

    FiftyOne stretches a mask over its box, so boxes grow to whole pixels, by less than one: masks keep theirs.
    """
    (height, width), rows = found.image_hw, []
    for one in found:
        x1, y1, x2, y2 = one.boxes[0].tolist()
        x, y = min(max(math.floor(x1), 0), width - 1), min(max(math.floor(y1), 0), height - 1)
        right, bottom = max(min(math.ceil(x2), width), x + 1), max(min(math.ceil(y2), height), y + 1)
        box = [x / width, y / height, (right - x) / width, (bottom - y) / height]
        mask = one.masks[0, y:bottom, x:right].numpy()
        rows.append(fiftyone.Detection(label=one.names[0], confidence=one.scores.item(), bounding_box=box, mask=mask))
    return fiftyone.Detections(detections=rows)


def samples(results: Iterable[tailseg.Detections]) -> Iterator[fiftyone.Sample]:
    """A sample for each result of a picture's file, its objects in the field ``tailseg``."""
    for found in results:
        path = Path(found.source or "")
        if not path.is_file():
            raise ValueError(f"{found.source}: FiftyOne opens the files of pictures itself; predict from these")
        yield fiftyone.Sample(filepath=str(path.resolve()), tailseg=detections(found))


def main(arguments: list[str] | None = None) -> None:
    """Store the pictures and their objects as a data set, for ``fiftyone app launch NAME``."""
    parser = argparse.ArgumentParser(description="Objects of a folder of pictures in FiftyOne.")
    parser.add_argument("model", help="a model file of tailseg")
    parser.add_argument("folder", help="with the pictures")
    parser.add_argument("--name", default="tailseg", help="of the data set (default tailseg)")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of an object (default 0.3)")
    given = parser.parse_args(arguments)
    dataset = fiftyone.Dataset(given.name, persistent=True)
    dataset.add_samples(samples(tailseg.load(given.model).predict(given.folder, score=given.score)))
    print(f"{given.name}: {len(dataset)} pictures, {dataset.count('tailseg.detections')} objects")


if __name__ == "__main__":
    main()
