"""From what stands behind ``--data`` to a data set: a folder or file, ours or another tool's, or ``synthetic``."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unicodedata import normalize

from tailseg.data.annotations.annotations import (
    Annotations,
    Category,
    load_annotations,
    require_same_categories,
    with_categories_of,
)
from tailseg.data.annotations.frequency import LVIS_LIMITS, GroupRule, with_groups
from tailseg.data.annotations.parsing import read_tables
from tailseg.data.importers.coco_files import as_downloaded
from tailseg.data.importers.convert import NAMES, recognise, unrecognised
from tailseg.data.importers.in_place import import_in_place
from tailseg.data.synthetic.generate import SyntheticSettings, is_drawn, open_synthetic
from tailseg.errors import UserError
from tailseg.progress import progress_bar
from tailseg.wording import short
from tailseg.yaml_files import read_yaml

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
TRAIN_SAMPLE = 5000  # images of a training split that are looked at before it is used


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set: its training and validation files. A split that was not needed may be None."""

    name: str
    train: Annotations | None
    val: Annotations | None
    groups: str = ""  # one line on where the frequency groups come from


@dataclass(frozen=True)
class _Sources:
    """The three entries of a data set's YAML file."""

    train: Path | None
    val: Path | None
    images: Path | None


def open_splits(
    data: str | Path,
    *,
    need: tuple[str, ...] = ("train", "val"),
    rule: GroupRule = LVIS_LIMITS,
    tolerant: bool = False,
    show: bool = False,
) -> DataSplits:
    """Open a data set.

    Args:
        data: a folder with ``train.json``, ``val.json`` and ``images/``, or a YAML file with the entries
            ``train``, ``val`` and ``images``, relative to the YAML file; or a set of another tool (see
            `importers.convert.recognise`), which is imported into the cache.
        need: the splits that must be there. The training file is also read, where there is one, when only it
            can tell the frequency groups.
        rule: makes the frequency groups where the files state none.
        tolerant: rows of a file with errors are left out and counted in its report.
        show: draw a progress bar while a set is imported.

    Raises:
        UserError: something is missing or broken, or train and val have different categories.
    """
    data = Path(data)
    sources = _sources(data, need, show)
    for split in (*need, "images"):
        path = getattr(sources, split)
        if path is None and split == "train" and data.is_dir():
            fix = f"divide it with `tailseg data split {sources.val} OUT`"
            raise UserError(f"{data}: its only annotation file, {sources.val}, is of the validation split; {fix}")
        if path is None:
            raise UserError(f"{data}: the entry {split!r} is missing; add it, with a path relative to this file")
        if not os.path.exists(path):  # which, unlike `Path.exists`, takes a name of any length
            what = "a folder of images" if split == "images" else "an annotation file in LVIS or COCO format"
            raise UserError(f"{data}: {path} does not exist; it should be {what}")
    images = sources.images
    assert images is not None
    if not images.is_dir():
        raise UserError(f"{data}: {images} is not a folder; give the folder that holds the images")

    def load(path: Path | None) -> Annotations:
        assert path is not None
        return load_annotations(path, images, tolerant=tolerant)

    val = load(sources.val) if "val" in need else None
    only_train_knows = val is not None and not val.frequency_stated and sources.train and os.path.exists(sources.train)
    train = load(sources.train) if "train" in need or only_train_knows else None
    if train is not None and val is not None:
        own = len(val.categories)
        val = with_categories_of(val, train)
        if own < len(val.categories):
            logger.info("%s lists %d of %d categories: it gets all of them.", val.path, own, len(val.categories))
        require_same_categories(train, val)
    train, val, groups = with_groups(train, val, rule)
    return DataSplits(data.resolve().stem if data.is_file() else data.resolve().name, train, val, groups)


def _sources(data: Path, need: Sequence[str], show: bool) -> _Sources:
    """The paths that a folder or a YAML file stands for; a set of another tool is imported first."""
    if not os.path.exists(data):
        raise UserError(f"{data}: no such folder or file; give a folder with train.json, val.json and images/")
    train, val, images = data / "train.json", data / "val.json", data / "images"
    own = _Sources(train, val, images)
    if images.is_dir() and all(getattr(own, split).is_file() for split in need):
        return own
    kind = recognise(data)
    if kind == "coco" and (found := as_downloaded(data)):
        logger.info(
            "%s: recognised as COCO or LVIS as downloaded: %s.", data, " and ".join(map(str, filter(None, found[:2])))
        )
        return _Sources(*found)
    if kind is not None:
        return _imported(kind, data, show)
    if data.is_dir() and (train.is_file() or val.is_file()):
        return own
    if data.name.lower().endswith((".json", ".json.gz")):
        for _ in read_tables(data):  # which says what is wrong with it
            pass
    if data.suffix.lower() not in (".yaml", ".yml") or data.is_dir():
        raise unrecognised(data)
    content = read_yaml(data, fix="write the entries train, val and images")
    known = [field.name for field in fields(_Sources)]
    if not isinstance(content, dict):
        raise UserError(f"{data}: expected the entries train, val and images, each with a path")
    for key, value in content.items():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{data}: unknown entry {key!r}; did you mean {nearest!r}?")
        if not isinstance(value, str) or not value:
            raise UserError(f"{data}: {key} is {short(value)}; it must be a path")
    return _Sources(**{key: data.parent / content[key] if key in content else None for key in known})


