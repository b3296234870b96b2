"""With FiftyOne where it is installed, and everywhere with a stand-in that keeps what it is given."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from colour_model import colour_model, drawn, example
from PIL import Image

LARGE = "FiftyOne is not installed: with all that it needs it takes 1 GB"
DISCS = [(30, 40, 15, 0), (100, 60, 20, 2)]


@pytest.fixture(params=["stand-in", "installed"])
def results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example; its FiftyOne is ``results.fiftyone``."""
    if request.param == "installed":
        pytest.importorskip("fiftyone", reason=LARGE)
    else:
        kinds = dict.fromkeys(("Detection", "Detections", "Sample"), SimpleNamespace)
        monkeypatch.setitem(sys.modules, "fiftyone", SimpleNamespace(**kinds))
    return example("fiftyone_results")


def test_boxes_are_relative_and_masks_lie_inside(results: ModuleType) -> None:
    found = colour_model(100).predict(drawn(100, 140, DISCS))
    rows = results.detections(found).detections
    assert [row.label for row in rows] == ["fork", "owl"]
    assert [row.confidence for row in rows] == [pytest.approx(0.9)] * 2
    assert list(rows[0].bounding_box) == pytest.approx([15 / 140, 25 / 100, 31 / 140, 31 / 100])
    assert [row.mask.shape for row in rows] == [(31, 31), (41, 41)]
    assert [row.mask.dtype for row in rows] == [bool, bool]


@pytest.mark.parametrize("picture", [drawn(97, 141, DISCS), drawn(60, 60, [(0, 0, 25, 1), (59, 30, 13, 2)])])
def test_masks_are_the_same_pixels_again(results: ModuleType, picture: np.ndarray) -> None:
    """Shown enlarged to the model, so boxes end between pixels; the second has objects at its edges."""
    found = colour_model(3 * picture.shape[0] // 2).predict(picture)
    assert len(found) == 2
    height, width = picture.shape[:2]
    for one, row in zip(found, results.detections(found).detections, strict=True):
        x, y, w, h = (round(value * side, 6) for value, side in zip(row.bounding_box, (width, height) * 2, strict=True))
        assert [x, y, w, h] == [int(x), int(y), int(w), int(h)]
        again = np.zeros((height, width), bool)
        again[int(y) : int(y + h), int(x) : int(x + w)] = row.mask
        assert (again == one.masks[0].numpy()).all()
        if hasattr(row, "to_segmentation"):
            theirs = row.to_segmentation(frame_size=(width, height)).mask.astype(bool)
            shifted = theirs ^ one.masks[0].numpy()  # its rounding of coordinates may shift one by a pixel
            assert shifted.sum() <= 4 * (row.mask.shape[0] + row.mask.shape[1])


def test_a_picture_without_objects(results: ModuleType) -> None:
    assert list(results.detections(colour_model(100).predict(drawn(50, 50, []))).detections) == []


def test_a_sample_for_each_file(results: ModuleType, tmp_path: Path) -> None:
    for name, discs in (("a.png", DISCS), ("b.png", []), ("c.png", DISCS[1:])):
        Image.fromarray(drawn(100, 140, discs)).save(tmp_path / name)
    samples = list(results.samples(colour_model(100).predict(tmp_path)))
    assert [sample.filepath for sample in samples] == [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    assert [[row.label for row in sample.tailseg.detections] for sample in samples] == [["fork", "owl"], [], ["owl"]]


def test_a_result_without_a_file_is_refused(results: ModuleType) -> None:
    found = colour_model(100).predict(drawn(50, 50, []))
    with pytest.raises(ValueError, match="predict from these"):
        list(results.samples([found]))


def test_the_command_stores_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the database of FiftyOne, where there is one."""
    fiftyone = pytest.importorskip("fiftyone", reason=LARGE)
    try:
        fiftyone.list_datasets()
    except Exception as error:
        pytest.skip(f"FiftyOne has no database here: {error}")
    results = example("fiftyone_results")
    monkeypatch.setattr(results.tailseg, "load", lambda path: colour_model(100))
    Image.fromarray(drawn(100, 140, DISCS)).save(tmp_path / "a.png")
    try:
        results.main(["m.safetensors", str(tmp_path), "--name", "tailseg-test"])
        stored = fiftyone.load_dataset("tailseg-test")
        assert stored.count_values("tailseg.detections.label") == {"fork": 1, "owl": 1}
        assert stored.first().tailseg.detections[0].mask.shape == (31, 31)
    finally:
        fiftyone.delete_dataset("tailseg-test")
    assert capsys.readouterr().out == "tailseg-test: 1 pictures, 2 objects\n"
