import json
import math
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.sampling import (
    ClassAware,
    EveryImage,
    FixedLength,
    Mixed,
    RepeatFactors,
    TrainSampler,
    class_repeat_factors,
    epoch_draw,
    image_class_pairs,
    largest_factor,
    repeat_factors,
    trained_rows,
)
from tailseg.data.sources import open_splits
from tailseg.recipes.data_section import DataRecipe

tall = st.lists(st.booleans(), min_size=1, max_size=60).map(lambda flags: np.array(flags, dtype=bool))


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


def test_seeds_are_those_of_the_place_in_the_run():
    """Also after what was added since: a run of an older version is resumed with the same samples."""
    sampler = TrainSampler(np.zeros(10, dtype=bool), 2, 1, 2, seed=7)
    for step, batch in enumerate(islice(sampler.iterate(2), 4), start=2):
        epoch, within = divmod(step, 3)
        places = [within * 4 + 2, within * 4 + 3]
        expected = [np.random.SeedSequence((7, epoch, place, 1)).generate_state(1, np.uint64)[0] for place in places]
        assert [seed for _, seed in batch] == expected


def shown(sampler, epochs):
    """Index -> the seeds with which it came in these epochs, in order."""
    steps = sampler.steps_per_epoch
    seeds = {}
    for batch in islice(sampler.iterate(epochs.start * steps), len(epochs) * steps):
        for index, seed in batch:
            seeds.setdefault(index, []).append(seed)
    return seeds


