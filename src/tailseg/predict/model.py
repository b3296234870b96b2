"""A trained model in use: from an image to detections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tailseg.checkpoint import load_model, load_weights, require_fit
from tailseg.data.annotations.annotations import Category
from tailseg.data.annotations.masks import pixels_covered
from tailseg.data.exporters.export import Exported, export
from tailseg.data.exporters.outlines import editable
from tailseg.data.exporters.records import ExportImage, ExportObject, ExportSet
from tailseg.data.images import read_image, to_rgb
from tailseg.data.loading import batch_of
from tailseg.data.transforms import fit_transform
from tailseg.errors import UserError
from tailseg.evaluation.tta import detect_views, views_of
from tailseg.layers.paste import encode_masks
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.progress import progress_bar
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override
from tailseg.results.detections import Detections
from tailseg.structures import RawDetections
from tailseg.visualize.draw import draw_detections

Picture = NDArray[np.uint8]
# Recipe keys (or their beginnings) that do not touch what was trained.
AT_TEST_TIME = ("test.", "data.test_short_edge", "data.long_edge", "data.workers", "data.batch_per_device")


class Model:
    """A detector with its recipe and categories, ready to predict.

    Args:
        detector: trained, in evaluation mode.
        recipe: it was built from.
        categories: label -> category.
    """

    def __init__(self, detector: Detector, recipe: Recipe, categories: tuple[Category, ...]) -> None:
        self.detector = detector
        self.recipe = recipe
        self.categories = categories

    @property
    def names(self) -> list[str]:
        """Category names by label."""
        return [category.name for category in self.categories]

    @property
    def device(self) -> torch.device:
        """Device of the detector."""
        return self.detector.pixel_mean.device

    def predict(self, image: str | Path | Image.Image | Picture | Tensor) -> Detections:
        """Detect the objects of one image; averaged over views of it if the recipe's ``test.tta`` says so.

        Args:
            image: path, Pillow image, uint8 array (H, W, 3) RGB, or uint8 tensor (3, H, W) RGB.

        Returns:
            The objects found, in pixels of that image, best score first.

        Raises:
            UserError: the file is missing or broken.
            ValueError: an array or tensor of another shape or type.
        """
        picture = to_picture(image)
        data = self.recipe.data
        if self.recipe.test.tta:
            raw = detect_views(self.detector, picture, views_of(self.recipe.test))
        else:
            batch = batch_of(picture, fit_transform(data.test_short_edge, data.long_edge), self.detector.divisor)
            raw = self.detector.detect(batch.to(self.device))[0]
        return Detections(raw, self.categories, Path(image) if isinstance(image, str | Path) else picture)


def load(path: str | Path, device: str | torch.device | None = None, settings: Sequence[str] = ()) -> Model:
    """Read a model file, onto the GPU if there is one.

    Args:
        path: of a model that `tailseg train` saved.
        device: where it shall run.
        settings: recipe overrides that a trained model allows, such as ``test.nms_iou=0.6``.

    Raises:
        UserError: the file is missing, damaged or not a tailseg model, or a setting is faulty, not of the test or idle.
    """
    checkpoint = load_model(Path(path))
    for setting in settings:
        if not setting.startswith(AT_TEST_TIME):
            allowed = ", ".join(AT_TEST_TIME)
            raise UserError(f"--set {setting}: a trained model allows {allowed}; train again for others")
    recipe = override(checkpoint.recipe, settings)
    idle = next((setting for setting in settings if setting.startswith("test.tta_") and not recipe.test.tta), None)
    if idle is not None:
        raise UserError(f"--set {idle}: without views it changes nothing; add --tta, or test.tta=true")
    with torch.device("meta"):  # first without memory: a small file can claim a large model
        require_fit(build_detector(recipe, len(checkpoint.categories)).state_dict(), checkpoint.state, checkpoint.path)
    detector = build_detector(recipe, len(checkpoint.categories))
    load_weights(detector, checkpoint.state, checkpoint.path)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    detector = detector.to(target).to(memory_format=torch.channels_last).eval()
    return Model(detector, recipe, checkpoint.categories)


def to_picture(image: str | Path | Image.Image | Picture | Tensor) -> Picture:
    """Any accepted image as (H, W, 3) uint8 RGB."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image, Path("image"), upright=True)  # as if read from its file
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or image.numel() == 0:
            raise ValueError(f"expected a uint8 tensor (3, H, W), received {image.dtype} {tuple(image.shape)}")
        return image.permute(1, 2, 0).cpu().numpy()
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"expected a uint8 array (H, W, 3), received {image.dtype} {image.shape}")
    return image


