"""The report says what the numbers say, no more, and needs nothing but itself."""

import copy
import logging
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tailseg.errors import UserError
from tailseg.evaluation.methods import Stat, difference, results_markdown, summary, verdict
from tailseg.visualize.demo_charts import class_points, method_colour, smoothed
from tailseg.visualize.demo_page import write_report

BASE = {
    "AP": 0.2,
    "AP50": 0.36,
    "AP75": 0.18,
    "APs": 0.1,
    "APm": 0.2,
    "APl": None,
    "APr": 0.1,
    "APc": 0.2,
    "APf": 0.3,
}


def one_run(seed: int, segm: dict, bbox: dict | None = None) -> dict:
    return {
        "seed": seed,
        "metrics": {"segm": BASE | segm, "bbox": BASE | (bbox or {})},
        "per_category": [
            {
                "id": i,
                "name": f"kind_{i}",
                "frequency": "rcf"[i],
                "train_images": n,
                "train_instances": 2 * n,
                "bbox_AP": 0.5,
                "segm_AP": None if i == 1 else 0.1 * (i + 1),
            }
            for i, n in enumerate((0, 9, 200))
        ],
        "curves": [{"step": step, "loss": 3.0 - step / 100, "loss_mask": 0.5} for step in range(0, 100, 10)],
        "seconds": 326.4,
        "checkpoint": f"{seed}/best.safetensors",
        "detections": f"{seed}/detections.json",
    }


def make(baseline: list[dict], seesaw: list[dict]) -> dict:
    return {
        "version": "0.1.0",
        "command": "tailseg demo --out <folder>",
        "dataset": {
            "name": "shapes & co",
            "classes": 3,
            "train_images": 1200,
            "val_images": 50,
            "image_size": 128,
            "frequency_classes": {"r": 1, "c": 1, "f": 1},
        },
        "budget": {"epochs": 12.0, "steps": 3000, "images_seen": 24000, "device": "cpu", "seconds": 3723.0},
        "seeds": list(range(len(baseline))),
        "methods": {
            "cross-entropy": {
                "title": "Cross-entropy",
                "runs": [one_run(i, m) for i, m in enumerate(baseline)],
            },
            "seesaw": {"title": "Seesaw", "runs": [one_run(i, m) for i, m in enumerate(seesaw)]},
        },
        "pictures": [],
    }


def runs(pairs: list[tuple[float, float]]) -> list[dict]:
    return [{"AP": ap, "APr": rare} for ap, rare in pairs]


@pytest.fixture
def winning() -> dict:
    return make(runs([(0.20, 0.10), (0.21, 0.11), (0.19, 0.09)]), runs([(0.25, 0.20), (0.26, 0.21), (0.24, 0.19)]))