@given(tall, st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_views_come_in_turn(groups, batch_size, views, epochs, repeated):
    draw = RepeatFactors(1 + np.arange(len(groups)) % 3 * 0.7) if repeated else None
    sampler = TrainSampler(groups, batch_size, seed=3, draw=draw, views=views)
    filled = sampler.steps_per_epoch * batch_size - sampler.draw.length
    seeds = shown(sampler, range(epochs))
    assert sum(map(len, seeds.values())) == epochs * (sampler.draw.length + filled)
    for own in seeds.values():
        counts = Counter(own)
        assert len(counts) <= views
        if filled == 0:  # as often in every epoch: all views equally often, none twice before the others came
            assert len(set(own[:views])) == min(views, len(own))
            assert all(own[i] == own[i - views] for i in range(views, len(own)))
    # No two images, and no two views of one, have the same seed.
    pairs = sampler.all_views(range(epochs))
    assert pairs == sorted({(index, seed) for index, own in seeds.items() for seed in own}, key=pairs.index)
    assert len({seed for _, seed in pairs}) == len(pairs)
    assert [index for index, _ in pairs] == sorted(index for index, _ in pairs)
    assert sampler.all_views(range(0)) == []


def test_views_within_an_epoch_too_and_whatever_the_draw():
    draw = RepeatFactors(np.array([6.0, 1.0, 1.0]))
    seeds = shown(TrainSampler(np.zeros(3, bool), 1, draw=draw, views=4), range(2))
    assert [len(set(own)) for own in (seeds[0], seeds[1], seeds[2])] == [4, 2, 2]
    assert sorted(Counter(seeds[0]).values()) == [3, 3, 3, 3]
    rounded = RepeatFactors(np.full(20, 1.5), "stochastic")
    seeds = shown(TrainSampler(np.zeros(20, bool), 2, draw=rounded, views=3), range(9))
    assert {len(set(own)) for own in seeds.values()} == {3}


def test_views_do_not_depend_on_processes_or_on_where_a_run_went_on():
    groups = np.arange(24) % 4 == 0
    alone = TrainSampler(groups, 6, 0, 1, seed=1, views=2)
    shares = [list(islice(TrainSampler(groups, 2, rank, 3, seed=1, views=2).iterate(), 9)) for rank in range(3)]
    whole = list(islice(alone.iterate(), 20))
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole[:9]
    for start in (1, 4, 11):
        assert list(islice(alone.iterate(start), 20 - start)) == whole[start:]
    assert TrainSampler(groups, 2, 2, 3, seed=1, views=2).all_views(range(3)) == alone.all_views(range(3))
    # The same view has the same seed however many there are, and another one in another run.
    more = TrainSampler(groups, 6, seed=1, views=5)
    assert set(alone.all_views(range(2))) == set(more.all_views(range(2)))
    assert not set(alone.all_views(range(2))) & set(TrainSampler(groups, 6, seed=2, views=2).all_views(range(2)))


def test_an_epoch_smaller_than_a_batch_is_filled_in_a_circle():
    batches = TrainSampler(np.array([True, False]), 5).batches(0)
    assert batches.shape == (1, 5)
    assert sorted(np.bincount(batches[0]).tolist()) == [2, 3]


@pytest.mark.parametrize(("count", "size", "rank", "world"), [(0, 2, 0, 1), (4, 0, 0, 1), (4, 2, 2, 2), (4, 2, -1, 1)])
def test_impossible_plans_are_refused(count, size, rank, world):
    with pytest.raises(ValueError, match="received"):
        TrainSampler(np.zeros(count, bool), size, rank, world)
    with pytest.raises(ValueError, match="received"):
        TrainSampler(np.zeros(4, bool), 2, views=0)


factors_of = st.lists(st.floats(1, 6) | st.integers(1, 4).map(float), min_size=1, max_size=40).map(np.array)


def annotation_file(folder, held, classes, crowds=()):
    """Image i holds an object of each class in ``held[i]``, and a crowd of each in ``crowds[i]``."""
    images = [{"id": i, "height": 50, "width": 50, "file_name": f"{i}.jpg"} for i in range(len(held))]
    shape = {"bbox": [4, 4, 20, 20], "area": 400, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
    named = [(i, c, 0) for i, own in enumerate(held) for c in own]
    named += [(i, c, 1) for i, own in enumerate(crowds) for c in own]
    rows = [
        {"id": n, "image_id": i, "category_id": c, "iscrowd": crowd} | shape for n, (i, c, crowd) in enumerate(named)
    ]
    categories = [{"id": c, "name": f"class {c}"} for c in range(classes)]
    path = folder / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    return load_annotations(path, folder)


def test_repeat_factors_by_hand(tmp_path):
    # Class 0 is in 4 of 8 images, class 1 in 2 (in one of them twice), class 2 in 1; class 3 in none.
    held = [[0], [0], [0, 1, 1], [0, 2], [1], [], [], []]
    annotations = annotation_file(tmp_path, held, 4, crowds=[[2]])  # a crowd of class 2 does not count
    of_1, of_2 = math.sqrt(0.5 / (2 / 8)), math.sqrt(0.5 / (1 / 8))
    expected = [1, 1, of_1, of_2, of_1, 1, 1, 1]
    np.testing.assert_array_equal(repeat_factors(annotations, 0.5), expected)
    # Of the five images with objects, each share is another; image 0 left out as well.
    images = np.array([1, 2, 3, 4])
    expected = [1, math.sqrt(0.7 / (2 / 4)), math.sqrt(0.7 / (1 / 4)), math.sqrt(0.7 / (2 / 4))]
    np.testing.assert_array_equal(repeat_factors(annotations, 0.7, images), expected)
    positions, labels = image_class_pairs(annotations, images)
    assert positions.tolist() == [0, 1, 1, 2, 2, 3]
    assert labels.tolist() == [0, 0, 1, 0, 2, 1]


def test_repeat_factors_are_the_recorded_ones(recorded, check, shared):
    train = open_splits(shared / "data" / "coco128-lvis").train
    compared = 0
    for case, _, _, outputs in recorded("repeat_factors"):
        ours = repeat_factors(train, case["settings"]["threshold"])
        check(case, "factors", torch.from_numpy(ours), outputs["factors"])
        check(case, "factors_mmdet", torch.from_numpy(ours), outputs["factors_mmdet"])
        repeated = RepeatFactors(ours, "ceil").images(np.random.default_rng(0))
        check(case, "repeated", torch.from_numpy(repeated), outputs["repeated"])
        compared += 1
    assert compared == 3


@given(factors_of, st.integers(0, 100))
def test_repeats_are_rounded_factors_and_every_epoch_is_as_long(factors, seed):
    counts = np.bincount(RepeatFactors(factors, "ceil").images(np.random.default_rng(seed)), minlength=len(factors))
    assert counts.tolist() == [math.ceil(f) for f in factors]
    draw = RepeatFactors(factors, "stochastic")
    assert draw.length == math.ceil(round(math.fsum(factors), 6))
    counts = np.bincount(draw.images(np.random.default_rng(seed)), minlength=len(factors))
    assert counts.sum() == draw.length
    beyond = [count - math.ceil(f) for count, f in zip(counts, factors, strict=True)]
    assert all(count >= math.floor(f) for count, f in zip(counts, factors, strict=True))
    assert sum(b for b in beyond if b > 0) <= 1  # the one that fills the epoch up


def test_stochastic_rounding_gives_every_image_its_factor_on_average():
    factors = np.array([1.0, 1.25, 1.5, 2.9, 3.1, 1.25])  # the sum is 11: nothing is filled up
    draw = RepeatFactors(factors, "stochastic")
    rng = np.random.default_rng(0)
    epochs = np.array([np.bincount(draw.images(rng), minlength=6) for _ in range(4000)])
    assert (epochs.sum(axis=1) == 11).all()
    # Of 4000 draws of one bit the mean lies within 4 standard deviations of at most 0.008.
    np.testing.assert_allclose(epochs.mean(axis=0), factors, atol=0.032)
    assert ((epochs >= np.floor(factors)) & (epochs <= np.ceil(factors))).all()


pairs = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=40, unique=True)


@given(pairs, st.integers(1, 60), st.integers(0, 100))
def test_class_aware_draws_classes_equally_and_images_equally_within(held, length, seed):
    images, labels = (np.array(column) for column in zip(*sorted(held), strict=True))
    drawn = ClassAware(images, labels, length).images(np.random.default_rng(seed))
    assert len(drawn) == length
    # Draws come class by class, in the order of labels: every class floor or ceil of its share.
    classes = np.unique(labels)
    assert _in_due_runs(drawn.tolist(), {c: images[labels == c].tolist() for c in classes.tolist()})


def _in_due_runs(drawn, members):
    """Whether ``drawn`` falls into one run a class, each of the due length and of equally frequent members."""
    low = len(drawn) // len(members)

    def fits(run, own):
        counts = Counter(run)
        if set(counts) - set(own):
            return False
        most = [counts[image] for image in own]
        return max(most) - min(most) <= 1

    starts = {0}
    for own in members.values():
        runs = ((s, s + n) for s in starts for n in (low, low + 1) if s + n <= len(drawn))
        starts = {end for start, end in runs if fits(drawn[start:end], own)}
    return len(drawn) in starts


kinds = st.sampled_from(["ceil", "stochastic", "class", "mixed"])


@given(tall, st.integers(1, 3), st.integers(1, 3), st.integers(0, 40), kinds)
def test_every_draw_is_exact_over_processes_and_goes_on_from_any_step(groups, batch_size, world, start, kind):
    count = len(groups)
    factors = 1 + np.random.default_rng(count).random(count) * 3
    class_aware = ClassAware(np.arange(count), np.arange(count) % 3, count)
    mixed = FixedLength(Mixed([EveryImage(count), RepeatFactors(factors), class_aware]), count + 3)
    draw = {"class": class_aware, "mixed": mixed}.get(kind) or RepeatFactors(factors, kind)
    samplers = [TrainSampler(groups, batch_size, rank, world, 3, draw) for rank in range(world)]
    steps = samplers[0].steps_per_epoch
    epoch = start // steps
    size = batch_size * world
    assert steps == -(-draw.length // size)
    whole = [list(islice(sampler.iterate(), (epoch + 1) * steps)) for sampler in samplers]
    for sampler, own in zip(samplers, whole, strict=True):
        assert list(islice(sampler.iterate(start), (epoch + 1) * steps - start)) == own[start:]
    seen = [index for own in whole for batch in own[epoch * steps :] for index, _ in batch]
    # What an epoch draws is drawn first of all by its generator; all of it is seen, and less than a batch besides.
    due = np.bincount(draw.images(np.random.default_rng((3, epoch))), minlength=count)
    beyond = np.bincount(seen, minlength=count) - due
    assert beyond.min() >= 0
    assert beyond.sum() == steps * size - draw.length < size
    batches = samplers[0].batches(epoch)
    assert sum(np.unique(groups[batch]).size > 1 for batch in batches) <= 2


def test_the_recipe_chooses_the_draw(tmp_path):
    annotations = annotation_file(tmp_path, [[0], [0], [0], [0, 1], []], 3)
    images = np.arange(4)
    assert epoch_draw(annotations, images, DataRecipe()) == EveryImage(4)
    repeated = epoch_draw(annotations, images, DataRecipe(sampler="repeat-factor", repeat_threshold=1.0))
    assert repeated.length == 3 + 2
    stochastic = DataRecipe(sampler="repeat-factor", repeat_threshold=0.6, repeat_rounding="stochastic")
    assert epoch_draw(annotations, images, stochastic).length == math.ceil(3 + math.sqrt(0.6 / 0.25))
    drawn = epoch_draw(annotations, images, DataRecipe(sampler="class-aware")).images(np.random.default_rng(0))
    assert len(drawn) == 4
    assert np.count_nonzero(drawn == 3) >= 2  # both of its own class's draws; class 2 is in no image


@pytest.mark.parametrize(
    "make", [lambda: RepeatFactors(np.array([0.5])), lambda: ClassAware(np.zeros(0, int), np.zeros(0, int), 4)]
)
def test_impossible_draws_are_refused(make):
    with pytest.raises(ValueError, match="received"):
        make()


# Instance-aware repeat factors, and draws made of others


def test_instance_aware_factors_by_hand(tmp_path):
    """Class 1 has the images of class 2 but three times its objects, so its factor is smaller."""
    held = [[0, 0], [0], [0, 1, 1, 1], [2], [], []]
    annotations = annotation_file(tmp_path, held, 4, crowds=[[2]])  # a crowd is no object
    images = np.arange(4)
    by_images = class_repeat_factors(annotations, 0.5, images)
    np.testing.assert_allclose(by_images, [1, np.sqrt(0.5 / 0.25), np.sqrt(0.5 / 0.25), 1])
    both = class_repeat_factors(annotations, 0.5, images, instance_aware=True)
    frequency = [np.sqrt(3 / 4 * 4 / 8), np.sqrt(1 / 4 * 3 / 8), np.sqrt(1 / 4 * 1 / 8)]
    np.testing.assert_allclose(both, [1, *np.sqrt(0.5 / np.array(frequency[1:])), 1])
    assert both[2] > both[1]
    assert frequency[0] > 0.5
    of_images = repeat_factors(annotations, 0.5, images, instance_aware=True)
    np.testing.assert_allclose(of_images, [1, 1, both[1], both[2]])
    everywhere = class_repeat_factors(annotations, 0.5, instance_aware=True)  # of six images
    assert everywhere[2] == pytest.approx(np.sqrt(0.5 / np.sqrt(1 / 6 * 1 / 8)))
    assert trained_rows(annotations, np.array([1, 3])).tolist() == [3, 8]  # row 2 is the crowd


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=12), st.floats(0.01, 1))
def test_instance_aware_factors_against_loops(tmp_path_factory, held, threshold):
    annotations = annotation_file(tmp_path_factory.mktemp("set"), held, 5)
    ours = class_repeat_factors(annotations, threshold, instance_aware=True)
    objects = Counter(chain(*held))
    for label in range(5):
        images = sum(label in own for own in held) / len(held)
        share = objects[label] / max(sum(objects.values()), 1)
        expected = max(1, math.sqrt(threshold / math.sqrt(images * share))) if images else 1
        assert ours[label] == pytest.approx(expected)


