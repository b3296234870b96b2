"""Trackers of a run: what they leave on disk, also of a run that was killed and resumed, and what becomes of faults."""

import csv
import json
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import SMALL_RECIPE, assert_refused, options, tailseg

from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.training import tracker_kinds, trackers
from tailseg.training.loop import Run, train
from tailseg.training.tracker_kinds import PACKAGES, Opening
from tailseg.training.trackers import Trackers, require_packages

STEPS, VAL_IMAGES = 6, 4
SETTINGS = (
    *SMALL_RECIPE,
    "optimizer={name: adamw, lr: 0.001, clip: 10, rates: {backbone: 0.5}}",
    "schedule={epochs: 1, milestones: [], warmup_steps: 2}",
    "training={log_steps: 1, save_steps: 4, validation_loss: true}",
)
LOSSES = ("loss", "rpn_objectness", "rpn_box", "classes", "objectness", "box", "mask")
INSTALLED = [name for name, packages in PACKAGES.items() if all(map(find_spec, packages))]


def recipe(*settings: str) -> Recipe:
    return resolve("demo/seesaw", [*SETTINGS, *settings])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SyntheticSettings(classes=4, train_images=12, val_images=VAL_IMAGES, size=64, rarest=3)
    return write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSplits:
    return open_data(str(folder))


@pytest.fixture(scope="module")
def tracked(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all trackers, killed after step 5, one after its checkpoint, and resumed."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    followed = recipe(f"training.loggers=[{','.join(INSTALLED)}]")
    step = Run.train_step

    def step_or_die(self: Run, batches: Iterator[Any]) -> None:
        if self.step == 5:
            raise SystemExit("killed")
        step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", _offline())
        patch.setattr(Run, "train_step", step_or_die)
        with pytest.raises(SystemExit):
            train(followed, data, out, show=False)
        patch.setattr(Run, "train_step", step)
        train(followed, data, out, resume=True, show=False)
    return out


def _offline() -> dict[str, str]:
    """The environment without what tells W&B and MLflow where to send things."""
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_"))}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def expected(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of the figures that metrics.jsonl has too, by the names that trackers give them."""
    figures: dict[str, list[tuple[int, float]]] = {}
    for row in rows(out):
        if "metrics" in row:
            own = {f"{kind}/{name}": v for kind, found in row["metrics"].items() for name, v in found.items()}
            own |= {f"val/{name}": value for name, value in row["validation"].items()}
        else:
            own = {f"train/{name}": row[name] for name in LOSSES} | {"lr": row["lr"], "gradient": row["gradient"]}
            own |= {"lr_backbone": row["lr"] / 2}
        for name, value in own.items():
            if value is not None:
                figures.setdefault(name, []).append((row["step"], value))
    return figures


def assert_same(found: dict[str, list[tuple[int, float]]], out: Path, rel: float = 1e-12) -> None:
    wanted = expected(out)
    assert [step for step, _ in wanted["train/loss"]] == list(range(1, STEPS + 1))
    assert {"segm/AP", "bbox/AP", "segm/APr", "bbox/APc", "segm/APf", "val/loss", "val/mask"} <= wanted.keys()
    for name, values in wanted.items():
        assert found[name] == [(step, pytest.approx(value, rel=rel)) for step, value in values], name
    for name in ("images_per_second", "memory_gib", "waiting"):
        assert [step for step, _ in found[name]] == list(range(1, STEPS + 1))
    assert all(0.05 < value < 100 for _, value in found["memory_gib"])
    assert all(0 <= value < 1 for _, value in found["waiting"])


def test_metrics_jsonl_has_validation_losses_beside_the_metrics(tracked: Path) -> None:
    (row,) = [row for row in rows(tracked) if "metrics" in row]
    assert set(row) == {"step", "epoch", "metrics", "validation"}
    assert tuple(row["validation"]) == LOSSES
    assert row["validation"]["loss"] == pytest.approx(sum(row["validation"][name] for name in LOSSES[1:]))


def test_csv(tracked: Path) -> None:
    with (tracked / "csv" / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == STEPS + 1
    found: dict[str, list[tuple[int, float]]] = {}
    for line in table:
        for name, value in line.items():
            if value and name != "step":
                found.setdefault(name, []).append((int(line["step"]), float(value)))
    assert_same(found, tracked)


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="tensorboard is not installed")
def test_tensorboard(tracked: Path) -> None:
    import cv2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags["scalars"]}
    assert_same(found, tracked, rel=1e-6)
    assert len(tags["images"]) == VAL_IMAGES
    for name in tags["images"]:
        (event,) = events.Images(name)
        assert event.step == STEPS
        picture = cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape[1] > 2 * picture.shape[0] * 0.8  # two pictures beside each other
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert plugin.plugin_name == "hparams"
    assert b"optimizer.lr" in plugin.content
    assert b"data.short_edges" in plugin.content


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a W&B file: after 7 bytes, blocks of 32 KiB with pieces (checksum, length, kind, content)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # what is left of a block is padding
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the only piece, or the last one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.skipif("wandb" not in INSTALLED, reason="wandb is not installed")
def test_wandb_offline(tracked: Path) -> None:
    run_id = json.loads((tracked / "trackers.json").read_text())["wandb"]
    parts = sorted((tracked / "wandb").glob(f"offline-run-*-{run_id}"))
    assert parts
    told: dict[str, dict[int, Any]] = {}  # what comes twice, after the checkpoint, counts as it came last
    steps: list[int] = []
    config: dict[str, Any] = {}
    for record in (one for part in parts for file in part.glob("*.wandb") for one in wandb_records(file)):
        if record.HasField("run"):
            assert record.run.run_id == run_id
            assert record.run.project == "tailseg"
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if not record.HasField("history"):
            continue
        steps.append(record.history.step.num)
        for item in record.history.item:
            told.setdefault(".".join(item.nested_key), {})[steps[-1]] = json.loads(item.value_json)
    found = {name: list(values.items()) for name, values in told.items()}
    assert steps == [1, 2, 3, 4, 5, 5, 6]
    assert_same(found, tracked)
    kinds = [values for name, values in found.items() if name.endswith("._type")]
    assert kinds == [[(STEPS, "image-file")]] * VAL_IMAGES
    assert len(list((tracked / "wandb").rglob("*.png"))) == VAL_IMAGES
    assert config["optimizer.lr"] == 0.001
    assert config["seed"] == 0


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="mlflow is not installed")
def test_mlflow(tracked: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tracked / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tailseg")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tracked / "trackers.json").read_text())["mlflow"]
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["model.backbone.pretrained"] == "False"
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    found = {name: [(point.step, point.value) for point in history] for name, history in histories.items()}
    assert_same(found, tracked)
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "images") if item.path.endswith(".png")]
    assert len(pictures) == VAL_IMAGES
    assert len(list((tracked / "mlflow").rglob("*.png"))) == VAL_IMAGES


