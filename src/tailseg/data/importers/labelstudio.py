"""Label Studio's own export, "JSON" or "JSON-MIN": a list of tasks, each an image with its regions.

Coordinates are percent of the image's width and height, as it lies before the annotator turned it on the screen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.image_files import candidate_names, files_below
from tailseg.data.annotations.masks import Bitmap
from tailseg.data.images import IMAGE_SUFFIXES, open_content
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Source,
    ends_of,
    read_json,
    rectangle,
    source_by_names,
)
from tailseg.data.importers.layouts import Split, split_of, split_of_path
from tailseg.data.importers.shapes import (
    ObjectList,
    OddObjectError,
    Piece,
    decoded,
    ellipse,
    label_of,
    number_of,
    polygon_of,
    require_mask_fits,
    rotated,
    size_of,
)
from tailseg.data.importers.source_images import SourceImages, recognised
from tailseg.errors import UserError

MAX_BYTES = 2**29  # of a file
MAX_MASK = 2**26  # characters or numbers of a mask

_KEYS = re.compile(
    rb'"(?:original_width|was_cancelled|completed_by|annotation_id|(?:polygon|brush|bitmask|rectangle|ellipse)labels)"'
    rb"\s*:"
)
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the name of a file that is uploaded
_CHANGED = re.compile(r"[^\w.-]")  # characters that it takes out of such a name, after spaces became "_"


@dataclass(frozen=True, slots=True)
class _Task:
    """One image and its regions."""

    where: str
    folder: Path  # of the file
    names: list[str]  # that the image may have, in order of preference
    regions: list[dict[str, Any]]


def is_labelstudio(path: Path) -> bool:
    """Return whether a file looks like Label Studio's, by its first and last 4 KB: a list, with its words in it."""
    ends = ends_of(path)
    return ends.startswith(b"[") and _KEYS.search(ends) is not None


def read_labelstudio(source: Path) -> Source:
    """A file of Label Studio, or a folder with such files, with the images anywhere in its folder.

    Splits are told by the names of the files and of their folders. Of several annotations of a task one counts: that
    marked as ground truth, or else the latest.
    """
    root = source.parent if source.is_file() else source
    found = LeftOut()
    images = SourceImages(root, found, "tasks")
    uploads = _Uploads(images)
    files = files_below(source, (".json",)) if source.is_dir() else [source]
    own = recognised(files, is_labelstudio, "JSON files that are not Label Studio's: left out", found)
    if not own:
        raise UserError(f"{source}: there is no JSON export of Label Studio in it; give the file or its folder")
    told: list[tuple[_Task, Split | None]] = []
    for path in own:
        of_file = split_of_path(path, root) or split_of(path.stem)
        told += [(task, of_file) for task in _tasks(path, found)]
    read = images.read(
        told, lambda task: _read(task, images, uploads, found), lambda task: task.where, lambda task: task.names[0]
    )
    return source_by_names(read, root, found)


def _tasks(path: Path, found: LeftOut) -> Iterator[_Task]:
    """The tasks of a file that somebody annotated."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: it has more than {MAX_BYTES >> 20} MB; export in several parts")
    tasks = read_json(path)
    if not isinstance(tasks, list):
        raise UserError(f"{path}: expected a list of tasks; export it again")
    for number, task in enumerate(tasks, start=1):
        where = f"{path}: task {number}"
        if not isinstance(task, dict):
            found.add("tasks that are no objects: left out", where)
            continue
        regions = _regions(task, where, found)
        if regions is not None:
            yield _Task(where, path.parent, _names(task), regions)


def _names(task: Mapping[str, Any]) -> list[str]:
    """The names that a task's image may have; the first is for notes."""
    data = task.get("data")
    texts = {key: text for key, text in (data if isinstance(data, dict) else task).items() if isinstance(text, str)}
    stated = [text for text in texts.values() if text.partition("?")[0].lower().endswith(IMAGE_SUFFIXES)]
    stated += [text for text in (texts.get("image"), task.get("file_upload")) if isinstance(text, str) and text]
    stated += [text for text in texts.values() if "?d=" in text]
    names = [name.replace("\\", "/") for text in dict.fromkeys(stated) for name in candidate_names(text, None)]
    return list(dict.fromkeys(names)) or [""]


