"""Findings: what is odd about a data set, how much it matters, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.oddities import CROWDS_FIX
from tailseg.data.dataset import MIN_TRAIN_SIDE, trained_images, why_untrained
from tailseg.data.diagnosis.class_names import near_names
from tailseg.data.diagnosis.image_checks import DECODED, FileFacts, same_content
from tailseg.data.diagnosis.mask_checks import MaskFacts
from tailseg.data.diagnosis.near_duplicates import nearest_alike

Severity = Literal["error", "warning", "note"]
TINY = (8, 16, 32)  # pixels
CROWD_SHARE = 0.1  # of all annotations, from which on crowds are a warning; COCO has 1 %
TINY_SHARE = 0.2  # of objects under the smallest of these sides, from which on it is a warning
FEW_LEVELS = 32  # an eighth of the range of 256


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the user should know, and what to do about it."""

    severity: Severity  # error: training would stop; warning: results suffer; note: good to know
    split: str  # "train", "val", or "" for both
    what: str
    fix: str
    count: int
    examples: tuple[str, ...]  # all of them


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The parts of one split that are checked."""

    name: str
    annotations: Annotations
    files: list[FileFacts]
    masks: MaskFacts

    def image(self, number: int) -> str:
        """Name of an image in a finding."""
        path = self.files[number].path
        return f"image {self.annotations.image_id(number)}" + (f" ({path.name})" if path else "")

    def images(self, flags: NDArray[np.bool_]) -> list[str]:
        """The images where ``flags`` (I,) is True."""
        return [self.image(i) for i in np.flatnonzero(flags).tolist()]

    def rows(self, flags: NDArray[np.bool_]) -> list[str]:
        """The annotations where ``flags`` (N,) is True."""
        return [f"annotation {number}" for number in self.annotations.annotation_ids[flags].tolist()]


def all_findings(
    looked: Sequence[Split], scale: Mapping[str, float], tiny_classes: Sequence[str]
) -> tuple[Finding, ...]:
    """Everything odd about the training and the validation split, errors first.

    Args:
        looked: training, validation.
        scale: shares of the training objects under some sides, ``under_8`` for instance.
        tiny_classes: names of the classes most of whose objects are under the smallest of these sides.
    """
    train, val = (split.annotations for split in looked)
    findings = [*_class_findings(train, val), *_shared(looked), *_scale_findings(scale, tiny_classes)]
    for split in looked:
        findings += [*_file_findings(split), *_pixel_findings(split)]
        findings += [*_mask_findings(split), *_report_findings(split)]
    return by_severity(findings)


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings that count something: errors first, and the most frequent of each severity."""
    order: list[Severity] = ["error", "warning", "note"]
    return tuple(sorted((f for f in findings if f.count), key=lambda f: (order.index(f.severity), -f.count)))


def _finding(severity: Severity, split: str, what: str, fix: str, examples: Iterable[str]) -> Finding:
    named = tuple(examples)
    return Finding(severity, split, what, fix, len(named), named)


def _class_findings(train: Annotations, val: Annotations) -> list[Finding]:
    no_train = [t.name for t in train.categories if not t.image_count]
    pairs = zip(train.categories, val.categories, strict=True)
    no_val = [t.name for t, v in pairs if t.image_count and not v.image_count]
    near = near_names([category.name for category in train.categories])
    alike = [f"{_shown(a)} / {_shown(b)}" for a, b, kind in near if kind == "spelling"]
    similar = [f"{a} / {b}" for a, b, kind in near if kind != "spelling"]
    nothing = [] if trained_images(train).size else [str(train.path)]
    reason, remedy = why_untrained(train)
    return [
        _finding("error", "train", f"file without an annotation to train on ({reason})", remedy, nothing),
        _finding(
            "warning",
            "val",
            "no annotation to score on: training does not evaluate and keeps no best model",
            "annotate some images, or divide the training data with `tailseg data split`",
            [] if len(val.labels) else [str(val.path)],
        ),
        _finding(
            "warning", "", "classes without training images: never found", "add images or remove the class", no_train
        ),
        _finding(
            "warning",
            "val",
            "classes with training but no validation images: their AP is not measured",
            "divide the data again with `tailseg data split`, or add images",
            no_val,
        ),
        _finding("warning", "", "categories that differ in spelling only", "make them one category", alike),
        _finding("note", "", "category names one letter or a plural apart", "check that both are meant", similar),
    ]


def _shown(name: str) -> str:
    """A name, in quotes where spaces at its ends would not be seen."""
    return name if name == name.strip() else repr(name)


