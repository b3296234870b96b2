"""The page in a real browser: Debian's Chromium, driven by playwright; skipped where there is none."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checked_browser import write_set
from colour_model import colour_model, drawn
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'tailseg[app]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")

from page_server import served
from playwright.sync_api import expect, sync_playwright

from tailseg.app.validation import read_browser
from tailseg.data.annotations.annotations import load_annotations

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium")
DISCS = [(40, 30, 12, 0), (96, 60, 16, 2), (4, 80, 10, 1)]  # fork and owl of 0.9; an egg cup at the edge, of 0.6
WAIT = 60_000  # milliseconds; a second is usual


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("data") / "discs"
    write_set(folder)
    browser = read_browser(load_annotations(folder / "val.json", folder / "images"), folder / "saved")
    with served(colour_model(96), browser) as url:
        yield url


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[1200, 400], ids=lambda width: f"{width} px")
def page(chromium: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, loaded; at the end nothing was asked of another server, and no script has failed."""
    opened = chromium.new_page(viewport={"width": request.param, "height": 900}, accept_downloads=True)
    opened.set_default_timeout(WAIT)
    asked: list[str] = []
    failed: list[str] = []
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector("#pictures input[type=file]", state="attached")
    yield opened
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert failed == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing to scroll sideways
    opened.close()


def drop(page: Any, *files: Path) -> None:
    page.set_input_files("#pictures input[type=file]", [str(file) for file in files])


def wait_for(page: Any, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for()


def cell(page: Any, table: str, text: str) -> Any:
    """The cells of a table with a text that can be seen; gradio measures its columns with others."""
    return page.locator(table).get_by_text(text, exact=True).locator("visible=true")


def test_drop_slide_filter_and_download(page: Any, tmp_path: Path) -> None:
    photo, second, hostile = tmp_path / "photo.png", tmp_path / "second.png", tmp_path / "bad<b>.png"
    Image.fromarray(drawn(96, 128, DISCS)).save(photo)
    Image.fromarray(drawn(96, 128, DISCS[1:2])).save(second)
    hostile.write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(400))
    drop(page, photo, hostile, second)
    wait_for(page, "#about", "photo.png: 3 objects")
    problem = "not an image that can be read; replace it by a JPEG or PNG file"
    wait_for(page, "#faults [role=alert]", problem)
    cell(page, "#objects", "fork").first.wait_for()
    drawn_before = page.locator("#result img").get_attribute("src")
    assert drawn_before.startswith("data:image/jpeg;base64,")
    assert page.locator("#result img").evaluate("one => one.naturalWidth") == 640

    page.locator("#score input[type=range]").evaluate(
        "one => { one.value = 0.7; one.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    wait_for(page, "#about", "photo.png: 2 objects")
    assert page.locator("#result img").get_attribute("src") != drawn_before

    page.locator("#classes input").click()
    page.get_by_role("option", name="owl").click()
    wait_for(page, "#about", "photo.png: 1 object")
    expect(cell(page, "#objects", "fork")).to_have_count(0, timeout=WAIT)
    cell(page, "#objects", "owl").first.wait_for()

    with page.expect_download() as waiting:
        page.get_by_role("link", name="JSON").click()
    waiting.value.save_as(tmp_path / "saved.json")
    assert waiting.value.suggested_filename == "detections.json"
    content = json.loads((tmp_path / "saved.json").read_text())
    assert [one["image"] for one in content] == ["photo.png", "second.png"]
    assert [[o["category"] for o in one["detections"]] for one in content] == [["owl"], ["owl"]]

    page.locator("#picture input").click()
    page.get_by_role("option", name="2. second.png").click()
    wait_for(page, "#about", "second.png: 1 object")


def test_the_validation_set(page: Any) -> None:
    page.get_by_role("tab", name="Validation set").click()
    wait_for(page, "#validation", "owl 0.90: right place, wrong class (fork)")
    assert page.locator("#validation img").count() == 4
    page.locator("#kind input").click()
    page.get_by_role("option", name="right", exact=True).click()
    wait_for(page, "#validation", "Images 1 to 1 of 1")
    page.get_by_role("tab", name="Classes").click()
    cell(page, "#class-table", "fork").first.click()
    wait_for(page, "#class-page h2", "fork")
    wait_for(page, "#class-page", "owl ×1")
    assert page.locator("#class-page svg").count() == 1
