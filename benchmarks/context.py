"""What a trained model's context encoder knows and what its vector is worth to boxes and masks.

    python benchmarks/context.py runs/a/last.safetensors runs/b/last.safetensors --data synthetic [--out context.json]

Printed for models of several seeds: mean and standard deviation over them.

The encoder's multi-label average precision on the split, the mean over the classes that an image contains: over every
image, where classes that nobody looked for count as absent, and over the verified ones, in which a class is annotated
or known to be absent. Beside it: the mean share of those images that contain the class, and the expected average
precision of a random order, which is higher, above all for classes in few images.

Box and mask AP with the context vector as it is, zeroed, and shuffled, where each image gets another's. Zero is a
vector that the heads have never seen; another image's is one such as they know, and only the information is missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import harness
import numpy as np
import torch
from miniature import gains, spread, table
from torch import Tensor, nn

from tailseg.data.annotations.frequency import GroupRule
from tailseg.data.dataset import DetectionDataset
from tailseg.data.sources import known_categories, open_data
from tailseg.data.transforms import fit_transform
from tailseg.evaluation.evaluate import evaluate
from tailseg.model.context import multilabel_average_precision
from tailseg.model.detector import Detector
from tailseg.predict import Model, load
from tailseg.structures import Batch, RawDetections

VECTORS = {"own": "as it is", "zeroed": "zeroed", "shuffled": "shuffled"}
GROUPS = {"all": "rcf", "rare": "r", "common": "c", "frequent": "f"}
IMAGES = {"every_image": "every image", "verified_images": "verified images"}
COLUMNS = {"average_precision": "AP", "share_of_images": "share of images", "random_order": "AP of a random order"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where `load` puts a model


@dataclass(eq=False)
class Seen:
    """What the encoder said, by image id."""

    logits: dict[int, Tensor] = field(default_factory=dict)  # (C,) each
    vectors: dict[int, Tensor] = field(default_factory=dict)  # (channels,) each


class WithContext(nn.Module):
    """A detector that uses the given context vector of each image, by image id; None: its own.

    What the encoder says is kept in ``seen``.
    """

    def __init__(self, detector: Detector, given: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.divisor = detector.divisor
        self.given = given
        self.seen = Seen()

    def detect(self, batch: Batch) -> list[RawDetections]:
        """`Detector.detect`."""
        ids = batch.image_ids.tolist()

        def replaced(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            logits, own = output
            self.seen.logits |= zip(ids, logits.cpu(), strict=True)
            self.seen.vectors |= zip(ids, own.cpu(), strict=True)
            return logits, own if self.given is None else torch.stack([self.given[i] for i in ids]).to(own)

        assert self.detector.context is not None
        hook = self.detector.context.register_forward_hook(replaced)
        try:
            return self.detector.detect(batch)
        finally:
            hook.remove()


def others(vectors: dict[int, Tensor], seed: int = 0) -> dict[int, Tensor]:
    """The same vectors, each image with that of another: the next one in a random circle."""
    ids = list(vectors)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    return {ids[a]: vectors[ids[b]] for a, b in zip(order, order[1:] + order[:1], strict=True)}


def random_order(positives: Tensor, images: Tensor) -> Tensor:
    """Expected average precision of images in random order, from how many contain the class.

    A positive at rank r finds (r - 1)(P - 1)/(N - 1) of the others before it on average, and every rank is as likely:
    (H + (P - 1)/(N - 1)·(N - H)) / N with H = 1 + 1/2 + ... + 1/N.

    Args:
        positives: (C,) P.
        images: (C,) N.

    Returns:
        (C,) float64.
    """
    harmonic = torch.digamma(images.double() + 1) - torch.digamma(torch.ones((), dtype=torch.float64))
    others_share = (positives - 1) / (images - 1).clamp(min=1)
    return (harmonic + others_share * (images - harmonic)) / images


def presence(dataset: DetectionDataset, categories: list[int]) -> tuple[Tensor, Tensor]:
    """Which images contain each of these category ids, and of which that is known, both (N, C) bool."""
    annotations = dataset.annotations
    columns = annotations.category_id_to_label(np.array(categories, np.int64))
    present = torch.zeros(len(annotations), len(annotations.categories), dtype=torch.bool)
    known = torch.zeros_like(present)
    for image in range(len(annotations)):
        present[image, annotations.labels[annotations.rows(image)]] = True
        known[image] = present[image] | torch.from_numpy(annotations.absent(image))
    return present[:, columns], known[:, columns]


def classification(seen: Seen, dataset: DetectionDataset, known: list[int | None], groups: list[str]) -> dict[str, Any]:
    """The columns of the first table for each choice of images and group of classes, in [0, 1]; None without any class.

    Args:
        seen: of the model's C classes.
        dataset: the split.
        known: (C,) the data's category id of each, None where it has none.
        groups: (C,) "r", "c" or "f" of each.
    """
    numbered = [(label, category_id) for label, category_id in enumerate(known) if category_id is not None]
    labels = [label for label, _ in numbered]
    present, counted = presence(dataset, [category_id for _, category_id in numbered])
    logits = torch.stack([seen.logits[i] for i in dataset.annotations.image_ids.tolist()])[:, labels]
    members = {name: torch.tensor([groups[label] in own for label in labels]) for name, own in GROUPS.items()}
    return {
        "every_image": _by_group(logits, present, torch.ones_like(present), members),
        "verified_images": _by_group(logits, present, counted, members),
    }


def _by_group(logits: Tensor, present: Tensor, counted: Tensor, members: dict[str, Tensor]) -> dict[str, Any]:
    """Means over each group's classes; all inputs are (N, C), members (C,) bool."""
    positives, images = present.sum(0), counted.sum(0)
    columns = {
        "average_precision": multilabel_average_precision(logits, present, counted),
        "share_of_images": positives / images,
        "random_order": random_order(positives, images),
    }
    rows: dict[str, Any] = {}
    for name, own in members.items():
        chosen = own & (positives > 0)
        means = {key: float(column[chosen].mean()) if chosen.any() else None for key, column in columns.items()}
        rows[name] = {"classes": int(chosen.sum())} | means
    return rows