def _shared(looked: Sequence[Split]) -> list[Finding]:
    """Images that are there twice: in both splits, exactly or nearly, or within one."""
    files = {split.name: split.files for split in looked}
    named = {split.name: split for split in looked}
    across: list[str] = []
    within: dict[str, list[str]] = {name: [] for name in files}
    again: dict[str, list[str]] = {name: [] for name in files}  # of one file
    equal: set[tuple[str, int]] = set()  # images with a file of equal content in the other split
    for places in same_content(files).values():
        splits = {split for split, _ in places}
        shown = [next(place for place in places if place[0] == split) for split in sorted(splits)]
        shown += [place for place in places if place not in shown][: max(2 - len(shown), 0)]
        text = " = ".join(f"{split} {named[split].image(image)}" for split, image in shown)
        text += f" and {len(places) - 2} more" if len(places) > 2 else ""
        if len(splits) > 1:
            across.append(text)
            equal |= set(places)
        else:
            name = splits.pop()
            paths = {os.path.realpath(path) for _, image in places if (path := files[name][image].path)}
            (within if len(paths) == len(places) else again)[name].append(text)
    fix = "remove them from one split: scores on images that were trained on mean nothing"
    return [
        _finding("warning", "", "images that are in both splits", fix, across),
        _near_duplicates(looked, equal),
        *(
            _finding("note", name, "images with equal content", "keep one of each", texts)
            for name, texts in within.items()
        ),
        *(
            _finding(
                "warning",
                name,
                "files listed as several images: the objects of one are background in the other",
                "`tailseg data convert coco` writes a copy in which they are joined",
                texts,
            )
            for name, texts in again.items()
        ),
    ]


def _near_duplicates(looked: Sequence[Split], equal: set[tuple[str, int]]) -> Finding:
    """Validation images that look like a training image; those in ``equal`` are told elsewhere."""
    decoded = [
        [(i, facts.pixels.thumbnail) for i, facts in enumerate(split.files) if facts.pixels is not None]
        for split in looked
    ]
    decoded[1] = [(i, thumbnail) for i, thumbnail in decoded[1] if (looked[1].name, i) not in equal]
    texts = []
    if all(decoded):
        train, val = (np.stack([thumbnail for _, thumbnail in images]) for images in decoded)
        for own, other in zip(*nearest_alike(val, train), strict=True):
            pair = looked[1].image(decoded[1][own][0]), looked[0].image(decoded[0][other][0])
            texts.append(f"{looked[1].name} {pair[0]} ~ {looked[0].name} {pair[1]}")
    what = "validation images that look nearly like a training image"
    if any(len(split.files) > DECODED for split in looked):
        what += f" (only {DECODED:,} images of each split, chosen at random, were compared)"
    fix = "look at some pairs; if they are the same scene, move both into one split: scores on them mean little"
    return _finding("warning", "", what, fix, texts)


def _scale_findings(scale: Mapping[str, float], tiny_classes: Sequence[str]) -> list[Finding]:
    share = scale[f"under_{TINY[0]}"]
    text = f"{share:.0%} of the objects have a side under {TINY[0]} pixels at the recipe's resolution"
    classes = f"classes of which most objects have a side under {TINY[0]} pixels at the recipe's resolution"
    fix = "raise data.short_edges, data.test_short_edge and data.long_edge"
    return [
        _finding("warning", "train", text, fix, ["all"] if share >= TINY_SHARE else []),
        _finding("warning", "train", classes, fix, tiny_classes),
    ]


def _file_findings(split: Split) -> list[Finding]:
    expected = [(int(h), int(w)) for h, w in split.annotations.image_sizes.tolist()]
    facts = split.files
    wrong = [
        f"{split.image(i)}: {f.header.shown_hw[1]} x {f.header.shown_hw[0]}, stated {hw[1]} x {hw[0]}"
        for i, (f, hw) in enumerate(zip(facts, expected, strict=True))
        if f.problem is None and hw not in (f.header.shown_hw, f.header.stored_hw)
    ]
    turned = [split.image(i) for i, f in enumerate(facts) if f.header.orientation != 1]
    stored = [
        split.image(i)
        for i, (f, hw) in enumerate(zip(facts, expected, strict=True))
        if f.problem is None and hw == f.header.stored_hw != f.header.shown_hw
    ]
    name = split.name
    missing = [f.problem for f in facts if f.problem and f.path is None]
    broken = [f.problem for f in facts if f.problem and f.path is not None and not f.too_large]
    too_large = [f.problem for f in facts if f.problem and f.too_large]
    return [
        _finding(
            "error",
            name,
            "images that are not there",
            "put them into the image folder; `tailseg data convert coco` finds those in other folders of the set",
            missing,
        ),
        _finding("error", name, "images that cannot be read", "copy or download them again", broken),
        _finding(
            "warning",
            name,
            "JPEG images whose data end before the image does: the rest is grey or blurred",
            "copy or download them again",
            [split.image(i) for i, f in enumerate(facts) if f.pixels is not None and f.pixels.run_out],
        ),
        _finding("error", name, "images that are too large", "shrink them, or cut them into pieces", too_large),
        _finding(
            "error",
            name,
            "images of another size than stated",
            "correct width and height in the file; `tailseg data convert coco` does where they are only exchanged "
            "and the objects show it",
            wrong,
        ),
        _finding(
            "note", name, "images with a camera orientation (EXIF): it is applied", "look at one of them drawn", turned
        ),
        _finding(
            "warning",
            name,
            "images annotated as stored, before the camera's orientation is applied: trained as stored",
            "check that their objects stand as people see them",
            stored,
        ),
    ]


