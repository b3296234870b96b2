"""The trackers of a run (`training.loggers`): opened before its first step, then told what its log is told.

A tracker that cannot be opened ends the run before it begins; one that fails later is given up with a warning, since
metrics.jsonl has the figures and training goes on without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tailseg.errors import UserError
from tailseg.files import writing
from tailseg.training.run_log import Logged
from tailseg.training.tracker_kinds import KINDS, PACKAGES, Opening, Tracker
from tailseg.visualize.draw import Picture

logger = logging.getLogger(__name__)

LONGEST = 200  # characters of an error of another package
RUN_IDS = "trackers.json"  # by which W&B and MLflow know the run, so that --resume goes on with it


def require_packages(loggers: Sequence[str]) -> None:
    """Raise UserError unless the packages of these trackers are installed."""
    for name in loggers:
        missing = [package for package in PACKAGES[name] if find_spec(package) is None]
        if missing:
            raise UserError(
                f"training.loggers: {name} needs the package {missing[0]}, which is not installed; "
                f"pip install 'tailseg[track]', or leave {name} out"
            )


class Trackers:
    """All trackers of a run; none in processes that do not log."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}
        self._known: Collection[Logged] = ()

    def open(
        self, loggers: Sequence[str], out: Path, step: int, parameters: Mapping[str, Any], cut: Collection[Logged]
    ) -> None:
        """Open them.

        Args:
            loggers: names.
            out: folder of the run.
            step: from which it goes on; 0 for a new one.
            parameters: flat, to be shown beside its figures.
            cut: lines that metrics.jsonl held after that step. A tracker that has them for good is not told again.

        Raises:
            UserError: one cannot be opened.
        """
        self._known = cut
        ids = _read_ids(out) if step else {}
        for name in loggers:
            opening = Opening(out=out, step=step, run_id=ids.get(name), parameters=parameters)
            try:
                self._open[name] = KINDS[name](opening)
            except Exception as error:
                begin = f", remove {out / RUN_IDS} to begin a new run of it," if opening.run_id else ""
                raise UserError(
                    f"training.loggers: {name} cannot be opened in {out} ({_said(error)}); correct that{begin} or "
                    f"leave {name} out"
                ) from error
        new_ids = {name: tracker.run_id for name, tracker in self._open.items() if tracker.run_id is not None}
        if new_ids:
            with writing(path := out / RUN_IDS):
                path.write_text(json.dumps({**ids, **new_ids}) + "\n", encoding="utf-8")

    @property
    def take_pictures(self) -> bool:
        """Whether there is one that does."""
        return any(tracker.takes_pictures for tracker in self._open.values())

    def log_losses(self, step: int, losses: Mapping[str, float], others: Mapping[str, float]) -> None:
        """Tell the mean losses of the steps up to this one as ``train/...``, and other figures by their names."""
        self._log((step, False), {f"train/{name}": value for name, value in losses.items()} | dict(others))

    def log_evaluation(
        self, step: int, metrics: Mapping[str, Mapping[str, float | None]], losses: Mapping[str, float] | None
    ) -> None:
        """Tell what an evaluation gave: ``segm/AP`` and so on, as shares of 1, and validation losses as ``val/...``."""
        scores = {f"{kind}/{name}": value for kind, own in metrics.items() for name, value in own.items()}
        figures = {name: value for name, value in scores.items() if value is not None}
        self._log((step, True), figures | {f"val/{name}": value for name, value in (losses or {}).items()})

    def log_pictures(self, step: int, pictures: Iterator[tuple[str, Picture]]) -> None:
        """Show named pictures."""
        for name, picture in pictures:
            self._each(partial(_show, name=name, picture=picture, step=step))

    def _log(self, line: Logged, figures: Mapping[str, float]) -> None:
        def tell(tracker: Tracker) -> None:
            if tracker.wants_again or line not in self._known:
                tracker.log_metrics(figures, line[0])

        self._each(tell)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._open[name]
                logger.warning(
                    "training.loggers: %s failed (%s) and gets nothing more of this run; training goes on, and "
                    "metrics.jsonl has the figures.", name, _said(error),
                )  # fmt: skip

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close them in the end, and tell them how the run ended."""
        status = "failed"
        try:
            yield
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            self._each(lambda tracker: tracker.finish(status))


def _show(tracker: Tracker, name: str, picture: Picture, step: int) -> None:
    if tracker.takes_pictures:
        tracker.log_picture(name, picture, step)


def _said(error: Exception) -> str:
    """The beginning of the first line of a message, or the kind of error that has none."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") if len(lines[0]) <= LONGEST else lines[0][:LONGEST] + "..."


def _read_ids(out: Path) -> dict[str, str]:
    path = out / RUN_IDS
    if not path.is_file():
        return {}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        return {name: ids[name] for name in KINDS if isinstance(ids.get(name), str)}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: is damaged; remove it, and W&B and MLflow begin a new run") from error
