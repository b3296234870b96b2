"""The jobs of the command line as functions: train, evaluate, score, open a data set.

Keywords that are no argument of a function are recipe keys, a double underscore for each dot:
``tailseg.train("small/seesaw", data="photos", schedule__epochs=3)`` is ``--set schedule.epochs=3``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailseg.data import sources
from tailseg.data.annotations.annotations import tell
from tailseg.data.annotations.frequency import LVIS_LIMITS, GroupRule, require_rule_in_use
from tailseg.data.sources import DataSplits, known_categories
from tailseg.errors import UserError
from tailseg.outcomes import Compared, Evaluated, Trained
from tailseg.recipes import get
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import dotted, plain
from tailseg.wording import short

# What needs PyTorch is imported where it is used: a fault in the data is told seconds earlier.
if TYPE_CHECKING:
    import torch

    from tailseg.evaluation.metrics import Scores
    from tailseg.evaluation.tta import View
    from tailseg.predict import Model

logger = logging.getLogger(__name__)


def open_data(
    data: str | Path | DataSplits,
    *,
    need: Sequence[str] = ("train", "val"),
    rule: GroupRule = LVIS_LIMITS,
    show: bool = True,
) -> DataSplits:
    """Open a data set: its annotations, checked, and the places of its images.

    Args:
        data: a folder or file as behind ``--data``, ``synthetic`` for the built-in set, or a set that is open.
        need: the splits that must be there.
        rule: makes the frequency groups of files that state none.
        show: report progress.

    Raises:
        UserError: something is missing or broken, or an open set lacks a split.
    """
    if isinstance(data, DataSplits):
        for split in need:
            if getattr(data, split) is None:
                raise UserError(f"{data.name}: was opened without its split {split}; open it with need={list(need)}")
        return data
    with reporting(show):
        return sources.open_data(str(data), need=tuple(need), rule=rule, show=show)


def train(
    recipe: str | Path | Recipe,
    data: str | Path | DataSplits,
    out: str | Path,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    devices: int = 1,
    device: str | int | torch.device = "auto",
    seed: int = 0,
    show: bool = True,
    **settings: Any,
) -> Trained:
    """Train a recipe, as ``tailseg train`` does; works in a notebook and in a thread too.

    Args:
        recipe: name of a built-in one, YAML file, model file (its recipe), or recipe.
        data: as for `open_data`.
        out: folder for models, metrics and detections.
        init: weights that training starts from: a model file or a run's folder, a checkpoint of another project, or
            ``coco`` (see `starting_model`).
        resume: go on from the exact step where the run in ``out`` stopped.
        devices: processes on this machine; more than one need a script, which each of them runs from its start.
        device: where they run: ``auto`` (a CUDA GPU if there is one), ``cpu``, ``cuda:1``, ``mps`` ...
        seed: of all random numbers, from 0 to 2^63 - 1.
        show: report progress, on stderr.
        settings: recipe keys, a double underscore for each dot, such as ``schedule__epochs=3``.

    Returns:
        Scores and files. Scores are None where the last evaluation failed, and in all processes but the first.

    Raises:
        UserError: something about data, folder, recipe or checkpoint is the caller's to fix.
        KeyboardInterrupt: after Ctrl-C, when everything has been saved.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if devices > 1 and (not script.is_file() or "ipykernel" in sys.modules):
        raise UserError(
            f"devices={devices}: several processes need a script that each of them can run, which a notebook or a "
            f"prompt is not; use devices=1, or the command `tailseg train ... --devices {devices}`"
        )
    seed = plain(seed)
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"seed: expected a whole number from 0 to 2^63 - 1, received {short(seed)}")
    resolved = get(recipe, **settings)
    out = Path(out)
    if device != "auto":  # or a fault would be told after the data are open
        from tailseg.devices import find_device

        find_device(device)
    with reporting(show):
        rule = GroupRule.of(resolved.data)
        splits = open_data(data, rule=rule, show=show)
        require_rule_in_use(rule, splits.train, splits.val)
        from tailseg.model.build import float32_by_default
        from tailseg.training.loop import train as run_training
        from tailseg.zoo.start import starting_model

        with float32_by_default():
            scores = run_training(
                *(resolved, splits, out),
                seed=seed,
                devices=devices,
                resume=resume,
                init=None if init is None else starting_model(init, resolved),
                device=device,
                show=show,
            )
    best, last = out / "best.safetensors", out / "last.safetensors"
    return Trained(
        out=out,
        last=last,
        best=best if best.is_file() else None,
        metrics=None if scores is None else scores.metrics,
        classes=None if scores is None else scores.per_category,
    )


