"""The validation set as the page shows it: images by findings, pictures side by side, classes."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from checked_browser import write_set
from PIL import Image

from tailseg.app.browser import CLASS_HEAD, MISTAKES, Browser, Query
from tailseg.app.validation import read_browser
from tailseg.data.annotations.annotations import load_annotations

FORK, CUP, OWL = range(3)  # positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "discs"
    write_set(folder)
    return folder


@pytest.fixture(scope="module")
def browser(folder: Path) -> Browser:
    return read_browser(load_annotations(folder / "val.json", folder / "images"), folder / "saved")


@pytest.mark.parametrize(
    ("query", "names"),
    [
        # 5: an owl on a fork, a fork and a cup not found; 9: an owl where nothing is.
        (Query(), ["5.png", "9.png"]),
        (Query("right"), ["3.png"]),
        (Query("Miss"), ["5.png"]),
        (Query("Cls"), ["5.png"]),
        (Query("Bkg"), ["9.png"]),
        (Query("Loc"), []),
        (Query(MISTAKES, OWL), ["5.png", "9.png"]),
        (Query(MISTAKES, CUP), ["5.png"]),
        (Query("Cls", FORK), ["5.png"]),  # the owl lies on a fork
        (Query("Cls", CUP), []),
        (Query(group="r"), ["5.png"]),
        (Query("right", group="r"), []),
        (Query("right", group="c"), ["3.png"]),
    ],
)
def test_images_by_what_is_asked_for(browser: Browser, query: Query, names: list[str]) -> None:
    assert [browser.name(image) for image in browser.images(query).tolist()] == names


def test_the_threshold_is_that_of_the_analysis(browser: Browser) -> None:
    assert browser.findings.threshold == 0.8
    assert sorted(browser.findings.scores[browser.findings.row >= 0].tolist()) == [0.8, 0.85, 0.9, 0.9]


def test_lines_name_each_finding_sure_ones_first(browser: Browser) -> None:
    image = browser.images(Query("Miss"))[0]
    shown = browser.lines(int(image), Query())
    assert shown[0] == "owl 0.90: right place, wrong class (fork)"
    assert shown[1:] == ["fork: not found", "egg_cup: not found"]
    assert browser.lines(int(image), Query("right")) == []


def pixels_of(address: str) -> np.ndarray:
    kind, content = address.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_truth_stands_beside_prediction(browser: Browser) -> None:
    pair = browser.pair(int(browser.images(Query("Miss"))[0]))
    assert pair is not None
    truth, found = map(pixels_of, pair)
    assert truth.shape == found.shape
    scale = truth.shape[0] // 96
    cup = np.s_[40 * scale : 80 * scale, 70 * scale : 110 * scale]  # annotated, not found
    assert np.abs(truth[cup].astype(int) - found[cup]).max() > 60


def test_an_image_that_is_gone(folder: Path) -> None:
    annotations = load_annotations(folder / "val.json", folder / "nowhere")
    assert read_browser(annotations, folder / "saved").pair(0) is None


def test_classes_with_the_lowest_ap_first(browser: Browser) -> None:
    rows = browser.class_table()
    assert len(rows[0]) == len(CLASS_HEAD)
    assert rows[0][:5] == ["egg_cup", "rare", 1, 1, 0.0]
    assert [name for name, _ in browser.class_choices()] == ["egg_cup", "fork", "owl"]
    assert browser.class_named("owl") == OWL
    assert browser.class_named("hen") is None


def test_facts_of_a_class(browser: Browser) -> None:
    facts = browser.class_facts(FORK)
    assert facts["Group"] == "frequent"
    assert facts["Training images"] == "9"
    assert facts["Objects"] == "2"
    assert facts["Taken for"] == "owl ×1"
    chart = browser.class_chart(FORK)
    assert chart is not None
    assert chart.startswith("<svg")
