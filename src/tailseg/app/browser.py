"""The validation set for the page: images by what was found in them, truth beside prediction, classes and examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import GROUPS
from tailseg.evaluation.findings import CLS, KINDS, MISS, RIGHT, Findings
from tailseg.evaluation.slices import DETECTIONS_SHOWN, result_row
from tailseg.visualize.analysis_charts import ERRORS, curve_chart
from tailseg.visualize.analysis_pictures import pair_of_pictures
from tailseg.wording import score_text

MISTAKES = "mistakes"
# By the names of the kinds; `MISTAKES` is all but "right".
KIND_NAMES = {
    MISTAKES: "any mistake",
    "right": "right",
    **{kind: ERRORS[kind] for kind in KINDS if kind in ERRORS and kind != "Miss"},
    "Miss": "an object that was not found",
}
CLASS_HEAD = ("class", "group", "training images", "objects", "AP", "threshold", "precision", "recall")
MOST_LINES = 8  # findings named below a picture

Content = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """The findings that the user asks for."""

    kind: str = MISTAKES  # a key of `KIND_NAMES`
    category: int | None = None  # position; None: all
    group: str | None = None  # "r", "c" or "f"


class Browser:
    """What the page shows of a validation set.

    Args:
        annotations: the split.
        findings: of the model on it.
        analysis: of masks, as `tailseg.evaluation.analysis` makes it.
        metrics: of masks: AP, APr, ...
    """

    def __init__(
        self, annotations: Annotations, findings: Findings, analysis: Content, metrics: Mapping[str, float | None]
    ) -> None:
        self.findings = findings
        self.metrics = metrics
        self._annotations = annotations
        self.categories = findings.truth.categories
        self._classes = {row["id"]: row for row in analysis["classes"]}
        groups = [self._classes.get(category["id"], category)["frequency"] for category in self.categories]
        self.groups: list[str | None] = groups
        self._labels = {category.id: label for label, category in enumerate(annotations.categories)}
        self._position = {int(id_): i for i, id_ in enumerate(annotations.image_ids.tolist())}
        self._charts = Lock()  # matplotlib's settings are those of the whole process

    def chosen(self, query: Query) -> NDArray[np.bool_]:
        """(F,) the findings that are asked for; of a class also those of others that lie on its objects."""
        findings = self.findings
        mistakes = query.kind == MISTAKES
        chosen: NDArray[np.bool_] = findings.kind != RIGHT if mistakes else findings.kind == KINDS.index(query.kind)
        if query.category is not None:
            chosen &= (findings.category == query.category) | (findings.other == query.category)
        if query.group is not None:
            members = np.array([group == query.group for group in self.groups], np.bool_)
            chosen &= members[findings.category]
        return chosen

    def images(self, query: Query) -> NDArray[np.int64]:
        """Positions of the images with such findings, those with most first; of equals in the order of their ids."""
        images, counts = np.unique(self.findings.image[self.chosen(query)], return_counts=True)
        ordered: NDArray[np.int64] = images[np.argsort(-counts, kind="stable")]
        return ordered

    def pair(self, image: int) -> tuple[str, str] | None:
        """Addresses of the picture with its objects and with the detections; None if it cannot be read."""
        findings = self.findings
        here = np.flatnonzero((findings.image == image) & (findings.kind != MISS))
        here = here[np.argsort(-findings.scores[here], kind="stable")][:DETECTIONS_SHOWN]
        rows = [
            result_row(
                findings.truth,
                findings.found,
                int(findings.row[one]),
                right=bool(findings.kind[one] == RIGHT),
                masks=True,
            )
            for one in here.tolist()
        ]
        image_id = int(findings.truth.known.image_ids[image])
        return pair_of_pictures(self._annotations, self._position[image_id], rows, self._labels)

    def name(self, image: int) -> str:
        """The image's file, without folders, or its id."""
        position = self._position[int(self.findings.truth.known.image_ids[image])]
        file = (self._annotations.file_names[position] or "").rsplit("/", 1)[-1]
        return file or f"image {self._annotations.image_id(position)}"

    def lines(self, image: int, query: Query) -> list[str]:
        """A line for each finding of an image that is asked for, sure ones first; what is beyond 8 is counted."""
        findings = self.findings
        here = np.flatnonzero(self.chosen(query) & (findings.image == image))
        here = here[np.argsort(-np.nan_to_num(findings.scores[here]), kind="stable")]
        lines = [self._line(one) for one in here[:MOST_LINES].tolist()]
        more = len(here) - len(lines)
        return [*lines, f"and {more} more"] if more else lines

    def _line(self, one: int) -> str:
        findings = self.findings
        name = self.categories[int(findings.category[one])]["name"]
        kind = KINDS[int(findings.kind[one])]
        if kind == "Miss":
            return f"{name}: not found"
        other = int(findings.other[one])
        on = f" ({self.categories[other]['name']})" if kind in ("Cls", "Both") and other >= 0 else ""
        return f"{name} {score_text(findings.scores[one])}: {KIND_NAMES[kind]}{on}"

    def class_choices(self) -> list[tuple[str, int]]:
        """Names and positions of the classes of the analysis, by name."""
        there = [one for one, category in enumerate(self.categories) if category["id"] in self._classes]
        return sorted((self.categories[one]["name"], one) for one in there)

    def class_named(self, name: str) -> int | None:
        """Position of the class of a name."""
        return next((one for one, category in enumerate(self.categories) if category["name"] == name), None)

    def class_table(self) -> list[list[Any]]:
        """A row for each class of the analysis, the lowest AP first: see `CLASS_HEAD`; shares in percent."""
        rows = sorted(self._classes.values(), key=lambda row: (row["AP"] is None, row["AP"] or 0.0, row["id"]))
        return [
            [
                row["name"],
                GROUPS.get(row["frequency"], "–"),
                row["train_images"],
                row["objects"],
                *(_percent(row["AP"]), row["threshold"]),
                *(_percent(row["precision"]), _percent(row["recall"])),
            ]
            for row in rows
        ]

    def class_facts(self, category: int) -> dict[str, str]:
        """What is known of a class, in words."""
        row = self._classes.get(self.categories[category]["id"])
        if row is None:
            return {}
        facts = {
            "AP": _said(_percent(row["AP"])),
            "Group": GROUPS.get(row["frequency"], "–"),
            "Training images": _said(row["train_images"]),
            "Objects": _said(row["objects"]),
        }
        if row["threshold"] is not None:
            shares = f"precision {_percent(row['precision'])}, recall {_percent(row['recall'])}"
            facts["Best lowest score"] = f"{score_text(row['threshold'])}: {shares}"
        on_it = (self.findings.kind == CLS) & (self.findings.other == category)
        found, counts = np.unique(self.findings.category[on_it], return_counts=True)
        taken = [f"{self.categories[found[i]]['name']} ×{counts[i]}" for i in np.argsort(-counts, kind="stable")]
        return facts | ({"Taken for": ", ".join(taken[:MOST_LINES])} if taken else {})

    def class_chart(self, category: int) -> Markup | None:
        """Precision against recall; None for a class without objects."""
        row = self._classes.get(self.categories[category]["id"])
        if row is None or not row["curve"]:
            return None
        with self._charts:
            return curve_chart(f"class-{row['id']}", {row["frequency"] or "all": row["curve"]})


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 1)


def _said(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"
