"""Odd things in data files: counted by kind, with the first places of each, so that nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailseg.data.images import MAX_PIXELS
from tailseg.errors import UserError

Severity = Literal["error", "warning", "note"]
CROWDS_FIX = (
    "if these are single objects drawn as masks (CVAT writes iscrowd 1 for all of them), "
    "`tailseg data convert coco SRC OUT --crowds-are-objects` takes them as objects"
)
PLACES = 5  # of each kind that are kept
SHOWN = 3  # of these, in one line


class Tally:
    """Counts of odd things by kind, in the order in which the kinds were met, with the first places of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}

    def add(self, kind: str, places: Iterable[str], count: int | None = None) -> None:
        """Count as many as there are places, or ``count``, of which ``places`` are the first."""
        named = list(places)
        total = len(named) if count is None else count
        if total:
            self.counts[kind] = self.counts.get(kind, 0) + total
            known = self.places.setdefault(kind, [])
            known += named[: PLACES - len(known)]


def counted(count: int, meaning: str, places: Sequence[str]) -> str:
    """One line on a kind of odd thing: how many, what they are, and where the first of them stand."""
    shown = ", ".join([*places[:SHOWN], *(["..."] if count > SHOWN else [])])
    return f"{count:,} {meaning}" + (f" ({shown})" if places else "")


@dataclass(frozen=True, slots=True)
class OddKind:
    """A kind of odd thing in an annotation file.

    An error ends the reading; of a warning the objects are left out, or taken as something that may be wrong; a note
    is made good.
    """

    severity: Severity
    meaning: str  # plural, with what became of them
    fix: str
    dropped: bool = False  # annotations of the file that the columns do not have


_REPAIR = "`tailseg data convert coco` writes a copy in which this is done"

ODD_KINDS = {
    "image_id": OddKind("error", "images without a whole number as id", f"number them; {_REPAIR}"),
    "image_id_again": OddKind(
        "error",
        "images whose id occurs more than once",
        "give each its own; exact repeats are taken as one by `tailseg data convert coco`",
    ),
    "image_id_signs": OddKind(
        "error", "image ids below 0 beside ids from 2^63 on", f"64 bits hold only one of them: number them; {_REPAIR}"
    ),
    "image_size": OddKind(
        "error",
        "images without a sound height and width",
        f"write both in pixels, whole numbers from 1 to 65535, of at most {MAX_PIXELS:,} in all; {_REPAIR}",
    ),
    "category_id": OddKind("error", "categories without a whole number as id", f"number them; {_REPAIR}"),
    "category_id_again": OddKind("error", "categories whose id occurs more than once", "give each its own"),
    "category_name": OddKind("error", "categories without a name", "give each a name, a text"),
    "no_category": OddKind(
        "error",
        "annotations of a category that the file does not list",
        "add it or remove this annotation; `tailseg data convert coco` writes a copy without",
    ),
    "no_object": OddKind(
        "warning", "entries of the list of annotations that are no objects: left out", "remove them", True
    ),
    "no_image": OddKind(
        "warning", "annotations of an image that the file does not list: left out", "add it or remove them", True
    ),
    "no_mask": OddKind(
        "warning",
        "annotations without a mask: left out",
        "draw one or remove them; where none has a mask, `tailseg data convert coco` makes rectangles of the boxes",
        True,
    ),
    "bad_mask": OddKind(
        "warning", "annotations with a broken mask or of another size than the image: left out", "draw it again", True
    ),
    "no_box": OddKind("warning", "annotations without a sound bbox and mask: left out", "correct or remove them", True),
    "outside": OddKind(
        "warning", "annotations whose box does not meet the image: left out", "correct or remove them", True
    ),
    "no_area": OddKind(
        "warning",
        "annotations without area: left out",
        "correct it; an annotation without the entry 'area' gets that of its mask",
        True,
    ),
    "ring": OddKind("warning", "broken polygons beside sound ones of an object: left out", "draw them again"),
    "crowd_flag": OddKind("warning", "annotations whose iscrowd is neither 0 nor 1: taken as 0", "write 0 or 1"),
    "id_list": OddKind(
        "warning", "lists of category ids with entries that are none: these are left out", "write a list of numbers"
    ),
    "same_name": OddKind(
        "warning", "categories with the name of another: told apart by a number", "give each a name of its own"
    ),
    "box": OddKind(
        "note", "annotations without a sound bbox that meets the image: taken from the mask", "no action needed"
    ),
    "area": OddKind("note", "annotations without a sound area: taken from the mask", "no action needed"),
    "form": OddKind(
        "note",
        "masks or boxes in another form (a polygon in no list, points as pairs, numbers as texts): taken as meant",
        "no action needed",
    ),
    "unsigned_id": OddKind("note", "images whose id needs all of 64 bits: taken without sign", "no action needed"),
    "annotation_id": OddKind("note", "annotations without an id of their own: it is not needed", "no action needed"),
    "category_again": OddKind("note", "categories that are listed more than once: taken once", "no action needed"),
    "name_number": OddKind("note", "categories whose name is a number: taken as a text", "no action needed"),
}


@dataclass(frozen=True, slots=True)
class Oddity:
    """How often a kind of odd thing was met in a file, and where first."""

    kind: str  # of ODD_KINDS
    count: int
    places: tuple[str, ...]  # the first few: "annotation 7", or with what is wrong: "image 3: it has height 0"

    @property
    def about(self) -> OddKind:
        """What this kind means, and its fix."""
        return ODD_KINDS[self.kind]


def oddities_of(tally: Tally) -> tuple[Oddity, ...]:
    """What was met, in the order of `ODD_KINDS`: errors first."""
    met = (kind for kind in ODD_KINDS if kind in tally.counts)
    return tuple(Oddity(kind, tally.counts[kind], tuple(tally.places[kind])) for kind in met)


def require_sound(
    path: Path, oddities: Iterable[Oddity], hint: str = "; `tailseg data check` lists their kinds"
) -> None:
    """Raise UserError for the first error, if there is one; if there are more it counts them and gives the hint."""
    errors = [oddity for oddity in oddities if oddity.about.severity == "error"]
    if errors:
        first, total = errors[0], sum(oddity.count for oddity in errors)
        more = f" (1 of {total:,} such faults{hint})" if total > 1 else ""
        raise UserError(f"{path}: {first.places[0]}; {first.about.fix}{more}")
