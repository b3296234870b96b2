"""Frequency groups: stated by a file, taken from the other split, or made by a rule on the training images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_files import annotation, content, load
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import (
    LVIS_LIMITS,
    GroupRule,
    frequency_group,
    require_rule_in_use,
    with_groups,
)
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve

THIRDS = GroupRule("quantiles")


def groups(annotations: Annotations | None) -> str:
    assert annotations is not None
    return "".join(category.frequency for category in annotations.categories)


def stating(data: dict[str, Any], letters: str) -> dict[str, Any]:
    """The file's content with these groups of its categories, in the file's order."""
    rows = [row | {"frequency": letter} for row, letter in zip(data["categories"], letters, strict=True)]
    return data | {"categories": rows}


def opened(folder: Path, name: str, data: dict[str, Any]) -> Annotations:
    (folder / name).mkdir(exist_ok=True)
    return load(folder / name, data)


@pytest.fixture
def train(tmp_path: Path) -> Annotations:
    """Categories 2, 4 and 9 in 2, 1 and 0 images; no groups stated."""
    rows = [annotation(i, image, 2) for i, image in enumerate((1, 1, 5))] + [annotation(7, 5, 4)]
    return opened(tmp_path, "train", content(rows))


def test_limits_of_lvis() -> None:
    assert [frequency_group(n) for n in (0, 10, 11, 100, 101)] == ["r", "r", "c", "c", "f"]
    assert LVIS_LIMITS.limits(np.array([5])) == (10, 100)
    assert GroupRule.of(resolve("table1/seesaw").data) == LVIS_LIMITS
    assert GroupRule.of(resolve("demo/seesaw", ["data.groups=quantiles"]).data) == THIRDS
    assert GroupRule.of(resolve("demo/seesaw", ["data.rare_max=3"]).data) == GroupRule(rare_max=3)


@pytest.mark.parametrize(
    ("counts", "limits", "letters"),
    [
        ([1, 2, 3, 4, 5, 6], (2, 4), "rrccff"),
        ([6, 5, 4, 3, 2, 1], (2, 4), "ffccrr"),
        ([1, 2, 3, 4, 5, 6, 7], (3, 5), "rrrccff"),  # thirds are rounded up
        ([0, 0, 7, 8, 9], (7, 8), "rrrcf"),  # classes without images are rare and do not count
        ([1, 1, 1, 1, 5, 9], (1, 1), "rrrrff"),  # equal counts stay in one group
        ([4, 4, 4], (4, 4), "rrr"),
        ([3], (3, 3), "r"),
        ([0, 0], (0, 0), "rr"),
        ([], (0, 0), ""),
    ],
)
def test_thirds_of_the_classes(counts: list[int], limits: tuple[int, int], letters: str) -> None:
    found = THIRDS.limits(np.array(counts, np.int64))
    assert found == limits
    assert "".join(frequency_group(n, *found) for n in counts) == letters


@given(st.lists(st.integers(1, 1000), min_size=1, unique=True))
def test_thirds_of_distinct_counts_are_of_equal_size(counts: list[int]) -> None:
    limits = THIRDS.limits(np.array(counts))
    letters = [frequency_group(n, *limits) for n in counts]
    sizes = [letters.count(letter) for letter in "rcf"]
    assert sizes[0] == -(-len(counts) // 3)
    assert sizes[0] + sizes[1] == -(-2 * len(counts) // 3)


def test_groups_by_limits(train: Annotations, tmp_path: Path) -> None:
    val = opened(tmp_path, "val", content([annotation(1, 1, 9)]))
    assert not train.frequency_stated
    ours, theirs, line = with_groups(train, val, GroupRule(rare_max=0, common_max=1))
    assert (groups(ours), groups(theirs)) == ("fcr", "fcr")
    assert line == "Groups: rare up to 0 training images, common up to 1: 1 rare, 1 common, 1 frequent."
    *_, line = with_groups(train, val)
    assert line == (
        "Groups: rare up to 10 training images, common up to 100: 3 rare, 0 common, 0 frequent; "
        "data.groups=quantiles would take thirds of the classes."
    )


def test_groups_by_thirds(train: Annotations) -> None:
    ours, none, line = with_groups(train, None, THIRDS)
    assert none is None
    assert groups(ours) == "crr"
    assert line == (
        "Groups: thirds of the classes: rare up to 1 training images, common up to 2: 2 rare, 1 common, 0 frequent."
    )


def test_a_validation_split_alone_counts_its_own_images(train: Annotations) -> None:
    none, val, line = with_groups(None, train, GroupRule(rare_max=1, common_max=2))
    assert none is None
    assert groups(val) == "crr"
    assert line.startswith("Groups: rare up to 1 images of this file, common up to 2: ")
    assert with_groups(None, None) == (None, None, "")


def test_stated_groups_count_whatever_the_rule(train: Annotations, tmp_path: Path) -> None:
    stated = opened(tmp_path, "stated", stating(content([]), "rcf"))  # of 9, 2 and 4
    other = opened(tmp_path, "other", stating(content([]), "fff"))
    for rule in (LVIS_LIMITS, THIRDS):
        assert [groups(part) for part in with_groups(stated, other, rule)[:2]] == ["cfr", "fff"]
        for splits in ((stated, train), (train, stated)):  # one split states them for both
            ours, theirs, line = with_groups(*splits, rule)
            assert (groups(ours), groups(theirs)) == ("cfr", "cfr")
            assert line == f"Groups: as {stated.path} states them: 1 rare, 1 common, 1 frequent."


def test_groups_of_some_categories_are_not_groups_of_the_file(tmp_path: Path) -> None:
    data = stating(content(), "rcf")
    del data["categories"][1]["frequency"]
    found = opened(tmp_path, "partly", data)
    assert not found.frequency_stated
    assert groups(with_groups(found, None)[0]) == "rrr"


def test_splits_need_the_same_categories(train: Annotations, tmp_path: Path) -> None:
    data = content([])
    data["categories"][0]["name"] = "lynx"
    val = opened(tmp_path, "val", data)
    with pytest.raises(UserError, match=r"category 9 is 'owl' in .* but 'lynx'"):
        with_groups(train, val)


@pytest.mark.parametrize(
    ("rule", "named", "fix"),
    [
        (THIRDS, "data.groups = quantiles", "leave data.groups at limits"),
        (GroupRule(rare_max=2), "data.rare_max = 2", "leave data.rare_max at 10"),
        (GroupRule(common_max=50), "data.common_max = 50", "leave data.common_max at 100"),
    ],
)
def test_a_rule_that_a_file_overrides(
    train: Annotations, tmp_path: Path, rule: GroupRule, named: str, fix: str
) -> None:
    stated = opened(tmp_path, "stated", stating(content([]), "rcf"))
    require_rule_in_use(rule, train, None)
    require_rule_in_use(LVIS_LIMITS, stated, stated)
    with pytest.raises(UserError) as caught:
        require_rule_in_use(rule, train, stated)
    assert str(caught.value) == (
        f"{named}: {stated.path} states the frequency of every category, which counts; {fix}, or remove 'frequency' "
        "from the categories"
    )
    with pytest.raises(UserError, match=r"a\.json and .*train\.json state the"):
        require_rule_in_use(rule, replace(stated, path=Path("a.json")), stated)
