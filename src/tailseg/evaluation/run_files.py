"""The files of evaluations that are compared: where they lie, and whether they are of the data at hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailseg.errors import UserError

DETECTIONS, METRICS, CLASSES = "detections.json", "metrics.json", "classes.csv"
TRAINED = "recipe.yaml"  # only the folder of a training run has it; its own detections are of the validation split
SAME = 1e-6  # of two APs in [0, 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """One evaluation."""

    name: str  # as the user wrote it
    detections: Path
    folder: Path | None  # has metrics.json and classes.csv, maybe; None for a results file alone

    def groups(self, categories: Sequence[Mapping[str, Any]]) -> dict[int, str] | None:
        """The frequency group of every category id as the evaluation had them; None if no file states them.

        Args:
            categories: rows with "id" and "name": those of the data.

        Raises:
            UserError: classes.csv is damaged, or has other classes than the data.
        """
        path = None if self.folder is None else self.folder / CLASSES
        if path is None or not path.is_file():
            return None
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = {int(row["id"]): (row["name"], row["frequency"]) for row in csv.DictReader(file)}
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(
                f"{path}: is not a table of classes as `tailseg eval` writes it ({type(error).__name__}); "
                "evaluate again"
            ) from error
        names = {row["id"]: row["name"] for row in categories}
        for category_id in sorted(rows.keys() | names.keys()):
            theirs, ours = rows.get(category_id, (None, ""))[0], names.get(category_id)
            if theirs != ours:
                found = [f"{name!r}" if name is not None else "missing" for name in (theirs, ours)]
                raise UserError(
                    f"{path}: category {category_id} is {found[0]} there but {found[1]} in the data; "
                    "compare evaluations on one data set, and give that"
                )
        groups = {category_id: frequency for category_id, (_, frequency) in rows.items() if frequency in {*"rcf"}}
        return groups if groups and len(groups) == len(rows) else None

    def require_same_score(self, kind: str, ap: float | None, data: str) -> None:
        """Raise UserError if the evaluation had another AP than its detections have on this data.

        An evaluation with other limits (``--max-dets``, ``--fixed-ap``) is not judged.
        """
        path = None if self.folder is None else self.folder / METRICS
        if path is None or not path.is_file():
            return
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))[kind]
            stated, usual = metrics["AP"], "AR300" in metrics
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: has no {kind} AP as `tailseg eval` writes it ({type(error).__name__}); evaluate again"
            ) from error
        same = stated == ap if stated is None or ap is None else abs(stated - ap) <= SAME
        if usual and not same:
            was, now = ("none" if value is None else f"{100 * value:.2f}" for value in (stated, ap))
            raise UserError(
                f"{path}: its {kind} AP is {was}, but its detections have {now} on {data}; give the data and the "
                f"split that it was evaluated on, or {self.detections} itself to compare nevertheless"
            )


def find_runs(runs: Sequence[str | Path], data: str, split: str) -> list[RunFiles]:
    """The files of each run.

    Args:
        runs: folders that `tailseg eval` or `tailseg train` wrote, or results files.
        data: name of the data set; of a training run's folder its subfolder ``eval-DATA-SPLIT`` is taken first.
        split: "train" or "val".

    Raises:
        UserError: there are fewer than two, one is there twice, or one has no detections.
    """
    if len(runs) < 2:
        raise UserError(f"{runs[0] if runs else 'no run'}: a comparison needs two runs or more; name another")
    found = [_find(Path(run), str(run), data, split) for run in runs]
    seen: dict[Path, str] = {}
    for files in found:
        place = files.detections.resolve()
        if place in seen:
            raise UserError(f"{files.name}: has the same detections as {seen[place]}; name each run once")
        seen[place] = files.name
    return found


def _find(path: Path, name: str, data: str, split: str) -> RunFiles:
    if path.is_file():
        if path.suffix == ".safetensors":
            raise UserError(
                f"{name}: is a model; name the folder of its evaluation, or make one with `tailseg eval {name} --data "
                "DATA`"
            )
        return RunFiles(name=name, detections=path, folder=None)
    if not path.is_dir():
        raise UserError(f"{name}: no such folder or file; name an evaluation's folder or a results file")
    folders = [path / f"eval-{data}-{split}"]
    if split == "val" or not (path / TRAINED).is_file():
        folders.append(path)
    for folder in folders:
        if (folder / DETECTIONS).is_file():
            return RunFiles(name=name, detections=folder / DETECTIONS, folder=folder)
    others = sorted(str(found.parent) for found in path.glob(f"eval-*/{DETECTIONS}"))
    fix = f"evaluate first, with `tailseg eval {name} --data DATA`"
    if others:
        fix = f"did you mean {' or '.join(others)}?"
    raise UserError(f"{name}: has no {DETECTIONS} of {data}, {split}; {fix}")
