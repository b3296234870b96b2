"""How a checkpoint of another project would be converted, tensor by tensor: `tailseg convert ... --explain`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tailseg.errors import UserError
from tailseg.zoo.conversion import ForeignModel, converted, left_over, listed_categories, plan_of
from tailseg.zoo.other_parts import by_part


def explain(foreign: ForeignModel, *, categories: Path | None, settings: Sequence[str]) -> Iterator[str]:
    """Lines: each tensor and its place in our model; those that are left over, by part; those that are missing.

    Args:
        foreign: the checkpoint.
        categories: annotation file with the classes that it was trained on.
        settings: recipe overrides.

    Raises:
        UserError: after the last line, what `convert` would raise.
    """
    listed = None if categories is None else len(listed_categories(categories))
    try:
        wanted = plan_of(foreign, listed, settings).wanted
    except UserError:
        wanted = None  # then the known names are all that can be told
    surplus = left_over(foreign, wanted)
    placed = {foreign.origins.get(ours, ours): ours for ours in foreign.state if wanted is None or ours in wanted}
    width = max(map(len, placed), default=0)
    for theirs, ours in placed.items():
        yield f"{theirs:{width}} -> {ours} {tuple(foreign.state[ours].shape)}"
    counts = [f"{len(placed)} tensors with a place", f"{len(surplus)} left over"]
    missing = [] if wanted is None else [key for key in wanted if key not in foreign.state]
    if wanted is not None:
        counts.append(f"{len(missing)} missing")
    if foreign.unused:
        counts.append(f"{len(foreign.unused)} not needed ({', '.join(foreign.unused)})")
    yield f"{foreign.path}: {', '.join(counts)}."
    for part, names in by_part(foreign.project, surplus).items():
        yield f"Left over, of {part}:"
        yield from (f"  {name}" for name in names)
    if missing:
        yield "Missing (counters are filled in):"
        yield from (f"  {name}" for name in missing)
    yield from foreign.remarks
    recipe, labels, _ = converted(foreign, categories=categories, settings=settings)
    yield f"It can be converted: {recipe.model.backbone.name}, {len(labels)} classes, loss {recipe.classifier.loss}."