def _regions(task: Mapping[str, Any], where: str, found: LeftOut) -> list[dict[str, Any]] | None:
    """The regions of a task, each with its values and the image's size; None if nobody annotated it."""
    several = task.get("annotations", task.get("completions"))
    if not isinstance(several, list):  # JSON-MIN: lists of regions under the names that the labels have there
        if "annotation_id" not in task and "annotator" not in task:
            return None
        return [item for value in task.values() if isinstance(value, list) for item in value if isinstance(item, dict)]
    skipped = [
        item for item in several if isinstance(item, dict) and (item.get("was_cancelled") or item.get("skipped"))
    ]
    found.add("annotations that were skipped in Label Studio: left out", *([where] * sum(map(_has_result, skipped))))
    kept = [item for item in several if isinstance(item, dict) and item not in skipped]
    if not kept:
        return None
    found.add(
        "further annotations of a task: left out, ground truth or the latest counts", *([where] * (len(kept) - 1))
    )
    latest = max(kept, key=lambda item: (item.get("ground_truth") is True, str(item.get("updated_at") or "")))
    regions: dict[object, dict[str, Any]] = {}  # by id: a shape, its label and further answers may stand apart
    for number, result in enumerate(latest["result"] if _has_result(latest) else ()):
        if isinstance(result, dict):
            region = regions.setdefault(str(result["id"]) if result.get("id") else number, {})
            value = result.get("value")
            sizes = {key: result[key] for key in ("original_width", "original_height") if key in result}
            region |= (value if isinstance(value, dict) else {}) | sizes
    return list(regions.values())


def _has_result(annotation: Mapping[str, Any]) -> bool:
    return isinstance(annotation.get("result"), list) and bool(annotation["result"])


class _Uploads:
    """Image files by the names that Label Studio gives them when they are uploaded."""

    def __init__(self, images: SourceImages) -> None:
        self._images = images

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {}
        for path in self._images.files:
            files.setdefault(_CHANGED.sub("", path.name.strip().replace(" ", "_")).lower(), []).append(path)
        return files

    def find(self, name: str) -> Path | None:
        """The only file that may have been uploaded as the one of this name."""
        last = name.rpartition("/")[2]
        paths = self._files.get(_UPLOADED.sub("", last, count=1).lower(), []) if _UPLOADED.match(last) else []
        return paths[0] if len(paths) == 1 else None


def _read(task: _Task, images: SourceImages, uploads: _Uploads, found: LeftOut) -> AnnotatedImage | None:
    """The image of a task with its objects; None, and counted, if there is no such thing."""
    folders = [task.folder, task.folder / "images"]
    ways = (
        lambda name: images.stated(name, folders, task.where),
        lambda name: images.anywhere(name, task.folder),
        uploads.find,
    )
    file = next((file for way in ways for name in task.names if name and (file := way(name)) is not None), None)
    if file is None:
        shown = task.names[0]
        state = f"its image {shown!r} {images.absence(shown)}" if shown else "it names no image file"
        images.missing(f"{task.where}: {state}; put the images into the folder of the file")
        return None
    stated = next(
        filter(None, (size_of(row.get("original_height"), row.get("original_width")) for row in task.regions)), None
    )
    image_hw = images.use(file, task.where, stated)
    if image_hw is None:
        return None
    objects = ObjectList(image_hw)
    for number, region in enumerate(task.regions, start=1):
        place = f"{task.where}: region {number}"
        try:
            labels = _labels(region)
            piece = parse_region(region, image_hw)
            objects.add(label_of(labels[0] if labels else None), piece)
        except OddObjectError as odd:
            found.add(str(odd), place)
        else:
            found.add("objects with several labels: the first counts", *([place] if len(labels) > 1 else []))
    return AnnotatedImage(file, image_hw, objects.names, objects.shapes())


def _labels(region: Mapping[str, Any]) -> list[Any]:
    """The labels of a region, under whatever name its kind has for them."""
    lists = (value for key, value in region.items() if key.endswith("labels") and isinstance(value, list) and value)
    return next(lists, [])