def measure(path: Path, data: str, split: str) -> dict[str, Any]:
    """All that is to be known of one model."""
    model: Model = load(path)
    detector = model.detector
    if not isinstance(detector, Detector) or detector.context is None:
        sys.exit(f"{path}: has no context encoder; give a model of table2/04-htc-lite or a later row.")
    recipe = model.recipe.data
    splits = open_data(data, need=(split,), rule=GroupRule.of(recipe), show=False)
    annotations = splits.val if split == "val" else splits.train
    assert annotations is not None
    resize = fit_transform(recipe.test_short_edge, recipe.long_edge)
    dataset = DetectionDataset(annotations, resize, drop_empty=False)  # with objects: they say what is present
    known = known_categories(dataset.annotations, model.categories, str(path))
    frequencies = {category.id: category.frequency for category in dataset.annotations.categories}
    if not dataset.annotations.frequency_stated and any(category.image_count for category in model.categories):
        learned = zip(known, model.categories, strict=True)
        frequencies |= {category_id: category.frequency for category_id, category in learned if category_id is not None}

    def scores(detector: WithContext) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate(
                cast("Detector", detector),  # only `detect` is called, beside a module's own methods
                dataset,
                Path(folder),
                device=model.device,
                batch_size=recipe.batch,
                category_ids=known,
                frequencies=frequencies,
                show=False,
            )
        assert found is not None
        return found.metrics

    own = WithContext(detector)
    metrics = {"own": scores(own)}
    vectors = own.seen.vectors
    zeros = {image_id: torch.zeros_like(vector) for image_id, vector in vectors.items()}
    metrics["zeroed"] = scores(WithContext(detector, zeros))
    metrics["shuffled"] = scores(WithContext(detector, others(vectors)))
    groups = ["" if category_id is None else frequencies.get(category_id, "") for category_id in known]
    return {"classification": classification(own.seen, dataset, known, groups), "detection": metrics}


def show(models: list[dict[str, Any]]) -> None:
    """Both tables, in percent."""
    print(f"| multi-label, % | classes | {' | '.join(COLUMNS.values())} |\n|---|" + "---:|" * (1 + len(COLUMNS)))
    for images, title in IMAGES.items():
        for group in GROUPS:
            rows = [model["classification"][images][group] for model in models]
            if rows[0]["classes"]:
                cells = [spread([100 * row[column] for row in rows]) for column in COLUMNS]
                print(f"| {title}, {group} | {rows[0]['classes']} | {' | '.join(cells)} |")
    found = {
        key: {"title": f"context {title}", "runs": [model["detection"][key] for model in models]}
        for key, title in VECTORS.items()
    }
    print("\n" + "\n".join(table(found)))
    for key in ("zeroed", "shuffled"):
        print(f"| {VECTORS[key]}, minus as it is | {' | '.join(gains(found[key], found['own']))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="of one recipe, a seed each")
    parser.add_argument("--data", required=True, help="as of `tailseg eval`")
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON; none is written by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = {str(path): measure(path, options.data, options.split) for path in options.models}
    show(list(measured.values()))
    if options.out is not None:
        about = {"data": options.data, "split": options.split, "machine": harness.machine(DEVICE)}
        harness.write_json(options.out, about | {"models": measured})


if __name__ == "__main__":
    main()
