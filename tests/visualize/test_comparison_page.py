"""The page of a comparison: its numbers, names from files, and its table in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tailseg.evaluation.paired_report import difference_texts, verdicts
from tailseg.visualize.comparison_page import write_page

Content = dict[str, Any]
EVIL = "\x1b[2J</td><script>alert(1)</script>"


def difference(value: float | None, ends: list[float] | None, beyond: bool | None) -> Content:
    return {"value": value, "interval": ends, "beyond_chance": beyond}


def comparison(*, runs: int = 2, kinds: tuple[str, ...] = ("bbox", "segm"), classes: int = 3) -> Content:
    """Class i has AP 0.1 + 0.01 i in the first run and 0.05 more or less in the others."""
    names = ["owl", "cat", EVIL, *(f"class {i}" for i in range(3, classes))]
    metrics = [
        {
            **{"metric": metric, "classes": 2, "images": 40, "runs": [value, *[value + 0.02] * (runs - 1)]},
            "differences": [difference(0.02, [0.0125, 0.04], True)] * (runs - 1),
        }
        for metric, value in (("AP", 0.3), ("AP50", 0.5), ("APc", 0.2), ("APf", 0.4))
    ]
    nothing = difference(None, None, None)
    metrics.insert(
        2, {"metric": "APr", "classes": 0, "images": 0, "runs": [None] * runs, "differences": [nothing] * (runs - 1)}
    )
    rows = []
    for i, name in enumerate(names):
        few, gain = i % 3 == 0, 0.05 if i % 2 else -0.05
        ends = None if few else sorted([gain / 2, 2 * gain])
        rows.append(
            {
                **{"id": i, "name": name, "frequency": "cf"[i % 2], "train_images": None},
                **{"instances": 1000 + i, "images": 3 if few else 30, "runs": [0.1 + 0.01 * i] * runs},
                "differences": [difference(gain, ends, None if few else True)] * (runs - 1),
            }
        )
    return {
        **{"data": "photos, val", "images": 1234, "sets": 1000, "confidence": 0.95, "fewest_images": 6},
        "runs": [{"name": f"runs/{name}", "detections": "d.json"} for name in "abc"[:runs]],
        "kinds": {kind: {"metrics": metrics, "classes": rows} for kind in kinds},
    }


def written(content: Content, folder: Path) -> str:
    write_page(content, folder / "page.html")
    return (folder / "page.html").read_text()


def cells(page: str, name: str) -> list[list[str]]:
    """The cells, as text, of all rows that begin with a name."""
    rows = re.findall(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', page, re.DOTALL)
    return [re.sub(r"<[^>]+>", "", row.replace("</td>", "|")).strip("|\n").split("|") for row in rows]


def test_the_numbers(tmp_path: Path) -> None:
    page = written(comparison(), tmp_path)
    assert "<title>2 runs on photos, val</title>" in page
    assert "<dt>A</dt><dd>runs/a</dd>" in page
    assert cells(page, "AP50") == [["50.0", "52.0", "+2.0 [1.2, 4.0]"]] * 2  # boxes and masks
    assert cells(page, "APr") == [["–", "–", "– "]] * 2
    assert "<strong>+2.0</strong>" in page
    gains, in_all = cells(page, "cat")
    assert gains == ["+5.0 [2.5, 10.0]", "11.0", "11.0"]
    assert in_all == ["11.0", "11.0", "+5.0 [2.5, 10.0]", "30", "1,001", "frequent"]
    assert cells(page, "owl") == [["10.0", "10.0", "−5.0 ", "3", "1,000", "common"]]  # in too few images to be listed
    assert "1 of 3 classes have objects in fewer than 6 images" in " ".join(page.split())
    assert "95% intervals over images: of 1,000 sets of 1,234 images" in " ".join(page.split())
    assert page.count("<svg") == 2


def test_names_do_no_harm(tmp_path: Path) -> None:
    page = written(comparison(), tmp_path)
    assert page.count("<script>") == 1
    assert "alert(1)</script>" not in page
    assert "\x1b" not in page
    assert r"\x1b[2J&lt;/td&gt;&lt;script&gt;" in page


def test_several_runs_and_one_kind(tmp_path: Path) -> None:
    page = written(comparison(runs=3, kinds=("bbox",)), tmp_path)
    assert cells(page, "AP50") == [["50.0", "52.0", "52.0", "+2.0 [1.2, 4.0]", "+2.0 [1.2, 4.0]"]]
    assert page.count("B − A") == page.count("C − A") > 3
    assert page.count("<svg") == 1
    assert page.count('<p class="verdict">') == 2
    assert "AP of boxes, percent" in page


def test_verdicts() -> None:
    (sentence,) = verdicts(comparison())
    assert sentence == (
        "runs/b against runs/a, masks: AP +2.0 points [1.2, 4.0], beyond chance. Of 2 classes in 6 images or more, "
        "1 gain and 1 lose beyond chance; 0 would by chance alone."
    )
    content = comparison(kinds=("bbox",))
    content["kinds"]["bbox"]["metrics"][2]["differences"] = [difference(-0.001, None, None)]
    content["kinds"]["bbox"]["metrics"][0]["differences"] = [difference(0.0, [-0.01, 0.01], False)]
    content["kinds"]["bbox"]["classes"] = content["kinds"]["bbox"]["classes"][:1]
    (sentence,) = verdicts(content)
    assert sentence == (
        "runs/b against runs/a, boxes: AP ±0.0 points [−1.0, 1.0], may be chance; APr −0.10 points, in fewer than 6 "
        "images, which cannot tell. No class is in 6 images or more, so none can tell by itself."
    )


@pytest.mark.parametrize(
    ("value", "ends", "texts"),
    [
        (None, None, ("–", "")),
        (0.0, [0.0, 0.0], ("±0.00", "[0.00, 0.00]")),
        (-0.0004, [-0.0009, -0.0001], ("−0.04", "[−0.09, −0.01]")),
        (0.0004, [-0.02, 0.0301], ("±0.0", "[−2.0, 3.0]")),
        (-0.0123, None, ("−1.2", "")),
        (-0.02, [-0.04, -0.00001], ("−2.0", "[−4.0, 0.0]")),
    ],
)
def test_differences_in_points(value: float | None, ends: list[float] | None, texts: tuple[str, str]) -> None:
    assert difference_texts(difference(value, ends, None)) == texts


def test_a_browser_sorts_and_searches(tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs Chromium")
    page = written(comparison(classes=1203), tmp_path)
    act = """
    const shown = () => [...document.querySelectorAll("table.sortable tbody tr")].filter((row) => !row.hidden)
      .map((row) => row.cells[0].textContent);
    const heads = document.querySelectorAll("table.sortable thead button");
    const told = [shown()[0]];
    for (const head of [heads[3], heads[3], heads[0]]) { head.click(); told.push(shown()[0]); }
    const search = document.getElementById("search");
    search.value = "CLASS_12"; search.dispatchEvent(new Event("input")); told.push(shown().length);
    document.title = told.join("|") + "|" + (document.documentElement.scrollWidth <= innerWidth);
    """
    (tmp_path / "acted.html").write_text(page.replace("</body>", f"<script>{act}</script></body>"))
    line = [browser, "--headless", "--no-sandbox", "--window-size=400,900", "--dump-dom"]
    done = subprocess.run([*line, f"file://{tmp_path}/acted.html"], capture_output=True, text=True, timeout=120)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    first, most, least, by_name, found, fits = title.split("|")
    assert first == "owl"
    assert most == "cat"  # the first of the greatest gain
    assert least == "owl"
    assert by_name.startswith(r"\x1b[2J")
    assert found == "14"  # 12, 120 to 129, 1200 to 1202
    assert fits == "true"
