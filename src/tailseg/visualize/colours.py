"""Colours of classes in pictures: 256 that the eye tells apart.

The first seven are Okabe and Ito's, which the common forms of colour blindness keep apart, without black, which
dark photographs swallow. The others come from ``glasbey.extend_palette(first, palette_size=256,
lightness_bounds=(30, 92), chroma_bounds=(30, 100), colorblind_safe=False)`` of glasbey 0.4.0: each one lies as far
as possible from all before it, and none is near black, white or grey. In CIELAB two of the first 64 are at least 12
units apart, two of all 256 at least 7; the eye notices about 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]  # RGB, 0 to 255

_CODES = bytes.fromhex(
    "e69f0056b4e9009e73f0e4420072b2d55e00cc79a78e00db86ffdb69610000d700dbc6ffaa007d9a82ffa2ba7de300ff"
    "5d9600825986046d69ffbe96b6e7ff5539ff8e491ca2824900cac204712dff92ff9aff8235d28aff2dbe3196a2798ab2"
    "a6be00b296ca595996458affffbadfe3f7b2a661ce698651a2b2ffe38e5900f7ff9e9200ae04be8e4dffdbc269c249a2"
    "d279ff00b24d71b29ac6ff00a6dfaebadb71c67d0400ffa28ac2d29a69005dfb046d71ca3992c6ff79ca45758aff7900"
    "3d7d618675a600d7fb75c659ff55f7b6a2550469f751750096dbce82a24dae65357d55aeffdf9adb9ace0c9241ca69ca"
    "ffc21cb600ff96457592caffaeffffa6658ed7a2fb00e7be516935ffaa558eaace7d7d20c2aa0445e76996df3931b2c6"
    "8296e755b600795924c2d2ff00ae9e753dc2863d96c2ffd2d7fb7d69a271596d96f7b6ffe300ca4d9286395db6a255a6"
    "aa79ae6d9ab2d7aa7100ba8ab69affd7c600be825d0ca2fb8aa60000820079be86968acaa661ffbaaee75d61ff82dfef"
    "ae4d0071ceaab6be55e361baae7de3c64dff8edf8669aaaabe41ce929251a27d109a41c296fbae108286c6df00867135"
    "ca0096ffef82757dff75aeff4979ca8a69cea63596d29641d7db926de7aabe9204e77ddb00a6086955867dc2baff9edb"
    "0086a635658a457d3d559e49699ed75d59caca7535925d3dffc66d00ce5d7169a2c686d2498e5d10fbe3baef9efb920c"
    "6d8e3520e3db7dc6005d86a2a2a63db269049a35f39600bed7aee3356d45eff700006d7de359fb9a9ece00a6d265b261"
    "c220b64dff65ba9259ff0ce7dfb631dbd25951c6d700824d8e61a6b2d292aebae7007159b6f35514867582efeb658ace"
    "92b65535aa69ffd75d75aec29eca51204dfb1ccaaabaffebbe8ab66d7539efa6795dcaff9a550000ffc67141ffdf7500"
    "ffcafbb665aa9aa665df49db498a288a00ffef79ffbeb671be6ddf9a6d39008ae3df35aa9ad2ef55a286e3ae51a6ebce"
    "829200e78abe69aa35866df39e9eff7d7dba5de739ae8e399abedf35be71ffae289e75be826900457dae7955ceff924d"
)
CLEARLY_APART = 20  # CIELAB units
PALETTE: tuple[Colour, ...] = tuple(zip(_CODES[0::3], _CODES[1::3], _CODES[2::3], strict=True))


@cache
def _distances() -> NDArray[np.float32]:
    """Distance of each two colours of the palette in CIELAB, (256, 256)."""
    lab = cv2.cvtColor(np.array(PALETTE, dtype=np.float32)[None] / 255, cv2.COLOR_RGB2LAB)[0]
    distances: NDArray[np.float32] = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return distances


def class_colours(labels: Iterable[int]) -> dict[int, Colour]:
    """Give each class of a picture a colour that the eye tells apart from those of all others in it.

    The usual colour of a class is ``PALETTE[label % 256]``. It has that in every picture, unless a class of a smaller
    label that keeps its own has one less than 20 CIELAB units away. It then gets the colour that is farthest from all
    others in the picture. So two of up to 50 classes are 20 units apart, two of 100 still 14.

    Args:
        labels: classes in the picture, in any order, repeated or not, each >= 0.

    Returns:
        Class -> RGB; all different for up to 256 classes.
    """
    shown, distances = sorted(set(labels)), _distances()
    places: dict[int, int] = {}
    nearest = np.full(len(PALETTE), np.inf, dtype=np.float32)  # distance of each colour to those given away
    for label in shown:
        usual = label % len(PALETTE)
        if nearest[usual] >= CLEARLY_APART:
            places[label] = usual
            nearest = np.minimum(nearest, distances[usual])
    for label in shown:
        if label not in places:
            places[label] = int(nearest.argmax()) if nearest.any() else label % len(PALETTE)
            nearest = np.minimum(nearest, distances[places[label]])
    return {label: PALETTE[places[label]] for label in shown}


def text_colour(plate: Colour) -> Colour:
    """Black or white, whichever has the higher contrast on ``plate`` (WCAG 2 relative luminance)."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in plate)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    white_contrast, black_contrast = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05
    return (255, 255, 255) if white_contrast > black_contrast else (0, 0, 0)