def evaluate(
    model: str | Path | Model,
    data: str | Path | DataSplits,
    out: str | Path | None = None,
    *,
    split: str = "val",
    max_dets: int | None = None,
    fixed_ap: bool = False,
    boundary: bool = False,
    analyse: bool = False,
    device: str | int | torch.device = "auto",
    show: bool = True,
    **settings: Any,
) -> Evaluated:
    """Score a model on a split by the LVIS rules, as ``tailseg eval`` does.

    Args:
        model: model file, exported ONNX file, a run's folder (its best model, else its last), or a loaded model.
        data: as for `open_data`.
        out: folder for metrics.json, classes.csv and detections.json; by default ``eval-DATA-SPLIT`` beside the model.
        split: "train" or "val".
        max_dets: detections of an image that count, 300 by default; of a model file sets ``test.max_detections``.
        fixed_ap: count the best 10,000 detections of each class, with no limit per image.
        boundary: add boundary AP, which judges the outlines.
        analyse: add what lies behind the AP, score thresholds that fit the model, and a page of all that.
        device: where a model file is loaded to, as for `train`.
        show: report progress, on stderr.
        settings: recipe keys that a trained model allows, such as ``test__nms_iou=0.6`` or ``test__tta=True``.

    Raises:
        UserError: model, data or settings are the caller's to fix.
        ValueError: a split of another name, or a loaded model without a place for the results.
    """
    from tailseg.data.dataset import evaluation_dataset
    from tailseg.data.loading import worker_count
    from tailseg.evaluation.evaluate import evaluate as evaluate_detector
    from tailseg.evaluation.metrics import ScoreOptions
    from tailseg.evaluation.tta import views_of
    from tailseg.model.build import float32_by_default
    from tailseg.predict import Model, is_exported, load

    if split not in ("train", "val"):
        raise ValueError(f"split is 'train' or 'val', received {split!r}")
    max_dets = plain(max_dets)
    most = 300 if max_dets is None else max_dets
    options = ScoreOptions(max_dets=most, fixed_ap=fixed_ap, boundary=boundary, analyse=analyse)
    with reporting(show), float32_by_default():
        if isinstance(model, Model):
            given = [*settings, *(["device"] if device != "auto" else [])]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: a model that was loaded has its settings; give the file, or `load` them"
                )
            loaded = model
        else:
            limit = {} if max_dets is None or is_exported(model) else {"test.max_detections": max_dets}
            texts = [f"{key}={json.dumps(value)}" for key, value in (limit | dotted(settings)).items()]
            loaded = load(model, device, settings=texts)
        source = "the model" if loaded.path is None else str(loaded.path)
        recipe, views = loaded.recipe.data, views_of(loaded.recipe)
        splits = open_data(data, need=(split,), rule=GroupRule.of(recipe), show=show)
        annotations = splits.val if split == "val" else splits.train
        assert annotations is not None
        dataset = evaluation_dataset(annotations, recipe, resized=not views, within=loaded.size)
        known = known_categories(dataset.annotations, loaded.categories, source)
        tell(dataset.annotations)
        if out is None and loaded.path is None:
            raise ValueError("this model has no file to write beside: name a folder for the results with out=")
        folder = Path(out) if out is not None else (loaded.path or Path()).parent / f"eval-{splits.name}-{split}"
        learned = {}
        if any(category.image_count for category in loaded.categories):
            pairs = zip(known, loaded.categories, strict=True)
            learned = {category_id: category for category_id, category in pairs if category_id is not None}
        frequencies, groups = None, splits.groups
        if learned and not dataset.annotations.frequency_stated:
            frequencies = {category_id: category.frequency for category_id, category in learned.items()}
            groups = f"Groups: those that {source} was trained with."
        logger.info(groups)
        scores = evaluate_detector(
            *(loaded.detector, dataset, folder),
            device=loaded.device,
            batch_size=recipe.batch,
            workers=worker_count(recipe.workers, loaded.device),
            views=views,
            category_ids=known,
            frequencies=frequencies,
            train_images={category_id: category.image_count for category_id, category in learned.items()},
            options=options,
            show=show,
        )
        assert scores is not None
    written = [folder / "metrics.json"] if scores.metrics else []
    if scores.analysis is not None:
        from tailseg.visualize.analysis_page import write_page  # matplotlib takes its time

        facts = {"Model": source, "Data": f"{splits.name}, {split}"} | _model_facts(loaded, views, fixed_ap=fixed_ap)
        title, page = f"Analysis of {loaded.recipe.name} on {splits.name}", folder / "analysis.html"
        write_page(scores, page, title=title, facts=facts, annotations=dataset.annotations)
        written += [page, folder / "thresholds.json"]
    return Evaluated(
        metrics=scores.metrics,
        classes=scores.per_category,
        analysis=scores.analysis,
        files=(*written, folder / "detections.json"),
    )


