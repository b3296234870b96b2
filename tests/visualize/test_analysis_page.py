"""The page of an analysis: well-formed whatever is missing, harmless whatever the names, alive in a browser."""

import copy
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tiny import score_of

from tailseg.data.annotations.annotations import load_annotations
from tailseg.evaluation.metrics import ScoreOptions
from tailseg.visualize.analysis_page import write_page

EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>\"&"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FACTS = {"Model": "runs/<b>/best.safetensors", "Data": "birds, val"}


def rectangle(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def placed(box, category, image=1, **changes):
    area = box[2] * box[3]
    place = {"image_id": image, "category_id": category, "bbox": box, "area": area}
    return place | {"segmentation": rectangle(*box)} | changes


TRUTH = {
    "images": [{"id": 1, "height": 100, "width": 100, "file_name": "one.png"}],
    "categories": [
        {"id": 1, "name": "cat", "image_count": 5, "frequency": "r"},
        {"id": 4, "name": "dog", "image_count": 500, "frequency": "f"},
    ],
    "annotations": [placed([0, 0, 20, 20], 1, id=1), placed([40, 40, 20, 20], 1, id=2)],
}
FOUND = [
    placed([0, 0, 20, 20], 1, score=0.95),
    placed([40, 40, 20, 20], 4, score=0.95),  # a cat taken for a dog
]


def page_of(data, rows, path, *, iou_types=("bbox", "segm"), annotations=None):
    scores = score_of(data, rows, iou_types=iou_types, options=ScoreOptions(analyse=True))
    write_page(scores, path, title="Analysis of <b>", facts=FACTS, annotations=annotations)
    return path.read_text()


def body_of(page):
    """The body without its script, read as XML."""
    body = re.sub(r"<script>.*?</script>", "", page[page.index("<body>") : page.index("</html>")], flags=re.DOTALL)
    for attribute in ("data-text", "loading"):
        body = re.sub(rf" {attribute}(?=[ >])", "", body)
    body = re.sub(r"(<(?:img|input)[^>]*?)/?>", r"\1/>", body)
    return ElementTree.fromstring(body.replace("xlink:href", "href"))


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def test_what_a_page_says(tmp_path):
    root = body_of(page_of(TRUTH, FOUND, tmp_path / "page.html"))
    text = text_of(root)
    for part in ("Analysis of <b>", "runs/<b>/best.safetensors", "birds, val", "Shown from a score of 0.95 on, 50%"):
        assert part in text
    tables = [[[text_of(cell) for cell in row] for row in table.iter("tr")] for table in root.iter("table")]
    ap, classes, errors, matrix, size, crowding, groups, labels = tables
    assert ap[0] == ["%", "AP", "AP50", "AP75", "APr", "APc", "APf", "APs", "APm", "APl"]
    assert [row[:5] for row in ap[1:]] == [["Masks", *["50.5"] * 4], ["Boxes", *["50.5"] * 4]]
    assert classes[1] == ["cat", "rare", "50.5", "5", "2", "0.95", "100.0", "50.0"]
    assert classes[2] == ["dog", "frequent", "–", "500", "0", "–", "–", "–"]
    assert [row[0] for row in errors[1:]] == ["Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN"]
    assert matrix[1:] == [["1 cat", "1", "1", "", ""], ["2 dog", "", "", "", ""]]
    assert size[1] == ["16–32", "2", "50.0", "50.0"]
    assert crowding[1] == ["1–4", "1", "50.5", "50.0", "50.0"]
    assert groups[1:] == [["rare", "1", "2", "50.5", "100.0", "50.0"], ["frequent", "0", "0", "–", "0.0", "–"]]
    assert labels[1] == ["one.png", "2", "cat", "dog", "0.95", "40, 40, 20, 20"]
    assert "one.png: F1 0.50, 1 right, 1 wrong, 1 missed. Missed: cat. Wrong: dog 0.95." in text


def test_a_page_without_calibration_says_why(tmp_path, caplog):
    """Logits as scores."""
    page = page_of(TRUTH, [row | {"score": score} for row, score in zip(FOUND, (3.5, -2), strict=True)], tmp_path / "a")
    assert "Some scores are outside of 0 to 1, so they are no probabilities" in text_of(body_of(page))
    assert "the expected gap" not in page
    for word in ("boxes", "masks"):
        assert f"2 of 2 scores that count for {word} are outside of 0 to 1" in caplog.text


def test_a_page_tells_scores_of_masks_from_those_of_boxes(tmp_path):
    rows = [one | {"box_score": 0.8 - 0.3 * i} for i, one in enumerate(FOUND)]
    text = text_of(body_of(page_of(TRUTH, rows, tmp_path / "page.html")))
    assert "Shown from a score of 0.80 on, 100% of the detections are right and 50% of the objects" in text
    assert "“At the threshold” below means a mask score of 0.95" in text


def test_a_page_is_well_formed_whatever_is_missing(tmp_path):
    named = copy.deepcopy(TRUTH)
    named["categories"][0]["name"] = EVIL
    for category in named["categories"]:
        del category["image_count"], category["frequency"]
    nothing = TRUTH | {"annotations": []}
    boxes = [{key: value for key, value in row.items() if key != "segmentation"} for row in FOUND]
    for data, rows, kinds, charts in (
        (TRUTH, FOUND, ("bbox", "segm"), 5),
        (TRUTH, boxes, ("bbox",), 5),
        (TRUTH, [], ("segm",), 5),
        (named, FOUND, ("segm",), 4),  # without numbers of training images there is no chart of them
        (nothing, [], ("segm",), 2),
        (nothing, FOUND, ("segm",), 2),
    ):
        page = page_of(data, rows, tmp_path / "page.html", iou_types=kinds)
        assert page.count("<svg") == charts
        assert page.count("<script") == 1
        body_of(page)
    assert "Masks" not in page_of(TRUTH, boxes, tmp_path / "page.html", iou_types=("bbox",))


@pytest.mark.parametrize("size", [(100, 100), (1500, 1000)])
def test_pictures_of_the_worst_images(tmp_path, size):
    """Truth and detections side by side, scaled down; an image that cannot be read is said."""
    data = copy.deepcopy(TRUTH)
    data["images"][0] |= {"width": size[0], "height": size[1]}
    (tmp_path / "val.json").write_text(json.dumps(data))
    annotations = load_annotations(tmp_path / "val.json", tmp_path)
    assert "The picture one.png cannot be read." in page_of(data, FOUND, tmp_path / "a.html", annotations=annotations)
    Image.fromarray(np.full((size[1], size[0], 3), 128, np.uint8)).save(tmp_path / "one.png")
    annotations = load_annotations(tmp_path / "val.json", tmp_path)
    for kinds in (("bbox", "segm"), ("bbox",)):
        page = page_of(data, FOUND, tmp_path / "a.html", iou_types=kinds, annotations=annotations)
        pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
        assert len(pictures) == 2
        assert pictures[0] != pictures[1]
        assert all(len(picture) < 100_000 for picture in pictures)


HEAD = "<script>window.errors = []; addEventListener('error', (event) => errors.push(event.message))</script>"
TRY = """<pre id="answer"></pre><script>
const rows = () => [...document.querySelectorAll("#classes tbody tr")];
const column = (i) => rows().map((row) => row.cells[i].textContent);
const heads = document.querySelectorAll("#classes thead button");
const told = () => document.getElementById("told").textContent;
const search = document.getElementById("search");
const seen = (text) => {
  search.value = text;
  search.dispatchEvent(new Event("input"));
  return rows().filter((row) => row.checkVisibility()).map((row) => row.cells[0].textContent);
};
const answer = { start: column(4), first: told() };
heads[2].click(); answer.falling = column(2);
heads[2].click(); answer.rising = column(2);
heads[0].click(); answer.names = column(0);
answer.all = seen("").length;
answer.found = seen("Class 12"); // class_12, class_120, ...
answer.evil = seen("<" + "/script>");
answer.none = seen("no such class"); seen("");
rows().find((row) => row.cells[0].textContent === "class_7").querySelector("button").click();
answer.chosen = told();
answer.curve = document.getElementById("curve").getAttribute("points").split(" ").length;
const select = document.getElementById("chosen");
answer.options = select.options.length;
select.selectedIndex = 0; select.dispatchEvent(new Event("change")); answer.other = told();
answer.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
answer.errors = errors; answer.evil_ran = "evil" in window;
document.getElementById("answer").textContent = JSON.stringify(answer);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [1200, 400])
def test_the_table_of_1203_classes_in_a_browser(tmp_path: Path, width: int):
    """Sorting, searching and choosing a class do what they say; no script fails, no name becomes a script."""
    names = [EVIL, *(f"class_{i}" for i in range(1, 1203))]
    categories = [{"id": i, "name": name, "image_count": 1500 * i % 1999} for i, name in enumerate(names, 1)]
    images = [{"id": i, "height": 100, "width": 100, "file_name": f"{i}.jpg"} for i in range(1, 101)]
    truth = [placed([5, 5, 30, 30], i, i % 100 + 1, id=i) for i in range(1, 1201)]
    truth += [placed([50, 50, 30, 30], 1201, image, id=2000 + image) for image in (1, 2)]
    rows = [placed([5, 5 + i % 7, 30, 30], i, i % 100 + 1, score=0.5 + i / 3000) for i in range(1, 1204)]
    page = page_of({"images": images, "annotations": truth, "categories": categories}, rows, tmp_path / "page.html")
    assert len(page) < 1_000_000
    page = page.replace("<head>", f"<head>{HEAD}").replace("</body>", TRY)
    (tmp_path / "page.html").write_text(page)
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *(f"--window-size={width},900", "--dump-dom", (tmp_path / "page.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    written = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert written, done.stderr
    answer = json.loads(html.unescape(written[1]))
    assert answer["errors"] == []
    assert not answer["evil_ran"]
    assert answer["wide"] <= 0  # the page itself never scrolls sideways
    assert answer["start"] == ["2", *["1"] * 1200, "0", "0"]
    assert answer["first"].startswith("class_1200: AP 0.0; nothing")
    numbers = [float(text) for text in answer["falling"] if text != "–"]
    assert len(set(numbers)) > 3
    assert numbers == sorted(numbers, reverse=True)
    assert answer["falling"][-2:] == ["–", "–"]
    assert answer["rising"] == [*map("{:.1f}".format, sorted(numbers)), "–", "–"]  # what has no value stays last
    assert answer["names"] == sorted(names)
    assert answer["all"] == 1203
    assert answer["found"] == [name for name in sorted(names) if name.startswith("class_12")]
    assert answer["evil"] == [EVIL]
    assert answer["none"] == []
    assert answer["chosen"].startswith("class_7: AP ")
    assert (answer["curve"], answer["options"]) == (21, 1201)
    assert answer["other"].startswith(EVIL)
