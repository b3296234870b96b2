"""A trained model in use: from pictures of any kind to detections."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tailseg.checkpoint import load_model, load_weights, require_fit
from tailseg.data.annotations.annotations import Category
from tailseg.data.batches import batch_of
from tailseg.data.transforms import fit_transform
from tailseg.devices import find_device
from tailseg.errors import UserError
from tailseg.evaluation.tta import detect_views, views_of
from tailseg.model.build import build_detector, float32_by_default
from tailseg.model.detector import Detector, Wanted
from tailseg.predict.exported import ExportedModel, is_exported, load_exported
from tailseg.predict.slices import detect_slices
from tailseg.predict.sources import Item, open_pictures
from tailseg.predict.thresholds import Thresholds, class_scores
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import override
from tailseg.results.detections import Detections
from tailseg.structures import Batch, RawDetections
from tailseg.threads import at_once

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
Single = Image.Image | NDArray[Any] | Tensor | bytes
# Recipe keys (or their beginnings) that do not touch what was trained.
AT_TEST_TIME = ("test.", "data.test_short_edge", "data.long_edge", "data.workers", "data.batch_per_device")


Classes = str | int | Sequence[str | int]


class PredictOptions(TypedDict, total=False):
    """Keyword arguments of `Model.predict`."""

    score: float | None
    thresholds: Thresholds | None
    classes: Classes | None
    max_detections: int | None
    batch: int
    slices: int | None
    overlap: float
    bgr: bool


@dataclass(frozen=True, slots=True)
class Look:
    """The way in which pictures are looked at: arguments of `Model.predict`, checked."""

    wanted: Wanted
    batch: int = 8  # pictures, or slices of one
    slices: int | None = None  # side in pixels
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"expected a batch of at least one picture, received {self.batch}")
        if self.slices is not None and self.slices < 1:
            raise ValueError(f"expected slices of at least one pixel, received {self.slices}")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"expected an overlap from 0 to 0.9, received {self.overlap}")


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A picture with what was found in it, or the sentence that says why it could not be read."""

    item: Item
    picture: Picture | None
    found: Detections | None
    fault: UserError | None = None


