"""Four trackers behind one interface: CSV and TensorBoard by Lightning Fabric's loggers, W&B and MLflow by their own.

All that they write lies in the folder of the run, and nothing goes to a network unless the user's environment says so
(`WANDB_MODE`, `MLFLOW_TRACKING_URI`). Their packages are imported when one is opened.
"""

from __future__ import annotations

import csv
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

from tailseg.visualize.draw import Picture

PROJECT = "tailseg"  # name of the W&B project and of the MLflow experiment, unless the environment has one
MLFLOW_BATCH = 100  # most parameters of one MLflow request


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """The run that a tracker is opened for."""

    out: Path  # its folder
    step: int  # from which it goes on; 0 for a new one
    run_id: str | None  # by which the tracker knows it, if it goes on
    parameters: Mapping[str, Any]  # of a new one: flat, to be shown beside its figures


class Tracker(Protocol):
    """What every tracker can do. Opening one, and each call, may raise whatever its package raises."""

    run_id: str | None  # to be opened with when the run goes on; None: it finds its run by the folder
    wants_again: bool  # the steps between a checkpoint and a kill, when the run goes on from the checkpoint
    takes_pictures: bool

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write figures of a step."""

    def log_picture(self, name: str, picture: Picture, step: int) -> None:
        """Write a picture of a step."""

    def finish(self, status: str) -> None:
        """Close it; the run has ``finished``, was ``stopped``, or ``failed``."""


class CsvTracker:
    """``DIR/csv/metrics.csv``, a column for each figure."""

    run_id: str | None = None
    wants_again = True
    takes_pictures = False

    def __init__(self, opening: Opening) -> None:
        path = opening.out / "csv" / "metrics.csv"
        earlier = _rows_up_to(path, opening.step) if opening.step and path.is_file() else []
        path.unlink(missing_ok=True)  # Fabric's logger begins with an empty file
        self.logger = CSVLogger(opening.out, name="", version="csv")
        for row in earlier:
            self.logger.log_metrics({key: value for key, value in row.items() if value and key != "step"}, row["step"])
        self.logger.save()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line."""
        self.logger.log_metrics(dict(metrics), step)
        self.logger.save()

    def log_picture(self, name: str, picture: Picture, step: int) -> None:
        """A table holds none."""

    def finish(self, status: str) -> None:
        """Nothing is left to write."""


def _rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole lines of a table, up to a step, in which a kill may have left half a line."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and (row.get("step") or "").isdigit()]
    return [{**row, "step": int(row["step"])} for row in rows if int(row["step"]) <= step]


class TensorBoardTracker:
    """Event files in ``DIR/tensorboard``, with the parameters on the HPARAMS page."""

    run_id: str | None = None
    wants_again = True
    takes_pictures = True

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard.summary import hparams

        # Readers drop what earlier files hold of the steps from this one on.
        first = opening.step + 1 if opening.step else 0
        self.logger = TensorBoardLogger(opening.out, name="", version="tensorboard", purge_step=first)
        writer = self.logger.experiment
        if not opening.step:
            values = {key: _plain(value) for key, value in opening.parameters.items()}
            # Fabric's own log_hyperparams would invent a figure to show beside them.
            for summary in hparams(values, {"segm/AP": 0}):
                writer.file_writer.add_summary(summary)
        writer.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add scalars."""
        self.logger.log_metrics(metrics, step)
        self.logger.save()

    def log_picture(self, name: str, picture: Picture, step: int) -> None:
        """Add an image."""
        self.logger.experiment.add_image(name, picture, step, dataformats="HWC")
        self.logger.save()

    def finish(self, status: str) -> None:
        """Close the file."""
        self.logger.finalize(status)


class WandbTracker:
    """Weights & Biases: a folder ``DIR/wandb/offline-run-...`` for `wandb sync`, or online with WANDB_MODE=online."""

    wants_again = True  # what it had not written when a run was killed is lost; online, it drops what it has
    takes_pictures = True

    def __init__(self, opening: Opening) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its faults go to its makers
        import wandb

        self.wandb = wandb
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run_id: str | None = opening.run_id or uuid.uuid4().hex[:8]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", opening.out.resolve().name),
            dir=str(opening.out),
            id=self.run_id,
            resume="allow",
            mode=mode,
            config=dict(opening.parameters),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add to the step's line, which is complete when a later step's begins."""
        self.run.log(dict(metrics), step=step)

    def log_picture(self, name: str, picture: Picture, step: int) -> None:
        """Add an image to the step's line."""
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def finish(self, status: str) -> None:
        """Write what is left; W&B knows only success and failure."""
        self.run.finish(exit_code=int(status == "failed"))


class MlflowTracker:
    """MLflow: ``DIR/mlflow.db`` with pictures in ``DIR/mlflow``, or the store that MLFLOW_TRACKING_URI names."""

    wants_again = False
    takes_pictures = True

    def __init__(self, opening: Opening) -> None:
        for key, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that does not answer must not hold the training up
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
        }.items():
            os.environ.setdefault(key, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell of each table that they make
        uri, store = os.environ.get("MLFLOW_TRACKING_URI"), opening.out.resolve() / "mlflow.db"
        if not uri:
            store.open("ab").close()  # where that fails, MLflow would try for minutes
        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{store}")
        self.run_id: str | None = opening.run_id
        if self.run_id is not None:
            self.client.update_run(self.run_id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        artifacts = None if uri else (opening.out.resolve() / "mlflow").as_uri()
        experiment_id = found.experiment_id if found else self.client.create_experiment(experiment, artifacts)
        self.run_id = self.client.create_run(experiment_id, run_name=opening.out.resolve().name).info.run_id
        parameters = [Param(key, str(_plain(value))) for key, value in opening.parameters.items()]
        for start in range(0, len(parameters), MLFLOW_BATCH):
            self.client.log_batch(self.run_id, params=parameters[start : start + MLFLOW_BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add figures."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])

    def log_picture(self, name: str, picture: Picture, step: int) -> None:
        """Add an image, which MLflow's page shows by name and step."""
        self.client.log_image(self.run_id, np.ascontiguousarray(picture), key=name, step=step)

    def finish(self, status: str) -> None:
        """Say how the run ended."""
        self.client.set_terminated(self.run_id, {"finished": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


def _plain(value: Any) -> bool | float | str:
    """A parameter as a tracker takes it."""
    return value if isinstance(value, bool | int | float | str) else str(value)


KINDS: dict[str, Callable[[Opening], Tracker]] = {
    "csv": CsvTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
PACKAGES: dict[str, tuple[str, ...]] = {
    "csv": (),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
