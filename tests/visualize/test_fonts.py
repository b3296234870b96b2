"""Which font writes a text, with fonts that the tests make themselves: a square for each character."""

import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import features

from tailseg.structures import RawDetections
from tailseg.visualize import draw, fonts
from tailseg.visualize.fonts import DEJAVU, Fonts, machine_fonts

CAT, DOG, NEKO = "猫", "개", "ネコ"


def make_font(path: Path, characters: str) -> Path:
    """A font in which each character is a full square, and a space is blank."""
    characters = " " + characters
    names = [".notdef", *(f"u{ord(sign):04X}" for sign in characters)]
    pen = TTGlyphPen(None)
    pen.moveTo((50, 0))
    for corner in ((50, 800), (950, 800), (950, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(sign): name for sign, name in zip(characters, names[1:], strict=True)})
    builder.setupGlyf({**dict.fromkeys(names, square), "u0020": TTGlyphPen(None).glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 50)))
    builder.setupHorizontalHeader(ascent=850, descent=-150)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def among(*files: Path) -> Fonts:
    return Fonts(lambda: [str(file) for file in files])


def never() -> Sequence[str]:
    raise AssertionError("no other font was needed")


@pytest.mark.parametrize("text", ["", "cup 0.99", "Ähre, œuf, żółw", "γάτα", "кошка", "con mèo, cái ấm", "Ğ ß … – №"])
def test_european_names_stay_in_dejavu(text: str) -> None:
    found = Fonts(never)
    assert found.covering(text) == DEJAVU
    assert found.legible(text, 7) == text
    assert found.font(text, 20).path == str(DEJAVU)


def test_letters_with_their_accents_apart_are_joined() -> None:
    apart = unicodedata.normalize("NFD", "café")
    assert Fonts(never).legible(apart, 7) == "café"


def test_a_font_that_has_all_characters_is_found(tmp_path: Path) -> None:
    few = make_font(tmp_path / "NotoSans-Few.ttf", "猫0.")
    full = make_font(tmp_path / "Other.ttf", "猫開ネコ0123456789.")
    found = among(few, full)
    assert found.covering("猫 0.0") == few
    assert found.covering("猫開 0.12") == full
    assert found.font(f"{NEKO} 0.98", 18).path == str(full)
    assert found.covering("cat 0.98") == DEJAVU
    assert found.legible("猫開", 3) == "猫開"
    assert found.legible(DOG, 3) == "id 3"


def test_the_order_of_fonts(tmp_path: Path) -> None:
    """Plain sans-serif ones first, whatever their places; never the font that draws its scripts' names."""
    files = [
        make_font(tmp_path / f"{name}.ttf", CAT)
        for name in ("LastResortHE-Regular", "NotoSansCJK-Bold", "AaSerif", "Ab", "ZzGothic", "NotoSansCJK-Regular")
    ]
    for best in reversed(files[3:]):
        assert among(*files).covering(CAT) == best
        files.remove(best)
    assert among(*files).covering(CAT).stem == "NotoSansCJK-Bold"
    assert among(files[0]).covering(CAT) is None


def test_files_that_are_no_fonts_are_passed_over(tmp_path: Path) -> None:
    broken, gone, good = tmp_path / "a.ttf", tmp_path / "gone.ttf", make_font(tmp_path / "z.ttf", CAT)
    broken.write_bytes(good.read_bytes()[:100])
    assert among(broken, gone, good).covering(CAT) == good
    assert among(broken, gone).covering(CAT) is None


def test_ids_where_no_font_has_the_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = among(make_font(tmp_path / "a.ttf", CAT))
    with caplog.at_level(logging.WARNING):
        assert [found.legible(name, i) for i, name in enumerate(("cat", CAT, DOG, NEKO, CAT + DOG))] == [
            "cat", CAT, "id 2", "id 3", "id 4",
        ]  # fmt: skip
    assert [record.message for record in caplog.records] == [
        f"no font on this machine has the characters of the name '{DOG}': such classes are drawn by their ids; "
        "install a font that has them, such as Noto Sans CJK"
    ]


def test_a_thousand_names_without_a_font_take_one_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened = make_font(tmp_path / "a.ttf", CAT), []
    read = fonts._characters
    monkeypatch.setattr(fonts, "_characters", lambda path: opened.append(path) or read(path))
    found = among(file)
    assert all(found.legible(chr(0x4E00 + i), i) == f"id {i}" for i in range(1203))
    assert opened == [DEJAVU, file]


@pytest.mark.parametrize("text", ["قطة", "חתול"])
def test_scripts_that_need_shaping(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DejaVu Sans has the letters; without Raqm they would stand in the wrong order and form."""
    monkeypatch.setattr(features, "check", lambda name: True)
    assert Fonts(never).legible(text, 7) == text
    monkeypatch.setattr(features, "check", lambda name: False)
    assert Fonts(never).legible(text, 7) == "id 7"


def test_names_in_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares of the generated font are on the label; without that font the id is drawn, as its name would be."""
    detections = RawDetections(
        image_hw=(400, 500),
        boxes=torch.tensor([[100.0, 100, 300, 300]]),
        scores=torch.tensor([0.9]),
        labels=torch.tensor([0]),
        masks=torch.ones(1, 28, 28),
    )
    grey = np.full((400, 500, 3), 100, np.uint8)

    def drawn(name: str, found: Fonts) -> np.ndarray:
        monkeypatch.setattr(draw, "machine_fonts", lambda: found)
        return draw.draw_detections(grey, detections, [name], ids=[40])

    full = make_font(tmp_path / "a.ttf", "猫0123456789.")
    label = drawn(CAT, among(full))[:98]
    ink = (label == 0).all(axis=2)  # black on the first class's orange
    count, _, stats, _ = cv2.connectedComponentsWithStats(ink.astype(np.uint8))
    assert count - 1 == len("猫0.90")
    assert len(np.unique(stats[1:, 2:], axis=0)) == 1  # squares of one size
    assert (drawn(CAT, among()) == drawn("id 40", among())).all()
    assert (drawn(CAT, among()) != drawn("id 4", among())).any()


def test_the_fonts_of_this_machine() -> None:
    assert machine_fonts() is machine_fonts()
    assert machine_fonts().covering("cup") == DEJAVU
    unassigned = chr(0x2FFFE)
    assert machine_fonts().covering(unassigned) is None
