"""The evaluation loop with a detector that answers from a list, and with a real one of random weights."""

import csv
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import orjson
import pytest
import torch
from hotcoco import mask as rle
from torch import nn

from tailseg.data.dataset import DetectionDataset
from tailseg.data.images import read_image
from tailseg.data.sources import open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.data.transforms import Compose, fit_transform
from tailseg.errors import UserError
from tailseg.evaluation import evaluate as evaluation
from tailseg.evaluation.behind import behind, stream_of
from tailseg.evaluation.evaluate import evaluate
from tailseg.evaluation.metrics import ScoreOptions, score
from tailseg.evaluation.results import ResultsWriter
from tailseg.evaluation.tta import View, detect_views
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch, RawDetections

CPU = torch.device("cpu")
KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs300", "ARm300", "ARl300"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    """Five images of 64 pixels, the last one without annotations."""
    folder = tmp_path_factory.mktemp("set") / "data"
    write_synthetic(folder, SyntheticSettings(classes=4, train_images=4, val_images=5, size=64))
    content = orjson.loads((folder / "val.json").read_bytes())
    last = content["images"][-1]["id"]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != last]
    (folder / "val.json").write_bytes(orjson.dumps(content))
    val = open_data(str(folder), need=("val",)).val
    assert val is not None
    return DetectionDataset(val, fit_transform(96, 96), drop_empty=False, mask_grid=28)


class Oracle(nn.Module):
    """Answers with the annotations themselves, as boxes full of mask, in the pixels of the image file."""

    def __init__(
        self, dataset: DetectionDataset, change: Callable[[RawDetections], RawDetections] = lambda d: d
    ) -> None:
        super().__init__()
        self.divisor = 32
        self.annotations, self.change = dataset.annotations, change
        self.modes: list[bool] = []
        self.sizes: list[int] = []
        self.padded: list[tuple[int, ...]] = []

    def detect(self, batch: Batch) -> list[RawDetections]:
        self.modes.append(self.training)
        self.sizes.append(len(batch))
        self.padded.append(tuple(batch.images.shape[2:]))
        assert batch.image_sizes.tolist() == [[96, 96]] * len(batch)
        return [self._answer(int(image_id)) for image_id in batch.image_ids]

    def _answer(self, image_id: int) -> RawDetections:
        annotations = self.annotations
        rows = annotations.rows(annotations.image_ids.tolist().index(image_id))
        found = RawDetections(
            image_hw=(64, 64),
            boxes=torch.from_numpy(annotations.boxes[rows]),
            scores=torch.linspace(0.9, 0.5, len(rows)),
            labels=torch.from_numpy(annotations.labels[rows]),
            masks=torch.ones(len(rows), 28, 28),
        )
        return self.change(found)


def nothing(found: RawDetections) -> RawDetections:
    return found[torch.zeros(0, dtype=torch.int64)]


def wrong_class(found: RawDetections) -> RawDetections:
    return replace(found, labels=(found.labels + 1) % 4)


def test_perfect_boxes(dataset: DetectionDataset, tmp_path: Path) -> None:
    oracle = Oracle(dataset)
    out = tmp_path / "deep" / "folder"
    scores = evaluate(oracle, dataset, out, device=CPU, batch_size=2, show=False)  # type: ignore[arg-type]
    assert scores is not None
    assert scores.metrics["bbox"]["AP"] == 1.0
    assert scores.metrics["bbox"]["AR300"] == 1.0
    assert 0 < (scores.metrics["segm"]["AP"] or 0) < 1  # objects are not rectangles
    assert {kind: list(values) for kind, values in scores.metrics.items()} == {"bbox": KEYS, "segm": KEYS}
    assert json.loads((out / "metrics.json").read_text()) == scores.metrics
    assert sorted(path.name for path in out.iterdir()) == ["classes.csv", "detections.json", "metrics.json"]
    assert oracle.sizes == [2, 2, 1]
    assert oracle.padded == [(96, 96)] * 3
    assert not any(oracle.modes)
    assert oracle.training  # as it was before


def test_rows_of_the_results_file(dataset: DetectionDataset, tmp_path: Path) -> None:
    evaluate(Oracle(dataset).eval(), dataset, tmp_path, device=CPU, show=False)  # type: ignore[arg-type]
    rows = orjson.loads((tmp_path / "detections.json").read_bytes())
    truth = orjson.loads(dataset.annotations.path.read_bytes())["annotations"]
    assert len(rows) == len(truth)
    key = lambda row: (row["image_id"], row["category_id"], *row["bbox"])  # noqa: E731
    assert sorted(map(key, rows)) == sorted(map(key, truth))
    for row in rows:
        assert set(row) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        x, y, w, h = (round(side) for side in row["bbox"])
        mask = rle.decode(row["segmentation"])
        assert mask.shape == (64, 64)
        assert mask.sum() == w * h
        assert mask[y : y + h, x : x + w].all()


@pytest.mark.parametrize("change", [nothing, wrong_class])
def test_nothing_right(
    dataset: DetectionDataset, tmp_path: Path, change: Callable[[RawDetections], RawDetections]
) -> None:
    oracle = Oracle(dataset, change).eval()
    scores = evaluate(oracle, dataset, tmp_path, device=CPU, show=False)  # type: ignore[arg-type]
    assert scores is not None
    for kind in ("bbox", "segm"):
        assert scores.metrics[kind]["AP"] == 0.0
        assert scores.metrics[kind]["AR300"] == 0.0
    assert not oracle.training


def test_frequencies_of_the_model(dataset: DetectionDataset, tmp_path: Path) -> None:
    """Groups come from the data set, or from the caller where the data set states none."""
    only_first = {category.id: "r" if category.id == 1 else "f" for category in dataset.annotations.categories}
    oracle: Any = Oracle(dataset, lambda found: found[found.labels != 0])
    scores = evaluate(oracle, dataset, tmp_path, device=CPU, frequencies=only_first, show=False)
    assert scores is not None
    metrics = scores.metrics["bbox"]
    assert (metrics["APr"], metrics["APc"], metrics["APf"]) == (0.0, None, 1.0)
    assert [row["frequency"] for row in scores.per_category] == ["r", "f", "f", "f"]
    scores = evaluate(oracle, dataset, tmp_path, device=CPU, show=False)
    assert scores is not None
    assert [row["frequency"] for row in scores.per_category] == [c.frequency for c in dataset.annotations.categories]


class Renumbered(Oracle):
    """The same answers in the labels of another model, with a box of a class of its own before each."""

    def __init__(self, dataset: DetectionDataset, label_of: dict[int, int], foreign: list[int]) -> None:
        super().__init__(dataset)
        self.label_of, self.foreign = label_of, foreign

    def _answer(self, image_id: int) -> RawDetections:
        found = super()._answer(image_id)
        rows = torch.arange(len(found)).repeat_interleave(2 if self.foreign else 1)
        doubled = found[rows]
        labels = torch.tensor([self.label_of[label] for label in doubled.labels.tolist()], dtype=torch.int64)
        if self.foreign:
            labels[::2] = torch.tensor(self.foreign)[torch.arange(len(found)) % len(self.foreign)]
        found = replace(doubled, labels=labels)
        return found[found.labels >= 0]


def rows_of(folder: Path) -> list[bytes]:
    return sorted(map(orjson.dumps, orjson.loads((folder / "detections.json").read_bytes())))


def test_labels_of_another_model(dataset: DetectionDataset, tmp_path: Path) -> None:
    """A model with two classes that the data lacks and another order: the data's own ids are written, no others."""
    plain: Any = Oracle(dataset)
    whole = evaluate(plain, dataset, tmp_path / "plain", device=CPU, show=False)
    ids = dataset.annotations.label_to_category_id.tolist()
    order = {0: 3, 1: 5, 2: 0, 3: 2}  # the data's label -> the model's
    category_ids: list[int | None] = [None] * 6
    for label, place in order.items():
        category_ids[place] = ids[label]
    for foreign in ([1, 4], []):
        model: Any = Renumbered(dataset, order, foreign)
        out = tmp_path / f"other{len(foreign)}"
        scores = evaluate(model, dataset, out, device=CPU, category_ids=category_ids, show=False)
        assert scores is not None
        assert whole is not None
        assert scores.metrics == whole.metrics
        assert rows_of(out) == rows_of(tmp_path / "plain")


