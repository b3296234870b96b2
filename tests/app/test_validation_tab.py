"""Handlers of the validation set: pages of images, the page of a class, text that stays text."""

import re
from pathlib import Path

import pytest
from checked_browser import write_set

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'tailseg[app]'")

from tailseg.app import html, validation_tab
from tailseg.app.validation import read_browser
from tailseg.app.validation_tab import ValidationTab
from tailseg.data.annotations.annotations import load_annotations


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> ValidationTab:
    folder: Path = tmp_path_factory.mktemp("data") / "discs"
    write_set(folder)
    return ValidationTab(read_browser(load_annotations(folder / "val.json", folder / "images"), folder / "saved"))


def names(shown: str) -> list[str]:
    return re.findall(r"<b>(.*?)</b>", shown)


def test_pages_of_images(tab: ValidationTab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_tab, "ON_A_PAGE", 1)
    shown, first = tab.images("mistakes", "", "", 0)
    assert (names(shown), first) == (["5.png"], 0)
    assert "Images 1 to 1 of 2, most of it first; detections with a score of 0.80 or more" in shown
    assert shown.count("<img") == 2
    assert names(tab.images("mistakes", "", "", 1)[0]) == ["9.png"]
    for beyond, last in ((2, 1), (99, 1), (-1, 0)):
        assert tab.images("mistakes", "", "", beyond)[1] == last


def test_filters(tab: ValidationTab) -> None:
    assert names(tab.images("right", "", "", 0)[0]) == ["3.png"]
    assert names(tab.images("mistakes", "c", "", 0)[0]) == ["5.png", "9.png"]
    assert names(tab.images("mistakes", "", 1, 0)[0]) == ["5.png"]
    assert tab.images("Loc", "", "", 0) == (html.note("No image has that."), 0)
    assert names(tab.images("unheard of", "x", "y", 0)[0]) == ["5.png", "9.png"]  # whatever a request holds


def test_the_page_of_a_class(tab: ValidationTab) -> None:
    shown = tab.one_class(0)
    assert "<h2>fork</h2>" in shown
    assert "<dt>Taken for</dt><dd>owl ×1</dd>" in shown
    assert names(shown) == ["3.png", "5.png"]
    assert shown.index("<h3>Right</h3>") < shown.index("<h3>Mistakes</h3>")
    for nothing in (None, -1, 99):
        assert "Choose a class" in tab.one_class(nothing)


def test_names_stay_text() -> None:
    hostile = '<img src=x onerror="alert(1)">\x1b'
    shown = html.joined(
        [
            html.note(hostile),
            html.faults([hostile]),
            html.picture(b"", hostile),
            html.pairs([html.Pair(hostile, ("a", "b"), [hostile]), html.Pair(hostile, None, [])]),
            html.facts(hostile, {"Group": hostile}),
            html.heading(hostile),
            html.subheading(hostile),
        ]
    )
    assert "<img src=x" not in shown
    assert 'alt="<' not in shown
    assert "\x1b" not in shown
    assert html.faults([]) == ""
    assert html.pairs([]) == ""
