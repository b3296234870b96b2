"""Choice of the images of each training step: a plan that is a function of the seed and the step alone.

How often an image is due in an epoch is decided by one of three draws (`EveryImage`, `RepeatFactors`, `ClassAware`), or
by several in equal shares (`Mixed`), perhaps for epochs of a fixed length (`FixedLength`). `TrainSampler` shuffles,
batches and shares out what they give. Letters: n images of the data set, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.recipes.data_section import DataRecipe, Sampler

Rounding = Literal["ceil", "stochastic"]


class Draw(Protocol):
    """The images of an epoch before they are shuffled."""

    @property
    def length(self) -> int:
        """Images of every epoch, repetitions counted."""

    def images(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(length,) indices in [0, n)."""


@dataclass(frozen=True, slots=True)
class EveryImage:
    """Each of ``length`` images once."""

    length: int

    def images(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(n,) indices: 0..n-1."""
        return np.arange(self.length)


class RepeatFactors:
    """Image i about factors[i] times an epoch (LVIS paper, appendix B.2).

    ``ceil``: exactly ceil(factor) times, every epoch alike. ``stochastic``: floor or ceil, the latter with the
    probability of the factor's fraction, again each epoch. All images are rounded by one random number (systematic
    sampling over a random order), so that their sum is that of the factors, rounded down or up: every epoch has the
    sum rounded up, and where one image is missing, a random one is added.
    """

    def __init__(self, factors: NDArray[np.float64], rounding: Rounding = "ceil") -> None:
        if len(factors) and not (np.isfinite(factors).all() and factors.min() >= 1):
            raise ValueError(f"expected repeat factors of at least 1, received {factors.min()} to {factors.max()}")
        self.factors = factors
        self.whole = (np.ceil(factors) if rounding == "ceil" else np.floor(factors)).astype(np.int64)
        self.fractions = np.maximum(factors - self.whole, 0)
        self._most = int(np.ceil(np.round(self.fractions.sum(), 6)))  # a whole sum may miss it by rounding
        self.length = int(self.whole.sum()) + self._most

    def images(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(length,) indices."""
        counts = self.whole.copy()
        if self._most:
            order = rng.permutation(len(counts))
            edges = np.floor(np.cumsum(self.fractions[order]) + rng.random()).astype(np.int64)
            counts[order] += np.diff(edges.clip(max=self._most), prepend=0)
            counts[order[: self.length - counts.sum()]] += 1
        indices: NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        return indices