def _imported(kind: str, data: Path, show: bool) -> _Sources:
    """A set of another tool, imported into the cache; what was recognised and left out is said."""
    with progress_bar(f"importing {NAMES[kind]}", None, show=show) as advance:
        found = import_in_place(kind, data, progress=advance)
    logger.info("%s: recognised as %s: %s.", data, NAMES[kind], found.line)
    for note in found.notes:
        logger.warning(note if note.startswith(str(data)) else f"{data}: {note}")
    return _Sources(found.train, found.val, found.images)


def open_data(
    data: str,
    *,
    need: tuple[str, ...] = ("train", "val"),
    rule: GroupRule = LVIS_LIMITS,
    show: bool = True,
    examine: bool = False,
) -> DataSplits:
    """Open a data set and check that every image that it lists is there, and that training can read it.

    Of a training split, 5,000 images are read in part, always the same ones: all would take as long as opening LVIS.

    Args:
        data: as for `open_splits`, or ``synthetic``: the built-in set, drawn on first use.
        need: the splits that must be there.
        rule: makes the frequency groups where the files state none.
        show: draw a progress bar while the built-in set is drawn or a set is imported.
        examine: images need not be there, and rows of a file with errors are left out and counted in its report.

    Raises:
        UserError: something is missing or broken.
    """
    if data == SYNTHETIC:
        splits = open_splits(str(draw_synthetic(SyntheticSettings(), show=show)), need=need)
        splits = replace(splits, name=SYNTHETIC)
    else:
        splits = open_splits(data, need=need, rule=rule, tolerant=examine, show=show)
    if not examine:
        _check_images(splits, need, show)
    return splits


def splits_there(data: str) -> tuple[str, ...]:
    """The splits, of train and val, that `open_data` finds behind ``data``; at least one. Nothing is imported.

    Raises:
        UserError: ``data`` is no data set, or has neither.
    """
    path = Path(data)
    own = tuple(split for split in ("train", "val") if (path / f"{split}.json").is_file())
    if own and (path / "images").is_dir():
        return own
    kind = None if data == SYNTHETIC or not path.exists() else recognise(path)
    if kind == "coco" and (found := as_downloaded(path)):
        return ("train", "val") if found[0] else ("val",)
    if data == SYNTHETIC or kind is not None:
        return ("train", "val")  # a set of another tool that has no validation is divided
    sources = _sources(path, (), show=False)
    there = tuple(split for split in ("train", "val") if (found := getattr(sources, split)) and found.exists())
    if not there and path.is_dir():
        raise unrecognised(path)
    if not there:
        raise UserError(f"{data}: neither its training nor its validation file exists; correct the paths")
    return there


def _check_images(splits: DataSplits, need: Sequence[str], show: bool) -> None:
    parts = {split: getattr(splits, split) for split in need}
    for part in parts.values():
        part.check_images()
    from tailseg.data.diagnosis.image_checks import require_sound_files  # imports PyTorch, which takes seconds

    for split, part in parts.items():
        at_most = TRAIN_SAMPLE if split == "train" else None
        with progress_bar(f"looking at {split} images", min(len(part), at_most or len(part)), show=show) as advance:
            require_sound_files(part, at_most=at_most, advance=advance)


def draw_synthetic(settings: SyntheticSettings, *, show: bool) -> str:
    """The folder of the built-in set with these settings, drawn if it is not in the cache."""
    total = settings.train_images + settings.val_images
    with progress_bar("drawing the built-in data", total, show=show and not is_drawn(settings)) as advance:
        return str(open_synthetic(settings, progress=lambda done, _total: advance(done)))


def known_categories(annotations: Annotations, categories: Sequence[Category], model: str) -> list[int | None]:
    """The data's category id for each label of a model, by name; None where the data has no such category.

    Names count as equal whatever their case and whether words are joined by spaces or underscores. A model may know
    more than the data has, or less: then a warning says so. If each has what the other lacks, something was renamed.

    Raises:
        UserError: model and data each have a category that the other has not; names one of each.
    """
    exact = {category.name: category.id for category in annotations.categories}
    known = [exact.get(category.name) for category in categories]
    spelt: dict[str, list[int]] = {}
    for category in annotations.categories:
        if category.id not in known:
            spelt.setdefault(same_name(category.name), []).append(category.id)
    for label, category in enumerate(categories):
        if known[label] is None:  # two classes never become one: a name that could be two others is none of them
            ids = spelt.get(same_name(category.name), [])
            known[label] = ids.pop() if len(ids) == 1 else None
    found = {category_id for category_id in known if category_id is not None}
    beyond = [category.name for category, category_id in zip(categories, known, strict=True) if category_id is None]
    unknown = [category.name for category in annotations.categories if category.id not in found]
    if beyond and unknown:
        raise UserError(
            f"{annotations.path}: has a category '{unknown[0]}', which {model} does not know, and lacks its "
            f"'{beyond[0]}'; give the data the names of the model's categories, or train on this data"
        )
    if unknown:
        logger.warning(
            "%s knows %d of the %d categories of %s; the others, such as '%s', score 0.",
            model, len(found), len(exact), annotations.path, unknown[0],
        )  # fmt: skip
    return known


def same_name(name: str) -> str:
    """A category's name without differences of spelling between data sets: Unicode form, case, spaces, underscores."""
    return " ".join(normalize("NFC", name).lower().replace("_", " ").split())
