"""Pictures, and what every reader of foreign data is asked: what a source becomes, and how it refuses."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tailseg.data.importers.convert import convert
from tailseg.data.sources import open_data
from tailseg.errors import UserError


def picture(path: Path, size=(80, 40), orientation=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, (sum(path.name.encode()) % 255, 90, 10)).save(path, exif=exif)
    return path


def write_files(root: Path, files: dict[str, str | bytes | None]) -> Path:
    """Files below ``root`` with these texts or bytes; None is a picture."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            picture(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def converted(kind, source, tmp_path):
    """The data set that a source becomes, as `train` reads it, and the notes."""
    before = {path: path.stat().st_mtime_ns for path in Path(source).rglob("*")}
    parts, notes = convert(kind, Path(source), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in Path(source).rglob("*")} == before
    splits = open_data(str(tmp_path / "out"), show=False)
    assert len(parts["train"].images) == len(splits.train)
    return splits, notes


def fault(kind, source, tmp_path) -> str:
    with pytest.raises(UserError) as caught:
        convert(kind, Path(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def attempt(parser, *arguments):
    """What a parser returns, or None; and the sentence with which it refuses, or nothing."""
    try:
        return parser(*arguments), ""
    except UserError as error:
        return None, str(error)


def coco_set(root: Path, annotation_file: str, image_folder: str, numbers, name="cat") -> Path:
    """A COCO file of one triangle in each image, and the images."""
    rows, images = [], []
    for number in numbers:
        picture(root / image_folder / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 80})
        flat = [20, 10, 60, 10, 20, 30]
        rows.append({"id": number, "image_id": number, "category_id": 17, "bbox": [20, 10, 40, 20], "area": 400.0})
        rows[-1] |= {"segmentation": [flat], "iscrowd": 0}
    path = root / annotation_file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": [{"id": 17, "name": name}]}))
    return root


def calls(action):
    """The number of calls that an action makes."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count
