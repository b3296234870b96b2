from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailseg.data.sampling import TrainSampler

tall = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda flags: np.array(flags, dtype=bool))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(tall, st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_every_image_once_an_epoch_in_batches_of_one_orientation(groups, batch_size, world, epoch):
    sampler = TrainSampler(groups, batch_size, 0, world, seed=3)
    batches = sampler.batches(epoch)
    assert batches.shape == (sampler.steps_per_epoch, batch_size * world)
    counts = np.bincount(batches.ravel(), minlength=len(groups))
    filled = batches.size - len(groups)
    assert counts.min() >= 1
    assert (counts - 1).sum() == filled < batch_size * world
    mixed = [np.unique(groups[batch]).size > 1 for batch in batches]
    assert sum(mixed) <= 2
    assert sampler.steps_per_epoch == -(-len(groups) // (batch_size * world))


def test_epochs_and_seeds_differ_and_repeat():
    groups = np.zeros(40, dtype=bool)
    first = TrainSampler(groups, 4, seed=0)
    assert not np.array_equal(first.batches(0), first.batches(1))
    assert not np.array_equal(first.batches(0), TrainSampler(groups, 4, seed=1).batches(0))
    np.testing.assert_array_equal(first.batches(7), TrainSampler(groups, 4, seed=0).batches(7))


def test_batches_of_both_orientations_are_spread_over_the_epoch():
    groups = np.arange(400) < 200
    kinds = groups[TrainSampler(groups, 2).batches(0)[:, 0]]
    assert 20 < np.count_nonzero(kinds[:100]) < 80  # not all of one group first


def test_going_on_from_a_step_gives_the_same_batches():
    sampler = TrainSampler(np.arange(23) % 3 == 0, 2, seed=5)
    whole = list(islice(sampler.iterate(), 40))
    for start in (1, 11, 12, 13, 30):
        assert list(islice(sampler.iterate(start), 40 - start)) == whole[start:]


def test_processes_share_the_global_batch():
    groups = np.arange(30) % 4 == 0
    shares = [list(islice(TrainSampler(groups, 2, rank, 3, seed=1).iterate(), 9)) for rank in range(3)]
    alone = list(islice(TrainSampler(groups, 6, 0, 1, seed=1).iterate(), 9))
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


def test_no_two_samples_have_the_same_seed():
    sampler = TrainSampler(np.zeros(10, dtype=bool), 5, seed=2)
    seeds = [seed for batch in islice(sampler.iterate(), 40) for _, seed in batch]
    assert len(set(seeds)) == 200
    other = [seed for batch in islice(TrainSampler(np.zeros(10, bool), 5, seed=3).iterate(), 40) for _, seed in batch]
    assert not set(seeds) & set(other)


def test_an_epoch_smaller_than_a_batch_is_filled_in_a_circle():
    batches = TrainSampler(np.array([True, False]), 5).batches(0)
    assert batches.shape == (1, 5)
    assert sorted(np.bincount(batches[0]).tolist()) == [2, 3]


@pytest.mark.parametrize(("count", "size", "rank", "world"), [(0, 2, 0, 1), (4, 0, 0, 1), (4, 2, 2, 2), (4, 2, -1, 1)])
def test_impossible_plans_are_refused(count, size, rank, world):
    with pytest.raises(ValueError, match="received"):
        TrainSampler(np.zeros(count, bool), size, rank, world)