class Model:
    """A detector with its recipe and categories, ready to predict.

    Args:
        detector: trained, in evaluation mode; or an exported one.
        recipe: it was built from.
        categories: label -> category.
        path: of the file that it was read from, if any.
    """

    def __init__(
        self,
        detector: Detector | ExportedModel,
        recipe: Recipe,
        categories: tuple[Category, ...],
        path: Path | None = None,
    ) -> None:
        self.detector = detector
        self.recipe = recipe
        self.categories = categories
        self.path = path

    @property
    def names(self) -> list[str]:
        """Category names by label."""
        return [category.name for category in self.categories]

    @property
    def device(self) -> torch.device:
        """Device of the detector."""
        return self.detector.device

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that an exported model's pictures are fitted into, if it was exported for one size."""
        return self.detector.size if isinstance(self.detector, ExportedModel) else None

    @overload
    def predict(  # type: ignore[overload-overlap]  # bytes are iterable too
        self, source: Single, **options: Unpack[PredictOptions]
    ) -> Detections: ...

    @overload
    def predict(  # type: ignore[overload-overlap]  # so are lists
        self, source: list[Any] | tuple[Any, ...], **options: Unpack[PredictOptions]
    ) -> list[Detections]: ...

    @overload
    def predict(self, source: str | PathLike[str], **options: Unpack[PredictOptions]) -> Any: ...

    @overload
    def predict(self, source: Iterable[Any], **options: Unpack[PredictOptions]) -> Iterator[Detections]: ...

    def predict(
        self,
        source: Any,
        *,
        score: float | None = None,
        thresholds: Thresholds | None = None,
        classes: Classes | None = None,
        max_detections: int | None = None,
        batch: int = 8,
        slices: int | None = None,
        overlap: float = 0.2,
        bgr: bool = False,
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """Detect the objects of pictures; averaged over views of each if the recipe's ``test.tta`` says so.

        Args:
            source: one picture: the path of an image file, an http(s) address, a Pillow image, the bytes of an image
                file or a file opened for reading them, an array (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, or a
                tensor (H, W), (3, H, W) or (4, H, W). Arrays and tensors hold uint8, uint16 (of which the upper 8 bits
                count) or floats from 0 to 1.
                Or many: a folder (with the folders in it), a glob pattern such as ``"photos/**/*.jpg"``, a video file,
                or a list, a tuple or any other iterable of all these.
            score: lowest score, in [0, 1]; None takes the recipe's ``test.score_threshold``.
            thresholds: lowest scores by class instead: JSON file that ``eval --analyse`` wrote, or its content,
                ``{"default": 0.3, "classes": {"owl": 0.4}}``.
            classes: names or category ids; only these are looked for. None looks for all.
            max_detections: best detections of a picture that are kept; None takes the recipe's number, and has no limit
                for a picture in slices.
            batch: pictures, or slices of one, that go through the detector together, where they have the same size
                there. It changes speed and memory; results differ by rounding alone.
            slices: side in pixels of the overlapping slices in which larger pictures are looked at, and as a whole;
                None has no slices. Objects cut by an edge are joined.
            overlap: share of a slice that the next one shows too, in [0, 0.9]; objects that are found in slices alone
                are joined if it is above 0.
            bgr: arrays and tensors are BGR or BGRA, as OpenCV's are.

        Returns:
            `Detections` of one picture, best score first, in its pixels; a list of them for a list or tuple; for a
            folder, a pattern, a video or another iterable an iterator, which looks ahead by ``batch`` pictures and
            keeps no other.

        Raises:
            UserError: a file is missing or broken, or a class is unknown, in ``thresholds`` too. An iterator leaves a
                picture that cannot be read out and logs a warning instead, also with the number of them at its end.
            TypeError: the source is of another kind.
            ValueError: an array or tensor of another shape or type, an option out of range, or ``score`` beside
                ``thresholds``.
        """
        opened = open_pictures(source, bgr=bgr)
        look = Look(self._wanted(score, thresholds, classes, max_detections), batch, slices, overlap)
        outcomes = self.outcomes(opened.items, look)
        if opened.kind == "stream":
            return _readable(outcomes)
        found = [_sound(outcome) for outcome in outcomes]
        return found[0] if opened.kind == "one" else found

    def outcomes(self, items: Iterable[Item], look: Look) -> Iterator[Outcome]:
        """Detections of each picture in turn, or the reason why there are none.

        At most ``look.batch`` pictures are read ahead.
        """
        waiting = iter(items)
        while part := list(islice(waiting, look.batch)):
            read = at_once(_read, part)
            pictures = [picture for picture in read if not isinstance(picture, UserError)]
            found = iter(self._detect_all(pictures, look))
            for item, picture in zip(part, read, strict=True):
                if isinstance(picture, UserError):
                    yield Outcome(item, None, None, picture)
                else:
                    origin = picture if item.path is None else item.path
                    yield Outcome(item, picture, Detections(next(found), self.categories, origin, item.name))

    @float32_by_default()
    def _detect_all(self, pictures: Sequence[Picture], look: Look) -> list[RawDetections]:
        if look.slices is None:
            return self._detect(pictures, look.wanted)
        limit, most = look.wanted.limit, self.detector.max_detections
        wanted = replace(look.wanted, limit=None if limit is None else max(limit, most))
        detect_picture = partial(
            detect_slices,
            partial(self._detect, wanted=wanted),
            side=look.slices,
            overlap=look.overlap,
            iou=self.detector.nms_iou,
            batch=look.batch,
        )
        found = [detect_picture(picture) for picture in pictures]
        return found if limit is None else [raw[torch.arange(min(limit, len(raw)))] for raw in found]

    def _detect(self, pictures: Sequence[Picture], wanted: Wanted) -> list[RawDetections]:
        """Detections of each picture, on the CPU. Pictures of one padded size share a batch, which changes nothing."""
        if self.recipe.test.tta and isinstance(self.detector, Detector):
            views = views_of(self.recipe)
            return [detect_views(self.detector, picture, views, wanted).to("cpu") for picture in pictures]
        data = self.recipe.data
        transform = fit_transform(data.test_short_edge, data.long_edge, self.size)
        alike: dict[tuple[int, ...], list[int]] = {}
        batches = at_once(lambda picture: batch_of(picture, transform, self.detector.divisor), pictures)
        for i, batch in enumerate(batches):
            alike.setdefault(tuple(batch.images.shape), []).append(i)
        found: dict[int, RawDetections] = {}
        for rows in alike.values():
            together = _together([batches[i] for i in rows]).to(self.device)
            for i, raw in zip(rows, self.detector.detect(together, wanted), strict=True):
                found[i] = raw.to("cpu")
        return [found[i] for i in range(len(pictures))]

    def _wanted(
        self,
        score: float | None,
        thresholds: Thresholds | None,
        classes: Classes | None,
        max_detections: int | None,
    ) -> Wanted:
        if score is not None and thresholds is not None:
            raise ValueError(f"score={score} and thresholds: each states the lowest score; give one of them")
        if score is not None and not 0 <= score <= 1:
            raise ValueError(f"expected a score from 0 to 1, received {score}")
        if max_detections is not None and max_detections < 1:
            raise ValueError(f"expected max_detections of at least 1, received {max_detections}")
        asked = [classes] if isinstance(classes, str | int | Integral) else classes
        labels = None if asked is None else tuple(sorted({label for one in asked for label in self._labels_of(one)}))
        if thresholds is None:
            return Wanted(min_score=score, labels=labels, limit=max_detections)
        least = class_scores(thresholds, self.categories)
        return Wanted(min_score=min(least), class_scores=least, labels=labels, limit=max_detections)

    def _labels_of(self, asked: str | int) -> list[int]:
        """The labels of a class's name or category id."""
        if isinstance(asked, str):
            found = [label for label, name in enumerate(self.names) if name == asked]
            if not found:
                near = difflib.get_close_matches(asked, self.names, 1, 0.0)
                raise UserError(f"the model has no class {asked!r}; the nearest is {near[0]!r}")
            return found
        found = [label for label, category in enumerate(self.categories) if category.id == asked]
        if not found:
            ids = sorted(category.id for category in self.categories)
            raise UserError(f"the model has no class of id {asked}; its ids lie between {ids[0]} and {ids[-1]}")
        return found


def _read(item: Item) -> Picture | UserError:
    try:
        return item.read()
    except UserError as error:
        return error


def _sound(outcome: Outcome) -> Detections:
    if outcome.found is None:
        raise outcome.fault or AssertionError
    return outcome.found


def _readable(outcomes: Iterator[Outcome]) -> Iterator[Detections]:
    done = faults = 0
    for outcome in outcomes:
        done += 1
        if outcome.found is None:
            faults += 1
            logger.warning("%s (left out)", outcome.fault)
        else:
            yield outcome.found
    if faults:
        logger.warning("%d of %d pictures could not be read and were left out.", faults, done)


def _together(batches: Sequence[Batch]) -> Batch:
    """Batches of one padded size, without objects, as one."""
    return Batch(**{f.name: torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(Batch)})


def load(path: str | Path, device: str | int | torch.device | None = None, settings: Sequence[str] = ()) -> Model:
    """Read a model file, onto the GPU if there is one.

    Args:
        path: of a model that `tailseg train` saved, or of its run's folder: then the best model, else the last; or of
            an ONNX file that `tailseg export` wrote, which runs on the CPU and keeps its settings: others are refused.
        device: where it shall run (see `find_device`).
        settings: recipe overrides that a trained model allows, such as ``test.nms_iou=0.6``.

    Raises:
        UserError: the file is missing, damaged or not a tailseg model, there is no such device, or a setting is faulty,
            not of the test or idle.
    """
    target = find_device(device)
    if is_exported(path):
        if device not in (None, "auto") and target.type != "cpu":
            raise UserError(f"device '{device}': {path} is an exported model and runs on the CPU; choose cpu")
        exported, recipe, categories = load_exported(Path(path))
        for setting in settings:
            if override(recipe, [setting]) != recipe:
                raise UserError(f"--set {setting}: {path} has the settings of its export; export it again with others")
        return Model(exported, recipe, categories, Path(path))
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
    detector = detector.to(target).to(memory_format=torch.channels_last).eval()
    return Model(detector, recipe, checkpoint.categories, checkpoint.path)
