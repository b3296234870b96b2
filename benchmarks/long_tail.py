"""The mitigation factor S against the depth of the tail: classification on fixed features, with LVIS's own counts.

    python benchmarks/long_tail.py [--seeds 3] [--device cuda]

This is classification, not detection: no images, no boxes, no backbone. 1,203 classes with the counts of LVIS v1 train
are clusters of points; every rare and common class lies beside a frequent one. Linear classifiers learn them with
tailseg's losses; candidates of a test image compete for LVIS's 300 detections. Writes
benchmarks/results/long_tail.json, docs/images/long_tail.png and docs/results/long_tail.md; takes
some ten minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from long_tail_page import draw, page
from lvis_size import CATEGORIES, IMAGES
from torch import Tensor, nn

from tailseg.layers.normalized import NormalizedLinear
from tailseg.losses import CLASSIFICATIONS, Classification, ClassStatistics

ROOT = Path(__file__).resolve().parents[1]

# The features; within-class noise is 1 in every direction.
FEATURES = 64
RADIUS = 3.0  # of every class's mean, around the origin
LOOK_ALIKE = 2.5  # a rare or common class's mean from that of the frequent class it resembles
OBJECTNESS = 1.0  # coordinate 0 of an object's mean; of background's it is minus that
PARTIAL = 0.5  # a background candidate is that much of an object
BANK = 100  # different objects kept of a class; one of more objects weighs what all of them weigh

# The test images.
OBJECTS, BACKGROUND = 12, 12  # candidates of an image
NATURAL, FEWEST = 6000, 8  # test objects drawn by frequency, and the fewest of a class
NEGATIVES = 4  # look-alikes, and as many others, that an image is known not to show

# The training.
DEPTHS = {"50:1": 50, "600:1": 600, "2,000:1": 2000, "uncut": None}  # most objects of a class; the rarest has 1
LIMITS: dict[str, int | None] = {"300": 300, "none": None}  # detections of an image
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
STEPS, WARM_UP = 120, 20
MILESTONES = (8 / 12, 11 / 12)  # shares of the steps after which the rate falls to a tenth, as in 1x
BACKGROUND_ROWS = 128
BACKGROUND_SHARE = 3.0  # RoIs of background for each of an object
TRAINING_SEED = 1_000_000  # added to a world's seed: of first weights and samples
TUNING_SEED = 0  # rates are chosen with it; the results are of other seeds
GROUPS = ("r", "c", "f")


@dataclass(frozen=True, slots=True)
class Method:
    """A loss, its options and the layer that its recipe has."""

    title: str
    loss: str
    options: dict[str, float]
    normalized: bool


METHODS = {
    "cross-entropy": Method("Cross-entropy", "cross-entropy", {}, False),
    "eql": Method("EQL", "eql", {}, False),
    "seesaw-p0-linear": Method("Seesaw, p = 0, linear classifier", "seesaw", {"p": 0.0}, False),
    "seesaw-linear": Method("Seesaw, p = 0.8, linear classifier", "seesaw", {}, False),
    "cross-entropy-normalized": Method("Cross-entropy, normalised classifier", "cross-entropy", {}, True),
    "seesaw-p0": Method("Seesaw, p = 0", "seesaw", {"p": 0.0}, True),
    "seesaw": Method("Seesaw, p = 0.8", "seesaw", {}, True),
    "seesaw-q2": Method("Seesaw, p = 0.8, q = 2", "seesaw", {"q": 2.0}, True),
}


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """LVIS's classes, or others."""

    images: Tensor  # (C,) int64
    objects: Tensor  # (C,) int64
    groups: tuple[str, ...]  # C of r, c or f, by images

    def __len__(self) -> int:
        return len(self.groups)

    def cut(self, most: int | None) -> Tensor:
        """Objects (C,), of no class more than ``most``."""
        return self.objects if most is None else self.objects.clamp(max=most)

    def of_group(self, group: str) -> Tensor:
        """Members (C,) bool."""
        return torch.tensor([own == group for own in self.groups])


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Features of one seed, on the device."""

    means: Tensor  # (C, F)
    objects: Tensor  # (C, BANK, F), for training
    candidates: Tensor  # (I, K, F), of the test images
    labels: Tensor  # (I, K) int64, C for background
    evaluated: Tensor  # (I, C) bool: the class is annotated in the image, or known to be absent


def read_counts(path: Path = CATEGORIES) -> Counts:
    """LVIS v1 train's, or an end with one sentence where the file is not there."""
    if not path.is_file():
        sys.exit(f"The counts of LVIS v1 are not at {path}; put lvis_v1_categories.csv there. Nothing was measured.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    images, objects = ([int(row[f"{kind}_count"]) for row in rows] for kind in ("image", "instance"))
    return Counts(torch.tensor(images), torch.tensor(objects), tuple(row["frequency"] for row in rows))


# ---------------------------------------------------------------------------------------------------------
# The features


def look_alikes(counts: Counts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means (C, F) and families (C,): the frequent class that a class resembles, of a frequent one itself."""
    means = torch.randn(len(counts), FEATURES, generator=generator)
    means *= RADIUS / means.norm(dim=1, keepdim=True)
    frequent = counts.of_group("f").nonzero()[:, 0]
    others = (~counts.of_group("f")).nonzero()[:, 0]
    families = torch.arange(len(counts))
    families[others] = frequent[torch.randint(len(frequent), (len(others),), generator=generator)]
    aside = torch.randn(len(others), FEATURES, generator=generator)
    means[others] = means[families[others]] + LOOK_ALIKE * aside / aside.norm(dim=1, keepdim=True)
    means *= RADIUS / means.norm(dim=1, keepdim=True)  # no class is easier for lying farther out
    means[:, 0] = OBJECTNESS
    return means, families


def background(means: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Background candidates (N, F), drawn on the CPU: parts of objects of any class."""
    drawn = torch.randint(len(means), (number,), generator=generator)
    centres = PARTIAL * means[drawn.to(means.device)]
    centres[:, 0] = -OBJECTNESS
    return centres + torch.randn(number, means.shape[1], generator=generator).to(means.device)


def verified(labels: Tensor, families: Tensor, generator: torch.Generator) -> Tensor:
    """Classes (I, C) bool that are evaluated in an image, by LVIS's rule, for objects (I, K) of families (C,).

    Those that are present, and of the absent ones ``NEGATIVES`` look-alikes and as many others.
    """
    images, classes = len(labels), len(families)
    present = torch.zeros(images, classes, dtype=torch.bool).scatter_(1, labels, True)
    of_present = torch.zeros_like(present).scatter_(1, families[labels], True)
    order = torch.rand(images, classes, generator=generator)
    chosen = present.clone()
    for absent in (of_present[:, families] & ~present, ~present):
        top = order.masked_fill(~absent, -1).topk(min(NEGATIVES, classes), dim=1)
        chosen |= torch.zeros_like(present).scatter_(1, top.indices, top.values >= 0)
    return chosen


def make_world(counts: Counts, seed: int, device: torch.device) -> World:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    means, families = look_alikes(counts, generator)
    objects = means.unsqueeze(1) + torch.randn(len(counts), BANK, FEATURES, generator=generator)
    shares = counts.objects.double() / counts.objects.sum()
    labels = torch.arange(len(counts)).repeat_interleave((shares * NATURAL).round().long().clamp(min=FEWEST))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    labels = labels[: len(labels) // OBJECTS * OBJECTS].view(-1, OBJECTS)
    shown = means[labels] + torch.randn(*labels.shape, FEATURES, generator=generator)
    empty = background(means, len(labels) * BACKGROUND, generator).view(len(labels), BACKGROUND, FEATURES)
    none = torch.full((len(labels), BACKGROUND), len(counts))
    return World(
        means.to(device),
        objects.to(device),
        torch.cat([shown, empty], dim=1).to(device),
        torch.cat([labels, none], dim=1).to(device),
        verified(labels, families, generator).to(device),
    )


# ---------------------------------------------------------------------------------------------------------
# The training


def make_loss(method: Method, counts: Counts, most: int | None) -> Classification:
    """A loss that knows the data, cut to ``most`` objects of a class; Seesaw has counted every object once."""
    kind = CLASSIFICATIONS[method.loss]
    objects = counts.cut(most)
    options: dict[str, Any] = dict(method.options)
    if kind.needs_statistics:
        # Images are not cut: EQL spares LVIS's rare and common classes, at every depth.
        options["statistics"] = ClassStatistics(num_images=IMAGES, images=counts.images, instances=objects)
    classification: Any = kind(len(counts), **options)
    if method.loss == "seesaw":
        classification.seesaw.counts.copy_(objects)
    made: Classification = classification.eval()
    return made


def weigh_rows(logits: Tensor, weights: Tensor) -> None:
    """Let each row of logits (R, K) learn as if its sample were there ``weights`` (R,) times.

    Exact for losses that are means over rows: their gradient is a sum over rows.
    """
    logits.register_hook(lambda gradient: gradient * weights.unsqueeze(1))


def sampler_weights(objects: Tensor) -> Tensor:
    """Weights (C + BACKGROUND_ROWS,) of mean 1: how often the random sampler draws what a row stands for."""
    share = torch.full((BACKGROUND_ROWS,), BACKGROUND_SHARE / BACKGROUND_ROWS)
    weights = torch.cat([objects / objects.sum(), share])
    return weights / weights.mean()


def rate_factor(step: int) -> float:
    """Linear warm-up, then the steps of 1x."""
    return min(1.0, (step + 1) / WARM_UP) * 0.1 ** sum(step >= share * STEPS for share in MILESTONES)


def train(
    world: World, counts: Counts, method: Method, most: int | None, rate: float, seed: int
) -> tuple[Classification, nn.Module]:
    """A classifier of fixed features, by the gradient that the random sampler has on average.

    A step sees an object of every class, weighted by the class's number of objects, and background.
    """
    device = world.means.device
    # Not the numbers of the world again: first weights would be the means of the classes.
    generator = torch.Generator().manual_seed(seed + TRAINING_SEED)
    classification = make_loss(method, counts, most).to(device)
    if method.normalized:
        layer: NormalizedLinear | nn.Linear = NormalizedLinear(FEATURES, classification.num_logits)
    else:
        layer = nn.Linear(FEATURES, classification.num_logits)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.constant_(layer.bias, classification.initial_bias)
    layer.to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    objects = counts.cut(most)
    weights = sampler_weights(objects).to(device)
    classes = torch.arange(len(counts), device=device)
    labels = torch.cat([classes, torch.full((BACKGROUND_ROWS,), len(counts), device=device)])
    valid = torch.ones_like(labels, dtype=torch.bool)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * rate_factor(step)
        drawn = (torch.rand(len(counts), generator=generator) * objects.clamp(max=BANK)).long().to(device)
        empty = background(world.means, BACKGROUND_ROWS, generator)
        logits = layer(torch.cat([world.objects[classes, drawn], empty]))
        weigh_rows(logits, weights)
        loss = sum(classification.loss(logits, labels, valid).values(), torch.zeros((), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classification, layer


# ---------------------------------------------------------------------------------------------------------
# The test


def average_precision(scores: Tensor, labels: Tensor, evaluated: Tensor, limit: int | None) -> Tensor:
    """AP (C,) by LVIS's rules, of candidates that are objects or background; no boxes, so no IoU.

    Every candidate of an image is a detection of each class, the best ``limit`` of an image are kept, and those of
    classes that are not evaluated in it are then dropped. 101 recall points; ties count against a class.

    Args:
        scores: (I, K, C) in [0, 1].
        labels: (I, K) int64, C for background.
        evaluated: (I, C) bool, true where a class is present.
        limit: detections of an image; None keeps all.
    """
    images, candidates, classes = scores.shape
    kept = evaluated.unsqueeze(1).expand(scores.shape)
    if limit is not None and limit < candidates * classes:
        least = scores.flatten(1).topk(limit, dim=1).values[:, -1]
        kept = kept & (scores >= least.view(images, 1, 1))
    by_class = scores.masked_fill(~kept, -1).view(-1, classes).T.contiguous()
    of_class = labels.flatten().argsort(stable=True).split(labels.flatten().bincount(minlength=classes + 1).tolist())
    recalls = torch.linspace(0, 1, 101, dtype=torch.float64, device=scores.device) - 1e-12
    result = torch.full((classes,), math.nan, dtype=torch.float64)
    for c, (column, own) in enumerate(zip(by_class, of_class[:classes], strict=True)):
        if len(own) == 0:
            continue
        hits = column[own].sort(descending=True).values
        hits = hits[hits >= 0]
        rivals = column[column >= 0].sort().values  # hits among them
        rank = len(rivals) - torch.searchsorted(rivals, hits)
        found = torch.arange(1, len(hits) + 1, device=scores.device)
        precision = (found / rank).flip(0).cummax(0).values.flip(0)
        at = torch.searchsorted(found.double() / len(own), recalls)
        result[c] = torch.cat([precision, precision.new_zeros(1)])[at].mean()
    return result


@torch.no_grad()
def test(world: World, counts: Counts, classification: Classification, layer: nn.Module) -> dict[str, dict[str, float]]:
    """AP, APr, APc and APf by limit."""
    images, candidates = world.labels.shape
    scores = torch.empty(images, candidates, len(counts), device=world.means.device)
    for start in range(0, images, 100):  # few at a time: the logits of all would fill the cache many times over
        part = slice(start, start + 100)
        logits = layer(world.candidates[part].flatten(0, 1))
        scores[part] = classification.scores(logits)[:, :-1].view(-1, candidates, len(counts))
    found = {}
    for name, limit in LIMITS.items():
        precision = average_precision(scores, world.labels, world.evaluated, limit)
        groups = {f"AP{group}": float(precision[counts.of_group(group)].nanmean()) for group in GROUPS}
        found[name] = {"AP": float(precision.nanmean())} | groups
    return found


# ---------------------------------------------------------------------------------------------------------


def choose_rates(counts: Counts, device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """Of each method and rate what is found under the limit, uncut, with the tuning seed."""
    world = make_world(counts, TUNING_SEED, device)
    tried: dict[str, dict[str, dict[str, float]]] = {}
    for name, method in METHODS.items():
        tried[name] = {}
        for rate in RATES:
            trained = train(world, counts, method, None, rate, TUNING_SEED)
            tried[name][f"{rate:g}"] = test(world, counts, *trained)["300"]
        print(name, tried[name], flush=True)
    return tried


def experiment(seeds: int, device: torch.device) -> dict[str, Any]:
    """Everything of the page."""
    counts = read_counts()
    clock, processor = time.perf_counter(), time.process_time()
    tried = choose_rates(counts, device)
    rates = {name: max(RATES, key=lambda rate: found[f"{rate:g}"]["AP"]) for name, found in tried.items()}
    runs: dict[str, dict[str, list[dict[str, dict[str, float]]]]] = {}
    for depth in DEPTHS:
        runs[depth] = {name: [] for name in METHODS}
    for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds):
        world = make_world(counts, seed, device)
        for depth, most in DEPTHS.items():
            for name, method in METHODS.items():
                trained = train(world, counts, method, most, rates[name], seed)
                runs[depth][name].append(test(world, counts, *trained))
        print(f"seed {seed}: {time.process_time() - processor:.0f} s of processor time", flush=True)
    return {
        "what": "classification on fixed features, not detection",
        "machine": harness.machine(device),
        "seconds": {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor},
        "classes": {group: int(counts.of_group(group).sum()) for group in GROUPS},
        "objects": {depth: int(counts.cut(most).sum()) for depth, most in DEPTHS.items()},
        "largest": int(counts.objects.max()),
        "test": {"images": len(world.labels), "objects": OBJECTS, "background": BACKGROUND},
        "budget": {"steps": STEPS, "rows": len(counts) + BACKGROUND_ROWS, "seeds": seeds, "rates": rates},
        "tried": tried,
        "titles": {name: method.title for name, method in METHODS.items()},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder that gets benchmarks/results and docs")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds: give 1 or more")
    torch.set_num_threads(options.threads)
    results = experiment(options.seeds, harness.require_device(options.device))
    harness.write_json(options.out / "benchmarks/results/long_tail.json", results)
    draw(results, options.out / "docs/images/long_tail.png")
    text = options.out / "docs/results/long_tail.md"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(page(results, (ROOT / "docs/results/long_tail-tried.md").read_text()))


if __name__ == "__main__":
    main()
