"""The demo in this process, on a set of two dozen pictures; that it is worth looking at is seen by running it."""

import html
import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image

from tailseg.cli import demo
from tailseg.cli.demo_objects import Objects, is_found
from tailseg.data.sources import SYNTHETIC, DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.evaluation.methods import results_markdown, verdict

SETTINGS = (
    "model.backbone.pretrained=false",
    "model.backbone.frozen_stages=-1",
    "model.neck.channels=16",
    "model.rpn={pre_nms_train: 50, pre_nms_test: 50, post_nms_train: 40, post_nms_test: 20}",
    "model.box_head={width: 32, rois: 32, max_positive: 8}",
    "model.mask_head={channels: 8, convs: 1}",
    "data={batch_per_device: 4, workers: 0, short_edges: [64], test_short_edge: 64, long_edge: 64, mask_grid: 28}",
    "schedule={epochs: 1, milestones: []}",
    "training={evaluate_every: 1, log_steps: 1}",
    "test.max_detections=20",
)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR20", "ARs20", "ARm20", "ARl20")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    settings = SyntheticSettings(classes=4, train_images=12, val_images=6, size=64)
    opened = open_data(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)))
    return DataSplits(SYNTHETIC, opened.train, opened.val)


@pytest.fixture(scope="module")
def made(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demo of two seeds: its folder and its results."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "draw_synthetic", lambda settings, show: "drawn" if settings == demo.DATA else None)
        patch.setattr(demo, "open_data", lambda name, show: data if name == "drawn" else None)
        return out, demo.run_demo(out, seeds=2, show=False, settings=SETTINGS)


def test_results(made: tuple[Path, dict[str, Any]], data: DataSplits) -> None:
    out, results = made
    assert json.loads((out / "results.json").read_text()) == results
    assert results["seeds"] == [0, 1]
    assert results["command"] == "tailseg demo --seeds 2"
    about = results["dataset"]
    assert (about["name"], about["classes"], about["train_images"], about["val_images"]) == (SYNTHETIC, 4, 12, 6)
    assert about["image_size"] == 64
    assert set(about["frequency_classes"]) == {"r", "c", "f"}
    assert sum(about["frequency_classes"].values()) == 4
    budget = results["budget"]
    assert (budget["epochs"], budget["steps"], budget["images_seen"]) == (1, 3, 12)
    assert budget["seconds"] > 0
    assert set(results["methods"]) == {"cross-entropy", "seesaw"}
    assert data.train is not None
    assert data.val is not None
    for name, method in results["methods"].items():
        assert [run["seed"] for run in method["runs"]] == [0, 1]
        for run in method["runs"]:
            assert {kind: tuple(values) for kind, values in run["metrics"].items()} == {
                "bbox": METRICS,
                "segm": METRICS,
            }
            assert set(run["beyond"]["segm"]) == {metric.removesuffix("20") for metric in METRICS[:9]} | {
                "AR300", "ARs300", "ARm300", "ARl300",
            }  # fmt: skip
            # What the limit cuts off can only cost.
            for metric in ("AP", "APr", "APf"):
                assert run["beyond"]["segm"][metric] >= run["metrics"]["segm"][metric] - 1e-9
            assert [row["train_images"] for row in run["per_category"]] == data.train.image_counts().tolist()
            assert [row["step"] for row in run["curves"]] == [1, 2, 3]
            assert all(np.isfinite(row["loss"]) for row in run["curves"])
            assert Path(run["checkpoint"]).is_file()
            assert Path(run["detections"]).is_file()
            assert run["seconds"] > 0
            recipe = (Path(run["checkpoint"]).parent / "recipe.yaml").read_text()
            assert f"demo/{name}" in recipe
    assert results["limit"] == {"detections": 20, "beyond": 80}
    for found in results["why"]["outcomes"].values():
        assert sum(sum(ends.values()) for ends in found["ends"].values()) == len(data.val.labels)
        assert [len(found["scores"][group]) for group, ends in found["ends"].items() if any(ends.values())]
    assert "Seesaw" in results_markdown(results)
    assert verdict(results)


def test_a_quick_demo_trains_on_few_pictures_and_claims_nothing(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "draw_synthetic", lambda settings, show: f"{settings.train_images} drawn")
    monkeypatch.setattr(demo, "open_data", lambda name, show: data if name == "160 drawn" else None)
    results = demo.run_demo(tmp_path, quick=True, show=False, settings=SETTINGS)
    assert results["command"] == "tailseg demo --seeds 1 --quick"
    sentence = "Everything runs. 3 steps are too few to compare the methods; `tailseg demo` does that."
    assert verdict(results) == sentence
    assert html.escape(sentence) in (tmp_path / "report.html").read_text()


def test_both_methods_get_the_same(made: tuple[Path, dict[str, Any]]) -> None:
    """The same steps and rates; seeds differ."""
    methods = made[1]["methods"]
    curves = {name: [run["curves"] for run in method["runs"]] for name, method in methods.items()}
    logs = {
        name: [Path(run["checkpoint"]).parent / "metrics.jsonl" for run in methods[name]["runs"]] for name in methods
    }
    rates = {
        name: [[json.loads(line).get("lr") for line in log.read_text().splitlines()] for log in of_seed]
        for name, of_seed in logs.items()
    }
    assert any(rates["seesaw"][0])
    assert rates["cross-entropy"] == rates["seesaw"]
    assert curves["seesaw"][0][0]["loss"] != curves["seesaw"][1][0]["loss"]
    assert "objectness" in curves["seesaw"][0][0]
    assert "objectness" not in curves["cross-entropy"][0][0]


class Sources(html.parser.HTMLParser):
    """The files that a page names."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if key in ("src", "href") and value and ":" not in value]


def test_report(made: tuple[Path, dict[str, Any]]) -> None:
    out, results = made
    page = (out / "report.html").read_text()
    assert "Seesaw" in page
    assert "Cross-entropy" in page
    parser = Sources()
    parser.feed(page)
    assert all((out / name).is_file() for name in parser.found if not name.startswith("#"))
    assert all((out / picture["file"]).is_file() for picture in results["pictures"])


def test_an_existing_demo_is_refused(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    before = (made[0] / "results.json").read_bytes()
    with pytest.raises(UserError, match=f"^{made[0]}: already holds a demo"):
        demo.run_demo(made[0], show=False)
    assert (made[0] / "results.json").read_bytes() == before
    (tmp_path / "runs").mkdir()  # one that was stopped
    with pytest.raises(UserError, match="already holds a demo"):
        demo.run_demo(tmp_path, show=False)


def write_detections(path: Path, data: DataSplits, kept: set[int]) -> str:
    """Perfect detections of the classes ``kept`` (labels); others are found in the wrong place."""
    assert data.val is not None
    val, rows = data.val, []
    for image in range(len(val)):
        height, width = val.image_sizes[image].tolist()
        for row in val.rows(image):
            x1, y1, x2, y2 = val.boxes[row].tolist()
            segmentation = val.segmentation(int(row))
            assert isinstance(segmentation, bytes)
            wrong = int(val.labels[row]) not in kept
            box = [0.0, 0.0, 3.0, 3.0] if wrong else [x1, y1, x2 - x1, y2 - y1]
            rows.append(
                {
                    "image_id": int(val.image_ids[image]),
                    "category_id": val.categories[int(val.labels[row])].id,
                    "bbox": box,
                    "score": 0.5,
                    "segmentation": {"size": [height, width], "counts": segmentation.decode()},
                }
            )
    path.write_bytes(orjson.dumps(rows))
    return str(path)


def test_pictures_of_what_only_one_method_found(data: DataSplits, tmp_path: Path) -> None:
    """Cross-entropy finds classes 0 and 1, Seesaw 1, 2 and 3: the pictures say so, rarest class first."""
    assert data.train is not None
    assert data.val is not None
    found = {
        "cross-entropy": write_detections(tmp_path / "a.json", data, {0, 1}),
        "seesaw": write_detections(tmp_path / "b.json", data, {1, 2, 3}),
    }
    pictures = demo._pictures(data, found, tmp_path)
    labels = data.val.labels
    only = {"only-seesaw": int(np.isin(labels, [2, 3]).sum()), "only-cross-entropy": int((labels == 0).sum())}
    names = [category.name.replace("_", " ") for category in data.train.categories]
    counts = data.train.image_counts()
    for kind, number in only.items():
        captions = [picture["caption"] for picture in pictures if picture["kind"] == kind]
        assert 0 < len(captions) <= demo.PICTURES
        assert all(f"Of all {len(labels)} objects, {number} were found by" in caption for caption in captions)
        rarity = [next(int(counts[i]) for i, name in enumerate(names) if name in caption) for caption in captions]
        assert rarity == sorted(rarity)
    for picture in pictures:
        image = Image.open(tmp_path / picture["file"])
        assert image.width > 3 * 60
    assert len({picture["file"] for picture in pictures}) == len(pictures)
    same = demo._pictures(data, dict.fromkeys(found, found["seesaw"]), tmp_path / "same")
    assert same == []


def test_found_means_class_and_overlap() -> None:
    def objects(boxes: list[list[float]], labels: list[int]) -> Objects:
        return Objects(
            np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.zeros((len(labels), 9, 9), bool)
        )

    truth = objects([[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 10]], [0, 1, 0, 2])
    # The first overlaps by exactly a half, the class-1 box by a little less, the third is in another place.
    seen = objects([[0, 0, 10, 5], [0, 0, 10, 4.9], [80, 80, 90, 90]], [0, 1, 0])
    assert is_found(truth, seen).tolist() == [True, False, False, False]
    assert is_found(truth, objects([], [])).tolist() == [False] * 4
    assert is_found(objects([], []), seen).tolist() == []


def test_the_demo_recipes_share_all_but_the_classifier() -> None:
    from tailseg.recipes.resolve import resolve
    from tailseg.recipes.values import diff

    found = diff(resolve("demo/cross-entropy"), resolve("demo/seesaw"))
    assert all(key.startswith("classifier.") for key, _, _ in found)
    assert found
