"""From what stands behind ``--data`` to a data set: a folder, a YAML file, or the word ``synthetic``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tailseg.data.annotations import Annotations, Category, DataSplits, open_data
from tailseg.data.synthetic import SyntheticSettings, default_synthetic_folder, open_synthetic
from tailseg.errors import UserError
from tailseg.progress import progress_bar

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"


def open_source(
    data: str,
    *,
    need: tuple[str, ...] = ("train", "val"),
    rare_max: int = 10,
    common_max: int = 100,
    show: bool = True,
    look_for_images: bool = True,
) -> DataSplits:
    """Open a data set and check that every image that it lists is there.

    Args:
        data: a folder with train.json, val.json and images/, a YAML file, or ``synthetic``: the built-in set, drawn on
            first use.
        need: the splits that must be there.
        rare_max: most training images of a rare class, for data without frequency groups.
        common_max: most training images of a common class.
        show: draw a progress bar while the built-in set is drawn.
        look_for_images: check that the images are there.

    Raises:
        UserError: something is missing or broken.
    """
    if data == SYNTHETIC:
        splits = open_data(str(draw_synthetic(SyntheticSettings(), show=show)), need=need)
        splits = DataSplits(SYNTHETIC, splits.train, splits.val)
    else:
        splits = open_data(data, need=need, rare_max=rare_max, common_max=common_max)
    for split in need if look_for_images else ():
        annotations = getattr(splits, split)
        annotations.check_images()
    return splits


def summary(annotations: Annotations) -> str:
    """One line on what a file holds and what was left out of it."""
    report = annotations.report
    text = f"{annotations.path}: {len(annotations)} images, {report.empty_images} of them without objects"
    text += f"; {report.annotations} annotations"
    if report.crowd:
        text += f", {report.crowd} of them crowds"
    reasons = (
        (report.outside, "without overlap with the image"),
        (report.no_area, "without area"),
        (report.thin, "narrower or lower than a pixel"),
    )
    if report.dropped:
        text += f"; dropped {report.dropped}: " + ", ".join(f"{count} {reason}" for count, reason in reasons if count)
    return text + "."


def draw_synthetic(settings: SyntheticSettings, *, show: bool) -> str:
    """The folder of the built-in set with these settings, drawn if it is not in the cache."""
    total = settings.train_images + settings.val_images
    known = (default_synthetic_folder(settings) / "val.json").is_file()
    with progress_bar("drawing the built-in data", total, show=show and not known) as advance:
        return str(open_synthetic(settings, progress=lambda done, _total: advance(done)))


def known_categories(annotations: Annotations, categories: Sequence[Category], model: str) -> list[int | None]:
    """The data's category id for each label of a model, by name; None where the data has no such category.

    Names count as equal whatever their case and whether words are joined by spaces or underscores. A model may know
    more than the data has, or less: then a warning says so. If each has what the other lacks, something was renamed.

    Raises:
        UserError: model and data each have a category that the other has not; names one of each.
    """
    ids = {same_name(category.name): category.id for category in annotations.categories}
    exact = {category.name: category.id for category in annotations.categories}
    known = [exact.get(category.name, ids.get(same_name(category.name))) for category in categories]
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
    """A category's name without differences of spelling between data sets: case, spaces and underscores."""
    return " ".join(name.lower().replace("_", " ").split())
