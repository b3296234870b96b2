"""Files that users save."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from colour_model import colour_model, drawn
from hotcoco import mask as rle
from PIL import Image

from tailseg.app.downloads import coco_file, json_file, picture_files
from tailseg.app.pictures import Choice, Seen, look
from tailseg.data.annotations.annotations import load_annotations

DISCS = [(40, 30, 12, 0), (4, 80, 10, 1)]  # a fork of 0.9; an egg cup at the edge, of 0.6


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    """Two pictures of one name, the second empty."""
    files = []
    for discs in (DISCS, []):
        buffer = io.BytesIO()
        Image.fromarray(drawn(96, 128, discs)).save(buffer, "PNG")
        files.append(("photo.png", buffer.getvalue()))
    pictures, faults = look(colour_model(96), files)
    assert not faults
    return pictures


def test_json_is_what_detections_have(seen: list[Seen]) -> None:
    file = json_file(seen, Choice(0.7))
    assert (file.name, file.kind) == ("detections.json", "application/json")
    first, second = json.loads(file.content)
    assert first == json.loads(seen[0].found[[0]].to_json())
    assert first["image"] == "photo.png"
    assert second["detections"] == []


def test_coco_can_be_read_as_a_data_set_with_the_exact_masks(seen: list[Seen], tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.write_bytes(coco_file(seen, Choice(0.0)).content)
    content = json.loads(path.read_text())
    assert [image["file_name"] for image in content["images"]] == ["photo.png", "photo-2.png"]
    assert [one["score"] for one in content["annotations"]] == pytest.approx([0.9, 0.6])
    assert [one["category_id"] for one in content["annotations"]] == [5, 7]
    for one, mask, area in zip(content["annotations"], seen[0].found.masks.numpy(), seen[0].areas, strict=True):
        np.testing.assert_array_equal(rle.decode(one["segmentation"]), mask)
        assert one["area"] == area == mask.sum()
    annotations = load_annotations(path, tmp_path)
    assert len(annotations) == 2
    assert annotations.labels.tolist() == [0, 1]


def test_a_choice_holds_for_downloads_too(seen: list[Seen]) -> None:
    annotations = json.loads(coco_file(seen, Choice(0.0, frozenset({1}))).content)["annotations"]
    assert [one["category_id"] for one in annotations] == [7]
    assert annotations[0]["id"] == 1


def test_one_picture_is_a_jpeg_in_full_size(seen: list[Seen]) -> None:
    file = picture_files(seen[:1], Choice(0.0))
    assert (file.name, file.kind) == ("photo.jpg", "image/jpeg")
    with Image.open(io.BytesIO(file.content)) as image:
        assert image.size == (640, 480)  # enlarged, so that names have room


def test_several_pictures_are_a_zip(seen: list[Seen]) -> None:
    file = picture_files(seen, Choice(0.0))
    assert (file.name, file.kind) == ("pictures.zip", "application/zip")
    with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
        assert archive.namelist() == ["photo.jpg", "photo-2.jpg"]
        assert archive.testzip() is None


def test_without_pictures() -> None:
    assert json.loads(json_file([], Choice()).content) == []
    assert json.loads(coco_file([], Choice()).content) == {"images": [], "annotations": [], "categories": []}
