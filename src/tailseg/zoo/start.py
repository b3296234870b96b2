"""What a training may start from: a model of ours, COCO weights by name, or a checkpoint of another project."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from tailseg.checkpoint import VERSION
from tailseg.data.annotations.cache import cache_folder, content_key
from tailseg.errors import UserError
from tailseg.recipes.model_header import model_file
from tailseg.recipes.schema import Recipe
from tailseg.zoo.checkpoint_files import read_checkpoint
from tailseg.zoo.conversion import ForeignModel, convert, state_dict_of
from tailseg.zoo.detectron2 import CONFIGURATION, read_detectron2
from tailseg.zoo.mmdet import read_mmdet
from tailseg.zoo.torchvision import NAME, published_file, read_torchvision

logger = logging.getLogger(__name__)

COCO, COCO_BACKBONE = "coco", "resnet50"
# Beginnings of names that only one project's Mask R-CNN has.
MARKS = {
    "torchvision": ("roi_heads.box_predictor.", "rpn.head."),
    "mmdet": ("roi_head.bbox_head.", "rpn_head."),
    "detectron2": ("proposal_generator.", "backbone.bottom_up."),
}
READERS: dict[str, Callable[[Path], ForeignModel]] = {
    "torchvision": lambda path: read_torchvision(str(path)),
    "mmdet": read_mmdet,
    "detectron2": read_detectron2,
}


def starting_model(init: str | Path, recipe: Recipe | None = None) -> Path:
    """The model file of ours that ``--init`` means.

    Args:
        init: ``coco``: torchvision's Mask R-CNN R50-FPN, which torchvision downloads; a model file or a run's folder
            of ours; or a checkpoint of torchvision, mmdetection or detectron2, of which nothing is ever run. What is
            not ours is converted once and kept in the cache.
        recipe: is to start from it; one that COCO weights do not fit is refused before they are downloaded.

    Raises:
        UserError: there is no such file, the download fails, or the checkpoint is of none of these.
    """
    if str(init) == COCO:
        network = COCO_BACKBONE if recipe is None else recipe.model.backbone.name
        if network.partition(".")[0] != COCO_BACKBONE:
            raise UserError(
                f"--init coco: the weights are those of a Mask R-CNN with {COCO_BACKBONE}, and the recipe has "
                f"{network}; take own/fast, or leave out --init"
            )
        file = published_file()
        return _converted(file, "torchvision", lambda: read_torchvision(NAME))
    path = model_file(Path(init))
    if path.suffix == ".safetensors":
        return path
    if not path.is_file():
        near = "; did you mean coco?" if difflib.get_close_matches(str(init).lower(), [COCO], 1, 0.7) else ""
        raise UserError(
            f"--init {init}: there is no such file{near or '; give coco, a model, a run, or a checkpoint to convert'}"
        )
    kind = project_of(path)
    return _converted(path, kind, lambda: READERS[kind](path))


def project_of(path: Path) -> str:
    """The project whose Mask R-CNN a checkpoint holds, told by the names of its tensors.

    Raises:
        UserError: none of those that are converted; or the file is no checkpoint, or cannot be read safely.
    """
    tensors = state_dict_of(read_checkpoint(path), path, ("state_dict", "model", "model_state_dict"))
    for kind, marks in MARKS.items():
        if any(key.startswith(marks) for key in tensors):
            return kind
    raise UserError(
        f"--init {path}: is no Mask R-CNN of torchvision, mmdetection or detectron2 (its first tensor is "
        f"'{next(iter(tensors))[:60]}'); give a model of ours or a checkpoint of one of these"
    )


def _converted(source: Path, kind: str, read: Callable[[], ForeignModel]) -> Path:
    """The conversion of a checkpoint, from the cache if it was made before."""
    folder = cache_folder() / "converted"
    stem = re.sub(r"[^\w.-]+", "-", source.stem)[:60]
    config = source.with_name(CONFIGURATION)  # which says what the tensors of detectron2 do not
    beside = "" if kind != "detectron2" else f"-{content_key(config) if config.is_file() else 'alone'}"
    out = folder / f"{stem}-{content_key(source)}{beside}-{VERSION}.safetensors"
    if not out.is_file():
        # Several processes may do so at once: each writes a file of its own.
        part = folder / f"{out.stem}.{os.getpid()}.safetensors"
        try:
            convert(read(), part)
        except UserError as error:
            raise UserError(f"{error} (`tailseg convert {kind}` has options for what a file does not say)") from error
        os.replace(part, out)
    logger.info("--init %s: a model of %s, converted to %s.", source, kind, out)
    return out
