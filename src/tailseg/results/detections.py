"""The results object: the objects that a model found in one picture."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from torch import Tensor

from tailseg.data.annotations.annotations import Category
from tailseg.data.exporters.labelme import labelme_content
from tailseg.data.exporters.records import ExportImage, ExportSet, class_names
from tailseg.data.images import read_image
from tailseg.data.importers.foreign import LeftOut
from tailseg.errors import UserError
from tailseg.files import write_whole
from tailseg.results import masks, pictures
from tailseg.results.indexing import positions
from tailseg.results.rows import coco_rows, export_objects, json_rows
from tailseg.structures import RawDetections
from tailseg.visualize.page import data_uri, render
from tailseg.wording import controls_escaped, printable

if TYPE_CHECKING:
    import pandas
    import supervision

log = logging.getLogger(__name__)

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
ROWS_SHOWN = 10  # objects in the table of a notebook, classes in a summary


class Detections:
    """The objects found in one picture, best score first; N objects, H x W pixels.

    It behaves like a list: ``len(found)``, ``for one in found``, ``found[0]``, ``found[-3:]`` and
    ``found[found.scores > 0.5]``; each part is a `Detections` of fewer objects, and one object is a `Detections` of
    one. All tensors lie on the CPU. A mask is kept as a small grid over its box, so the object itself is small;
    what is as large as the picture is made when asked for.

    Args:
        raw: the objects as the detector returns them, in pixels of the picture.
        categories: category of each label.
        picture: (H, W, 3) uint8 RGB, kept and not copied; or the path of its file, which is read again when the
            pixels are needed, so that many results need little memory; or None where neither is at hand.
        source: name of the picture in messages and results; None takes the path of ``picture``, if it is one.

    Raises:
        ValueError: a picture of another size than the detections.
    """

    def __init__(
        self,
        raw: RawDetections,
        categories: Sequence[Category],
        picture: Picture | Path | None = None,
        source: str | None = None,
    ) -> None:
        if isinstance(picture, np.ndarray) and picture.shape[:2] != tuple(raw.image_hw):
            raise ValueError(f"expected a picture of {raw.image_hw} pixels, received {picture.shape[:2]}")
        self.raw = raw.to("cpu")
        self.categories = tuple(categories)
        self.source = str(picture) if source is None and isinstance(picture, Path) else source
        # The same file wherever the program goes.
        self._picture = picture.absolute() if isinstance(picture, Path) else picture

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[Detections]:
        """Yield one object at a time, each a `Detections` of one."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Detections:
        """Select objects; the order is that of the index.

        Args:
            index: integer, slice, or one-dimensional list, array or tensor of integers or of N bools.

        Raises:
            IndexError: an integer is out of range, or there are not N bools.
            TypeError: the index is of another kind.
        """
        part = self.raw[positions(index, len(self))]
        return Detections(part, self.categories, self._picture, self.source)

    def __repr__(self) -> str:
        return f"<Detections: {self._summary()}>"

    def _summary(self) -> str:
        """Number and names of the objects, and their picture."""
        numbers = Counter(self.names).most_common()
        counts = ", ".join(f"{count} {name}" for name, count in numbers[:ROWS_SHOWN])
        if len(numbers) > ROWS_SHOWN:
            counts += f" and {len(numbers) - ROWS_SHOWN} more classes"
        objects = f"{len(self)} object{'' if len(self) == 1 else 's'}" + (f" ({counts})" if counts else "")
        where = f" in {self.source}" if self.source is not None else ""
        height, width = self.image_hw
        return controls_escaped(f"{objects}{where}, {height} x {width} pixels")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the picture in pixels."""
        return self.raw.image_hw

    @property
    def boxes(self) -> Tensor:
        """(N, 4) float32, xyxy in pixels."""
        return self.raw.boxes

    @property
    def scores(self) -> Tensor:
        """(N,) float32 in [0, 1]."""
        return self.raw.scores

    @property
    def mask_scores(self) -> Tensor | None:
        """(N,) float32 in [0, 1]: scores that rank masks; None for models without a mask-IoU head, use `scores`."""
        return self.raw.mask_scores

    @property
    def labels(self) -> Tensor:
        """(N,) int64 in [0, C), positions in `categories`."""
        return self.raw.labels

    @property
    def names(self) -> list[str]:
        """Category name of each object."""
        return [self.categories[label].name for label in self.labels.tolist()]

    @property
    def category_ids(self) -> list[int]:
        """Category id of each object, as in the annotation file that the model was trained on."""
        return [self.categories[label].id for label in self.labels.tolist()]

    @property
    def picture(self) -> Picture:
        """(H, W, 3) uint8 RGB; read from its file again if it has one.

        Raises:
            UserError: the file is gone or now holds a picture of another size, or there is none.
        """
        if self._picture is None:
            raise UserError("these detections came without their picture: predict from a file or an array")
        if isinstance(self._picture, np.ndarray):
            return self._picture
        pixels = read_image(self._picture, self.source)
        if pixels.shape[:2] != tuple(self.image_hw):
            (height, width), (h, w), name = self.image_hw, pixels.shape[:2], self.source or self._picture
            raise UserError(
                f"{name}: has {h} x {w} pixels, but {height} x {width} when its objects were found; predict again"
            )
        return pixels

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool in pixels of the picture, made at each access.

        It takes N * H * W bytes: 300 objects of a picture of 4000 x 3000 pixels are 3.6 GB. For large pictures go
        through the objects, ``for one in found: one.masks[0]``, or use `polygons`, `crops` or `to_coco`, which
        never hold more than one object in full size.
        """
        return masks.full_masks(self.raw)

    def polygons(self) -> list[list[NDArray[np.float64]]]:
        """The exact outlines of the masks: COCO's rasteriser makes the same pixels of them again.

        Returns:
            For each object a list of its pieces, (K, 2) x, y in pixels each; the last corner joins the first. A
            hole is joined to the outline around it by a line there and back. An object without a pixel has no piece.
        """
        return masks.polygons(self.raw)

    def crops(self, *, masked: bool = False) -> list[Picture]:
        """The part of the picture inside each box.

        Args:
            masked: add a fourth channel that is 255 on the mask and 0, transparent, around it.

        Returns:
            N arrays (h, w, 3) uint8 RGB, or (h, w, 4) RGBA; of at least one pixel.

        Raises:
            UserError: the picture is not at hand.
        """
        return masks.crops(self.picture, self.raw, masked=masked)

    def plot(self) -> Picture:
        """Draw all objects with their masks, boxes, names and scores.

        Returns:
            (H, W, 3) uint8 RGB; a picture whose shorter side is under 320 pixels is enlarged by a whole factor, so
            that names can be read.

        Raises:
            UserError: the picture is not at hand.
        """
        return pictures.drawn(self.picture, self.raw, self.categories)

    def save(self, path: str | Path) -> None:
        """Write the drawn picture (.png, .jpg, .webp, ...) or, with the suffix .json, what `to_json` returns.

        Raises:
            UserError: the suffix names no format, the picture is not at hand, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            content = self.to_json().encode()
        else:
            kind = pictures.image_kind(path)
            content = pictures.image_bytes(self.plot(), kind)
        try:
            write_whole(path, content)
        except OSError as error:
            raise UserError(
                f"{path}: could not be written ({error.strerror}); make room or choose another place"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values: image, height, width and detections.

        Returns:
            ``image`` is the source; each detection has category_id, category, score, bbox (xywh in pixels),
            segmentation (COCO RLE of the whole picture) and, where masks have scores of their own, mask_score.
        """
        height, width = self.image_hw
        rows = json_rows(self.raw, self.categories)
        image = None if self.source is None else printable(self.source)
        return {"image": image, "height": height, "width": width, "detections": rows}

    def to_json(self) -> str:
        """The JSON that `tailseg predict` writes: `to_dict` as text."""
        return orjson.dumps(self.to_dict(), option=orjson.OPT_INDENT_2).decode()

    def to_coco(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """Rows of a COCO or LVIS results file: image_id, category_id, bbox (xywh in pixels), score, segmentation (RLE).

        Where masks have scores of their own these are the ``score``, and ``box_score`` ranks the boxes.

        Args:
            image_id: id of the picture in the annotation file; without one the rows have no image_id.
        """
        head = {} if image_id is None else {"image_id": image_id}
        return [{**head, **row} for row in coco_rows(self.raw, self.categories)]

    def to_labelme(self) -> dict[str, Any]:
        """The JSON content that labelme opens, with polygons of few corners for a person to correct.

        ``imagePath`` is the file name of the source; it is "" where there is none, to be set by you. Objects without
        a pixel are left out with a warning.

        Raises:
            UserError: two categories have the same name, or one has none.
        """
        name = "" if self.source is None else printable(self.source)
        found = LeftOut()
        names = class_names(ExportSet("the model", self.categories, {}))
        image = ExportImage(name, Path(name), self.image_hw, export_objects(self.raw, self.categories))
        content, _ = labelme_content(image, PurePath(name).name, names, found)
        for note in found.notes():
            log.warning("%s", note)
        shapes = [{**shape, "points": shape["points"].tolist()} for shape in content["shapes"]]
        return {**content, "shapes": shapes}

    def to_supervision(self) -> supervision.Detections:
        """The same as supervision's Detections, with full-size masks (N * H * W bytes, see `masks`).

        ``class_id`` is the label; ``data["class_name"]`` has the names.

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs supervision: pip install 'tailseg[supervision]'") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            mask=self.masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_pandas(self) -> pandas.DataFrame:
        """A table with a row an object: image, category_id, category, score, x1, y1, x2, y2, area.

        Boxes are in pixels, ``area`` is the number of pixels of the mask; ``mask_score`` is added where masks have
        scores of their own.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        corners = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.numpy().T, strict=True))
        columns = {
            "image": np.full(len(self), self.source, dtype=object),
            "category_id": np.array(self.category_ids, dtype=np.int64),
            "category": np.array(self.names, dtype=object),
            "score": self.scores.numpy(),
            **corners,
            "area": np.array(masks.areas(self.raw), dtype=np.int64),
        }
        if self.mask_scores is not None:
            columns["mask_score"] = self.mask_scores.numpy()
        return pandas.DataFrame(columns)

    def _repr_html_(self) -> str:
        """The drawn picture and a table of the first objects, for notebooks."""
        rows = [
            (name, f"{score:.2f}", *(f"{value:.0f}" for value in box))
            for name, score, box in zip(
                self.names[:ROWS_SHOWN], self.scores.tolist(), self.boxes.tolist(), strict=False
            )
        ]
        try:
            png = pictures.shown_png(self.picture, self.raw, self.categories)
            picture, without = data_uri(png, "image/png"), ""
        except UserError as error:
            picture, without = "", str(error)
        more = max(len(self) - ROWS_SHOWN, 0)
        summary = self._summary()
        return render("detections.html", summary=summary, picture=picture, without=without, rows=rows, more=more)