def predict_files(
    model: Model, images: Sequence[Path], out: Path, *, min_score: float = 0.5, show: bool = True
) -> list[str]:
    """Write ``out/STEM.png``, the picture with its detections, and ``out/STEM.json`` for each image.

    A faulty image does not stop the others.

    Returns:
        A sentence for each image that could not be done.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: the folder cannot be made ({error.strerror}); choose another --out") from error
    faults: list[str] = []
    taken: set[str] = {path.name for path in out.iterdir() if path.resolve() in {i.resolve() for i in images}}
    with progress_bar("predicting", len(images), show=show) as advance:
        for done, path in enumerate(images, start=1):
            try:
                picture = read_image(path)
                found = model.predict(picture)
                _write_prediction(model, path, picture, found, out / _free_stem(path.stem, taken), min_score)
            except UserError as error:
                faults.append(str(error))
            advance(done)
    return faults


def export_predictions(
    model: Model, images: Sequence[Path], out: Path, kind: str, *, min_score: float = 0.5, show: bool = True
) -> tuple[Exported, list[str]]:
    """Write the images and their detections to a new folder in the format of a tool in which they can be corrected.

    Masks become polygons of few corners, see `editable`. A faulty image does not stop the others.

    Args:
        model: finds the objects.
        images: their files.
        out: the new folder.
        kind: the format: coco, yolo, labelme or cvat.
        min_score: detections below it are not written.
        show: draw a progress bar.

    Returns:
        Counts and notes; a sentence for each image that could not be done.

    Raises:
        UserError: the folder is not empty or cannot be made, or none of the images could be done.
    """
    faults: list[str] = []

    def predicted() -> Iterator[ExportImage]:
        with progress_bar("predicting", len(images), show=show) as advance:
            for done, path in enumerate(images, start=1):
                try:
                    found = model.predict(path)
                except UserError as error:
                    faults.append(str(error))
                else:
                    objects = _export_objects(found[found.scores >= min_score].raw)
                    yield ExportImage(path.name, path, found.image_hw, objects)
                advance(done)
        if faults and len(faults) == len(images):
            raise UserError("; ".join(faults))

    return export(kind, ExportSet("the model", model.categories, {"": predicted()}), out), faults


def _export_objects(found: RawDetections) -> list[ExportObject]:
    """Detections as objects of an export."""
    codes = [code["counts"].encode() for code in encode_masks(found.masks, found.boxes, found.image_hw)]
    segmentations = [editable(code, found.image_hw) for code in codes]
    rows = zip(found.labels.tolist(), found.boxes.tolist(), segmentations, found.scores.tolist(), strict=True)
    return [
        ExportObject(label, (x1, y1, x2 - x1, y2 - y1), mask, pixels_covered(mask, found.image_hw), score=score)
        for label, (x1, y1, x2, y2), mask, score in rows
    ]


def _free_stem(stem: str, taken: set[str]) -> str:
    """``stem``, numbered if an image of that name was written before or is one of the inputs."""
    number, free = 1, stem
    while {f"{free}.png", f"{free}.json"} & taken:
        number += 1
        free = f"{stem}-{number}"
    taken |= {f"{free}.png", f"{free}.json"}
    return free


def _write_prediction(
    model: Model, path: Path, picture: Picture, found: Detections, target: Path, min_score: float
) -> None:
    kept = found[found.scores >= min_score].raw
    drawn = draw_detections(picture, kept, model.names, min_score=min_score)
    content = {
        "image": str(path),
        "height": picture.shape[0],
        "width": picture.shape[1],
        "detections": to_json(kept, model.categories),
    }
    try:
        Image.fromarray(drawn).save(target.with_name(target.name + ".png"))
        target.with_name(target.name + ".json").write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise UserError(
            f"{target}: could not be written ({error.strerror}); make room or choose another --out"
        ) from error


def to_json(detections: RawDetections, categories: tuple[Category, ...]) -> list[dict[str, Any]]:
    """Detections as plain values: category, score, bbox xywh in pixels, segmentation as COCO RLE.

    A model that ranks masks by a score of their own adds a mask_score.
    """
    masks = encode_masks(detections.masks, detections.boxes, detections.image_hw)
    found = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), masks, strict=True)
    rows: list[dict[str, Any]] = [
        {
            "category_id": categories[label].id,
            "category": categories[label].name,
            "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "segmentation": mask,
        }
        for (x1, y1, x2, y2), score, label, mask in found
    ]
    if detections.mask_scores is not None:
        for row, mask_score in zip(rows, detections.mask_scores.tolist(), strict=True):
            row["mask_score"] = mask_score
    return rows
