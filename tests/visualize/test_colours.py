"""Colours of classes: told apart by the eye, in the palette and in a picture."""

import cv2
import numpy as np
import pytest

from tailseg.visualize.colours import PALETTE, class_colours, text_colour


def cielab(colour: tuple[int, int, int]) -> np.ndarray:
    """By the definition: sRGB (IEC 61966-2-1) to XYZ to L*a*b* (CIE 15), white D65."""
    value = np.array(colour) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(matrix) @ linear / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours) -> float:
    lab = np.stack([cielab(colour) for colour in colours])
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return float((distances + 1000 * np.eye(len(lab))).min())


def test_text_contrasts_with_its_plate():
    assert text_colour((240, 228, 66)) == (0, 0, 0)
    assert text_colour((0, 114, 178)) == (255, 255, 255)


def test_colours_are_told_apart_and_stand_out():
    lab = cv2.cvtColor(np.float32(PALETTE)[None] / 255, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(len(lab))
    assert distances[:7, :7].min() > 25
    assert distances[:64, :64].min() > 12
    assert distances.min() > 7
    assert lab[:, 0].min() > 35  # no class is black
    assert np.hypot(lab[:, 1], lab[:, 2]).min() > 15  # nor grey or white


def test_classes_of_a_picture_have_different_colours():
    assert class_colours([5, 2, 5]) == {2: PALETTE[2], 5: PALETTE[5]}
    assert len(set(class_colours(range(256)).values())) == 256
    lvis = np.random.default_rng(0).permutation(1203)[:256].tolist()
    found = class_colours(lvis)
    assert len(set(found.values())) == 256
    assert found == class_colours(sorted(lvis))
    many = class_colours(range(1203))
    assert len(many) == 1203
    assert set(many.values()) == set(PALETTE)
    assert class_colours([]) == {}


@pytest.mark.parametrize(("classes", "units"), [(2, 19.9), (10, 19.9), (50, 19.9), (100, 13), (256, 6.9)])
def test_classes_of_a_picture_are_clearly_apart(classes: int, units: float) -> None:
    """Of 1,203 classes, drawn by chance; and where the usual colours of all are the same or alike."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        assert closest(class_colours(rng.choice(1203, classes, replace=False).tolist()).values()) > units
    if classes <= 4:
        assert closest(class_colours(range(3, 3 + 256 * classes, 256)).values()) > 50


def test_a_class_keeps_its_colour_where_it_can() -> None:
    """For a class that is alone, for the smaller label of two that are alike, and for most in a usual picture."""
    assert all(class_colours([label]) == {label: PALETTE[label % 256]} for label in range(1203))
    found = class_colours([3, 259, 515])
    assert found[3] == PALETTE[3]
    assert closest(found.values()) > 50
    assert class_colours([259]) == {259: PALETTE[3]}
    rng, kept = np.random.default_rng(0), []
    for _ in range(50):
        colours = class_colours(rng.choice(1203, 10, replace=False).tolist())
        kept += [colour == PALETTE[label % 256] for label, colour in colours.items()]
    assert np.mean(kept) > 0.8