def score(
    annotations: str | Path,
    detections: str | Path | list[dict[str, Any]],
    *,
    iou_types: Sequence[str] = ("bbox", "segm"),
    out: str | Path | None = None,
    max_dets: int = 300,
    fixed_ap: bool = False,
    boundary: bool = False,
    analyse: bool = False,
    show: bool = True,
) -> Scores:
    """Score any results file exactly as lvis-api does, as ``tailseg score`` does.

    Args:
        annotations: LVIS or COCO annotation file, .json or .json.gz.
        detections: results in LVIS format, .json or .json.gz, or their rows.
        iou_types: "bbox", "segm" or both.
        out: JSON file for the metrics; ``NAME.classes.csv`` and, if asked for, ``NAME.analysis.html``,
            ``NAME.analysis.json`` and ``NAME.thresholds.json`` lie beside it.
        max_dets: best detections of an image that count, from 1 on.
        fixed_ap: count the best 10,000 detections of each class, with no limit per image.
        boundary: add boundary AP, which judges the outlines.
        analyse: add what lies behind the AP.
        show: report what is left out, on stderr.

    Raises:
        UserError: a file is missing or damaged, or names ids that the annotation file does not have.
    """
    from tailseg.evaluation.metrics import ScoreOptions, checked_place, write_scores
    from tailseg.evaluation.metrics import score as score_file

    options = ScoreOptions(max_dets=plain(max_dets), fixed_ap=fixed_ap, boundary=boundary, analyse=analyse)
    results = detections if isinstance(detections, list) else Path(detections)
    out = None if out is None else checked_place(Path(out))
    with reporting(show):
        scores = score_file(Path(annotations), results, iou_types=iou_types, options=options)
    if out is not None:
        write_scores(scores, out, f"{out.stem}.")
        if scores.analysis is not None:
            from tailseg.visualize.analysis_page import write_page

            name = "rows" if isinstance(detections, list) else str(detections)
            limit = "the best 10,000 of a class" if fixed_ap else f"the best {max_dets} of an image"
            facts = {"Detections": name, "Annotations": str(annotations), "Counted": limit}
            title = f"Analysis of {Path(name).name} on {Path(annotations).name}"
            write_page(scores, out.with_suffix(".analysis.html"), title=title, facts=facts)
    return scores


def compare(
    runs: Sequence[str | Path],
    data: str | Path | DataSplits | None = None,
    out: str | Path = "comparison",
    *,
    annotations: str | Path | None = None,
    split: str = "val",
    show: bool = True,
) -> Compared:
    """Compare evaluations on the same images, as ``tailseg compare`` does.

    Args:
        runs: two or more, of which the others are compared with the first: folders that `evaluate` wrote, folders of
            training runs, results files.
        data: as for `open_data`; its images are not looked at.
        out: folder for comparison.json and comparison.html.
        annotations: instead of ``data``: LVIS or COCO annotation file, as for `score`.
        split: "train" or "val", of ``data``.
        show: report progress, on stderr.

    Raises:
        UserError: a run has no detections, or they are damaged or of other data.
        ValueError: a split of another name, or not one of ``data`` and ``annotations``.
    """
    from tailseg.evaluation.metrics import write_json
    from tailseg.evaluation.paired import compare as compare_runs
    from tailseg.visualize.comparison_page import write_page

    if split not in ("train", "val"):
        raise ValueError(f"split is 'train' or 'val', received {split!r}")
    if (data is None) == (annotations is None):
        raise ValueError("give either data or annotations")
    truth = Path(str(annotations)) if data is None else data if isinstance(data, DataSplits) else str(data)
    with reporting(show):
        content = compare_runs(runs, truth, split, show=show)
    (out := Path(out)).mkdir(parents=True, exist_ok=True)
    written = (out / "comparison.json", out / "comparison.html")
    write_json(written[0], content)
    write_page(content, written[1])
    return Compared(content=content, files=written)


@contextmanager
def reporting(show: bool) -> Iterator[None]:
    """Show this package's messages on stderr where nobody has set up logging, as in a notebook or a plain script."""
    package = logging.getLogger("tailseg")
    if not show or package.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), package.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _model_facts(model: Model, views: Sequence[View], *, fixed_ap: bool) -> dict[str, str]:
    """Recipe and settings, for a page."""
    test, data = model.recipe.test, model.recipe.data
    sizes = f"{len(views)} views of each image" if views else f"{data.test_short_edge} x {data.long_edge} pixels"
    kept = f"{test.max_detections} detections an image" + (", fixed AP" if fixed_ap else "")
    settings = f"{kept}, NMS at IoU {test.nms_iou:g}, {sizes}"
    return {"Recipe": model.recipe.name, "Settings": settings + (f", tau {test.tau_norm:g}" if test.tau_norm else "")}
