"""Categories whose names are nearly the same: spelling, plural, underscores, one letter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Literal

from tailseg.data.sources import same_name

logger = logging.getLogger(__name__)

Likeness = Literal["spelling", "plural", "one letter"]
COMPARED = 100_000  # pairs at most: thousands of numbered classes are all one digit apart
LONGEST = 100  # letters of a name up to which one letter's difference is looked for
SHORTEST = 6  # letters of a name from which on one letter's difference is worth a look: cat and car are two things


def near_names(names: Sequence[str]) -> list[tuple[str, str, Likeness]]:
    """Pairs of names that are nearly the same, the closest kind of each pair.

    Only the first `COMPARED` candidates are looked at, spelling before plural before letters, so that any list of names
    takes a second or two.
    """
    kinds: tuple[tuple[Likeness, list[set[str]]], ...] = (
        ("spelling", [{_letters(name)} for name in names]),
        ("plural", [{_singular(_letters(name))} for name in names]),
        ("one letter", [_variants(_letters(name)) for name in names]),
    )
    found: dict[tuple[int, int], Likeness] = {}
    candidates = _candidates(kinds)
    for kind, first, second in islice(candidates, COMPARED):
        if kind != "one letter" or _one_letter(_letters(names[first]), _letters(names[second])):
            found.setdefault((first, second), kind)
    if next(candidates, None) is not None:
        logger.warning(
            "more than %s pairs of class names may be nearly the same: only the first %s are compared.",
            f"{COMPARED:,}", f"{COMPARED:,}",
        )  # fmt: skip
    return [(names[first], names[second], kind) for (first, second), kind in sorted(found.items())]


def _candidates(kinds: Sequence[tuple[Likeness, list[set[str]]]]) -> Iterator[tuple[Likeness, int, int]]:
    """The pairs of names, by position, that share a key; several times those that share several."""
    for kind, keys in kinds:
        holders: dict[str, list[int]] = {}
        for number, variants in enumerate(keys):
            for key in variants:
                holders.setdefault(key, []).append(number)
        for numbers in holders.values():
            for first, second in combinations(numbers, 2):
                yield kind, first, second


def _letters(name: str) -> str:
    """A name without case, spaces, underscores and hyphens."""
    return same_name(name.replace("-", " ")).replace(" ", "")


def _singular(name: str) -> str:
    for ending, replacement in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if name.endswith(ending) and len(name) > len(ending) + 1:
            return name.removesuffix(ending) + replacement
    return name.removesuffix("s") if name.endswith("s") and not name.endswith("ss") else name


def _variants(name: str) -> set[str]:
    """The name itself and all that one deleted letter leaves of it: names one letter apart share one of these."""
    if not SHORTEST <= len(name) <= LONGEST:
        return set()
    return {name, *(name[:i] + name[i + 1 :] for i in range(len(name)))}


def _one_letter(a: str, b: str) -> bool:
    """Return whether one letter inserted, deleted, replaced, or two neighbours exchanged make ``b`` of ``a``."""
    if len(a) > len(b):
        a, b = b, a
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    exchanged = a[start : start + 2] == b[start : start + 2][::-1]
    return a[start + 1 :] == b[start + 1 :] or (exchanged and a[start + 2 :] == b[start + 2 :])
