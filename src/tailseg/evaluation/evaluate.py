"""Run a detector over a split and score it by the LVIS rules; detections are encoded as they come."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tailseg.data.dataset import DetectionDataset
from tailseg.data.loading import eval_loader
from tailseg.data.transforms import Image
from tailseg.evaluation.behind import behind
from tailseg.evaluation.metrics import DEFAULT, ScoreOptions, Scores, remove_scores, score, write_scores
from tailseg.evaluation.results import ResultsWriter, merge_results
from tailseg.evaluation.tta import View, detect_views
from tailseg.model.detector import Detector
from tailseg.progress import progress_bar
from tailseg.structures import Batch, RawDetections

logger = logging.getLogger(__name__)


class Detecting(Protocol):
    """What is scored: a `Detector`, or something else with these entrances of it."""

    divisor: int
    training: bool

    def eval(self) -> Any:
        """Switch to evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, or back."""

    def detect(self, batch: Batch) -> list[RawDetections]:
        """Detections of each image, in pixels of the image file, best score first."""


def evaluate(
    detector: Detecting,
    dataset: DetectionDataset,
    out: Path,
    *,
    device: torch.device,
    batch_size: int = 1,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    autocast: bool = False,
    views: Sequence[View] = (),
    category_ids: Sequence[int | None] | None = None,
    frequencies: Mapping[int, str] | None = None,
    train_images: Mapping[int, int] | None = None,
    options: ScoreOptions = DEFAULT,
    show: bool = True,
) -> Scores | None:
    """Write ``out/detections.json``, ``out/metrics.json`` and ``out/classes.csv``.

    Images without any annotation, such as those of a test server, leave nothing to score: then only the first is
    written, and the scores hold nothing. What earlier scores left of these names, or of an analysis, does not stay.

    Every process detects its share of the images; process 0 merges the shares, scores them and returns the
    scores, the others return None.

    Args:
        detector: in any mode; it is put back as it was.
        dataset: the split, with the recipe's test transform; with views, untransformed.
        out: folder, made if absent.
        device: of the detector.
        batch_size: images at a time; with views it is one.
        workers: loader processes. With views they read the images, and the views are made here, one at a time.
        rank: this process.
        world: number of processes.
        barrier: waits for all processes.
        autocast: detect in bfloat16.
        views: average over these of each image (see `detect_views`); by default there is the one of the dataset.
        category_ids: (C,) the data's category id of each label; detections of a label without one are left out. By
            default the labels are the data set's own.
        frequencies: group of each category id; by default that of the data set's categories.
        train_images: number of training images of each category id, for the table of classes.
        options: what is measured; ``analyse`` writes ``out/analysis.json`` and ``out/thresholds.json``.
        show: draw a progress bar.

    Raises:
        ValueError: views are asked for, but the dataset has resized the images.
    """
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".detections.{rank}.json"
    labels = dataset.annotations.label_to_category_id.tolist() if category_ids is None else category_ids
    known = torch.tensor([category_id is not None for category_id in labels], device=device)
    ids = [-1 if category_id is None else int(category_id) for category_id in labels]
    was_training = detector.training
    detector.eval()
    if views:
        loader = eval_loader(dataset, 1, rank, world, workers, divisor=1)
        if rank == 0:
            logger.info("Test-time augmentation: %d views of each image.", len(views))
    else:
        loader = eval_loader(dataset, batch_size, rank, world, workers, detector.divisor)
    done, started = 0, time.perf_counter()
    with (
        ResultsWriter(part) as writer,
        progress_bar("evaluating", len(dataset), show=show) as advance,
        behind(partial(_write, writer, None if None not in labels else known, ids), device) as write,
    ):
        for batch in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                if views:
                    assert isinstance(detector, Detector)  # views are made of its parts
                    found = [detect_views(detector, _whole_picture(batch), views)]
                else:
                    found = detector.detect(batch.to(device))
            for image_id, detections in zip(batch.image_ids.tolist(), found, strict=True):
                write(dataset.annotations.stated_id(image_id), detections)
            done += len(batch) * world
            advance(done, f"{done / (time.perf_counter() - started):.1f} images/s")
    detector.train(was_training)
    barrier()
    if rank != 0:
        return None
    parts = [out / f".detections.{r}.json" for r in range(world)]
    merge_results(parts, out / "detections.json")
    for path in parts:
        path.unlink()
    annotations = dataset.annotations
    if not len(annotations.labels):
        logger.warning(
            "%s: has no annotations, so there is nothing to score; send %s to the test server.",
            annotations.path, out / "detections.json",
        )  # fmt: skip
        remove_scores(out / "metrics.json")
        return Scores(metrics={}, per_category=[])
    scores = score(
        annotations,
        out / "detections.json",
        options=options,
        frequencies=frequencies or {category.id: category.frequency for category in annotations.categories},
        train_images=train_images,
        mask_areas=True,
    )
    write_scores(scores, out / "metrics.json")
    return scores


def _write(
    writer: ResultsWriter, known: Tensor | None, ids: Sequence[int], image_id: int, detections: RawDetections
) -> None:
    """Write the detections whose label is ``known`` (C,), or all."""
    # Not moved: the run-length codes are made where the masks are.
    writer.add(image_id, detections if known is None else detections[known[detections.labels]], ids)


def _whole_picture(batch: Batch) -> Image:
    """The picture (H, W, 3) of a batch of one, as the file has it."""
    height, width = batch.original_sizes[0].tolist()
    if batch.images.shape != (1, 3, height, width):
        received = f"{tuple(batch.images.shape[2:])} for a file of {(height, width)}"
        raise ValueError(f"views are made of images as the files have them; received one of {received}")
    return np.ascontiguousarray(batch.images[0].permute(1, 2, 0).numpy())
