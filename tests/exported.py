"""A tiny model file for the tests of exporting."""

from pathlib import Path

import torch
from tiny import SMALL_RECIPE

from tailseg.checkpoint import save_model
from tailseg.data.annotations.annotations import Category
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve

CATEGORIES = tuple(Category(7 * i + 3, name, "c", 2, 3) for i, name in enumerate(("owl", "<b>", "päärynä")))
ANY_PICTURE = ("model.backbone.name=resnet10t", "test.score_threshold=0.05")


def made_model(path: Path, recipe_name: str, *settings: str) -> Path:
    torch.manual_seed(0)
    recipe = resolve(recipe_name, [*SMALL_RECIPE, *ANY_PICTURE, *settings])
    detector = build_detector(recipe, len(CATEGORIES))
    for name, part in detector.named_modules():
        if name.endswith("conv_offset"):  # taps that look elsewhere, not as at the start
            torch.nn.init.normal_(part.weight, std=0.05)
    save_model(path, detector, recipe, CATEGORIES, step=1)
    return path