def test_a_model_that_knows_less_scores_0_in_the_rest(dataset: DetectionDataset, tmp_path: Path) -> None:
    ids = dataset.annotations.label_to_category_id.tolist()
    model: Any = Renumbered(dataset, {0: -1, 1: 0, 2: -1, 3: 1}, [])
    scores = evaluate(model, dataset, tmp_path, device=CPU, category_ids=[ids[1], ids[3]], show=False)
    assert scores is not None
    rows = orjson.loads((tmp_path / "detections.json").read_bytes())
    truth = orjson.loads(dataset.annotations.path.read_bytes())["annotations"]
    assert rows
    assert {row["category_id"] for row in rows} <= {ids[1], ids[3]}
    present = {row["category_id"] for row in truth}
    assert 0 < len(present & {ids[1], ids[3]}) < len(present)
    assert scores.metrics["bbox"]["AP"] == pytest.approx(len(present & {ids[1], ids[3]}) / len(present))


def test_no_label_with_a_category_leaves_an_empty_file(dataset: DetectionDataset, tmp_path: Path) -> None:
    oracle: Any = Oracle(dataset)
    scores = evaluate(oracle, dataset, tmp_path, device=CPU, category_ids=[None] * 4, show=False)
    assert scores is not None
    assert orjson.loads((tmp_path / "detections.json").read_bytes()) == []
    assert scores.metrics["bbox"]["AP"] == 0.0


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_of_several_processes(dataset: DetectionDataset, tmp_path: Path, world: int) -> None:
    """More processes than images included: the merged file is that of one process but for the order."""
    whole = evaluate(Oracle(dataset), dataset, tmp_path / "one", device=CPU, show=False)  # type: ignore[arg-type]
    barrier = threading.Barrier(world)
    scores: dict[int, Any] = {}

    def process(rank: int) -> None:
        oracle: Any = Oracle(dataset)
        scores[rank] = evaluate(
            oracle, dataset, tmp_path / "many", device=CPU, rank=rank, world=world, barrier=barrier.wait, show=False
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert whole is not None
    assert scores[0].metrics == whole.metrics
    assert all(scores[rank] is None for rank in range(1, world))
    one, many = (orjson.loads((tmp_path / name / "detections.json").read_bytes()) for name in ("one", "many"))
    assert sorted(map(orjson.dumps, one)) == sorted(map(orjson.dumps, many))
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [
        "classes.csv",
        "detections.json",
        "metrics.json",
    ]


def test_agrees_with_scoring_the_file(dataset: DetectionDataset, tmp_path: Path) -> None:
    half: Any = Oracle(dataset, lambda found: found[found.labels % 2 == 0])
    scores = evaluate(half, dataset, tmp_path, device=CPU, show=False)
    assert scores is not None
    again = score(dataset.annotations.path, tmp_path / "detections.json", mask_areas=True)
    assert again.metrics == scores.metrics


def test_a_broken_image_is_named_and_leaves_no_results(dataset: DetectionDataset, tmp_path: Path) -> None:
    path = dataset.annotations.image_path(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    try:
        with pytest.raises(UserError, match=path.name):
            evaluate(Oracle(dataset), dataset, tmp_path, device=CPU, show=False)  # type: ignore[arg-type]
    finally:
        path.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unannotated(dataset: DetectionDataset, tmp_path: Path) -> DetectionDataset:
    """The same images as a test server hands them out: none with annotations."""
    content = orjson.loads(dataset.annotations.path.read_bytes()) | {"annotations": []}
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "val.json").write_bytes(orjson.dumps(content))
    (folder / "images").symlink_to(dataset.annotations.images_dir)
    val = open_data(str(folder), need=("val",)).val
    assert val is not None
    return DetectionDataset(val, fit_transform(96, 96), drop_empty=False, mask_grid=28)


def test_images_of_a_test_server(
    dataset: DetectionDataset, unannotated: DetectionDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    oracle: Any = Oracle(dataset)  # knows the annotations that the data lacks
    scores = evaluate(oracle, unannotated, out, device=CPU, show=False)
    assert scores is not None
    assert scores.metrics == {}
    assert [path.name for path in out.iterdir()] == ["detections.json"]
    assert "nothing to score" in caplog.text
    rows = json.loads((out / "detections.json").read_text(), parse_constant=pytest.fail)
    assert len(rows) == len(dataset.annotations.labels)
    images = set(dataset.annotations.image_ids.tolist())
    for row in rows:
        assert set(row) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        assert row["image_id"] in images
        assert row["category_id"] in dataset.annotations.label_to_category_id
        assert [type(row["image_id"]), type(row["category_id"]), type(row["score"])] == [int, int, float]
        assert rle.area(row["segmentation"]) > 0


def test_table_of_classes(dataset: DetectionDataset, tmp_path: Path) -> None:
    oracle: Any = Oracle(dataset, lambda found: found[found.labels != 0])
    ids = dataset.annotations.label_to_category_id.tolist()
    train_images = {category_id: 10 * category_id for category_id in ids}
    scores = evaluate(oracle, dataset, tmp_path, device=CPU, train_images=train_images, show=False)
    assert scores is not None
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == ids
    assert [int(row["train_images"]) for row in rows] == [10 * category_id for category_id in ids]
    values = [float(row["bbox_AP"]) for row in rows if row["bbox_AP"]]
    assert sum(values) / len(values) == pytest.approx(scores.metrics["bbox"]["AP"])
    assert values[0] == 0


def test_analysis_is_written(dataset: DetectionDataset, tmp_path: Path) -> None:
    oracle: Any = Oracle(dataset, wrong_class)
    evaluate(oracle, dataset, tmp_path, device=CPU, options=ScoreOptions(analyse=True), show=False)
    analysis = json.loads((tmp_path / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert set(analysis) == {"bbox", "segm"}
    assert set(json.loads((tmp_path / "thresholds.json").read_text())) == {"default", "classes"}


def test_no_file_of_an_earlier_evaluation_stays_beside_new_ones(
    dataset: DetectionDataset, unannotated: DetectionDataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    oracle: Any = Oracle(dataset, wrong_class)
    evaluate(oracle, dataset, out, device=CPU, options=ScoreOptions(analyse=True), show=False)
    others = ("analysis.html", "notes.json", "my.analysis.json")
    for name in others:
        (out / name).write_text("x")  # the first is of the same evaluation, the others are somebody's own
    evaluate(oracle, dataset, out, device=CPU, show=False)
    written = {"detections.json", "metrics.json", "classes.csv"}
    assert {path.name for path in out.iterdir()} == written | {*others[1:]}
    evaluate(oracle, dataset, out, device=CPU, options=ScoreOptions(analyse=True), show=False)
    evaluate(oracle, unannotated, out, device=CPU, show=False)
    assert {path.name for path in out.iterdir()} == {"detections.json", *others[1:]}


def ranked_backwards(found: RawDetections) -> RawDetections:
    """Masks with scores of their own, the lower the better the box."""
    return replace(found, mask_scores=(1 - found.scores) / 2)


@pytest.mark.parametrize("world", [1, 2])
def test_masks_with_scores_of_their_own(dataset: DetectionDataset, tmp_path: Path, world: int) -> None:
    """Both scores are written, merged and read; each decides in its own ranking."""
    barrier = threading.Barrier(world)
    scores: dict[int, Any] = {}

    def process(rank: int, change: Callable[[RawDetections], RawDetections], out: Path) -> None:
        # Every box twice, one of them in a wrong place: which of the two comes first decides the AP.
        def doubled(found: RawDetections) -> RawDetections:
            twice = replace(found, boxes=found.boxes.flip(1) % 64)
            rows = torch.arange(len(found)).repeat_interleave(2)
            wrong = torch.arange(len(rows)) % 2 == 1
            boxes = torch.where(wrong.unsqueeze(1), twice.boxes[rows].sort(dim=1).values, found.boxes[rows])
            scores = found.scores[rows] - 0.01 * wrong
            return change(replace(found[rows], boxes=boxes, scores=scores))

        oracle: Any = Oracle(dataset, doubled)
        scores[rank] = evaluate(
            oracle, dataset, out, device=CPU, rank=rank, world=world, barrier=barrier.wait, show=False
        )

    runs = {}
    for name, change in (("both", ranked_backwards), ("plain", lambda found: found)):
        threads = [threading.Thread(target=process, args=(r, change, tmp_path / name)) for r in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        runs[name] = scores[0]
    rows, plain = (orjson.loads((tmp_path / name / "detections.json").read_bytes()) for name in ("both", "plain"))
    assert len(rows) == len(plain) > 0
    for row, other in zip(rows, plain, strict=True):
        assert row["box_score"] == other["score"]
        assert row["score"] == pytest.approx((1 - row["box_score"]) / 2, rel=1e-6)
    assert runs["both"].metrics["bbox"] == runs["plain"].metrics["bbox"]
    assert runs["both"].metrics["segm"]["AP"] < runs["plain"].metrics["segm"]["AP"]
    again = score(dataset.annotations.path, tmp_path / "both" / "detections.json", mask_areas=True)
    assert again.metrics == runs["both"].metrics


@pytest.fixture
def rows_behind_the_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows are written as with detections on CUDA; streams are stood for."""
    stream_of.cache_clear()
    for name in ("Stream", "stream", "current_stream", "set_device"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(evaluation, "behind", lambda work, _: behind(work, torch.device("cuda")))
    yield
    stream_of.cache_clear()


class TestRowsBehindTheLoop:
    def test_the_next_batch_is_issued_first_and_the_file_is_the_same(
        self, dataset: DetectionDataset, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options: dict[str, Any] = {"device": CPU, "batch_size": 2, "show": False}
        evaluate(Oracle(dataset), dataset, tmp_path / "plain", **options)  # type: ignore[arg-type]
        request.getfixturevalue("rows_behind_the_loop")
        second, plain_add = threading.Event(), ResultsWriter.add

        class Announcing(Oracle):
            def detect(self, batch: Batch) -> list[RawDetections]:
                found = super().detect(batch)
                if len(self.sizes) == 2:
                    second.set()
                return found

        def add(writer: ResultsWriter, *arguments: Any) -> None:
            assert second.wait(10)
            plain_add(writer, *arguments)

        monkeypatch.setattr(ResultsWriter, "add", add)
        evaluate(Announcing(dataset), dataset, tmp_path / "behind", **options)  # type: ignore[arg-type]
        files = [tmp_path / name / "detections.json" for name in ("plain", "behind")]
        monkeypatch.undo()
        assert files[0].read_bytes() == files[1].read_bytes()
        assert len(orjson.loads(files[0].read_bytes())) > 5

    @pytest.mark.usefixtures("rows_behind_the_loop")
    def test_a_full_disk_is_told_as_ever_and_leaves_no_file(
        self, dataset: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise UserError("detections.json: the disk is full; make room and run it again")

        monkeypatch.setattr(ResultsWriter, "add", full)
        with pytest.raises(UserError, match=r"^detections\.json: the disk is full"):
            evaluate(Oracle(dataset), dataset, tmp_path, device=CPU, show=False)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("rows_behind_the_loop")
    def test_ctrl_c_ends_it_and_leaves_no_file(self, dataset: DetectionDataset, tmp_path: Path) -> None:
        class Stopped(Oracle):
            def detect(self, batch: Batch) -> list[RawDetections]:
                if len(self.sizes) == 3:
                    raise KeyboardInterrupt
                return super().detect(batch)

        with pytest.raises(KeyboardInterrupt):
            evaluate(Stopped(dataset), dataset, tmp_path, device=CPU, show=False)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("behind")]


def test_batches_are_padded_to_what_the_neck_asks_for(dataset: DetectionDataset, tmp_path: Path) -> None:
    oracle: Any = Oracle(dataset)
    oracle.divisor = 64
    scores = evaluate(oracle, dataset, tmp_path, device=CPU, batch_size=3, show=False)
    assert scores is not None
    assert scores.metrics["bbox"]["AP"] == 1.0
    assert oracle.padded == [(128, 128)] * 2


VIEWS = (View(48, mirrored=False), View(72, mirrored=True))


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A real one, of random weights."""
    torch.manual_seed(0)
    narrow = "model.backbone={name: resnet18, pretrained: false, frozen_stages: 1, options: {channels: [8, 8, 16, 16]}}"
    rpn = "model.rpn={pre_nms_test: 50, post_nms_test: 20}"
    recipe = resolve("demo/seesaw", [narrow, rpn, "model.neck.channels=16", "test.max_detections=9"])
    return build_detector(recipe, 4).eval()


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (7, 0)])
def test_views_of_each_image_as_the_file_has_it(
    dataset: DetectionDataset, detector: Detector, tmp_path: Path, world: int, workers: int
) -> None:
    """In however many processes, more than there are images included."""
    whole = DetectionDataset(dataset.annotations, Compose(()), drop_empty=False, mask_grid=28)
    barrier = threading.Barrier(world)
    scores: dict[int, Any] = {}

    def process(rank: int) -> None:
        scores[rank] = evaluate(
            detector,
            whole,
            tmp_path,
            device=CPU,
            batch_size=3,
            workers=workers,
            rank=rank,
            world=world,
            barrier=barrier.wait,
            views=VIEWS,
            show=False,
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(scores[0].metrics) == {"bbox", "segm"}
    annotations = dataset.annotations
    with ResultsWriter(tmp_path / "expected.json") as writer:
        for position, image_id in enumerate(annotations.image_ids.tolist()):
            found = detect_views(detector, read_image(annotations.image_path(position)), VIEWS)
            assert len(found) == 9
            writer.add(image_id, found, annotations.label_to_category_id.tolist())
    expected = orjson.loads((tmp_path / "expected.json").read_bytes())
    assert rows_of(tmp_path) == sorted(map(orjson.dumps, expected))


def test_views_of_images_that_were_resized(dataset: DetectionDataset, detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"as the files have them; received one of \(96, 96\) for a file of \(64, 64\)"
    ):
        evaluate(detector, dataset, tmp_path, device=CPU, views=VIEWS, show=False)
    assert not list(tmp_path.iterdir())