def test_of_several_draws_each_has_its_share():
    draw = Mixed([EveryImage(6), RepeatFactors(np.array([3.0, 1, 1])), ClassAware(np.array([2]), np.array([0]), 4)])
    assert draw.shares == [2, 2, 2]  # of 6, 5 and 4
    assert draw.length == 6
    rng = np.random.default_rng(0)
    epochs = np.array([draw.images(rng) for _ in range(3000)])
    assert (epochs[:, 4:] == 2).all()
    counts = np.array([np.bincount(epoch, minlength=6) for epoch in epochs[:, :4]]).mean(axis=0)
    # A third of six images once, two fifths of (0, 0, 0, 1, 2).
    np.testing.assert_allclose(counts, [1 / 3 + 6 / 5, 1 / 3 + 2 / 5, 1 / 3 + 2 / 5, 1 / 3, 1 / 3, 1 / 3], atol=0.04)
    assert all(len(set(epoch[:2])) == 2 for epoch in epochs)  # no image twice within its share of every image
    with pytest.raises(ValueError, match="at least one draw"):
        Mixed([])


@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 100))
def test_epochs_of_a_fixed_length(count, length, seed):
    draw = FixedLength(EveryImage(count), length)
    found = draw.images(np.random.default_rng(seed))
    assert len(found) == draw.length == length
    counts = np.bincount(found, minlength=count)
    assert set(counts) <= {length // count, -(-length // count)}


def test_a_fixed_length_keeps_the_factors_on_average():
    factors = np.array([4.0, 2, 1, 1])
    rng = np.random.default_rng(0)
    draw = FixedLength(RepeatFactors(factors), 4)
    counts = np.array([np.bincount(draw.images(rng), minlength=4) for _ in range(4000)])
    np.testing.assert_allclose(counts.mean(axis=0), factors / 2, atol=0.04)
    with pytest.raises(ValueError, match="received 4, 0"):
        FixedLength(EveryImage(4), 0)


def test_the_recipe_mixes_and_limits(tmp_path):
    annotations = annotation_file(tmp_path, [[0], [0], [0], [0, 1], []], 3)
    images = np.arange(4)
    irfs = epoch_draw(annotations, images, DataRecipe(sampler="irfs", repeat_threshold=1.0))
    assert isinstance(irfs, RepeatFactors)
    assert irfs.factors[3] == pytest.approx((1 / 4 * 1 / 5) ** -0.25)
    both = DataRecipe(sampler=["repeat-factor", "class-aware"], repeat_threshold=1.0)
    mixed = epoch_draw(annotations, images, both)
    assert mixed.shares == [3, 2]  # of 5 and of 4
    assert largest_factor(mixed) == 2
    limited = epoch_draw(annotations, images, DataRecipe(sampler=["random", "class-aware"], epoch_images=3))
    assert (limited.length, largest_factor(limited)) == (3, None)
    same = epoch_draw(annotations, images, DataRecipe(sampler="repeat-factor", repeat_threshold=1.0, epoch_images=4))
    assert (same.length, largest_factor(same)) == (4, 2)
    # All of it is a function of seed and epoch, whoever asks.
    samplers = [TrainSampler(np.zeros(4, bool), 1, rank, 2, 5, mixed) for rank in (0, 1)]
    assert samplers[0].batches(3).tolist() == samplers[1].batches(3).tolist()