def test_a_run_is_the_same_with_and_without_trackers_and_validation_loss(
    tracked: Path, data: DataSplits, tmp_path: Path
) -> None:
    train(recipe("training.validation_loss=false"), data, tmp_path / "run", show=False)
    for name in ("last.safetensors", "best.safetensors", "trainer.safetensors"):
        one, other = load_file(tracked / name), load_file(tmp_path / "run" / name)
        assert one.keys() == other.keys()
        assert all(value.equal(other[key]) for key, value in one.items())
    logs = [
        [
            {key: value for key, value in row.items() if key not in ("images_per_second", "validation")}
            for row in rows(out)
        ]
        for out in (tracked, tmp_path / "run")
    ]
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------------------------------------------
# Faults


class Recording:
    """A tracker that keeps what it is told, or fails from a step on."""

    run_id: str | None = None
    wants_again = False
    takes_pictures = True
    fails_at = 10**9

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.told: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise OSError(28, "No space left on device", "events")
        self.told.append((step, metrics))

    def log_picture(self, name: str, picture: Any, step: int) -> None:
        self.told.append((step, name))

    def finish(self, status: str) -> None:
        self.told.append(status)


class Failing(Recording):
    fails_at = 3


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recording]:
    """W&B and MLflow are replaced: the one fails at step 3, the other records."""
    opened: dict[str, Recording] = {}

    def opens(name: str, kind: type[Recording]) -> Callable[[Opening], Recording]:
        return lambda opening: opened.setdefault(name, kind(opening))

    monkeypatch.setitem(tracker_kinds.KINDS, "wandb", opens("wandb", Failing))
    monkeypatch.setitem(tracker_kinds.KINDS, "mlflow", opens("mlflow", Recording))
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    return opened


def test_a_tracker_that_fails_is_given_up_with_one_warning(
    recorded: dict[str, Recording], data: DataSplits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(recipe("training.loggers=[wandb,mlflow]"), data, tmp_path / "run", show=False)
    (said,) = [message for message in caplog.messages if "training.loggers" in message]
    assert said == (
        "training.loggers: wandb failed (events: No space left on device) and gets nothing more of this run; training "
        "goes on, and metrics.jsonl has the figures."
    )
    assert [told[0] for told in recorded["wandb"].told] == [1, 2]
    whole = recorded["mlflow"].told
    assert [told[0] for told in whole[:-1]] == [1, 2, 3, 4, 5, 6, 6, *[6] * VAL_IMAGES]
    assert whole[-1] == "finished"
    assert recorded["mlflow"].opening.parameters["optimizer.rates.backbone"] == 0.5


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "stopped"), (ValueError("a fault"), "failed"), (None, "finished")]
)
def test_trackers_are_told_how_a_run_ends(
    recorded: dict[str, Recording], tmp_path: Path, error: BaseException | None, status: str
) -> None:
    opened = Trackers()
    opened.open(["mlflow"], tmp_path, 0, {}, ())
    try:
        with opened.closing():
            if error is not None:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert recorded["mlflow"].told == [status]


