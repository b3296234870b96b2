"""Which images a training step sees: a plan that is a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class TrainSampler:
    """Shuffled epochs in batches of one orientation.

    A global batch holds ``batch_size_per_process * world`` images, of one orientation group (w < h, or w >=
    h) but for the one or two batches made of what the groups leave over. The last of these is filled up from
    the start of the epoch's order. Every image occurs once an epoch, apart from the filling. Nothing depends
    on what was drawn before, so a run goes on from any step as if it had never stopped.
    """

    def __init__(
        self,
        aspect_groups: NDArray[np.bool_],
        batch_size_per_process: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        """Make the plan.

        Args:
            aspect_groups: (n,) bool, the orientation of each image.
            batch_size_per_process: images of a step on each of the processes.
            rank: number of this process, below ``world``.
            world: number of processes.
            seed: of the order and of each sample's own seed.

        Raises:
            ValueError: there are no images, or a number is out of its range.
        """
        if len(aspect_groups) == 0 or batch_size_per_process < 1 or not 0 <= rank < world or seed < 0:
            received = f"{len(aspect_groups)}, {batch_size_per_process}, {rank} of {world}, {seed}"
            expected = "images, a batch size of at least 1, 0 <= rank < world and a seed of at least 0"
            raise ValueError(f"expected {expected}; received {received}")
        self.aspect_groups = np.asarray(aspect_groups, dtype=np.bool_)
        self.batch_size = batch_size_per_process
        self.rank = rank
        self.world = world
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Global batches an epoch."""
        size = self.batch_size * self.world
        groups = self.aspect_groups[self.epoch_indices()]
        counts = np.array([np.count_nonzero(groups), np.count_nonzero(~groups)])
        return int((counts // size).sum() + -(-(counts % size).sum() // size))

    def epoch_indices(self) -> NDArray[np.int64]:
        """The images of an epoch before shuffling: each once."""
        return np.arange(len(self.aspect_groups))

    def batches(self, epoch: int) -> NDArray[np.int64]:
        """(steps, batch_size_per_process * world) indices: the global batches of an epoch."""
        size = self.batch_size * self.world
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.epoch_indices())
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

        Seeds differ between all samples of all processes and epochs.
        """
        steps = self.steps_per_epoch
        epoch, skipped = divmod(start_step, steps)
        first = self.rank * self.batch_size
        while True:
            batches = self.batches(epoch)
            for step in range(skipped, steps):
                mine = batches[step, first : first + self.batch_size].tolist()
                position = step * batches.shape[1] + first
                yield [(index, self._sample_seed(epoch, position + i)) for i, index in enumerate(mine)]
            epoch, skipped = epoch + 1, 0

    def _sample_seed(self, epoch: int, position: int) -> int:
        # The fourth number sets these apart from the seeds of the epochs' orders.
        return int(np.random.SeedSequence((self.seed, epoch, position, 1)).generate_state(1, np.uint64)[0])