class ClassAware:
    """As many draws as there are images: a class, all equally often, then an image of it, all equally often.

    "Equally" up to one: the classes are gone through again and again in a random order, and so are the images of each.
    """

    def __init__(self, images: NDArray[np.int64], labels: NDArray[np.int64], length: int) -> None:
        """Take the pairs (image, class), each once and at least one, and the draws of an epoch."""
        if len(images) == 0:
            raise ValueError("expected at least one pair of image and class, received none")
        self.length = length
        by_class = np.argsort(labels, kind="stable")
        self.members = images[by_class]  # the images of the first class, of the second, ...
        _, self.sizes = np.unique(labels, return_counts=True)

    def images(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(length,) indices."""
        classes = len(self.sizes)
        draws = np.full(classes, self.length // classes)
        draws[rng.permutation(classes)[: self.length % classes]] += 1
        of_member = np.repeat(np.arange(classes), self.sizes)
        shuffled: NDArray[np.int64] = self.members[np.lexsort((rng.random(len(self.members)), of_member))]
        first, began = np.cumsum(self.sizes) - self.sizes, np.cumsum(draws) - draws
        nth = np.arange(self.length) - np.repeat(began, draws)  # 0, 1, ... within each class
        drawn: NDArray[np.int64] = shuffled[np.repeat(first, draws) + nth % np.repeat(self.sizes, draws)]
        return drawn


class Mixed:
    """An equal share of several draws: of k draws, a random k-th part of the images of each, rounded up.

    So an image occurs as often as on average over the draws, and an epoch is as long as they are on average.
    """

    def __init__(self, draws: Sequence[Draw]) -> None:
        """Take at least one draw."""
        if not draws:
            raise ValueError("expected at least one draw, received none")
        self.draws = tuple(draws)
        self.shares = [-(-draw.length // len(draws)) for draw in draws]
        self.length = sum(self.shares)

    def images(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(length,) indices, the share of the first draw first."""
        parts = zip(self.draws, self.shares, strict=True)
        return np.concatenate([rng.permutation(draw.images(rng))[:share] for draw, share in parts])


class FixedLength:
    """As many images as asked for: a random part of a draw, or whole draws and a random part of one more."""

    def __init__(self, draw: Draw, length: int) -> None:
        """Take a draw of at least one image, and the images of an epoch."""
        if draw.length < 1 or length < 1:
            raise ValueError(f"expected a draw and an epoch of at least one image, received {draw.length}, {length}")
        self.draw = draw
        self.length = length

    def images(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(length,) indices."""
        turns = -(-self.length // self.draw.length)
        return np.concatenate([rng.permutation(self.draw.images(rng)) for _ in range(turns)])[: self.length]


def largest_factor(draw: Draw) -> float | None:
    """The largest repeat factor of a draw or of its parts; None where there is none."""
    if isinstance(draw, RepeatFactors):
        return float(draw.factors.max(initial=1))
    parts = draw.draws if isinstance(draw, Mixed) else (draw.draw,) if isinstance(draw, FixedLength) else ()
    return max((factor for part in parts if (factor := largest_factor(part)) is not None), default=None)


def image_class_pairs(
    annotations: Annotations, images: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of an image and a class that it holds, crowds left out.

    Args:
        annotations: the file.
        images: the n images that count, rising positions in the file; by default all.

    Returns:
        (P,) positions in ``images`` and (P,) labels; each pair once, in the order of images.
    """
    rows_of = np.diff(annotations.first_annotation)
    positions = np.full(len(annotations), -1)
    chosen = np.arange(len(annotations)) if images is None else images
    positions[chosen] = np.arange(len(chosen))
    of_row = np.repeat(positions, rows_of)
    kept = (of_row >= 0) & np.asarray(annotations.trained)
    classes = len(annotations.categories)
    pairs = np.unique(of_row[kept] * classes + np.asarray(annotations.labels)[kept])
    return pairs // classes, pairs % classes


def class_repeat_factors(
    annotations: Annotations,
    threshold: float,
    images: NDArray[np.int64] | None = None,
    *,
    instance_aware: bool = False,
) -> NDArray[np.float64]:
    """Repeat factor of each class: r(c) = max(1, sqrt(threshold / f(c))), 1 for a class that no image holds.

    f(c) is the share of the images that hold c. ``instance_aware`` (IRFS, arXiv 2305.08069), it is the geometric mean
    of that and of the share of the objects that are of c: a class whose images hold few of its objects counts as rarer
    than one of as many images with many objects each.

    Args:
        annotations: the file.
        threshold: f(c) below which a class is repeated.
        images: the n images that are sampled, rising positions in the file; by default all.
        instance_aware: take objects into account.

    Returns:
        (C,) factors of at least 1.
    """
    classes = len(annotations.categories)
    count = len(annotations) if images is None else len(images)
    _, labels = image_class_pairs(annotations, images)
    frequency = np.bincount(labels, minlength=classes) / max(count, 1)
    if instance_aware:
        objects = np.bincount(annotations.labels[trained_rows(annotations, images)], minlength=classes)
        frequency = np.sqrt(frequency * objects / max(objects.sum(), 1))
    return np.asarray(np.maximum(np.sqrt(threshold / np.where(frequency > 0, frequency, np.inf)), 1))


def trained_rows(annotations: Annotations, images: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Rising rows of the objects that are trained on in some images (positions in the file; by default all)."""
    chosen = np.ones(len(annotations), np.bool_)
    if images is not None:
        chosen = np.isin(np.arange(len(annotations)), images)
    return np.flatnonzero(np.repeat(chosen, np.diff(annotations.first_annotation)) & np.asarray(annotations.trained))


def repeat_factors(
    annotations: Annotations,
    threshold: float,
    images: NDArray[np.int64] | None = None,
    *,
    instance_aware: bool = False,
) -> NDArray[np.float64]:
    """Repeat factor of each image: the largest of its classes', 1 for an image without any.

    Args:
        annotations: the file.
        threshold: f(c) below which a class is repeated.
        images: the n images that are sampled, rising positions in the file; by default all.
        instance_aware: as in `class_repeat_factors`.

    Returns:
        (n,) factors of at least 1.
    """
    count = len(annotations) if images is None else len(images)
    of_pair, labels = image_class_pairs(annotations, images)
    of_class = class_repeat_factors(annotations, threshold, images, instance_aware=instance_aware)
    factors = np.ones(count)
    np.maximum.at(factors, of_pair, of_class[labels])
    return factors


def epoch_draw(annotations: Annotations, images: NDArray[np.int64], recipe: DataRecipe) -> Draw:
    """The draw of the recipe's samplers over the training images, given by their positions in the file."""
    draws = [_draw_of(sampler, annotations, images, recipe) for sampler in recipe.samplers]
    draw = draws[0] if len(draws) == 1 else Mixed(draws)
    return draw if recipe.epoch_images is None else FixedLength(draw, recipe.epoch_images)


def _draw_of(sampler: Sampler, annotations: Annotations, images: NDArray[np.int64], recipe: DataRecipe) -> Draw:
    if sampler in ("repeat-factor", "irfs"):
        instance_aware = sampler == "irfs"
        factors = repeat_factors(annotations, recipe.repeat_threshold, images, instance_aware=instance_aware)
        return RepeatFactors(factors, recipe.repeat_rounding)
    if sampler == "class-aware":
        return ClassAware(*image_class_pairs(annotations, images), len(images))
    return EveryImage(len(images))


class TrainSampler:
    """Shuffled epochs in batches of one orientation.

    A global batch holds ``batch_size_per_process * world`` images, of one orientation group (w < h, or w >=
    h) but for the one or two batches made of what the groups leave over. The last of these is filled up from
    the start of the epoch's order. Apart from the filling, every image occurs as often as it is due. Nothing depends
    on what was drawn before, so a run goes on from any step as if it had never stopped.
    """

    def __init__(
        self,
        aspect_groups: NDArray[np.bool_],
        batch_size_per_process: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        draw: Draw | None = None,
        views: int | None = None,
    ) -> None:
        """Make the plan.

        Args:
            aspect_groups: (n,) bool, the orientation of each image.
            batch_size_per_process: images of a step on each of the processes.
            rank: number of this process, below ``world``.
            world: number of processes.
            seed: of the order and of each sample's own seed.
            draw: how often each image is due; by default once an epoch.
            views: how many different seeds the samples of an image have, taken in turn; by default no two have the
                same.

        Raises:
            ValueError: there are no images, or a number is out of its range.
        """
        sound = len(aspect_groups) > 0 and batch_size_per_process >= 1 and 0 <= rank < world and seed >= 0
        if not sound or (views is not None and views < 1):
            received = f"{len(aspect_groups)}, {batch_size_per_process}, {rank} of {world}, {seed}, {views}"
            expected = "images, a batch size of at least 1, 0 <= rank < world, a seed of at least 0 and views, if any"
            raise ValueError(f"expected {expected}; received {received}")
        self.aspect_groups = np.asarray(aspect_groups, dtype=np.bool_)
        self.batch_size = batch_size_per_process
        self.rank = rank
        self.world = world
        self.seed = seed
        self.draw = draw or EveryImage(len(aspect_groups))
        self.views = views

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of every epoch."""
        return -(-self.draw.length // (self.batch_size * self.world))

    def batches(self, epoch: int) -> NDArray[np.int64]:
        """(steps, batch_size_per_process * world) indices: the global batches of an epoch."""
        size = self.batch_size * self.world
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.draw.images(rng))
        tall = self.aspect_groups[order]
        whole, left = [], []
        for group in (order[tall], order[~tall]):
            cut = len(group) // size * size
            whole.append(group[:cut].reshape(-1, size))
            left.append(group[cut:])
        rest = np.concatenate(left)
        missing = -len(rest) % size
        rest = np.concatenate([rest, np.resize(order, missing)])
        batches = np.concatenate([*whole, rest.reshape(-1, size)])
        return rng.permutation(batches)  # of the rows: orientations mix over the epoch

    def iterate(self, start_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Without end from step ``start_step`` (counted over all epochs): this process's (index, seed) pairs.

        Seeds differ between all samples of all processes and epochs, or are those of the image's views.
        """
        steps = self.steps_per_epoch
        epoch, skipped = divmod(start_step, steps)
        first = self.rank * self.batch_size
        while True:
            batches = self.batches(epoch)
            views = None if self.views is None else self._views_of(batches, epoch, self.views)
            for step in range(skipped, steps):
                mine = range(first, first + self.batch_size)
                if views is None:
                    seeds = [self._seed(epoch, step * batches.shape[1] + i, 1) for i in mine]
                else:
                    seeds = [self._seed(int(batches[step, i]), int(views[step, i]), 2) for i in mine]
                yield list(zip(batches[step, mine].tolist(), seeds, strict=True))
            epoch, skipped = epoch + 1, 0

    def all_views(self, epochs: range) -> list[tuple[int, int]]:
        """Every (index, seed) that occurs in these epochs in any process, each once, by index (`views` is given)."""
        assert self.views is not None
        codes = [np.zeros(0, np.int64)]
        for epoch in epochs:
            batches = self.batches(epoch)
            codes.append(np.unique(batches * self.views + self._views_of(batches, epoch, self.views)))
        pairs = [divmod(code, self.views) for code in np.unique(np.concatenate(codes)).tolist()]
        return [(index, self._seed(index, view, 2)) for index, view in pairs]

    @staticmethod
    def _views_of(batches: NDArray[np.int64], epoch: int, views: int) -> NDArray[np.int64]:
        """Choose the view of the image at each place of an epoch's batches.

        The next one wherever an image occurs again, over the epochs too where it occurs as often in each: so all of
        them come equally often, and none twice while another has not come.
        """
        flat = batches.ravel()
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat)
        nth = np.empty_like(flat)
        nth[order] = np.arange(len(flat)) - (np.cumsum(counts) - counts)[flat[order]]  # 0, 1, ... of each image
        return ((epoch * counts[flat] + nth) % views).reshape(batches.shape)

    def _seed(self, *numbers: int) -> int:
        """A seed of these numbers; the last says of what, as the epochs' orders have seeds too."""
        return int(np.random.SeedSequence((self.seed, *numbers)).generate_state(1, np.uint64)[0])
