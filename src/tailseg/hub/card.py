"""The model card: what a model is, what it was trained on, how good it is, under which licence, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tailseg.checkpoint import Checkpoint
from tailseg.data.annotations.frequency import GROUPS
from tailseg.errors import UserError
from tailseg.wording import controls_escaped

KINDS = {"bbox": "boxes", "segm": "masks", "boundary": "outlines"}
ROWS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APr": "AP, rare classes",
    "APc": "AP, common classes",
    "APf": "AP, frequent classes",
}
NAMES = 200  # classes that a card lists
LARGEST_METRICS = 1 << 20  # bytes


def model_card(
    model: Checkpoint,
    repository: str,
    *,
    licence: str,
    data: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """The README.md of a model's repository.

    Args:
        model: read with `tailseg.checkpoint.load_model`.
        repository: ``owner/name``.
        licence: identifier of the hub's list, such as ``apache-2.0``.
        data: one sentence on the training data, or their name.
        metrics: content of a metrics.json, fractions in [0, 1]; None takes those in the model, if it has any.

    Returns:
        Markdown with the hub's YAML header. Names from the model are escaped.

    Raises:
        UserError: what the model has for metrics are none.
    """
    recipe = model.recipe
    header = {
        "license": licence,
        "library_name": "tailseg",
        "pipeline_tag": "image-segmentation",
        "tags": ["tailseg", "instance-segmentation", "long-tailed", "lvis"],
    }
    heads = {1: "Mask R-CNN", 3: "Cascade Mask R-CNN"}.get(len(recipe.model.stages), "detector")
    name = repository.partition("/")[2]
    file = f"{name}.safetensors"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_plain(name)}",
        f"An instance segmenter made with [tailseg](https://github.com/tailseg/tailseg): {heads} with "
        f"{_plain(recipe.model.backbone.name.partition('.')[0])}, classifier `{recipe.classifier.loss}`, "
        f"{len(model.categories):,} classes. Recipe `{_plain(recipe.name)}`, {model.step:,} training steps, images of "
        f"{recipe.data.test_short_edge} px on the shorter edge.",
        "## Use it",
        f"```\npip install tailseg\ntailseg hub pull {repository}\ntailseg predict {file} photo.jpg\n```",
        f'```python\nimport tailseg\n\nfound = tailseg.load("{file}").predict("photo.jpg", score=0.3)\n'
        "print(found.names, found.masks.shape)\n```",
        "The file carries its recipe and its classes: `tailseg recipes show "
        + file
        + "` prints all settings. It holds "
        "tensors and text only; nothing in it is run.",
        "## Training data",
        _plain(data) if data else "Not stated.",
        _groups(model),
        "## Results",
        _results(_metrics_in(model) if metrics is None else metrics),
        "## Licence",
        f"`{licence}`, for the weights. The images that the model was trained on may have terms of their own.",
    ]
    return "\n\n".join(parts) + "\n"


def _groups(model: Checkpoint) -> str:
    lines = ["| group | classes | training images of a class | annotated objects |", "|---|---:|---:|---:|"]
    for letter, name in GROUPS.items():
        inside = [category for category in model.categories if category.frequency == letter]
        if inside:
            counts = sorted(category.image_count for category in inside)
            images = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
            objects = sum(category.instance_count for category in inside)
            lines.append(f"| {name} | {len(inside):,} | {images} | {objects:,} |")
    names = [_plain(category.name) for category in model.categories]
    rest = f", and {len(names) - NAMES:,} more" if len(names) > NAMES else ""
    return "\n".join(lines) + f"\n\nClasses: {', '.join(names[:NAMES])}{rest}."


def _metrics_in(model: Checkpoint) -> Mapping[str, Any] | None:
    found = model.metrics or {}
    if not all(_is_metrics(found[kind]) for kind in KINDS if kind in found):
        raise UserError(
            f"{model.path}: its metrics are no fractions from 0 to 1; the file was edited: give --metrics METRICS.json"
        )
    return found


def _results(metrics: Mapping[str, Any] | None) -> str:
    if not metrics:
        return "Not stated."
    kinds = [kind for kind in KINDS if isinstance(metrics.get(kind), Mapping)]
    lines = [f"| % | {' | '.join(KINDS[kind] for kind in kinds)} |", "|---|" + "---:|" * len(kinds)]
    for key, title in ROWS.items():
        values = [metrics[kind].get(key) for kind in kinds]
        if any(value is not None for value in values):
            cells = ["–" if value is None else f"{100 * value:.1f}" for value in values]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "On the validation split, by the rules of LVIS:\n\n" + "\n".join(lines)


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of a metrics.json of `tailseg eval` or `tailseg score`.

    Raises:
        UserError: the file is missing, too large, or none of those.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_METRICS + 1)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the metrics.json of `tailseg eval`"
        ) from error
    if len(content) > LARGEST_METRICS:
        raise UserError(f"{path}: is larger than 1 MiB, so no metrics.json; give the one that `tailseg eval` wrote")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON; give the metrics.json that `tailseg eval` wrote") from error
    kinds = [found[kind] for kind in KINDS if kind in found] if isinstance(found, dict) else []
    if not kinds or not all(_is_metrics(kind) for kind in kinds):
        raise UserError(f"{path}: holds no metrics of boxes or masks; give the metrics.json that `tailseg eval` wrote")
    return dict(found)


def _is_metrics(values: object) -> bool:
    return isinstance(values, dict) and all(
        value is None or (type(value) in (int, float) and 0 <= value <= 1)
        for key, value in values.items()
        if key in ROWS
    )


def _plain(text: str) -> str:
    """A text that shows as it is in Markdown: no control characters, markup, tables or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&$~])", r"\\\1", controls_escaped(text).replace("\n", " ").replace("\t", " "))