class Checker(HTMLParser):
    """Collects what stands in the page and insists that tags nest."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


def test_summary_gives_mean_and_sample_deviation(winning):
    stat = summary(winning)["seesaw"]["segm"]["APr"]
    assert stat.mean == pytest.approx(20.0)
    assert stat.sd == pytest.approx(1.0)
    assert str(stat) == "20.0 ± 1.0"
    assert summary(winning)["seesaw"]["segm"]["APl"].mean is None


def test_markdown_table(winning):
    lines = results_markdown(winning).splitlines()
    assert lines[:4] == [
        "| | Cross-entropy | Seesaw | Difference |",
        "|---|---:|---:|---:|",
        "| Mask AP | 20.0 ± 1.0 | 25.0 ± 1.0 | +5.0 |",
        "| Mask APr | 10.0 ± 1.0 | 20.0 ± 1.0 | +10.0 |",
    ]
    assert len(lines) == 2 + 12
    assert lines[8] == "| Box AP | 20.0 ± 0.0 | 20.0 ± 0.0 | ±0.0 |"


def test_nulls_are_dashes():
    results = make(runs([(0.2, None)]), runs([(0.25, None)]))
    assert "| Mask APr | – | – | – |" in results_markdown(results)
    assert "on rare classes has no value" in verdict(results)
    nothing = make(runs([(None, None)]), runs([(float("nan"), None)]))
    assert verdict(nothing).startswith("Seesaw and cross-entropy cannot be compared")


def test_verdict_of_a_clear_win(winning):
    assert verdict(winning) == (
        "Seesaw beats cross-entropy on rare classes and overall: "
        "mask AP on rare classes went from 10.0 to 20.0 "
        "(+10.0 points, beyond the spread of 3 seeds), and on all classes went from 20.0 to 25.0 "
        "(+5.0 points, beyond the spread of 3 seeds)."
    )


def test_verdict_of_a_loss(winning):
    methods = winning["methods"]
    methods["seesaw"]["runs"], methods["cross-entropy"]["runs"] = (
        methods["cross-entropy"]["runs"],
        methods["seesaw"]["runs"],
    )
    sentence = verdict(winning)
    assert sentence.startswith("Seesaw did not win, it is worse than cross-entropy on rare classes and on all")
    assert "from 20.0 to 10.0 (−10.0 points" in sentence


def test_verdict_when_rare_classes_win_and_the_whole_loses():
    results = make(runs([(0.30, 0.10), (0.31, 0.11)]), runs([(0.20, 0.30), (0.21, 0.31)]))
    assert verdict(results).startswith("Mixed: Seesaw beats cross-entropy on rare classes but loses on all classes")


def test_verdict_within_the_spread():
    results = make(runs([(0.20, 0.10), (0.24, 0.14)]), runs([(0.22, 0.12), (0.26, 0.16)]))
    sentence = verdict(results)
    assert sentence.startswith("Seesaw did not win clearly: what sets it apart from cross-entropy may be chance")
    assert sentence.count("within the spread of the seeds") == 2


def test_verdict_of_one_seed_claims_nothing():
    ahead = verdict(make(runs([(0.2, 0.1)]), runs([(0.3, 0.2)])))
    assert ahead.startswith("Seesaw came out ahead of cross-entropy in a single run, but one seed cannot tell")
    behind = verdict(make(runs([(0.3, 0.2)]), runs([(0.2, 0.1)])))
    assert behind.startswith("Seesaw did not come out ahead of cross-entropy in a single run, and one seed cannot")
    split = verdict(make(runs([(0.3, 0.1)]), runs([(0.2, 0.2)])))
    assert split.startswith("Seesaw did not come out ahead of cross-entropy except on rare classes in a single run")


@pytest.mark.parametrize(
    ("baseline", "contender", "outcome"),
    [
        ((10.0, 12.0), (20.0, 22.0), "gain"),
        ((20.0, 22.0), (10.0, 12.0), "loss"),
        ((10.0, 12.0), (13.9, 15.9), "unclear"),  # 3.9 points against 2 · √(2 + 2) = 4
        ((10.0, 12.0), (15.1, 17.1), "gain"),
        ((10.0,), (20.0, 22.0), "single"),
        ((), (20.0,), "missing"),
    ],
)
def test_a_difference_must_exceed_twice_its_deviation(baseline, contender, outcome):
    assert difference(Stat(baseline), Stat(contender)).outcome == outcome


def test_a_single_method_is_reported_without_difference(winning, tmp_path):
    del winning["methods"]["cross-entropy"]
    assert results_markdown(winning).startswith("| | Seesaw |\n|---|---:|\n| Mask AP | 25.0 ± 1.0 |\n")
    assert verdict(winning) == "Nothing is compared: the results hold Seesaw only."
    write_report(winning, tmp_path / "report.html")
    assert "Difference" not in read(tmp_path / "report.html").text[:40]


def test_page_is_well_formed_and_refers_to_nothing_outside(winning, tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "one.png")
    winning["pictures"] = [{"file": "one.png", "caption": 'A <b> & a "c"', "kind": "only-seesaw"}]
    write_report(winning, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "@import" not in (tmp_path / "report.html").read_text()
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images[0]["src"].startswith("data:image/png;base64,iVBOR")
    assert images[0]["alt"] == 'A <b> & a "c"'
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 4  # groups, classes, two losses
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)


def test_page_shows_numbers_origin_and_escapes_text(winning, tmp_path):
    write_report(winning, tmp_path)
    text = "".join(read(tmp_path / "report.html").text)
    for expected in (
        verdict(winning),
        "10.0 ± 1.0",
        "+10.0",
        "tailseg demo --out <folder>",
        "shapes & co",
        "1,200 training",
        "12 epochs, 3,000 steps, 24,000 images",
        "cpu, 1 h 2 min in all",
        "5 min 26 s",
    ):
        assert expected in text


def test_a_missing_picture_is_named_in_the_page_and_in_the_log(winning, tmp_path, caplog):
    winning["pictures"] = [{"file": "pictures/gone.png", "caption": "A tiger", "kind": "only-cross-entropy"}]
    with caplog.at_level(logging.WARNING):
        write_report(winning, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "The picture pictures/gone.png is missing." in page.text
    assert "Found by cross-entropy only" in page.text
    assert "gone.png" in caplog.text


def test_page_without_curves_categories_and_values(tmp_path):
    results = make(runs([(None, None)]), runs([(None, None)]))
    for method in results["methods"].values():
        for run in method["runs"]:
            run.update(curves=[], per_category=[], seconds=None)
            run["metrics"] = {"segm": dict.fromkeys(BASE), "bbox": {}}
    write_report(results, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.text.count("–") >= 36  # every cell of the tables
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2  # no training curves


@pytest.mark.parametrize("key", ["methods", "budget", "dataset", "command"])
def test_incomplete_results_are_the_users_to_fix(winning, tmp_path, key):
    broken = copy.deepcopy(winning)
    del broken[key]
    with pytest.raises(UserError, match=key):
        write_report(broken, tmp_path / "report.html")


def test_results_without_runs_are_refused(winning, tmp_path):
    with pytest.raises(UserError, match="no method"):
        write_report(winning | {"methods": {}}, tmp_path / "report.html")
    winning["methods"]["seesaw"]["runs"] = []
    with pytest.raises(UserError, match="no runs of 'seesaw'"):
        write_report(winning, tmp_path / "report.html")


def test_class_points_average_the_seeds_and_skip_nulls(winning):
    winning["methods"]["seesaw"]["runs"][0]["per_category"][2]["segm_AP"] = 0.6
    images, values = class_points(winning["methods"]["seesaw"])
    np.testing.assert_array_equal(images, [0, 200])
    np.testing.assert_allclose(values, [10.0, 40.0])


def test_smoothing_keeps_constants_and_lies_between_extremes():
    x = np.array([0.0, 1.0, 5.0])
    np.testing.assert_allclose(smoothed(x, np.full(3, 7.0))[1], 7.0)
    places, line = smoothed(x, np.array([0.0, 10.0, 4.0]))
    assert (places[0], places[-1]) == (0.0, 5.0)
    assert line.min() >= 0
    assert line.max() <= 10
    np.testing.assert_allclose(smoothed(np.array([2.0]), np.array([3.0]))[1], 3.0)


def test_methods_keep_their_colours():
    methods = {"seesaw": {}, "eql": {}, "cross-entropy": {}}
    assert method_colour(methods, "seesaw") == method_colour({"seesaw": {}}, "seesaw") == "#d55e00"
    assert len({method_colour(methods, key) for key in methods}) == 3