def _pixel_findings(split: Split) -> list[Finding]:
    """Images of which decoding a sample shows that they are dark, pale or empty."""
    dark: list[str] = []
    plain: list[str] = []
    for i, facts in enumerate(split.files):
        if facts.pixels is not None and facts.pixels.levels < FEW_LEVELS:
            few = dark if facts.pixels.deep and facts.pixels.levels else plain
            few.append(split.image(i))
    return [
        _finding(
            "warning",
            split.name,
            "images of more than 8 bits whose values use less than 1/8 of the range, as 12 bits stored in 16 do: they "
            "are read as nearly one grey",
            "stretch the values to the whole range (12 bits: times 16), or save them with 8 bits",
            dark,
        ),
        _finding(
            "note",
            split.name,
            "images that are nearly of one colour: their pixels use less than 1/8 of the range",
            "look at them; if they should show more, save them again with the whole range",
            plain,
        ),
    ]


def _mask_findings(split: Split) -> list[Finding]:
    masks, name = split.masks, split.name
    where = "look at them; correct or remove the annotations"
    return [
        _finding(
            "warning",
            name,
            "images whose masks are turned by 90 degrees against boxes or image",
            "exchange the masks' x and y, or turn the image",
            split.images(masks.turned),
        ),
        _finding("warning", name, "masks without a pixel in the image", where, split.rows(masks.empty)),
        _finding("warning", name, "boxes that do not fit their masks", where, split.rows(masks.disagreeing)),
        _finding(
            "warning",
            name,
            "boxes that fit their masks only if their numbers are x0, y0, x1, y1",
            "write bbox as x, y, width, height; without the entry 'bbox' it is taken from the mask",
            split.rows(masks.corners),
        ),
        _finding(
            "warning", name, "annotations that repeat another's class and box", "keep one", split.rows(masks.duplicate)
        ),
        _finding("note", name, "boxes that reach beyond the image: cut", where, split.rows(masks.beyond)),
    ]


def _crowd_finding(split: Split) -> Finding:
    """Crowds are few; where they are many, a tool has probably written them for single objects."""
    part, count = split.annotations, split.annotations.report.crowd
    crowds = np.bincount(np.asarray(part.labels)[np.asarray(part.crowd)], minlength=len(part.categories))
    only = [c.name for c, crowd in zip(part.categories, crowds.tolist(), strict=True) if crowd and not c.instance_count]
    what = "crowds: neither objects nor background in training, ignored in evaluation"
    if not count or (not only and count < CROWD_SHARE * part.report.annotations):
        return Finding("note", split.name, what, "no action needed", count, ())
    examples = tuple(f"all of class {name}" for name in only)
    share = count / part.report.annotations
    return Finding("warning", split.name, f"{what}: {share:.0%} of all objects", CROWDS_FIX, count, examples)


def _report_findings(split: Split) -> list[Finding]:
    """Findings from reading the file; they name the first annotations."""
    report, name = split.annotations.report, split.name
    train = name == "train"
    unused = "left out of training" if train else "used as negatives"
    fix = "no action needed; data.keep_empty=true trains on them as background" if train else "no action needed"
    ignored = 'objects with "ignore": neither objects nor background in training; found or not, they do not count'
    thin = "objects under a pixel wide or high: scored, not trained on"
    counts: list[tuple[Severity, int, str, str]] = [
        ("note", report.thin, thin, "no action needed"),
        ("note", report.ignored, ignored, "no action needed"),
        ("note", report.empty_images, f"images without objects: {unused}", fix),
    ]
    found = [Finding(severity, name, what, fix, count, ()) for severity, count, what, fix in counts]
    found += [
        Finding(oddity.about.severity, name, oddity.about.meaning, oddity.about.fix, oddity.count, oddity.places)
        for oddity in report.oddities
    ]
    found.append(_crowd_finding(split))
    if name == "train":
        small = split.images(split.annotations.image_sizes.min(axis=1) < MIN_TRAIN_SIDE)
        what = f"images with a side under {MIN_TRAIN_SIDE} pixels: left out of training"
        found.append(_finding("note", name, what, "no action needed", small))
    return found