def parse_region(region: Mapping[str, Any], image_hw: tuple[int, int]) -> Piece:
    """Polygon (K, 2) or pixels of a region, in an image of the given size.

    Raises:
        OddObjectError: it has no area, or cannot be read.
    """
    unit = np.array([image_hw[1], image_hw[0]]) / 100  # pixels of a percent
    if "rle" in region:
        return brush_mask(region["rle"], image_hw)
    if "imageDataURL" in region:
        return _bitmask(region["imageDataURL"], image_hw)
    if "points" in region:
        return polygon_of(polygon_of(region["points"]) * unit)
    x, y, degrees = (number_of(region.get(key, 0)) for key in ("x", "y", "rotation"))
    corner = polygon_of([[x, y]], least=1)[0] * unit
    if "radiusX" in region:
        radii = polygon_of([[number_of(region.get(key)) for key in ("radiusX", "radiusY")]], least=1)[0] * unit
        return polygon_of(rotated(ellipse(corner, (abs(radii[0]), abs(radii[1]))), degrees, corner))
    if "width" in region and "height" in region:
        sides = polygon_of([[number_of(region[key]) for key in ("width", "height")]], least=1)[0] * unit
        return polygon_of(rotated(rectangle(*corner, *(corner + sides)), degrees, corner))
    if "width" in region or "vertices" in region or "sequence" in region:
        raise OddObjectError("points, lines and tracks: left out")
    raise OddObjectError("answers about an image that are no regions: left out")


def brush_mask(code: object, image_hw: tuple[int, int]) -> Bitmap:
    """The pixels that a brush covered: those that are not transparent in an image of four channels.

    The code is a stream of bits, high ones first: 32 for the number of values (4 H W, red, green, blue and opacity of
    each pixel), 5 for the bits of a value less 1, four times 4 for bits of a length less 1. Then runs: a bit that says
    whether one value is repeated, 2 that choose among the four, the length less 1, and the value or the values.

    Args:
        code: numbers from 0 to 255, a byte each.
        image_hw: height and width.

    Raises:
        OddObjectError: it is no such code, or of another size.
    """
    try:
        stream = bytes(code) if isinstance(code, list) and len(code) <= MAX_MASK else b""
    except (TypeError, ValueError):
        stream = b""
    place = 0

    def read(count: int) -> int:
        nonlocal place
        end = place + count
        if end > 8 * len(stream):
            raise OddObjectError("masks whose code is broken or cut off: left out")
        value = int.from_bytes(stream[place >> 3 : (end + 7) >> 3], "big") >> (-end & 7)
        place = end
        return value & ((1 << count) - 1)

    number, bits = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    height, width = image_hw
    if number != 4 * height * width or bits != 8:
        raise OddObjectError("masks of another size than their image: left out")
    covered = np.zeros(height * width, np.uint8)
    start = 0
    while start < number:
        repeated = read(1)
        stop = min(start + 1 + read(lengths[read(2)]), number)
        pixels = covered[start // 4 : stop // 4]  # whose fourth value is in the run
        if repeated:
            pixels[:] = read(8) > 0
        else:
            pixels[:] = _bytes_at(stream, place, stop - start)[3 - start % 4 :: 4] > 0
            place += 8 * (stop - start)
        start = stop
    read(0)  # the last values may be missing
    return Bitmap(covered.reshape(height, width), 0, 0).tight()


def _bytes_at(stream: bytes, place: int, count: int) -> NDArray[np.uint8]:
    """``count`` bytes of a stream from any bit on, filled up with zeros at its end."""
    first = min(place >> 3, len(stream))
    some = np.frombuffer(stream[first : first + count + 1].ljust(count + 1, b"\0"), np.uint8)
    shift = place & 7
    return ((some[:-1] << shift) | (some[1:] >> (8 - shift))).astype(np.uint8) if shift else some[:-1]


def _bitmask(text: object, image_hw: tuple[int, int]) -> Bitmap:
    """The pixels of a PNG in base64 that are not transparent."""
    try:
        with open_content(decoded(text, MAX_MASK) or b"", "PNG") as image:
            require_mask_fits(image.height, image.width, image_hw)
            if (image.height, image.width) != image_hw:
                raise OddObjectError("masks of another size than their image: left out")
            pixels = np.asarray(image.convert("RGBA").getchannel("A")) != 0
    except OddObjectError:
        raise
    except Exception:  # Pillow's readers raise many types on broken files
        raise OddObjectError("masks that are no PNG: left out") from None
    return Bitmap(pixels.astype(np.uint8), 0, 0).tight()