def test_a_tracker_that_cannot_go_back_is_not_told_again(recorded: dict[str, Recording], tmp_path: Path) -> None:
    opened = Trackers()
    opened.open(["mlflow"], tmp_path, 4, {}, {(5, False), (6, False)})
    for step in (5, 6, 7):
        opened.log_losses(step, {"loss": float(step)}, {})
    opened.log_evaluation(6, {"segm": {"AP": 0.25, "APr": None}}, None)
    assert recorded["mlflow"].told == [(7, {"train/loss": 7.0}), (6, {"segm/AP": 0.25})]


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_a_tracker_that_cannot_be_opened_ends_the_run_before_it_begins(name: str, folder: Path, tmp_path: Path) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("a file where its folder should be")
    arguments = ("train", "demo/seesaw", "--data", folder, "--out", tmp_path / "run", "--quiet", *options(SETTINGS))
    refused = tailseg(*arguments, "--set", f"training.loggers=[{name}]")
    assert_refused(refused, f"training.loggers: {name} cannot be opened in {tmp_path / 'run'}", f"leave {name} out")
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_package_that_is_missing_is_named_before_anything_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else True)
    arguments = ("train", "demo/seesaw", "--data", folder, "--out", tmp_path / "run", "--quiet", *options(SETTINGS))
    refused = tailseg(*arguments, "--set", "training.loggers=[csv,wandb]")
    assert_refused(refused, "wandb needs the package wandb, which is not installed", "pip install 'tailseg[track]'")
    assert not (tmp_path / "run").exists()
    require_packages(["csv", "tensorboard", "mlflow"])
    require_packages([])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[csv,tensorbord]", "input should be 'csv', 'tensorboard', 'wandb' or 'mlflow', received 'tensorbord'"),
        ("[csv,csv]", "names csv twice; name each logger once"),
        ("csv", "is a list; write training.loggers=[csv]"),
    ],
)
def test_loggers_that_there_are_not(value: str, said: str) -> None:
    with pytest.raises(UserError, match=r"training\.loggers") as refused:
        recipe(f"training.loggers={value}")
    assert said in str(refused.value)


def test_damaged_ids_are_told(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text('["wandb"')
    with pytest.raises(UserError, match=r"trackers.json: is damaged; remove it"):
        Trackers().open([], tmp_path, 4, {}, ())


def test_half_a_line_of_a_table_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("lr,step,train/loss\n0.1,1,5.0\n0.1,2,4.0\n0.1,3,3.0\n0.1")
    table = tracker_kinds.CsvTracker(Opening(out=tmp_path, step=2, run_id=None, parameters={}))
    table.log_metrics({"train/loss": 2.5, "segm/AP": 0.5}, 3)
    lines = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open(newline="")))
    assert [(line["step"], line["train/loss"], line["segm/AP"]) for line in lines] == [
        ("1", "5.0", ""),
        ("2", "4.0", ""),
        ("3", "2.5", "0.5"),
    ]
    again = tracker_kinds.CsvTracker(Opening(out=tmp_path, step=0, run_id=None, parameters={}))
    again.log_metrics({"train/loss": 9.0}, 1)
    assert (tmp_path / "csv" / "metrics.csv").read_text().split() == ["step,train/loss", "1,9.0"]


def test_the_log_names_what_it_drops(tmp_path: Path) -> None:
    from tailseg.training.run_log import RunLog

    log = RunLog(tmp_path / "metrics.jsonl", writes=True)
    for row in ({"step": 4, "loss": 1.0}, {"step": 5, "loss": 1.0}, {"step": 6, "metrics": {}}):
        log.write(row)
    assert log.cut(4) == {(5, False), (6, True)}
    assert log.cut(4) == set()
    assert RunLog(tmp_path / "metrics.jsonl", writes=False).cut(0) == set()


def test_processes_that_do_not_log_open_nothing(tmp_path: Path) -> None:
    silent = Trackers()
    silent.log_losses(1, {"loss": 1.0}, {})
    assert not silent.take_pictures
    assert list(tmp_path.iterdir()) == []
