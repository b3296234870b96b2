"""Upper bounds of recipe values, far beyond any use: a model file may not ask for more than any machine has."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LONGEST_EDGE = 16384  # pixels of an image for the network
WIDEST = 16384  # channels of a layer
DEEPEST = 64  # layers after each other
MOST_BOXES = 100_000  # of an image

Edge = Annotated[int, Field(ge=1, le=LONGEST_EDGE)]
TestEdges = Annotated[tuple[Annotated[int, Field(ge=32, le=LONGEST_EDGE)], ...], Field(min_length=1, max_length=64)]
Deviation = Annotated[float, Field(gt=0)]
