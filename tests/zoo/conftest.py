"""What the tests of conversion share."""

from collections.abc import Iterator
from typing import Any

import pytest
from tiny import meta_without_values

from tailseg.model.detector import Detector
from tailseg.recipes.schema import Recipe
from tailseg.zoo import conversion

BUILT: dict[tuple[str, int], Detector] = {}


@pytest.fixture(autouse=True)
def detectors_of_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Conversion looks up the shapes of a recipe's detector; each is built once, not for every file of its kind."""
    build = conversion.build_detector

    def once(recipe: Recipe, num_classes: int, *arguments: Any, **options: Any) -> Detector:
        assert not arguments
        assert not options
        key = recipe.model_dump_json(exclude={"name"}), num_classes
        if key not in BUILT:
            BUILT[key] = build(recipe, num_classes)
            assert all(tensor.is_meta for tensor in BUILT[key].state_dict().values())
        return BUILT[key]

    monkeypatch.setattr(conversion, "build_detector", once)
    with meta_without_values():
        yield
