"""The drawn classes and pictures."""

import numpy as np
import pytest

from tailseg.data.synthetic.scenes import (
    COLOURS,
    MIN_VISIBLE,
    SHAPES,
    TEXTURES,
    ObjectClass,
    draw_object,
    draw_scene,
    object_classes,
)

KINDS = object_classes(40, 14)


@pytest.mark.parametrize(("classes", "frequent"), [(2, 1), (40, 14), (1203, 405)])
def test_classes_differ_and_the_less_frequent_have_a_frequent_look_alike(classes: int, frequent: int) -> None:
    kinds = object_classes(classes, frequent)
    assert len({kind.name for kind in kinds}) == classes
    heads = kinds[:frequent]
    for kind in kinds[frequent:]:
        assert any(kind.differs_by_one(head) for head in heads), kind.name


def test_any_number_of_classes_from_one_frequent_one() -> None:
    assert len(set(object_classes(1203, 1))) == 1203


def test_look_alikes_differ_in_exactly_one_property() -> None:
    star = ObjectClass(shape="star", colour="red", texture="plain")
    assert star.name == "plain_red_star"
    assert star.differs_by_one(ObjectClass(shape="star", colour="red", texture="striped"))
    assert not star.differs_by_one(star)
    assert not star.differs_by_one(ObjectClass(shape="star", colour="blue", texture="striped"))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_has_its_size_and_an_empty_ring_around_it(shape: str) -> None:
    for seed in range(4):
        kind = ObjectClass(shape=shape, colour="red", texture="plain")
        coverage, colour = draw_object(kind, 60, np.random.default_rng(seed))
        assert colour.shape == (*coverage.shape, 3)
        ring = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert ring.max() < 0.5
        assert coverage.max() == 1
        assert 40 < max(coverage.shape) < 95


def test_coverage_is_the_area() -> None:
    # A square of side 0.8 * diameter: rotation, flip and an area-preserving stretch leave its area alone.
    square = ObjectClass(shape="square", colour="blue", texture="plain")
    for seed in range(5):
        coverage, _ = draw_object(square, 50, np.random.default_rng(seed))
        assert coverage.sum() == pytest.approx(40 * 40, rel=0.02)
        # A mask counts whole pixels, half-covered ones included: up to a fifth of a pixel around the edge.
        assert (coverage >= 0.5).sum() == pytest.approx(40 * 40, rel=0.04)


def test_textures_of_one_shape_and_colour_look_different() -> None:
    pictures = {}
    for texture in TEXTURES:
        kind = ObjectClass(shape="circle", colour="green", texture=texture)
        coverage, colour = draw_object(kind, 40, np.random.default_rng(0))  # equal pose and colour
        pictures[texture] = coverage[..., None] * colour
    for first, one in pictures.items():
        for second, other in pictures.items():
            if first != second:
                assert np.abs(one - other).mean() > 5, (first, second)


def test_colours_are_the_named_ones() -> None:
    for colour, bgr in {"red": (0, 0, 1), "green": (0, 1, 0), "blue": (1, 0, 0)}.items():
        _, picture = draw_object(
            ObjectClass(shape="circle", colour=colour, texture="plain"), 30, np.random.default_rng(1)
        )
        assert picture[15, 15].argmax() == np.argmax(bgr)
    yellow = ObjectClass(shape="circle", colour="yellow", texture="plain")
    blue, green, red = draw_object(yellow, 30, np.random.default_rng(1))[1][15, 15]
    assert blue < 100 < min(green, red)
    assert set(COLOURS) >= {"white", "black"}


def test_masks_match_the_picture_of_a_lone_object() -> None:
    """Where a scene with and without its object differ by more than noise is where the mask lies."""
    kinds = [ObjectClass(shape="circle", colour="yellow", texture="plain")]
    compared = 0
    for seed in range(8):
        scene = draw_scene([0], kinds, 96, np.random.default_rng(seed))
        image = scene.image.astype(float)
        # Yellow has far more red and green than blue; the ground is dull.
        yellow = np.minimum(image[..., 1], image[..., 2]) - image[..., 0] > 90
        mask = scene.owner >= 0
        union = (yellow | mask).sum()
        assert (yellow & mask).sum() / union > 0.9
        compared += 1
    assert compared == 8


def test_a_covered_object_keeps_the_visible_part_only() -> None:
    kinds = [KINDS[0], KINDS[1]]
    for seed in range(20):
        scene = draw_scene([0, 1], kinds, 64, np.random.default_rng(seed))
        assert len(scene.labels) == len(scene.annotated)
        seen = np.bincount(scene.owner[scene.owner >= 0], minlength=len(scene.labels))
        assert seen.min() >= 10  # 40 pixels at 128
        assert scene.owner.max() == len(scene.labels) - 1
    assert 0 < MIN_VISIBLE < 1


def test_a_scene_without_objects() -> None:
    scene = draw_scene([], KINDS, 32, np.random.default_rng(0))
    assert scene.labels == []
    assert (scene.owner == -1).all()
    assert scene.image.shape == (32, 32, 3)


def test_some_objects_are_left_unlabelled_on_purpose() -> None:
    scenes = [draw_scene([3, 5], KINDS, 64, np.random.default_rng(seed)) for seed in range(200)]
    share = np.mean([not all(scene.annotated) for scene in scenes])
    assert 0.005 < share < 0.1
    for scene in scenes:
        assert set(scene.labels) <= {3, 5}
