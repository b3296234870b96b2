"""Frequency groups: rare, common and frequent classes, as a file states them or by a rule on the training split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations, Category, require_same_categories
from tailseg.data.annotations.parsing import Frequency
from tailseg.errors import UserError
from tailseg.recipes.data_section import COMMON_MAX, RARE_MAX, DataRecipe

GROUPS: dict[Frequency, str] = {"r": "rare", "c": "common", "f": "frequent"}
ONE_SIDED = 0.9  # share of the classes in one group from which on the other rule is mentioned


@dataclass(frozen=True, slots=True)
class GroupRule:
    """The rule that makes the groups of files that state none."""

    kind: Literal["limits", "quantiles"] = "limits"  # the two numbers below, or thirds of the classes
    rare_max: int = RARE_MAX  # most training images of a rare class
    common_max: int = COMMON_MAX  # most training images of a common class

    @classmethod
    def of(cls, recipe: DataRecipe) -> GroupRule:
        """The rule of a recipe."""
        return cls(recipe.groups, recipe.rare_max, recipe.common_max)

    def limits(self, image_counts: NDArray[np.int64]) -> tuple[int, int]:
        """Most training images of a rare and of a common class.

        Quantiles are the counts at one and two thirds of the classes that have training images, rounded up. Classes
        with equal counts are in one group, so groups may differ in size, and classes without images are rare.

        Args:
            image_counts: (C,) training images of each class.
        """
        if self.kind == "limits":
            return self.rare_max, self.common_max
        counts = np.sort(image_counts[image_counts > 0])
        if not counts.size:
            return 0, 0
        return int(counts[-(-len(counts) // 3) - 1]), int(counts[-(-2 * len(counts) // 3) - 1])


LVIS_LIMITS = GroupRule()


def frequency_group(image_count: int, rare_max: int = RARE_MAX, common_max: int = COMMON_MAX) -> Frequency:
    """LVIS's group of a class with ``image_count`` training images."""
    return "r" if image_count <= rare_max else "c" if image_count <= common_max else "f"


def with_groups(
    train: Annotations | None, val: Annotations | None, rule: GroupRule = LVIS_LIMITS
) -> tuple[Annotations | None, Annotations | None, str]:
    """The splits with the frequency groups of their classes, and one line on where the groups come from.

    A file that states the frequency of every category keeps it; a split that states none takes the other's. If
    neither states any, the rule makes them from the training split, or from the only split there is.

    Raises:
        UserError: the splits have different categories.
    """
    splits = [split for split in (train, val) if split is not None]
    if not splits:
        return train, val, ""
    source = next((split for split in splits if split.frequency_stated), None)
    if source is None:
        source, line = _by_rule(splits[0], rule, "images of this file" if train is None else "training images")
    else:
        line = f"as {source.path} states them: {_sizes(source)}"
    train, val = (
        split if split is None or split.frequency_stated else with_frequencies_of(split, source)
        for split in (train, val)
    )
    return train, val, f"Groups: {line}."


def _by_rule(annotations: Annotations, rule: GroupRule, counted: str) -> tuple[Annotations, str]:
    rare_max, common_max = rule.limits(annotations.image_counts())
    named = [replace(c, frequency=frequency_group(c.image_count, rare_max, common_max)) for c in annotations.categories]
    found = replace(annotations, categories=tuple(named))
    line = f"rare up to {rare_max} {counted}, common up to {common_max}"
    if rule.kind == "quantiles":
        line = f"thirds of the classes: {line}"
    line = f"{line}: {_sizes(found)}"
    if rule.kind == "limits" and max(_members(found).values()) >= ONE_SIDED * len(named):
        line += "; data.groups=quantiles would take thirds of the classes"
    return found, line


def _members(annotations: Annotations) -> dict[str, int]:
    """The number of classes in each group."""
    return {name: sum(c.frequency == group for c in annotations.categories) for group, name in GROUPS.items()}


def _sizes(annotations: Annotations) -> str:
    return ", ".join(f"{count} {name}" for name, count in _members(annotations).items())


def with_frequencies_of(annotations: Annotations, other: Annotations) -> Annotations:
    """``annotations`` with the frequency groups of another split (UserError if categories differ)."""
    require_same_categories(other, annotations)
    pairs = zip(annotations.categories, other.categories, strict=True)
    categories: list[Category] = [replace(c, frequency=o.frequency) for c, o in pairs]
    return replace(annotations, categories=tuple(categories))


def require_rule_in_use(rule: GroupRule, *splits: Annotations | None) -> None:
    """Raise UserError if a rule was set that changes nothing, since a file states the groups itself."""
    stated = [str(split.path) for split in splits if split is not None and split.frequency_stated]
    for name, key in (("kind", "groups"), ("rare_max", "rare_max"), ("common_max", "common_max")):
        value, default = getattr(rule, name), getattr(LVIS_LIMITS, name)
        if stated and value != default:
            raise UserError(
                f"data.{key} = {value}: {' and '.join(stated)} {'state' if len(stated) > 1 else 'states'} the "
                f"frequency of every category, which counts; leave data.{key} at {default}, or remove 'frequency' "
                "from the categories"
            )
